"""Answers prompts on a Ray cluster, with Ray Data: a pool of workers, each with the model loaded.

Ray restarts a worker that died and hands its prompts out again; finished rows come back to this process, which alone writes.
A path to the model must be valid on all machines.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

from corral.answering.answerer import Answerer
from corral.answering.sync import SyncAnswerer
from corral.batch.local_worker import KeepRow, RowAnswerer, prompts_in_flight
from corral.batch.prompts import Prompt
from corral.errors import CorralError, EngineError, InputError, require

PROMPTS_PER_BLOCK = 16
"""Prompts that are sent to a worker together, and whose rows come back together."""


class RayWorker:
    """A worker of the pool; Ray calls it from several threads at once."""

    def __init__(self, open_answerer: Callable[[], Answerer], seed: int) -> None:
        self._answerer = SyncAnswerer(open_answerer())
        self._rows = RowAnswerer(self._answerer.answerer, seed)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """`{"row": [prompt, …]}` → `{"row": [finished row, …]}`, each as JSON. Raises: EngineError (the engine is broken)."""
        prompts = [Prompt.from_json(text) for text in batch["row"].to_pylist()]
        return {"row": [json.dumps(row) for row in self._answerer.run(self._answer(prompts))]}

    async def _answer(self, prompts: list[Prompt]) -> list[dict[str, Any]]:
        return await asyncio.gather(*map(self._rows.answer, prompts))


def answer_on_ray(
    address: str | None,
    open_answerer: Callable[[], Answerer],
    choices: int,
    seed: int,
    prompts: Iterator[Prompt],
    keep: KeepRow,
) -> None:
    """Answer all prompts on a cluster.

    Args:
        address: of the cluster; None takes RAY_ADDRESS or the cluster of this machine, else starts one here.
        open_answerer: loads the model in each worker; it is pickled.

    Raises:
        MissingExtraError: the extra `ray` is not installed.
        InputError: there is no cluster at this address, or it has neither CPU nor GPU.
        EngineError: a worker cannot load the model, or its engine fails.
        KeyboardInterrupt: by a signal.
    """
    ray = require("ray", "ray")
    data = require("ray.data", "ray")
    with _connected(ray, address):
        size, resources = _pool_size(ray.nodes())
        blocks = list(_blocks(ray, prompts))
        if not blocks:
            return
        calls = max(2, -(-prompts_in_flight(choices) // PROMPTS_PER_BLOCK))
        rows = data.from_arrow_refs(blocks).map_batches(
            RayWorker,
            fn_constructor_args=(open_answerer, seed),
            batch_size=None,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(
                size=min(size, len(blocks)),
                max_tasks_in_flight_per_actor=calls + 2,
                max_concurrent_calls_per_actor=calls,
                enable_true_multi_threading=True,
            ),
            **resources,
        )
        del blocks
        try:
            for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
                for text in batch["row"].to_pylist():
                    keep(json.loads(text))
        except (ray.exceptions.RayError, ray.data.exceptions.UserCodeException) as error:
            raise _own_error(error) from error


@contextmanager
def _connected(ray: Any, address: str | None) -> Generator[None]:
    """A session of Ray that leaves our signal handlers in place. Raises: InputError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _check_address(address or "")
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(error, address) from error
    finally:
        # Ray replaces the handler of SIGTERM.
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself would wait minutes for a cluster that does not exist. Raises: InputError."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(error, address) from None


def _no_cluster(error: Exception, address: str | None) -> InputError:
    return InputError(
        f"no Ray cluster can be used: {error}",
        where=address or "--ray",
        hint="start one (`ray start --head`), or leave the address out",
    )


def _pool_size(nodes: list[dict[str, Any]]) -> tuple[int, dict[str, float]]:
    """(workers, resources of each): one for each GPU; without GPUs one for each machine, as large as the smallest one.

    Raises:
        InputError: there is neither CPU nor GPU.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = sum(int(each.get("GPU", 0)) for each in alive)
    if gpus:
        return gpus, {"num_gpus": 1}
    cpus = [int(each["CPU"]) for each in alive if each.get("CPU", 0) >= 1]
    if not cpus:
        raise InputError("the Ray cluster has no CPU and no GPU", where="--ray", hint="add a machine: `ray start`")
    return sum(each // min(cpus) for each in cpus), {"num_cpus": min(cpus)}


def _blocks(ray: Any, prompts: Iterator[Prompt]) -> Iterator[Any]:
    """Puts the prompts into Ray's object store, which spills to disk what does not fit into memory."""
    import pyarrow as pa

    while block := [prompt.to_json() for prompt in islice(prompts, PROMPTS_PER_BLOCK)]:
        yield ray.put(pa.table({"row": block}))


def _own_error(error: BaseException) -> CorralError:
    """corral's own error that Ray's error wraps, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        for each in (cause, getattr(cause, "cause", None)):
            if isinstance(each, CorralError):
                return each
        cause = cause.__cause__
    last = str(error).strip().splitlines()
    return EngineError(f"a worker on the Ray cluster failed: {last[-1] if last else type(error).__name__}")
