"""MaskAdam: chain rule, regulariser and Adam(W) on the logits of a whole network, one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.ops.sample import penalty
from dwm_fast.ops.update import frozen_adamw, step_masks
from dwm_fast.optim._bucket import Bucket
from dwm_fast.optim._state import DeviceOptimizer, finite, non_negative, valid_betas
from dwm_fast.optim.folded import FoldedGradient, Part
from dwm_fast.optim.record import DrawRecorder, MaskSource


class MaskAdam(DeviceOptimizer):
    """Adam(W) on mask logits, straight from the gradients of the masked weights.

    With `fold` the source's backward stops at the gradient of the masked weights; `step` draws the noise
    again and does the rest in one pass. `logits.grad` is there all the same: its values are formed when somebody
    looks (clipping, DDP, a GradScaler, hooks, another optimiser), and then `step` uses what it finds in it. So
    does it after several backward passes (mask_samples > 1, accumulation). After a folded step the gradient is
    gone, and reading it raises InputError. Logits that are shards (DTensor, of `fully_shard`) are stepped part by part,
    from ordinary gradients; make the optimiser after the sharding.

    Args:
        source: a `MaskedModel`, or several (each becomes one param group).
        lr, betas, weight_decay: Adam's; weight decay pulls logits to 0, that is keep probabilities to 1/2.
        eps: added to the root of the second moment; 1e-15 because logit gradients are near 1e-8 (see
            docs/optimisers.md).
        coefficient: the step adds the gradient of coefficient * sparsity_penalty(), a float or a 0-dim fp32
            tensor on the device. Like weight decay it acts in the step alone: `.grad` is without it.
        decoupled_weight_decay: AdamW's decay (True) or Adam's.
        fold: False leaves the source alone: an ordinary gradient that outlives the step.

    Raises:
        InputError: no masked model, a number out of range, or coefficient with fold=False.
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
        if not isinstance(coefficient, Tensor) and not finite(coefficient):
            raise InputError(f"coefficient is {coefficient!r}; expected a finite number")
        sources = _checked_sources(source)
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
                rule: int | None = getattr(getattr(one, "kind", None), "training_mode", None)
                self._recorders.append(DrawRecorder(one.mask_parameters(), rule))
                one.attach_recorder(self._recorders[-1])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's, without its detours."""
        if not set_to_none:
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def update(self, group: dict[str, Any], bucket: Bucket) -> None:
        active = [i for i, p in enumerate(bucket.params) if p.grad is not None]
        if not active:
            return
        parts = _one_draw([bucket.params[i].grad for i in active])
        if parts is None:
            self._step_on_gradients(group, bucket, active)
            return
        self._step_folded(group, bucket, active, parts)
        for i in active:
            bucket.params[i].grad.share.spend()  # type: ignore[union-attr]

    def _penalty_scale(self, group: dict[str, Any], bucket: Bucket) -> Tensor:
        """coefficient / (elements of all groups), 0-dim fp32."""
        coefficient = group["coefficient"]
        total = sum(p.numel() for g in self.param_groups for p in g["params"])
        if isinstance(coefficient, Tensor):
            scale: Tensor = coefficient.to(torch.float32) / total
            return scale
        return bucket.scale.fill_(coefficient / total)

    def _step_folded(self, group: dict[str, Any], bucket: Bucket, active: list[int], parts: Sequence[Part]) -> None:
        """Chain rule, penalty and Adam from the gradients of one draw's masked weights."""
        record, places = parts[0][0], [index for _, index in parts]
        record.require_unchanged()
        slope = self._penalty_scale(group, bucket)
        if record.grad_penalty is not None:
            slope = slope + record.grad_penalty / sum(x.numel() for x in record.logits)
        exp_avg, exp_avg_sq = self.states(group, bucket, active)
        _, _, steps = bucket.advance(active)
        draw, weights, grads = record.draw, record.weights, record.filled()
        if places != list(range(len(weights))):
            draw, weights, grads = draw.of(places), [weights[i] for i in places], [grads[i] for i in places]
        step_masks(
            bucket.tensors(active),
            weights,
            grads,
            exp_avg,
            exp_avg_sq,
            draw,
            slope,
            steps,
            self.learning_rate(group, bucket),
            group["betas"],
            group["eps"],
            group["weight_decay"],
            group["decoupled_weight_decay"],
        )

    def _step_on_gradients(self, group: dict[str, Any], bucket: Bucket, active: list[int]) -> None:
        """Adam on what stands in `.grad`, plus the coefficient's share."""
        grads = [_formed(grad) for grad in bucket.gradients(active)]
        if isinstance(group["coefficient"], Tensor) or group["coefficient"] != 0:
            slope = self._penalty_scale(group, bucket)
            terms = self._penalty_terms(group, bucket.tensors(active))
            grads = [grad + slope * term for grad, term in zip(grads, terms, strict=True)]
        exp_avg, exp_avg_sq = self.states(group, bucket, active)
        bits, ranks, steps = bucket.advance(active)
        frozen_adamw(
            bucket.tensors(active),
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

    def _penalty_terms(self, group: dict[str, Any], logits: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradient of the penalty's sum over the elements, for each of `logits`."""
        index = next(i for i, g in enumerate(self.param_groups) if g is group)
        mode = self._recorders[index].mode if index < len(self._recorders) else None
        if mode is None:
            raise InputError(
                "logits have gradients but no draw was recorded: the coefficient's penalty cannot be added; "
                "another MaskAdam may have been attached to the model since"
            )
        return penalty_terms(logits, mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "fold": self.fold, "_recorders": []}


def penalty_terms(logits: Sequence[Tensor], mode: int) -> Sequence[Tensor]:
    """Gradient of the sum of the penalty's terms with respect to each of `logits`, fp32."""
    leaves = [x.detach().requires_grad_() for x in logits]
    with torch.enable_grad():
        total = penalty(leaves, mode) * sum(x.numel() for x in leaves)
    if not total.requires_grad:  # a rule without a penalty
        return [torch.zeros_like(x) for x in logits]
    return torch.autograd.grad(total, leaves)


def _checked_sources(given: MaskSource | Sequence[MaskSource]) -> list[MaskSource]:
    # torch's containers of modules are sequences too, but the model inside a DataParallel or its like is not reached.
    many = isinstance(given, (list, tuple))
    sources: list[Any] = list(given) if many else [given]  # type: ignore[arg-type]
    if not sources:
        raise InputError("MaskAdam got an empty list; expected a MaskedModel, from dwm_fast.mask_model")
    for one in sources:
        if not hasattr(one, "mask_parameters") or not hasattr(one, "attach_recorder"):
            inside = hasattr(getattr(one, "module", None), "attach_recorder")
            what = "its .module" if inside else "the model that dwm_fast.mask_model made, not its parameters"
            raise InputError(f"MaskAdam got a {type(one).__name__}; expected a MaskedModel: give it {what}")
    return sources


def _formed(grad: Tensor) -> Tensor:
    return grad.share.formed() if isinstance(grad, FoldedGradient) else grad


def _one_draw(grads: Sequence[Tensor | None]) -> list[Part] | None:
    """The parts of these gradients where all come from one draw, nobody has looked, and one operation can step."""
    parts = []
    for grad in grads:
        if not isinstance(grad, FoldedGradient) or len(grad.share.parts) != 1:
            return None
        parts.append(grad.share.parts[0])
    record = parts[0][0]
    alone = all(other is record for other, _ in parts)
    return parts if alone and _uniform(record.weights) and _uniform(record.grads) else None


def _uniform(tensors: Sequence[Tensor | None]) -> bool:
    return len({t.dtype for t in tensors if t is not None}) == 1
