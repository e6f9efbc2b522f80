"""source_budget: dual ascent on the regulariser's coefficient, so that a user states a loss and not a coefficient.

The problem is min penalty(mask) subject to excess(mask) <= budget, where excess is the loss above the unmasked
network's. Its Lagrangian, divided by the multiplier, is loss + coefficient * penalty; the coefficient rises while the
excess is within the budget and falls while it is not. The masks answer late (a logit needs dozens of steps from its
start to 0), and pure ascent then swings far past the budget; so a term proportional to the slack acts at once, as in
an augmented Lagrangian.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dwm_fast.errors import InputError

_LOWEST, _HIGHEST = 1e-3, 1e5


class SourceBudget:
    """Controls one coefficient from measured excess losses, on the device and without synchronising.

    Args:
        budget: allowed rise of the source cross-entropy over the unmasked network's, in nats, above 0.
        start: first coefficient.
        gain: largest change of the log of the integrated part a measurement.
        damping: log of the factor by which full slack or violation scales the coefficient at once.
        smoothing: weight of the newest measurement in the running mean of the excess, in (0, 1].
        device: where the losses live.
    """

    def __init__(
        self,
        budget: float,
        *,
        start: float = 20.0,
        gain: float = 0.02,
        damping: float = 4.0,
        smoothing: float = 0.5,
        device: torch.device | str = "cpu",
    ) -> None:
        if not budget > 0:
            raise InputError(f"source_budget is {budget}; expected a rise of the cross-entropy above 0, in nats")
        self.budget = budget
        self.gain = gain
        self.damping = damping
        self.smoothing = smoothing
        self.coefficient = torch.tensor(start, dtype=torch.float32, device=device)
        self.excess = torch.zeros((), dtype=torch.float32, device=device)
        self._integrated = torch.tensor(start, dtype=torch.float32, device=device).log_()

    def update(self, excess: Tensor) -> Tensor:
        """Take one measurement of the excess loss (0-dim) and return the coefficient to go on with.

        The excess is the masked network's cross-entropy minus the unmasked one's. One that is not finite is left out
        of the running mean. `coefficient` is changed in place, so a captured step that reads it sees the change.
        """
        excess = torch.where(torch.isfinite(excess), excess, self.excess)
        self.excess.lerp_(excess.detach().float(), self.smoothing)
        slack = (1.0 - self.excess / self.budget).clamp(-1.0, 1.0)
        self._integrated.add_(self.gain * slack).clamp_(math.log(_LOWEST), math.log(_HIGHEST))
        self.coefficient.copy_(torch.exp(self._integrated + self.damping * slack.clamp(max=0.0)))
        return self.coefficient.clamp_(_LOWEST, _HIGHEST)
