"""The training loop shared by the methods that learn a mask: binary (B) and edit (A) of the DWM paper."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast._options import EPOCHS, RATE, Rule, above, at_least, check_options, whole
from dwm_fast.errors import InputError
from dwm_fast.methods._loop import FastStep
from dwm_fast.methods.base import FoundMask, SourceTask
from dwm_fast.methods.budget import SourceBudget
from dwm_fast.nn import GumbelSigmoid, MaskedModel, MaskKind, mask_model, maskable_weights
from dwm_fast.nn.select import literal
from dwm_fast.optim import MaskAdam

_TRIALS = 7
_ORDER_SAMPLE = 1 << 20
"""Logits that the search for the shift looks at, evenly taken from all layers."""


@dataclass(frozen=True)
class LearnedMask:
    """Options of learning a mask on the source with the weights frozen. None of them was published: all are ours.

    Args:
        epochs: passes over the source's training images.
        lr: Adam's rate on the learned tensors.
        decay: last fraction of the steps, over which the rate falls to 0 (half a cosine); 0: a constant rate. A mask
            that still moves with every batch is worse than one that settled.
        eps: Adam's eps; far below torch's 1e-8, in which the gradient of one of 1e7 logits would drown.
        source_budget: allowed rise of the source cross-entropy in nats; the coefficient is then controlled.
        control_every: steps between two measurements of the deterministic mask's excess loss, for the control.
        coefficient: a fixed coefficient of the regulariser instead; None leaves it to `source_budget`.
        clip_norm: bound on the gradient's norm over all layers, or None.
        mask_samples: independent masks per batch.
        include, exclude: shell patterns of the layers to mask.
        objective: what the mask is learned with, beside the regulariser: "labels", the cross-entropy, or "unmasked",
            KL(p || q) with p the unmasked network's class probabilities and q the masked one's, a mean over images: the
            information-theoretic mask that the DWM paper leaves to future work. It reads no label; the source budget
            is measured in cross-entropy all the same.
        regulariser: "mean-sigmoid", the mean of sigmoid(l) over all masked weights (ours), or "sum-logits", the sum
            of l over the batch size (Csordas et al. 2021): the same slope for every logit, 1 / batch size. Its
            coefficient is fixed (code: 2e-5 to 3e-4).
        biases: whether the biases of the masked layers have masks too (Csordas et al.: yes).
    """

    epochs: Annotated[int, EPOCHS] = 12
    lr: Annotated[float, RATE] = 0.025
    decay: Annotated[float, Rule("a fraction of the steps from 0 to 1", lambda value: 0 <= value <= 1)] = 0.5
    eps: Annotated[float, at_least(0)] = 1e-15
    source_budget: Annotated[float, above(0, "a rise of the cross-entropy", ", in nats")] = 0.01
    control_every: Annotated[int, whole(1)] = 4
    coefficient: Annotated[float | None, at_least(0)] = None
    clip_norm: Annotated[float | None, above(0, "a norm")] = None
    mask_samples: Annotated[int, whole(1)] = 1
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    objective: Literal["labels", "unmasked"] = field(default="labels", metadata={"later": True})
    regulariser: Literal["mean-sigmoid", "sum-logits"] = field(default="mean-sigmoid", metadata={"later": True})
    biases: bool = field(default=False, metadata={"later": True})

    def __post_init__(self) -> None:
        check_options(self)
        if self.regulariser == "sum-logits" and self.coefficient is None:
            raise InputError(
                "regulariser is 'sum-logits' without a coefficient; expected one, such as 1e-4: the control of "
                "source_budget is made for 'mean-sigmoid'"
            )

    def rate(self, step: int, steps: int) -> float:
        """Adam's rate at a step, counted from 0, of `steps`."""
        left = 1.0 - step / steps
        return self.lr if left >= self.decay else self.lr * 0.5 * (1.0 - math.cos(math.pi * left / self.decay))


def learn_mask(model: nn.Module, kind: MaskKind, options: LearnedMask, task: SourceTask) -> FoundMask:
    """Learn which weights of `model` the source needs, and return the keep mask.

    Under a source budget a mask whose loss on training images ends above it is loosened until it is within
    (`_meet_budget`).
    """
    if options.regulariser == "sum-logits" and not isinstance(kind, GumbelSigmoid):
        raise InputError(
            f"regulariser is 'sum-logits' for {type(kind).__name__}; expected GumbelSigmoid, which has logits"
        )
    masked = _masked(model, kind, options, task.seed)
    model.eval()
    device = next(iter(masked.mask_layers().values())).weight.device
    control = None
    coefficient = torch.tensor(options.coefficient or 0.0, device=device)
    if options.coefficient is None:
        control = SourceBudget(options.source_budget, device=device)
        coefficient = control.coefficient
    fold = options.clip_norm is None and options.regulariser == "mean-sigmoid"
    rate = torch.tensor(options.lr, device=device)
    optimizer = MaskAdam(masked, rate, eps=options.eps, coefficient=coefficient if fold else 0.0, fold=fold)
    objective = _objective(masked, model, options, task)
    training = FastStep(
        lambda images, labels: _step(masked, optimizer, objective(images, labels), coefficient, options, len(images)),
        restore=(masked, optimizer),
    )
    history = []
    step = 0
    for epoch in range(options.epochs):
        masked.train()
        for images, labels in task.batches(epoch):
            rate.fill_(options.rate(step, options.epochs * task.steps_per_epoch))
            loss = training(images, labels)
            if control is not None and step % options.control_every == 0:
                control.update(_excess(masked, model, images, labels, task))
            step += 1
            task.progress({"loss": loss, "coefficient": coefficient})
        history.append(
            {
                "loss": task.loss(masked),
                "fraction_kept": masked.fraction_kept(),
                "coefficient": float(coefficient),
            }
        )
    masked.attach_recorder(None)
    within = None
    if control is not None:
        within = _meet_budget(masked, task, task.loss(model) + options.source_budget)
    return FoundMask(keep=masked.keep_masks(), coefficient=float(coefficient), within_budget=within, history=history)


def _masked(model: nn.Module, kind: MaskKind, options: LearnedMask, seed: int) -> MaskedModel:
    """The model under fresh masks, whose start values a seed draws on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return mask_model(
            model,
            kind,
            include=options.include,
            exclude=options.exclude,
            mask_samples=options.mask_samples,
            seed=seed,
            also=_biases(model, options) if options.biases else (),
        )


def _biases(model: nn.Module, options: LearnedMask) -> list[str]:
    """Patterns of the biases of the layers that have masks."""
    layers = {there.path: there.module for there in maskable_weights(model, options.include, options.exclude).values()}
    with_bias = [path for path, layer in layers.items() if isinstance(getattr(layer, "bias", None), nn.Parameter)]
    return [literal(f"{path}.bias") for path in with_bias]


def _regulariser(masked: MaskedModel, options: LearnedMask, batch: int) -> Tensor:
    """What the coefficient multiplies, for a batch of so many images."""
    if options.regulariser == "mean-sigmoid":
        return masked.sparsity_penalty()
    return torch.stack([logits.sum() for logits in masked.mask_parameters()]).sum() / batch


def _objective(
    masked: MaskedModel, model: nn.Module, options: LearnedMask, task: SourceTask
) -> Callable[[Tensor, Tensor], Tensor]:
    """(images, labels) -> the loss that `options.objective` names."""

    def objective(images: Tensor, labels: Tensor) -> Tensor:
        with task.autocast() if task.autocast else contextlib.nullcontext():
            logits = masked(images).float()
            if options.objective == "labels":
                return F.cross_entropy(logits, labels)
            with torch.no_grad():
                wanted = model(images).float()
        log_q, log_p = F.log_softmax(logits, dim=1), F.log_softmax(wanted, dim=1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    return objective


def _step(
    masked: MaskedModel, optimizer: MaskAdam, loss: Tensor, coefficient: Tensor, options: LearnedMask, batch: int
) -> Tensor:
    optimizer.zero_grad()
    if optimizer.fold:
        loss.backward()  # type: ignore[no-untyped-call]
    else:
        (loss + coefficient * _regulariser(masked, options, batch)).backward()  # type: ignore[no-untyped-call]
        if options.clip_norm is not None:
            nn.utils.clip_grad_norm_(list(masked.mask_parameters()), options.clip_norm)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def _excess(masked: MaskedModel, model: nn.Module, images: Tensor, labels: Tensor, task: SourceTask) -> Tensor:
    """Cross-entropy under the mask that would be exported now, minus the unmasked network's on the same batch.

    The drawn masks' loss would hold their noise as well, and a difference on one batch is far less noisy than two
    means over different batches.
    """
    masked.eval()
    with task.autocast() if task.autocast else contextlib.nullcontext():
        losses = [F.cross_entropy(network(images).float(), labels) for network in (masked, model)]
    masked.train()
    return losses[0] - losses[1]


def _meet_budget(masked: MaskedModel, task: SourceTask, limit: float) -> bool:
    """Loosen a mask whose loss is above the limit until it is within; whether it is in the end.

    All logits are raised by one number, the smallest that is enough, found by bisection over the fraction kept; their
    order stays. A mask within the limit stays as learned: what is left of the budget is not spent on cuts that no
    training follows. Edits have no such number; nothing is changed for them.
    """
    if task.loss(masked) <= limit:
        return True
    if not isinstance(masked.kind, GumbelSigmoid):
        return False
    start = [p.detach().clone() for p in masked.mask_parameters()]
    stride = sum(p.numel() for p in start) // _ORDER_SAMPLE + 1
    order = torch.cat([p.flatten()[::stride] for p in start]).sort(descending=True).values

    def loss_at(fraction: float) -> float:
        wanted = order[min(int(fraction * len(order)), len(order) - 1)]
        with torch.no_grad():
            for parameter, value in zip(masked.mask_parameters(), start, strict=True):
                parameter.copy_(value - wanted)
        return task.loss(masked)

    low, high = masked.fraction_kept(), 1.0
    for _ in range(_TRIALS):
        middle = (low + high) / 2
        if loss_at(middle) <= limit:
            high = middle
        else:
            low = middle
    return loss_at(high) <= limit
