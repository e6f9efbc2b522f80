"""Streamed learning: masked layers that save nothing of a weight's size, and learn inside their backward.

A layer saves its input and the pass it belongs to. Its backward draws the same mask again by the noise contract, forms
the gradient of its own masked weight, and hands it to the optimiser, which steps the logits there and then. So at any
time one layer's masked weight or gradient is in memory, whatever the size of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.nn import recompute
from dwm_fast.nn.kinds import MaskKind
from dwm_fast.nn.layers import MaskedConv2d, MaskedLayer, MaskedLinear
from dwm_fast.ops.autocast import autocast_dtype, autocast_operands, without_autocast
from dwm_fast.ops.coding import decoded, encoded


class Stepper(Protocol):
    """The optimiser of a streamed network, as its layers see it."""

    def take(self, layer: StreamedLayer, grad: Tensor, run: Pass) -> None:
        """The gradient of the layer's masked weight, from one use of the layer in the forward pass `run`."""
        ...


@dataclass(eq=False)
class Pass:
    """One forward pass of a streamed network: how its masks are drawn, and how often it used each layer.

    Attributes:
        state, tau, mode: as in `dwm_fast.ops.sample`, the same for every draw of the pass.
        stepper: who learns from it; None in eval().
        uses: layer -> times it was called, calls that a checkpoint repeats not counted again.
    """

    state: Tensor
    tau: Tensor
    mode: int
    stepper: Stepper | None = None
    uses: dict[StreamedLayer, int] = field(default_factory=dict)
    _versions: dict[StreamedLayer, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def deterministic(cls, kind: MaskKind, device: torch.device) -> Pass:
        """A pass in eval(), which reads neither noise nor temperature."""
        return cls(torch.zeros(2, dtype=torch.int64, device=device), torch.ones((), device=device), kind.eval_mode)

    def masked(self, layer: StreamedLayer, dtype: torch.dtype) -> Tensor:
        """The layer's masked weight; the same at each call."""
        weights, _, _ = ops.sample(
            [layer.mask_logits],
            [layer.frozen_weight],
            self.state,
            self.tau,
            mode=self.mode,
            layers=[layer.layer_index],
            thresholds=[layer.unit],
            dtype=dtype,
        )
        return weights[0]

    def count(self, layer: StreamedLayer) -> None:
        """One more use of the layer."""
        self.uses[layer] = self.uses.get(layer, 0) + 1
        self._versions.setdefault(layer, self._versions_of(layer))

    def require_unchanged(self, layer: StreamedLayer) -> None:
        """InputError where the layer's next draw would be another than that of the forward pass."""
        if self._versions.get(layer) != self._versions_of(layer):
            raise InputError(
                "the logits, weight or temperature of a streamed layer were changed between forward() and backward(), "
                "so that its mask cannot be drawn again; a layer steps inside its backward: run forward and backward "
                "of one batch after the other, and give several of them a step with StreamedAdam(..., accumulate=n)"
            )

    def _versions_of(self, layer: StreamedLayer) -> tuple[int, ...]:
        return layer.mask_logits._version, layer.frozen_weight._version, self.tau._version


class StreamedLayer(MaskedLayer):
    """What StreamedLinear and StreamedConv2d share; `mask_model(..., memory="streamed")` makes them.

    `mask_logits` takes no gradient from autograd: its steps are taken inside the backward pass.
    """

    _run: Pass | None = None

    def _init_mask(self, kind: MaskKind, seed: int | None) -> None:
        super()._init_mask(kind, seed)
        self.mask_logits.requires_grad_(False)

    @torch.no_grad()
    def store(self, dtype: torch.dtype) -> None:
        """Keep the logits as `dtype` from now on (`dwm_fast.ops.coding`), rounded to nearest."""
        if dtype != self.mask_logits.dtype:
            codes = encoded(decoded(self.mask_logits), dtype).contiguous()
            self.mask_logits = nn.Parameter(codes, requires_grad=False)

    def enter(self, run: Pass | None) -> None:
        """Belong to a pass from now on; None: to none."""
        self.__dict__["_run"] = run

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output by a masked weight."""
        raise AssertionError("StreamedLayer is a base class")

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the input."""
        raise AssertionError("StreamedLayer is a base class")

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Gradient of the masked weight."""
        raise AssertionError("StreamedLayer is a base class")

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the bias."""
        raise AssertionError("StreamedLayer is a base class")

    def _given(self) -> Tensor | None:
        """What reads `weight` while the network runs: something without values, since nothing may keep them."""
        return UnreadWeight(self.frozen_weight) if self._run is not None else None

    def _current(self) -> Pass:
        """The pass that this call belongs to, counted in it where a backward of its own will follow."""
        run = self._run
        if run is None:
            if not self.training:
                return Pass.deterministic(self.kind, self.frozen_weight.device)
            again: Pass | None = recompute.recall(self, draws=False)
            if again is None:
                raise InputError("a streamed layer learns inside its masked model alone; call the masked model")
            return again
        if run.stepper is not None and not recompute.in_backward():
            quiet = not torch.is_grad_enabled()
            repeats = (quiet or recompute.saved_tensors_hooks() is not None) and recompute.remember(self, run)
            if repeats or not quiet:
                run.count(self)
        return run

    def _streamed(self, x: Tensor) -> Tensor:
        run = self._current()
        dtype = autocast_dtype(self.frozen_weight)
        x, bias = autocast_operands(x, self.bias)
        anchor = torch.zeros((), requires_grad=True)
        output: Tensor = _Product.apply(x, bias, anchor, self, run, dtype)
        return output

    def stand_alone(self, seed: int | None = None) -> None:
        raise InputError(
            "a streamed layer learns inside its masked model alone; for a layer by itself use MaskedLinear or "
            "MaskedConv2d"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.mask_logits.grad = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_run": None}


class _Product(torch.autograd.Function):
    """Output of a streamed layer. The anchor, the last of its tensors, is a leaf whose edge calls for the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, anchor: Tensor, layer: StreamedLayer, run: Pass, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.run, ctx.dtype = layer, run, dtype
        return layer.product(x, run.masked(layer, dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer, run = ctx.layer, ctx.run
        learns = run.stepper is not None and _ends_in_leaves(ctx)
        if run.stepper is not None:
            run.require_unchanged(layer)
        with without_autocast(x.device.type):
            dx = layer.input_gradient(grad, x, run.masked(layer, ctx.dtype)) if ctx.needs_input_grad[0] else None
            dbias = layer.bias_gradient(grad) if ctx.needs_input_grad[1] else None
            if learns:
                run.stepper.take(layer, layer.weight_gradient(grad, x), run)
        return dx, dbias, None, None, None, None


def _ends_in_leaves(ctx: Any) -> bool:
    """Whether this backward fills `.grad` of leaves, so that logits are meant to learn from it."""
    try:
        return bool(torch._C._will_engine_execute_node(ctx.next_functions[-1][0]))
    except RuntimeError:  # torch.autograd.grad, which hands out gradients and changes nothing
        return False


class StreamedLinear(StreamedLayer, MaskedLinear):
    """A MaskedLinear that learns inside its backward (`mask_model(..., memory="streamed")`)."""

    def forward(self, input: Tensor) -> Tensor:
        return self._streamed(input)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad.matmul(weight)

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).t().mm(x.reshape(-1, x.shape[-1]))

    def bias_gradient(self, grad: Tensor) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).sum(0)


class StreamedConv2d(StreamedLayer, MaskedConv2d):
    """A MaskedConv2d that learns inside its backward (`mask_model(..., memory="streamed")`)."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        x, _ = ops.padded(input, self)
        return self._streamed(x)

    def _rest(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Stride, the padding that is left to do, and dilation."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        done = self.padding_mode != "zeros" or left != right or top != bottom
        return self.stride, (0, 0) if done else (top, left), self.dilation

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding, dilation = self._rest()
        return F.conv2d(x, weight, bias, stride, padding, dilation, self.groups)

    def _gradients(self, grad: Tensor, x: Tensor, weight: Tensor, of_input: bool) -> Tensor:
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *self._rest(), False, (0, 0), self.groups, (of_input, not of_input, False)
        )
        return found[0 if of_input else 1]

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._gradients(grad, x, weight, of_input=True)

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        # Its values are not read, as in torch.nn.grad.conv2d_weight.
        like = grad.new_empty(1).as_strided(self.frozen_weight.shape, (0,) * 4)
        return self._gradients(grad, x, like, of_input=False)

    def bias_gradient(self, grad: Tensor) -> Tensor:
        return grad.sum((0, 2, 3))


class UnreadWeight(Tensor):
    """The weight of a streamed layer while its network runs: shape, dtype and device, and no values."""

    @staticmethod
    def __new__(cls, like: Tensor) -> UnreadWeight:
        return Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )

    def __init__(self, like: Tensor) -> None:
        """All is done by __new__: torch builds the tensor there."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise InputError(
            "the weight of a streamed layer is read without a call of the layer (attention that multiplies by "
            "out_proj.weight, say), and autograd would keep it; leave that layer out with exclude=, or use "
            'mask_model(..., memory="plain")'
        )


def streamed_layer(plain: nn.Module, kind: MaskKind) -> StreamedLayer:
    """The streamed layer in the place of a Linear or Conv2d."""
    if isinstance(plain, nn.Linear):
        made: Any = StreamedLinear.from_linear(plain, kind, seed=0)
    else:
        made = StreamedConv2d.from_conv(plain, kind, seed=0)  # type: ignore[arg-type]
    layer: StreamedLayer = made
    return layer
