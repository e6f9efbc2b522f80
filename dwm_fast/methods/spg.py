"""SPG (Konishi et al. 2023): no mask in the forward pass; a parameter's gradient shrinks with its importance so far."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast._options import EPOCHS, RATE, Rule, above, at_least, check_options, whole
from dwm_fast.methods._loop import FastStep
from dwm_fast.methods.learner import SequenceLearner, Tensors, cloned, norm_names, seeded
from dwm_fast.methods.sequence import Task
from dwm_fast.methods.transfer import BatchNormPolicy, freeze_norms
from dwm_fast.nn.model import NORM_LAYERS
from dwm_fast.ops.soft_mask import raise_importance, soft_masked_sgd


@dataclass(frozen=True)
class SPG:
    """Soft-masking of gradients, parameter by parameter, with plain SGD (no momentum, no weight decay).

    Args:
        epochs: passes over a task's images.
        lr: first rate. (Ours; paper: 0.25 and a plateau schedule, many epochs.)
        schedule: "cosine" (ours: to 0 over all steps) or "plateau": x `factor` when the loss on the task's own sample
            has not fallen for more than `patience` epochs (paper).
        factor, patience, min_lr: of "plateau" (code: 1/3, 4, 1e-3).
        stop_after: how "plateau" ends. None (ours): when the rate falls below `min_lr`. A number (code: 5): the rate is
            held at `min_lr`, it ends after so many epochs there without a lower loss, and the weights of the lowest
            loss are taken back.
        head_clip: bound on the gradient's norm over the head (code: 1e4).
        head_factor: rate of the head over that of everything else (ours; paper: 1). A head is new with every task,
            and mean importance slows it down with all that was learned before.
        batch_norm: "per-domain" (ours) keeps statistics and affine parameters of each task; "shared" evaluates every
            task with the newest; "frozen" leaves the first task's. The authors' networks have none.
    """

    epochs: Annotated[int, EPOCHS] = 3
    lr: Annotated[float, RATE] = 0.03
    schedule: Literal["cosine", "plateau"] = "cosine"
    factor: Annotated[float, Rule("a number between 0 and 1", lambda value: 0 < value < 1)] = 1 / 3
    patience: Annotated[int, whole(0)] = 5
    min_lr: Annotated[float, at_least(0, "a rate")] = 1e-3
    head_clip: Annotated[float, above(0, "a norm")] = 1e4
    head_factor: Annotated[float, above(0, "a factor")] = 5.0
    batch_norm: BatchNormPolicy = "per-domain"
    stop_after: Annotated[int | None, whole(1)] = field(default=None, metadata={"later": True})
    name: ClassVar[str] = "spg"

    def __post_init__(self) -> None:
        check_options(self)

    def learner(self, network: Callable[[int], nn.Module], head: str) -> SPGLearner:
        """A learner that has seen nothing."""
        return SPGLearner(network, head, self)


SPG_PAPER = SPG(epochs=500, lr=0.25, schedule="plateau", patience=4, head_factor=1.0, stop_after=5)
"""spg-paper: the authors' configuration: SGD 0.25, x1/3 on a plateau of more than 4 epochs, at least 1e-3, at most 500
epochs, the best weights; batches of 64 are the caller's."""


class SPGLearner(SequenceLearner):
    """`SPG` over a sequence. Importance, fp32 and one number a parameter, stays on the device between tasks."""

    MEMORY = ("gamma",)

    def __init__(self, network: Callable[[int], nn.Module], head: str, method: SPG) -> None:
        super().__init__(network, head)
        self._method = method

    @property
    def gamma(self) -> Tensors:
        """parameter name -> importance so far, in [0, 1]."""
        return self.memory["gamma"]

    def begin(self, task: Task, network: nn.Module) -> dict[str, Any]:
        """Take the network as it is (the first task has no masking), and measure what the task needs."""
        self.start(task, network)
        own = self._own_norms(network)
        self.own[task.name] |= {k: v for k, v in self.shared.items() if own(k)}
        mine = self.empty(task.classes)
        mine.load_state_dict({**self.shared, **self.own[task.name]})
        self.memory["gamma"] = {
            key: torch.zeros_like(p, dtype=torch.float32) for key, p in self._extractor(mine).items()
        }
        return self._measure(task, mine, 0)

    def learn(self, task: Task) -> dict[str, Any]:
        """Train with soft-masked gradients, then measure what the task needs."""
        with seeded(task):
            network = self.fresh(task)
            epochs = self._train(task, network)
        self.add_task(task, network, self._own_norms(network))
        self.set_shared(network)
        return {"epochs": epochs, **self._measure(task, network, epochs)}

    def _own_norms(self, network: nn.Module) -> Callable[[str], bool]:
        return norm_names(network) if self._method.batch_norm == "per-domain" else lambda _: False

    def _extractor(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """Every parameter but the head's."""
        return {key: p for key, p in network.named_parameters() if not self.of_head(key)}

    def _train(self, task: Task, network: nn.Module) -> int:
        method = self._method
        network.requires_grad_(True).train()
        if method.batch_norm == "frozen":
            freeze_norms(network)
        extractor = {k: p for k, p in self._extractor(network).items() if p.requires_grad}
        head = list(network.get_submodule(self.head).parameters())
        device = head[0].device
        weights = [*extractor.values(), *head]
        gammas = [*(self.gamma[key] for key in extractor), *[self.mean_importance()] * len(head)]
        lr = torch.tensor(method.lr, dtype=torch.float64, device=device)

        def step(images: Tensor, labels: Tensor) -> Tensor:
            for weight in weights:
                weight.grad = None
            with task.autocast() if task.autocast else contextlib.nullcontext():
                output = network(images)
            loss = F.cross_entropy(output.float(), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(head, method.head_clip)
            for weight in head:
                if weight.grad is not None:
                    weight.grad.mul_(method.head_factor)
            reached = [(w, w.grad, g) for w, g in zip(weights, gammas, strict=True) if w.grad is not None]
            soft_masked_sgd([w for w, _, _ in reached], [d for _, d, _ in reached], [g for _, _, g in reached], lr)
            return loss.detach()

        training = FastStep(step, restore=(network, lr))
        plateau = _Plateau(method)
        total = max(1, method.epochs * task.steps_per_epoch)
        done = 0
        for epoch in range(method.epochs):
            network.train()
            if method.batch_norm == "frozen":
                freeze_norms(network)
            for images, labels in task.batches(epoch):
                if method.schedule == "cosine":
                    lr.fill_(method.lr * 0.5 * (1 + math.cos(math.pi * done / total)))
                task.progress({"loss": training(images, labels)})
                done += 1
            if method.schedule == "plateau":
                lr.fill_(plateau.after(task.loss(network), network))
                if plateau.over:
                    break
        plateau.take_back(network)
        network.zero_grad(set_to_none=True)
        return epoch + 1 if method.epochs else 0

    def mean_importance(self) -> Tensor:
        """Mean of gamma over every parameter of the extractor, 0-dim fp32: it slows the heads down."""
        total = sum(gamma.numel() for gamma in self.gamma.values())
        sums = torch.stack([gamma.sum(dtype=torch.float64) for gamma in self.gamma.values()])
        return (sums.sum() / max(1, total)).float()

    def _measure(self, task: Task, network: nn.Module, epoch: int) -> dict[str, Any]:
        """gamma <- max of itself and the task's importance, over the heads of all tasks so far."""
        extractor = self._extractor(network)
        with seeded(task):
            sums = self._gradient_sums(task, network, list(extractor.values()), epoch)
        for gradients in sums:
            raise_importance([self.gamma[key] for key in extractor], gradients)
        network.eval()
        return {"mean_importance": float(self.mean_importance())}

    def _gradient_sums(
        self, task: Task, network: nn.Module, parameters: list[nn.Parameter], epoch: int
    ) -> list[list[Tensor]]:
        """For every task so far, the signed sum over one epoch's batches of its head's loss's gradients."""
        network.requires_grad_(True).train()
        if self._method.batch_norm == "frozen":
            for module in network.modules():
                if isinstance(module, NORM_LAYERS):
                    module.eval()
        heads = {name: self._head_tensors(name) for name in self.classes}
        sums = [[torch.zeros_like(p) for p in parameters] for _ in heads]
        with _statistics_kept(network), _input_of(network.get_submodule(self.head)) as features:
            for images, labels in task.batches(epoch):
                with task.autocast() if task.autocast else contextlib.nullcontext():
                    network(images)
                    outputs = [F.linear(features[-1], *head).float() for head in heads.values()]
                for i, (name, output) in enumerate(zip(heads, outputs, strict=True)):
                    loss = F.cross_entropy(output, labels) if name == task.name else output.sum()
                    more = i + 1 < len(heads)
                    found = torch.autograd.grad(loss, parameters, retain_graph=more, allow_unused=True)
                    reached = [(total, g) for total, g in zip(sums[i], found, strict=True) if g is not None]
                    torch._foreach_add_([total for total, _ in reached], [g for _, g in reached])
                features.clear()
        return sums

    def _head_tensors(self, name: str) -> list[Tensor]:
        """Weight and bias of a task's head, the bias left out where there is none."""
        own = self.own[name]
        keys = (f"{self.head}.weight", f"{self.head}.bias")
        return [own[key] for key in keys if key in own]


class _Plateau:
    """Rate x factor when the loss has not fallen (by a ten-thousandth of itself) for more than `patience` epochs.

    Attributes:
        over: whether training has ended, by `SPG.stop_after`.
    """

    def __init__(self, method: SPG) -> None:
        self._method = method
        self._parameter = torch.zeros(1, requires_grad=True)
        self._optimizer = torch.optim.SGD([self._parameter], lr=method.lr)
        self._schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._optimizer,
            factor=method.factor,
            patience=method.patience,
            min_lr=0.0 if method.stop_after is None else method.min_lr,
        )
        self._lowest = math.inf
        self._best: Tensors = {}
        self._in_vain = 0
        self.over = False

    def after(self, loss: float, network: nn.Module) -> float:
        """The rate after an epoch that ended at `loss`."""
        at_last_rate = self._rate() <= self._method.min_lr
        self._schedule.step(loss)
        if self._method.stop_after is None:
            self.over = self._rate() < self._method.min_lr
            return self._rate()
        lower = loss < self._lowest
        self._in_vain = self._in_vain + 1 if at_last_rate and not lower else 0
        if lower:
            self._lowest, self._best = loss, cloned(network.state_dict())
        self.over = self._in_vain >= self._method.stop_after
        return self._rate()

    def take_back(self, network: nn.Module) -> None:
        """Give the network the weights of the lowest loss, where they were kept."""
        if self._best:
            network.load_state_dict(self._best)

    def _rate(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])


@contextlib.contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Batch norm in train mode uses each batch's statistics inside, and leaves its running ones as they are."""
    norms = [m for m in network.modules() if isinstance(m, NORM_LAYERS) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextlib.contextmanager
def _input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that every call of the module inside adds its input to."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
