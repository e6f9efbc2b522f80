"""Masks learned with the dropped weights at other values than 0: a method of its own, for `search-trade.toml`."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from dwm_fast.methods import LearnedMask
from dwm_fast.methods.learned import learn_mask
from dwm_fast.nn import GumbelSigmoid


@dataclass(frozen=True)
class Refilled(GumbelSigmoid):
    """m * w + (1 - m) * r, r drawn anew for every batch: "near": beside w, "random": in w's place."""

    values: str = "near"
    deviations: float = 0.5
    name = "refilled"

    @property
    def draws_itself(self):
        return True

    def draw(self, learned, weights, rng_state, tau, *, training, dtype=None, **options):
        seed, offset = rng_state.flatten().tolist()[:2]
        noise = torch.Generator().manual_seed((seed + 0x9E3779B9 * offset) % 2**63)
        drawn = [torch.randn(w.shape, generator=noise).to(w) * w.detach().std() for w in weights]
        if self.values == "near":
            drawn = [w + self.deviations * r for w, r in zip(weights, drawn, strict=True)]
        moved = [w - r for w, r in zip(weights, drawn, strict=True)]
        masked, bits, penalty = super().draw(learned, moved, rng_state, tau, training=training, **options)
        return [(m + r).to(dtype or r.dtype) for m, r in zip(masked, drawn, strict=True)], bits, penalty


@dataclass(frozen=True)
class Refill:
    values: Literal["near", "random"] = "near"
    deviations: float = 0.5  # of a layer's weights, how far "near" is
    options: LearnedMask = field(default_factory=lambda: LearnedMask(epochs=6, lr=0.05, source_budget=0.05))
    name = "refill"

    def find(self, model, task):
        kind = Refilled(init=2.0, values=self.values, deviations=self.deviations)
        return learn_mask(model, kind, self.options, task)
