"""Measures memory: of this process, of a model's weights, of what layers keep for the backward pass, of a computation."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from corral.model.compute.cpu_matmul import times_transposed
from corral.model.packed_forward import head_logprobs, hidden_states
from corral.system import peak_memory, proc_bytes

_PRODUCTS = 20


def resident_bytes() -> int:
    """Bytes of memory that this process holds now, files it maps left out; where not on Linux, the most it ever held."""
    try:
        pages, shared = Path("/proc/self/statm").read_text().split()[1:3]
    except OSError:
        return peak_memory() or 0
    return (int(pages) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def _status_bytes(name: str) -> int:
    """A field of `/proc/self/status` in bytes; where not on Linux, the most that this process ever held."""
    return proc_bytes("self/status", name) or peak_memory() or 0


class MemoryMeter:
    """Measures the memory of this process, or what it has allocated on the GPU.

    Attributes:
        baseline: bytes in use before a model is loaded.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if self._cuda:
            free = torch.cuda.mem_get_info()[0]
            torch.zeros(1, device="cuda")
            self.baseline = max(0, free - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved())
            if not self.baseline:
                self.baseline = torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]
        else:
            importlib.import_module("corral.preflight.preload")  # what a run has imported when it loads its model
            self.baseline = _status_bytes("VmRSS")

    def peak(self) -> int:
        """The most bytes in use since `reset`."""
        if self._cuda:
            return torch.cuda.max_memory_reserved() + self.baseline
        return _status_bytes("VmHWM")

    def reset(self) -> None:
        """Start a new peak."""
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # where the kernel forbids it, the peak includes loading
                Path("/proc/self/clear_refs").write_text("5")


def measure_pass(model: Any, ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> dict[str, int]:
    """One forward pass: bytes of `activations` kept by the layers, bytes of the output layer's `head`, and `pack_tokens`."""
    model.train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Any] = {}

    def save(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        hidden = hidden_states(model, ids)
    activations = sum(storage.nbytes() for storage in saved.values())
    saved.clear()
    starts = [sum(map(len, ids[:i])) for i in range(len(ids))]
    rows = [start + p - 1 for start, ps in zip(starts, positions, strict=True) for p in ps]
    targets = [s[p] for s, ps in zip(ids, positions, strict=True) for p in ps]
    picked = hidden.detach()[torch.tensor(rows, device=hidden.device)].requires_grad_()
    del hidden
    compute = partial(head_logprobs, model, picked, torch.tensor(targets, device=picked.device))
    head = peak_allocation(compute, picked.device.type) + picked.nbytes
    return {"activations": activations, "head": head, "pack_tokens": sum(map(len, ids))}


def peak_allocation(compute: Callable[[], Any], device: str) -> int:
    """The most bytes of tensors that a computation allocates at once."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        compute()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    inner: Any = profiler.profiler
    events = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def weights_bytes(model: Any) -> int:
    """Bytes of a model's weights and buffers, with the scales of quantised ones; shared tensors count once."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for each in (state, getattr(state, "state2", None)):
            tensors += [getattr(each, name, None) for name in ("absmax", "code", "offset")]
        tensors.append(getattr(parameter, "SCB", None))
    return tensor_bytes([{"tensors": tensors}])


def tensor_bytes(states: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of the tensors in dictionaries of tensors, lists and other values; shared memory counts once."""
    storages: dict[int, int] = {}
    for state in states:
        for value in state.values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def unused_mapped_bytes(model: Any) -> int:
    """Bytes of a model's mapped files that are in memory though no weight uses them.

    One weight that is used straight from its file keeps the whole file mapped, also where the other weights were quantised
    into new memory. Those pages count as resident, and the system takes them back when memory is wanted.
    """
    starts = {p.data_ptr(): p.nbytes for p in model.parameters()}
    unused = 0
    with contextlib.suppress(OSError):
        inside = range(0)
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, *rest = line.split()
            if not name.endswith(":"):
                first, last = (int(end, 16) for end in name.split("-"))
                inside = range(first, last) if rest[-1].endswith(".safetensors") else range(0)
            elif name == "Rss:" and inside:
                used = sum(size for start, size in starts.items() if start in inside)
                unused += max(0, int(rest[0]) * 1024 - used)
    return unused


def synchronize(device: str) -> None:
    """Wait until a GPU has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: str, dtype: Any) -> float:
    """FLOP/s of a large matrix product, as training computes them."""
    size = 8192 if device == "cuda" else 1024
    x, weight = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times_transposed(x, weight)
    synchronize(device)
    began = time.perf_counter()
    for _ in range(_PRODUCTS):
        times_transposed(x, weight)
    synchronize(device)
    return _PRODUCTS * 2 * size**3 / (time.perf_counter() - began)
