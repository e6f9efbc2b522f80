"""Draw: all that a draw of masks depends on beside logits and weights; one value from the public door to a kernel."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dwm_fast.errors import InputError


class Mode(enum.IntEnum):
    """How the learned tensor of a layer becomes a mask (formulas: docs/operations.md); the numbers of every backend."""

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

SCALED_SOFT = -1
"""In the place of a mode: m = sigmoid((kappa l + logistic noise) / tau), whose penalty is the mean of m itself (LEAP).
tau holds two numbers, tau and kappa. Products know it not. Rules up to GUMBEL_SOFT draw noise."""

PACKED = 6
"""In the place of a mode: the mask is read from packed bits, nothing is drawn."""

MASKS, LOGIT_ROUNDING, MOMENT_ROUNDING = range(3)
"""Streams of words: of masks, and of the rounding of stored logits and moments (`dwm_fast.ops.coding`)."""


def check_layers(layers: Iterable[int]) -> None:
    """A layer's number is one word of the counter: InputError for any other."""
    for layer in layers:
        if not 0 <= layer < 2**32:
            raise InputError(f"layer {layer} cannot draw noise: expected a layer number from 0 to 2^32 - 1")


@dataclass(frozen=True, slots=True)
class Draw:
    """How the masks of a list of tensors are drawn.

    Attributes:
        rng_state: int64 (2,): seed and step. tau: 0-dim fp32, the temperature; of SCALED_SOFT fp32 (2,), tau and kappa.
        layers: the noise contract's layer number of each tensor. thresholds: one number per tensor.
        mode: a `Mode` or SCALED_SOFT. step_offset: added to the step (sample j of a split batch).

    Raises:
        InputError: a layer number outside 0 .. 2^32 - 1, whoever computes.
    """

    rng_state: Tensor
    tau: Tensor
    layers: Sequence[int]
    thresholds: Sequence[float]
    mode: int
    step_offset: int = 0

    SCHEMA: ClassVar[str] = "Tensor rng_state, Tensor tau, int[] layers, float[] thresholds, int mode, int step_offset"
    SCHEMA_OF_ONE: ClassVar[str] = "Tensor rng_state, Tensor tau, int layer, float threshold, int mode, int step_offset"

    def __post_init__(self) -> None:
        check_layers(self.layers)

    @classmethod
    def of_one(
        cls, rng_state: Tensor, tau: Tensor, layer: int, threshold: float, mode: int, step_offset: int = 0
    ) -> Draw:
        """The draw of one tensor."""
        return cls(rng_state, tau, (layer,), (threshold,), mode, step_offset)

    @classmethod
    def from_bits(cls, anything: Tensor) -> Draw:
        """The draw of a product that reads bits; its tensors are never read."""
        return cls(anything, anything, (0,), (0.0,), PACKED)

    def of(self, places: Sequence[int]) -> Draw:
        """The draw of some of its tensors."""
        layers, thresholds = [self.layers[i] for i in places], [self.thresholds[i] for i in places]
        return dataclasses.replace(self, layers=layers, thresholds=thresholds)

    def flat(self) -> tuple[Any, ...]:
        """As torch's schema takes it."""
        return self.rng_state, self.tau, list(self.layers), list(self.thresholds), int(self.mode), self.step_offset
