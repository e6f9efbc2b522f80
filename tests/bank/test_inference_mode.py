"""A bank or packed network that was made and used under inference mode serves calls with gradients afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dwm_fast as dwm

pytestmark = pytest.mark.usefixtures("reference")


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)).eval()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("added_inside", [False, True])
def test_a_bank_warmed_up_under_inference_mode_passes_gradients_as_a_fresh_one_does(mixed, added_inside):
    net, x = _net(), torch.randn(2, 3, 8, 8)
    head = nn.Linear(8 * 36, 3).state_dict()
    masks = {"0": torch.rand(8, 3, 3, 3) < 0.5, "4": torch.rand(3, 288) < 0.5}

    def filled() -> dwm.MaskBank:
        bank = dwm.MaskBank(net)
        for name in ("a", "b"):
            bank.add(name, masks, state={"4.bias": head["bias"]})
        return bank

    def call(bank: dwm.MaskBank, inputs: torch.Tensor) -> torch.Tensor:
        if mixed:
            return bank(inputs, domains=["a", "b"])
        bank.activate("a")
        return bank(inputs)

    if added_inside:
        with torch.inference_mode():
            bank = filled()
    else:
        bank = filled()
    with torch.inference_mode():
        call(bank, x)
    gradients = []
    for one in (bank, filled()):
        inputs = x.clone().requires_grad_()
        call(one, inputs).square().sum().backward()
        gradients.append(inputs.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)


def test_a_network_packed_under_inference_mode_passes_gradients():
    net = _net()
    with torch.inference_mode():
        packed = dwm.pack(dwm.mask_model(net, dwm.GumbelSigmoid()))
        packed(torch.randn(1, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    packed(x).sum().backward()
    assert x.grad.any()
