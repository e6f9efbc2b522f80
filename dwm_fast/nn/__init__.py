"""Masked layers, mask kinds, and networks made of them."""

from dwm_fast.nn.explain import Explanation, explain
from dwm_fast.nn.io import load_masked, save_masked
from dwm_fast.nn.kept import KeptLinear
from dwm_fast.nn.kinds import Edit, GumbelSigmoid, KernelSoft, MaskKind, Threshold, kind_from_dict
from dwm_fast.nn.layers import MaskedConv2d, MaskedLayer, MaskedLinear
from dwm_fast.nn.masking import mask_model
from dwm_fast.nn.merge import merge
from dwm_fast.nn.model import MaskedModel
from dwm_fast.nn.packed import PackedConv2d, PackedLinear, pack
from dwm_fast.nn.ranks import check_ranks
from dwm_fast.nn.register import register_kind
from dwm_fast.nn.schedule import LinearSchedule, TauSchedule
from dwm_fast.nn.select import maskable_weights
from dwm_fast.nn.semi_structured import SemiStructured
from dwm_fast.nn.sparse import SparseLinear
from dwm_fast.nn.streamed import StreamedConv2d, StreamedLayer, StreamedLinear
from dwm_fast.nn.streamed_model import StreamedModel
from dwm_fast.nn.top_k import TopK

__all__ = [
    "Edit",
    "Explanation",
    "GumbelSigmoid",
    "KeptLinear",
    "KernelSoft",
    "LinearSchedule",
    "MaskKind",
    "MaskedConv2d",
    "MaskedLayer",
    "MaskedLinear",
    "MaskedModel",
    "PackedConv2d",
    "PackedLinear",
    "SemiStructured",
    "SparseLinear",
    "StreamedConv2d",
    "StreamedLayer",
    "StreamedLinear",
    "StreamedModel",
    "TauSchedule",
    "Threshold",
    "TopK",
    "check_ranks",
    "explain",
    "kind_from_dict",
    "load_masked",
    "mask_model",
    "maskable_weights",
    "merge",
    "pack",
    "register_kind",
    "save_masked",
]
