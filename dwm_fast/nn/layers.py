"""MaskedLinear and MaskedConv2d: drop-in layers whose weight is seen through a learned mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.nn import recompute
from dwm_fast.nn.kinds import GumbelSigmoid, MaskKind, checked_kind
from dwm_fast.nn.noise import new_rng_state, new_tau
from dwm_fast.nn.recast import keep_dtype, recast
from dwm_fast.nn.stored import computed
from dwm_fast.nn.transforms import refuse_transforms
from dwm_fast.ops.autocast import autocast_dtype
from dwm_fast.ops.coding import decoded, encoded
from dwm_fast.ops.shards import is_shard


class MaskedLayer(nn.Module):
    """What MaskedLinear and MaskedConv2d share; not used alone.

    Attributes:
        weight: the backbone's weight, frozen unless made trainable again; while a MaskedModel runs, the
            masked weight of the moment, so that code that reads a layer's weight without calling it sees the
            mask too.
        mask_logits: the learned tensor, fp32 Parameter of the weight's shape: logits (GumbelSigmoid), real
            mask weights (Threshold) or edits (Edit); one number a kernel for KernelSoft, one a pattern for
            SemiStructured.
        kind: the mask kind.
        layer_index: the noise contract's layer number.
        rng_state: seed and step, int64 (2,); None when a MaskedModel draws for this layer.
    """

    weight: Tensor
    rng_state: Tensor | None
    tau: Tensor | None
    _seed: int | None = None
    _awaits_weights = False
    _unfilled = False
    _plain_class: type[nn.Module]
    """What the layer was before it was masked, and will be when the mask is merged."""
    _casts = True
    """Whether autocast may give the masked weight its own dtype when it is drawn; a parameter keeps its dtype there."""

    def _init_mask(self, kind: MaskKind, seed: int | None) -> None:
        self.kind = checked_kind(kind)
        self.layer_index = 0
        self._staged: Any = None  # a masked weight, or the draw that makes it
        self.weight.requires_grad_(False)
        self.mask_logits = nn.Parameter(kind.initial(self.weight.detach()))
        self.unit = kind.unit(self.weight)
        self._seed = seed
        self.register_buffer("rng_state", new_rng_state(seed, self.weight.device))
        self.register_buffer("tau", new_tau(kind, self.weight.device))

    @torch.no_grad()
    def reset_mask(self) -> None:
        """Give learned tensor, noise and temperature the values that they had when the layer was made."""
        self.mask_logits.copy_(encoded(self.kind.initial(self.frozen_weight.detach()), self.mask_logits.dtype))
        self.unit = self.kind.unit(self.frozen_weight)
        if self.rng_state is not None and self.tau is not None:
            self.rng_state.copy_(new_rng_state(self._seed, "cpu"))
            self.tau.copy_(new_tau(self.kind, "cpu"))

    def reset_parameters(self) -> None:
        """As the plain layer's; the mask starts anew."""
        super().reset_parameters()  # type: ignore[misc]
        if "mask_logits" in self._parameters:
            self.reset_mask()

    def hand_over(self, layer_index: int) -> None:
        """Let a MaskedModel draw for this layer from now on: its own noise and temperature are dropped."""
        self.layer_index = layer_index
        self.rng_state = None
        self.tau = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and not is_shard(self.__dict__["_parameters"].get(name)):  # a shard is the parameter's
            given = self._given()
            if given is not None:
                return given
        return super().__getattr__(name)

    def _given(self) -> Tensor | None:
        """The masked weight that a masked model made for this pass, or for the pass that a checkpoint repeats."""
        staged = self.__dict__.get("_staged")
        if staged is None:
            staged = recompute.recall(self, draws=self.__dict__["_buffers"].get("rng_state") is not None)
        elif not torch.compiler.is_compiling() and recompute.saved_tensors_hooks() is not None:
            recompute.remember(self, staged)
        if staged is None or isinstance(staged, Tensor):
            return staged
        weight: Tensor = staged.weight(self)  # a LaterDraw: this layer was a shard when the pass began
        return weight

    @property
    def frozen_weight(self) -> Tensor:
        """The backbone's weight, whether a MaskedModel is running or not."""
        weight = self._parameters.get("weight")
        if weight is None:
            raise InputError(f"a masked layer {computed(self)}; do so to the plain network, before mask_model")
        return weight

    def keep_mask(self) -> Tensor:
        """Deterministic keep mask, bool, True = keep; of the weight's shape, of KernelSoft the learned tensor's."""
        return self.kind.keep(self.mask_logits.detach())

    def masked_weight(self) -> Tensor:
        """The weight that the next matrix product sees, in the compute dtype; draws a mask in train()."""
        return self._in_compute_dtype(self._given())

    def _in_compute_dtype(self, given: Tensor | None) -> Tensor:
        """The masked weight: `given`, or the layer's own draw."""
        if given is None:
            state, tau = self._noise()
            masked, _, _ = draw([self], state, tau, training=self.training)
            return masked[0]
        if given.dtype == self.frozen_weight.dtype:
            return given  # autocast, where it is on, does the rest
        return given.to(autocast_dtype(self.frozen_weight))

    def _noise(self) -> tuple[Tensor, Tensor]:
        """Noise state of this pass's own draw, and the temperature that the kind may change by it."""
        if self.rng_state is None or self.tau is None:
            raise InputError(
                "this layer belongs to a masked model, which draws its masks; call the masked model, or give "
                "the layer its own noise with `layer.stand_alone()`"
            )
        rng_state = self.rng_state
        state = recompute.pinned(self, partial(ops.advance, rng_state)) if self.training else rng_state.clone()
        return state, self.tau

    def draws_in_product(self) -> bool:
        """Whether forward hands logits to the product, which then draws the mask where it multiplies.

        So on a GPU for a layer alone; on a CPU the masked weight is made first and kept for the backward.
        """
        alone = self._staged is None and self.rng_state is not None
        return alone and not self.kind.draws_itself and self.frozen_weight.is_cuda

    def _product_rule(self) -> dict[str, Any]:
        """What a product that draws the mask itself takes beside input, weight, logits and bias."""
        state, tau = self._noise()
        mode = self.kind.training_mode if self.training else self.kind.eval_mode
        return {
            "rng_state": state,
            "tau": self.kind.current_tau(tau, state),
            "layer": self.layer_index,
            "threshold": self.unit,
            "mode": mode,
        }

    def stand_alone(self, seed: int | None = None) -> None:
        """Give the layer its own noise and temperature, so that it can be called outside a masked model."""
        self._seed = seed
        with torch.inference_mode(False):
            self.rng_state = new_rng_state(seed, self.weight.device)
            self.tau = new_tau(self.kind, self.weight.device)

    def __prepare_scriptable__(self) -> Any:
        raise InputError("a masked layer cannot be scripted; script the plain network, dwm_fast.merge(masked)")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        fp32 = (self.mask_logits, self.mask_logits.grad, self.tau)
        was_meta = self.mask_logits.is_meta
        super()._apply(keep_dtype(fn, fp32), recurse)  # type: ignore[no-untyped-call]
        self._unfilled = self._unfilled or (was_meta and not self.mask_logits.is_meta)
        self._fill()
        return self

    def _fill(self) -> None:
        """Start values in memory that came without any, once the weight is there too.

        Nobody but the layer knows these values; the weights are for the caller to load or to reset.
        """
        if self._unfilled and not self.frozen_weight.is_meta:
            self.reset_mask()
            self._unfilled, self._awaits_weights = False, True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(f"{prefix}mask_logits")
        if isinstance(given, Tensor) and (given.dtype == torch.int16) != (self.mask_logits.dtype == torch.int16):
            state_dict[f"{prefix}mask_logits"] = encoded(decoded(given), self.mask_logits.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self._awaits_weights and f"{prefix}mask_logits" not in state_dict:
            self.reset_mask()  # start values may follow the weights
        self._awaits_weights = False
        self.unit = self.kind.unit(self.frozen_weight)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_staged": None}

    def _mask_repr(self) -> str:
        fields = ", ".join(f"{k}={v}" for k, v in self.kind.to_dict().items())
        return f"mask=({fields})"


_PARAMETER = frozenset({nn.Parameter})


def _unusual(tensors: Sequence[Tensor]) -> bool:
    """Whether a draw may be one that is refused: of other tensors than parameters, or under a transform."""
    if torch.compiler.is_dynamo_compiling():
        return False
    under = torch._C._functorch.maybe_current_level() is not None or torch._C._is_tracing()
    return under or torch.compiler.is_exporting() or not _PARAMETER.issuperset(map(type, tensors))


def draw(
    layers: Sequence[MaskedLayer], state: Tensor, tau: Tensor, *, baked: bool = False, **how: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What the kind of `layers` (one kind) draws for them: masked weights, no bits, and the penalty.

    Args:
        layers: masked layers.
        state, tau: as in `MaskKind.draw`, whose options `how` are.
        baked: whether masked weights keep their weights' dtype under autocast, which otherwise gives them its own.
    """
    # Past nn.Module's __getattr__, which costs 1 us a layer.
    learned: list[Any] = [layer._parameters["mask_logits"] for layer in layers]
    weights: list[Any] = [layer.frozen_weight for layer in layers]
    if _unusual(learned + weights):
        refuse_transforms(learned, weights)
    of_each: dict[str, Any] = {
        "layers": [layer.layer_index for layer in layers],
        "thresholds": [layer.unit for layer in layers],
    }
    casts = not baked and (torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled())
    mixed = any(weight.dtype != weights[0].dtype for weight in weights)
    casts = casts and not mixed and all(layer._casts for layer in layers)
    dtype = autocast_dtype(weights[0]) if casts else None
    return layers[0].kind.draw(learned, weights, state, tau, **of_each, **how, dtype=dtype)


def stage(layers: Sequence[MaskedLayer], weights: Sequence[Any]) -> None:
    """Give each layer the masked weight that it is to multiply with, or take it back (None)."""
    compiling = torch.compiler.is_compiling()
    for layer, weight in zip(layers, weights, strict=True):
        if compiling:
            layer._staged = weight
        else:
            layer.__dict__["_staged"] = weight  # past nn.Module's __setattr__, which costs 4 us a layer


class MaskedLinear(MaskedLayer, nn.Linear):
    """nn.Linear whose weight is seen through a learned mask; the bias is never masked.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear.
        kind: mask kind, GumbelSigmoid() by default.
        seed: seed of the mask noise; from torch's generator by default.

    Shape:
        input (..., in_features), output (..., out_features).
    """

    _plain_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kind: MaskKind | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._init_mask(kind or GumbelSigmoid(), seed)

    @classmethod
    def from_linear(cls, layer: nn.Linear, kind: MaskKind | None = None, seed: int | None = None) -> MaskedLinear:
        """A masked layer over the storage of `layer`'s weight (shared, not copied) and a copy of its bias."""
        if not isinstance(layer, nn.Linear):
            raise InputError(f"from_linear got {type(layer).__name__}; expected a torch.nn.Linear")
        return _adopt(recast(layer, cls), type(layer), kind, seed)

    def forward(self, input: Tensor) -> Tensor:
        given = self._given()
        if given is None and self.draws_in_product():
            return ops.linear(input, self.frozen_weight, self.mask_logits, self.bias, **self._product_rule())
        return F.linear(input, self._in_compute_dtype(given), self.bias)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self._mask_repr()}"


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """nn.Conv2d whose weight is seen through a learned mask; the bias is never masked.

    Args:
        in_channels ... padding_mode, device, dtype: as in nn.Conv2d.
        kind: mask kind, GumbelSigmoid() by default.
        seed: seed of the mask noise; from torch's generator by default.

    Shape:
        input (B, C, H, W), output (B, O, H', W'); channels_last in, channels_last out.
    """

    _plain_class = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        kind: MaskKind | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Conv2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )
        self._init_mask(kind or GumbelSigmoid(), seed)

    @classmethod
    def from_conv(cls, layer: nn.Conv2d, kind: MaskKind | None = None, seed: int | None = None) -> MaskedConv2d:
        """A masked layer over the storage of `layer`'s weight (shared, not copied) and a copy of its bias."""
        if not isinstance(layer, nn.Conv2d):
            raise InputError(f"from_conv got {type(layer).__name__}; expected a torch.nn.Conv2d")
        return _adopt(recast(layer, cls), type(layer), kind, seed)

    def forward(self, input: Tensor) -> Tensor:
        given = self._given()
        if given is None and input.dim() == 4 and self.draws_in_product():
            x, padding = ops.padded(input, self)
            return ops.conv2d(
                x,
                self.frozen_weight,
                self.mask_logits,
                self.bias,
                **self._product_rule(),
                stride=self.stride,
                padding=padding,
                dilation=self.dilation,
                groups=self.groups,
            )
        output: Tensor = self._conv_forward(input, self._in_compute_dtype(given), self.bias)
        return output

    def extra_repr(self) -> str:
        plain: str = nn.Conv2d.extra_repr(self)  # type: ignore[no-untyped-call]
        return f"{plain}, {self._mask_repr()}"


_Masked = TypeVar("_Masked", bound=MaskedLayer)


def _adopt(masked: _Masked, plain: type[nn.Module], kind: MaskKind | None, seed: int | None) -> _Masked:
    """Make a recast layer of class `plain` a masked one: weight shared, bias its own."""
    if why := computed(masked):
        raise InputError(f"the layer {why}")
    masked.weight = nn.Parameter(masked.weight.detach(), requires_grad=False)
    if masked.bias is not None:
        masked.bias = nn.Parameter(masked.bias.detach().clone(), requires_grad=masked.bias.requires_grad)
    masked._plain_class = plain
    masked._init_mask(kind or GumbelSigmoid(), seed)
    return masked
