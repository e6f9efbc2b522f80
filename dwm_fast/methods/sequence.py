"""Learning domain after domain with one backbone: the protocol of every method that can, and what goes in.

The first domain is learned by the whole network, in the ordinary way; a method begins from that network. Each later
domain is learned as the method has it, and every domain seen so far can be asked for its network at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from dwm_fast.methods.base import Batch


@dataclass(frozen=True)
class Task:
    """One domain of a sequence as a method sees it.

    Attributes:
        name: the domain's name; no two tasks of a sequence share one.
        classes: number of classes; the width of the task's own head.
        batches: epoch number -> iterator of (images, labels) on the model's device, augmented, deterministic.
        steps_per_epoch: number of batches an epoch.
        loss: network -> mean cross-entropy on a fixed sample of the training images, without augmentation, in
            eval mode. Never sees a test image.
        seed: seed of whatever the method draws.
        progress: called after every step with figures to show (0-dim tensors, on the device; read them before the next
            step).
        autocast: context-manager factory for the forward pass, or None.
    """

    name: str
    classes: int
    batches: Callable[[int], Iterator[Batch]]
    steps_per_epoch: int
    loss: Callable[[nn.Module], float]
    seed: int = 0
    progress: Callable[[Mapping[str, Tensor]], None] = lambda _: None
    autocast: Callable[[], Any] | None = None


class Learner(Protocol):
    """What a method holds over a sequence: the backbone, and what each domain added to it."""

    views: tuple[str, ...]
    """Ways to look at a domain's network, the usual one first: ("shared",), or ("shared", "masked") where the
    domain's own bits can be put over the shared network."""

    def begin(self, task: Task, network: nn.Module) -> dict[str, Any]:
        """Take `network`, already trained on the first task, as the start. Returns figures as `learn` does."""
        ...

    def learn(self, task: Task) -> dict[str, Any]:
        """Learn the next task. Returns plain figures, e.g. {"fraction_kept": 0.31}."""
        ...

    def network(self, name: str, view: str = "shared") -> nn.Module:
        """The network of a task seen so far, as it is now: in eval mode, with the task's own head."""
        ...

    def bits(self, name: str) -> int:
        """Bits stored for the task beside the backbone and its head: masks, real values, batch norm, own weights."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything, as named tensors on the CPU; bool masks packed to one bit a weight."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave; `network` of every task is then bit-identical."""
        ...


class SequentialMethod(Protocol):
    """A way to learn domains one after the other."""

    name: ClassVar[str]

    def learner(self, network: Callable[[int], nn.Module], head: str) -> Learner:
        """A learner that has seen nothing.

        Args:
            network: number of classes -> a fresh network on its device (for its structure; values are replaced).
            head: name of the network's last Linear, of which every task has its own.
        """
        ...
