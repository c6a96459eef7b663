from __future__ import annotations

import sys
from pathlib import Path

import pytest

from corral.errors import MissingExtraError, OutOfMemoryError, out_of_memory_errors, require


def test_what_is_installed_is_imported() -> None:
    import json.decoder

    assert require("json.decoder", "anything") is json.decoder


@pytest.mark.parametrize("module", ["nowhere_at_all.inside", "needs_another", "hidden"])
def test_a_missing_package_is_named_with_the_extra_to_install(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_another.py").write_text("import the_other_one")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "hidden", None)
    missing = {"needs_another": "the_other_one", "hidden": "hidden"}.get(module, "nowhere_at_all")
    with pytest.raises(MissingExtraError, match=f"'{missing}'") as caught:
        require(module, "moon")
    assert caught.value.hint == 'pip install "corral[moon]"'
    assert caught.value.exit_code == 3
    assert caught.value.__cause__ is None


def test_a_package_that_is_broken_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_one.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        require("broken_one", "moon")


def test_only_a_lack_of_memory_is_called_that() -> None:
    for error in (MemoryError(), RuntimeError("CUDA error: out of memory"), OSError(12, "Cannot allocate memory")):
        with pytest.raises(OutOfMemoryError) as caught, out_of_memory_errors("while x", where="here", hint="less"):
            raise error
        assert (caught.value.where, caught.value.hint) == ("here", "less")
    for other in (RuntimeError("shapes differ"), ValueError("out of memory"), OSError(28, "No space left on device")):
        with pytest.raises(type(other)), out_of_memory_errors("while x", where="here", hint="less"):
            raise other
