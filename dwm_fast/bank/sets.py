"""Domains as sets of kept weights: overlap, union, intersection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dwm_fast import ops
from dwm_fast.bank.record import DomainMasks, network_bits
from dwm_fast.errors import InputError

MEASURES = ("jaccard", "and", "or", "xor")
"""What `overlap` can count."""


def overlap(domains: Sequence[DomainMasks], weights: Mapping[str, Tensor], measure: str) -> Tensor:
    """(D, D): "jaccard" (float64, 1 for two empty masks), or counts of kept weights, int64.

    weights: the backbone's, in order; one that a domain has no mask for counts as kept whole.
    """
    if measure not in MEASURES:
        raise InputError(f"measure '{measure}' is unknown; expected one of {', '.join(MEASURES)}")
    names, buffers = _aligned(domains, weights)
    numels = [weights[name].numel() for name in names]
    counts = torch.zeros(2, len(domains), len(domains), dtype=torch.int64)
    for i in range(len(domains)):
        for j in range(i + 1):
            counts[:, i, j] = counts[:, j, i] = ops.overlap(buffers[i], buffers[j], numels).sum(0)
    both, either = counts.unbind()
    if measure == "jaccard":
        return torch.where(either == 0, 1.0, both.double() / either.clamp(min=1))
    return {"and": both, "or": either, "xor": either - both}[measure]


def combined(domains: Sequence[DomainMasks], weights: Mapping[str, Tensor], op: str) -> dict[str, Tensor]:
    """Bool masks by name: the "and" or "or" of all domains. InputError without any domain."""
    if not domains:
        raise InputError("no domains to combine; add one first")
    names, buffers = _aligned(domains, weights)
    total = buffers[0]
    for bits in buffers[1:]:
        total = ops.combine(total, bits, op)
    flat = ops.unpack(total, [weights[name].numel() for name in names])
    return {name: mask.view(weights[name].shape) for name, mask in zip(names, flat, strict=True)}


def _aligned(domains: Sequence[DomainMasks], weights: Mapping[str, Tensor]) -> tuple[list[str], list[Tensor]]:
    """All weights that one of the domains masks, and each domain's network buffer over exactly those."""
    masked = {name for domain in domains for name in domain.info.layout.names}
    names = [name for name in weights if name in masked]
    shapes = tuple(tuple(weights[name].shape) for name in names)
    buffers = []
    for domain in domains:
        layout = domain.info.layout
        if (layout.names, layout.shapes) == (tuple(names), shapes):
            buffers.append(domain.bits)
        else:
            buffers.append(torch.cat([network_bits(domain, name, weights[name]) for name in names]))
    return names, buffers
