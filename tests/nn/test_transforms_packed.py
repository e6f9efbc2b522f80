"""torch.func and forward-mode derivatives go through packed layers in their inputs, and are those of plain layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import dwm_fast as dwm
from dwm_fast import ops
from dwm_fast.errors import InputError

X = torch.randn(3, 16, 6, 6, generator=torch.Generator().manual_seed(0))


def networks(values: str, bias: bool) -> tuple[nn.Module, nn.Module]:
    """A packed network, its filters of whole blocks of channels, and the same with plain layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(576, 7))
    masked = dwm.mask_model(net, dwm.Threshold()).eval()
    with torch.no_grad():
        for logits in masked.mask_parameters():
            logits.normal_()
    return dwm.pack(masked, values=values), dwm.merge(masked).requires_grad_(False)


def _forward_mode(net, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.cos(x)))).tangent


TRANSFORMS = {
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (torch.cos(x),))[1],
    "forward_ad": _forward_mode,
    "vjp": lambda net, x: torch.func.vjp(net, x)[1](torch.ones(len(x), 7))[0],
    "jacfwd": lambda net, x: torch.func.jacfwd(net)(x[:1]),
    "vmap": lambda net, x: torch.func.vmap(net)(x[None])[0],
    "vmap of grad": lambda net, x: torch.func.vmap(torch.func.grad(lambda one: net(one[None]).sum()))(x),
}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("values", "bias"), [("all", False), ("all", True), ("kept", False)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_in_the_input_are_those_of_plain_layers(name, values, bias, last):
    packed, plain = networks(values, bias)
    x = X.contiguous(memory_format=torch.channels_last) if last else X
    packed(x)  # what is kept from here on is no hindrance
    found, expected = TRANSFORMS[name](packed, x), TRANSFORMS[name](plain, x)
    # sums of at most 576 terms in two orders
    torch.testing.assert_close(found, expected, rtol=576 * 2.0**-23, atol=576 * 2.0**-23 * float(expected.abs().max()))
    assert expected.abs().max() > 0


def test_a_mixed_batch_is_followed_where_its_layers_are_torchs_and_refused_elsewhere():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(576, 7))
    for budget in (1 << 20, 1):
        bank = dwm.MaskBank(net, memory_budget=budget)
        for name in ("art", "photo"):
            bank.add(name, {"0.weight": torch.rand(16, 16, 3, 3) < 0.5})
        domains = ["art", "photo", "art"]
        jvp = lambda: torch.func.jvp(lambda x: bank(x, domains=domains), (X,), (torch.cos(X),))[1]  # noqa: B023, E731
        if budget == 1:  # filters from bits
            with pytest.raises(InputError, match="bank_conv2d has no forward-mode derivative"):
                jvp()
            continue
        for i, name in enumerate(domains):
            bank.activate(name)
            alone = torch.func.jvp(bank, (X[i : i + 1],), (torch.cos(X[i : i + 1]),))[1]
            torch.testing.assert_close(jvp()[i : i + 1], alone)


def test_operations_of_a_bank_refuse_forward_mode():
    weight, x, offsets = torch.randn(4, 8), torch.randn(2, 8), torch.tensor([0, 1, 2])
    bits = torch.stack([ops.pack([torch.ones(4, 8)])] * 2)
    values, starts = ops.keep_union(weight, bits)
    for name, call in (
        ("bank_linear", lambda t: ops.bank_linear(t, weight, bits, None, offsets, 2)),
        ("bank_linear_union", lambda t: ops.bank_linear_union(t, values, starts, bits, None, offsets, 2)),
    ):
        with pytest.raises(InputError, match=f"{name} has no forward-mode derivative"):
            torch.func.jvp(call, (x,), (x,))
