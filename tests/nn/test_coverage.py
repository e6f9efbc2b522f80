"""What masks cover is counted, and what they leave as it is is named: in a warning, an error, a report and the repr."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import dwm_fast as dwm
from dwm_fast.errors import InputError


class Gate(nn.Module):
    """A class that nobody knows, with a factor of its own."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.factor, self.shift = nn.Parameter(torch.randn(into, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.factor + self.shift


class Table(Gate):
    """Another one."""


NETS = {
    "88% of what the network multiplies by, and leaves as they are 8 weights in 1 Gate": lambda: nn.ModuleList(
        [Gate(2, 4), nn.Linear(6, 10)]
    ),
    "25% of what the network multiplies by, and leaves as they are 18 weights in 2 Table, 6 weights in 1 Gate": (
        lambda: nn.ModuleList([Gate(2, 3), Table(3, 3), Table(3, 3), nn.Linear(4, 2)])
    ),
}


@pytest.mark.parametrize("words", NETS)
def test_weights_without_a_mask_are_named_class_by_class_where_they_are_over_a_tenth(words: str) -> None:
    net = NETS[words]()
    with pytest.warns(UserWarning, match=rf"{words}; ask for their masks with also=, or name those modules"):
        masked = dwm.mask_model(net, dwm.GumbelSigmoid())
    assert f"of {sum(p.numel() for p in net.parameters()):,}, " in masked.extra_repr()


def test_nobody_is_warned_who_named_the_rest_asked_for_it_chose_the_layers_or_masks_nine_tenths() -> None:
    gates = nn.ModuleList([Gate(8, 8)])
    net = nn.ModuleDict({"gates": gates, "head": nn.Linear(8, 3), "tokens": nn.Embedding(900, 8)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dwm.mask_model(net, dwm.Threshold(), exclude=["gates.0"])
        dwm.mask_model(net, dwm.Threshold(), exclude=["gates"])
        dwm.mask_model(net, dwm.Threshold(), include=["head"])
        dwm.mask_model(net, dwm.Threshold(), also="gates.0")
        dwm.mask_model(nn.ModuleList([Gate(1, 8), nn.Linear(9, 8), nn.Embedding(99, 9)]), dwm.Threshold())


def test_the_report_counts_every_weight_once() -> None:
    net = nn.ModuleDict({"gate": Gate(2, 4), "head": nn.Linear(6, 12, bias=False), "tokens": nn.Embedding(5, 6)})
    net["again"] = nn.Linear(6, 12, bias=False)
    net["again"].weight = net["head"].weight
    masked = dwm.mask_model(net, dwm.Threshold(), tied="share")
    found = masked.coverage()
    assert found.masked == {"head": 72}
    assert found.rest == {"Gate": (1, 8)}
    assert found.tables == {"Embedding": (1, 30)}
    assert (found.masked_weights, found.share) == (72, 72 / 80)


def test_the_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.ModuleDict({"gate": Gate(2, 4), "head": nn.Linear(6, 12), "tokens": nn.Embedding(5, 6)})
    dwm.mask_model(net, dwm.Threshold()).print_coverage()
    assert capsys.readouterr().out.splitlines() == [
        "masked: 72 weights (90.00% of the weights) by 1 masks",
        "not masked: 8 weights in 1 Gate",
        "tables, not masked: 30 weights in 1 Embedding",
    ]


def test_a_network_without_maskable_weights_is_told_what_it_has_and_how_to_ask() -> None:
    net = nn.Sequential(Gate(8, 4))
    with pytest.raises(InputError, match=r"the model has: none at all; and, masked only by also=, 32 weights in 1 Gat"):
        dwm.mask_model(net, dwm.Threshold())
    assert list(dwm.mask_model(net, dwm.Threshold(), also="0").mask_layers()) == ["0.factor"]
    with pytest.raises(InputError, match=r"also=\['1'\] fits no .* and no parameter; the model has: 0.factor, 0.shift"):
        dwm.mask_model(net, dwm.Threshold(), also="1")
