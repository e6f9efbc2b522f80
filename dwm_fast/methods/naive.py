"""naive: keep the weights that lie more than one standard deviation from their layer's mean (DWM paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dwm_fast.methods.base import FoundMask, SourceTask
from dwm_fast.nn import maskable_weights


def outliers(weight: Tensor, deviations: float) -> Tensor:
    """1[abs(w - mean) > deviations * std], per tensor, population std; bool of the weight's shape."""
    values = weight.detach().double()
    if values.numel() == 0:
        return torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    return (values - values.mean()).abs() > deviations * values.std(correction=0)


@dataclass(frozen=True)
class Naive:
    """Keep a weight when it lies MORE than `deviations` standard deviations from its layer's mean.

    Per layer and not over the whole network is our choice: the paper does not say.
    """

    deviations: float = 1.0
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    name: ClassVar[str] = "naive"

    def find(self, model: nn.Module, task: SourceTask) -> FoundMask:
        found = maskable_weights(model, self.include, self.exclude)
        return FoundMask(keep={name: outliers(there.weight, self.deviations) for name, there in found.items()})
