"""Tensors of which a process has a part (DTensor, as fully_shard makes them): operations here read whole ones."""

from __future__ import annotations

from collections.abc import Iterable

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
