"""TopK: the largest scores of a layer are kept (hidden networks)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from dwm_fast._options import FRACTION, check_options
from dwm_fast.nn.kinds import KINDS, Drawn, MaskKind
from dwm_fast.nn.start import with_spread
from dwm_fast.ops import Mode


def top(scores: Tensor, density: float) -> Tensor:
    """Bool of the scores' shape: the round(density n) largest; of equal ones those that torch.topk takes."""
    flat = scores.detach().reshape(-1)
    chosen = flat.topk(round(density * flat.numel())).indices
    return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, chosen, True).view(scores.shape)


@dataclass(frozen=True)
class TopK(MaskKind):
    """m = 1 for the largest scores of a layer, 0 for the others; identity straight-through (Ramanujan et al. 2020).

    The authors take abs(score); here it is the score itself, which starts above 0.

    Args:
        density: fraction of every layer that is kept.
        init: the score around which weights start.
        spread: standard deviation of a normal draw (torch's CPU generator) added to it.
    """

    density: Annotated[float, FRACTION] = 0.5
    init: float = 0.0
    spread: float = 0.01
    name: ClassVar[str] = "top-k"

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def training_mode(self) -> int:
        return Mode.THRESHOLD

    @property
    def start_value(self) -> float:
        return self.init

    def initial(self, weight: Tensor) -> Tensor:
        return with_spread(super().initial(weight), self.spread)

    def draw(
        self, learned: Sequence[Tensor], weights: Sequence[Tensor], rng_state: Tensor, tau: Tensor, *, training: bool,
        samples: int = 1, sample: Callable[..., Drawn] | None = None, dtype: torch.dtype | None = None, **options: Any,
    ) -> Drawn:  # fmt: skip
        """In plain PyTorch; nothing is drawn at random, and the density is fixed, so there is no penalty."""
        masked = []
        for scores, weight in zip(learned, weights, strict=True):
            mask = top(scores, self.density).to(weight.dtype)
            through = scores.to(weight.dtype)
            masked.append(
                ((mask - through.detach() + through if training else mask) * weight).to(dtype or weight.dtype)
            )
        return masked, rng_state.new_empty(0, dtype=torch.uint8), torch.zeros((), device=rng_state.device)

    def expected(self, learned: Sequence[Tensor], tau: Tensor, rng_state: Tensor, samples: int = 1) -> Tensor:
        """0: the density is fixed."""
        return torch.zeros((), device=rng_state.device)

    def keep(self, logits: Tensor) -> Tensor:
        return top(logits, self.density)


KINDS[TopK.name] = TopK
