"""Tensors of which a process has a part (DTensor, as fully_shard makes them).

Operations that are elementwise may run on the parts (`part`); all others read whole tensors, and refuse these.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dwm_fast.errors import InputError

GATHER = (
    "gather them first: load get_model_state_dict(masked, options=StateDictOptions(full_state_dict=True)), of "
    "torch.distributed.checkpoint.state_dict, into a masked model that is not sharded"
)


def is_shard(tensor: object) -> bool:
    """Whether this process has a part of the tensor alone."""
    return type(tensor).__name__ == "DTensor"  # a name: its module takes long to import


def refuse_shards(tensors: Iterable[Tensor], what: str, instead: str = GATHER) -> None:
    """InputError that `what` needs whole tensors, and what to do instead, where one is a DTensor."""
    if any(map(is_shard, tensors)):
        raise InputError(f"{what} needs whole tensors, and these are shards (DTensor); {instead}")


def part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in its storage; a tensor that is whole is itself."""
    if not is_shard(tensor):
        return tensor
    shard: Any = tensor
    with torch.no_grad():
        local: Tensor = shard.to_local()
    return local


@torch.no_grad()
def as_part(tensor: Tensor, like: Tensor) -> Tensor:
    """The elements of `tensor`, whole or shards of any layout, that this process has of `like`, of the same shape.

    Where both are shards of different layouts, or only `tensor` is, all their processes have to call it.
    """
    given: Any = tensor
    if not is_shard(like):
        return given.full_tensor() if is_shard(tensor) else tensor
    target: Any = like
    if is_shard(tensor):
        if (given.device_mesh, given.placements) != (target.device_mesh, target.placements):
            given = given.redistribute(target.device_mesh, target.placements)
        return part(given)
    from torch.distributed.tensor import distribute_tensor

    whole = given.detach().to(target.device)
    return part(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))


@torch.no_grad()
def as_shard(local: Tensor, like: Tensor) -> Tensor:
    """A process's part as a tensor sharded as `like` is; where that is whole, the part is all."""
    if not is_shard(like):
        return local
    from torch.distributed.tensor import DTensor

    target: Any = like
    made: Tensor = DTensor.from_local(
        local, target.device_mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )
    return made
