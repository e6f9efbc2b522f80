"""Gradients averaged over ranks: those of masked weights, before the chain rule, where all drew the same masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from dwm_fast.optim.folded import FoldedGradient

BUCKET_BYTES = 25 << 20
"""Bytes that travel in one message: as many as torch's DistributedDataParallel sends in one."""


@torch.no_grad()
def reduce_gradients(logits: Iterable[Tensor], group: Any, same_masks: bool) -> None:
    """Average over the ranks of `group` what backward passes left in the `.grad` of `logits`.

    A folded gradient of one draw stays folded: the gradients of its masked weights are averaged. All others are formed
    from this rank's draws first. All ranks of the group have to call it, with the same gradients there.

    Args:
        logits: learned tensors.
        group: a ProcessGroup; None: the default one.
        same_masks: whether all ranks drew the same masks.
    """
    records: dict[int, Any] = {}
    values: list[Tensor] = []
    for x in logits:
        grad = x.grad
        if grad is None:
            continue
        if not isinstance(grad, FoldedGradient):
            values.append(grad)
            continue
        parts = grad.share.parts
        if same_masks and len(parts) == 1:
            records[id(parts[0][0])] = parts[0][0]
            continue
        for record, _ in parts:
            record.of_one_rank = False
        values.append(grad.share.formed())
    for record in records.values():
        penalty = [] if record.grad_penalty is None else [record.grad_penalty]
        record.grads, record.of_one_rank = mean_over_ranks([*record.whole(), *penalty], group), False
        if penalty:
            record.grad_penalty = record.grads.pop()
    for value, mean in zip(values, mean_over_ranks(values, group), strict=True):
        value.copy_(mean)


def mean_over_ranks(tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    """The mean of each tensor over the ranks, new tensors of the same shape, strides and dtype; in few messages."""
    count = distributed.get_world_size(group)
    sent = []
    for places in _buckets(tensors):
        flat = torch.cat([tensors[i].reshape(-1) for i in places]).div_(count)
        sent.append((places, flat, distributed.all_reduce(flat, group=group, async_op=True)))
    found = list(tensors)
    for places, flat, work in sent:
        work.wait()
        for i, piece in zip(places, torch.split(flat, [tensors[i].numel() for i in places]), strict=True):
            whole = piece.view(tensors[i].shape)
            found[i] = whole if tensors[i].is_contiguous() else torch.empty_like(tensors[i]).copy_(whole)
    return found


def _buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of tensors of one dtype and device that travel together, in an order that is the same on every rank."""
    closed: list[list[int]] = []
    opened: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    for i, tensor in enumerate(tensors):
        key, size = (tensor.dtype, tensor.device), tensor.numel() * tensor.element_size()
        places, held = opened.get(key, ([], 0))
        if places and held + size > BUCKET_BYTES:
            closed.append(places)
            places, held = [], 0
        opened[key] = [*places, i], held + size
    return closed + [places for places, _ in opened.values()]
