"""StreamedModel: a masked network whose layers learn inside their backward; `mask_model(..., memory="streamed")`."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.nn import front, recompute
from dwm_fast.nn.kinds import MaskKind
from dwm_fast.nn.model import MaskedModel, Sampler
from dwm_fast.nn.select import literal
from dwm_fast.nn.streamed import Pass, Stepper, StreamedLayer
from dwm_fast.ops.coding import LOGITS
from dwm_fast.ops.draw import GUMBEL_MODES


class StreamedModel(MaskedModel):
    """A `MaskedModel` that saves nothing of a weight's size for its backward, and whose logits step inside it.

    `dwm_fast.optim.StreamedAdam` learns its masks. Everything else is as of a MaskedModel: keep masks, merging,
    packing, banks, saving.
    """

    memory = "streamed"

    def __init__(
        self, model: nn.Module, *, batch_norm: str = "frozen", seed: int | None = None, logits: str = "fp32"
    ) -> None:
        super().__init__(model, batch_norm=batch_norm, seed=seed)
        self.logits = logits
        for layer in self.streamed_layers():
            layer.store(LOGITS[logits])
        self._stepper: Stepper | None = None

    def attach_stepper(self, stepper: Stepper | None) -> None:
        """Let `stepper` step the layers' logits from now on; None: nobody."""
        self._stepper = stepper

    def attach_recorder(self, recorder: Sampler | None) -> None:
        raise InputError("the masked model has memory='streamed'; its optimiser is dwm_fast.optim.StreamedAdam")

    def streamed_layers(self) -> list[StreamedLayer]:
        """The masked layers, in the order of their numbers."""
        return [layer for layer in self._layers.values() if isinstance(layer, StreamedLayer)]

    @front.passes_on
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise InputError(
                "torch.compile does not trace streamed learning, whose backward changes the logits; compile parts "
                "of the network that hold no masked layer, or use mask_model(..., memory='plain')"
            )
        self._require_layers()
        with self._entered(recompute.pinned(self, self._begin) if self.training else self._deterministic()):
            return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def _entered(self, run: Pass) -> Iterator[None]:
        """While this lasts all layers belong to a pass."""
        layers = self.streamed_layers()
        before = [layer._run for layer in layers]
        for layer in layers:
            layer.enter(run)
        try:
            yield
        finally:
            for layer, outer in zip(layers, before, strict=True):
                layer.enter(outer)

    @contextlib.contextmanager
    def _masks_held(self) -> Iterator[None]:
        """As a MaskedModel's; nothing is learned from what is computed meanwhile."""
        self._require_layers()
        state = self.rng_state.clone()
        drawn = Pass(state, self.kind.current_tau(self.tau, state), self.kind.training_mode)
        with self._entered(drawn if self.training else self._deterministic()):
            yield

    def _begin(self) -> Pass:
        """A training pass, under a new draw."""
        refuse_several_processes()
        if self._stepper is None:
            raise InputError(
                "a streamed model in train() learns inside backward() and has no optimiser yet; make "
                "dwm_fast.optim.StreamedAdam(masked, ...) first, or call eval()"
            )
        trained = [name for name, layer in self._layers.items() if layer.frozen_weight.requires_grad]
        if trained:
            raise InputError(
                f"the weights of masked layers {', '.join(map(repr, trained))} require gradients, which a streamed "
                "model does not form; freeze them with requires_grad_(False), or use memory='plain'"
            )
        state = ops.advance(self.rng_state)
        return Pass(state, self.kind.current_tau(self.tau, state), self.kind.training_mode, self._stepper)

    def _deterministic(self) -> Pass:
        return Pass.deterministic(self.kind, self.rng_state.device)

    def sparsity_penalty(self) -> Tensor:
        """As a MaskedModel's, to read; for learning give `StreamedAdam` its `coefficient`."""
        value = super().sparsity_penalty()
        if not self.training:
            return value
        read: Tensor = _ReadPenalty.apply(value.detach().requires_grad_())
        return read

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_stepper": None}


class _ReadPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise InputError(
            "sparsity_penalty() of a streamed model has no gradient: logits step before the whole loss is known; give "
            "StreamedAdam(masked, coefficient=...), which adds the same gradient in each layer's step"
        )


def refuse_unstreamable(
    kind: MaskKind, mask_samples: int, logits: str, hosted: Collection[str], shared: Collection[str]
) -> None:
    """InputError for what a streamed model cannot do.

    Args:
        kind, mask_samples, logits: as for `mask_model`.
        hosted: names of the weights whose masks are on parameters, not in masked layers.
        shared: names of those that have several places.
    """
    for names, what in ((hosted, "neither a Linear nor a Conv2d layer's"), (shared, "of several places")):
        if names:
            raise InputError(
                "memory='streamed' learns the weights of Linear and Conv2d layers, each of one place; "
                f"{', '.join(names)}: {what}; leave out with exclude={list(map(literal, names))}, or use memory='plain'"
            )
    if kind.draws_itself:
        raise InputError(
            f"{kind!r} cannot be learned with memory='streamed', which knows the rules of dwm_fast.ops.Mode alone; use "
            "memory='plain'"
        )
    if mask_samples != 1:
        raise InputError(
            f"mask_samples={mask_samples} with memory='streamed'; expected 1: split the batch yourself and give "
            "StreamedAdam(..., accumulate=n), which has a mask for each part"
        )
    if logits not in LOGITS:
        raise InputError(f"logits={logits!r}; expected one of {', '.join(map(repr, LOGITS))}")
    if logits != "fp32" and kind.training_mode not in GUMBEL_MODES:
        raise InputError(
            f"logits='{logits}' with {kind.name}; expected GumbelSigmoid, whose logits are of a size that 16 bits can "
            "say: use logits='fp32'"
        )


def refuse_several_processes() -> None:
    """InputError where torch.distributed runs more than one process, each of which would step by its own gradients."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise InputError(
            f"streamed learning in {distributed.get_world_size()} processes; expected one: layers step before the "
            "gradients of several ranks could be added up; use memory='plain' with MaskAdam under "
            "DistributedDataParallel"
        )
