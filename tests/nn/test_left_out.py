"""What no mask reaches is said: in a warning where it is most of a network, in an error where all, and in the repr."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import dwm_fast as dwm
from dwm_fast.errors import InputError


class Conv1D(nn.Module):
    """GPT-2's: a Linear layer of another class, its weight transposed."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(into, out)), nn.Parameter(torch.zeros(out))


class Experts(nn.Module):
    """Mixtral's: the weights of all experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 8))


NETS = {
    "96 weights in 2 Conv1D": lambda: nn.ModuleList([Conv1D(8, 4), Conv1D(16, 4), nn.Linear(4, 2)]),
    "512 weights in 1 Experts": lambda: nn.Sequential(Experts(), nn.Linear(4, 8)),
    "960 weights in 1 LSTM": lambda: nn.ModuleList([nn.LSTM(6, 8, 2), nn.Linear(8, 3)]),
    "80 weights in 1 MultiheadAttention": lambda: nn.ModuleList([nn.MultiheadAttention(4, 2, kdim=8, vdim=8)]),
    "160 weights in 1 Conv1d": lambda: nn.Sequential(nn.Conv1d(4, 8, 5), nn.ReLU(), nn.Linear(4, 3)),
    "600 weights in 1 Conv3d, 48 weights in 1 ConvTranspose2d": lambda: nn.ModuleList(
        [nn.ConvTranspose2d(3, 4, 2), nn.Conv3d(3, 8, (1, 5, 5)), nn.Conv2d(3, 4, 1)]
    ),
}


@pytest.mark.parametrize("words", NETS)
def test_a_network_whose_weights_are_mostly_out_of_reach_is_named_class_by_class(words: str) -> None:
    net = NETS[words]()
    with pytest.warns(UserWarning, match=rf"leaves as they are {words}; name those modules in exclude="):
        masked = dwm.mask_model(net, dwm.GumbelSigmoid())
    weights = sum(p.numel() for p in net.parameters())
    assert f"of {weights:,}, " in masked.extra_repr()


def test_nobody_is_warned_who_named_the_rest_or_chose_the_layers_or_masks_most() -> None:
    rnn = nn.ModuleList([nn.LSTM(6, 8)])
    net = nn.ModuleDict({"rnn": rnn, "head": nn.Linear(8, 3), "tokens": nn.Embedding(900, 8)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dwm.mask_model(net, dwm.Threshold(), exclude=["rnn.0"])
        dwm.mask_model(net, dwm.Threshold(), exclude=["rnn"])
        dwm.mask_model(net, dwm.Threshold(), include=["head"])
        dwm.mask_model(nn.ModuleList([nn.Conv1d(2, 2, 1), nn.Linear(2, 2), nn.Embedding(99, 9)]), dwm.Threshold())


def test_a_network_without_maskable_layers_is_told_what_it_has() -> None:
    with pytest.raises(InputError, match=r"the model has: none at all; and, never masked, 32 weights in 1 Conv1D$"):
        dwm.mask_model(nn.Sequential(Conv1D(8, 4)), dwm.Threshold())
