"""What a mask optimiser must know of a draw, taken down by its backward in the place of logit gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dwm_fast.ops import Mode


@dataclass(frozen=True)
class MaskRecord:
    """One draw of a network's masks, after its backward pass (fields: `dwm_fast.ops.sample`).

    Attributes:
        logits, weights: learned tensors and weights, layer by layer.
        grads: gradient of each masked weight, in its dtype; None for a layer that was not reached.
        grad_penalty: gradient of the penalty, 0-dim fp32; None when the loss does not hold it.
        rng_state: seed and step of the draw, a tensor of its own (`dwm_fast.ops.advance` gives one).
    """

    logits: list[Tensor]
    weights: list[Tensor]
    grads: list[Tensor | None]
    grad_penalty: Tensor | None
    rng_state: Tensor
    tau: Tensor
    layers: list[int]
    thresholds: list[float]
    mode: int
    step_offset: int


class DrawRecorder:
    """Stands in for `dwm_fast.ops.sample`; its backward keeps a MaskRecord and gives the logits no gradient.

    Records gather until `clear`, as gradients do until zero_grad: several backward passes add up.
    """

    def __init__(self) -> None:
        self.records: list[MaskRecord] = []

    def sample(
        self,
        logits: Sequence[Tensor],
        weights: Sequence[Tensor],
        rng_state: Tensor,
        tau: Tensor,
        *,
        mode: int = Mode.GUMBEL_HARD,
        layers: Sequence[int] | None = None,
        thresholds: Sequence[float] | None = None,
        step_offset: int = 0,
        dtype: torch.dtype | None = None,
        pack: bool = False,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """As `dwm_fast.ops.sample`: masked weights, keep bits, penalty. Differentiable in the weights."""
        count = len(weights)
        rule = {
            "layers": list(range(count)) if layers is None else list(layers),
            "thresholds": [0.0] * count if thresholds is None else list(thresholds),
            "mode": int(mode),
            "step_offset": step_offset,
        }
        *masked, bits, penalty = _RecordedDraw.apply(self.records, rule, dtype, pack, rng_state, tau, *logits, *weights)
        return masked, bits, penalty

    def clear(self) -> None:
        """Forget all records."""
        self.records.clear()


class _RecordedDraw(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        records: list[MaskRecord],
        rule: dict[str, Any],
        dtype: torch.dtype | None,
        pack: bool,
        rng_state: Tensor,
        tau: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        logits, weights = list(tensors[:count]), list(tensors[count:])
        masked, bits, penalty = torch.ops.dwm_fast.sample(
            logits,
            weights,
            rng_state,
            tau,
            rule["layers"],
            rule["thresholds"],
            rule["mode"],
            rule["step_offset"],
            dtype,
            pack,
        )
        ctx.records, ctx.rule = records, rule
        ctx.save_for_backward(rng_state, tau, *tensors)
        ctx.mark_non_differentiable(bits)
        ctx.set_materialize_grads(False)
        return (*masked, bits, penalty)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rng_state, tau, *tensors = ctx.saved_tensors
        count = len(tensors) // 2
        logits, weights = tensors[:count], tensors[count:]
        ctx.records.append(
            MaskRecord(logits, weights, list(grads[:count]), grads[count + 1], rng_state, tau, **ctx.rule)
        )
        dweights: list[Tensor | None] = [None] * count
        if any(ctx.needs_input_grad[6 + count :]):
            filled = [torch.zeros_like(w) if g is None else g for g, w in zip(grads[:count], weights, strict=True)]
            rule = [ctx.rule[key] for key in ("layers", "thresholds", "mode", "step_offset")]
            no_penalty = rng_state.new_zeros((), dtype=torch.float32)
            _, dweights = torch.ops.dwm_fast.sample_backward(
                filled, no_penalty, logits, weights, rng_state, tau, *rule, False, True
            )
        return (*[None] * (6 + count), *dweights)


class MaskSource(Protocol):
    """What `MaskAdam` asks of a masked network; `dwm_fast.MaskedModel` has it."""

    def mask_parameters(self) -> Iterable[nn.Parameter]:
        """The logits of every layer."""
        ...

    def attach_recorder(self, recorder: DrawRecorder | None) -> None:
        """Draw for training by `recorder.sample`, not `dwm_fast.ops.sample`, from now on; None: as before."""
        ...
