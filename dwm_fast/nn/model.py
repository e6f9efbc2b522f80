"""MaskedModel: a network with masked layers, whose masks are drawn together by one operation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.nn import front, recompute
from dwm_fast.nn.coverage import Coverage, left_out
from dwm_fast.nn.hosts import MaskedParameter
from dwm_fast.nn.kinds import MaskKind
from dwm_fast.nn.layers import MaskedLayer, draw, stage
from dwm_fast.nn.noise import new_rng_state, new_tau
from dwm_fast.nn.ranks import Ranks
from dwm_fast.nn.recast import keep_dtype
from dwm_fast.nn.select import literal
from dwm_fast.nn.sharded import LaterDraw
from dwm_fast.nn.shell import unwrapped
from dwm_fast.ops.shards import is_shard, refuse_shards

NORM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
"""Layers that normalise by statistics which they may keep; what `batch_norm` means wherever it is asked for."""

NOISES = ("shared", "per-rank")
"""What ranks of torch.distributed draw."""

Drawn = tuple[Tensor, list[int], list[Tensor]]
"""A pass's penalty, the versions of the logits that it is of, and the penalties of draws that it is the mean of."""

_PARAMETER = frozenset({nn.Parameter})


class Sampler(Protocol):
    """What may draw in the place of `dwm_fast.ops.sample` in training, with its signature."""

    def sample(self, *args: Any, **kwargs: Any) -> tuple[list[Tensor], Tensor, Tensor]:
        """Masked weights, bits and penalty."""
        ...


class MaskedModel(nn.Module):
    """A network with masked layers. `mask_model` makes it; calling it is calling the network.

    In train() each call draws new masks, all layers by one operation, and advances the step of `rng_state`;
    in eval() the deterministic mask is used.

    To code that inspects it, it is its network: `forward` has the network's signature, and public attributes that it
    lacks (`config`, `device`, methods) are read from the network and set there. `generate` runs under one mask sample:
    in eval() the deterministic mask, in train() the one that the next training call draws; the noise does not move on.

    Args:
        model: network in which some layers are MaskedLinear or MaskedConv2d.
        mask_samples: independent masks per batch in train(): the batch is split in as many parts (Csordas:
            4); a batch of fewer samples gets a mask for each.
        batch_norm: "frozen" keeps batch and instance norm in eval mode in train() too; "train" does not.
        seed: seed of the mask noise; from torch's generator by default.
        noise: with torch.distributed, "shared": all ranks draw the same masks; "per-rank": each rank its own, rank r's
            j-th sample that which one process with mask_samples x ranks draws as number r * mask_samples + j. What is
            saved does not depend on the number of ranks.
        process_group: whose ranks those are: a ProcessGroup, or a DeviceMesh of one dimension; the default group by
            default. It may be set later, and is not saved.
    """

    memory, logits = "plain", "fp32"
    rng_state: Tensor
    tau: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        mask_samples: int = 1,
        batch_norm: str = "frozen",
        seed: int | None = None,
        noise: str = "shared",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if noise not in NOISES:
            raise InputError(f"noise={noise!r}; expected 'shared' or 'per-rank'")
        if process_group is not None and noise == "shared":
            raise InputError("process_group with noise='shared', which all ranks draw; expected noise='per-rank'")
        if not isinstance(mask_samples, int) or mask_samples < 1:
            raise InputError(f"mask_samples={mask_samples!r}; expected a whole number of at least 1")
        if batch_norm not in ("frozen", "train"):
            raise InputError(f"batch_norm='{batch_norm}'; expected 'frozen' or 'train'")
        self.mask_samples = mask_samples
        self.batch_norm = batch_norm
        self.noise = noise
        self._ranks = Ranks(process_group)
        self._layers = {mask_name(n, m): m for n, m in model.named_modules() if isinstance(m, MaskedLayer)}
        if not self._layers:
            raise InputError("the model has no masked layer; make one with dwm_fast.mask_model(model, kind)")
        kinds = {layer.kind for layer in self._layers.values()}
        if len(kinds) > 1:
            raise InputError(f"the layers have different mask kinds: {sorted(map(repr, kinds))}; expected one kind")
        self.kind: MaskKind = kinds.pop()
        self._places: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
        device = next(iter(self._layers.values())).frozen_weight.device
        self._seed = seed
        self.register_buffer("rng_state", new_rng_state(seed, device))
        self.register_buffer("tau", new_tau(self.kind, device))
        for index, layer in enumerate(self._layers.values()):
            layer.hand_over(index)
        self._drawn: Drawn | None = None
        self._recorder: Sampler | None = None
        self._observer: Callable[[list[Tensor]], None] | None = None
        self._held: list[Any] | None = None
        self.model = model  # from here on, names that are new here and not to the network are the network's
        front.dress(self)
        self.train(model.training)

    def mask_layers(self) -> dict[str, MaskedLayer]:
        """Masked layers by the name they have in the network; InputError when one was replaced."""
        self._require_layers()
        return dict(self._layers)

    def mask_parameters(self) -> Iterator[nn.Parameter]:
        """The learned tensors of all layers, for an optimiser."""
        return (layer.mask_logits for layer in self._layers.values())

    def keep_masks(self) -> dict[str, Tensor]:
        """Deterministic keep mask of every layer: name -> bool tensor of the learned tensor's shape, True = keep."""
        refuse_shards(self.mask_parameters(), "keep_masks")
        return {name: layer.keep_mask() for name, layer in self.mask_layers().items()}

    def coverage(self) -> Coverage:
        """How many weights have a mask, and what is left as it is; printed, it is a few lines."""
        layers = self.mask_layers()
        masked = {id(t) for layer in layers.values() for t in (layer.frozen_weight, layer.mask_logits)}
        return Coverage(
            {name: layer.frozen_weight.numel() for name, layer in layers.items()},
            left_out(self.model, masked=masked),
            left_out(self.model, masked=masked, tables=True),
        )

    def print_coverage(self) -> None:
        """Print `coverage()`: which share of the weights the masks cover, and what is left as it is."""
        print(self.coverage())

    def fraction_kept(self) -> float:
        """Fraction of all masked weights that the deterministic mask keeps."""
        masks = self.keep_masks().values()
        kept = torch.stack([m.sum() for m in masks]).sum()
        return int(kept) / sum(m.numel() for m in masks)

    def sparsity_penalty(self) -> Tensor:
        """Mean expected keep value over all masked weights, in [0, 1], 0-dim fp32, differentiable.

        With a scale kappa it is the mean of the drawn soft mask after a call in train(), mean sigmoid(kappa l) else.

        Divided by the number of weights, so a coefficient means the same for every network size. Between a
        call in train() and its backward it costs nothing: the draw computed it. Threshold, KernelSoft and
        SemiStructured have no penalty: 0.
        """
        drawn, self._drawn = self._drawn, None
        if drawn is not None and (torch.compiler.is_compiling() or self._still_differentiable(*drawn)):
            return drawn[0]
        refuse_shards(self.mask_parameters(), "sparsity_penalty", "ask for it after a call in train(), before backward")
        learned = [layer.mask_logits for layer in self._layers.values()]
        samples = self.mask_samples if self.noise == "shared" else self._of_ranks()[0]
        return self.kind.expected(learned, self.tau, self.rng_state, samples)

    def _of_ranks(self) -> tuple[int, int]:
        """With noise="per-rank", the mask samples of a step over all ranks, and the first of this rank's."""
        count, mine = self._ranks.count()
        return self.mask_samples * count, self.mask_samples * mine

    @property
    def process_group(self) -> Any:
        """Whose ranks draw masks of their own with noise="per-rank": what was given; None: the default group's."""
        return self._ranks.given

    @process_group.setter
    def process_group(self, given: Any) -> None:
        self._ranks = Ranks(given)

    def _still_differentiable(self, drawn: Tensor, versions: list[int], draws: list[Tensor]) -> bool:
        """Whether a drawn penalty is still that of the logits, and its graph neither used up nor absent."""
        if drawn.grad_fn is None:
            return not draws  # a rule without a penalty
        if versions != [p._version for p in self.mask_parameters()]:
            return False
        try:
            for one in draws:
                # Not `saved_tensors`: under a checkpoint, unpacking one runs the whole network again.
                _ = one.grad_fn._raw_saved_tensors  # type: ignore[union-attr]
        except RuntimeError:  # freed by a backward
            return False
        return True

    def _require_layers(self) -> None:
        """InputError when a masked layer is no longer in the network."""
        if self._places and all(home.get(key) is module for home, key, module in self._places):
            return
        there = set(self.modules())
        gone = [name for name, layer in self._layers.items() if layer not in there]
        if gone:
            raise InputError(
                f"masked layers were replaced after mask_model, which took them down: {', '.join(map(repr, gone))}; "
                f"replace them in the plain network first, or leave them out with exclude={list(map(literal, gone))}"
            )
        self._places = [(self._modules, "model", self.model), *_places(self.model, set(self._layers.values()))]

    def attach_recorder(self, recorder: Sampler | None) -> None:
        """Draw for training by `recorder.sample`, not `dwm_fast.ops.sample`, from now on; None: as before."""
        self._recorder = recorder

    def observe(self, observer: Callable[[list[Tensor]], None] | None) -> None:
        """Give the masked weights of every pass in train() to `observer`, layer by layer and in their graph; None: end.

        A regulariser of masked weights is a function of them.
        """
        self._observer = observer

    def _run(
        self, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], sample: int = 0, repeated: bool = False
    ) -> Any:
        """The network under this rank's mask sample of that number; a first pass in train() leaves the penalty."""
        layers, network, tau = list(self._layers.values()), self._modules["model"], self._buffers["tau"]
        assert network is not None
        assert tau is not None
        learned: list[Any] = [layer._parameters["mask_logits"] for layer in layers]
        samples, first = (self.mask_samples, 0) if self.noise == "shared" else self._of_ranks()
        options: dict[str, Any] = {"training": self.training, "step_offset": first + sample}
        if self.training:
            options |= {"samples": samples, **({} if self._recorder is None else {"sample": self._recorder.sample})}
        versions = [x._version for x in learned]
        plain = not torch.compiler.is_compiling() and _PARAMETER.issuperset(map(type, learned))
        later = None if plain or not any(map(is_shard, learned)) else LaterDraw(layers, state, tau, **options)
        if later is None:
            masked, _, penalty = draw(layers, state, tau, **options)
            found = masked, penalty, [penalty]
        else:
            masked = later.staged()
        stage(layers, masked)
        try:
            output = network(*args, **kwargs)
        finally:
            stage(layers, self._held or [None] * len(layers))
        if later is not None:
            found = later.close()
        if self.training and not repeated:
            # Past nn.Module's __setattr__, which takes microseconds.
            object.__setattr__(self, "_drawn", (found[1], versions, found[2]))
            if self._observer is not None:
                self._observer(found[0])
        return output

    @contextlib.contextmanager
    def _masks_held(self) -> Iterator[None]:
        """While this lasts the network itself may be called: under the mask of the next call, which is drawn now."""
        self._require_layers()
        layers, before = list(self._layers.values()), self._held
        samples, first = (self.mask_samples, 0) if self.noise == "shared" else self._of_ranks()
        options: dict[str, Any] = {"samples": samples, "step_offset": first} if self.training else {}
        options["training"] = self.training
        state = self.rng_state.clone()
        if any(is_shard(layer.mask_logits) for layer in layers):
            masked = LaterDraw(layers, state, self.tau, **options).staged()
        else:
            masked, _, _ = draw(layers, state, self.tau, **options)
        self._held = masked
        stage(layers, masked)
        try:
            yield
        finally:
            self._held = before
            stage(layers, before or [None] * len(layers))

    @front.passes_on
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self._require_layers()
        rng_state = self._buffers["rng_state"]  # past __getattr__, as in _run: it costs a microsecond
        assert rng_state is not None
        if not self.training:
            return self._run(rng_state.clone(), args, kwargs)
        samples = self.mask_samples if self.noise == "shared" else self._of_ranks()[0]
        advance = partial(ops.advance, rng_state, samples)
        repeated = recompute.in_backward()
        state = recompute.pinned(self, advance)
        if not repeated:
            # with it goes the last pass's graph, whose stream need not be that of this one
            object.__setattr__(self, "_drawn", None)
        if self.mask_samples == 1:
            return self._run(state, args, kwargs, repeated=repeated)
        return self._run_split(state, args, kwargs, repeated)

    def _run_split(self, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], repeated: bool) -> Tensor:
        samples = self.mask_samples
        if kwargs or not args or not all(isinstance(a, Tensor) and a.dim() > 0 for a in args):
            raise InputError(
                "mask_samples > 1 splits the batch in its first dimension: expected tensors with a batch "
                "dimension as positional arguments and nothing else; use mask_samples=1"
            )
        samples = max(1, min(samples, len(args[0])))
        parts = zip(*(a.tensor_split(samples) for a in args), strict=True)
        outputs = [self._run(state, part, {}, j, repeated) for j, part in enumerate(parts)]
        if not all(isinstance(output, Tensor) for output in outputs):
            raise InputError(
                f"mask_samples > 1 joins the outputs of the parts and got a {type(outputs[0]).__name__}; "
                "expected a model that returns one tensor; use mask_samples=1"
            )
        return torch.cat(outputs)

    def train(self, mode: bool = True) -> MaskedModel:
        super().train(mode)
        if self.batch_norm == "frozen":
            for module in self.model.modules():
                if isinstance(module, NORM_LAYERS):
                    module.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._drawn = None
        empty = self.tau.is_meta
        super()._apply(keep_dtype(fn, (self.tau,)), recurse)  # type: ignore[no-untyped-call]
        if empty and not self.tau.is_meta:  # to_empty: memory as it was found
            self.rng_state = new_rng_state(self._seed, self.tau.device)
            self.tau = new_tau(self.kind, self.tau.device)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            return front.of_network(self, name, error)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and front.is_of_network(self, name):
            setattr(self.model, name, value)
        else:
            super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> Any:
        raise InputError("a masked model cannot be scripted; script the plain network, dwm_fast.merge(masked)")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_drawn": None, "_recorder": None, "_observer": None, "_held": None, "_places": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_held": None, "noise": "shared", "_ranks": Ranks(), **state})  # type: ignore[no-untyped-call]
        front.dress(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not front.is_dressed(type(self)):
            return super().__reduce_ex__(protocol)
        return front.bare, (type(self)._bare_class,), self.__getstate__()  # type: ignore[attr-defined]

    def _get_name(self) -> str:
        """What trainers tell networks apart by: the network's class."""
        return getattr(front.network_class(self), "__name__", type(self).__name__)

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    def extra_repr(self) -> str:
        total = sum(layer.frozen_weight.numel() for layer in self._layers.values())
        every = sum(p.numel() for p in self.model.parameters()) - sum(p.numel() for p in self.mask_parameters())
        return (
            f"kind={self.kind.name}, masked_layers={len(self._layers)}, masked_weights={total:,} of {every:,}, "
            f"mask_samples={self.mask_samples}, batch_norm={self.batch_norm}"
            f"{'' if self.noise == 'shared' else ', noise=per-rank'}"
        )


def _places(
    module: nn.Module, layers: Container[nn.Module]
) -> list[tuple[dict[str, nn.Module | None], str, nn.Module]]:
    """For every module on the way to one of `layers`: the table that holds it, its key there, and the module."""
    found = []
    for key, child in module._modules.items():
        inside = _places(child, layers) if child is not None else []
        if child is not None and (inside or child in layers):
            found += [(module._modules, key, child), *inside]
    return found


def mask_name(path: str, layer: MaskedLayer) -> str:
    """What the mask of the module at `path` is called: by its layer, or by the parameter that it is on."""
    return layer.full_name(path) if isinstance(layer, MaskedParameter) else path


def as_masked_model(given: Any, what: str) -> MaskedModel:
    """The masked model that was given, out of its torch.compile and data-parallel wrappers; InputError for none."""
    masked = unwrapped(given)
    if not isinstance(masked, MaskedModel):
        raise InputError(f"{what} got {type(masked).__name__}; expected a MaskedModel, from dwm_fast.mask_model")
    refuse_shards(masked.mask_parameters(), what)
    return masked
