"""mask_model: masked layers, or masks on single parameters, in the place of a network's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dwm_fast.errors import InputError
from dwm_fast.nn.hosts import Host, as_host, borrow, put_mask
from dwm_fast.nn.kinds import MaskKind, checked_kind
from dwm_fast.nn.layers import MaskedConv2d, MaskedLayer, MaskedLinear
from dwm_fast.nn.model import MaskedModel
from dwm_fast.nn.select import MaskableWeight, Place, maskable_weights, share_tied
from dwm_fast.nn.shell import Shell
from dwm_fast.nn.streamed import streamed_layer
from dwm_fast.nn.streamed_model import StreamedModel, refuse_unstreamable


@torch.inference_mode(False)
def mask_model(
    model: nn.Module,
    kind: MaskKind,
    *,
    include: str | Iterable[str] = ("*",),
    exclude: str | Iterable[str] = (),
    mask_samples: int = 1,
    batch_norm: str = "frozen",
    seed: int | None = None,
    also: str | Iterable[str] = (),
    tied: str = "refuse",
    skip_unmaskable: bool = False,
    memory: str = "plain",
    logits: str = "fp32",
    noise: str = "shared",
    process_group: Any = None,
) -> MaskedModel:
    """Wrap a network so that its weights are seen through learned masks.

    Weights are those of Linear, Bilinear and of all convolutions, of attention, RNN, LSTM and GRU, of transformers'
    Conv1D, and of experts in one tensor. Linear and Conv2d layers become MaskedLinear and MaskedConv2d; any other
    module keeps its class and code, and reads its parameter masked. `masked.print_coverage()` says what is covered.

    The given model is left as it is. The masked weights share its storage (nothing the size of the weights is
    copied); everything else (biases, norms, what is not masked) is copied. Only the mask parameters
    are trainable; call requires_grad_() on what else should learn, a fresh head for instance.

    Args:
        model: any nn.Module.
        kind: GumbelSigmoid(...), Threshold(...), Edit(...), KernelSoft(...) or SemiStructured(...).
        include, exclude: shell patterns of names of layers, or of masks where a module has several
            ("attention.in_proj_weight"), e.g. include=["layer*"], exclude=["fc"]; commas part several in one text.
        mask_samples, batch_norm, seed, noise, process_group: see `MaskedModel`.
        also: patterns of what is masked only by request: embeddings, and parameters of two dimensions or more of
            modules of any other class; a bias by its parameter's full name.
        tied: "refuse" a weight that has several names, or "share": one mask for all its places.
        skip_unmaskable: leave out the layers that cannot be masked (see Raises), not refuse them.
        memory: "streamed" saves nothing of a weight's size for the backward pass and learns inside it, by
            `dwm_fast.optim.StreamedAdam`; for networks whose masks would not fit otherwise (docs/streamed.md).
        logits: of a streamed model, how its logits are stored: "fp32", "bf16" or "fixed16" (units of 2^-11).

    Returns:
        A MaskedModel; with memory="streamed" a StreamedModel, which is one.

    Raises:
        InputError: no weight fits the patterns, or one that fits cannot be masked: it is tied to another tensor,
            computed, quantised, or its module has a forward of its own object (the message names all of them,
            what to do, and what to exclude); or a weight has a shape that the kind has no mask for.

    Warns:
        UserWarning: more than a tenth of the weights lie in modules of other classes, and neither `exclude` nor
            `also` names them.

    Example:
        >>> import torch, dwm_fast as dwm
        >>> plain = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> masked = dwm.mask_model(plain, dwm.GumbelSigmoid(init=2.0), exclude=["2"])
        >>> [tuple(p.shape) for p in masked.mask_parameters()]
        [(8, 4)]
    """
    kind = checked_kind(kind)
    if memory not in ("plain", "streamed"):
        raise InputError(f"memory={memory!r}; expected 'plain' or 'streamed'")
    chosen = maskable_weights(model, include, exclude, also=also, skip_unmaskable=skip_unmaskable)
    chosen, places = share_tied(model, chosen, tied)
    hosted = _hosted(chosen, places)
    if memory == "streamed" and (noise != "shared" or process_group is not None):
        raise InputError(
            f"noise={noise!r} with memory='streamed', which learns in one process; expected 'shared', no process_group"
        )
    if memory == "streamed":
        refuse_unstreamable(kind, mask_samples, logits, hosted, places)
    elif logits != "fp32":
        raise InputError(f"logits={logits!r} with memory='plain'; expected 'fp32', or memory='streamed'")
    shell = Shell(model, [weight.weight for weight in chosen.values()])
    weights = {id(weight.weight) for weight in chosen.values()}
    for parameter in shell.module.parameters():
        if id(parameter) not in weights:
            parameter.requires_grad_(False)
    for name, weight in chosen.items():
        if memory == "streamed":
            plain = shell.module.get_submodule(weight.path)
            shell.exchange(plain, streamed_layer(plain, kind))
        else:
            try:
                _mask(shell, weight, kind, places.get(name, []), name in hosted)
            except InputError as error:
                raise InputError(f"layer '{name}': {error}") from error
    if memory == "streamed":
        return StreamedModel(shell.module, batch_norm=batch_norm, seed=seed, logits=logits)
    ranks = {"noise": noise, "process_group": process_group}
    return MaskedModel(shell.module, mask_samples=mask_samples, batch_norm=batch_norm, seed=seed, **ranks)


def _hosted(chosen: Mapping[str, MaskableWeight], places: Mapping[str, list[Place]]) -> list[str]:
    """Names of the weights whose module becomes a host: it has no masked layer, or has several masked tensors."""
    masked = {(weight.path, weight.attribute) for weight in chosen.values()}.union(*places.values())
    number = Counter(path for path, _ in masked)
    return [name for name, w in chosen.items() if w.layer_class() is None or number[w.path] > 1]


def _mask(shell: Shell, weight: MaskableWeight, kind: MaskKind, places: list[Place], hosted: bool) -> None:
    """Put the mask on one weight in the shell, and let the other places of a tied one read it too."""
    plain = shell.module.get_submodule(weight.path)
    mask: MaskedLayer
    if hosted:
        mask = put_mask(_host(shell, plain), weight.attribute, kind)
    else:
        linear = weight.layer_class() is nn.Linear
        make: Any = MaskedLinear.from_linear if linear else MaskedConv2d.from_conv
        mask = make(plain, kind, seed=0)
        shell.exchange(plain, mask)
    for path, attribute in places:
        there = shell.module.get_submodule(path)
        if there is not mask and getattr(there, "_masked_by", {}).get(attribute) is not mask:
            borrow(_host(shell, there), attribute, mask)


def _host(shell: Shell, module: nn.Module) -> Host:
    """The module as a host, in all its places."""
    host = as_host(module)
    if host is not module:
        shell.exchange(module, host)
    return host
