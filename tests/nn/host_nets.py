"""One small network for every sort of module whose parameters are masked where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Conv1D(nn.Module):
    """GPT-2's: a Linear layer of another class, its weight transposed."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(into, out) / 2), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Experts(nn.Module):
    """Mixtral's: the weights of all experts in one tensor; scales are no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(3, 6, 8) / 2), nn.Parameter(torch.randn(3, 8, 6) / 2)
        self.scales = nn.Parameter(torch.rand(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(torch.einsum("bti,eio->ebto", x, self.up_proj))
        return torch.einsum("ebto,eoi,ec->bti", inner, self.down_proj, self.scales)


class Shifted(nn.Linear):
    """A Linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight.sum()


class Centred(nn.Conv2d):
    """A convolution with a rule of its own."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class First(nn.Module):
    """The first of what a module returns; attention is given its input three times."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        attends = isinstance(self.module, nn.MultiheadAttention)
        found: Tensor = (self.module(x, x, x) if attends else self.module(x))[0]
        return found


class TwoSteps(nn.Module):
    """A recurrent cell, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.cell(x, self.cell(x))
        return found


class Twice(nn.Module):
    """A bilinear layer over one input."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Bilinear(6, 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.both(x, x)
        return found


class Tied(nn.Module):
    """A language model's table of tokens, which is its head too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mid, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.mid(self.tokens(x))))
        return found


def _rows() -> Tensor:
    return torch.randn(3, 5, 6)


def _tokens() -> Tensor:
    return torch.randint(0, 9, (3, 5))


_THREE = {f"module.module.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")}

NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any], set[str]]] = {
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(5, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 1)), _rows, {}, {"0", "2"}),
    "Conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2)), lambda: torch.randn(3, 2, 4, 4, 4), {}, {"0"}),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(5, 4, 3, stride=2), _rows, {}, {""}),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 4, 3), lambda: torch.randn(3, 2, 4, 4), {}, {""}),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), lambda: torch.randn(3, 2, 3, 3, 3), {}, {""}),
    "Bilinear": (Twice, _rows, {}, {"both"}),
    "Conv1D": (lambda: nn.Sequential(Conv1D(8, 6), nn.GELU(), Conv1D(4, 8)), _rows, {}, {"0", "2"}),
    "experts": (
        lambda: nn.Sequential(nn.Linear(6, 6), Experts()), _rows, {}, {"0", "1.up_proj", "1.down_proj"},
    ),
    "forward of its own": (lambda: nn.Sequential(Shifted(6, 4), nn.Linear(4, 2)), _rows, {}, {"0", "1"}),
    "convolution of its own": (lambda: Centred(3, 4, 2), lambda: torch.randn(3, 3, 5, 5), {}, {""}),
    "RNN": (lambda: First(nn.RNN(6, 4, batch_first=True)), _rows, {}, {"module.weight_ih_l0", "module.weight_hh_l0"}),
    "GRU": (lambda: First(nn.GRU(6, 4, batch_first=True)), _rows, {}, {"module.weight_ih_l0", "module.weight_hh_l0"}),
    "LSTM": (
        lambda: First(nn.LSTM(6, 4, 2, batch_first=True)), _rows, {},
        {f"module.weight_{part}_l{layer}" for part in ("ih", "hh") for layer in (0, 1)},
    ),
    "projected LSTM, both ways": (
        lambda: First(nn.LSTM(6, 4, proj_size=2, bidirectional=True, batch_first=True)), _rows, {},
        {f"module.weight_{part}_l0{way}" for part in ("ih", "hh", "hr") for way in ("", "_reverse")},
    ),
    "GRUCell": (lambda: TwoSteps(), lambda: torch.randn(3, 6), {}, {"cell.weight_ih", "cell.weight_hh"}),
    "attention": (
        lambda: First(nn.MultiheadAttention(6, 2, batch_first=True)), _rows, {},
        {"module.in_proj_weight", "module.out_proj"},
    ),
    "attention of three weights": (
        lambda: First(_Cross()), _rows, {}, _THREE,
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), _rows, {},
        {"self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"},
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3)), _tokens, {"also": "0"}, {"0", "1"}),
    "bias and norm": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), _rows, {"also": "0.bias, 1.weight"},
        {"0", "0.bias", "1"},
    ),
    "tied": (Tied, _tokens, {"tied": "share"}, {"head", "mid"}),
    "tied, by its table": (Tied, _tokens, {"tied": "share", "also": "tokens"}, {"tokens", "mid"}),
    "one layer twice": (lambda: _twice(), _rows, {"tied": "share"}, {"0"}),
}  # fmt: skip
"""Sort -> the network, an input, options of mask_model, and the names of the masks."""


class _Cross(nn.Module):
    """Attention whose keys and values have other sizes than its queries, and so three weights."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.MultiheadAttention(4, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.module(x[..., :4], x, x)


def _twice() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer)
