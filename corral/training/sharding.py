"""One step over several processes: who takes which examples, how gradients add up, where weights and moments lie.

Gradients are summed by hand, once a step. torch's DistributedDataParallel sums them in hooks on the forward pass of the
module it wraps, which packed passes never call (`model.packed` goes through the backbone), wants as many backward passes
on each process, and divides by their number. Of an adapter's few weights nothing is gained by summing while the backward
pass still runs; of a whole model's, some time is.

With `sharding = "full"` each process keeps its part of every weight, gradient and moment (FSDP2, `fully_shard`; Zhao et al.
2023, arXiv 2304.11277), and whole layers are there only while they compute. Every pass is then one that all processes
take part in, so a process with fewer passes makes up for it with empty ones.

Checkpoints hold whole tensors, written by the first process, so that a run may go on with another number of processes and
another sharding. Knows nothing about losses, examples or the form of a checkpoint on disk.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from corral.training import checkpoint
from corral.training.checkpoint import Saved, State
from corral.training.distributed import World

if TYPE_CHECKING:
    from torch.optim import Optimizer

_BUCKET_BYTES = 2**26  # summed at once


def shares(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which items each of `size` processes takes, with about as many tokens each: the longest first, to whoever has least
    (Graham 1969, "Bounds on multiprocessing timing anomalies": at most 4/3 of the best possible).

    Args:
        lengths: tokens of each item.
        size: number of processes; more than there are items leaves some with none.

    Returns: for each process ascending places in `lengths`; each place once.
    """
    found: list[list[int]] = [[] for _ in range(size)]
    loads = [(0, rank) for rank in range(size)]
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, rank = heapq.heappop(loads)
        found[rank].append(item)
        heapq.heappush(loads, (load + lengths[item], rank))
    return [sorted(items) for items in found]


class Sharded(nn.Module):
    """A model in shards. Passes through it are made by calling this module with what computes them, so that the weights
    outside the layers (embeddings, last norm, head) are there in whole for as long."""

    def __init__(self, model: nn.Module, device: str, size: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from transformers.modeling_layers import GradientCheckpointingLayer

        super().__init__()
        self.model = model
        mesh = init_device_mesh(device, (size,))
        for module in (*(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)), self):
            sharded = fully_shard(module, mesh=mesh)
            sharded.set_gradient_divide_factor(1.0)  # the loss is divided by the units of the whole step already
            sharded.set_force_sum_reduction_for_comms(True)  # gloo can only add

    def forward(self, compute: Callable[[], Any]) -> Any:
        """What `compute` returns; all processes must call this as often and in the same order."""
        return compute()

    def release(self) -> None:
        """Give the whole weights back after a pass that had no backward pass."""
        cast("FSDPModule", self).reshard()


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Make the gradients of whole (not sharded) parameters the sum over processes; a missing one counts as zero."""
    if world.size == 1:
        return
    bucket: list[Tensor] = []
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue  # summed as it was formed
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (
            bucket[0].dtype != parameter.grad.dtype
            or sum(g.nbytes for g in bucket) + parameter.grad.nbytes > _BUCKET_BYTES
        ):
            _sum(bucket)
            bucket = []
        bucket.append(parameter.grad)
    if bucket:
        _sum(bucket)


def _sum(bucket: list[Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in bucket])
    dist.all_reduce(flat)
    for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        gradient.copy_(part.view_as(gradient))


def clip_gradients(parameters: Iterable[nn.Parameter], most: float, *, scale: float = 1.0) -> Tensor:
    """Undo a loss scale, and scale gradients down to a norm of at most `most`, over all shards.

    Returns: the norm before clipping, a scalar on the device.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if scale != 1.0:
        for gradient in gradients:
            gradient.div_(scale)
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what its shards make together; then all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(parameters: Mapping[str, nn.Parameter], world: World) -> dict[str, Tensor]:
    """The whole values of parameters, on the first process; the others take part and get none."""
    return {name: value for name, p in parameters.items() if (value := _gathered(p.detach(), world)) is not None}


def _gathered(tensor: Tensor, world: World) -> Tensor | None:
    if not isinstance(tensor, DTensor):
        return tensor if world.is_main else None
    value = tensor.full_tensor()
    return value.cpu() if world.is_main else None


def save(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, state: State, world: World
) -> None:
    """A checkpoint of whole tensors, written by the first process; all must call. Raises: StorageError."""
    if not any(isinstance(p, DTensor) for p in parameters.values()):
        if world.is_main:
            checkpoint.save(folder, parameters, optimizer, state)
        return
    moments: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        kept = {
            key: _gathered(value, world) if isinstance(value, Tensor) else value
            for key, value in optimizer.state[parameter].items()
        }
        moments[name] = kept if world.is_main else {}
    whole_weights = weights(parameters, world)
    if world.is_main:
        checkpoint.write(folder, Saved(whole_weights, moments, state))


def restore(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    world: World,
    *,
    warn: Callable[[str], None],
) -> State | None:
    """`checkpoint.restore` by the first process, whose choice and tensors the others get. Raises: CheckpointError."""
    if world.size == 1:
        return checkpoint.restore(folder, parameters, optimizer, warn=warn)
    saved = checkpoint.read(folder, warn=warn) if world.is_main else None
    state = world.from_main(saved and saved.state)
    if state is None:
        for parameter in parameters.values():
            if not isinstance(parameter, DTensor):  # machines may differ in how they round what weights start from
                dist.broadcast(parameter.data, src=0)
        return None
    weights_, moments = (saved.weights, saved.moments) if saved else ({}, {})
    received: dict[str, Tensor] = {}
    kept: dict[str, dict[str, Any]] = {}
    for name in world.from_main(list(weights_)):
        like = parameters.get(name)
        received[name] = _from_main(weights_.get(name), like, world)
        mine = moments.get(name, {})
        keys = world.from_main(list(mine))
        kept[name] = {key: _from_main(mine.get(key), like, world) for key in keys}
    checkpoint.put(Saved(received, kept, state), parameters, optimizer, folder)
    return state


def _from_main(value: Any, like: Tensor | None, world: World) -> Any:
    """The first process's value; a tensor shaped like the sharded parameter it belongs to is sharded in the same way."""
    form = world.from_main((value.shape, value.dtype) if isinstance(value, Tensor) else None)
    if form is None:
        return world.from_main(value)
    shape, dtype = form
    received = value.contiguous() if isinstance(value, Tensor) else torch.empty(shape, dtype=dtype)
    dist.broadcast(received, src=0)
    if isinstance(like, DTensor) and shape == like.shape:
        return distribute_tensor(received.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return received
