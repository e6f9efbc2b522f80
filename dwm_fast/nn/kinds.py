"""Mask kinds: small objects that say how a layer's learned tensor becomes a mask."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.nn.schedule import Scheduled, check_flags, check_numbers, check_scheduled, first, now, schedule_from_dict
from dwm_fast.nn.start import with_spread
from dwm_fast.ops import Mode
from dwm_fast.ops.draw import SCALED_SOFT
from dwm_fast.ops.kernel_soft import kernel_shape, kernel_soft, soft_values
from dwm_fast.ops.sample import penalty

Drawn = tuple[list[Tensor], Tensor, Tensor]
"""Masked weights, keep bits and penalty, as `dwm_fast.ops.sample` gives them."""

INIT_SCHEMES = ("1s", "uniform", "weight_based_1s")
"""How `Threshold` starts (names of Piggyback's code)."""


def checked_kind(kind: object) -> MaskKind:
    """The mask kind that was given; InputError for anything else, a kind's class too."""
    if isinstance(kind, MaskKind):
        return kind
    if isinstance(kind, type) and issubclass(kind, MaskKind):
        raise InputError(f"the mask kind is the class {kind.__name__}; expected an object: {kind.__name__}()")
    known = ", ".join(f"{known.__name__}(...)" for known in KINDS.values())
    raise InputError(f"the mask kind is {kind!r}; expected one of {known}")


@dataclass(frozen=True)
class MaskKind:
    """Base of the mask kinds; frozen, comparable, and plain data by `to_dict` / `kind_from_dict`."""

    name: ClassVar[str]

    @property
    def training_mode(self) -> int:
        """Rule in train(): a `Mode`, or `dwm_fast.ops.SCALED_SOFT`."""
        raise AssertionError("MaskKind is a base class; use GumbelSigmoid, Threshold, Edit, KernelSoft, SemiStructured")

    @property
    def eval_mode(self) -> int:
        """Rule in eval(), at export and at merging: deterministic."""
        return self.training_mode

    def initial(self, weight: Tensor) -> Tensor:
        """Start values of the learned tensor: fp32, of the weight's shape and strides."""
        return torch.full_like(weight, self.start_value, dtype=torch.float32)

    @property
    def start_value(self) -> float:
        """The number every element of the learned tensor starts from."""
        return 0.0

    def unit(self, weight: Tensor) -> float:
        """The layer's threshold number for `dwm_fast.ops.sample`."""
        return 0.0

    def mask_shape(self, weight: Sequence[int]) -> tuple[int, ...]:
        """Shape of the learned tensor for a weight's shape."""
        return tuple(weight)

    def draw(
        self, learned: Sequence[Tensor], weights: Sequence[Tensor], rng_state: Tensor, tau: Tensor, *, training: bool,
        samples: int = 1, sample: Callable[..., Drawn] | None = None, **options: Any,
    ) -> Drawn:  # fmt: skip
        """Masked weights, bits if asked for, and the penalty, of all layers of a network.

        No layer's mask depends on which others are there: parts that are sharded by themselves draw their own alone.

        Args:
            learned, weights, rng_state: as in `dwm_fast.ops.sample`, whose `options` are layers, thresholds,
                step_offset and dtype.
            tau: the temperature, unless a schedule changes it.
            training: whether the training rule is in force, or the deterministic one.
            samples: masks drawn at each step of the schedule.
            sample: what is called in the place of `dwm_fast.ops.sample`.
        """
        if training:
            tau = self.current_tau(tau, rng_state, samples)
        mode = self.training_mode if training else self.eval_mode
        return (sample or ops.sample)(learned, weights, rng_state, tau, mode=mode, **options)

    @property
    def draws_itself(self) -> bool:
        """Whether the rule is none of `Mode`, so that no product can draw it."""
        return type(self).draw is not MaskKind.draw

    @property
    def initial_tau(self) -> float:
        """Temperature before the first step."""
        return 1.0

    def current_tau(self, tau: Tensor, rng_state: Tensor, samples: int = 1) -> Tensor:
        """Temperature of the next draw, 0-dim fp32, on the device: the schedule's, or `tau` where there is none."""
        return tau

    def expected(self, learned: Sequence[Tensor], tau: Tensor, rng_state: Tensor, samples: int = 1) -> Tensor:
        """The regulariser without a draw, 0-dim fp32, differentiable; `tau` and `rng_state` as in `draw`."""
        return penalty(learned, self.training_mode, tau=self.current_tau(tau, rng_state, samples))

    def lean(self, learned: Tensor, keep: Tensor, strength: float) -> Tensor:
        """`learned` moved towards the mask `keep` (bool, the weight's shape), by `strength` of the kind's spreads."""
        raise InputError(
            f"a mask of kind {self.name} has no start from another mask; expected GumbelSigmoid or SemiStructured"
        )

    def keep(self, logits: Tensor) -> Tensor:
        """Deterministic keep mask, bool, of the logits' shape; of SemiStructured of the weight's."""
        return logits >= 0

    @property
    def form(self) -> str:
        """How a mask of this kind is stored: "binary" is one bit per weight and nothing else (docs/format.md)."""
        return "binary"

    def stored(self, logits: Tensor, unit: float) -> Tensor | None:
        """What the form holds beside the keep bits: floats in fp16, or bool (True = minus); None for bits alone."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `kind_from_dict` reads back."""
        return {"kind": self.name, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class GumbelSigmoid(MaskKind):
    """Binary mask drawn with probability sigmoid(logit); DWM's variant B (METHODS: Csordas et al. 2021).

    Args:
        tau: temperature of the backward pass (and of the soft forward), above 0, or a schedule.
        init: logit every weight starts from; sigmoid(init) is the start probability of keeping.
        hard: draw bits and pass the soft sample's gradient straight through; False: multiply by the soft one.
        kappa: scale of the logits, above 0, or a schedule (LEAP): m = sigmoid((kappa l + noise) / tau), for soft masks
            alone; the penalty is then the mean of the drawn mask. None: no scale, and the penalty is mean sigmoid(l).
        spread: standard deviation of a normal draw (torch's CPU generator) added to `init`.
    """

    tau: Scheduled = 1.0
    init: float = 2.0
    hard: bool = True
    kappa: Scheduled | None = field(default=None, metadata={"later": True})
    spread: float = field(default=0.0, metadata={"later": True})
    name: ClassVar[str] = "gumbel-sigmoid"

    def __post_init__(self) -> None:
        check_numbers("GumbelSigmoid", init=self.init, spread=self.spread)
        check_flags("GumbelSigmoid", hard=self.hard)
        check_scheduled("GumbelSigmoid", tau=self.tau)
        if self.spread < 0:
            raise InputError(f"GumbelSigmoid got spread={self.spread}; expected a standard deviation of at least 0")
        if self.kappa is None:
            return
        check_scheduled("GumbelSigmoid", kappa=self.kappa)
        if self.hard:
            raise InputError("GumbelSigmoid got a kappa and hard=True; a scale is for soft masks: give hard=False")

    @property
    def training_mode(self) -> int:
        if self.kappa is not None:
            return SCALED_SOFT
        return Mode.GUMBEL_HARD if self.hard else Mode.GUMBEL_SOFT

    @property
    def eval_mode(self) -> int:
        return Mode.KEEP

    @property
    def draws_itself(self) -> bool:
        return self.kappa is not None

    @property
    def start_value(self) -> float:
        return self.init

    def initial(self, weight: Tensor) -> Tensor:
        return with_spread(super().initial(weight), self.spread)

    def lean(self, learned: Tensor, keep: Tensor, strength: float) -> Tensor:
        return learned + strength * self.spread * (2.0 * keep.to(learned.dtype) - 1.0)

    @property
    def initial_tau(self) -> float:
        return first(self.tau)

    def current_tau(self, tau: Tensor, rng_state: Tensor, samples: int = 1) -> Tensor:
        if self.kappa is None and isinstance(self.tau, (int, float)):
            return tau
        forwards = torch.div(rng_state[1], samples, rounding_mode="floor")
        current = tau if isinstance(self.tau, (int, float)) else now(self.tau, forwards)
        return current if self.kappa is None else torch.stack([current, now(self.kappa, forwards)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a scale and a spread that are not there are left out, as older releases expect."""
        return {key: value for key, value in super().to_dict().items() if value or key not in ("kappa", "spread")}


@dataclass(frozen=True)
class Threshold(MaskKind):
    """Piggyback's mask of real numbers r: m = 1[r > threshold], identity straight-through gradient.

    Args:
        threshold: strict threshold (authors' code: 5e-3).
        init: start value of every r, or what `scheme` makes of it (authors' code: 1e-2).
        ternary: m = -1 where r < 0, +1 where r > threshold, 0 between.
        scheme: start values (authors' names): "1s": all r = init; "uniform": drawn from (-init, init) by torch's
            generator; "weight_based_1s": the mean of abs(W) over the layer, init unused.
    """

    threshold: float = 5e-3
    init: float = 1e-2
    ternary: bool = False
    scheme: str = "1s"
    name: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        check_numbers("Threshold", threshold=self.threshold, init=self.init)
        check_flags("Threshold", ternary=self.ternary)
        if self.scheme not in INIT_SCHEMES:
            raise InputError(f"Threshold got scheme={self.scheme!r}; expected one of {', '.join(INIT_SCHEMES)}")

    def initial(self, weight: Tensor) -> Tensor:
        start = super().initial(weight)
        if self.scheme == "uniform":
            # Drawn on the CPU, so that a seed means the same anywhere.
            return start.copy_((2.0 * torch.rand(weight.shape, device="cpu") - 1.0) * self.init)
        if self.scheme == "weight_based_1s" and weight.numel():
            return start.copy_(weight.float().abs().mean().expand_as(weight))
        return start

    @property
    def training_mode(self) -> int:
        return Mode.TERNARY if self.ternary else Mode.THRESHOLD

    @property
    def start_value(self) -> float:
        return self.init

    def unit(self, weight: Tensor) -> float:
        return self.threshold

    def keep(self, logits: Tensor) -> Tensor:
        kept = logits > self.threshold
        return kept | (logits < 0) if self.ternary else kept

    @property
    def form(self) -> str:
        return "ternary" if self.ternary else "binary"

    def stored(self, logits: Tensor, unit: float) -> Tensor | None:
        return logits < 0 if self.ternary else None


@dataclass(frozen=True)
class Edit(MaskKind):
    """DWM's variant A: W is frozen and a real edit is learned; the forward uses W + unit * e.

    A weight whose edit grew beyond the threshold is not specialised: keep = abs(e) <= 1, with e in units of
    the threshold, which is `threshold` standard deviations of the layer's weights, measured when the layer
    is made or its state loaded (our choice: nobody published one).

    Args:
        threshold: the edit above which a weight counts as reusable, in deviations of its layer, above 0.
        init: start value of every edit.
        spread: standard deviation of a normal draw (torch's CPU generator) added to it, in units of the threshold.
            Without it the first gradient gives all edits their signs, and edits that grow together along one gradient
            do far more harm than edits of random signs.
    """

    threshold: float = 0.5
    init: float = 0.0
    spread: float = 0.0
    name: ClassVar[str] = "edit"

    def __post_init__(self) -> None:
        check_numbers("Edit", threshold=self.threshold, init=self.init, spread=self.spread)
        if self.threshold <= 0:
            raise InputError(f"Edit got threshold={self.threshold}; expected a number of standard deviations above 0")
        if self.spread < 0:
            raise InputError(f"Edit got spread={self.spread}; expected a standard deviation of at least 0")

    def initial(self, weight: Tensor) -> Tensor:
        return with_spread(super().initial(weight), self.spread)

    @property
    def training_mode(self) -> int:
        return Mode.EDIT

    @property
    def start_value(self) -> float:
        return self.init

    def unit(self, weight: Tensor) -> float:
        if weight.is_meta:
            return math.nan
        deviation = weight.detach().contiguous().double().std(correction=0) if weight.numel() else torch.zeros(())
        return self.threshold * float(deviation)

    def keep(self, logits: Tensor) -> Tensor:
        return logits.abs() <= 1

    @property
    def form(self) -> str:
        return "edit"

    def stored(self, logits: Tensor, unit: float) -> Tensor:
        return (logits * unit).half().reshape(-1)


@dataclass(frozen=True)
class KernelSoft(MaskKind):
    """KSM's kernel-wise soft mask: one real number r a kernel; kept where r >= threshold, else scaled into [0, 1/2].

    The rule, with its min-max over each layer, is `dwm_fast.ops.kernel_soft`; the learned tensor has shape
    (C_out, C_in, 1, 1), of a Linear (out, in).

    Args:
        threshold: a kernel is kept where r >= threshold (authors' code: 5e-3).
        init: start value of every r (authors' code: 1e-2).
        noisy: add logistic noise in train() (authors' code: an option, off).
    """

    threshold: float = 5e-3
    init: float = 1e-2
    noisy: bool = False
    name: ClassVar[str] = "kernel-soft"

    def __post_init__(self) -> None:
        check_numbers("KernelSoft", threshold=self.threshold, init=self.init)
        check_flags("KernelSoft", noisy=self.noisy)

    def draw(
        self, learned: Sequence[Tensor], weights: Sequence[Tensor], rng_state: Tensor, tau: Tensor, *, training: bool,
        samples: int = 1, sample: Callable[..., Drawn] | None = None, thresholds: Sequence[float] = (), **options: Any,
    ) -> Drawn:  # fmt: skip
        """As every kind's, by an operation of its own, which knows no temperature and no bits."""
        noisy = self.noisy and training
        masked = kernel_soft(learned, weights, rng_state, threshold=self.threshold, noisy=noisy, **options)
        return masked, rng_state.new_empty(0, dtype=torch.uint8), torch.zeros((), device=rng_state.device)

    @property
    def training_mode(self) -> int:
        """The rule that the regulariser knows it by: none."""
        return Mode.THRESHOLD

    @property
    def start_value(self) -> float:
        return self.init

    def initial(self, weight: Tensor) -> Tensor:
        return torch.full(self.mask_shape(weight.shape), self.init, dtype=torch.float32, device=weight.device)

    def mask_shape(self, weight: Sequence[int]) -> tuple[int, ...]:
        return kernel_shape(weight)

    def unit(self, weight: Tensor) -> float:
        return self.threshold

    def keep(self, logits: Tensor) -> Tensor:
        return logits >= self.threshold

    @property
    def form(self) -> str:
        return "soft"

    def stored(self, logits: Tensor, unit: float) -> Tensor:
        keep = self.keep(logits)
        return soft_values(logits, keep)[~keep].half()


KINDS: dict[str, type[MaskKind]] = {k.name: k for k in (GumbelSigmoid, Threshold, Edit, KernelSoft)}
"""By name; a kind of another file enters itself."""


def kind_from_dict(data: dict[str, Any]) -> MaskKind:
    """The kind that `MaskKind.to_dict` wrote. Unknown names or fields: InputError."""
    if not isinstance(data, dict):
        raise InputError(f"mask kind is {data!r}; expected the dictionary that to_dict() writes")
    fields = dict(data)
    name = fields.pop("kind", None)
    if name not in KINDS:
        raise InputError(f"mask kind '{name}' is unknown; expected one of {', '.join(KINDS)}")
    try:
        for field, value in fields.items():
            if isinstance(value, dict):
                fields[field] = schedule_from_dict(value)
        return KINDS[name](**fields)
    except TypeError as error:
        raise InputError(f"mask kind '{name}': {error}; expected the fields that to_dict() writes") from error
