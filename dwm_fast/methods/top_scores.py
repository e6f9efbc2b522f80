"""Hidden networks (Ramanujan et al. 2020): a score for every weight of a frozen backbone, the largest are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from dwm_fast.methods._real_masks import RealMaskOptions
from dwm_fast.methods.piggyback import PiggybackLearner
from dwm_fast.nn.top_k import TopK


@dataclass(frozen=True)
class TopScores:
    """As `Piggyback`, with a density instead of a threshold: of every layer the same fraction is kept for a task.

    Args:
        kind: density and start values.
        options: how scores and head are trained; ours, but for the identity gradient.
    """

    kind: TopK = field(default_factory=TopK)
    options: RealMaskOptions = field(default_factory=lambda: RealMaskOptions(lr=1e-3, batch_norm="per-domain"))
    gradient_scale: ClassVar[str] = "none"
    name: ClassVar[str] = "top-scores"

    def learner(self, network: Callable[[int], nn.Module], head: str) -> PiggybackLearner:
        """A learner that has seen nothing."""
        return PiggybackLearner(network, head, self)
