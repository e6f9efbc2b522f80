"""binary: DWM's variant B. W frozen, a mask drawn by Gumbel-sigmoid, a regulariser that rewards masking."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from dwm_fast.methods.base import FoundMask, SourceTask
from dwm_fast.methods.learned import LearnedMask, learn_mask
from dwm_fast.nn import GumbelSigmoid


@dataclass(frozen=True)
class Binary:
    """Keep where the learned logit is at least 0, reuse where it is below."""

    kind: GumbelSigmoid = field(default_factory=GumbelSigmoid)
    options: LearnedMask = field(default_factory=LearnedMask)
    name: ClassVar[str] = "binary"

    def find(self, model: nn.Module, task: SourceTask) -> FoundMask:
        return learn_mask(model, self.kind, self.options, task)
