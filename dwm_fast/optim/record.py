"""DrawRecorder: stands in for `dwm_fast.ops.sample` so that a mask optimiser can fold the chain rule into its step."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dwm_fast.errors import InputError
from dwm_fast.ops import Mode
from dwm_fast.ops.draw import Draw
from dwm_fast.ops.registration import call
from dwm_fast.ops.shards import is_shard
from dwm_fast.optim.folded import FoldedGradient, Share


class MaskRecord:
    """One draw of a network's masks, after its backward pass (arguments: `dwm_fast.ops.sample`).

    Args:
        logits, weights: learned tensors and weights, layer by layer. The logits are held weakly: their own `.grad`
            leads here, and torch does not collect such a circle.
        grads: gradient of each masked weight, in its dtype; None for a layer that was not reached.
        grad_penalty: gradient of the penalty, 0-dim fp32; None when the loss does not hold it.
        draw: how it was drawn; its rng_state a tensor of its own (`dwm_fast.ops.advance` gives one).

    Attributes:
        of_one_rank: whether the gradients are those of one rank of several, and are not averaged yet.
        dtypes: of the masked weights; empty where nobody averages.
    """

    of_one_rank = False
    dtypes: Sequence[torch.dtype] = ()

    def __init__(
        self,
        logits: Sequence[Tensor],
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        grad_penalty: Tensor | None,
        draw: Draw,
    ) -> None:
        self._logits = list(map(weakref.ref, logits))
        self.weights, self.grads, self.grad_penalty = weights, grads, grad_penalty
        self.draw = draw
        self.versions = _versions(logits, weights, draw)
        self._found: list[Tensor | None] = []

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

    def whole(self) -> list[Tensor]:
        """As `filled`, each in the dtype of its masked weight, which is the same on every rank."""
        return [
            torch.zeros_like(w, dtype=dtype, requires_grad=False) if g is None else g
            for g, w, dtype in zip(self.grads, self.weights, self.dtypes, strict=True)
        ]

    def require_unchanged(self) -> None:
        """InputError where logits, weights or temperature are no longer those of the backward pass."""
        if self.versions != _versions(self.logits, self.weights, self.draw):
            raise InputError(
                "logits, weights or temperature were changed in place between backward() and the use of the logits' "
                "gradient, which is formed from them; step the masks first, or use MaskAdam(..., fold=False)"
            )

    def backward(self, need_logits: bool, need_weights: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of logits and of weights, as `dwm_fast.ops.sample` gives them."""
        penalty = self.grad_penalty
        if penalty is None:
            penalty = torch.zeros((), device=self.draw.rng_state.device)
        dlogits, dweights = torch.ops.dwm_fast.sample_backward(
            self.filled(), penalty, self.logits, list(self.weights), *self.draw.flat(), need_logits, need_weights
        )
        return dlogits, dweights

    def take(self, index: int) -> Tensor:
        """Gradient of logits `index`, for its one owner; the first call forms those of the whole network."""
        if self.of_one_rank:
            raise InputError(
                "the gradient of these logits is that of this rank alone; call optimizer.reduce_gradients() after the "
                "last backward() of a step and before clipping, unscaling or reading it, and let "
                "DistributedDataParallel leave the logits out"
            )
        if not self._found:
            self.require_unchanged()
            self._found = list(self.backward(True, False)[0])
        found, self._found[index] = self._found[index], None
        assert found is not None
        return found


class DrawRecorder:
    """Stands in for `dwm_fast.ops.sample`; its backward leaves a `FoldedGradient` in the `.grad` of the logits.

    Whoever looks at that gradient finds the values that `dwm_fast.ops.sample` gives. Where something would look in
    any case, it gives those at once: hooks on the logits, saved-tensor hooks, `torch.autograd.grad`, weights that
    train along, `create_graph`, compiled code. So it does where `owned` are shards (DTensor), whose gradients are
    formed in whole before they are reduced.

    Args:
        owned: the logits that the optimiser steps.
        mode: rule of the draws that are to come, where it is known.
        one_rank: whether gradients are those of one rank of several, which the optimiser averages.

    Attributes:
        averaged: whether the optimiser has averaged them, and no backward may come before its step.
        mode: rule of the last draw; before it the one given.
        records: by layer, the gradient of an earlier step that may be used again; at most one of each.
    """

    def __init__(self, owned: Iterable[Tensor], mode: int | None = None, one_rank: bool = False) -> None:
        self.mode, self.one_rank, self.averaged = mode, one_rank, False
        self._owned = list(owned)
        self._shards = any(map(is_shard, self._owned))
        self.records: dict[int, FoldedGradient] = {}

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
        draw = Draw(
            rng_state,
            tau,
            list(range(count) if layers is None else layers),
            [0.0] * count if thresholds is None else list(thresholds),
            int(mode),
            step_offset,
        )
        self.mode = int(mode)
        self._require_owned(logits)
        if torch.compiler.is_compiling() or self._shards:
            flat = draw.flat()
            masked, bits, penalty = torch.ops.dwm_fast.sample(list(logits), list(weights), *flat, dtype, pack)
            return masked, bits, penalty
        if not torch.is_grad_enabled():
            return call("sample", list(logits), list(weights), draw, dtype, pack)  # type: ignore[no-any-return]
        # Weights that do not train stay outside of the graph: each of its edges costs as much as a logit's.
        inside = weights if any(map(_TRAINS, weights)) else ()
        *masked, bits, penalty = _RecordedDraw.apply(self, draw, list(weights), dtype, pack, *logits, *inside)
        return masked, bits, penalty

    def _require_owned(self, logits: Sequence[Tensor]) -> None:
        """InputError where the network's logits are not what the optimiser steps, and it would learn nothing."""
        if torch.compiler.is_compiling() or self._shards:
            return
        if len(logits) != len(self._owned) or not all(map(operator.is_, logits, self._owned)):
            raise InputError(
                "the masked model's parameters are other tensors than when MaskAdam was made (fully_shard or a new "
                "Parameter put them there): make the optimiser after that"
            )


_VERSION, _TRAINS = operator.attrgetter("_version"), operator.attrgetter("requires_grad")


def _versions(logits: Sequence[Tensor], weights: Sequence[Tensor], draw: Draw) -> list[int]:
    return list(map(_VERSION, itertools.chain(logits, weights, (draw.tau,))))


_LOGITS = 5
"""Place of the first logits among the arguments of `_RecordedDraw`."""


class _RecordedDraw(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recorder: DrawRecorder,
        draw: Draw,
        weights: list[Tensor],
        dtype: torch.dtype | None,
        pack: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        logits = list(tensors[: len(weights)])
        masked, bits, penalty = call("sample", logits, weights, draw, dtype, pack)
        ctx.draw, ctx.logits, ctx.weights, ctx.recorder = draw, logits, weights, recorder
        ctx.dtypes = [m.dtype for m in masked] if recorder.one_rank else ()
        # Where no hook looks at saved tensors, these are held as they are: to save and unpack one costs 1 us.
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        ctx.save_for_backward(draw.rng_state, draw.tau, *(logits + weights if hooked else ()))
        ctx.versions = _versions(logits, weights, draw)
        ctx.mark_non_differentiable(bits)
        ctx.set_materialize_grads(False)
        return (*masked, bits, penalty)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rng_state, tau, *tensors = ctx.saved_tensors
        logits, weights, draw, count = ctx.logits, ctx.weights, ctx.draw, len(ctx.logits)
        if tensors:
            logits, weights = tensors[:count], tensors[count:]
        if rng_state is not draw.rng_state or tau is not draw.tau:  # a saved-tensor hook has them
            draw = dataclasses.replace(draw, rng_state=rng_state, tau=tau)
        record = MaskRecord(logits, weights, list(grads[:count]), grads[count + 1], draw)
        if not tensors and record.versions != ctx.versions:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                "logits or weights of masked layers were changed between the draw of their masks and backward()"
            )
        record.of_one_rank, record.dtypes = ctx.recorder.one_rank, ctx.dtypes
        if ctx.recorder.averaged and all(x.grad is None for x in logits):
            ctx.recorder.averaged = False  # the gradients that were averaged are gone: another step has begun
        if ctx.recorder.averaged:
            raise InputError(
                "backward() came after reduce_gradients() and before step(): the sum would be averaged in part; call "
                "reduce_gradients() once, after the last backward() of a step"
            )
        needs = ctx.needs_input_grad[_LOGITS:]
        wanted = [i for i in range(count) if needs[i]]
        need_weights = any(needs[count:])
        nothing = (None,) * count
        if not (need_weights or torch.is_grad_enabled()) and _nobody_looks(ctx, logits, wanted):
            _leave_parts(record, logits, wanted, ctx.recorder.records)
            return (None,) * len(ctx.needs_input_grad)
        dlogits, dweights = record.backward(bool(wanted), need_weights)
        found = (*(None,) * _LOGITS, *(dlogits or nothing), *(dweights or nothing))
        return found[: len(ctx.needs_input_grad)]


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
            if not torch._C._will_engine_execute_node(edges[i][0]):
                return False  # backward(inputs=...) without these logits
        except RuntimeError:  # torch.autograd.grad: the gradient is handed to the caller
            return False
    return True


def _leave_parts(
    record: MaskRecord, logits: Sequence[Tensor], wanted: Sequence[int], spares: dict[int, FoldedGradient]
) -> None:
    """Put its part of their gradient into the `.grad` of the wanted logits.

    Making a tensor costs 3 us, so that of an earlier step is used again where nobody has ever looked at it or holds it.
    """
    for i in wanted:
        x, part = logits[i], (record, i)
        gradient = x.grad
        if gradient is not None:
            assert isinstance(gradient, FoldedGradient)
            gradient.share.parts.append(part)
            continue
        spare, share = spares.pop(i, None), Share(part)
        if spare is None or not spare.share.spent or sys.getrefcount(spare) > _ONLY_HERE or not spare.fits(x):
            spare = FoldedGradient(x, share)
        else:
            spare.share = share
        x.grad = spares[i] = spare


_ONLY_HERE = 2
"""References to an object that a local variable holds, as sys.getrefcount counts."""


class MaskSource(Protocol):
    """What `MaskAdam` asks of a masked network; `dwm_fast.MaskedModel` has it."""

    def mask_parameters(self) -> Iterable[nn.Parameter]:
        """The logits of every layer."""
        ...

    def attach_recorder(self, recorder: DrawRecorder | None) -> None:
        """Draw for training by `recorder.sample`, not `dwm_fast.ops.sample`, from now on; None: as before."""
        ...
