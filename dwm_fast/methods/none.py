"""none: plain fine-tuning of every weight, the baseline of the DWM paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from dwm_fast.methods.base import FoundMask, SourceTask


@dataclass(frozen=True)
class NoMask:
    """Keeps nothing: fine-tuning starts from the source network and may change every weight."""

    name: ClassVar[str] = "none"

    def find(self, model: nn.Module, task: SourceTask) -> FoundMask:
        return FoundMask(keep=None)
