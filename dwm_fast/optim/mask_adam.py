"""MaskAdam: chain rule, regulariser and Adam(W) on the logits of a whole network, one pass over memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.nn.ranks import Ranks, check_ranks, require_equal
from dwm_fast.ops.sample import penalty
from dwm_fast.ops.shards import is_shard
from dwm_fast.ops.update import frozen_adamw, step_masks
from dwm_fast.optim._bucket import Bucket
from dwm_fast.optim._state import DeviceOptimizer, finite, non_negative, valid_betas
from dwm_fast.optim.folded import FoldedGradient, Part
from dwm_fast.optim.record import DrawRecorder, MaskSource
from dwm_fast.optim.reduced import reduce_gradients


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
        process_group: a torch.distributed ProcessGroup or DeviceMesh of one dimension, whose ranks each have a part of
            the batch: `step` averages gradients over them, so the logits need no DistributedDataParallel. Where all
            ranks draw the same masks it averages those of the masked weights, and the step stays one pass. All ranks
            make the optimiser together; it compares their models (`dwm_fast.nn.check_ranks`) and options.

    Raises:
        InputError: no masked model, a number out of range, coefficient with fold=False, process_group with shards or
            with ranks whose models or options differ.
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
        process_group: Any = None,
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
        self._ranks = None if process_group is None else Ranks(process_group)
        _check_models(sources, self._ranks)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "coefficient": coefficient,
        }
        self.fold = fold
        self._averaged: list[Any] | None = None
        self._sources = [weakref.ref(one) for one in sources]
        self._recorders: list[DrawRecorder] = []
        groups = [{"params": list(one.mask_parameters())} for one in sources]
        super().__init__(groups, defaults, keep=None, compact=False)
        self._check_options()
        if fold:
            for one in sources:
                rule: int | None = getattr(getattr(one, "kind", None), "training_mode", None)
                self._recorders.append(DrawRecorder(one.mask_parameters(), rule, self._ranks is not None))
                one.attach_recorder(self._recorders[-1])

    def _check_options(self) -> None:
        """InputError on every rank of `process_group` where their options differ, and so would their steps."""
        if self._ranks is None:
            return
        group = self.param_groups[0]
        options = {name: group[name] for name in self.defaults}
        said = {name: float(value) if isinstance(value, Tensor) else value for name, value in options.items()}
        require_equal(
            repr((said, len(self.param_groups))),
            self._ranks.group,
            group["params"][0].device,
            f"give MaskAdam other options than rank 0; this one {said}; give all ranks the same",
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's, without its detours."""
        if self._averaged is not None:
            self._close(averaged=False)
        if not set_to_none:
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def reduce_gradients(self) -> None:
        """Average the gradients over the ranks of `process_group`, once a step; without one it does nothing.

        `step` does it where nobody has. Call it after the last backward() of a step where something is to read the
        gradients before: clipping, a GradScaler's unscale_. All ranks have to call it, after as many backward passes as
        the others: InputError on every rank where they differ. Gradients of several backward passes (accumulation) are
        summed on each rank first, and averaged once.
        """
        if self._ranks is None or self._is_averaged():
            return
        groups = [group["params"] for group in self.param_groups]
        reduce_gradients([(params, self._draw_alike(i)) for i, params in enumerate(groups)], self._ranks.group)
        self._close(averaged=True)

    def _draw_alike(self, index: int) -> bool:
        """Whether all ranks draw the same masks of the source of a param group."""
        source = self._sources[index]() if index < len(self._sources) else None
        return source is not None and getattr(source, "noise", "shared") == "shared"

    def _is_averaged(self) -> bool:
        """Whether what stands in `.grad` was averaged; backward passes of another step have put other objects there."""
        there = self._averaged
        return there is not None and all(a() is b for a, b in zip(there, self._gradients(), strict=False))

    def _gradients(self) -> list[Any]:
        """The gradient of every parameter, or what a folded one shares with its aliases; None where there is none."""
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        return [grad.share if isinstance(grad, FoldedGradient) else grad for grad in grads]

    def _close(self, averaged: bool) -> None:
        """Let backward passes of this step come (False), or be an error (True), for its gradients are averaged."""
        self._averaged = None
        if averaged:
            self._averaged = [_no_gradient if one is None else weakref.ref(one) for one in self._gradients()]
        for recorder in self._recorders:
            recorder.averaged = averaged

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every logit that has a gradient; returns what `closure` returned, if given."""
        loss = super().step(closure)
        if self._averaged is not None:
            self._close(averaged=False)
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # as DeviceOptimizer's, which it calls

    def update(self, group: dict[str, Any], bucket: Bucket) -> None:
        self.reduce_gradients()
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
        rest = {"fold": self.fold, "_recorders": [], "_ranks": self._ranks, "_sources": [], "_averaged": None}
        return {**super().__getstate__(), **rest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, missing in (("_ranks", None), ("_sources", []), ("_averaged", None)):
            self.__dict__.setdefault(name, missing)  # of an older release; torch's load_state_dict comes here too


def penalty_terms(logits: Sequence[Tensor], mode: int) -> Sequence[Tensor]:
    """Gradient of the sum of the penalty's terms with respect to each of `logits`, fp32."""
    leaves = [x.detach().requires_grad_() for x in logits]
    with torch.enable_grad():
        total = penalty(leaves, mode) * sum(x.numel() for x in leaves)
    if not total.requires_grad:  # a rule without a penalty
        return [torch.zeros_like(x) for x in logits]
    return torch.autograd.grad(total, leaves)


def _check_models(sources: Sequence[Any], ranks: Ranks | None) -> None:
    """InputError where ranks that learn these sources together hold different ones, or shards with `process_group`."""
    for one in sources:
        _reshard(one)
        shard = next(filter(is_shard, one.mask_parameters()), None)
        if shard is not None and ranks is not None:
            raise InputError(
                "process_group with logits that are shards (DTensor), which fully_shard averages; leave it out"
            )
        if ranks is not None and isinstance(one, torch.nn.Module):
            check_ranks(one, ranks.group)
        if shard is not None and isinstance(one, torch.nn.Module):
            mesh: Any = shard.device_mesh
            for dimension in range(mesh.ndim):
                check_ranks(one, mesh.get_group(dimension))


def _reshard(source: Any) -> None:
    """Let parts of a sharded network that still hold whole parameters, after an evaluation, hold their shards again."""
    modules: Iterable[Any] = source.modules() if isinstance(source, torch.nn.Module) else ()
    for module in modules:
        if hasattr(module, "set_reshard_after_forward"):  # an FSDPModule, whose own module takes long to import
            module.reshard()
    layers = source.mask_layers().values() if hasattr(source, "mask_layers") else ()
    if any(is_shard(layer.frozen_weight) and not is_shard(layer.mask_logits) for layer in layers):
        raise InputError(
            "weights of masked layers are shards (DTensor) and their logits are not; let fully_shard have both, "
            "without ignored_params"
        )


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


def _no_gradient() -> None:
    """In the place of a reference to a gradient, where there is none."""


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
