"""The protocol every mask-finding method keeps, and what goes in and comes out.

A method sees a trained source network and the source's training images, and says which weights are specialised to
the source (keep) and which may be reused. The stages around it (training, re-initialisation, fine-tuning) are the
same for every method: `dwm_fast.methods.transfer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SourceTask:
    """The source domain as a method sees it.

    Attributes:
        batches: epoch number -> iterator of (images, labels) on the model's device, augmented, deterministic.
        steps_per_epoch: number of batches an epoch.
        loss: network -> mean cross-entropy on a fixed sample of the training images, without augmentation, in
            eval mode. Never sees a test image.
        seed: seed of whatever the method draws.
        progress: called after every step with figures to show (0-dim tensors, on the device; read them before the next
            step).
        autocast: context-manager factory for the forward pass, or None.
        start: state dict of the network before it was trained on the source, for methods that rewind; None: not known.
        target: the target's training images, for a method that has ``sees_target = True``; None for all others.
    """

    batches: Callable[[int], Iterator[Batch]]
    steps_per_epoch: int
    loss: Callable[[nn.Module], float]
    seed: int = 0
    progress: Callable[[Mapping[str, Tensor]], None] = lambda _: None
    autocast: Callable[[], Any] | None = None
    start: Mapping[str, Tensor] | None = None
    target: SourceTask | None = None


@dataclass(frozen=True)
class FoundMask:
    """What a method found.

    Attributes:
        keep: layer name -> bool tensor of the weight's shape; True = specialised to the source, stays frozen.
            None where the method freezes nothing ("none").
        coefficient: the regulariser's coefficient at the end, where there is one.
        within_budget: whether the mask's source loss is within the stated budget, where there is one.
        history: one row of figures an epoch.
    """

    keep: dict[str, Tensor] | None
    coefficient: float | None = None
    within_budget: bool | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Layer name -> (weights kept, weights in all)."""
        return {name: (int(mask.sum()), mask.numel()) for name, mask in (self.keep or {}).items()}

    @property
    def fraction_kept(self) -> float:
        """Kept weights over all masked weights; 0 where nothing is kept."""
        counts = self.counts().values()
        total = sum(n for _, n in counts)
        return sum(kept for kept, _ in counts) / total if total else 0.0


class Method(Protocol):
    """A way to find the weights that are specialised to the source.

    One with a class attribute ``sees_target = True`` is asked once for every target, and finds that target's training
    images in `SourceTask.target`; any other is asked once for a source.
    """

    name: ClassVar[str]

    def find(self, model: nn.Module, task: SourceTask) -> FoundMask:
        """Find the keep mask of `model`, trained on the source; leaves `model` bit-identical."""
        ...
