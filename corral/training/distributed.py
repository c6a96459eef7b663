"""The processes of one run, as torchrun starts them: which one this is, what they agree on, and how they end together.

What steers the run (losses, requests to stop, which stage comes next) goes between the hosts' memories, over gloo and the
store that torchrun keeps; gradients and weights are the business of `sharding`. The first process alone prepares, merges,
evaluates and writes; the others `hear` which stages they are needed for.

Knows nothing about models, stages or files. It starts no process and knows no cluster: that is torchrun's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Generator, Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from corral.errors import CorralError, InputError, PeerError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# A process that dies closes its connections, and the others learn of it at once. This is for what hangs without dying,
# and has to leave room for what the first process does alone: writing a large checkpoint to a slow disk.
_PATIENCE = timedelta(hours=3)
_LISTEN_EVERY = 0.2  # seconds
_SAME_FAULT_WITHIN = 3.0  # seconds
_LAST_WORD = 10.0  # seconds; torchrun names the process that ended first, which should be the one at fault


class World:
    """The processes that take part in a run; by default, this one alone.

    As a context it joins them, and sees to it that they leave together: whatever ends the first one is told to the others.

    Args:
        rank: of this process, from 0.
        size: how many there are.
        store: what torch's rendezvous gave; needed for more than one.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        self.rank, self.size = rank, size
        self._store, self._told = store, 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum over processes, added in order of rank: the same bits everywhere."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        mine = torch.tensor([value], dtype=torch.float64)
        values = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(values, mine)
        return sum(v.item() for v in values)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return self.sum(float(flag)) > 0

    def from_main(self, value: Any) -> Any:
        """The first process's value, on all of them. Objects go by pickle, between processes of one run only."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def tell(self, message: Mapping[str, Any]) -> None:
        """Leave word for the others, who hear it in order. Only the first process tells."""
        if self._store is not None:
            self._store.set(f"corral/told/{self._told}", json.dumps(message))
            self._told += 1

    def hear(self) -> dict[str, Any]:
        """The next word of the first process, however long that takes. Signals are heeded meanwhile.

        Raises:
            PeerError: the store is gone, and so is the run.
        """
        key = f"corral/told/{self._told}"
        while not self._has(key):
            time.sleep(_LISTEN_EVERY)  # waiting in the store itself would hold signals back
        self._told += 1
        return json.loads(self._get(key))

    def _has(self, key: str) -> bool:
        assert self._store is not None
        with self.together():
            return self._store.check([key])

    def _get(self, key: str) -> bytes:
        assert self._store is not None
        with self.together():
            return self._store.get(key)

    @contextlib.contextmanager
    def together(self) -> Generator[None]:
        """Around work that all do: the end of another process becomes a PeerError."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_of_the_network(error):
                raise
            raise PeerError(
                "another process of this run has ended",
                where=f"rank {self.rank} of {self.size}",
                hint="its own message says why; the same command goes on from the last checkpoint",
            ) from error

    def __enter__(self) -> Self:
        if self._store is not None:
            _connect(self._store, self.rank, self.size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):  # the store may be gone
            if error is not None:
                self._store.set(f"corral/failed/{self.rank}", str(error))
            if self.is_main:
                self.tell({"end": 0 if error is None else _exit_code(error)})
        if error is None:
            import torch.distributed as dist

            dist.destroy_process_group()
        elif not self.is_main and not self._should_say(error):
            time.sleep(_LAST_WORD)
            raise SystemExit(_exit_code(error)) from None
        elif not self.is_main and isinstance(error, CorralError):
            error.what = f"rank {self.rank} of {self.size}: {error.what}"

    def _should_say(self, error: BaseException) -> bool:
        """Whether a fault of this process is its own: not the first one's too, and no echo of another's."""
        if not isinstance(error, Exception) or isinstance(error, PeerError):
            return False
        until = time.monotonic() + _SAME_FAULT_WITHIN
        with contextlib.suppress(PeerError):
            while time.monotonic() < until:
                if self._has("corral/failed/0"):
                    return self._get("corral/failed/0").decode() != str(error)
                time.sleep(_LISTEN_EVERY)
        return True


def join() -> World:
    """The world that torchrun's environment speaks of; without it, this process alone. Enter it to connect.

    On a machine with GPUs each process takes the one of its local rank.

    Raises:
        InputError: there are more processes than GPUs here, or the environment is not whole.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    import torch
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        here, local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        if here > torch.cuda.device_count():
            raise InputError(
                f"{here} processes are started on a machine with {torch.cuda.device_count()} GPUs",
                where="torchrun --nproc-per-node",
                hint="start one process a GPU; to train on the CPU, hide the GPUs: CUDA_VISIBLE_DEVICES=",
            )
        torch.cuda.set_device(local)
    try:
        store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
    except ValueError as error:
        raise InputError(
            f"WORLD_SIZE is {size}, but: {error}",
            where="environment",
            hint="start with `torchrun --nproc-per-node N -m corral run RECIPE`",
        ) from None
    return World(rank, size, store)


def _connect(store: Store, rank: int, size: int) -> None:
    import torch
    import torch.distributed as dist

    # Both on a GPU machine: gradients go between GPUs, and what steers between hosts, without waiting for a GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)


def _is_of_the_network(error: RuntimeError) -> bool:
    from torch.distributed import DistError

    # gloo's own errors are plain RuntimeErrors, which begin with the path of its source.
    return isinstance(error, DistError) or "gloo" in str(error).lower()


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "signal", signal.SIGINT)
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return getattr(error, "exit_code", 1)
