"""MaskAdam: chain rule, regulariser and Adam(W) on the logits of a whole network, one pass over memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.update import frozen_adamw, mask_adam
from dwm_fast.optim._bucket import Bucket
from dwm_fast.optim._state import DeviceOptimizer, non_negative, valid_betas
from dwm_fast.optim.record import DrawRecorder, MaskRecord, MaskSource


class MaskAdam(DeviceOptimizer):
    """Adam(W) on mask logits, straight from the gradients of the masked weights.

    With `fold` the source's backward stops at the gradient of the masked weights; `step` draws the noise
    again and does the rest in one pass, so no gradient of the logits is ever stored (logits.grad stays None).
    Several backward passes before a step (mask_samples > 1, accumulation), or a gradient that reached the
    logits another way, are added up first, in more than one pass.

    Args:
        source: a `MaskedModel`, or several (each becomes one param group).
        lr, betas, weight_decay: Adam's; weight decay pulls logits to 0, that is keep probabilities to 1/2.
        eps: added to the root of the second moment; 1e-15 because logit gradients are near 1e-8 (see
            docs/optimisers.md).
        coefficient: adds coefficient * sparsity_penalty() to the loss (its gradient only), a float or a 0-dim
            fp32 tensor on the device.
        decoupled_weight_decay: AdamW's decay (True) or Adam's.
        fold: False leaves the source alone and steps on logits.grad (for gradient clipping, GradScaler,
            torch.compile).

    Raises:
        InputError: a number out of range, or coefficient with fold=False.
    """

    STATE: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        source: MaskSource | Sequence[MaskSource],
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        *,
        coefficient: float | Tensor = 0.0,
        decoupled_weight_decay: bool = True,
        fold: bool = True,
    ) -> None:
        non_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        valid_betas(betas)
        if not fold and (isinstance(coefficient, Tensor) or coefficient != 0):
            raise InputError(
                "coefficient needs fold=True; with fold=False add coefficient * masked.sparsity_penalty() to the loss"
            )
        sources = list(source) if isinstance(source, Sequence) else [source]
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "coefficient": coefficient,
        }
        self.fold = fold
        self._recorders: list[DrawRecorder] = []
        groups = [{"params": list(one.mask_parameters())} for one in sources]
        super().__init__(groups, defaults, keep=None, compact=False)
        if fold:
            for one in sources:
                self._recorders.append(DrawRecorder())
                one.attach_recorder(self._recorders[-1])

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # torch's GradScaler then calls step() without looking for logits.grad, and step() says what to do.
        return self.fold

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the recorded draws, and the gradients of the logits where there are any."""
        super().zero_grad(set_to_none)
        for recorder in self._recorders:
            recorder.clear()

    def update(self, group: dict[str, Any], bucket: Bucket) -> None:
        if getattr(self, "grad_scale", None) is not None:
            raise InputError(
                "MaskAdam(fold=True) was stepped by a GradScaler, which cannot see folded gradients; use "
                "bfloat16 without a scaler, or MaskAdam(..., fold=False)"
            )
        records = [r for r in self._records_of(group) if r.logits[0] in bucket.index]
        plain = any(p.grad is not None for p in bucket.params)
        if not records:
            if plain:
                self._refuse_lost_penalty(group)
                self._step_on_gradients(group, bucket, {})
            return
        slope = self._penalty_scale(group, bucket, records)
        drawn = [r for r in records if any(g is not None for g in r.grads)] or records[:1]
        if len(drawn) == 1 and not plain and _uniform(drawn[0].weights) and _uniform(drawn[0].grads):
            self._step_folded(group, bucket, drawn[0], slope)
        else:
            self._step_on_gradients(group, bucket, _summed(drawn, slope))

    def _records_of(self, group: dict[str, Any]) -> list[MaskRecord]:
        index = next(i for i, g in enumerate(self.param_groups) if g is group)
        return self._recorders[index].records if index < len(self._recorders) else []

    def _refuse_lost_penalty(self, group: dict[str, Any]) -> None:
        if isinstance(group["coefficient"], Tensor) or group["coefficient"] != 0:
            raise InputError(
                "logits have gradients but no draw was recorded: the coefficient's penalty cannot be added; "
                "another MaskAdam may have been attached to the model since"
            )

    def _penalty_scale(self, group: dict[str, Any], bucket: Bucket, records: Iterable[MaskRecord]) -> Tensor:
        """d loss / d (sum of the penalty's terms), 0-dim fp32: the coefficient's and the loss's own share."""
        coefficient = group["coefficient"]
        total = sum(p.numel() for g in self.param_groups for p in g["params"])
        if isinstance(coefficient, Tensor):
            scale: Tensor = coefficient.to(torch.float32) / total
        else:
            scale = bucket.scale.fill_(coefficient / total)
        for record in records:
            if record.grad_penalty is not None:
                scale = scale + record.grad_penalty / sum(x.numel() for x in record.logits)
        return scale

    def _step_folded(self, group: dict[str, Any], bucket: Bucket, record: MaskRecord, slope: Tensor) -> None:
        active = [bucket.index[x] for x in record.logits]
        exp_avg, exp_avg_sq = self.states(group, bucket, active)
        _, _, steps = bucket.advance(active)
        mask_adam(
            [bucket.params[i] for i in active],
            record.weights,
            _filled(record),
            exp_avg,
            exp_avg_sq,
            record.rng_state,
            record.tau,
            slope,
            steps,
            self.learning_rate(group, bucket),
            mode=record.mode,
            layers=record.layers,
            thresholds=record.thresholds,
            step_offset=record.step_offset,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
        )

    def _step_on_gradients(self, group: dict[str, Any], bucket: Bucket, recorded: dict[Tensor, Tensor]) -> None:
        active, grads = [], []
        for i, p in enumerate(bucket.params):
            if p in recorded or p.grad is not None:
                active.append(i)
                parts = [g for g in (recorded.get(p), p.grad) if g is not None]
                grads.append(parts[0] if len(parts) == 1 else parts[0] + parts[1])
        exp_avg, exp_avg_sq = self.states(group, bucket, active)
        bits, ranks, steps = bucket.advance(active)
        frozen_adamw(
            [bucket.params[i] for i in active],
            grads,
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
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "fold": self.fold, "_recorders": []}


def _uniform(tensors: Sequence[Tensor | None]) -> bool:
    return len({t.dtype for t in tensors if t is not None}) == 1


def _filled(record: MaskRecord) -> list[Tensor]:
    """Gradients of the masked weights, zeros for layers that were not reached."""
    dtype = next((g.dtype for g in record.grads if g is not None), torch.float32)
    return [
        torch.zeros_like(w, dtype=dtype, requires_grad=False) if g is None else g
        for g, w in zip(record.grads, record.weights, strict=True)
    ]


def _summed(records: Sequence[MaskRecord], slope: Tensor) -> dict[Tensor, Tensor]:
    """Gradient of every logit over all records; the penalty's share enters with the first."""
    total: dict[Tensor, Tensor] = {}
    for record in records:
        count = sum(x.numel() for x in record.logits)
        grad_penalty = slope * count if record is records[0] else torch.zeros_like(slope)
        found, _ = torch.ops.dwm_fast.sample_backward(
            _filled(record),
            grad_penalty,
            record.logits,
            record.weights,
            record.rng_state,
            record.tau,
            record.layers,
            record.thresholds,
            record.mode,
            record.step_offset,
            True,
            False,
        )
        for logits, grad in zip(record.logits, found, strict=True):
            total[logits] = total[logits].add_(grad) if logits in total else grad
    return total
