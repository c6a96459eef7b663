"""The benchmark of the server, walked through small: every side gives figures, and every claim has one."""

from __future__ import annotations

import argparse
import contextlib
import importlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def running() -> Generator[Callable[..., Any]]:
    """As the benchmark's `running`; but sides that differ only in the engine's speed take the same process."""
    started: dict[tuple[str, ...], Any] = {}
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.syspath_prepend(str(BENCHMARKS))
        run = importlib.import_module("serve_process").running

        @contextlib.contextmanager
        def lend(what: str, delay: float, *options: str) -> Generator[Any]:
            key = (what, *options)
            if key not in started:
                started[key] = stack.enter_context(run(what, delay, *options))
            yield started[key]

        yield lend


@pytest.fixture
def serve(running: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module, with few and short streams."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("serve")
    for name, value in {
        "running": running,
        "RATE": 10,
        "STREAMS": 2,
        "CLIENTS": 4,
        "STREAMED": 8,
        "EACH": 1,
        "RATE_CLIENTS": (1, 2),
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


OPTIONS = argparse.Namespace(seconds=1.0, rounds=1, scale=0.01)


@pytest.mark.parametrize(
    ("side", "names"),
    [
        ("overhead", {"serve_overhead_p50_ms_64"}),
        ("rate", {"first_token_overhead_ms", "stream_rate_vs_raw_1", "stream_rate_vs_raw_2"}),
        ("streams", {"serve_errors_256"}),
        ("stall", {"loop_stall_ms_max", "hostile_requests_failed"}),
        ("overload", {"overload_memory_growth_mb", "overload_admitted_p50_ratio", "overload_lost_requests"}),
    ],
)
def test_a_side_gives_its_claims(side: str, names: set[str], serve: Any) -> None:
    figures = serve.SIDES[side](OPTIONS)
    found = serve.make_claims({side: figures})
    assert {claim.name for claim in found} == names
    for claim in found:
        assert claim.value == pytest.approx(claim.value)  # no NaN
    if side == "streams":
        assert figures["errors"] == 0


def test_an_incomplete_stream_is_an_error(serve: Any) -> None:
    chunk = b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}\n\n'
    end = b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'
    assert serve.whole(serve.Reply(200, chunk + end, 0, 0), 1)
    assert not serve.whole(serve.Reply(200, chunk + end, 0, 0), 2)
    assert not serve.whole(serve.Reply(200, chunk, 0, 0), 1)
    assert not serve.whole(serve.Reply(503, chunk + end, 0, 0), 1)
