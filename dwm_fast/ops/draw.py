"""The mask rules that every backend of `sample` knows, by number."""

from __future__ import annotations

import enum


class Mode(enum.IntEnum):
    """How the learned tensor of a layer becomes a mask (formulas: docs/operations.md)."""

    GUMBEL_HARD = 0
    """m ~ Bernoulli(sigmoid(l)), straight-through gradient of the soft sample (Csordas et al. 2021)."""
    GUMBEL_SOFT = 1
    """m = sigmoid((l + logistic noise) / tau)."""
    KEEP = 2
    """m = 1[l >= 0], the deterministic mask; no gradient reaches l."""
    THRESHOLD = 3
    """m = 1[l > threshold], identity straight-through gradient (Piggyback)."""
    TERNARY = 4
    """m = -1 if l < 0, +1 if l > threshold, else 0; identity straight-through gradient (Piggyback)."""
    EDIT = 5
    """No mask but an edit: W + threshold * e; kept where abs(e) <= 1 (DWM, variant A)."""


GUMBEL_MODES = (Mode.GUMBEL_HARD, Mode.GUMBEL_SOFT)
