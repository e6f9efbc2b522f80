"""merge: a masked network back to a plain one, with its deterministic masks baked into the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import nn

from dwm_fast.nn.hosts import Host, MaskedParameter, bare
from dwm_fast.nn.layers import MaskedLayer, draw
from dwm_fast.nn.model import MaskedModel, as_masked_model
from dwm_fast.nn.packed import PackedLayer, PackedLinear, PackedParameter
from dwm_fast.nn.recast import drop_mask, recast
from dwm_fast.nn.shell import Shell, unwrapped


@torch.inference_mode(False)
def merge(masked: MaskedModel | nn.Module) -> nn.Module:
    """An ordinary nn.Module with the deterministic masks (or the edits) baked into the weights.

    Args:
        masked: what `mask_model` or `pack` returned; it is left as it is.

    Returns:
        A network of the classes that it had before it was masked, in the train/eval state of `masked`, that shares no
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
    if isinstance(network, nn.Module) and any(isinstance(layer, PackedLayer) for layer in network.modules()):
        return _unpacked(network)
    masked = as_masked_model(masked, "merge")
    with torch.no_grad():
        baked, _, _ = draw(
            list(masked.mask_layers().values()), masked.rng_state, masked.tau, training=False, baked=True
        )
    shell = Shell(masked.model, shared=())
    layers = [layer for layer in shell.module.modules() if isinstance(layer, MaskedLayer)]
    plain = {layer: nn.Parameter(weight) for layer, weight in zip(layers, baked, strict=True)}
    return _plain_again(shell, plain, _plain_layer).train(masked.training)


def _unpacked(network: nn.Module) -> nn.Module:
    """A packed network with plain layers in the place of its packed ones."""
    shell = Shell(network, shared=())
    plain = {m: nn.Parameter(m.weight.detach()) for m in shell.module.modules() if isinstance(m, PackedLayer)}
    return _plain_again(shell, plain, _unpacked_layer).train(network.training)


_Layer = TypeVar("_Layer", bound=nn.Module)


def _plain_again(
    shell: Shell, plain: Mapping[_Layer, nn.Parameter], make: Callable[[_Layer, nn.Parameter], nn.Module]
) -> nn.Module:
    """The shell's network with ordinary modules and these weights in the place of its masked ones, all trainable."""
    for layer, weight in plain.items():
        if not isinstance(layer, (MaskedParameter, PackedParameter)):
            shell.exchange(layer, make(layer, weight))
    by_id = {id(layer): weight for layer, weight in plain.items()}
    for host in [module for module in shell.module.modules() if isinstance(module, Host)]:
        shell.exchange(host, bare(host, by_id))
    return shell.module.requires_grad_(True)


def _unpacked_layer(layer: PackedLayer, weight: nn.Parameter) -> nn.Module:
    was = vars(layer).get("_plain_class", nn.Linear if isinstance(layer, PackedLinear) else nn.Conv2d)
    plain: nn.Module = recast(layer, was)
    for tensor in ("backbone_weight", "values", "row_starts", "bits"):
        plain._parameters.pop(tensor, None)
        plain._buffers.pop(tensor, None)
    for attribute in ("_kept", "_sparse", "not_sparse", "_plain_class"):
        vars(plain).pop(attribute, None)
    plain.weight = weight
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone())
    return plain


def _plain_layer(layer: MaskedLayer, weight: nn.Parameter) -> nn.Module:
    """The layer that `layer` was, with its hooks and settings, over `weight`."""
    plain = recast(layer, layer._plain_class)
    drop_mask(plain)
    vars(plain).pop("_plain_class", None)
    plain.weight = weight
    return plain
