"""Moments in the format that StreamedAdam was asked for, and their way from one format to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dwm_fast.ops.coding import MOMENTS, decoded_moment, encoded_moment, scales_of

SCALES = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
"""Moments, and the state that holds their scales where they are in 8 bits."""


def state_names(moments: str) -> tuple[str, ...]:
    """State of a parameter whose moments are in this format."""
    return (*SCALES, *SCALES.values()) if moments == "8bit" else tuple(SCALES)


def new_state(like: Tensor, moments: str, name: str) -> Tensor:
    """Zeros: a moment of the shape of `like`, contiguous, or its scales."""
    if name in SCALES.values():
        return torch.zeros(scales_of(like.numel()), device=like.device)
    return torch.zeros(like.shape, dtype=MOMENTS[moments][name == "exp_avg_sq"], device=like.device)


def in_format(saved: Mapping[str, Any], moments: str) -> dict[str, Any]:
    """A parameter's saved state with its moments in this format, rounded to nearest where they were in another."""
    state = dict(saved)
    for (name, scales), dtype in zip(SCALES.items(), MOMENTS[moments], strict=True):
        value = state.get(name)
        if not isinstance(value, Tensor) or value.dtype == dtype:
            continue
        state[name], scale = encoded_moment(decoded_moment(value, state.pop(scales, None)), dtype)
        if scale is not None:
            state[scales] = scale
    return state
