"""What kinds of masks are given: numbers, flags, and a temperature that changes as training goes on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dwm_fast.errors import InputError

_LARGEST = 3.4e38


def check_numbers(what: str, **values: object) -> None:
    """InputError, in the name of `what`, unless all values are numbers that are finite in fp32."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST <= value <= _LARGEST:
            raise InputError(f"{what} got {name}={value!r:.40}; expected a finite number")


def check_flags(what: str, **values: object) -> None:
    """InputError, in the name of `what`, unless all values are True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise InputError(f"{what} got {name}={value!r}; expected True or False")


@dataclass(frozen=True)
class TauSchedule:
    """Temperature that falls from `start` to `end` over `steps` training forwards, geometrically; then stays.

    It is computed on the device from the step tensor, so it works inside a CUDA graph.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        check_numbers("TauSchedule", start=self.start, end=self.end, steps=self.steps)
        if not (self.start > 0 and self.end > 0 and self.steps >= 1):
            raise InputError(
                f"TauSchedule got start={self.start}, end={self.end}, steps={self.steps}; "
                "expected temperatures above 0 and at least one step"
            )

    def at(self, forwards: Tensor) -> Tensor:
        """Temperature (0-dim fp32) after `forwards` (0-dim integer tensor) training forwards."""
        progress = (forwards / self.steps).clamp(0.0, 1.0).to(torch.float32)
        return self.start * torch.pow(torch.full_like(progress, self.end / self.start), progress)
