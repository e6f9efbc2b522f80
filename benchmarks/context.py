"""What a case is built for: the device, and how much of the suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .measure import Run, Way


@dataclass(frozen=True)
class Context:
    """`quick` asks for smaller problems and leaves torch.compile out."""

    device: torch.device
    quick: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of matrix products: bf16 on a GPU, fp32 on a CPU."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def compiled(self, function: Callable[..., Any], moved: int = 0) -> list[Way]:
        """torch.compile of a rival as a further way; none in a quick run."""

        def make() -> Run:
            torch._dynamo.reset()
            return torch.compile(function)

        return [] if self.quick else [Way("torch.compile", make, moved, compiled=True)]
