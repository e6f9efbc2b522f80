"""merge: a masked network back to a plain one, with its deterministic masks baked into the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dwm_fast.errors import InputError
from dwm_fast.nn.layers import MaskedConv2d, MaskedLinear, draw
from dwm_fast.nn.model import MaskedModel, as_masked_model
from dwm_fast.nn.packed import PackedLayer, PackedLinear
from dwm_fast.nn.recast import drop_mask, recast
from dwm_fast.nn.shell import Shell, unwrapped


@torch.inference_mode(False)
def merge(masked: MaskedModel | nn.Module) -> nn.Module:
    """An ordinary nn.Module with the deterministic masks (or the edits) baked into the weights.

    Args:
        masked: what `mask_model` or `pack` returned; it is left as it is.

    Returns:
        A network of plain Linear and Conv2d layers, in the train/eval state of `masked`, that shares no
        storage with it and in eval() gives the output that `masked.eval()` gives. All its parameters are
        trainable.

    Raises:
        InputError: it is neither.

    Example:
        >>> import torch, dwm_fast as dwm
        >>> masked = dwm.mask_model(torch.nn.Linear(3, 2), dwm.Threshold()).eval()
        >>> plain, x = dwm.merge(masked), torch.ones(1, 3)
        >>> type(plain).__name__, torch.equal(plain(x), masked(x))
        ('Linear', True)
    """
    network = unwrapped(masked)
    if isinstance(network, nn.Module):
        packed = {name: layer for name, layer in network.named_modules() if isinstance(layer, PackedLayer)}
        if packed:
            return _unpacked(network, packed)
    masked = as_masked_model(masked, "merge")
    layers = list(masked.mask_layers().values())
    with torch.no_grad():
        baked, _, _ = draw(layers, masked.rng_state, masked.tau, training=False, baked=True)
    shell = Shell(masked.model, shared=())
    for name, weight in zip(masked.mask_layers(), baked, strict=True):
        shell.put(name, _plain_layer(shell.module.get_submodule(name), weight))
    shell.module.requires_grad_(True)
    return shell.module.train(masked.training)


def _unpacked(network: nn.Module, packed: Mapping[str, PackedLayer]) -> nn.Module:
    """A packed network with plain layers in the place of its packed ones."""
    shell = Shell(network, shared=())
    for name, layer in packed.items():
        plain: nn.Module = recast(layer, nn.Linear if isinstance(layer, PackedLinear) else nn.Conv2d)
        for tensor in ("backbone_weight", "values", "row_starts", "bits"):
            plain._parameters.pop(tensor, None)
            plain._buffers.pop(tensor, None)
        vars(plain).pop("_kept", None)
        plain.weight = nn.Parameter(layer.weight.detach())
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach().clone())
        shell.put(name, plain)
    shell.module.requires_grad_(True)
    return shell.module.train(network.training)


def _plain_layer(layer: nn.Module, weight: Tensor) -> nn.Module:
    """The Linear or Conv2d that `layer` was, with its hooks and settings, over `weight`."""
    plain: nn.Module
    if isinstance(layer, MaskedLinear):
        plain = recast(layer, nn.Linear)
    elif isinstance(layer, MaskedConv2d):
        plain = recast(layer, nn.Conv2d)
    else:
        raise InputError(f"merge met a {type(layer).__name__}; expected MaskedLinear or MaskedConv2d")
    drop_mask(plain)
    plain.weight = nn.Parameter(weight)
    return plain
