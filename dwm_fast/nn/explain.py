"""explain: which way computes a masked layer on inputs of a given shape, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from dwm_fast.errors import BackendUnavailable, InputError
from dwm_fast.nn import baked
from dwm_fast.nn.baked import obstacle
from dwm_fast.nn.hosts import MaskedParameter
from dwm_fast.nn.kept import KeptLinear
from dwm_fast.nn.layers import MaskedConv2d, MaskedLayer, MaskedLinear
from dwm_fast.nn.packed import PackedConv2d, PackedLayer, PackedLinear, PackedParameter
from dwm_fast.nn.sparse import SparseLinear
from dwm_fast.ops import backends, padded
from dwm_fast.ops.autocast import autocast_dtype
from dwm_fast.ops.geometry import Geometry
from dwm_fast.ops.kept import weight_like
from dwm_fast.ops.ways import STAGED, Choice, choose_for


@dataclass(frozen=True)
class Explanation:
    """The way and the reason of each direction; of a packed layer, mask_gradient is that of its weight."""

    forward: Choice
    input_gradient: Choice
    mask_gradient: Choice

    def __str__(self) -> str:
        return "\n".join(f"{f.name.replace('_', ' ')}: {getattr(self, f.name)}" for f in fields(self))


_STAGED_ALONE = Choice(STAGED, "the layer makes its masked weight first and keeps it for the backward")
_STAGED_TOGETHER = Choice(STAGED, "its masked model makes the masked weights of all layers at once")


def explain(layer: nn.Module, input_shape: Sequence[int], *, dtype: torch.dtype | None = None) -> Explanation:
    """Which way computes `layer` on an input of `input_shape`, for the forward and both gradients, and why.

    Args:
        layer: MaskedLinear, MaskedConv2d, PackedLinear or PackedConv2d; its device and the measured tables of
            that device count (docs/kernels.md).
        input_shape: (..., in_features) or (B, C, H, W); for a 1x1 convolution taken to be channels_last.
        dtype: of the input; the weight's own (autocast's, where it is on) by default.

    Raises:
        InputError: another layer, or a shape that does not fit it.

    Example:
        >>> import torch, dwm_fast as dwm
        >>> layer = dwm.pack(dwm.mask_model(torch.nn.Linear(64, 8), dwm.Threshold()))
        >>> print(dwm.explain(layer, (100, 64)).forward.way)
        staged
    """
    if not isinstance(layer, (MaskedLayer, PackedLayer)) or isinstance(layer, (MaskedParameter, PackedParameter)):
        raise InputError(
            f"explain got {type(layer).__name__}; expected MaskedLinear, MaskedConv2d, PackedLinear or PackedConv2d"
        )
    _check_shape(layer, input_shape)
    if isinstance(layer, KeptLinear):
        return _explained(layer, input_shape, dtype)
    if isinstance(layer, MaskedLayer) and not layer.draws_in_product():
        reason = _STAGED_TOGETHER if layer.rng_state is None else _STAGED_ALONE
        return Explanation(reason, reason, reason)
    kind = "linear" if isinstance(layer, (MaskedLinear, PackedLinear)) else "conv2d"
    packed = isinstance(layer, PackedLayer)
    name = f"{kind}_packed" if packed else kind
    operations = (name, f"{name}_input_grad", f"{name}_weight_grad" if packed else f"{name}_mask_grad")
    choices = [_choice(op, layer, input_shape, dtype) for op in operations]
    if isinstance(layer, PackedLinear):
        choices[0] = _with_sparse_cores(layer, choices[0], input_shape, dtype)
    return Explanation(*choices)


def _with_sparse_cores(layer: PackedLinear, choice: Choice, shape: Sequence[int], dtype: torch.dtype | None) -> Choice:
    """The choice of a packed layer once more where sparse tensor cores were asked for."""
    if layer.not_sparse:
        return Choice(choice.way, f"{choice.why}; not on sparse tensor cores: {layer.not_sparse}")
    if not isinstance(layer, SparseLinear):
        return choice
    x = torch.empty(tuple(shape), dtype=dtype or autocast_dtype(layer.backbone_weight), device="meta")
    return layer.choice(x, choice)


def _explained(layer: KeptLinear, shape: Sequence[int], dtype: torch.dtype | None) -> Explanation:
    dense = layer.in_features * layer.out_features * layer.values.element_size()
    forward = _choice("linear_kept", layer, shape, dtype)
    why = f"{forward.why}; it holds {layer.nbytes:,} bytes, {dense:,} where all weights are stored"
    expanded = Choice(STAGED, "the gradient is torch's product with the masked weight, put together for it")
    return Explanation(Choice(forward.way, why), expanded, Choice(STAGED, "kept weights are frozen: none is computed"))


def _weight(layer: MaskedLayer | PackedLayer) -> torch.Tensor:
    if isinstance(layer, KeptLinear):
        return weight_like(layer.values, layer.row_starts, layer.in_features)
    return layer.backbone_weight if isinstance(layer, PackedLayer) else layer.frozen_weight


def _check_shape(layer: MaskedLayer | PackedLayer, shape: Sequence[int]) -> None:
    weight = _weight(layer)
    if weight.dim() == 2:
        fits, expected = len(shape) > 0 and shape[-1] == weight.shape[1], f"(..., {weight.shape[1]})"
    else:
        assert isinstance(layer, (MaskedConv2d, PackedConv2d))
        channels = weight.shape[1] * layer.groups
        fits, expected = len(shape) == 4 and shape[1] == channels, f"(B, {channels}, H, W)"
    if not fits:
        raise InputError(f"explain got an input of shape {tuple(shape)}; expected {expected}")


def _choice(op: str, layer: MaskedLayer | PackedLayer, shape: Sequence[int], dtype: torch.dtype | None) -> Choice:
    if not isinstance(layer, PackedConv2d) or op != "conv2d_packed" or obstacle(layer.backbone_weight, layer.bits):
        return _choice_of_rule(op, layer, shape, dtype)
    nbytes = layer.backbone_weight.numel() * layer.backbone_weight.element_size()
    kept, budget = baked.kept_bytes(), baked.BUDGET
    if kept + nbytes <= budget or (layer._kept is not None and layer._kept.holds_any()):
        return Choice(STAGED, f"its masked weight is kept from the first call on, {nbytes:,} bytes of a budget of "
                              f"{budget:,} for the process; in fp32 laid out for oneDNN where the input is "
                              "channels_last, or the channels come in blocks of 16")  # fmt: skip
    choice = _choice_of_rule(op, layer, shape, dtype)
    no_room = f"its masked weight, {nbytes:,} bytes, is not kept: the process keeps {kept:,} of {budget:,} by now"
    return Choice(choice.way, f"{choice.why}; {no_room}")


def _choice_of_rule(
    op: str, layer: MaskedLayer | PackedLayer, shape: Sequence[int], dtype: torch.dtype | None
) -> Choice:
    weight = _weight(layer)
    try:
        backend = backends.chosen(op, weight.device.type)
    except BackendUnavailable as error:
        return Choice(STAGED, str(error))
    x = torch.empty(tuple(shape), dtype=dtype or autocast_dtype(weight), device="meta")
    if not isinstance(layer, (MaskedConv2d, PackedConv2d)):
        return choose_for(op, backend, x, weight)
    x, padding = padded(x.contiguous(memory_format=torch.channels_last), layer)
    return choose_for(op, backend, x, weight, None, Geometry(layer.stride, padding, layer.dilation, layer.groups))
