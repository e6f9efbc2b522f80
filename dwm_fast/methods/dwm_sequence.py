"""binary, domain after domain: freeze what earlier domains need (DWM's variant B), fine-tune the rest on the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dwm_fast.errors import InputError
from dwm_fast.methods.binary import Binary
from dwm_fast.methods.learner import SequenceLearner, Tensors, as_source, norm_names, seeded, train_task
from dwm_fast.methods.sequence import Task
from dwm_fast.methods.transfer import TrainOptions, check_frozen
from dwm_fast.nn.select import literal


@dataclass(frozen=True)
class BinarySequence:
    """After each task learn which weights it needs; they are frozen, and all others are fine-tuned on the next task.

    The paper has one source and one target; freezing the union over all tasks so far is ours. Fine-tuning starts from
    the weights as they are (S_end).

    Args:
        binary: how a mask is found. The head is never masked: every task has its own.
        options: how the free weights are fine-tuned. batch_norm "frozen" (ours): statistics that move undo what frozen
            weights kept; "per-domain" keeps each task's own; "shared" evaluates every task with the newest.
    """

    binary: Binary = field(default_factory=Binary)
    options: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=3, lr=1e-3, batch_norm="frozen"))
    name: ClassVar[str] = "binary"

    def __post_init__(self) -> None:
        check_frozen(self.options)
        if self.binary.options.biases:
            raise InputError("binary.options.biases is True; expected False: in a sequence weights alone have masks")

    def learner(self, network: Callable[[int], nn.Module], head: str) -> BinaryLearner:
        """A learner that has seen nothing."""
        masks = self.binary.options
        masks = dataclasses.replace(masks, exclude=(*_patterns(masks.exclude), literal(head)))
        return BinaryLearner(network, head, dataclasses.replace(self.binary, options=masks), self.options)


class BinaryLearner(SequenceLearner):
    """`BinarySequence` over a sequence.

    View "shared": the one network as it is now, with the task's head and, by policy, batch norm. View "masked": the
    task's own bits over it, with the biases and batch norm of its time; it forgets nothing.
    """

    views: tuple[str, ...] = ("shared", "masked")

    def __init__(self, network: Callable[[int], nn.Module], head: str, binary: Binary, options: TrainOptions) -> None:
        super().__init__(network, head)
        self._binary = binary
        self._options = options

    def begin(self, task: Task, network: nn.Module) -> dict[str, Any]:
        """Take the network as it is, and find what the task needs of it."""
        self.start(task, network)
        return self._find(task, network, epochs_before=0)

    def learn(self, task: Task) -> dict[str, Any]:
        """Fine-tune what no earlier task needs, then find what this task needs."""
        frozen = self._union()
        with seeded(task):
            network = self.fresh(task)
            train_task(network, task, self._options, keep=frozen)
        self.add_task(task, network)
        self.set_shared(network)
        total = sum(mask.numel() for mask in frozen.values())
        before = sum(int(mask.sum()) for mask in frozen.values()) / total
        return {"fraction_frozen": before, **self._find(task, network, self._options.epochs)}

    def _find(self, task: Task, network: nn.Module, epochs_before: int) -> dict[str, Any]:
        with seeded(task):
            found = self._binary.find(network, as_source(task, epochs_before))
        masks = {layer: mask.detach().clone() for layer, mask in (found.keep or {}).items()}
        self.task_masks[task.name] = {"keep": masks}
        self.own[task.name] |= self._beside(network, masks)
        return {
            "fraction_kept": found.fraction_kept,
            "coefficient": found.coefficient,
            "within_budget": found.within_budget,
        }

    def _beside(self, network: nn.Module, masks: Tensors) -> Tensors:
        """What later training changes beside masked weights: the masked view needs the task's own."""
        norms = norm_names(network)
        frozen_norms = self._options.batch_norm == "frozen"
        changing = {name for name, _ in network.named_parameters()} | {k for k in self.shared if norms(k)}
        masked = {f"{layer}.weight" for layer in masks}
        return {
            key: tensor.clone()
            for key, tensor in self.shared.items()
            if key in changing and key not in masked and not (frozen_norms and norms(key))
        }

    def _union(self) -> Tensors:
        """layer name -> what at least one task so far needs."""
        union: Tensors = {}
        for masks in self.task_masks.values():
            for layer, mask in masks["keep"].items():
                union[layer] = union[layer] | mask if layer in union else mask.clone()
        return union

    def network_tensors(self, name: str, view: str) -> Tensors:
        own = self.own[name]
        if view == "shared":
            norms = norm_names(self.empty(self.classes[name]))
            by_policy = self._options.batch_norm == "per-domain"
            own = {key: tensor for key, tensor in own.items() if self.of_head(key) or (by_policy and norms(key))}
            return {**self.shared, **own}
        masks = self.task_masks[name]["keep"]
        masked = {f"{layer}.weight": _kept(self.shared[f"{layer}.weight"], mask) for layer, mask in masks.items()}
        return {**self.shared, **own, **masked}


def _kept(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def _patterns(given: Any) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
