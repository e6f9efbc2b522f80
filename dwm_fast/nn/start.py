"""Start values of learned tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def with_spread(start: Tensor, spread: float) -> Tensor:
    """`start` plus normal numbers of that deviation, drawn on the CPU, so that a seed means the same anywhere."""
    if spread == 0 or start.is_meta:
        return start
    return start.add_(torch.randn(start.shape, device="cpu").to(start.device), alpha=spread)
