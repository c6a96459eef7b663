"""The server against the engine alone and against `corral batch`; many streams; ten times too many requests.

`overhead`: a scripted engine (20 tokens in 0.2 s) answers 100 requests per second at fixed times, next to 64 open
streams of 20 tokens per second; the same load is first measured on the engine itself, in a process of its own. The
claim is the difference of the median latencies, as a client sees them. The server has a database and an API key, as a
public one would.

`streams`: 256 clients stream at the same time; any incomplete answer counts as an error.

`batch`: SmolLM2-135M-Instruct on the default CPU engine: 128 prompts, sent by as many clients at the same time, and
answered by `corral batch` with the same concurrency; tokens per second without loading, median over rounds.

`overload`: ten times as many requests per second as the engine can answer. Claims: growth of the server's memory from
the first tenth of the time to the end, and the median latency of admitted requests in the last third relative to the
first.

    python benchmarks/serve.py [--only SIDE …] [--seconds 30] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import claims
from batch import questions
from serve_load import Client, Reply, open_loop

MODEL = "asset:smollm2-135m-instruct"
TOKENS, DELAY, SLOW = 20, 0.01, 0.05
RATE, STREAMS, CLIENTS = 100, 64, 256
PLACES, WAITING, OVER = 8, 32, 10
PROMPTS, ANSWER, ROUNDS = 128, 96, 3


# ---- the process that serves ------------------------------------------------------------------------------------------


def scripted(delay: float) -> Any:
    """An engine that generates letters endlessly, one every `delay` seconds."""
    import itertools

    from corral.engines.scripted import ScriptedEngine

    ids = template().tokenizer.backend_tokenizer.encode(" a b c d e f g h", add_special_tokens=False).ids
    return ScriptedEngine(lambda *_: itertools.cycle(ids), delay_seconds=delay)


def template() -> Any:
    from corral.model.loading import load_template, resolve_model

    return load_template(resolve_model(MODEL).folder)


def serve(options: argparse.Namespace) -> None:
    """Serve until standard input is closed; the first line of output is the port and the API key."""
    import socket
    import threading

    from corral.answering.answerer import Answerer
    from corral.answering.open_model import open_model
    from corral.serving.admission import Admission, ServerLimits
    from corral.serving.app import build_app
    from corral.serving.database import Database
    from corral.serving.keys import KeyStore
    from corral.serving.models import ServedModel, ServedModels
    from corral.serving.responses import build_router
    from corral.serving.server import build_http_server

    if options.delay:
        engines = {"model": scripted(options.delay), "slow": scripted(SLOW)}
        models = ServedModels([ServedModel(Answerer(engine, template()), name) for name, engine in engines.items()])
    else:
        models = ServedModels([ServedModel(open_model(MODEL, None).answerer, "model")])
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Database(f"sqlite:///{folder}/db")) as database:
        _, secret = KeyStore(database).add("bench")
        admission = Admission(ServerLimits(at_once=options.places, waiting=options.waiting), KeyStore(database))
        app = build_app(models, admission, routers=[build_router(models, database, admission)])
        server = build_http_server(app, admission)
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        print(listener.getsockname()[1], secret, flush=True)

        def end() -> None:
            sys.stdin.read()
            server.should_exit = True

        threading.Thread(target=end, daemon=True).start()

        async def work() -> None:
            await server.serve(sockets=[listener])
            await models.close()
            await admission.close()

        asyncio.run(work())


@contextlib.contextmanager
def server(delay: float, places: int = 512, waiting: int = 512) -> Generator[tuple[Client, int]]:
    """Start a server process. Yields: a client, the process id."""
    command = [sys.executable, __file__, "--serve", "--delay", str(delay)]
    command += ["--places", str(places), "--waiting", str(waiting)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port, key = process.stdout.readline().split()
        yield Client(int(port), key), process.pid
    finally:
        process.stdin.close()
        process.wait()


def request(tokens: int, *, stream: bool = False, text: str = "say something") -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "model", "messages": messages, "max_tokens": tokens, "stream": stream}


# ---- the sides ---------------------------------------------------------------------------------------------------------


async def beside_streams(one: Any, stream: Any, seconds: float) -> list[float]:
    """Latency in seconds of each request of the open loop, next to open streams."""
    streams = [asyncio.ensure_future(stream()) for _ in range(STREAMS)]
    await asyncio.sleep(2)
    replies = await open_loop(RATE, seconds, one)
    for each in streams:
        each.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    bad = Counter(reply.status for reply in replies if reply.status != 200)
    if bad:
        sys.exit(f"failed: {dict(bad)}")
    return [reply.seconds for reply in replies]


async def bare(seconds: float) -> list[float]:
    """Run the load on the engine itself."""
    from corral.engines.base import Sampling

    fast, slow = scripted(DELAY), scripted(SLOW)
    ids = list(range(5, 40))

    async def one(due: float) -> Reply:
        await fast.submit(ids, Sampling(max_tokens=TOKENS)).completions()
        return Reply(200, b"", due, time.perf_counter() - due)

    async def stream() -> None:
        async for _ in slow.submit(ids, Sampling(max_tokens=8000)):
            pass

    return await beside_streams(one, stream, seconds)


def side_overhead(options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--bare", "--seconds", str(options.seconds)]
    alone = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    async def beside() -> list[float]:
        with server(DELAY) as (client, _):
            return await beside_streams(
                lambda due: client.ask(request(TOKENS), due),
                lambda: client.ask(request(8000, stream=True) | {"model": "slow"}),
                options.seconds,
            )

    served = asyncio.run(beside())
    figures = {"bare": quantiles(alone), "served": quantiles(served)}
    show("overhead", figures)
    return figures


def side_streams(_: argparse.Namespace) -> dict[str, Any]:
    expected = 64

    async def work() -> list[Reply]:
        with server(0.02) as (client, _):
            return await asyncio.gather(*(client.ask(request(expected, stream=True)) for _ in range(CLIENTS)))

    replies = asyncio.run(work())
    errors = sum(not whole(reply, expected) for reply in replies)
    figures = {"clients": CLIENTS, "errors": errors, "seconds": quantiles([reply.seconds for reply in replies])}
    show("streams", figures)
    return figures


def whole(reply: Reply, tokens: int) -> bool:
    """Whether a stream holds all its tokens, its usage's end and no error."""
    events = [line[6:] for line in reply.body.decode().split("\n\n") if line]
    if reply.status != 200 or not events or events[-1] != "[DONE]":
        return False
    chunks = [json.loads(event) for event in events[:-1]]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    return len(text.split()) == tokens and chunks[-1]["choices"][0]["finish_reason"] == "length"


def side_batch(_: argparse.Namespace) -> dict[str, Any]:
    rows = questions(PROMPTS)
    rounds = [{"served": asyncio.run(_served(rows)), "batch": _batched(rows)} for _ in range(ROUNDS)]
    show("batch", rounds)
    return {"rounds": rounds, "prompts": PROMPTS, "most_tokens": ANSWER}


async def _served(rows: Sequence[dict[str, Any]]) -> float:
    """Tokens per second of the server."""
    with server(0) as (client, _):
        await client.ask(request(4))
        began = time.perf_counter()
        replies = await asyncio.gather(*(client.ask(request(ANSWER) | row) for row in rows))
        seconds = time.perf_counter() - began
        if bad := [reply.body.decode() for reply in replies if reply.status != 200]:
            sys.exit(f"failed: {bad[0]}")
        return sum(json.loads(reply.body)["usage"]["completion_tokens"] for reply in replies) / seconds


def _batched(rows: Sequence[dict[str, Any]]) -> float:
    """Tokens per second of `corral batch`, without loading."""
    with tempfile.TemporaryDirectory() as name:
        prompts, out = Path(name) / "prompts.jsonl", Path(name) / "answers.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = [sys.executable, "-m", "corral", "batch", MODEL, str(prompts), "--out", str(out), "--json"]
        command += ["--max-tokens", str(ANSWER)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        outcome = json.loads(done.stdout.splitlines()[-1])
        return outcome["figures"]["tokens"] / outcome["seconds"]


def side_overload(options: argparse.Namespace) -> dict[str, Any]:
    delay = 0.02
    rate = OVER * PLACES / (TOKENS * delay)

    async def work() -> tuple[list[Reply], list[float]]:
        with server(delay, PLACES, WAITING) as (client, process):
            memory: list[float] = []

            async def watch() -> None:
                while True:
                    memory.append(resident_mb(process))
                    await asyncio.sleep(options.seconds / 100)

            watching = asyncio.ensure_future(watch())
            replies = await open_loop(rate, options.seconds, lambda due: client.ask(request(TOKENS), due))
            watching.cancel()
            return replies, memory

    replies, memory = asyncio.run(work())
    admitted = sorted((r for r in replies if r.status == 200), key=lambda r: r.began)
    third = len(admitted) // 3
    first, last = (statistics.median(r.seconds for r in part) for part in (admitted[:third], admitted[-third:]))
    refused = [r for r in replies if r.status in (429, 503) and r.retry]
    figures = {
        "requests_per_second": rate,
        "seconds": options.seconds,
        "statuses": dict(Counter(str(r.status) for r in replies)),
        "neither_answered_nor_told_when_to_return": len(replies) - len(admitted) - len(refused),
        "admitted_p50_first": first,
        "admitted_p50_last": last,
        "refused": quantiles([r.seconds for r in refused]),
        "memory_mb": {"early": max(memory[5:15]), "end": memory[-1], "peak": max(memory)},
    }
    show("overload", figures)
    return figures


def resident_mb(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"p{q}_ms": 1000 * ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (50, 90, 99)}


def show(name: str, figures: Any) -> None:
    print(f"{name}: {json.dumps(figures)}", flush=True)


SIDES = {"overhead": side_overhead, "streams": side_streams, "batch": side_batch, "overload": side_overload}


def make_claims(figures: dict[str, Any]) -> list[claims.Claim]:
    """The claims for the sides that were measured."""
    result: list[claims.Claim] = []
    if part := figures.get("overhead"):
        value = part["served"]["p50_ms"] - part["bare"]["p50_ms"]
        result.append(claims.Claim("serve_overhead_p50_ms_64", value, "ms", 5, "<="))
    if part := figures.get("streams"):
        result.append(claims.Claim("serve_errors_256", part["errors"], "errors", 0, "<="))
    if part := figures.get("batch"):
        ratio = statistics.median(each["served"] / each["batch"] for each in part["rounds"])
        result.append(claims.Claim("serve_vs_batch", ratio, "×", 0.95))
    if part := figures.get("overload"):
        memory = part["memory_mb"]
        growth, steady = memory["end"] - memory["early"], part["admitted_p50_last"] / part["admitted_p50_first"]
        result.append(claims.Claim("overload_memory_growth_mb", growth, "MB", 20, "<="))
        result.append(claims.Claim("overload_admitted_p50_ratio", steady, "×", 1.2, "<="))
        left = part["neither_answered_nor_told_when_to_return"]
        result.append(claims.Claim("overload_lost_requests", left, "requests", 0, "<="))
    return result


def main() -> int:
    parser = claims.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES), help="measure only these")
    parser.add_argument("--seconds", type=float, default=30, help="duration of the load, for overhead and overload")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--delay", type=float, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--places", type=int, default=512, help=argparse.SUPPRESS)
    parser.add_argument("--waiting", type=int, default=512, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return 0
    if options.bare:
        print(json.dumps(asyncio.run(bare(options.seconds))))
        return 0
    figures = {name: SIDES[name](options) for name in options.only}
    return claims.report(make_claims(figures), figures, ["fastapi", "uvicorn", "openvino-genai", "torch"], options.json)


if __name__ == "__main__":
    sys.exit(main())
