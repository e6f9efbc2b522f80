"""DrawRecorder: stands in for `dwm_fast.ops.sample` so that a mask optimiser can fold the chain rule into its step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.ops import Mode
from dwm_fast.optim.folded import FoldedGradient, Share


class MaskRecord:
    """One draw of a network's masks, after its backward pass (arguments: `dwm_fast.ops.sample`).

    Args:
        logits, weights: learned tensors and weights, layer by layer. The logits are held weakly: their own `.grad`
            leads here, and torch does not collect such a circle.
        grads: gradient of each masked weight, in its dtype; None for a layer that was not reached.
        grad_penalty: gradient of the penalty, 0-dim fp32; None when the loss does not hold it.
        rng_state: seed and step of the draw, a tensor of its own (`dwm_fast.ops.advance` gives one).
        rule: mode, layers, thresholds and step_offset.
    """

    def __init__(
        self,
        logits: Sequence[Tensor],
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        grad_penalty: Tensor | None,
        rng_state: Tensor,
        tau: Tensor,
        rule: dict[str, Any],
    ) -> None:
        self._logits = [weakref.ref(x) for x in logits]
        self.weights, self.grads, self.grad_penalty = weights, grads, grad_penalty
        self.rng_state, self.tau, self.rule = rng_state, tau, rule
        self._versions = self._versions_of(logits)
        self._found: list[Tensor | None] = []

    def _versions_of(self, logits: Sequence[Tensor]) -> list[int]:
        return [x._version for x in (*logits, *self.weights, self.tau)]

    @property
    def logits(self) -> list[Tensor]:
        """The learned tensors, as they are now."""
        found = [ref() for ref in self._logits]
        if any(x is None for x in found):
            raise InputError(
                "the gradient of these logits is formed from those of the whole network, and the network is gone; "
                "read it while the masked model lives"
            )
        return found  # type: ignore[return-value]

    def filled(self) -> list[Tensor]:
        """Gradients of the masked weights, zeros for layers that were not reached."""
        dtype = next((g.dtype for g in self.grads if g is not None), torch.float32)
        return [
            torch.zeros_like(w, dtype=dtype, requires_grad=False) if g is None else g
            for g, w in zip(self.grads, self.weights, strict=True)
        ]

    def require_unchanged(self) -> None:
        """InputError where logits, weights or temperature are no longer those of the backward pass."""
        if self._versions != self._versions_of(self.logits):
            raise InputError(
                "logits, weights or temperature were changed in place between backward() and the use of the logits' "
                "gradient, which is formed from them; step the masks first, or use MaskAdam(..., fold=False)"
            )

    def backward(self, need_logits: bool, need_weights: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of logits and of weights, as `dwm_fast.ops.sample` gives them."""
        penalty = self.grad_penalty
        if penalty is None:
            penalty = torch.zeros((), device=self.rng_state.device)
        dlogits, dweights = torch.ops.dwm_fast.sample_backward(
            self.filled(),
            penalty,
            self.logits,
            self.weights,
            self.rng_state,
            self.tau,
            self.rule["layers"],
            self.rule["thresholds"],
            self.rule["mode"],
            self.rule["step_offset"],
            need_logits,
            need_weights,
        )
        return dlogits, dweights

    def take(self, index: int) -> Tensor:
        """Gradient of logits `index`, for its one owner; the first call forms those of the whole network."""
        if not self._found:
            self.require_unchanged()
            self._found = list(self.backward(True, False)[0])
        found, self._found[index] = self._found[index], None
        assert found is not None
        return found


@dataclass(frozen=True, slots=True)
class RecordedPart:
    """What one draw adds to the gradient of its logits `index`."""

    record: MaskRecord
    index: int

    def __call__(self) -> Tensor:
        return self.record.take(self.index)


class DrawRecorder:
    """Stands in for `dwm_fast.ops.sample`; its backward leaves a `FoldedGradient` in the `.grad` of the logits.

    Whoever looks at that gradient finds the values that `dwm_fast.ops.sample` gives. Where something would look in
    any case, it gives those at once: hooks on the logits, saved-tensor hooks, `torch.autograd.grad`, weights that
    train along, `create_graph`, compiled code.

    Attributes:
        mode: rule of the last draw; None before it.
    """

    def __init__(self) -> None:
        self.mode: int | None = None

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
        """As `dwm_fast.ops.sample`: masked weights, keep bits, penalty; differentiable in logits and weights."""
        count = len(weights)
        rule = {
            "layers": list(range(count)) if layers is None else list(layers),
            "thresholds": [0.0] * count if thresholds is None else list(thresholds),
            "mode": int(mode),
            "step_offset": step_offset,
        }
        self.mode = int(mode)
        if torch.compiler.is_compiling():
            return ops.sample(logits, weights, rng_state, tau, dtype=dtype, pack=pack, **rule)  # type: ignore[arg-type]
        *masked, bits, penalty = _RecordedDraw.apply(rule, dtype, pack, rng_state, tau, *logits, *weights)
        return masked, bits, penalty


_LOGITS, _EDGES = 5, 2
"""Place of the first logits among the arguments of `_RecordedDraw`, and among its tensors."""


class _RecordedDraw(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        ctx.rule, ctx.logits = rule, logits
        ctx.save_for_backward(rng_state, tau, *tensors)
        ctx.mark_non_differentiable(bits)
        ctx.set_materialize_grads(False)
        return (*masked, bits, penalty)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rng_state, tau, *tensors = ctx.saved_tensors
        count = len(tensors) // 2
        logits, weights = tensors[:count], tensors[count:]
        record = MaskRecord(logits, weights, list(grads[:count]), grads[count + 1], rng_state, tau, ctx.rule)
        needs = ctx.needs_input_grad[_LOGITS:]
        wanted = [i for i in range(count) if needs[i]]
        need_weights = any(needs[count:])
        if not (need_weights or torch.is_grad_enabled()) and _nobody_looks(ctx, logits, wanted):
            for i in wanted:
                _leave_part(logits[i], RecordedPart(record, i))
            return (None,) * (_LOGITS + 2 * count)
        dlogits, dweights = record.backward(bool(wanted), need_weights)
        nothing = (None,) * count
        return (*(None,) * _LOGITS, *(dlogits or nothing), *(dweights or nothing))


def _nobody_looks(ctx: Any, logits: Sequence[Tensor], wanted: Sequence[int]) -> bool:
    """Whether the gradients of the wanted logits end in `.grad`, and nothing on the way there reads them."""
    edges = ctx.next_functions
    for i in wanted:
        x = logits[i]
        if x is not ctx.logits[i] or not x.is_leaf or not x.requires_grad:
            return False  # another tensor was unpacked (saved-tensor hooks), or the gradient goes on or nowhere
        if x._backward_hooks or x._post_accumulate_grad_hooks:
            return False
        if x.grad is not None:
            if not isinstance(x.grad, FoldedGradient):
                return False
            x.grad.share.require_unspent()
            if x.grad.share.value is not None:
                return False
        try:
            if not torch._C._will_engine_execute_node(edges[_EDGES + i][0]):
                return False  # backward(inputs=...) without these logits
        except RuntimeError:  # torch.autograd.grad: the gradient is handed to the caller
            return False
    return True


def _leave_part(logits: Tensor, part: RecordedPart) -> None:
    if logits.grad is None:
        logits.grad = FoldedGradient(logits, Share(part))
    else:
        assert isinstance(logits.grad, FoldedGradient)
        logits.grad.share.parts.append(part)


class MaskSource(Protocol):
    """What `MaskAdam` asks of a masked network; `dwm_fast.MaskedModel` has it."""

    def mask_parameters(self) -> Iterable[nn.Parameter]:
        """The logits of every layer."""
        ...

    def attach_recorder(self, recorder: DrawRecorder | None) -> None:
        """Draw for training by `recorder.sample`, not `dwm_fast.ops.sample`, from now on; None: as before."""
        ...
