"""SemiStructured: N of every M neighbouring weights are kept; learned as a choice among patterns (MaskLLM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.nn.kinds import KINDS, Drawn, MaskKind
from dwm_fast.nn.schedule import Scheduled, check_flags, check_numbers, check_scheduled, first, now
from dwm_fast.nn.start import with_spread
from dwm_fast.ops import Mode
from dwm_fast.ops.patterns import pattern_keep, pattern_mask, pattern_shape, pattern_table, patterns


@dataclass(frozen=True)
class SemiStructured(MaskKind):
    """N of every M neighbours in a weight's last dimension are kept; the rule is `dwm_fast.ops.pattern_mask`.

    The learned tensor of a weight (out, in) has shape (out, in / m, P): a logit for each of the P patterns of a group,
    6 of 2:4 and 70 of 4:8. The mask is one bit per weight like any other, and satisfies N:M exactly.

    Args:
        n, m: n of every m neighbours are kept.
        tau, kappa: temperature and scale of the logits, above 0, or schedules.
        hard: draw one pattern and pass the soft sample's gradient straight through; False: multiply by the soft mask.
        init: logit that every pattern starts from.
        spread: standard deviation of a normal draw (torch's CPU generator) added to it.
    """

    n: int = 2
    m: int = 4
    tau: Scheduled = 1.0
    kappa: Scheduled = 1.0
    hard: bool = False
    init: float = 0.0
    spread: float = 0.01
    name: ClassVar[str] = "semi-structured"

    def __post_init__(self) -> None:
        patterns(self.n, self.m)
        check_numbers("SemiStructured", init=self.init, spread=self.spread)
        check_flags("SemiStructured", hard=self.hard)
        check_scheduled("SemiStructured", tau=self.tau, kappa=self.kappa)
        if self.spread < 0:
            raise InputError(f"SemiStructured got spread={self.spread}; expected a standard deviation of at least 0")

    def draw(
        self, learned: Sequence[Tensor], weights: Sequence[Tensor], rng_state: Tensor, tau: Tensor, *, training: bool,
        samples: int = 1, sample: Callable[..., Drawn] | None = None, thresholds: Sequence[float] = (), **options: Any,
    ) -> Drawn:  # fmt: skip
        """As every kind's, by an operation of its own; the density is fixed, so there is no penalty."""
        both = self.current_tau(tau, rng_state, samples)
        mode = self.training_mode if training else Mode.KEEP
        masked = pattern_mask(learned, weights, rng_state, both, n=self.n, m=self.m, mode=mode, **options)
        return masked, rng_state.new_empty(0, dtype=torch.uint8), torch.zeros((), device=rng_state.device)

    @property
    def training_mode(self) -> int:
        return Mode.GUMBEL_HARD if self.hard else Mode.GUMBEL_SOFT

    @property
    def eval_mode(self) -> int:
        return Mode.KEEP

    @property
    def start_value(self) -> float:
        return self.init

    def initial(self, weight: Tensor) -> Tensor:
        shape = self.mask_shape(weight.shape)
        return with_spread(torch.full(shape, self.init, dtype=torch.float32, device=weight.device), self.spread)

    def mask_shape(self, weight: Sequence[int]) -> tuple[int, ...]:
        return pattern_shape(weight, self.n, self.m)

    @property
    def initial_tau(self) -> float:
        return first(self.tau)

    def current_tau(self, tau: Tensor, rng_state: Tensor, samples: int = 1) -> Tensor:
        forwards = torch.div(rng_state[1], samples, rounding_mode="floor")
        return torch.stack([now(self.tau, forwards), now(self.kappa, forwards)])

    def expected(self, learned: Sequence[Tensor], tau: Tensor, rng_state: Tensor, samples: int = 1) -> Tensor:
        """0: n of m are kept whatever is learned."""
        return torch.zeros((), device=rng_state.device)

    def lean(self, learned: Tensor, keep: Tensor, strength: float) -> Tensor:
        """Logits of patterns that share more kept weights with `keep` than the mean of all patterns does rise."""
        groups = keep.reshape(*learned.shape[:-1], self.m).to(learned.dtype)
        shared = groups @ pattern_table(self.n, self.m, learned).t()
        return learned + strength * self.spread * (shared - self.n * self.n / self.m)

    def keep(self, logits: Tensor) -> Tensor:
        return pattern_keep(logits, self.n, self.m)


KINDS[SemiStructured.name] = SemiStructured
