"""pack: a masked network for inference, whose layers hold the backbone's weight and one bit per weight, no logits."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.nn.baked import Kept
from dwm_fast.nn.hosts import Host, MaskedParameter, attach, repoint
from dwm_fast.nn.layers import MaskedConv2d, MaskedLayer, MaskedLinear
from dwm_fast.nn.model import MaskedModel, as_masked_model
from dwm_fast.nn.recast import drop_mask, recast
from dwm_fast.nn.shell import Shell
from dwm_fast.ops.autocast import autocast_operands

VALUES = ("auto", "kept", "2:4", "all")
"""Which weights the linear layers of a packed network hold."""


class PackedLayer(nn.Module):
    """What PackedLinear and PackedConv2d share; `pack` and `from_masked` make them.

    Attributes:
        backbone_weight: the backbone's weight, frozen; its storage may be shared with the backbone.
        bits: uint8 (packed_nbytes(weight.numel()),), LSB first in the weight's logical order, 1 = keep.
        bias: (N,) or None, never masked.
    """

    backbone_weight: Tensor
    bits: Tensor
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The masked weight, made anew at every access: for code that reads a weight without calling its layer."""
        return ops.apply(self.bits, [self.backbone_weight])[0]

    def _shape_repr(self) -> str:
        raise AssertionError("PackedLayer is a base class; use PackedLinear or PackedConv2d")

    def extra_repr(self) -> str:
        return f"{self._shape_repr()}, bias={self.bias is not None}, packed_bytes={self.bits.numel():,}"


_Packed = TypeVar("_Packed", bound=PackedLayer)


class PackedLinear(PackedLayer):
    """Linear map under a packed mask.

    Shape:
        input (..., in_features), output (..., out_features), in the input's dtype or autocast's.
    """

    in_features: int
    out_features: int
    not_sparse: str = ""
    """Why it was made no `SparseLinear` where `pack` was asked for those."""

    @classmethod
    def from_masked(cls, layer: MaskedLinear) -> PackedLinear:
        """The deterministic mask of `layer` as bits, over the same storage of its weight."""
        if not isinstance(layer, MaskedLinear):
            raise InputError(f"PackedLinear.from_masked got {type(layer).__name__}; expected a MaskedLinear")
        return _packed(layer, cls)

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear_packed(input, self.backbone_weight, self.bits, self.bias)

    def _shape_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedConv2d(PackedLayer):
    """Convolution under a packed mask.

    Shape:
        input (B, C, H, W), output (B, O, H', W'); channels_last in, channels_last out.
    """

    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]
    _kept: Kept | None = None

    @classmethod
    def from_masked(cls, layer: MaskedConv2d) -> PackedConv2d:
        """The deterministic mask of `layer` as bits, over the same storage of its weight."""
        if not isinstance(layer, MaskedConv2d):
            raise InputError(f"PackedConv2d.from_masked got {type(layer).__name__}; expected a MaskedConv2d")
        return _packed(layer, cls)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        x, padding = ops.padded(input, self)
        if x.dim() == 4 and not torch.compiler.is_compiling():
            y = self._by_kept(x, padding)
            if y is not None:
                return y
        return ops.conv2d_packed(
            x,
            self.backbone_weight,
            self.bits,
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def _by_kept(self, x: Tensor, padding: tuple[int, int]) -> Tensor | None:
        """By the masked weight that the layer keeps where it may; see `baked`."""
        fields = self.__dict__  # past nn.Module's __getattr__, which costs 2 us a tensor
        kept = fields.get("_kept")
        if kept is None:
            kept = fields["_kept"] = Kept()
        parameters = fields["_parameters"]
        x, bias = autocast_operands(x, parameters["bias"])
        how = (self.stride, padding, self.dilation, self.groups)
        found: Tensor | None = kept.conv2d(x, parameters["backbone_weight"], fields["_buffers"]["bits"], bias, how)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _shape_repr(self) -> str:
        out, inner, *window = self.backbone_weight.shape
        return f"{inner * self.groups}, {out}, kernel_size={tuple(window)}, stride={self.stride}, groups={self.groups}"


class PackedParameter(PackedLayer):
    """One bit per weight for a parameter of a module of any other class, whose code reads it masked; never called.

    On a CPU the masked tensor is kept between reads, as a packed convolution's is.
    """

    _kept: Kept | None = None

    def __init__(self, host: Host, attribute: str, bits: Tensor) -> None:
        super().__init__()
        self.__dict__["_host"] = host  # no child: the host is the parent
        self.attribute = attribute
        self.register_buffer("bits", bits)
        self.bias = None

    @property
    def backbone_weight(self) -> Tensor:  # type: ignore[override]
        """The backbone's weight, frozen, in the host's table."""
        host: Host = self.__dict__["_host"]
        weight = host._parameters[self.attribute]
        assert weight is not None
        return weight

    @property
    def weight(self) -> Tensor:
        """The masked weight."""
        weight, kept = self.backbone_weight, None
        if not torch.compiler.is_compiling():
            if self._kept is None:
                self.__dict__["_kept"] = Kept()
            kept = self._kept.masked(weight, self.bits) if self._kept is not None else None
        return ops.apply(self.bits, [weight])[0] if kept is None else kept

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _shape_repr(self) -> str:
        return f"{self.attribute}, {tuple(self.backbone_weight.shape)}"


@torch.inference_mode(False)
def pack(masked: MaskedModel, *, values: str = "auto") -> nn.Module:
    """A masked network for inference: every masked layer holds its weight and one bit per weight, and no logits.

    Args:
        masked: what `mask_model` returned; it is left as it is.
        values: which weights a linear layer holds. "all": the backbone's, shared. "kept": a copy of the kept ones
            (`KeptLinear`). "2:4": the backbone's, and many rows run on sparse tensor cores (`SparseLinear`), of a
            mask that keeps at most two of every four neighbours and a weight of whole blocks of 16 x 16; other layers
            hold all, and `explain` says why. "auto": kept ones where that is faster (`ops.is_faster_kept`: on a CPU,
            2^22 weights or more, fp32 or bf16, at most half of them kept), 2:4 ones on a GPU of sm_80 or later in bf16
            or fp16, else all. Convolutions hold all.

    Returns:
        A network in eval() with `PackedLinear` and `PackedConv2d` layers (modules of other classes read their
        parameters through bits), nothing in it trainable. The masked
        weights share storage with `masked` and with the network it was made from, so many packed networks
        stand on one backbone at 1/16 (16-bit weights) or 1/32 of its size each; all else is copied. Its output
        is that of `masked.eval()`: the same bits where the mask is applied first (`use_way("staged")`), and
        equal but for the rounding of sums where a product reads bits on the way.

    Raises:
        InputError: the mask is more than one bit per weight (ternary, edits, kernel-wise soft masks); bake it
            in with `dwm_fast.merge`. Or `values` is none of these.

    Example:
        >>> import torch, dwm_fast as dwm
        >>> masked = dwm.mask_model(torch.nn.Linear(64, 2), dwm.Threshold()).eval()
        >>> packed = dwm.pack(masked)
        >>> packed
        PackedLinear(in_features=64, out_features=2, bias=True, packed_bytes=16)
        >>> sorted(packed.state_dict())
        ['backbone_weight', 'bias', 'bits']
    """
    if values not in VALUES:
        raise InputError(f"pack got values={values!r}; expected one of {', '.join(VALUES)}")
    masked = as_masked_model(masked, "pack")
    layers = masked.mask_layers()
    shared = [t for layer in layers.values() for t in (layer.frozen_weight, layer.mask_logits)]
    shell = Shell(masked.model, shared)
    for layer in [module for module in shell.module.modules() if isinstance(module, MaskedLayer)]:
        _put_packed(shell, layer, values)
    return shell.module.requires_grad_(False).eval()


def _put_packed(shell: Shell, layer: MaskedLayer, values: str) -> None:
    """Bits in the place of one mask, for all who read it."""
    packed: PackedLayer
    if isinstance(layer, MaskedParameter):
        packed = PackedParameter(layer._host, layer.attribute, _bits(layer))
        attach(layer._host, layer.attribute, packed)
    elif isinstance(layer, MaskedLinear):
        packed = _linear(_packed(layer, PackedLinear), values)
        shell.exchange(layer, packed)
    else:
        packed = _packed(layer, PackedConv2d)
        shell.exchange(layer, packed)
    repoint(shell.module, layer, packed)


def _linear(layer: PackedLinear, values: str) -> PackedLinear:
    """`layer` in the form that `values` asks for."""
    from dwm_fast.nn.kept import lighter
    from dwm_fast.nn.sparse import sparser

    if values in ("auto", "2:4"):
        layer, why_not = sparser(layer, values)
        if values == "2:4":
            layer.not_sparse = why_not
            return layer
        if not why_not:
            return layer
    return lighter(layer, values)


def _bits(layer: MaskedLayer) -> Tensor:
    """The deterministic mask of a layer in packed form; InputError where it is more than that."""
    if layer.kind.form != "binary":
        raise InputError(
            f"a mask of kind {layer.kind!r} is more than one bit per weight and cannot be packed; bake it in with "
            "dwm_fast.merge(masked)"
        )
    return ops.pack([layer.keep_mask()])


def _packed(layer: MaskedLayer, cls: type[_Packed]) -> _Packed:
    bits = _bits(layer)
    packed = recast(layer, cls)
    drop_mask(packed)
    del packed._parameters["weight"]
    packed.backbone_weight = nn.Parameter(layer.frozen_weight.detach(), requires_grad=False)
    if layer.bias is not None:
        packed.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    packed.register_buffer("bits", bits)
    return packed
