"""What the optimisers share: state on the device, masks as bits, torch.optim's state dicts."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import optimizer

from dwm_fast.errors import InputError
from dwm_fast.ops.bits import pack
from dwm_fast.ops.shards import as_part, as_shard, is_shard, part, refuse_shards
from dwm_fast.optim._bucket import Bucket

Keep = Mapping[Tensor, Tensor] | Mapping[str, Tensor] | Sequence[Tensor | None]
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class DeviceOptimizer(torch.optim.Optimizer):
    """An optimiser whose step never waits for the device: step counts and learning rates live there.

    On CUDA a float learning rate becomes a 0-dim fp64 tensor in its param group, which schedulers fill in
    place, so a captured graph follows them. `state_dict` gives plain floats and torch.optim's own keys.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    """Names of the state tensors of a parameter."""
    FOR_SHARDS: ClassVar[str] = ""
    """What to do where parameters are shards and cannot be stepped as such; "" where they can."""

    def __init__(self, params: Params, defaults: dict[str, Any], keep: Keep | None, compact: bool) -> None:
        self.compact = compact
        self._kept: dict[Tensor, Tensor] = {}
        self._buckets: dict[int, list[Bucket]] = {}
        super().__init__(params, defaults)
        if keep is not None:
            self._keep_all(keep)

    def _keep_all(self, keep: Keep) -> None:
        for param, mask in _with_parameters(keep, self.param_groups):
            self._keep_one(param, mask)

    def _keep_one(self, param: Tensor, mask: Tensor | None) -> None:
        if mask is None:
            return
        if not isinstance(mask, Tensor):
            raise InputError(f"a keep mask is a {type(mask).__name__}; expected a torch.bool tensor (True = keep)")
        if mask.dtype != torch.bool or mask.shape != param.shape:
            raise InputError(
                f"a keep mask is {mask.dtype} of shape {tuple(mask.shape)} for a parameter of shape "
                f"{tuple(param.shape)}; expected torch.bool (True = keep) of the same shape"
            )
        if is_shard(mask) or bool(mask.any()):
            self._kept[param] = pack([as_part(mask.to(param.device), param)])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's own; the group may carry "keep", as the optimiser's but for its own "params"."""
        keep = param_group.get("keep")
        super().add_param_group({k: v for k, v in param_group.items() if k != "keep"})
        group = self.param_groups[-1]
        for param in group["params"]:
            if not self.steps_on(param.dtype):
                raise InputError(f"a parameter is {param.dtype}; expected a real floating dtype")
        if self.FOR_SHARDS:
            refuse_shards(group["params"], type(self).__name__, self.FOR_SHARDS)
        if keep is not None:
            for param, mask in _with_parameters(keep, [group]):
                self._keep_one(param, mask)

    def steps_on(self, dtype: torch.dtype) -> bool:
        """Whether parameters may be of this dtype."""
        return dtype.is_floating_point

    def buckets(self, group_index: int) -> list[Bucket]:
        """The buckets of one param group, made at their first use: by then parameters have been moved."""
        if group_index not in self._buckets:
            found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in self.param_groups[group_index]["params"]:
                found.setdefault((p.device, p.dtype), []).append(p)
            made = [Bucket(params, self._kept, self.compact) for params in found.values()]
            for bucket in made:
                self._adopt(bucket)
            self._buckets[group_index] = made
        return self._buckets[group_index]

    def _adopt(self, bucket: Bucket) -> None:
        """Give the bucket's step counts to states that exist already (a copied or unpickled optimiser)."""
        for i, p in enumerate(bucket.params):
            if p in self.state and "step" in self.state[p]:
                bucket.steps[i].copy_(self.state[p]["step"])
                self.state[p]["step"] = bucket.steps[i]

    def all_buckets(self) -> Iterator[tuple[dict[str, Any], Bucket]]:
        for index, group in enumerate(self.param_groups):
            for bucket in self.buckets(index):
                yield group, bucket

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """State tensors that a group's rule needs."""
        return self.STATE

    def new_state(self, bucket: Bucket, i: int, name: str) -> Tensor:
        """State tensor `name` of the bucket's parameter i before its first step."""
        return bucket.new_state(i)

    def states(self, group: dict[str, Any], bucket: Bucket, active: Iterable[int]) -> list[list[Tensor]]:
        """One list per name of `state_names`, each aligned with `active`; zeros where there was no state."""
        names = self.state_names(group)
        with contextlib.suppress(KeyError):  # at every step but the first
            found = [self.state[bucket.params[i]] for i in active]
            columns = [list(map(operator.itemgetter(name), found)) for name in names]
            return [list(map(part, column)) for column in columns] if bucket.sharded else columns
        rows = []
        for i in active:
            state = self.state[bucket.params[i]]
            if "step" not in state:
                state["step"] = bucket.steps[i]
            for name in names:
                if name not in state:
                    state[name] = self.new_state(bucket, i, name)
            rows.append([part(state[name]) for name in names])
        return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in names]

    def learning_rate(self, group: dict[str, Any], bucket: Bucket) -> Tensor:
        """The group's learning rate, 0-dim fp64 on the bucket's device."""
        value = group["lr"]
        if isinstance(value, Tensor) and value.dtype == torch.float64 and value.device == bucket.device:
            return value.squeeze() if value.dim() else value
        if isinstance(value, Tensor):
            return bucket.lr.copy_(value.squeeze())
        bucket.lr.fill_(value)
        if bucket.device.type == "cuda":
            group["lr"] = bucket.lr
        return bucket.lr

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; returns what `closure` returned, if given."""
        given = (self,) if closure is None else (self, closure)
        return (_observed_step if self._observed() else DeviceOptimizer._step)(*given)

    step.hooked = True  # type: ignore[attr-defined]
    # torch.optim wraps every step for hooks and profilers, 40 us; here only where there are any.

    def _observed(self) -> bool:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        )

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, bucket in self.all_buckets():
            self.update(group, bucket)
            if bucket.sharded:  # their parts were written, past them
                torch.autograd.graph.increment_version(bucket.params)
        return loss

    def update(self, group: dict[str, Any], bucket: Bucket) -> None:
        """Step the parameters of one bucket."""
        raise AssertionError("DeviceOptimizer is a base class; use FrozenAdamW, FrozenSGD or MaskAdam")

    def exported_state(self, state: dict[str, Any], bucket: Bucket, i: int, step: float) -> dict[str, Any]:
        """A parameter's state as torch.optim keeps it."""
        index = bucket.free_index(i)
        out: dict[str, Any] = {"step": torch.tensor(step)}
        for name in self.STATE:
            if name in state:
                out[name] = state[name] if index is None else _expanded(state[name], index, bucket.params[i])
        return out

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's own for the same algorithm: dense state in fp32, floats for learning rates.

        Compact state is expanded, with zeros where weights are kept. Reading step counts, it waits for the
        device.
        """
        result = super().state_dict()
        number = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        exported = {}
        for _, bucket in self.all_buckets():
            for i, (p, step) in enumerate(zip(bucket.params, bucket.steps.tolist(), strict=True)):
                if step > 0:
                    exported[number[p]] = self.exported_state(self.state[p], bucket, i, step)
        result["state"] = dict(sorted(exported.items()))
        result["param_groups"] = [
            {k: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in group.items()}
            for group in result["param_groups"]
        ]
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimiser, compact or not, or of torch.optim's for the same algorithm.

        State and tensor learning rates are written in place: a captured graph goes on from what was loaded.
        Raises InputError for amsgrad, which has no counterpart here, and for state of another shape.
        """
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise InputError("the state dict is of amsgrad=True, which is missing here; use torch.optim's")
        state, rates = self.state, [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        self.state = state
        for group, rate in zip(self.param_groups, rates, strict=True):
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            if isinstance(rate, Tensor):
                group["lr"] = rate.fill_(float(group["lr"]))
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        saved = {p: state_dict["state"].get(i, {}) for i, p in zip(saved_ids, params, strict=True)}
        for group, bucket in self.all_buckets():
            for i, p in enumerate(bucket.params):
                self._load(group, bucket, i, saved[p])

    def loaded_step(self, saved: dict[str, Any]) -> float:
        """Steps that a saved state has behind it."""
        return float(saved.get("step", 0))

    @torch.no_grad()
    def _load(self, group: dict[str, Any], bucket: Bucket, i: int, saved: dict[str, Any]) -> None:
        if not saved and bucket.params[i] not in self.state:
            return
        columns = self.states(group, bucket, [i])
        bucket.steps[i] = self.loaded_step(saved)
        index = bucket.free_index(i)
        for name, (target,) in zip(self.state_names(group), columns, strict=True):
            value = saved.get(name)
            if value is None:
                target.zero_()
                continue
            if value.is_floating_point() != target.is_floating_point():
                raise InputError(
                    f"state '{name}' is {value.dtype} and {target.dtype} here: the state dict is of moments in another "
                    "format; load it into a StreamedAdam, which converts"
                )
            whole = bucket.params[i]
            if value.shape != (whole if index is not None or is_shard(whole) else target).shape:
                raise InputError(
                    f"state '{name}' has shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(bucket.params[i].shape)}; load a state dict of the same model"
                )
            value = as_part(value.to(target.device), whole)
            target.copy_(value if index is None else value.reshape(-1)[index])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compact": self.compact, "_kept": self._kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_kept" in state:  # unpickled or copied; torch's load_state_dict comes here too
            self._buckets = {}


_observed_step = torch.optim.Optimizer.profile_hook_step(DeviceOptimizer._step)


def _with_parameters(keep: Keep, groups: Sequence[dict[str, Any]]) -> Iterable[tuple[Tensor, Tensor | None]]:
    """The masks of `keep`, each with its parameter."""
    params = [p for group in groups for p in group["params"]]
    if isinstance(keep, Mapping):
        names = {n: p for group in groups for n, p in zip(group.get("param_names", ()), group["params"], strict=False)}
        found = [(_named(key, names) if isinstance(key, str) else key, mask) for key, mask in keep.items()]
        if not {param for param, _ in found} <= set(params):
            raise InputError("keep names a tensor that is none of the optimiser's parameters; drop it")
        return found
    if not isinstance(keep, (list, tuple)):
        raise InputError(
            f"keep is a {type(keep).__name__}; expected {{parameter: mask}}, {{name: mask}} or a list of masks"
        )
    masks = list(keep)
    if len(masks) != len(params):
        raise InputError(
            f"keep holds {len(masks)} masks for {len(params)} parameters; give one each, None where nothing is kept"
        )
    return zip(params, masks, strict=True)


def _named(name: str, params: Mapping[str, Tensor]) -> Tensor:
    """The parameter of that name, or the weight of the layer of that name."""
    if not params:
        raise InputError(
            f"keep names '{name}', and the optimiser's parameters have no names; give it model.named_parameters()"
        )
    for full in (name, f"{name}.weight" if name else "weight"):
        if full in params:
            return params[full]
    raise InputError(f"keep names '{name}'; expected a parameter or a layer with a weight: {', '.join(params)}")


def _expanded(state: Tensor, index: Tensor, like: Tensor) -> Tensor:
    local = part(like)
    flat = torch.zeros(local.numel(), dtype=state.dtype, device=state.device)
    dense = torch.zeros_like(local, dtype=state.dtype).copy_(flat.index_copy_(0, index, state).view(local.shape))
    return as_shard(dense, like)


def non_negative(**values: float | Tensor) -> None:
    """Raise InputError for what is no finite number of at least 0; tensors are not read."""
    for name, value in values.items():
        if not isinstance(value, Tensor) and not (finite(value) and value >= 0):
            raise InputError(f"{name} is {value!r}; expected a finite number of at least 0")


def finite(value: object) -> bool:
    """Whether it is a finite real number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def valid_betas(betas: tuple[float, float]) -> None:
    pair = isinstance(betas, Sequence) and len(betas) == 2
    if not pair or not all(finite(beta) and 0 <= beta < 1 for beta in betas):
        raise InputError(f"betas is {betas!r}; expected two numbers in [0, 1)")
