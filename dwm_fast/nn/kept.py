"""KeptLinear: a packed linear layer that holds its kept weights alone, so that it reads less than a dense one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.nn.layers import MaskedLinear
from dwm_fast.nn.packed import PackedLinear
from dwm_fast.nn.recast import recast


class KeptLinear(PackedLinear):
    """Linear map by kept weights; `pack(masked, values="kept")` and `from_masked` make it.

    It holds weights of its own and none of the backbone: kept * b + 1 bits a weight of b bits.

    Attributes:
        values: the kept weights in the weight's logical order, then 32 zeros; frozen.
        row_starts: int64 (out_features + 1,), how many weights are kept before each row.
        bits, bias: as in every packed layer.

    Shape:
        input (..., in_features), output (..., out_features), in the input's dtype or autocast's.
    """

    values: Tensor
    row_starts: Tensor

    @classmethod
    def from_masked(cls, layer: MaskedLinear) -> KeptLinear:
        """The weights that the deterministic mask of `layer` keeps."""
        return cls.from_packed(PackedLinear.from_masked(layer))

    @classmethod
    def from_packed(cls, layer: PackedLinear) -> KeptLinear:
        """The weights that a packed layer keeps."""
        with torch.inference_mode(False), torch.no_grad():
            values, row_starts = ops.keep_values(layer.backbone_weight, layer.bits)
        kept = recast(layer, cls)
        del kept._parameters["backbone_weight"]
        kept.values = nn.Parameter(values, requires_grad=False)
        kept.register_buffer("row_starts", row_starts)
        return kept

    @property
    def weight(self) -> Tensor:
        """The masked weight, made anew at every access."""
        return ops.expand_values(self.values, self.bits, (self.out_features, self.in_features))

    @property
    def nbytes(self) -> int:
        """Bytes of values, bits and row starts."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.bits, self.row_starts))

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear_kept(input, self.values, self.row_starts, self.bits, self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Another mask may keep another number of weights; what does not fit together is refused before anything."""
        values, starts, bits = (state_dict.get(prefix + name) for name in ("values", "row_starts", "bits"))
        if values is not None and starts is not None and bits is not None:
            self._check_kept(prefix, values, starts, bits)
            if values.shape != self.values.shape:
                self.values = nn.Parameter(self.values.new_empty(values.shape), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_kept(self, prefix: str, values: Tensor, starts: Tensor, bits: Tensor) -> None:
        if bits.shape != self.bits.shape or starts.shape != self.row_starts.shape or values.dim() != 1 or bits.is_meta:
            return  # of another layer: torch names the shapes
        shape = (self.out_features, self.in_features)
        counts = ops.unpack(bits, [shape[0] * shape[1]])[0].view(shape).sum(1)
        expected = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(starts.device)
        if not torch.equal(starts, expected) or values.shape[0] != int(expected[-1]) + ops.PADDING:
            raise InputError(
                f"the state of '{prefix.rstrip('.')}' has {values.shape[0]} values and row starts that do not fit its "
                f"bits, which keep {int(expected[-1])} weights; give the state of one packed layer"
            )

    def _shape_repr(self) -> str:
        share = (self.values.numel() - ops.PADDING) / max(1, self.in_features * self.out_features)
        return f"{super()._shape_repr()}, kept={share:.3f}, bytes={self.nbytes:,}"


def lighter(layer: PackedLinear, values: str) -> PackedLinear:
    """`layer`, or its kept weights: where `values` is "kept", and for "auto" where that is faster."""
    if values == "all":
        return layer
    if values == "auto":
        kept = int(ops.count(layer.bits, [layer.backbone_weight.numel()])[0])
        if not ops.is_faster_kept(layer.backbone_weight, kept):
            return layer
    return KeptLinear.from_packed(layer)
