import pytest

# The suite's assertions explain themselves like those of a test file, though no test file holds them.
pytest.register_assert_rewrite("tests.engines.conformance")
