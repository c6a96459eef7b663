"""The server against the bare engine and against `corral batch`; many streams; hostile requests; ten times too many requests.

The bare engine runs in a process of its own, as the server does, behind one line of JSON and a line per token: the
difference is what corral's server adds, as a client sees it. The server has a database and an API key, as a public one
would.

`overhead`: a scripted engine (20 tokens in 0.2 s) answers 100 requests per second at fixed times, next to 64 open
streams of 20 tokens per second. The claim is the difference of the median latencies; the 99th percentiles are printed
too.

`rate`: 1, 8 and 32 clients stream 100 tokens, 100 tokens per second each, one stream after another. Claims: the tokens
per second of the server relative to the bare engine, and at 32 clients the difference of the median times to the first
token. Medians over rounds, in which the two sides take turns.

`streams`: 256 clients stream at the same time; any incomplete answer counts as an error.

`stall`: the requests of `serve_fuzz.py`, one after another. The claim is for how long the server's event loop ran
nothing else, at most. Each round starts a new server; a request's stall is its median.

`batch`: SmolLM2-135M-Instruct on the default CPU engine: 128 prompts, sent by as many clients at the same time, and
answered by `corral batch` with the same concurrency; tokens per second without loading, median over rounds.

`overload`: ten times as many requests per second as the engine can answer. Claims: growth of the server's memory from
the first tenth of the time to the end, and the median latency of admitted requests in the last third relative to the
first.

    python benchmarks/serve.py [--only SIDE …] [--seconds 30] [--rounds 3] [--scale 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import claims
import serve_fuzz
from batch import questions
from serve_load import Ask, Client, Reply, closed_loop, open_loop, quantiles
from serve_process import MODEL, Process, running

TOKENS, DELAY = 20, 0.01
RATE, STREAMS, CLIENTS = 100, 64, 256
STREAMED, RATE_CLIENTS, EACH = 100, (1, 8, 32), 8
PLACES, WAITING, OVER = 8, 32, 10
PROMPTS, ANSWER = 128, 96
LONG_STALL_MS = 50
STORED_CALLS = 5
"""Times 20 items of 40,000 characters: a stored conversation of 4 MB, the most that one holds."""


def request(tokens: int, *, stream: bool = False, text: str = "say something", model: str = "model") -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "stream": stream}


def side_overhead(options: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for what in ("bare", "served"):
        with running(what, DELAY) as process:
            figures[what] = quantiles(asyncio.run(_beside_streams(process.connect().ask, options.seconds)))
    show("overhead", figures)
    return figures


async def _beside_streams(ask: Ask, seconds: float) -> list[float]:
    """Latency in seconds of each request of the open loop, next to open streams."""
    streams = [asyncio.ensure_future(ask(request(8000, stream=True, model="slow"), None)) for _ in range(STREAMS)]
    await asyncio.sleep(2)
    if ended := [stream.result() for stream in streams if stream.done()]:
        sys.exit(f"a stream ended: {ended[0].status} {ended[0].body.decode()}")
    replies = await open_loop(RATE, seconds, lambda due: ask(request(TOKENS), due))
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    if bad := Counter(reply.status for reply in replies if reply.status != 200):
        sys.exit(f"failed: {dict(bad)}")
    return [reply.seconds for reply in replies]


def side_rate(options: argparse.Namespace) -> dict[str, Any]:
    """For each number of clients and each side: tokens per second, and times to the first token, of each round."""
    figures: dict[str, Any] = {str(clients): {"bare": [], "served": []} for clients in RATE_CLIENTS}
    for _ in range(options.rounds):
        for what in ("bare", "served"):
            with running(what, DELAY) as process:
                for clients, figure in asyncio.run(_stream_rates(process.connect().ask)).items():
                    figures[clients][what].append(figure)
    show("rate", figures)
    return figures


async def _stream_rates(ask: Ask) -> dict[str, dict[str, Any]]:
    """For each number of clients: tokens per second of all together, and quantiles of the time to the first token."""
    figures: dict[str, dict[str, Any]] = {}
    body = request(STREAMED, stream=True)
    for clients in RATE_CLIENTS:
        await closed_loop(ask, body, clients, 1)
        replies, seconds = await closed_loop(ask, body, clients, EACH)
        firsts = [reply.first for reply in replies if reply.status == 200 and reply.first is not None]
        if len(firsts) < len(replies):
            sys.exit(f"failed: {Counter(reply.status for reply in replies)}")
        rate = STREAMED * len(replies) / seconds
        figures[str(clients)] = {"tokens_per_second": rate, "first_token": quantiles(firsts)}
    return figures


def side_streams(_: argparse.Namespace) -> dict[str, Any]:
    expected = 64

    async def work(client: Client) -> list[Reply]:
        return await asyncio.gather(*(client.ask(request(expected, stream=True)) for _ in range(CLIENTS)))

    with running("served", 0.02) as process:
        replies = asyncio.run(work(process.connect()))
    errors = sum(not whole(reply, expected) for reply in replies)
    figures = {"clients": CLIENTS, "errors": errors, "seconds": quantiles([reply.seconds for reply in replies])}
    show("streams", figures)
    return figures


def whole(reply: Reply, tokens: int) -> bool:
    """Whether a stream holds all its tokens, its finish reason and no error."""
    lines = [line[6:] for line in reply.body.decode().splitlines() if line.startswith("data: ")]
    if reply.status != 200 or not lines or lines[-1] != "[DONE]":
        return False
    chunks = [json.loads(line) for line in lines[:-1]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return len(text.split()) == tokens and choices[-1]["finish_reason"] == "length"


def side_stall(options: argparse.Namespace) -> dict[str, Any]:
    """The stall of each request in milliseconds, the statuses, and those that were not answered properly."""
    stalls: dict[str, list[float]] = {}
    statuses: dict[str, list[int]] = {}
    for _ in range(options.rounds):
        with running("served", 0.0001, "--embed") as process:
            for name, (status, stall) in asyncio.run(_hostile(process, options.scale)).items():
                stalls.setdefault(name, []).append(stall)
                statuses.setdefault(name, []).append(status)
    medians = {name: statistics.median(many) for name, many in stalls.items()}
    worst = dict(sorted(medians.items(), key=lambda each: -each[1])[:20])
    figures = {
        "requests": len(medians),
        "max_ms": max(medians.values()),
        "worst_ms": worst,
        "statuses": dict(Counter(str(status) for many in statuses.values() for status in many)),
        "failed": [name for name, many in statuses.items() if any(status in (0, 500) for status in many)],
    }
    show("stall", figures)
    return figures


async def _hostile(process: Process, scale: float) -> dict[str, tuple[int, float]]:
    """Status and stall of each hostile request, of a server that nothing else uses."""
    client = process.connect()
    created = await client.send("POST", serve_fuzz.CONVERSATIONS, b"{}")
    conversation: str = json.loads(created.body)["id"]
    items = json.dumps({"items": serve_fuzz.prepare(20)}).encode()
    for _ in range(max(1, int(STORED_CALLS * scale))):
        added = await client.send("POST", f"{serve_fuzz.CONVERSATIONS}/{conversation}/items", items)
        if added.status != 200:
            sys.exit(f"failed: {added.status} {added.body.decode()[:300]}")
    await client.ask(request(4))
    await client.send("POST", serve_fuzz.EMBEDDINGS, b'{"model": "all-minilm-l6-v2", "input": "loads the model"}')
    result: dict[str, tuple[int, float]] = {}
    for each in serve_fuzz.requests("model", scale):
        process.longest_stall_ms()
        path = each.path.replace("{conversation}", conversation)
        content = each.content.replace(b"{conversation}", conversation.encode())
        reply = await client.send(each.method, path, content)
        stall = process.longest_stall_ms()
        result[each.name] = reply.status, stall
        if stall > LONG_STALL_MS or reply.status in (0, 500):
            print(f"{each.name}: {stall:.0f} ms, status {reply.status}", file=sys.stderr, flush=True)
    return result


def side_batch(options: argparse.Namespace) -> dict[str, Any]:
    rows = questions(PROMPTS)
    rounds: list[dict[str, float]] = []
    for _ in range(options.rounds):
        with running("served", 0) as process:
            served = asyncio.run(_served(process.connect(), rows))
        rounds.append({"served": served, "batch": _batched(rows)})
    show("batch", rounds)
    return {"rounds": rounds, "prompts": PROMPTS, "most_tokens": ANSWER}


async def _served(client: Client, rows: Sequence[dict[str, Any]]) -> float:
    """Tokens per second of the server."""
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
    with running("served", delay, "--places", str(PLACES), "--waiting", str(WAITING)) as process:
        replies, memory = asyncio.run(_overloaded(process, rate, options.seconds))
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
        "admitted": quantiles([r.seconds for r in admitted]),
        "refused": quantiles([r.seconds for r in refused]),
        "memory_mb": {"early": max(memory[5:15]), "end": memory[-1], "peak": max(memory)},
    }
    show("overload", figures)
    return figures


async def _overloaded(process: Process, rate: float, seconds: float) -> tuple[list[Reply], list[float]]:
    """The replies, and the server's memory in MB at a hundred moments."""
    memory: list[float] = []

    async def watch() -> None:
        while True:
            memory.append(resident_mb(process.pid))
            await asyncio.sleep(seconds / 100)

    ask = process.connect().ask
    watching = asyncio.ensure_future(watch())
    replies = await open_loop(rate, seconds, lambda due: ask(request(TOKENS), due))
    watching.cancel()
    return replies, memory


def resident_mb(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def show(name: str, figures: Any) -> None:
    print(f"{name}: {json.dumps(figures)}", flush=True)


SIDES = {
    "overhead": side_overhead,
    "rate": side_rate,
    "streams": side_streams,
    "stall": side_stall,
    "batch": side_batch,
    "overload": side_overload,
}


def make_claims(figures: dict[str, Any]) -> list[claims.Claim]:
    """The claims for the sides that were measured."""
    result: list[claims.Claim] = []

    def at_most(name: str, value: float, unit: str, goal: float) -> None:
        result.append(claims.Claim(name, value, unit, goal, "<="))

    if part := figures.get("overhead"):
        at_most("serve_overhead_p50_ms_64", part["served"]["p50_ms"] - part["bare"]["p50_ms"], "ms", 5)
    if part := figures.get("rate"):
        most = part[str(RATE_CLIENTS[-1])]
        bare, served = (
            statistics.median(each["first_token"]["p50_ms"] for each in most[what]) for what in ("bare", "served")
        )
        at_most("first_token_overhead_ms", served - bare, "ms", 10)
        for clients, sides in part.items():
            pairs = zip(sides["served"], sides["bare"], strict=True)
            ratio = statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)
            result.append(claims.Claim(f"stream_rate_vs_raw_{clients}", ratio, "×", 0.95))
    if part := figures.get("streams"):
        at_most("serve_errors_256", part["errors"], "errors", 0)
    if part := figures.get("stall"):
        at_most("loop_stall_ms_max", part["max_ms"], "ms", LONG_STALL_MS)
        at_most("hostile_requests_failed", len(part["failed"]), "requests", 0)
    if part := figures.get("batch"):
        ratio = statistics.median(each["served"] / each["batch"] for each in part["rounds"])
        result.append(claims.Claim("serve_vs_batch", ratio, "×", 0.95))
    if part := figures.get("overload"):
        memory = part["memory_mb"]
        at_most("overload_memory_growth_mb", memory["end"] - memory["early"], "MB", 20)
        at_most("overload_admitted_p50_ratio", part["admitted_p50_last"] / part["admitted_p50_first"], "×", 1.2)
        at_most("overload_lost_requests", part["neither_answered_nor_told_when_to_return"], "requests", 0)
    return result


def main() -> int:
    parser = claims.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES), help="measure only these")
    parser.add_argument("--seconds", type=float, default=30, help="duration of the load, for overhead and overload")
    parser.add_argument("--rounds", type=int, default=3, help="of rate, stall and batch")
    parser.add_argument("--scale", type=float, default=1, help="of the hostile requests; less only to try")
    options = parser.parse_args()
    figures = {name: SIDES[name](options) for name in options.only}
    return claims.report(make_claims(figures), figures, ["fastapi", "uvicorn", "openvino-genai", "torch"], options.json)


if __name__ == "__main__":
    sys.exit(main())
