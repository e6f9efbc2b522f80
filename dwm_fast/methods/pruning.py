"""LEAP and MaskLLM: masks of a wanted density or pattern, learned with the weights frozen (METHODS, section 7)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast._options import FRACTION, RATE, above, at_least, check_options, whole
from dwm_fast.errors import InputError
from dwm_fast.methods.base import Batch, FoundMask, SourceTask
from dwm_fast.methods.one_shot import Magnitude, Wanda, parsed
from dwm_fast.nn import GumbelSigmoid, LinearSchedule, MaskedModel, MaskKind, SemiStructured, mask_model
from dwm_fast.ops.coding import decoded, encoded
from dwm_fast.optim import MaskAdam

TOLERANCE = 0.005
"""A density that was asked for is met within it."""
_TRIALS = 60


@dataclass(frozen=True)
class MaskTraining:
    """How a mask is trained, and where it starts.

    Args:
        steps: training steps; temperature, scale and regularisers run over them.
        lr: Adam's rate after `warmup` steps, from which it falls to 0 by a cosine.
        warmup: steps over which the rate rises in equal parts.
        betas, eps: Adam's; ours is an eps far below the gradient of a single logit.
        clip_norm: bound on the gradient's norm over all layers, or None.
        prior: the one-shot mask that logits start from.
        strength: by how many of the kind's spreads.
        include, exclude: shell patterns of the layers to mask.
    """

    steps: Annotated[int, whole(1)] = 2000
    lr: Annotated[float, RATE] = 1e-3
    warmup: Annotated[int, whole(0)] = 5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, at_least(0)] = 1e-15
    clip_norm: Annotated[float | None, above(0, "a norm")] = None
    prior: Literal["wanda", "magnitude"] = "wanda"
    strength: Annotated[float, at_least(0)] = 3.0
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_options(self)

    def rate(self, step: int) -> float:
        """Adam's rate at a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


@dataclass(frozen=True)
class LEAP:
    """A logit a weight, m = sigmoid((kappa l + noise) / tau) in training, keep where l >= 0 (arXiv 2605.17289).

    Loss: cross-entropy + density_weight abs(D - density) - norm_weight (1 - t/T) sum |m W| / sum |W| over layers, D the
    mean of the drawn mask and |.| the Frobenius norm. A mask whose density ends more than 0.005 from the wanted one is
    moved there: all logits change by one number, so their order stays.

    Args:
        density: fraction of all masked weights to keep.
        training: how the mask is trained.
        tau, kappa: first and last temperature, and scale of the logits; both go in equal parts.
        spread: deviation of the logits' start values.
        density_weight, norm_weight: of the loss.
    """

    density: Annotated[float, FRACTION] = 0.5
    training: MaskTraining = MaskTraining()
    tau: tuple[float, float] = (4.0, 0.05)
    kappa: tuple[float, float] = (25.0, 350.0)
    spread: Annotated[float, at_least(0)] = 0.014
    density_weight: Annotated[float, at_least(0)] = 7.0
    norm_weight: Annotated[float, at_least(0)] = 10.0
    name: ClassVar[str] = "leap"

    def __post_init__(self) -> None:
        check_options(self)

    def find(self, model: nn.Module, task: SourceTask) -> FoundMask:
        """The mask that was learned on the task's batches; the model is left as it is."""
        steps = self.training.steps
        tau, kappa = LinearSchedule(*self.tau, steps), LinearSchedule(*self.kappa, steps)
        kind = GumbelSigmoid(tau=tau, kappa=kappa, hard=False, init=0.0, spread=self.spread)
        masked = _started(model, kind, self.training, task, self.density, None)
        layers = masked.mask_layers().values()
        whole_norm = torch.stack([layer.frozen_weight.detach().float().norm() for layer in layers]).sum()

        def regulariser(weights: Sequence[Tensor], left: Tensor) -> Tensor:
            kept_norm = torch.stack([w.float().norm() for w in weights]).sum() / whole_norm
            density = (masked.sparsity_penalty() - self.density).abs()
            return self.density_weight * density - self.norm_weight * left * kept_norm

        history = _train(masked, task, self.training, regulariser)
        meet_density(masked, self.density)
        return FoundMask(keep=masked.keep_masks(), history=history)


@dataclass(frozen=True)
class MaskLLM:
    """n of every m neighbours: a logit a pattern, drawn by Gumbel-softmax (Fang et al. 2024), keep the largest's.

    Loss: cross-entropy - norm_weight (1 - t/T) sum |m W|^2 over layers, |.| the Frobenius norm.

    Args:
        pattern: "n:m".
        training: how the mask is trained.
        tau, kappa, spread, norm_weight: as of `LEAP`.
    """

    pattern: str = "2:4"
    training: MaskTraining = MaskTraining(clip_norm=1.0)
    tau: tuple[float, float] = (4.0, 0.05)
    kappa: tuple[float, float] = (100.0, 500.0)
    spread: Annotated[float, at_least(0)] = 0.01
    norm_weight: Annotated[float, at_least(0)] = 1e-5
    name: ClassVar[str] = "maskllm"

    def __post_init__(self) -> None:
        parsed(self.pattern)
        check_options(self)

    def find(self, model: nn.Module, task: SourceTask) -> FoundMask:
        """The mask that was learned on the task's batches; the model is left as it is."""
        n, m = parsed(self.pattern)
        steps = self.training.steps
        tau, kappa = LinearSchedule(*self.tau, steps), LinearSchedule(*self.kappa, steps)
        kind = SemiStructured(n, m, tau=tau, kappa=kappa, spread=self.spread)
        masked = _started(model, kind, self.training, task, n / m, self.pattern)

        def regulariser(weights: Sequence[Tensor], left: Tensor) -> Tensor:
            return -self.norm_weight * left * torch.stack([w.float().square().sum() for w in weights]).sum()

        history = _train(masked, task, self.training, regulariser)
        return FoundMask(keep=masked.keep_masks(), history=history)


LEAP_PAPER = LEAP(training=MaskTraining(eps=1e-8))
"""leap-paper: 2,000 steps at rate 1e-3 from Wanda's mask; steps of 4,096 tokens are the caller's."""
MASKLLM_PAPER = MaskLLM(training=MaskTraining(clip_norm=1.0, eps=1e-8))
"""maskllm-paper: tau 4 to 0.05, kappa 100 to 500, gradients clipped at 1; rate, steps and prior are LEAP's (ours)."""


def pruning_methods() -> dict[str, Magnitude | Wanda | LEAP | MaskLLM]:
    """Name -> method that prunes to a density or a pattern, presets included."""
    found: list[Magnitude | Wanda | LEAP | MaskLLM] = [Magnitude(), Wanda(), LEAP(), MaskLLM()]
    return {method.name: method for method in found} | {"leap-paper": LEAP_PAPER, "maskllm-paper": MASKLLM_PAPER}


def _started(
    model: nn.Module, kind: MaskKind, training: MaskTraining, task: SourceTask, density: float, pattern: str | None
) -> MaskedModel:
    """The model under masks that start from the prior."""
    prior = {"wanda": Wanda, "magnitude": Magnitude}[training.prior]
    include, exclude = training.include, training.exclude
    keep = prior(density, pattern, include=include, exclude=exclude).find(model, task).keep or {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(task.seed)
        masked = mask_model(model, kind, include=include, exclude=exclude, seed=task.seed)
    start_from(masked, keep, training.strength)
    return masked


@torch.no_grad()
def start_from(masked: MaskedModel, keep: Mapping[str, Tensor], strength: float = 3.0) -> None:
    """Move the logits of a masked model towards a mask, by `strength` of its kind's spreads.

    Args:
        masked: of kind GumbelSigmoid or SemiStructured.
        keep: layer name -> bool tensor of the weight's shape, True = keep; layers that are not named stay.
    """
    for name, layer in masked.mask_layers().items():
        if name in keep:
            leaning = masked.kind.lean(decoded(layer.mask_logits), keep[name], strength)
            layer.mask_logits.copy_(encoded(leaning, layer.mask_logits.dtype))


def _batches(task: SourceTask, steps: int) -> Iterator[Batch]:
    """Batches of as many epochs as it takes."""
    done, epoch = 0, 0
    while done < steps:
        before = done
        for batch in task.batches(epoch):
            if done == steps:
                return
            yield batch
            done += 1
        if done == before:
            raise InputError(f"the task has no batches in epoch {epoch}; expected some")
        epoch += 1


Regulariser = Callable[[Sequence[Tensor], Tensor], Tensor]


def _train(
    masked: MaskedModel, task: SourceTask, training: MaskTraining, regulariser: Regulariser
) -> list[dict[str, float]]:
    """Learn the masks; regulariser(masked weights of the pass, 1 - t/T) joins the cross-entropy."""
    device = next(iter(masked.mask_layers().values())).frozen_weight.device
    rate, left = torch.tensor(training.lr, device=device), torch.ones((), device=device)
    optimizer = MaskAdam(masked, rate, betas=training.betas, eps=training.eps)
    seen: list[Sequence[Tensor]] = []
    masked.observe(seen.append)
    masked.train()
    for step, (inputs, labels) in enumerate(_batches(task, training.steps)):
        rate.fill_(training.rate(step))
        left.fill_(1.0 - step / training.steps)
        with task.autocast() if task.autocast else contextlib.nullcontext():
            output = masked(inputs).float()
            loss = F.cross_entropy(output.flatten(0, -2), labels.flatten())
        optimizer.zero_grad()
        (loss + regulariser(seen.pop(), left)).backward()  # type: ignore[no-untyped-call]
        if training.clip_norm is not None:
            nn.utils.clip_grad_norm_(list(masked.mask_parameters()), training.clip_norm)
        optimizer.step()
        task.progress({"loss": loss.detach()})
    masked.observe(None)
    masked.attach_recorder(None)
    masked.eval()
    return [{"loss": task.loss(masked), "fraction_kept": masked.fraction_kept()}]


@torch.no_grad()
def meet_density(masked: MaskedModel, density: float, tolerance: float = TOLERANCE) -> float:
    """Bring the deterministic mask to a density, where it is not within `tolerance`; the fraction kept in the end.

    All logits change by one number, found by bisection, so their order stays. Logits that are equal fall together:
    where many are, the density is as near as they allow.
    """
    if abs(masked.fraction_kept() - density) <= tolerance:
        return masked.fraction_kept()
    logits = list(masked.mask_parameters())
    total = sum(x.numel() for x in logits)
    low = float(torch.stack([x.min() for x in logits]).min())
    high = float(torch.stack([x.max() for x in logits]).max())
    for _ in range(_TRIALS):
        border = (low + high) / 2
        fraction = int(torch.stack([(x >= border).sum() for x in logits]).sum()) / total
        if abs(fraction - density) <= tolerance / 10:
            break
        low, high = (border, high) if fraction > density else (low, border)
    for x in logits:
        x.sub_(border)
    return masked.fraction_kept()
