"""edit: DWM's variant A. W frozen, a real edit per weight is learned, a regulariser rewards editing many."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from dwm_fast.methods.base import FoundMask, SourceTask
from dwm_fast.methods.learned import LearnedMask, learn_mask
from dwm_fast.nn import Edit


@dataclass(frozen=True)
class EditMask:
    """Reuse where the learned edit exceeds the threshold: the source does not mind that weight; keep the others.

    A tenth of a standard deviation as the threshold and random signs at the start are ours: where larger edits are
    asked for, most of ResNet-18 stays kept.
    """

    kind: Edit = field(default_factory=lambda: Edit(threshold=0.1, spread=0.1))
    options: LearnedMask = field(default_factory=lambda: LearnedMask(epochs=6, lr=0.05))
    name: ClassVar[str] = "edit"

    def find(self, model: nn.Module, task: SourceTask) -> FoundMask:
        return learn_mask(model, self.kind, self.options, task)
