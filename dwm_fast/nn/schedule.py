"""What kinds of masks are given: numbers, flags, and numbers that change as training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class LinearSchedule:
    """A number that goes from `start` to `end` over `steps` training forwards in equal parts; then it stays.

    As `TauSchedule` it is computed on the device from the step tensor. For temperatures both ends are above 0.
    """

    start: float
    end: float
    steps: int
    shape: str = field(default="linear", init=False)

    def __post_init__(self) -> None:
        check_numbers("LinearSchedule", start=self.start, end=self.end, steps=self.steps)
        if self.steps < 1:
            raise InputError(f"LinearSchedule got steps={self.steps}; expected at least one step")

    def at(self, forwards: Tensor) -> Tensor:
        """The number (0-dim fp32) after `forwards` (0-dim integer tensor) training forwards."""
        progress = (forwards / self.steps).clamp(0.0, 1.0).to(torch.float32)
        return self.start + (self.end - self.start) * progress


Scheduled = float | TauSchedule | LinearSchedule
"""A number above 0 that may change as training goes on."""


def check_scheduled(what: str, **values: object) -> None:
    """InputError, in the name of `what`, unless all are numbers above 0 in fp32, or schedules between such."""
    for name, value in values.items():
        ends = [value.start, value.end] if isinstance(value, (TauSchedule, LinearSchedule)) else [value]
        for end in ends:
            if isinstance(end, bool) or not isinstance(end, (int, float)) or not 1e-38 <= end <= _LARGEST:
                raise InputError(
                    f"{what} got {name}={value!r}; expected a number above 0 (in fp32) or a TauSchedule or "
                    "LinearSchedule"
                )


def first(value: Scheduled) -> float:
    """The number before the first step."""
    return value.start if isinstance(value, (TauSchedule, LinearSchedule)) else value


def now(value: Scheduled, forwards: Tensor) -> Tensor:
    """The number (0-dim fp32, on the device of `forwards`) after so many training forwards."""
    if isinstance(value, (TauSchedule, LinearSchedule)):
        return value.at(forwards)
    return torch.full((), value, dtype=torch.float32, device=forwards.device)


def schedule_from_dict(data: Mapping[str, Any]) -> TauSchedule | LinearSchedule:
    """The schedule that `dataclasses.asdict` wrote; TypeError for other fields."""
    fields = dict(data)
    return LinearSchedule(**fields) if fields.pop("shape", None) == "linear" else TauSchedule(**fields)
