"""Why the weight of a layer is none that a mask can be put on: computed anew in each call, quantised, sparse."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_PLAIN = ("Tensor", "FakeTensor", "FunctionalTensor")
"""Classes of tensors whose elements are what they say; quantised ones (torchao) claim the dtype that they stand for."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors of which one is made: itself, or what a class of tensors (quantised ones, say) keeps inside."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    names, _ = flatten()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def computed(module: nn.Module, attribute: str = "weight") -> str:
    """Which of a layer's masked tensor and bias is computed in each call, and how to undo that; "" for none."""
    for tensor in (attribute, "bias"):
        expected = tensor == attribute or isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
        if tensor not in module._parameters and (expected or isinstance(getattr(module, tensor, None), Tensor)):
            return f"has a computed {tensor}; {_undoing(module, tensor)}"
    return ""


def unfit(weight: nn.Parameter | None) -> str:
    """Why a mask cannot be put on a stored weight; "" where it can."""
    if weight is None:
        return "has no weight"
    stored = type(weight.data).__name__
    if weight.dtype not in _DTYPES or stored not in _PLAIN or weight.layout != torch.strided:
        return (
            f"has a weight of {weight.dtype} in a {stored} ({weight.layout}); "
            "expected fp32, fp64, bf16 or fp16, neither quantised nor sparse"
        )
    if weight.is_inference():
        return "was made under torch.inference_mode(); give a copy made outside of it, copy.deepcopy(model)"
    return ""


def _undoing(module: nn.Module, tensor: str) -> str:
    """What makes a computed tensor a plain parameter of its present value."""
    if parametrize.is_parametrized(module, tensor):
        return f"undo that with torch.nn.utils.parametrize.remove_parametrizations(layer, '{tensor}')"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == tensor:
            return f"undo that with torch.nn.utils.prune.remove(layer, '{tensor}')"
        for made, undo in ((WeightNorm, "remove_weight_norm"), (SpectralNorm, "remove_spectral_norm")):
            if isinstance(hook, made) and hook.name == tensor:
                return f"undo that with torch.nn.utils.{undo}(layer, '{tensor}')"
    return "make it a torch.nn.Parameter of the layer"
