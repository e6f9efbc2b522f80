"""The training loop of the methods that learn real masks over a frozen backbone: Piggyback and KSM."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast._options import EPOCHS, RATE, at_least, check_options
from dwm_fast.methods._loop import FastStep
from dwm_fast.methods.sequence import Task
from dwm_fast.nn import MaskedModel, MaskKind, mask_model
from dwm_fast.nn.model import NORM_LAYERS
from dwm_fast.nn.select import literal
from dwm_fast.optim import FrozenAdamW

MaskBatchNorm = Literal["frozen", "per-domain"]


@dataclass(frozen=True)
class RealMaskOptions:
    """How real masks, the head, and by policy batch norm are trained with Adam.

    Args:
        epochs: passes over a task's images.
        lr: first rate of the masks.
        head_lr: first rate of the head.
        eps: Adam's eps for the masks. 1e-15 (ours): the gradient of one of 1e7 mask weights would drown in torch's
            1e-8, which the papers use.
        schedule: "cosine" to 0 over all steps, "step": x0.1 after every 15 epochs, or "constant".
        batch_norm: "frozen": the backbone's, in eval mode; "per-domain": trained on the task (at the masks' rate) and
            kept for it.
    """

    epochs: Annotated[int, EPOCHS] = 3
    lr: Annotated[float, RATE] = 1e-3
    head_lr: Annotated[float, RATE] = 1e-3
    eps: Annotated[float, at_least(0)] = 1e-15
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    batch_norm: MaskBatchNorm = "frozen"

    def __post_init__(self) -> None:
        check_options(self)

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """What the first rates are multiplied by at a step, counted from 0."""
        if self.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * step / max(1, self.epochs * steps_per_epoch)))
        return float(0.1 ** (step // max(1, 15 * steps_per_epoch))) if self.schedule == "step" else 1.0


def learn_real_masks(
    network: nn.Module,
    kind: MaskKind,
    head: str,
    options: RealMaskOptions,
    task: Task,
    divisors: Mapping[str, Tensor] | None = None,
) -> MaskedModel:
    """Learn masks over all weights of `network` but its head's, and the head; the masked model, in eval mode.

    The weights under the masks are `network`'s own storage and are never written. `divisors` by layer name divide the
    gradients of the masks.
    """
    per_domain = options.batch_norm == "per-domain"
    masked = mask_model(
        network, kind, exclude=literal(head), batch_norm="train" if per_domain else "frozen", seed=task.seed
    )
    masked.model.get_submodule(head).requires_grad_(True)
    if per_domain:
        for module in masked.model.modules():
            if isinstance(module, NORM_LAYERS):
                module.requires_grad_(True)
    masks = list(masked.mask_parameters())
    dividers = [divisors[layer] for layer in masked.mask_layers()] if divisors else []
    of_head = list(masked.model.get_submodule(head).parameters())
    known = {id(p) for p in (*masks, *of_head)}
    norms = [p for p in masked.parameters() if p.requires_grad and id(p) not in known]
    optimizer = FrozenAdamW(
        [
            {"params": masks, "lr": options.lr, "eps": options.eps},
            {"params": of_head, "lr": options.head_lr},
            *([{"params": norms, "lr": options.lr}] if norms else []),
        ],
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: options.factor(step, task.steps_per_epoch))

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with task.autocast() if task.autocast else contextlib.nullcontext():
            output = masked(images)
        loss = F.cross_entropy(output.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for mask, divider in zip(masks, dividers, strict=bool(dividers)):
            if mask.grad is not None:
                mask.grad.div_(divider)
        optimizer.step()
        return loss.detach()

    training = FastStep(step, restore=(masked, optimizer))
    masked.train()
    for epoch in range(options.epochs):
        for images, labels in task.batches(epoch):
            loss = training(images, labels)
            schedule.step()
            task.progress({"loss": loss})
    optimizer.zero_grad(set_to_none=True)
    return masked.eval()
