"""FGGM: only the rows of weights with the highest Fisher information on the new domain are trained on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast._options import FRACTION, check_options, whole
from dwm_fast.errors import InputError
from dwm_fast.methods.base import FoundMask, SourceTask
from dwm_fast.methods.learner import SequenceLearner, Tensors, norm_names, seeded, train_task
from dwm_fast.methods.sequence import Task
from dwm_fast.methods.transfer import TrainOptions, check_frozen
from dwm_fast.nn import maskable_weights


def fisher(network: nn.Module, weights: Mapping[str, Tensor], task: Task | SourceTask, images: int) -> Tensors:
    """Name -> mean over the task's first images of (d log p(label) / d weight)^2, fp32, in eval mode.

    One image at a time: the square of a batch's gradient is another number.
    """
    network.eval()
    totals = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    seen = 0
    for batch in task.batches(0):
        for image, label in zip(*batch, strict=True):
            if seen == images:
                break
            loss = F.cross_entropy(network(image[None]).float(), label[None])
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for total, gradient in zip(totals.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.float().square()
            seen += 1
    return {name: total / max(1, seen) for name, total in totals.items()}


def high_rows(information: Mapping[str, Tensor], quantile: float, over: str) -> Tensors:
    """Name -> bool of the weight's shape: rows whose sum is above the quantile of their layer's, or of all rows'."""
    scores = {name: f.flatten(1).sum(1) for name, f in information.items()}
    everything = torch.cat(list(scores.values()))
    found = {}
    for name, score in scores.items():
        limit = (score if over == "layer" else everything).quantile(quantile)
        weight = information[name]
        found[name] = (score > limit).view(-1, *[1] * (weight.dim() - 1)).expand_as(weight).clone()
    return found


@dataclass(frozen=True)
class FGGM:
    """Train the rows above a quantile of Fisher information on the new domain, and freeze the others.

    Args:
        quantile: of the rows' information; those above it are trained (0.7).
        over: whether a quantile is a "layer"'s or "global", over the rows of all layers (sources disagree).
        images: of the new domain, on which the information is measured (ours).
        options: of a sequence: how the rows are trained.
    """

    quantile: Annotated[float, FRACTION] = 0.7
    over: Literal["layer", "global"] = "layer"
    images: Annotated[int, whole(1)] = 128
    options: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=3, lr=1e-3, batch_norm="per-domain"))
    name: ClassVar[str] = "fggm"
    sees_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)
        check_frozen(self.options)

    def find(self, model: nn.Module, task: SourceTask) -> FoundMask:
        """Keep the rows that the target needs least."""
        if task.target is None:
            raise InputError("fggm looks at the target; give SourceTask(target=...)")
        weights = {name: there.weight for name, there in maskable_weights(model).items()}
        training = model.training
        trained = high_rows(fisher(model, weights, task.target, self.images), self.quantile, self.over)
        model.train(training)
        return FoundMask({name: ~mask for name, mask in trained.items()})

    def learner(self, network: Callable[[int], nn.Module], head: str) -> FGGMLearner:
        """A learner that has seen nothing."""
        return FGGMLearner(network, head, self)


class FGGMLearner(SequenceLearner):
    """`FGGM` over a sequence: one network, changed by every task in the rows that the task needs."""

    method: FGGM

    def begin(self, task: Task, network: nn.Module) -> dict[str, Any]:
        self.start(task, network)
        own = self._own_norms(network)
        self.own[task.name] |= {key: tensor for key, tensor in self.shared.items() if own(key)}
        return {}

    def learn(self, task: Task) -> dict[str, Any]:
        """Measure on the task, then train its rows, all biases and the head."""
        method = self.method
        with seeded(task):
            network = self.fresh(task)
            weights = {name: there.weight for name, there in self.maskable(network).items()}
            trained = high_rows(fisher(network, weights, task, method.images), method.quantile, method.over)
            keep = {name: ~mask for name, mask in trained.items()}
            train_task(network, task, method.options, keep=keep)
        self.add_task(task, network, self._own_norms(network))
        self.set_shared(network)
        return {"fraction_frozen": FoundMask(keep).fraction_kept}

    def _own_norms(self, network: nn.Module) -> Callable[[str], bool]:
        return norm_names(network) if self.method.options.batch_norm == "per-domain" else lambda _: False
