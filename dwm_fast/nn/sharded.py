"""Masks of parts that are sharded by themselves (fully_shard): drawn inside them, once they have their parameters.

A part gathers its parameters just before its own forward and lets go of them after it, so a masked model that found
shards before the pass cannot draw for them then. Each such layer gets the draw instead of a masked weight, and makes
its weight when it is asked for it: the same bits, of the same noise, layer and elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.nn.layers import MaskedLayer, draw
from dwm_fast.ops.shards import is_shard


class LaterDraw:
    """The draw of one pass, for layers whose learned tensors were shards when the pass began.

    Args:
        layers: all layers of the masked model.
        state, tau, how: as `dwm_fast.nn.layers.draw` takes them.

    Attributes:
        found: for each layer asked, its masked weight and penalty in their graph; kept in a differentiable first pass.
    """

    def __init__(self, layers: Sequence[MaskedLayer], state: Tensor, tau: Tensor, **how: Any) -> None:
        self._layers, self._state, self._tau, self._how = layers, state, tau, how
        self._waiting = [is_shard(layer.mask_logits) for layer in layers]
        self.found: dict[int, tuple[Tensor, Tensor]] = {}
        self.closed = False

    def staged(self) -> list[Any]:
        """For each layer what it is to multiply with: its masked weight, or this draw."""
        at_once = [i for i, waits in enumerate(self._waiting) if not waits]
        given: list[Any] = [self] * len(self._layers)
        if at_once:
            layers = [self._layers[i] for i in at_once]
            weights, _, penalty = draw(layers, self._state, self._tau, **self._how)
            for i, weight in zip(at_once, weights, strict=True):
                given[i] = weight
                self.found[i] = weight, penalty
        return given

    def weight(self, layer: MaskedLayer) -> Tensor:
        """The masked weight of a layer that has gathered its parameters; the first one asked for has the penalty."""
        (weight,), _, penalty = draw([layer], self._state, self._tau, **self._how)
        if penalty.grad_fn is not None:
            _require_storage(penalty, layer.mask_logits)
        if not self.closed and torch.is_grad_enabled():
            self.found.setdefault(layer.layer_index, (weight, penalty))
        return weight

    def close(self) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """After the pass, of the layers that it reached: masked weights, the penalty, and those it is the mean of.

        Of a rule without a penalty, in a differentiable pass, that is 0 of none.
        """
        self.closed = True
        reached = sorted(self.found)
        found, self.found = self.found, {}
        sizes = [self._layers[i].mask_logits.numel() for i in reached]
        total = sum(sizes)
        penalties = [found[i][1] for i in reached]
        if not penalties:
            zero = torch.zeros((), device=self._tau.device)
            return [], zero, [zero]
        mean = torch.stack([p * (n / total) for p, n in zip(penalties, sizes, strict=True)]).sum()
        weights = [found[i][0] for i in reached]
        constant = not mean.requires_grad and any(weight.requires_grad for weight in weights)
        return weights, mean, [] if constant else penalties


def _require_storage(penalty: Tensor, learned: Tensor) -> None:
    """Let the backward pass of a draw be an InputError where the part has let go of its parameters, not a crash."""

    def check(grads: Any) -> None:
        if learned.numel() and learned.untyped_storage().nbytes() == 0:
            raise InputError(
                "backward() reached the penalty of a layer that was sharded by itself, and not its output, which is "
                "what gathers its parameters again; call backward() once, on the loss plus the penalty, or use "
                "MaskAdam(coefficient=...)"
            )

    penalty.grad_fn.register_prehook(check)  # type: ignore[union-attr]
