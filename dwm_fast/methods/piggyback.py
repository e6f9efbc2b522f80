"""Piggyback (Mallya, Davis, Lazebnik 2018): one frozen backbone, and for each domain a learned bit per weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dwm_fast.bank import pack_signs
from dwm_fast.errors import InputError
from dwm_fast.methods._real_masks import RealMaskOptions, learn_real_masks
from dwm_fast.methods.learner import SequenceLearner, Tensors, norm_names, seeded
from dwm_fast.methods.sequence import Task
from dwm_fast.nn import Threshold


@dataclass(frozen=True)
class Piggyback:
    """A bit for every weight outside the head, m = 1[r > threshold], learned with the backbone frozen.

    Args:
        kind: start values, threshold, ternary or not.
        options: how r and the head are trained. Ours: Adam 3e-4 over three epochs, where the paper's 1e-4 needs thirty,
            and each task's own batch norm, which the paper trains for strongly shifted domains alone.
        gradient_scale: what the gradient of r is divided by (authors' names): "none", "average": the layer's mean
            abs(W), "individual": abs(W), where W = 0 gives 0.

    The backbone is the network trained on the first task, whose own network it stays, without a mask. Conv and linear
    biases are the backbone's.
    """

    kind: Threshold = field(default_factory=Threshold)
    options: RealMaskOptions = field(default_factory=lambda: RealMaskOptions(lr=3e-4, batch_norm="per-domain"))
    gradient_scale: Literal["none", "average", "individual"] = "none"
    name: ClassVar[str] = "piggyback"

    def __post_init__(self) -> None:
        if self.gradient_scale not in ("none", "average", "individual"):
            raise InputError(f"gradient_scale is {self.gradient_scale!r}; expected none, average or individual")

    def learner(self, network: Callable[[int], nn.Module], head: str) -> PiggybackLearner:
        """A learner that has seen nothing."""
        return PiggybackLearner(network, head, self)


PIGGYBACK_PAPER = Piggyback(
    options=RealMaskOptions(epochs=30, lr=1e-4, head_lr=1e-4, eps=1e-8, schedule="step", batch_norm="frozen")
)
"""piggyback-paper: Adam 1e-4 for masks and head, x0.1 after 15 epochs, 30 epochs; batches of 32 are the caller's."""


def gradient_divisors(weights: Mapping[str, Tensor], scale: str) -> Tensors:
    """layer name -> what the gradient of its mask is divided by: 0-dim or of the weight's shape; {} for "none".

    An infinite divisor stands for a weight that is 0, whose gradient is 0 anyway.
    """
    if scale == "none":
        return {}
    sizes = {layer: w.abs().mean() if scale == "average" else w.abs() for layer, w in weights.items()}
    return {layer: torch.where(size == 0, torch.inf, size).float() for layer, size in sizes.items()}


class PiggybackLearner(SequenceLearner):
    """`Piggyback` over a sequence. The backbone never changes, so earlier tasks' predictions stay to the last bit."""

    MASKS = ("keep", "minus")

    def __init__(self, network: Callable[[int], nn.Module], head: str, method: Any) -> None:
        super().__init__(network, head)
        self._method = method

    def begin(self, task: Task, network: nn.Module) -> dict[str, Any]:
        """Take the network as the backbone."""
        self.start(task, network)
        return {}

    def learn(self, task: Task) -> dict[str, Any]:
        """Learn bits, head and, by policy, batch norm."""
        method = self._method
        with seeded(task):
            network = self.fresh(task)
            weights = {layer: there.weight.detach() for layer, there in self.maskable(network).items()}
            divisors = gradient_divisors(weights, method.gradient_scale)
            masked = learn_real_masks(network, method.kind, self.head, method.options, task, divisors)
        own = norm_names(masked.model) if method.options.batch_norm == "per-domain" else lambda _: False
        self.add_task(task, masked.model, own)
        self.task_masks[task.name] = {"keep": masked.keep_masks()}
        if getattr(method.kind, "ternary", False):
            layers = masked.mask_layers().items()
            self.task_masks[task.name]["minus"] = {layer: module.mask_logits.detach() < 0 for layer, module in layers}
        return {"fraction_kept": masked.fraction_kept()}

    def masks(self, name: str) -> dict[str, Tensors]:
        """The task's bool masks by layer name: "keep", and for ternary values "minus"; none for the first task."""
        return self.task_masks.get(name, {})

    def form(self, name: str) -> tuple[str, Tensors]:
        minus = self.masks(name).get("minus")
        return ("binary", {}) if minus is None else ("ternary", {k: pack_signs(mask) for k, mask in minus.items()})

    def network_tensors(self, name: str, view: str) -> Tensors:
        masks = self.masks(name)
        weights = {f"{layer}.weight": self._under(layer, keep, masks) for layer, keep in masks.get("keep", {}).items()}
        return {**super().network_tensors(name, view), **weights}

    def _under(self, layer: str, keep: Tensor, masks: dict[str, Tensors]) -> Tensor:
        weight = self.shared[f"{layer}.weight"]
        signed = torch.where(masks["minus"][layer], -weight, weight) if "minus" in masks else weight
        return torch.where(keep, signed, torch.zeros((), dtype=weight.dtype, device=weight.device))
