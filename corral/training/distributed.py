"""The processes of one run, as torchrun starts them: rank, collective operations on small values, and a common end.

Control values (losses, requests to stop, which stage comes next) travel over gloo and torchrun's store, between hosts'
memories; gradients and weights are `sharding`'s. Rank 0 alone prepares, merges, evaluates and writes; the other ranks
wait in `receive_from_main` for the stages that need them.

corral starts no processes and has no cluster code: that is torchrun's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Generator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from corral.errors import CorralError, InputError, PeerError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# A process that dies closes its connections, so the others notice at once. This limit is for one that hangs, and must
# allow for what rank 0 does alone, such as writing a large checkpoint to a slow disk.
_TIMEOUT = timedelta(hours=3)
_POLL_SECONDS = 0.2
_SAME_FAULT_SECONDS = 3.0
_EXIT_DELAY_SECONDS = 10.0  # torchrun names the process that ended first, which should be the one at fault


class World:
    """The processes of a run; by default this one alone.

    As a context manager it connects them and makes them end together: the error that ends rank 0 ends the others.

    Args:
        rank: of this process, from 0.
        size: number of processes.
        store: from torch's rendezvous; needed for more than one process.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        self.rank, self.size = rank, size
        self._store, self._messages = store, 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and reports progress."""
        return self.rank == 0

    def all_reduce_sums(self, values: Sequence[float]) -> list[float]:
        """The sums over processes, added in order of rank, so that they are bit-equal on all of them."""
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        own = torch.tensor(values, dtype=torch.float64)
        received = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(received, own)
        return [sum(of_ranks) for of_ranks in zip(*(each.tolist() for each in received), strict=True)]

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is true on any process."""
        return self.all_reduce_sums([float(flag)])[0] > 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all processes. Objects are pickled, between processes of one run only."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def send_to_others(self, message: Mapping[str, Any]) -> None:
        """Queue a message that the other processes receive in order. Only rank 0 may call it."""
        if self._store is not None:
            self._store.set(f"corral/message/{self._messages}", json.dumps(message))
            self._messages += 1

    def receive_from_main(self) -> dict[str, Any]:
        """Wait for the next message of rank 0, without a time limit; signals are handled meanwhile.

        Raises:
            PeerError: the store is gone, and with it the run.
        """
        key = f"corral/message/{self._messages}"
        while not self._has(key):
            time.sleep(_POLL_SECONDS)  # a wait inside the store would delay signals
        self._messages += 1
        return json.loads(self._get(key))

    def _has(self, key: str) -> bool:
        assert self._store is not None
        with self.peer_errors():
            return self._store.check([key])

    def _get(self, key: str) -> bytes:
        assert self._store is not None
        with self.peer_errors():
            return self._store.get(key)

    @contextlib.contextmanager
    def peer_errors(self) -> Generator[None]:
        """Around collective work: a network error, the sign that another process has ended, becomes a PeerError."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_network_error(error):
                raise
            raise PeerError(
                "another process of this run has ended",
                where=f"rank {self.rank} of {self.size}",
                hint="its own message says why; the same command resumes from the last checkpoint",
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
                self.send_to_others({"end": 0 if error is None else _exit_code(error)})
        if error is None:
            import torch.distributed as dist

            dist.destroy_process_group()
        elif not self.is_main and not self._is_own_error(error):
            time.sleep(_EXIT_DELAY_SECONDS)
            raise SystemExit(_exit_code(error)) from None
        elif not self.is_main and isinstance(error, CorralError):
            error.what = f"rank {self.rank} of {self.size}: {error.what}"

    def _is_own_error(self, error: BaseException) -> bool:
        """Whether this process should report its error: not one that rank 0 has too, nor the end of another process."""
        if not isinstance(error, Exception) or isinstance(error, PeerError):
            return False
        until = time.monotonic() + _SAME_FAULT_SECONDS
        with contextlib.suppress(PeerError):
            while time.monotonic() < until:
                if self._has("corral/failed/0"):
                    return self._get("corral/failed/0").decode() != str(error)
                time.sleep(_POLL_SECONDS)
        return True


def world_from_environment() -> World:
    """The World that torchrun's environment variables describe; without them, this process alone. Enter it to connect.

    On a machine with GPUs each process takes the one of its local rank.

    Raises:
        InputError: there are more processes than GPUs here, or the environment is incomplete.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    import torch
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if local_size > torch.cuda.device_count():
            raise InputError(
                f"{local_size} processes are started on a machine with {torch.cuda.device_count()} GPUs",
                where="torchrun --nproc-per-node",
                hint="start one process per GPU; to train on the CPU, hide the GPUs: CUDA_VISIBLE_DEVICES=",
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        store, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
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

    # Both on a GPU machine: gradients between GPUs, control values between hosts, without waiting for a GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)


def _is_network_error(error: RuntimeError) -> bool:
    from torch.distributed import DistError

    # gloo's own errors are plain RuntimeErrors, which begin with the path of its source.
    return isinstance(error, DistError) or "gloo" in str(error).lower()


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "signal", signal.SIGINT)
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return getattr(error, "exit_code", 1)
