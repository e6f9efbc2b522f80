"""StreamedAdam: MaskAdam's step, taken layer by layer inside the backward pass of a streamed model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.nn.streamed import Pass, StreamedLayer
from dwm_fast.nn.streamed_model import StreamedModel, refuse_several_processes
from dwm_fast.ops.coded_adam import coded_adam
from dwm_fast.ops.coding import LOGITS, MOMENTS, decoded
from dwm_fast.ops.update import frozen_adamw, mask_adam
from dwm_fast.optim import _moments
from dwm_fast.optim._bucket import Bucket
from dwm_fast.optim._state import DeviceOptimizer, finite, non_negative, valid_betas
from dwm_fast.optim.folded import FoldedGradient, Share
from dwm_fast.optim.mask_adam import penalty_terms


class StreamedAdam(DeviceOptimizer):
    """Adam(W) on the mask logits of a streamed model: each layer steps inside `backward()`.

    The steps are those of `MaskAdam`, bit for bit in fp32. `step()` closes a step: it steps the layers that the loss
    did not reach, and allows the next backward. Call it after every `backward()`, or after every `accumulate` of them.

    A layer's gradient exists during its own step alone, so what reads or scales gradients of the whole network before
    the step cannot work here: clipping by a global norm and GradScaler are refused, and so are several processes.

    Args:
        source: what `dwm_fast.mask_model(..., memory="streamed")` returned.
        lr, betas, eps, weight_decay, coefficient, decoupled_weight_decay: as in `MaskAdam`. They are read when the
            first layer of a step steps, so change them between `step()` and the next `backward()`.
        accumulate: forward passes whose gradients make one step; each draws masks of its own. Above 1 a layer keeps
            the sum of its gradients, fp32, between them. `step()` takes what there is, were it less.
        moments: how Adam's moments are stored: "fp32", "bf16", or "8bit", one byte each and a scale for 128
            (formats and their rounding: `dwm_fast.ops.coding`).

    Raises:
        InputError: no streamed model, a number out of range, an unknown format, or several processes.

    Example:
        >>> import torch, dwm_fast as dwm
        >>> masked = dwm.mask_model(torch.nn.Linear(4, 2), dwm.GumbelSigmoid(), memory="streamed", seed=0)
        >>> opt = dwm.optim.StreamedAdam(masked, lr=0.1)
        >>> masked.train()(torch.ones(3, 4)).sum().backward()  # the logits have moved
        >>> opt.step()
        >>> bool((masked.model.mask_logits != 2.0).any())
        True
    """

    STATE: ClassVar[tuple[str, ...]] = _moments.state_names("8bit")
    FOR_SHARDS: ClassVar[str] = "keep the network whole, in one process"

    def __init__(
        self,
        source: StreamedModel,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        *,
        coefficient: float | Tensor = 0.0,
        decoupled_weight_decay: bool = True,
        accumulate: int = 1,
        moments: str = "fp32",
    ) -> None:
        non_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        valid_betas(betas)
        if not isinstance(coefficient, Tensor) and not finite(coefficient):
            raise InputError(f"coefficient is {coefficient!r}; expected a finite number")
        if not isinstance(accumulate, int) or accumulate < 1:
            raise InputError(f"accumulate is {accumulate!r}; expected a whole number of at least 1")
        if moments not in MOMENTS:
            raise InputError(f"moments={moments!r}; expected one of {', '.join(map(repr, MOMENTS))}")
        _check_source(source)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "coefficient": coefficient,
        }
        self.accumulate, self.moments = accumulate, moments
        self._coded = moments != "fp32" or source.logits != "fp32"
        self._layers = {layer: _Progress() for layer in source.streamed_layers()}
        self._scalars: dict[Bucket, tuple[Tensor, Tensor]] = {}
        self._last: tuple[Pass, torch.dtype] | None = None
        super().__init__([layer.mask_logits for layer in self._layers], defaults, keep=None, compact=False)
        source.attach_stepper(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing is left to clear: a gradient is gone once its layer has stepped."""
        for layer in self._layers:
            layer.mask_logits.grad = None

    @torch.no_grad()
    def take(self, layer: StreamedLayer, grad: Tensor, run: Pass) -> None:
        """As of `dwm_fast.nn.streamed.Stepper`: called in the backward pass of each layer."""
        progress = self._layers.get(layer)
        if progress is None or progress.stepped:
            raise InputError(
                "a layer of a streamed model came to another step before StreamedAdam.step() closed the last one; call "
                "step() after each backward(), or give StreamedAdam(..., accumulate=n) for n of them a step"
            )
        self._last = run, grad.dtype
        whole = progress.joined(grad, run, run.uses[layer])
        if whole is None:
            return
        if self.accumulate == 1:
            self._step_layer(layer, whole, run)
            return
        total = progress.add(_logit_gradient(layer, whole, run))
        if progress.passes == self.accumulate:
            self._step_sum(layer, total)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Close the step: layers that have not stepped do, and the next backward may come."""
        loss = super().step(closure)
        for layer in self._layers:
            self._layers[layer] = _Progress()
        self._scalars, self._last = {}, None
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # as DeviceOptimizer's, which it calls

    def update(self, group: dict[str, Any], bucket: Bucket) -> None:
        """The steps that no backward has taken: of layers that it reached in part, or not at all."""
        if self._last is None:
            return
        run, dtype = self._last
        for layer, progress in self._layers.items():
            if progress.stepped or layer.mask_logits not in bucket.index:
                continue
            for part, (grad, _) in progress.parts.items():
                progress.add(_logit_gradient(layer, grad, part))
            if progress.sum is not None:
                self._step_sum(layer, progress.sum)
            elif self.accumulate > 1:
                self._step_sum(layer, torch.zeros_like(layer.mask_logits, dtype=torch.float32))
            else:
                self._step_layer(layer, torch.zeros_like(layer.frozen_weight, dtype=dtype), run)

    def _step_layer(self, layer: StreamedLayer, grad: Tensor, run: Pass) -> None:
        """Chain rule, penalty and Adam from the gradient of the masked weight of one draw."""
        if self._coded:
            _, slope = self._scalars_of(*self._place_of(layer)[:2])
            return self._adam(layer, _logit_gradient(layer, grad, run, slope))
        group, bucket, (exp_avg, exp_avg_sq), steps = self._open(layer)
        lr, slope = self._scalars_of(group, bucket)
        mask_adam(
            [layer.mask_logits],
            [layer.frozen_weight],
            [grad],
            exp_avg,
            exp_avg_sq,
            run.state,
            run.tau,
            slope,
            steps,
            lr,
            mode=run.mode,
            layers=[layer.layer_index],
            thresholds=[layer.unit],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
        )
        self._close(layer)

    def _step_sum(self, layer: StreamedLayer, grad: Tensor) -> None:
        """Penalty and Adam from the gradient of the logits, the sum over several draws."""
        group, bucket, _ = self._place_of(layer)
        if isinstance(group["coefficient"], Tensor) or group["coefficient"] != 0:
            _, slope = self._scalars_of(group, bucket)
            (term,) = penalty_terms([decoded(layer.mask_logits)], layer.kind.training_mode)
            grad = grad + slope * term
        self._adam(layer, grad)

    def _adam(self, layer: StreamedLayer, grad: Tensor) -> None:
        """Adam from the gradient of the logits."""
        group, bucket, state, steps = self._open(layer)
        lr, _ = self._scalars_of(group, bucket)
        options: dict[str, Any] = {
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "decoupled": group["decoupled_weight_decay"],
        }
        logits, (exp_avg, exp_avg_sq, *scales) = [layer.mask_logits], state
        if self._coded:
            assert self._last is not None
            if not layer.mask_logits.is_contiguous():  # a block of 128 is one in logical order
                layer.mask_logits.data = layer.mask_logits.contiguous()
            first, second = scales or ([], [])
            options |= {"layers": [layer.layer_index]}
            seed, grads = self._last[0].state, [grad.contiguous()]
            coded_adam(logits, grads, exp_avg, exp_avg_sq, first, second, seed, steps, lr, **options)
        else:
            frozen_adamw(logits, [grad], exp_avg, exp_avg_sq, bucket.bits, bucket.ranks, steps, lr, **options)
        self._close(layer)

    def _open(self, layer: StreamedLayer) -> tuple[dict[str, Any], Bucket, list[list[Tensor]], Tensor]:
        """The layer's group, bucket, state and step count, which moves on by one."""
        group, bucket, i = self._place_of(layer)
        return group, bucket, self.states(group, bucket, [i]), bucket.steps[i : i + 1].add_(1)

    def _place_of(self, layer: StreamedLayer) -> tuple[dict[str, Any], Bucket, int]:
        """The layer's group and bucket, and the number of its logits there."""
        for group, bucket in self.all_buckets():
            i = bucket.index.get(layer.mask_logits)
            if i is not None:
                return group, bucket, i
        raise InputError(
            "the streamed model's parameters are other tensors than when StreamedAdam was made; make it after that"
        )

    def _close(self, layer: StreamedLayer) -> None:
        self._layers[layer] = _Progress(stepped=True)
        layer.mask_logits.grad = FoldedGradient(layer.mask_logits, _Stepped())

    def _scalars_of(self, group: dict[str, Any], bucket: Bucket) -> tuple[Tensor, Tensor]:
        """Learning rate and coefficient / (elements of the network), read once a step."""
        if bucket not in self._scalars:
            coefficient = group["coefficient"]
            total = sum(p.numel() for p in group["params"])
            slope = (
                coefficient.float() / total
                if isinstance(coefficient, Tensor)
                else bucket.scale.fill_(coefficient / total)
            )
            self._scalars[bucket] = self.learning_rate(group, bucket), slope
        return self._scalars[bucket]

    def steps_on(self, dtype: torch.dtype) -> bool:
        return dtype in LOGITS.values()

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return _moments.state_names(self.moments)

    def new_state(self, bucket: Bucket, i: int, name: str) -> Tensor:
        if not self._coded:
            return super().new_state(bucket, i, name)
        return _moments.new_state(bucket.params[i], self.moments, name)

    def _load(self, group: dict[str, Any], bucket: Bucket, i: int, saved: dict[str, Any]) -> None:
        super()._load(group, bucket, i, _moments.in_format(saved, self.moments))

    def state_dict(self) -> dict[str, Any]:
        """As MaskAdam's, between two steps; in the middle of one: InputError."""
        if self._last is not None:
            raise InputError("state_dict() in the middle of a step: call StreamedAdam.step() first")
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        raise InputError(
            "a StreamedAdam cannot be copied or pickled, since its model's layers step by it; make another one and "
            "load its state_dict()"
        )


@dataclass
class _Progress:
    """How far a layer has come since the last `step()`.

    Attributes:
        stepped: whether it has taken its step.
        passes: forward passes whose gradients are in `sum`, the gradient of the logits (None: none).
        parts: pass -> gradient of its masked weight so far, and uses of the layer that have yet to come back.
    """

    stepped: bool = False
    passes: int = 0
    sum: Tensor | None = None
    parts: dict[Pass, tuple[Tensor, int]] = field(default_factory=dict)

    def joined(self, grad: Tensor, run: Pass, uses: int) -> Tensor | None:
        """The gradient of the pass's masked weight once every use of the layer has come back."""
        before, left = self.parts.pop(run, (None, uses))
        whole = grad if before is None else before.add_(grad)
        if left > 1:
            self.parts[run] = whole, left - 1
            return None
        return whole

    def add(self, gradient: Tensor) -> Tensor:
        """One pass more; the sum with it."""
        self.sum = gradient if self.sum is None else self.sum.add_(gradient)
        self.passes += 1
        return self.sum


class _Stepped(Share):
    """The gradient of logits that stepped in their layer's backward."""

    __slots__ = ()

    def __init__(self) -> None:
        self.parts, self.value, self.spent = [], None, True

    def require_unspent(self) -> None:
        raise InputError(
            "the gradient of a streamed layer's logits went into its step inside backward() and was never stored, so "
            "gradients cannot be clipped over the network, unscaled by a GradScaler or read; lower lr or warm it up "
            "(Adam moves a logit by about lr at most, however large its gradient), or use memory='plain' with MaskAdam"
        )

    def clear(self, like: Tensor) -> None:
        """Nothing to clear."""


def _logit_gradient(layer: StreamedLayer, grad: Tensor, run: Pass, slope: Tensor | None = None) -> Tensor:
    """Chain rule of one draw, and `slope` times the slope of each penalty's term: gradient of the logits, fp32."""
    logits = layer.mask_logits
    found, _ = torch.ops.dwm_fast.sample_backward(
        [grad],
        torch.zeros((), device=grad.device) if slope is None else slope * logits.numel(),
        [logits],
        [layer.frozen_weight],
        run.state,
        run.tau,
        [layer.layer_index],
        [layer.unit],
        int(run.mode),
        0,
        True,
        False,
    )
    gradient: Tensor = found[0]
    return gradient


def _check_source(source: Any) -> None:
    if not isinstance(source, StreamedModel):
        what = (
            "a masked model of memory='plain'" if hasattr(source, "mask_parameters") else f"a {type(source).__name__}"
        )
        raise InputError(
            f"StreamedAdam got {what}; expected what dwm_fast.mask_model(..., memory='streamed') returned (MaskAdam "
            "learns the others)"
        )
    refuse_several_processes()
