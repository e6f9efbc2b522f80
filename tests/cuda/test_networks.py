"""Layers, banks and methods that take another branch on a GPU than on a CPU give the same numbers there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dwm_fast as dwm
from dwm_fast.methods.transfer import TrainOptions, make_optimizer
from dwm_fast.nn.layers import MaskedConv2d, MaskedLinear
from dwm_fast.ops.coding import decoded
from tests.bank import nets

pytestmark = pytest.mark.filterwarnings("ignore:dwm_fast. backend 'cuda' is not used")


def layers():
    torch.manual_seed(0)
    linear = MaskedLinear.from_linear(nn.Linear(12, 6), dwm.GumbelSigmoid(init=0.5), seed=3)
    conv = MaskedConv2d.from_conv(nn.Conv2d(4, 6, 3), dwm.GumbelSigmoid(init=0.5), seed=4)
    return [(linear.train(), torch.randn(5, 12)), (conv.train(), torch.randn(2, 4, 5, 5))]


@pytest.mark.parametrize("which", [0, 1], ids=["linear", "conv2d"])
def test_a_lone_layer_draws_in_its_product_what_it_draws_before_it_on_a_cpu(gpu, which):
    layer, x = layers()[which]
    again = copy.deepcopy(layer).to("cuda:0")
    assert again.draws_in_product() is True
    assert layer.draws_in_product() is False
    for _ in range(2):
        with dwm.use_backend("reference"):
            expected = layer(x)
            expected.square().sum().backward()
        found = again(x.to("cuda:0"))
        found.square().sum().backward()
        torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=0, atol=2e-5)
    torch.testing.assert_close(again.mask_logits.grad.cpu(), layer.mask_logits.grad, rtol=0, atol=1e-3)
    assert again.rng_state.tolist() == layer.rng_state.tolist()


def backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5)).eval()


def filled(model):
    bank = dwm.MaskBank(model)
    for seed, name in enumerate(("photo", "sketch", "art")):
        masked = dwm.mask_model(model, dwm.GumbelSigmoid(init=0.0), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for logits in masked.mask_parameters():
                logits.copy_(torch.randn(logits.shape, generator=generator))
        bank.add(name, masked)
    return bank


def test_a_bank_on_a_gpu_serves_what_it_serves_on_a_cpu(gpu):
    x, domains = torch.randn(5, 3, 5, 5), ["photo", "sketch", "photo", "art", "sketch"]
    with dwm.use_backend("reference"), torch.no_grad():
        here = filled(backbone())
        mixed = here(x, domains=domains)
        here.activate("sketch")
        single = here(x)
    with torch.no_grad():
        bank = filled(backbone().to("cuda:0"))
        found = bank(x.to("cuda:0"), domains=domains)
        bank.activate("sketch")
        alone = bank(x.to("cuda:0"))
    torch.testing.assert_close(found.cpu(), mixed, rtol=0, atol=2e-5)
    torch.testing.assert_close(alone.cpu(), single, rtol=0, atol=2e-5)
    assert any(x.kernel.startswith("bank_linear") for x in gpu.launches)


@pytest.mark.parametrize("own", [False, True])
def test_domains_with_heads_and_norms_of_their_own_are_served_on_a_gpu(gpu, own):
    classes, domains = (4, 7, 2), ["photo", "art", "sketch", "photo", "art"]
    results = []
    for device in ("cpu", "cuda:0"):
        net = nets.small_net()
        bank = dwm.MaskBank(copy.deepcopy(net).to(device))
        for i, name in enumerate(("photo", "sketch", "art")):
            state = {k: v.to(device) for k, v in nets.state_for(net, i, classes[i]).items()} if own else None
            bank.add(name, nets.masks_for(net, i), state=state)
        x = torch.randn(5, 3, 9, 9, generator=torch.Generator().manual_seed(2)).to(device)
        with dwm.use_backend("reference" if device == "cpu" else None), torch.no_grad():
            results.append(bank(x, domains=domains).cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=2e-5)


def test_a_plain_optimiser_s_rate_lives_on_the_gpu(gpu):
    model = nn.Linear(3, 2).to("cuda:0")
    optimizer = make_optimizer(model, TrainOptions(optimizer="adamw"), None)
    rate = optimizer.param_groups[0]["lr"]
    assert isinstance(rate, torch.Tensor)
    assert rate.device == torch.device("cuda:0")
    assert optimizer.param_groups[0]["capturable"] is True


@pytest.mark.parametrize(("logits", "moments"), [("fixed16", "fp32"), ("bf16", "bf16"), ("fp32", "8bit")])
def test_numbers_in_few_bits_are_read_and_learned_on_a_gpu(gpu, logits, moments):
    x, found = torch.randn(2, 3, 5, 5), []
    for device in ("cpu", "cuda:0"):
        kind = dwm.GumbelSigmoid(init=0.1)
        masked = dwm.mask_model(backbone(), kind, seed=1, memory="streamed", logits=logits).to(device)
        optimizer = dwm.optim.StreamedAdam(masked, moments=moments, coefficient=0.1)
        with dwm.use_backend("reference" if device == "cpu" else None):
            for _ in range(2):
                masked.train()(x.to(device)).square().sum().backward()
                optimizer.step()
            with torch.no_grad():
                output = masked.eval()(x.to(device)).cpu()
        found.append([output, *(decoded(p.detach()).cpu() for p in masked.mask_parameters())])
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=2e-5)
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        # gradients differ by their rounding, so a logit may have gone up in one and down in the other: a unit a step
        torch.testing.assert_close(b, a, rtol=0, atol=2 * 2.0**-11)
        assert not torch.equal(a, torch.full_like(a, float(a.flatten()[0])))
    kernels = [launch.kernel for launch in gpu.launches]
    assert kernels.count("coded_adam_kernel") == kernels.count("sample_bwd_kernel") == 4  # two layers, two steps


def test_packed_networks_run_from_their_bits(gpu):
    model = backbone()
    masked = dwm.mask_model(model, dwm.GumbelSigmoid(init=0.0), seed=1)
    x = torch.randn(2, 3, 5, 5)
    with dwm.use_backend("reference"), torch.no_grad():
        expected = dwm.pack(masked.eval())(x)
    with torch.no_grad():
        found = dwm.pack(copy.deepcopy(masked).to("cuda:0").eval())(x.to("cuda:0"))
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-5)
