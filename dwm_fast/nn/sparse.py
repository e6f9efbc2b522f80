"""SparseLinear: a packed linear layer of a 2:4 mask, whose many rows run on sparse tensor cores."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast import ops
from dwm_fast.nn.packed import PackedLinear
from dwm_fast.nn.recast import recast
from dwm_fast.ops import backends, ways
from dwm_fast.ops.autocast import autocast_operands
from dwm_fast.ops.problem import rows_of
from dwm_fast.ops.transforms import transformed
from dwm_fast.ops.two_of_four import SPARSE, keeps_two_of_four, obstacle_of_device, obstacle_of_weight
from dwm_fast.ops.ways import STAGED, Choice, choose_for


class SparseLinear(PackedLinear):
    """Linear map under a packed 2:4 mask; `pack(masked, values="2:4")` makes it.

    Weight, bits and bias are those of a packed layer, and so are its state dict, files, copies and `merge`. On a GPU
    with sparse tensor cores it also holds what `torch.sparse.to_sparse_semi_structured` makes of the masked weight,
    9/16 of a 16-bit weight's bytes, from the first call that needs it on, and makes it anew when weight or bits change
    (a write through `.data` leaves no trace on a GPU). Sparse products take a fixed time of their own, so rows that
    are few enough for one pass over the bits never run there; nor does what a gradient is wanted of, what is compiled,
    and what `use_way` or `use_backend` forces. In all these cases it is a packed layer.

    Shape:
        input (..., in_features), output (..., out_features), in the input's dtype or autocast's.
    """

    _sparse: _Sparse | None = None

    @classmethod
    def from_packed(cls, layer: PackedLinear) -> SparseLinear:
        """A packed layer once more, of a mask that keeps at most two of every four."""
        return recast(layer, cls)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            y = self._on_sparse_cores(input)
            if y is not None:
                return y
        return super().forward(input)

    def _on_sparse_cores(self, input: Tensor) -> Tensor | None:
        weight, x = self.backbone_weight, input
        if weight.device.type != "cuda" or x.device != weight.device or not x.numel():
            return None
        x, bias = autocast_operands(x, self.bias)
        if self.obstacle(x) or self._reads_bits(x):
            return None
        held = self._current(x.dtype)
        if held is None or held.sparse is None:
            return None
        y = F.linear(rows_of(x).contiguous(), held.sparse, None if bias is None else bias.to(x.dtype))
        return y.contiguous().view(*x.shape[:-1], self.out_features)

    def obstacle(self, x: Tensor) -> str:
        """Why no sparse tensor core computes x, in the compute dtype, however many rows it has; ""."""
        weight = self.backbone_weight
        if backends.forced_backend() is not None or ways.forced_way() is not None:
            return "a backend or a way is forced"
        wanted = any(t is not None and t.requires_grad for t in (x, weight, self.bias))
        if wanted and torch.is_grad_enabled():
            return "a gradient is wanted"
        if weight.is_inference() or self.bits.is_inference():
            return "changes of tensors made under torch.inference_mode() could not be noticed"
        if transformed() or torch._C._get_tracing_state() is not None:
            return "torch.func, forward-mode differentiation or torch.jit.trace is at work"
        return obstacle_of_weight(tuple(weight.shape), x.dtype) or obstacle_of_device(weight.device)

    def _reads_bits(self, x: Tensor) -> bool:
        """Whether x has so few rows that the rule takes one pass over the bits for it."""
        backend = backends.chosen("linear_packed", "cuda")
        return choose_for("linear_packed", backend, x, self.backbone_weight).way != STAGED

    def _current(self, dtype: torch.dtype) -> _Sparse | None:
        """What is held of weight and bits as they are now; None where a graph is being captured and it is not there."""
        held = self._sparse
        if held is None or not held.is_current(self.backbone_weight, self.bits, dtype):
            if torch.cuda.is_current_stream_capturing():
                return None
            held = self.__dict__["_sparse"] = _Sparse(self.backbone_weight, self.bits, dtype)
        return held

    def choice(self, x: Tensor, staged: Choice) -> Choice:
        """What `explain` says of x (meta, in the compute dtype), for which packed layers take the way `staged`."""
        if staged.way != STAGED:
            return staged
        unfit = self.obstacle(x)
        if unfit:
            return Choice(STAGED, f"{staged.why}; not on sparse tensor cores: {unfit}")
        weight = self.backbone_weight
        if not keeps_two_of_four(self.bits, tuple(weight.shape)):
            return Choice(STAGED, f"{staged.why}; not on sparse tensor cores: {NOT_2_OF_4}")
        return Choice(
            SPARSE,
            f"M={rows_of(x).shape[0]} is too many for one pass over the bits, and the mask is 2:4; "
            f"{weight.numel() * x.dtype.itemsize * 9 // 16:,} bytes are held for it beside weight and bits, from the "
            "first such call on",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sparse": None}


class _Sparse:
    """The vendor's form of one masked weight, and what it was made of; `sparse` is None where the mask is not 2:4."""

    def __init__(self, weight: Tensor, bits: Tensor, dtype: torch.dtype) -> None:
        # An address may have become another tensor's: what lies there has to be the same tensor too.
        self._weight, self._bits = weakref.ref(weight), weakref.ref(bits)
        self._marks = _marks(weight, bits)
        self._dtype = dtype
        self.sparse: Tensor | None = None
        # Under inference mode it would be a tensor that no later call can use elsewhere.
        with torch.inference_mode(False), torch.no_grad():
            if keeps_two_of_four(bits, tuple(weight.shape)):
                masked = ops.apply(bits, [weight.detach()])[0].to(dtype).contiguous()
                self.sparse = torch.sparse.to_sparse_semi_structured(masked)
                torch.cuda.current_stream(weight.device).synchronize()  # the next call may come from another stream

    def is_current(self, weight: Tensor, bits: Tensor, dtype: torch.dtype) -> bool:
        """Whether weight, bits and dtype are still those that it was made of."""
        same = self._weight() is weight and self._bits() is bits
        return same and self._dtype == dtype and self._marks == _marks(weight, bits)


def _marks(weight: Tensor, bits: Tensor) -> tuple[Any, ...]:
    places = (weight.data_ptr(), weight._version, bits.data_ptr(), bits._version)
    return (*places, weight.shape, weight.stride(), weight.dtype, weight.device)


NOT_2_OF_4 = "some four neighbours of the mask keep more than two"


def sparser(layer: PackedLinear, values: str) -> tuple[PackedLinear, str]:
    """`layer`, or the same for sparse tensor cores where its mask is 2:4, and why not.

    values: "2:4" asks for it wherever shape and mask allow it, "auto" where dtype and device do so now.
    """
    weight = layer.backbone_weight
    shape = tuple(weight.shape)
    dtype = weight.dtype if values == "auto" else torch.bfloat16
    unfit = obstacle_of_weight(shape, dtype)
    if not unfit and values == "auto":
        unfit = obstacle_of_device(weight.device)
    if not unfit and not keeps_two_of_four(layer.bits, shape):
        unfit = NOT_2_OF_4
    return (layer, unfit) if unfit else (SparseLinear.from_packed(layer), "")
