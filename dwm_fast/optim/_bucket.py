"""Bucket: the parameters that one update operation steps together, with their bits and step counts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.bits import unpack
from dwm_fast.ops.packing import packed_offsets
from dwm_fast.ops.shards import as_part, is_shard, part
from dwm_fast.ops.update import BLOCK, free_ranks

_BLOCK_BYTES = BLOCK // 8


class Bucket:
    """The parameters of one group that share device and dtype: what one operation steps together.

    Of parameters that are shards (DTensor) it steps this process's parts; offsets, bits and ranks are those of parts.
    `steps`, fp32 (n,), holds every parameter's step count; state[p]["step"] is a 0-dim view into it. `bits`
    and `ranks` are as in `dwm_fast.ops.update`, both empty where nothing is kept.
    """

    def __init__(self, params: list[Tensor], kept: Mapping[Tensor, Tensor], compact: bool) -> None:
        self.params = params
        self.index = {p: i for i, p in enumerate(params)}
        self.sharded = any(map(is_shard, params))
        self.device = params[0].device
        self.dtype = params[0].dtype
        self.steps = torch.zeros(len(params), device=self.device)
        self.lr = torch.zeros((), dtype=torch.float64, device=self.device)
        self.scale = torch.zeros((), device=self.device)
        self.bits = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.ranks = torch.empty(0, dtype=torch.int64, device=self.device)
        numels = [part(p).numel() for p in params]
        self._offsets = packed_offsets(numels)
        if any(p in kept for p in params):
            lengths = [b - a for a, b in itertools.pairwise(self._offsets)]
            nothing = [torch.zeros(n, dtype=torch.uint8) for n in lengths]
            parts = [kept.get(p, zero) for p, zero in zip(params, nothing, strict=True)]
            self.bits = torch.cat([part.to(self.device) for part in parts])
            if compact:
                self.ranks = free_ranks(self.bits, numels)
        self._selections: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def free_index(self, i: int) -> Tensor | None:
        """Logical index of each free lane of parameter i, int64; None unless state is compact."""
        if self.ranks.numel() == 0:
            return None
        bits = self.bits[self._offsets[i] : self._offsets[i + 1]]
        return (~unpack(bits, [part(self.params[i]).numel()])[0]).nonzero().squeeze(1)

    def new_state(self, i: int) -> Tensor:
        """Zeros: of the parameter's shape, strides and sharding, or 1-D, one entry per free lane of this process."""
        index = self.free_index(i)
        if index is None:
            return torch.zeros_like(self.params[i], dtype=self.state_dtype, requires_grad=False)
        return torch.zeros(index.numel(), dtype=self.state_dtype, device=self.device)

    def advance(self, active: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Count one step for the parameters in `active`: their bits, ranks and steps, in that order."""
        if active == list(range(len(self.params))):
            self.steps.add_(1)
            return self.bits, self.ranks, self.steps
        bits, ranks, index = self._select(tuple(active))
        self.steps.index_add_(0, index, torch.ones_like(index, dtype=self.steps.dtype))
        return bits, ranks, self.steps.index_select(0, index)

    def _select(self, active: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        # Selections stay: a captured graph may be reading any of them.
        if active not in self._selections:
            spans = [(self._offsets[i], self._offsets[i + 1]) for i in active]
            bits, ranks = self.bits, self.ranks
            if bits.numel():
                bits = torch.cat([bits[a:b] for a, b in spans])
            if ranks.numel():
                ranks = torch.cat([ranks[a // _BLOCK_BYTES : b // _BLOCK_BYTES] for a, b in spans])
            self._selections[active] = bits, ranks, torch.tensor(active, device=self.device)
        return self._selections[active]

    def tensors(self, active: list[int]) -> list[Tensor]:
        """The parameters in `active`, of shards this process's parts, to be written."""
        found = [self.params[i] for i in active]
        return list(map(part, found)) if self.sharded else found

    def gradients(self, active: list[int]) -> list[Tensor]:
        found = []
        for i in active:
            grad = self.params[i].grad
            assert grad is not None
            if self.sharded:
                grad = as_part(grad, self.params[i])
            if grad.is_sparse:
                raise InputError("a gradient is sparse; expected dense ones (sparse=False in the layer)")
            found.append(grad if grad.dtype == self.dtype else grad.to(self.dtype))
        return found
