"""The processes that learn one mask together: their number, and whether they start from the same values."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, distributed, nn

from dwm_fast.errors import InputError
from dwm_fast.ops.shards import is_shard


class Ranks:
    """The processes of a group of torch.distributed, or of its default group, as it is when they are counted.

    A copy is of the same group; pickled, it becomes the default group, for a group is of this process alone.

    Args:
        given: a ProcessGroup, or a DeviceMesh of one dimension; None: the default group.

    Raises:
        InputError: neither, a mesh of several dimensions, or a group that this process is not in.
    """

    def __init__(self, given: Any = None) -> None:
        self.given, self.group = given, as_group(given)

    def count(self) -> tuple[int, int]:
        """How many there are, and which of them this one is; 1 and 0 where nothing is distributed."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return 1, 0
        return distributed.get_world_size(self.group), distributed.get_rank(self.group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        return Ranks, ()


def as_group(given: Any) -> Any:
    """The ProcessGroup that a `process_group` argument means; errors as of `Ranks`."""
    if given is None:
        return None
    group = given
    if type(given).__name__ == "DeviceMesh":
        if given.ndim != 1:
            raise InputError(
                f"process_group is a mesh of {given.ndim} dimensions {given.mesh_dim_names or ''}; expected one: "
                'mesh["name"] of the dimension along which the batch is split'
            )
        group = given.get_group()
    available = distributed.is_available()
    if available and group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise InputError("process_group is a group that this process is not in; give the one that it is in")
    if not (available and isinstance(group, distributed.ProcessGroup)):
        raise InputError(
            f"process_group is a {type(given).__name__}; expected a torch.distributed ProcessGroup "
            "(torch.distributed.group.WORLD is the default one) or a DeviceMesh of one dimension"
        )
    return group


def require_equal(about: str, group: Any, device: torch.device, what: str) -> None:
    """InputError "ranks 1, 2 " + `what`, on every rank, where these say other than rank 0; all have to call it."""
    others = _others(torch.tensor([zlib.crc32(about.encode())], device=device), group)
    if others:
        raise InputError(f"ranks {_listed(others)} {what}")


def check_ranks(source: nn.Module, process_group: Any = None) -> None:
    """InputError, on every rank, where the ranks do not hold the same model: weights, logits, noise and temperature.

    All ranks have to call it. It compares 64-bit sums of what the state dict has, so it costs one read of it.
    Shards (DTensor) are left out, for every rank has its own. Where nothing is distributed there is nothing to compare.

    Args:
        source: a masked model, or any module.
        process_group: a ProcessGroup or a DeviceMesh of one dimension; None: the default group.
    """
    if process_group is None and Ranks().count()[0] == 1:
        return
    group = as_group(process_group)
    state = source.state_dict(keep_vars=True)
    tensors = {n: t for n, t in state.items() if isinstance(t, Tensor) and not is_shard(t) and not t.is_meta}
    layers = {n: layer for n, layer in source.named_modules() if "mask_logits" in layer._parameters}
    tensors |= {f"{n}.unit": torch.tensor(layer.unit, dtype=torch.float64) for n, layer in layers.items()}
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    about = [f"{n} {tuple(t.shape)} {t.dtype}" for n, t in tensors.items()]
    about += [repr(getattr(source, name, None)) for name in ("kind", "mask_samples", "noise")]
    require_equal(
        "\n".join(about),
        group,
        device,
        "hold another model than rank 0: other tensors, shapes or options of mask_model; make the same one everywhere",
    )
    if not tensors:
        return
    others = _others(torch.stack([_sum64(t).to(device) for t in tensors.values()]), group)
    if others:
        names = [name for i, name in enumerate(tensors) if any(i in places for places in others.values())]
        raise InputError(
            f"ranks {_listed(others)} start from other values than rank 0 in {_few(names)}: give all ranks the same "
            "weights, and mask_model the same seed=, or load one checkpoint everywhere"
        )


def _others(mine: Tensor, group: Any) -> dict[int, set[int]]:
    """Ranks whose vector is not that of the first, and the places in which it is not."""
    table = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(table, mine, group=group)
    differ = (torch.stack(table) != table[0]).cpu()
    return {rank: set(row.nonzero().flatten().tolist()) for rank, row in enumerate(differ) if bool(row.any())}


def _listed(ranks: dict[int, Any]) -> str:
    return ", ".join(map(str, ranks))


def _few(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22


@torch.no_grad()
def _sum64(tensor: Tensor) -> Tensor:
    """Sum of bit pattern times an odd number of its place, mod 2^64: int64, 0-dim; no place may change unseen alone."""
    flat = tensor.detach().contiguous().view(-1)
    flat = torch.view_as_real(flat).view(-1) if flat.is_complex() else flat
    words = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].to(torch.int64)
        odd = torch.arange(start, start + part.numel(), device=part.device) * 0x1000193A2 + 0x9E3779B97F4A7C15 % 2**62
        total += ((part + 1) * (odd | 1)).sum()
    return total
