"""Masks of one look at a network: the largest weights (magnitude), or weights times their inputs' size (Wanda)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from dwm_fast._options import FRACTION, check_options, whole
from dwm_fast.errors import InputError
from dwm_fast.methods.base import FoundMask, SourceTask
from dwm_fast.nn import maskable_weights
from dwm_fast.ops.patterns import patterns


def parsed(pattern: str) -> tuple[int, int]:
    """(n, m) of "n:m"; InputError for any other text."""
    left, colon, right = str(pattern).partition(":")
    if not (colon and left.isdecimal() and right.isdecimal()):
        raise InputError(f"pattern is {pattern!r}; expected n:m, such as 2:4")
    n, m = int(left), int(right)
    patterns(n, m)
    return n, m


def largest(scores: Tensor, density: float, pattern: str | None, by_row: bool) -> Tensor:
    """Keep mask, bool: the largest scores of every group of m, of every row, or of the whole tensor.

    Args:
        scores: (out, in), or any shape where neither `pattern` nor `by_row` is given.
        density: fraction to keep, where there is no pattern; rounded to a whole number of each row or tensor.
        pattern: "n:m": n of every m neighbours in the last dimension.
        by_row: whether rows are compared in themselves.
    """
    if pattern is not None:
        n, m = parsed(pattern)
        if scores.shape[-1] % m:
            raise InputError(
                f"a weight of shape {tuple(scores.shape)} has no whole groups of {m} in its last dimension; exclude it"
            )
        rows, count = scores.reshape(-1, m), n
    else:
        rows = scores.reshape(scores.shape[0], -1) if by_row else scores.reshape(1, -1)
        count = round(density * rows.shape[1])
    keep = torch.zeros_like(rows, dtype=torch.bool)
    return keep.scatter_(1, rows.topk(count, dim=1).indices, True).view(scores.shape)


@dataclass(frozen=True)
class Magnitude:
    """Keep the largest weights of every layer, or of every group of m.

    Args:
        density: fraction of each layer to keep; unused where there is a pattern.
        pattern: "n:m", such as "2:4": n of every m neighbours.
        include, exclude: shell patterns of the layers to mask.
    """

    density: Annotated[float, FRACTION] = 0.5
    pattern: str | None = None
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    name: ClassVar[str] = "magnitude"

    def __post_init__(self) -> None:
        check_options(self)

    def find(self, model: nn.Module, task: SourceTask) -> FoundMask:
        """The mask; the task is not looked at."""
        found = maskable_weights(model, self.include, self.exclude)
        scores = {name: there.weight.detach().float().abs() for name, there in found.items()}
        return FoundMask({name: largest(x, self.density, self.pattern, by_row=False) for name, x in scores.items()})


@dataclass(frozen=True)
class Wanda:
    """Keep the largest abs(w) * norm of the weight's input, compared within an output row (Sun et al. 2024).

    Args:
        density, pattern, include, exclude: as of `Magnitude`; the layers are linear ones, the density is a row's.
        batches: of the task's, on which the norms of inputs are measured.
    """

    density: Annotated[float, FRACTION] = 0.5
    pattern: str | None = None
    batches: Annotated[int, whole(1)] = 16
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    name: ClassVar[str] = "wanda"

    def __post_init__(self) -> None:
        check_options(self)

    def find(self, model: nn.Module, task: SourceTask) -> FoundMask:
        """The mask; the model is run in eval mode on the first batches of epoch 0."""
        found = maskable_weights(model, self.include, self.exclude)
        others = [name for name, there in found.items() if not isinstance(there.module, nn.Linear)]
        if others:
            raise InputError(f"wanda knows linear layers alone; exclude {', '.join(map(repr, others))}")
        norms = input_norms(model, {name: there.module for name, there in found.items()}, task, self.batches)
        keep = {}
        for name, there in found.items():
            scores = there.weight.detach().float().abs() * norms[name]
            keep[name] = largest(scores, self.density, self.pattern, by_row=True)
        return FoundMask(keep)


@torch.no_grad()
def input_norms(model: nn.Module, layers: Mapping[str, nn.Module], task: SourceTask, batches: int) -> dict[str, Tensor]:
    """Layer name -> norm of each of its input features (in,), over every row of the first `batches` of epoch 0."""
    training = model.training
    model.eval()
    with _squares(layers) as sums:
        for _, (inputs, _) in zip(range(batches), task.batches(0), strict=False):
            model(inputs)
    model.train(training)
    missing = [name for name in layers if name not in sums]
    if missing:
        raise InputError(f"no input reached {', '.join(map(repr, missing))}; exclude what the network does not call")
    return {name: total.sqrt() for name, total in sums.items()}


@contextmanager
def _squares(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Sums of squares of every layer's input features, filled while the network runs inside."""
    sums: dict[str, Tensor] = {}

    def seen(name: str, x: Tensor) -> None:
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).float()
        sums[name] = sums.get(name, torch.zeros_like(rows[:1].sum(0))) + rows.square().sum(0)

    handles = [
        layer.register_forward_pre_hook(lambda _, given, name=name: seen(name, given[0]))
        for name, layer in layers.items()
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
