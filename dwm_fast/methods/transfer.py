"""The stages around a mask: training, re-initialising what may be reused, and fine-tuning with the kept frozen."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast._options import EPOCHS, RATE, Rule, at_least, check_options
from dwm_fast.errors import InputError
from dwm_fast.methods._loop import FastStep
from dwm_fast.methods.base import Batch
from dwm_fast.nn.model import NORM_LAYERS
from dwm_fast.nn.select import weight_place
from dwm_fast.optim import FrozenAdamW, FrozenSGD

Init = Literal["S_start", "S_end", "random"]
INITS: tuple[Init, ...] = ("S_start", "S_end", "random")
BatchNormPolicy = Literal["frozen", "shared", "per-domain"]
BATCH_NORM_POLICIES: tuple[BatchNormPolicy, ...] = ("frozen", "shared", "per-domain")


@dataclass(frozen=True)
class TrainOptions:
    """How a network is trained or fine-tuned. Nothing of it was published: all values are ours.

    Args:
        epochs: passes over the training images.
        lr: peak rate.
        optimizer: "adamw" or "sgd" (momentum 0.9).
        weight_decay: decoupled for AdamW, coupled for SGD as in torch.
        schedule: "one-cycle" (warm-up over the first fifth, then cosine to 0), "constant", or "step" (x0.1 after every
            ten epochs).
        batch_norm: "frozen": statistics and affine parameters stay the source's; "shared": they follow the target
            and the source is evaluated with them; "per-domain": they follow the target, and the source keeps its own.
        label_smoothing: in [0, 1).
        start_decay: c of the penalty c/2 * |w - w0|^2 on every trained parameter, w0 its value when training begins
            (L2-SP, Li, Grandvalet and Davoine 2018, arXiv 1802.01483). Applied apart from the gradient, as AdamW
            applies weight decay: after each step w <- w + rate * c * (w0 - w). Where rate * c is above 1 a step goes
            past the start, above 2 it diverges.
        kept_decay: None: kept weights are frozen. A number: they are trained as all others are, and pulled to their
            start by this c in place of `start_decay`: one bit a weight says how dear it is to the source, as elastic
            weight consolidation says with a number (Kirkpatrick et al. 2017, arXiv 1612.00796). The source under its
            own bits is then no longer exact.
    """

    epochs: Annotated[int, EPOCHS] = 4
    lr: Annotated[float, RATE] = 3e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: Annotated[float, at_least(0)] = 0.01
    schedule: Literal["one-cycle", "constant", "step"] = "one-cycle"
    batch_norm: BatchNormPolicy = "shared"
    label_smoothing: Annotated[float, Rule("a number from 0 to below 1", lambda value: 0 <= value < 1)] = 0.0
    start_decay: Annotated[float, at_least(0)] = field(default=0.0, metadata={"later": True})
    kept_decay: Annotated[float | None, at_least(0)] = field(default=None, metadata={"later": True})

    def __post_init__(self) -> None:
        check_options(self)


def check_frozen(options: TrainOptions) -> None:
    """InputError unless `options` leave what is kept as it is, to the bit."""
    if options.kept_decay is not None:
        raise InputError(
            f"kept_decay is {options.kept_decay}; expected None: this method's kept weights are frozen to the bit; "
            "only the fine-tuning of pairs may pull them"
        )


def norm_state(model: nn.Module) -> dict[str, Tensor]:
    """Statistics and affine parameters of every norm layer, cloned, by state_dict name."""
    names = {name for name, module in model.named_modules() if isinstance(module, NORM_LAYERS)}
    return {k: v.detach().clone() for k, v in model.state_dict().items() if k.rpartition(".")[0] in names}


def freeze_norms(model: nn.Module) -> None:
    """Norm layers in eval mode, their parameters not trained."""
    for module in model.modules():
        if isinstance(module, NORM_LAYERS):
            module.eval()
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def reinitialise(
    model: nn.Module, keep: Mapping[str, Tensor], init: Init, start: Mapping[str, Tensor], seed: int
) -> None:
    """Give the reuse weights (keep False) new values in place; kept weights, biases and norms stay as they are.

    Args:
        model: the network after source training.
        keep: name of a layer, or of a parameter -> bool mask of the weight's shape.
        init: "S_start": the value before source training; "S_end": the value it has; "random": a fresh draw of the
            layer's own initialisation.
        start: state_dict before source training (read by "S_start").
        seed: seed of the fresh draw.
    """
    if init not in INITS:
        raise InputError(f"init is '{init}'; expected one of {', '.join(INITS)}")
    if init == "S_end":
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, mask in keep.items():
            weight = _weight(model, name)
            before = start.get(name, start.get(f"{name}.weight"))
            new = before if init == "S_start" and before is not None else _fresh_weight(model, name)
            with torch.no_grad():
                weight.copy_(torch.where(mask.to(weight.device), weight, new.to(weight)))


def _weight(model: nn.Module, name: str) -> Tensor:
    module, attribute = weight_place(model, name)
    return module.get_parameter(attribute)


def _fresh_weight(model: nn.Module, name: str) -> Tensor:
    """A draw of the layer's own default initialisation, made on the CPU so that a seed means the same anywhere."""
    module, attribute = weight_place(model, name)
    fresh = copy.deepcopy(module).cpu()
    reset = getattr(fresh, "reset_parameters", None)
    if isinstance(fresh, nn.MultiheadAttention):
        reset = fresh._reset_parameters
    if reset is None:
        raise InputError(f"init 'random' of '{name}': {type(fresh).__name__} has no reset_parameters(); use 'S_start'")
    reset()
    return fresh.get_parameter(attribute).detach()


def make_optimizer(model: nn.Module, options: TrainOptions, keep: Mapping[str, Tensor] | None) -> torch.optim.Optimizer:
    """Optimiser over the trainable parameters that never writes a kept weight."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    masks = {_weight(model, name): mask for name, mask in (keep or {}).items()}
    decay = options.weight_decay
    if masks and options.optimizer == "sgd":
        return FrozenSGD(parameters, options.lr, momentum=0.9, weight_decay=decay, keep=masks)
    if masks:
        return FrozenAdamW(parameters, options.lr, weight_decay=decay, keep=masks)
    # On a GPU the rate lives there, so that a captured step follows the schedule.
    on_gpu = bool(parameters) and parameters[0].is_cuda
    rate = torch.tensor(options.lr, device=parameters[0].device) if on_gpu else options.lr
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay, fused=True if on_gpu else None)
    return torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=True, capturable=on_gpu)


def make_schedule(
    optimizer: torch.optim.Optimizer, options: TrainOptions, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning-rate schedule over `steps` steps."""
    if options.schedule == "constant" or steps < 2:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if options.schedule == "step":
        return torch.optim.lr_scheduler.StepLR(optimizer, max(1, 10 * steps // options.epochs), gamma=0.1)
    warm_up = 0.2 if 0.2 * steps != 1 else 0.3  # OneCycleLR divides by warm_up * steps - 1
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=steps, pct_start=warm_up, cycle_momentum=False
    )


def train(
    model: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    steps_per_epoch: int,
    options: TrainOptions,
    *,
    keep: Mapping[str, Tensor] | None = None,
    fixed: Collection[str] = (),
    progress: Callable[[Mapping[str, Tensor]], None] = lambda _: None,
    autocast: Callable[[], Any] | None = None,
) -> nn.Module:
    """Train `model` in place and return it in eval mode; kept weights (keep True) stay bit-identical, unless
    `options.kept_decay` is a number.

    Args:
        model: network with a (B, classes) output.
        batches: epoch number -> iterator of (images, labels).
        steps_per_epoch: batches an epoch.
        options: rate, schedule, batch-norm policy.
        keep: layer name -> bool mask, or None to train every weight.
        fixed: names of parameters that are not trained at all.
        progress: called after every step with the loss (0-dim tensor, on the device; read it before the next step).
        autocast: context-manager factory for the forward pass.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in fixed)
    model.train()
    if options.batch_norm == "frozen":
        freeze_norms(model)
    pulled = {} if options.kept_decay is None else {_weight(model, name): mask for name, mask in (keep or {}).items()}
    optimizer = make_optimizer(model, options, None if pulled else keep)
    schedule = make_schedule(optimizer, options, steps_per_epoch * options.epochs)
    pull = _StartDecay(model, options, pulled)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with autocast() if autocast else contextlib.nullcontext():
            output = model(images)
        loss = F.cross_entropy(output.float(), labels, label_smoothing=options.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        pull.step()
        return loss.detach()

    training = FastStep(step, restore=(model, optimizer))
    for epoch in range(options.epochs):
        for images, labels in batches(epoch):
            pull.set_rate(optimizer)
            loss = training(images, labels)
            schedule.step()
            progress({"loss": loss})
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


class _StartDecay:
    """`TrainOptions.start_decay` and `kept_decay`, the latter for the weights that `pulled` keeps.

    What is frozen equals its start and stays it to the bit: w - 0, also where w is -0.
    """

    def __init__(self, model: nn.Module, options: TrainOptions, pulled: Mapping[Tensor, Tensor]) -> None:
        free, kept = options.start_decay, options.kept_decay or 0.0
        self._trained = [p for p in model.parameters() if p.requires_grad and (free > 0 or (kept > 0 and p in pulled))]
        self._start = [p.detach().clone() for p in self._trained]
        device = self._trained[0].device if self._trained else torch.device("cpu")
        one = torch.full((), free, device=device)
        self._coefficients = [
            torch.where(pulled[p].to(device), kept, free).to(p.dtype) if p in pulled else one for p in self._trained
        ]
        self._rate = torch.zeros((), device=device)

    def set_rate(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the rate of the next step. On the device, where a captured step reads it."""
        if self._trained:
            self._rate.copy_(torch.as_tensor(optimizer.param_groups[0]["lr"]).squeeze())

    @torch.no_grad()
    def step(self) -> None:
        """Move every trained parameter toward its start."""
        for parameter, start, coefficient in zip(self._trained, self._start, self._coefficients, strict=True):
            parameter.sub_((parameter - start).mul_(self._rate * coefficient))


def source_view(tuned: nn.Module, source: nn.Module, policy: BatchNormPolicy) -> nn.Module:
    """The fine-tuned network as the source sees it in the `shared` view (the paper's): one network, both domains.

    Under the policy "per-domain" it has the source's own batch norm; otherwise it is `tuned` itself.
    """
    if policy != "per-domain":
        return tuned
    view = copy.deepcopy(tuned)
    view.load_state_dict(norm_state(source), strict=False)
    return view.eval()


def masked_view(tuned: nn.Module, source: nn.Module, keep: Mapping[str, Tensor]) -> nn.Module:
    """The fine-tuned network under the source's own bits: reuse weights zeroed, the source's biases and norms.

    Equal to the masked source network to the last bit, whatever fine-tuning did to the reuse weights, as long as
    the kept weights are frozen: it forgets nothing.
    """
    view = copy.deepcopy(source)
    with torch.no_grad():
        for name, mask in keep.items():
            weight = _weight(tuned, name)
            _weight(view, name).copy_(torch.where(mask.to(weight.device), weight, torch.zeros_like(weight)))
    return view.eval()
