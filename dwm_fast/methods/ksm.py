"""KSM (Yang, He, Zhang, Fan 2021): one frozen backbone, and for each domain a bit a kernel, a scale where it is 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dwm_fast.methods._real_masks import RealMaskOptions, learn_real_masks
from dwm_fast.methods.learner import SequenceLearner, Tensors, norm_names, part, seeded
from dwm_fast.methods.sequence import Task
from dwm_fast.nn import KernelSoft
from dwm_fast.ops.kernel_soft import kernel_shape


@dataclass(frozen=True)
class KSM:
    """A soft mask for every kernel outside the head: kept ones as they are, dropped ones scaled into [0, 1/2].

    Args:
        kind: start values, threshold, noise.
        options: how masks, head and batch norm are trained. Ours: Adam 5e-4 over three epochs, where the paper's 2e-4
            needs thirty.

    The backbone is the network trained on the first task, whose own network it stays, without a mask. Scales are
    rounded to half precision when learning ends, so what is stored is what predicts.
    """

    kind: KernelSoft = field(default_factory=KernelSoft)
    options: RealMaskOptions = field(default_factory=lambda: RealMaskOptions(lr=5e-4, batch_norm="per-domain"))
    name: ClassVar[str] = "ksm"

    def learner(self, network: Callable[[int], nn.Module], head: str) -> KSMLearner:
        """A learner that has seen nothing."""
        return KSMLearner(network, head, self)


KSM_PAPER = KSM(
    options=RealMaskOptions(epochs=30, lr=2e-4, head_lr=2e-4, eps=1e-8, schedule="cosine", batch_norm="per-domain")
)
"""ksm-paper: Adam 2e-4 for masks, batch norm and head, cosine over 30 epochs; batches of 32 are the caller's."""


class KSMLearner(SequenceLearner):
    """`KSM` over a sequence. The backbone never changes, so earlier tasks' predictions stay to the last bit."""

    def __init__(self, network: Callable[[int], nn.Module], head: str, method: KSM) -> None:
        super().__init__(network, head)
        self._method = method
        self._scales: dict[str, Tensors] = {}

    def begin(self, task: Task, network: nn.Module) -> dict[str, Any]:
        """Take the network as the backbone."""
        self.start(task, network)
        return {}

    def learn(self, task: Task) -> dict[str, Any]:
        """Learn the kernels' masks, the head and, by policy, batch norm."""
        method = self._method
        with seeded(task):
            masked = learn_real_masks(self.fresh(task), method.kind, self.head, method.options, task)
        own = norm_names(masked.model) if method.options.batch_norm == "per-domain" else lambda _: False
        self.add_task(task, masked.model, own)
        keep = masked.keep_masks()
        self.task_masks[task.name] = {"keep": keep}
        self._scales[task.name] = {
            layer: method.kind.stored(module.mask_logits.detach(), module.unit)
            for layer, module in masked.mask_layers().items()
        }
        return {"fraction_kept": masked.fraction_kept()}

    def masks(self, name: str) -> Tensors:
        """layer name -> bool mask of shape (C_out, C_in, 1, 1), True = the kernel is kept; none for the first task."""
        return self.keep_masks(name)

    def scales(self, name: str) -> Tensors:
        """layer name -> scale of each dropped kernel in order, float16, in [0, 1/2]; none for the first task."""
        return self._scales.get(name, {})

    def bits(self, name: str) -> int:
        """A bit a kernel, 16 bits a dropped kernel, and batch norm where the task has its own."""
        return super().bits(name) + sum(16 * scale.numel() for scale in self.scales(name).values())

    def state(self) -> Tensors:
        numbers = {name: i for i, name in enumerate(self.classes)}
        scales = {
            f"scale/{numbers[name]}/{layer}": scale.cpu().clone()
            for name, layers in self._scales.items()
            for layer, scale in layers.items()
        }
        return {**super().state(), **scales}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        device = next(iter(self.shared.values())).device
        found = {name: part(state, f"scale/{i}/", device) for i, name in enumerate(self.classes)}
        self._scales = {name: layers for name, layers in found.items() if layers}

    def form(self, name: str) -> tuple[str, Tensors]:
        scales = self.scales(name)
        return ("soft", dict(scales)) if scales else ("binary", {})

    def mask_shape(self, weight: torch.Size) -> torch.Size:
        return torch.Size(kernel_shape(weight))

    def network_tensors(self, name: str, view: str) -> Tensors:
        scales = self.scales(name)
        weights = {
            f"{layer}.weight": _under(self.shared[f"{layer}.weight"], keep, scales[layer])
            for layer, keep in self.masks(name).items()
        }
        return {**super().network_tensors(name, view), **weights}


def _under(weight: Tensor, keep: Tensor, scale: Tensor) -> Tensor:
    """The weight with dropped kernels scaled."""
    full = torch.ones(keep.shape, dtype=weight.dtype, device=weight.device)
    return weight * full.masked_scatter_(~keep, scale.to(weight.dtype))
