"""HAT (Serra et al. 2018): each task learns which units it needs; what feeds them is frozen for all later tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast._options import RATE, Rule, at_least, check_options
from dwm_fast.errors import InputError
from dwm_fast.methods.learner import SequenceLearner, Tensors, norm_names, seeded
from dwm_fast.methods.sequence import Task
from dwm_fast.methods.transfer import TrainOptions, check_frozen, freeze_norms, make_optimizer, make_schedule

_LARGEST = 6.0
"""Embeddings are held within it (code)."""
_EXPONENT = 50.0


def annealed(step: int, steps: int, largest: float) -> float:
    """s at a step of an epoch, both counted from 0: 1/smax at the first, smax at the last, a line between."""
    return 1 / largest + (largest - 1 / largest) * step / max(1, steps - 1)


def penalty(units: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Tensor:
    """sum a (1 - b) / sum (1 - b) over all units, b = 1 where an earlier task needs the unit; 0 where all are."""
    free = {name: 1.0 - before[name].float() for name in units}
    asked = torch.stack([(a * free[name]).sum() for name, a in units.items()]).sum()
    return asked / torch.stack([f.sum() for f in free.values()]).sum().clamp(min=1.0)


def compensation(embedding: Tensor, s: Tensor, largest: float) -> Tensor:
    """What an embedding's gradient is multiplied by: smax (cosh(s e) + 1) / (s (cosh(e) + 1))."""
    scaled = (s * embedding).clamp(-_EXPONENT, _EXPONENT)
    return largest / s * (torch.cosh(scaled) + 1.0) / (torch.cosh(embedding) + 1.0)


@dataclass(frozen=True)
class HAT:
    """A mask of units, a = sigmoid(s e), for every task and layer; units that earlier tasks need are frozen.

    Args:
        options: how weights are trained. batch_norm is "frozen" or "per-domain" (ours).
        largest: smax, the sharpness at the end of every epoch (code: 400).
        coefficient: of the penalty on units that no earlier task has (paper: 0.75).
        embedding_lr: rate of the embeddings, by Adam (ours).
    """

    options: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=3, lr=1e-3, batch_norm="per-domain"))
    largest: Annotated[float, Rule("a sharpness above 1", lambda value: value > 1)] = 400.0
    coefficient: Annotated[float, at_least(0)] = 0.75
    embedding_lr: Annotated[float, RATE] = 0.05
    name: ClassVar[str] = "hat"

    def __post_init__(self) -> None:
        check_options(self)
        check_frozen(self.options)
        if self.options.batch_norm == "shared":
            raise InputError("options.batch_norm is 'shared'; expected frozen or per-domain: HAT keeps earlier tasks")

    def learner(self, network: Callable[[int], nn.Module], head: str) -> HATLearner:
        """A learner that has seen nothing."""
        return HATLearner(network, head, self)


class HATLearner(SequenceLearner):
    """`HAT` over a sequence. Masks are cut at e >= 0 in the end, so earlier predictions stay to the last bit."""

    method: HAT

    def begin(self, task: Task, network: nn.Module) -> dict[str, Any]:
        """Train the network on under masks: the first task, too, takes no more units than it needs."""
        self.start(task, network)
        mine = self.empty(task.classes)
        mine.load_state_dict({**self.shared, **self.own.pop(task.name)})
        del self.classes[task.name]
        return self._learn(task, mine)

    def learn(self, task: Task) -> dict[str, Any]:
        """Train what no earlier task needs, and the task's units."""
        with seeded(task):
            network = self.fresh(task)
        return self._learn(task, network)

    def _learn(self, task: Task, network: nn.Module) -> dict[str, Any]:
        layers = {name: there.weight for name, there in self.maskable(network).items()}
        before = self.needed(layers)
        with seeded(task):
            embeddings = {
                name: torch.randn(len(w), device="cpu").to(w.device).requires_grad_() for name, w in layers.items()
            }
            self._train(task, network, embeddings, before)
        units = {name: e.detach() >= 0 for name, e in embeddings.items()}
        own = norm_names(network) if self.method.options.batch_norm == "per-domain" else lambda _: False
        self.add_task(task, network, own)
        for name, unit in units.items():
            bias = network.get_submodule(name).bias
            if isinstance(bias, Tensor):
                self.own[task.name][f"{name}.bias"] = torch.where(unit, bias.detach(), 0.0)
        self.set_shared(network)
        self.task_masks[task.name] = {"keep": units}
        total = sum(unit.numel() for unit in units.values())
        return {
            "fraction_kept": sum(int(unit.sum()) for unit in units.values()) / total,
            "fraction_frozen": sum(int(unit.sum()) for unit in before.values()) / total,
        }

    def needed(self, layers: Mapping[str, Tensor]) -> Tensors:
        """layer name -> which units at least one task so far needs, (out,)."""
        found = {name: torch.zeros(len(w), dtype=torch.bool, device=w.device) for name, w in layers.items()}
        for masks in self.task_masks.values():
            found = {name: unit | masks["keep"][name] for name, unit in found.items()}
        return found

    def _train(self, task: Task, network: nn.Module, embeddings: Tensors, before: Tensors) -> None:
        method, options = self.method, self.method.options
        network.requires_grad_(True).train()
        if options.batch_norm == "frozen":
            freeze_norms(network)
        weights = make_optimizer(network, options, _rows(network, before))
        schedule = make_schedule(weights, options, options.epochs * task.steps_per_epoch)
        units = torch.optim.Adam(list(embeddings.values()), method.embedding_lr)
        s = torch.ones((), device=next(iter(embeddings.values())).device)
        for epoch in range(options.epochs):
            for step, (images, labels) in enumerate(task.batches(epoch)):
                s.fill_(annealed(step, task.steps_per_epoch, method.largest))
                masks = {name: (s * e).sigmoid() for name, e in embeddings.items()}
                with gated(network, masks), task.autocast() if task.autocast else contextlib.nullcontext():
                    output = network(images)
                loss = F.cross_entropy(output.float(), labels, label_smoothing=options.label_smoothing)
                weights.zero_grad()
                units.zero_grad()
                (loss + method.coefficient * penalty(masks, before)).backward()  # type: ignore[no-untyped-call]
                _step_embeddings(units, embeddings, s, method.largest)
                weights.step()
                schedule.step()
                task.progress({"loss": loss.detach()})
        weights.zero_grad(set_to_none=True)
        network.eval()

    def keep_masks(self, name: str) -> Tensors:
        """layer name -> the task's mask of weights: whole rows."""
        units = self.task_masks.get(name, {}).get("keep", {})
        return {layer: _row(unit, self.shared[f"{layer}.weight"]) for layer, unit in units.items()}

    def mask_shape(self, weight: torch.Size) -> torch.Size:
        return torch.Size(weight[:1])

    def network_tensors(self, name: str, view: str) -> Tensors:
        weights = {
            f"{layer}.weight": torch.where(keep, self.shared[f"{layer}.weight"], 0.0)
            for layer, keep in self.keep_masks(name).items()
        }
        return {**super().network_tensors(name, view), **weights}


@torch.no_grad()
def _step_embeddings(optimizer: torch.optim.Optimizer, embeddings: Tensors, s: Tensor, largest: float) -> None:
    for embedding in embeddings.values():
        if embedding.grad is not None:
            embedding.grad.mul_(compensation(embedding, s, largest))
    optimizer.step()
    for embedding in embeddings.values():
        embedding.clamp_(-_LARGEST, _LARGEST)


@contextlib.contextmanager
def gated(network: nn.Module, units: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the output of every layer in `units` is multiplied by its units' numbers (out,)."""

    def gate(mask: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda layer, _, y: y * (mask if isinstance(layer, nn.Linear) else mask.view(-1, *[1] * (y.dim() - 2)))

    handles = [network.get_submodule(name).register_forward_hook(gate(mask)) for name, mask in units.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _row(unit: Tensor, weight: Tensor) -> Tensor:
    return unit.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight).clone()


def _rows(network: nn.Module, units: Mapping[str, Tensor]) -> Tensors:
    """What is frozen: rows of weights, and biases, of needed units, by parameter name; {} where none is needed."""
    if not any(bool(unit.any()) for unit in units.values()):
        return {}
    found = {}
    for name, unit in units.items():
        module = network.get_submodule(name)
        found[f"{name}.weight"] = _row(unit, module.get_parameter("weight"))
        if isinstance(module.bias, Tensor):
            found[f"{name}.bias"] = unit
    return found
