"""FrozenAdamW and FrozenSGD: torch.optim's rules on free weights; kept ones and their state stay."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.update import frozen_adamw, frozen_sgd
from dwm_fast.optim._bucket import Bucket
from dwm_fast.optim._state import DeviceOptimizer, Keep, Params, finite, non_negative, valid_betas


class FrozenAdamW(DeviceOptimizer):
    """AdamW (Loshchilov and Hutter 2019) that never writes a kept weight or its state.

    Args:
        params: parameters, or param groups; a group may carry "keep" for its own "params".
        lr: learning rate, a float or a 0-dim tensor.
        betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        decoupled_weight_decay: False gives torch.optim.Adam's L2 decay.
        keep: which weights are kept: {parameter: mask}, {name: mask} or a list of masks aligned with the parameters
            (None where nothing is kept). Names are those of parameters or of layers, as `masked.keep_masks()` has
            them, and need `params=model.named_parameters()`. A mask is bool, of the parameter's shape, True =
            keep. It is packed once, to one bit per weight; changing the mask afterwards changes nothing.
        compact: store state for free weights only, so its memory falls with the fraction kept.

    State is fp32 for fp32, bf16 and fp16 weights. Gradients of kept weights are ignored, NaN included.

    Example:
        >>> import torch, dwm_fast.optim
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> opt = dwm_fast.optim.FrozenAdamW([w], lr=0.1, keep={w: torch.tensor([True, False, True])})
        >>> w.sum().backward(); opt.step()
        >>> (w.detach() == 1).tolist()
        [True, False, True]
    """

    STATE: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        keep: Keep | None = None,
        compact: bool = False,
    ) -> None:
        non_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        valid_betas(betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, keep, compact)

    def update(self, group: dict[str, Any], bucket: Bucket) -> None:
        active = [i for i, p in enumerate(bucket.params) if p.grad is not None]
        if not active:
            return
        exp_avg, exp_avg_sq = self.states(group, bucket, active)
        bits, ranks, steps = bucket.advance(active)
        frozen_adamw(
            bucket.tensors(active),
            bucket.gradients(active),
            exp_avg,
            exp_avg_sq,
            bits,
            ranks,
            steps,
            self.learning_rate(group, bucket),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
        )


class FrozenSGD(DeviceOptimizer):
    """SGD with momentum that never writes a kept weight or its momentum buffer.

    Args:
        params, keep, compact: as in `FrozenAdamW`.
        lr: learning rate, a float or a 0-dim tensor.
        momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        decoupled_weight_decay: weight *= 1 - lr * weight_decay in the place of weight decay in the gradient.

    Raises:
        InputError: a negative number, or Nesterov without momentum or with dampening.
    """

    STATE: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        keep: Keep | None = None,
        compact: bool = False,
    ) -> None:
        non_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if not finite(dampening):
            raise InputError(f"dampening is {dampening!r}; expected a finite number")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise InputError(
                f"nesterov=True with momentum={momentum} and dampening={dampening}; expected momentum > 0 "
                f"and dampening 0"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, keep, compact)

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.STATE if group["momentum"] != 0 else ()

    def exported_state(self, state: dict[str, Any], bucket: Bucket, i: int, step: float) -> dict[str, Any]:
        out = super().exported_state(state, bucket, i, step)
        del out["step"]  # torch.optim.SGD keeps none: a momentum buffer says that there was a step
        return out

    def loaded_step(self, saved: dict[str, Any]) -> float:
        return 1.0 if saved.get("momentum_buffer") is not None else 0.0

    def update(self, group: dict[str, Any], bucket: Bucket) -> None:
        active = [i for i, p in enumerate(bucket.params) if p.grad is not None]
        if not active:
            return
        buffers = self.states(group, bucket, active)
        bits, ranks, steps = bucket.advance(active)
        frozen_sgd(
            bucket.tensors(active),
            bucket.gradients(active),
            buffers[0] if buffers else [],
            bits,
            ranks,
            steps,
            self.learning_rate(group, bucket),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
        )
