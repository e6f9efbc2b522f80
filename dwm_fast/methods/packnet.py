"""PackNet (Mallya and Lazebnik 2018): a weight belongs to one domain; each domain prunes to make room for the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dwm_fast.bank import Ownership
from dwm_fast.errors import InputError
from dwm_fast.methods.learner import SequenceLearner, Tensors, seeded, train_task
from dwm_fast.methods.sequence import Task
from dwm_fast.methods.transfer import TrainOptions, check_frozen


def prune_smallest(weight: Tensor, owner: Tensor, task: int, fraction: float) -> Tensor:
    """Free the smallest round(fraction * n) of the n weights that `task` owns; the new owner map.

    The cut is at the kthvalue of abs(weight), inclusive, so equal values at the cut go together (authors' code).

    Args:
        weight: any shape.
        owner: uint8 of that shape, 0 = free.
        task: owner whose weights are pruned, from 1.
        fraction: of that task's weights, in [0, 1].
    """
    owned = owner == task
    magnitudes = weight.detach()[owned].abs()
    count = round(fraction * magnitudes.numel())
    if count == 0:
        return owner.clone()
    cut = magnitudes.kthvalue(count).values
    return torch.where(owned & (weight.detach().abs() <= cut), torch.zeros_like(owner), owner)


@dataclass(frozen=True)
class PackNet:
    """Train on the free weights, prune the smallest of them, retrain the rest; the pruned are free for the next task.

    Args:
        prune: fraction of its weights that each task frees, by task; the last holds for all later ones (paper: a half
            by the first, three quarters by the others).
        training: how a task trains the free weights.
        retraining: how the weights that are left are trained after pruning.

    Biases and batch norm are trained until the first task's retraining ends, and frozen then. Rates are ours.
    """

    prune: tuple[float, ...] = (0.5, 0.75)
    training: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=3, lr=1e-3, batch_norm="frozen"))
    retraining: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=2, lr=3e-4, batch_norm="frozen"))
    name: ClassVar[str] = "packnet"

    def __post_init__(self) -> None:
        if not self.prune or not all(0 <= fraction <= 1 for fraction in self.prune):
            raise InputError(f"prune is {self.prune}; expected fractions from 0 to 1, at least one")
        for key in ("training", "retraining"):
            check_frozen(getattr(self, key))
            policy = getattr(self, key).batch_norm
            if policy != "frozen":
                raise InputError(f"{key}.batch_norm is '{policy}'; expected 'frozen': PackNet shares one batch norm")

    def learner(self, network: Callable[[int], nn.Module], head: str) -> PackNetLearner:
        """A learner that has seen nothing."""
        return PackNetLearner(network, head, self)


PACKNET_PAPER = PackNet(
    training=TrainOptions(20, 1e-3, "sgd", weight_decay=0.0, schedule="step", batch_norm="frozen"),
    retraining=TrainOptions(10, 1e-4, "sgd", weight_decay=0.0, schedule="step", batch_norm="frozen"),
)
"""packnet-paper: SGD with momentum 0.9, 20 epochs at 1e-3 (x0.1 after ten), 10 more at 1e-4 after pruning (code)."""


class PackNetLearner(SequenceLearner):
    """`PackNet` over a sequence. Task t sees the weights with 0 < owner <= t, and nothing ever writes those again."""

    MEMORY = ("owner",)

    def __init__(self, network: Callable[[int], nn.Module], head: str, method: PackNet) -> None:
        super().__init__(network, head)
        self._method = method

    @property
    def owner(self) -> Tensors:
        """layer name -> uint8 owner of every weight, 0 = free."""
        return self.memory["owner"]

    def begin(self, task: Task, network: nn.Module) -> dict[str, Any]:
        """The first task owns every weight; prune and retrain."""
        self.start(task, network)
        weights = {layer: there.weight for layer, there in self.maskable(network).items()}
        self.memory["owner"] = {layer: torch.ones_like(weight, dtype=torch.uint8) for layer, weight in weights.items()}
        mine = self.empty(task.classes)
        mine.load_state_dict({**self.shared, **self.own[task.name]})
        return self._prune_and_retrain(task, mine, epochs_before=0)

    def learn(self, task: Task) -> dict[str, Any]:
        """Train the free weights, which start at 0; then prune and retrain."""
        if len(self.classes) == 255:
            raise InputError("PackNet holds 255 tasks, one byte a weight, and all are taken")
        with seeded(task):
            network = self.fresh(task)
            free = {layer: owner == 0 for layer, owner in self.owner.items()}
            self._train(task, network, free, self._method.training, 0)
        self.add_task(task, network)
        number = len(self.classes)
        self.memory["owner"] = {
            layer: torch.where(owner == 0, torch.full_like(owner, number), owner) for layer, owner in self.owner.items()
        }
        return self._prune_and_retrain(task, network, self._method.training.epochs)

    def _prune_and_retrain(self, task: Task, network: nn.Module, epochs_before: int) -> dict[str, Any]:
        number = len(self.classes)
        fraction = self._method.prune[min(number, len(self._method.prune)) - 1]
        with torch.no_grad():
            for layer, owner in self.owner.items():
                weight = network.get_submodule(layer).weight
                assert isinstance(weight, Tensor)
                self.owner[layer] = prune_smallest(weight, owner, number, fraction)
                weight[self.owner[layer] == 0] = 0.0
        with seeded(task):
            mine = {layer: owner == number for layer, owner in self.owner.items()}
            self._train(task, network, mine, self._method.retraining, epochs_before)
        self.set_shared(network)
        self.own[task.name] = {
            key: tensor.detach().clone() for key, tensor in network.state_dict().items() if self.of_head(key)
        }
        return {"fraction_owned": self._fraction(number), "fraction_free": self._fraction(0)}

    def _train(
        self, task: Task, network: nn.Module, trained: Tensors, options: TrainOptions, epochs_before: int
    ) -> None:
        """Train only the weights of `trained`, the head, and for the first task biases and batch norm."""
        first = len(self.owner) > 0 and list(self.classes) == [task.name]
        keep = {layer: ~mask for layer, mask in trained.items()}
        weights = {f"{layer}.weight" for layer in keep}
        fixed = {n for n, _ in network.named_parameters() if n not in weights and not self.of_head(n)}
        options = _first_task(options) if first else options
        train_task(network, task, options, keep=keep, fixed=() if first else fixed, epochs_before=epochs_before)

    def _fraction(self, number: int) -> float:
        owned = sum(int((owner == number).sum()) for owner in self.owner.values())
        return owned / sum(owner.numel() for owner in self.owner.values())

    def masks(self, name: str) -> Tensors:
        """layer name -> bool mask of the weights that the task sees: 0 < owner <= its number."""
        number = list(self.classes).index(name) + 1
        return {layer: (owner > 0) & (owner <= number) for layer, owner in self.owner.items()}

    def keep_masks(self, name: str) -> Tensors:
        return self.masks(name)

    def ownership(self) -> Ownership:
        """The owners of all weights by parameter name, for `dwm_fast.bank.write_ownership`."""
        return Ownership(tuple(self.classes), {f"{layer}.weight": owner for layer, owner in self.owner.items()})

    def bits(self, name: str) -> int:
        """One bit a weight, the task's inference mask; whose weights they are is in the shared ownership map."""
        return super().bits(name) + sum(owner.numel() for owner in self.owner.values())

    def network_tensors(self, name: str, view: str) -> Tensors:
        seen = {
            f"{layer}.weight": torch.where(mask, self.shared[f"{layer}.weight"], 0.0)
            for layer, mask in self.masks(name).items()
        }
        return {**super().network_tensors(name, view), **seen}


def _first_task(options: TrainOptions) -> TrainOptions:
    """The same training with batch norm trained."""
    return TrainOptions(**{**vars(options), "batch_norm": "shared"})
