"""Gradients averaged over ranks: those of masked weights, before the chain rule, where all drew the same masks."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from dwm_fast.errors import InputError
from dwm_fast.optim.folded import FoldedGradient

BUCKET_BYTES = 25 << 20
"""Bytes that travel in one message: as many as torch's DistributedDataParallel sends in one."""


@torch.no_grad()
def reduce_gradients(sources: Sequence[tuple[Sequence[Tensor], bool]], group: Any) -> None:
    """Average over the ranks of `group` what backward passes left in the `.grad` of logits.

    A folded gradient of one draw stays folded: the gradients of its masked weights are averaged. All others are formed
    from this rank's draws first. All ranks of the group have to call it.

    Args:
        sources: of each masked model its learned tensors, and whether all ranks drew the same masks.
        group: a ProcessGroup; None: the default one.

    Raises:
        InputError: on every rank, with nothing changed, where ranks do not have the same gradients to average.
    """
    records: dict[int, Any] = {}
    formed: list[Tensor] = []
    said = []
    for logits, same_masks in sources:
        for x in logits:
            grad = x.grad
            if grad is None:
                said.append("none")
            elif same_masks and isinstance(grad, FoldedGradient) and len(grad.share.parts) == 1:
                record = grad.share.parts[0][0]
                records[id(record)] = record
                said.append(f"{list(records).index(id(record))} {record.dtypes} {_penalty(record)}")
            else:
                formed.append(grad)
                said.append("formed")
    _require_agreement(said, sources, group)
    values = [_of_this_rank(grad) for grad in formed]
    for record in records.values():
        penalty = [] if record.grad_penalty is None else [record.grad_penalty]
        record.grads, record.of_one_rank = mean_over_ranks([*record.whole(), *penalty], group), False
        if penalty:
            record.grad_penalty = record.grads.pop()
    for value, mean in zip(values, mean_over_ranks(values, group), strict=True):
        value.copy_(mean)


def _penalty(record: Any) -> str:
    return "without penalty" if record.grad_penalty is None else "with penalty"


def _of_this_rank(grad: Tensor) -> Tensor:
    """The values of a gradient before it is averaged."""
    if not isinstance(grad, FoldedGradient):
        return grad
    for record, _ in grad.share.parts:
        record.of_one_rank = False
    return grad.share.formed()


def _require_agreement(said: Sequence[str], sources: Sequence[tuple[Sequence[Tensor], bool]], group: Any) -> None:
    """InputError on every rank where one of them says other than the others of its gradients.

    Ranks that sent other things than their peers would wait for ever, or add up what does not belong together. On a GPU
    nobody waits for the answer: there it is an assertion of the device.
    """
    device = next(x.device for logits, _ in sources for x in logits)
    bounds = torch.full((2,), zlib.crc32("\n".join(said).encode()), dtype=torch.int64, device=device)
    bounds[1].neg_()
    distributed.all_reduce(bounds, op=distributed.ReduceOp.MAX, group=group)
    without, formed = said.count("none"), said.count("formed")
    penalty = " and the penalty's" if any(one.endswith("with penalty") for one in said) else ""
    message = (
        "ranks have other gradients to average than each other; of this one's layers "
        f"{len(said) - without - formed} have that of one backward pass{penalty}, {formed} a sum or another formed "
        f"one, {without} none. Every rank needs as many backward passes before a step as the others, through the same "
        "layers, with the penalty in the loss of all of them or of none"
    )
    try:
        torch._assert_async(bounds.sum() == 0, message)
    except RuntimeError:
        raise InputError(message) from None


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
