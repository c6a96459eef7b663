"""Real programs with real clients against a real server: each does what its users do."""

from __future__ import annotations

import importlib.util

import pytest

from tests.clients.programs_run import CLIENTS, CLIENTS_PYTHON, run_program
from tests.serving.conftest import RunningServer

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not CLIENTS_PYTHON.exists(), reason="no clients are installed: make .venv-clients/.installed"),
]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_does_all_that_its_users_do(client: str, server: RunningServer) -> None:
    if client == "lm_eval" and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed: pip install 'lm-eval[api]'")
    results = run_program(client, f"{server.url}/v1")
    assert len(results) >= 3
    assert {name: fault for name, fault in results.items() if fault} == {}
