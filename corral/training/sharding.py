"""One step over several processes: who takes which examples, how gradients are summed, where weights and moments lie.

Gradients are all-reduced explicitly, once a step. torch's DistributedDataParallel sums them in hooks on the forward pass
of the module it wraps, which packed passes never call (`model.packed_forward` goes through the backbone); it also wants
equally many backward passes on each process, and divides by the number of processes. For an adapter's few weights,
overlapping the sum with the backward pass gains nothing; for a whole model's it would save some time.

With `sharding = "full"` each process keeps its part of every weight, gradient and moment (FSDP2, `fully_shard`; Zhao et al.
2023, arXiv 2304.11277), and whole layers exist only while they compute. All processes take part in every pass, so a process
with fewer passes makes up for it with empty ones.

Checkpoints hold whole tensors, written by rank 0, so that a run may resume with another number of processes and another
sharding.
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
from corral.training.checkpoint import Checkpoint, TrainingState
from corral.training.distributed import World

if TYPE_CHECKING:
    from torch.optim import Optimizer

_BUCKET_BYTES = 2**26  # summed at once


def balance_by_tokens(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Divide items so that each process has about as many tokens: the longest first, to whoever has least (Graham 1969,
    "Bounds on multiprocessing timing anomalies": at most 4/3 of the best possible).

    Args:
        lengths: tokens of each item.
        processes: if there are more of them than items, some get none.

    Returns: for each process ascending indices into `lengths`; each index once.
    """
    assigned: list[list[int]] = [[] for _ in range(processes)]
    loads = [(0, rank) for rank in range(processes)]
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, rank = heapq.heappop(loads)
        assigned[rank].append(item)
        heapq.heappush(loads, (load + lengths[item], rank))
    return [sorted(items) for items in assigned]


class ShardedModel(nn.Module):
    """A model in shards. A pass is made by calling this module with the function that computes it, so that the weights
    outside the layers (embeddings, last norm, head) are whole for as long."""

    def __init__(self, model: nn.Module, device: str, size: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from transformers.modeling_layers import GradientCheckpointingLayer

        super().__init__()
        self.model = model
        mesh = init_device_mesh(device, (size,))
        for module in (*(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)), self):
            sharded = fully_shard(module, mesh=mesh)
            sharded.set_gradient_divide_factor(1.0)  # the loss is already divided by the units of the whole step
            sharded.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction

    def forward(self, compute: Callable[[], Any]) -> Any:
        """Returns what `compute` does; all processes must call this equally often and in the same order."""
        return compute()

    def free_whole_weights(self) -> None:
        """Shard again after a pass that had no backward pass."""
        cast("FSDPModule", self).reshard()


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """All-reduce the gradients of parameters that are not sharded; a missing gradient counts as zero."""
    if world.size == 1:
        return
    bucket: list[Tensor] = []
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue  # reduced during the backward pass
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (
            bucket[0].dtype != parameter.grad.dtype
            or sum(g.nbytes for g in bucket) + parameter.grad.nbytes > _BUCKET_BYTES
        ):
            _all_reduce(bucket)
            bucket = []
        bucket.append(parameter.grad)
    if bucket:
        _all_reduce(bucket)


def _all_reduce(bucket: list[Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in bucket])
    dist.all_reduce(flat)
    for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        gradient.copy_(part.view_as(gradient))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, *, scale: float = 1.0) -> Tensor:
    """Divide gradients by the loss scale, then scale them down to a norm of at most `max_norm`, over all shards.

    Returns: the norm before clipping, a scalar on the device.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if scale != 1.0:
        for gradient in gradients:
            gradient.div_(scale)
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def gather_weights(parameters: Mapping[str, nn.Parameter], world: World) -> dict[str, Tensor]:
    """The whole values of parameters on rank 0, nothing on the others; all processes must call it."""
    values = {name: _gather(parameter.detach(), world) for name, parameter in parameters.items()}
    return values if world.is_main else {}


def _gather(value: Any, world: World) -> Any:
    """A tensor that is whole, on rank 0; anything that is no sharded tensor is returned as it is."""
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if world.is_main else None


def save(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, state: TrainingState, world: World
) -> None:
    """Gather a checkpoint and write it on rank 0; all processes must call it. Raises: StorageError."""
    optimizer_state = {
        name: {key: _gather(value, world) for key, value in optimizer.state[parameter].items()}
        for name, parameter in parameters.items()
    }
    weights = gather_weights(parameters, world)
    if world.is_main:
        checkpoint.write(folder, Checkpoint(weights, optimizer_state, state))


def restore(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    world: World,
    *,
    warn: Callable[[str], None],
) -> TrainingState | None:
    """Load the newest intact checkpoint on rank 0 and send it to the others; all processes must call it.

    Args:
        warn: called with a message for each damaged checkpoint that is newer.

    Returns: its state, or None if there is no checkpoint; then rank 0's weights are sent.

    Raises:
        CheckpointError: every checkpoint is damaged, or the newest intact one belongs to another model.
    """
    saved = checkpoint.read_newest(folder, warn=warn) if world.is_main else None
    state = world.broadcast(saved and saved.state)
    if state is None:
        for parameter in parameters.values():
            # Machines may differ in how they round initial weights.
            if world.size > 1 and not isinstance(parameter, DTensor):
                dist.broadcast(parameter.data, src=0)
        return None
    if world.size > 1:
        saved = _broadcast_checkpoint(saved, state, parameters, world)
    assert saved is not None
    checkpoint.load_into(parameters, optimizer, saved, folder)
    return state


def _broadcast_checkpoint(
    saved: Checkpoint | None, state: TrainingState, parameters: Mapping[str, nn.Parameter], world: World
) -> Checkpoint:
    """Rank 0's checkpoint on every process, with sharded tensors where the parameter is sharded."""
    weights, optimizer_state = (saved.weights, saved.optimizer_state) if saved else ({}, {})
    received_weights: dict[str, Tensor] = {}
    received_optimizer: dict[str, dict[str, Any]] = {}
    for name in world.broadcast(list(weights)):
        parameter = parameters.get(name)
        received_weights[name] = _broadcast(weights.get(name), parameter, world)
        own = optimizer_state.get(name, {})
        keys = world.broadcast(list(own))
        received_optimizer[name] = {key: _broadcast(own.get(key), parameter, world) for key in keys}
    return Checkpoint(received_weights, received_optimizer, state)


def _broadcast(value: Any, parameter: Tensor | None, world: World) -> Any:
    """Rank 0's value; a tensor of the shape of the sharded parameter it belongs to is sharded in the same way."""
    shape_and_dtype = world.broadcast((value.shape, value.dtype) if isinstance(value, Tensor) else None)
    if shape_and_dtype is None:
        return world.broadcast(value)
    shape, dtype = shape_and_dtype
    received = value.contiguous() if isinstance(value, Tensor) else torch.empty(shape, dtype=dtype)
    dist.broadcast(received, src=0)
    if isinstance(parameter, DTensor) and shape == parameter.shape:
        return distribute_tensor(
            received.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return received
