"""CPG (Hung et al. 2019): pick earlier tasks' weights, train free ones, grow until a goal is met, prune gradually."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast._options import RATE, Rule, check_options, whole
from dwm_fast.errors import InputError
from dwm_fast.methods.learner import SequenceLearner, Tensors, norm_names, seeded, train_task
from dwm_fast.methods.sequence import Task
from dwm_fast.methods.transfer import TrainOptions, check_frozen, make_optimizer, make_schedule
from dwm_fast.nn import MaskedModel, Threshold, mask_model
from dwm_fast.nn.model import NORM_LAYERS
from dwm_fast.nn.select import literal
from dwm_fast.optim import FrozenAdamW

_SHARE = Rule("a fraction from 0 to 1", lambda value: 0 <= value <= 1)
_EPS = 1e-15
"""Adam's eps for the picks: the gradient of one of 1e7 would drown in 1e-8."""


def sparsity(part: float, start: float, target: float) -> float:
    """s(p) = s_T + (s_0 - s_T) (1 - p)^3, p the part of the pruning that is done, from 0 to 1."""
    return target + (start - target) * (1.0 - part) ** 3


def cuts(steps: int, every: int) -> dict[int, float]:
    """Steps done in a stage -> p at which weights are cut then: every so many, until p = 1 when half are done."""
    ramp = max(1, steps // 2)
    return {**{step: step / ramp for step in range(every, ramp, every)}, ramp: 1.0}


def prune_available(weight: Tensor, owner: Tensor, task: int, fraction: float) -> Tensor:
    """Free so many of a task's weights that `fraction` of all that are free or its own are free; the new owner map.

    The cut is at the kthvalue of abs(weight), k = round(fraction * n), over the n weights that are free or its own,
    inclusive (authors' code).

    Args:
        weight: any shape; 0 where free.
        owner: uint8 of that shape, 0 = free.
        task: owner whose weights are pruned, from 1.
        fraction: from 0 to 1.
    """
    own = owner == task
    magnitudes = weight.detach()[own | (owner == 0)].abs()
    count = round(fraction * magnitudes.numel())
    if count == 0:
        return owner.clone()
    cut = magnitudes.kthvalue(count).values
    return torch.where(own & (weight.detach().abs() <= cut), torch.zeros_like(owner), owner)


def released(owner: Mapping[str, Tensor], fraction: float, seed: int) -> Tensors:
    """Name -> which free weights a task may use: a number of each, drawn from [0, 1) by the seed, is below `fraction`.

    A larger fraction holds all of a smaller one.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.rand(map_.shape, generator=generator).to(map_.device) for name, map_ in owner.items()}
    return {name: (map_ == 0) & (drawn[name] < fraction) for name, map_ in owner.items()}


@torch.no_grad()
def accuracy(network: nn.Module, task: Task) -> float:
    """Share of the training images of the task's epoch 0 that the network classifies correctly, in eval mode."""
    network.eval()
    right, seen = 0, 0
    for images, labels in task.batches(0):
        with task.autocast() if task.autocast else contextlib.nullcontext():
            output = network(images)
        right += int((output.argmax(1) == labels).sum())
        seen += len(labels)
    return right / max(1, seen)


@dataclass(frozen=True)
class CPG:
    """As PackNet a weight belongs to one task; a later task learns which of the earlier tasks' weights it uses.

    Args:
        kind: start value and threshold of the picks over earlier weights (code: 1e-2 and 5e-3).
        mask_lr: Adam's rate of the picks (code: 5e-4 on CIFAR-100, 1e-4 on ImageNet).
        training: how picks and released weights are learned together.
        pruning: the training of one stage of pruning; picks stay as they are.
        sparsities: what share of the free and its own weights a task leaves free, stage after stage (code: 0.1, 0.2 ..
            0.9, 0.95). The last stage that meets the goal counts.
        every: steps between two cuts within a stage (code: 10).
        goal: accuracy that a task must reach on its training images, or None: that of a copy fine-tuned for it in full.
        slack: how far below the goal is still met (ours).
        growth: shares of the free weights that a task may use, tried in this order until the goal is met.

    The paper widens layers where the goal is missed. Here the width is fixed: growth means to release free weights step
    by step, and where all of them do not reach the goal, what they reach becomes the goal of pruning.
    """

    kind: Threshold = field(default_factory=Threshold)
    mask_lr: Annotated[float, RATE] = 5e-4
    training: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=3, lr=1e-3, batch_norm="per-domain"))
    pruning: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=1, lr=3e-4, batch_norm="per-domain"))
    sparsities: tuple[float, ...] = (0.25, 0.5, 0.75)
    every: Annotated[int, whole(1)] = 10
    goal: Annotated[float | None, _SHARE] = None
    slack: Annotated[float, _SHARE] = 0.01
    growth: tuple[float, ...] = (0.5, 1.0)
    name: ClassVar[str] = "cpg"

    def __post_init__(self) -> None:
        check_options(self)
        for key in ("sparsities", "growth"):
            given = getattr(self, key)
            if not given or not all(0 < value <= 1 for value in given) or list(given) != sorted(set(given)):
                raise InputError(f"{key} is {given}; expected fractions above 0 to 1, one at least, in rising order")
        if self.kind.ternary:
            raise InputError("kind is ternary; expected Threshold(ternary=False): CPG picks weights or leaves them")
        if self.pruning.epochs == 0:
            raise InputError("pruning.epochs is 0; expected at least 1: weights are cut between steps of training")
        if self.training.start_decay:
            raise InputError(f"training.start_decay is {self.training.start_decay}; expected 0: CPG has no such decay")
        check_frozen(self.training)
        check_frozen(self.pruning)
        policies = {self.training.batch_norm, self.pruning.batch_norm}
        if policies not in ({"frozen"}, {"per-domain"}):
            raise InputError(
                f"batch_norm is '{self.training.batch_norm}' in training and '{self.pruning.batch_norm}' in pruning; "
                "expected frozen or per-domain, the same in both: CPG keeps earlier tasks"
            )

    def learner(self, network: Callable[[int], nn.Module], head: str) -> CPGLearner:
        """A learner that has seen nothing."""
        return CPGLearner(network, head, self)


@dataclass
class _Learned:
    """A task being learned: its plain network, what it uses, whose weights they are, and how good it is."""

    network: nn.Module
    keep: Tensors
    owner: Tensors
    accuracy: float
    share: float
    sparsity: float = 0.0


class CPGLearner(SequenceLearner):
    """`CPG` over a sequence. Owned weights are never written again, so earlier predictions stay to the last bit."""

    MEMORY = ("owner",)
    method: CPG

    @property
    def owner(self) -> Tensors:
        """layer name -> uint8 owner of every weight, 0 = free."""
        return self.memory["owner"]

    def begin(self, task: Task, network: nn.Module) -> dict[str, Any]:
        """The first task owns every weight, and gives back what it does not need."""
        self.start(task, network)
        mine = self.empty(task.classes)
        mine.load_state_dict({**self.shared, **self.own.pop(task.name)})
        del self.classes[task.name]
        weights = {layer: there.weight for layer, there in self.maskable(mine).items()}
        owner = {layer: torch.ones_like(weight, dtype=torch.uint8) for layer, weight in weights.items()}
        keep = {layer: torch.ones_like(weight, dtype=torch.bool) for layer, weight in weights.items()}
        reached = accuracy(mine, task)
        goal = reached if self.method.goal is None else self.method.goal
        return self._finish(task, _Learned(mine, keep, owner, reached, 1.0), goal, 0)

    def learn(self, task: Task) -> dict[str, Any]:
        """Pick and train, with more of the free weights until the goal is met; then prune."""
        if len(self.classes) == 255:
            raise InputError("CPG holds 255 tasks, one byte a weight, and all are taken")
        goal = self._fine_tuned(task) if self.method.goal is None else self.method.goal
        for share in self.method.growth:
            learned = self._pick_and_train(task, share)
            if learned.accuracy >= goal - self.method.slack:
                break
        return self._finish(task, learned, goal, self.method.training.epochs)

    def _fine_tuned(self, task: Task) -> float:
        with seeded(task):
            return accuracy(train_task(self.fresh(task), task, self.method.training), task)

    def _pick_and_train(self, task: Task, share: float) -> _Learned:
        number = len(self.classes) + 1
        mine = released(self.owner, share, task.seed)
        with seeded(task):
            masked = self._masked(task, self.fresh(task))
            self._train(task, masked, mine)
        picks = masked.keep_masks()
        keep = {layer: mine[layer] | (picks[layer] & (owner > 0)) for layer, owner in self.owner.items()}
        network = self.empty(task.classes)
        tensors = masked.model.state_dict()
        network.load_state_dict({key: tensors[key] for key in network.state_dict()})
        _zero(network, {layer: ~mask for layer, mask in keep.items()})
        owner = {layer: torch.where(mine[layer], number, owner).to(torch.uint8) for layer, owner in self.owner.items()}
        return _Learned(network, keep, owner, accuracy(network, task), share)

    def _masked(self, task: Task, network: nn.Module) -> MaskedModel:
        """The network under picks, with what a task trains beside them set to be trained."""
        policy = "train" if self.method.training.batch_norm == "per-domain" else "frozen"
        masked = mask_model(network, self.method.kind, exclude=literal(self.head), batch_norm=policy, seed=task.seed)
        masked.model.get_submodule(self.head).requires_grad_(True)
        for layer in masked.mask_layers().values():
            layer.frozen_weight.requires_grad_(True)
        if policy == "train":
            for module in masked.model.modules():
                if isinstance(module, NORM_LAYERS):
                    module.requires_grad_(True)
        return masked

    def _train(self, task: Task, masked: MaskedModel, mine: Tensors) -> None:
        """Weights by `training`'s optimiser, picks over owned weights by Adam, both rates by its schedule."""
        options = self.method.training
        picks = list(masked.mask_parameters())
        for pick in picks:
            pick.requires_grad_(False)  # the first optimiser takes whatever is trained
        weights = make_optimizer(masked.model, options, {layer: ~mask for layer, mask in mine.items()})
        for pick in picks:
            pick.requires_grad_(True)
        free = [self.owner[layer] == 0 for layer in masked.mask_layers()]
        picking = FrozenAdamW(picks, self.method.mask_lr, eps=_EPS, weight_decay=0.0, keep=free)
        steps = options.epochs * task.steps_per_epoch
        slower = dataclasses.replace(options, lr=self.method.mask_lr)
        schedules = make_schedule(weights, options, steps), make_schedule(picking, slower, steps)
        masked.train()
        for epoch in range(options.epochs):
            for images, labels in task.batches(epoch):
                with task.autocast() if task.autocast else contextlib.nullcontext():
                    output = masked(images)
                loss = F.cross_entropy(output.float(), labels, label_smoothing=options.label_smoothing)
                weights.zero_grad(set_to_none=True)
                picking.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                weights.step()
                picking.step()
                for schedule in schedules:
                    schedule.step()
                task.progress({"loss": loss.detach()})
        masked.eval()

    def _finish(self, task: Task, learned: _Learned, goal: float, epochs_before: int) -> dict[str, Any]:
        """Prune, and write down what the task has."""
        met = learned.accuracy >= goal - self.method.slack
        learned = self._prune(task, learned, min(goal, learned.accuracy) - self.method.slack, epochs_before)
        number = len(self.classes) + 1
        earlier = {layer: self.shared[f"{layer}.weight"] for layer in learned.owner}
        per_domain = self.method.training.batch_norm == "per-domain"
        self.add_task(task, learned.network, norm_names(learned.network) if per_domain else lambda _: False)
        if number == 1:
            self.set_shared(learned.network)
        for layer, owner in learned.owner.items():
            weight = learned.network.get_submodule(layer).get_parameter("weight").detach()
            kept = torch.where(owner == number, weight, earlier[layer])
            self.shared[f"{layer}.weight"] = torch.where(owner == 0, 0.0, kept)
        self.memory["owner"] = learned.owner
        self.task_masks[task.name] = {"keep": {k: mask & (learned.owner[k] > 0) for k, mask in learned.keep.items()}}
        return self._figures(task.name, learned, goal, met)

    def _prune(self, task: Task, learned: _Learned, wanted: float, epochs_before: int) -> _Learned:
        """The last stage of gradual pruning whose accuracy is `wanted` or more; `learned` itself where none is."""
        network, owner, start = learned.network, learned.owner, 0.0
        found = dataclasses.replace(learned, network=copy.deepcopy(network))
        for stage, target in enumerate(self.method.sparsities):
            before = epochs_before + stage * self.method.pruning.epochs
            owner = self._stage(task, network, owner, (start, target), before)
            reached = accuracy(network, task)
            if reached < wanted:
                break
            now = copy.deepcopy(network)
            found = dataclasses.replace(learned, network=now, owner=owner, accuracy=reached, sparsity=target)
            start = target
        return found

    def _stage(
        self, task: Task, network: nn.Module, owner: Tensors, ends: tuple[float, float], epochs_before: int
    ) -> Tensors:
        """Train what is the task's own while its sparsity goes from `ends[0]` to `ends[1]`; the new owner maps."""
        options, number = self.method.pruning, len(self.classes) + 1
        when = cuts(options.epochs * task.steps_per_epoch, self.method.every)
        others = {layer: map_ != number for layer, map_ in owner.items()}
        done = 0

        def after_step(figures: Mapping[str, Tensor]) -> None:
            nonlocal done, owner
            done += 1
            if done in when:
                wanted = sparsity(when[done], *ends)
                weights = {layer: network.get_submodule(layer).get_parameter("weight") for layer in owner}
                owner = {k: prune_available(weights[k], map_, number, wanted) for k, map_ in owner.items()}
            _zero(network, {layer: ~others[layer] & (map_ == 0) for layer, map_ in owner.items()})
            task.progress(figures)

        with seeded(task):
            told = dataclasses.replace(task, progress=after_step)
            train_task(network, told, options, keep=others, fixed=self._fixed(network), epochs_before=epochs_before)
        return owner

    def _fixed(self, network: nn.Module) -> set[str]:
        """Parameters that pruning leaves alone: of the first task none, later what is neither masked nor its own."""
        if not self.classes:
            return set()
        norms = norm_names(network)
        weights = {f"{layer}.weight" for layer in self.owner}
        names = {name for name, _ in network.named_parameters()}
        return {name for name in names - weights if not self.of_head(name) and not norms(name)}

    def _figures(self, name: str, learned: _Learned, goal: float, met: bool) -> dict[str, Any]:
        number = len(self.classes)
        keep = self.task_masks[name]["keep"]
        total = sum(map_.numel() for map_ in self.owner.values())
        earlier = {layer: (map_ > 0) & (map_ < number) for layer, map_ in self.owner.items()}
        picked = sum(int((keep[layer] & mask).sum()) for layer, mask in earlier.items())
        return {
            "goal": goal,
            "accuracy_on_training_images": learned.accuracy,
            "goal_met": met,
            "share_released": learned.share,
            "sparsity": learned.sparsity,
            "fraction_owned": sum(int((map_ == number).sum()) for map_ in self.owner.values()) / total,
            "fraction_picked": picked / total,
            "fraction_free": sum(int((map_ == 0).sum()) for map_ in self.owner.values()) / total,
        }

    def network_tensors(self, name: str, view: str) -> Tensors:
        weights = {
            f"{layer}.weight": torch.where(keep, self.shared[f"{layer}.weight"], 0.0)
            for layer, keep in self.keep_masks(name).items()
        }
        return {**super().network_tensors(name, view), **weights}


@torch.no_grad()
def _zero(network: nn.Module, dead: Mapping[str, Tensor]) -> None:
    """Set the weights of the layers that `dead` marks to 0."""
    for layer, mask in dead.items():
        network.get_submodule(layer).get_parameter("weight").masked_fill_(mask, 0.0)
