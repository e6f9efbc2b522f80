"""Hidden networks: which scores are kept, the identity gradient, and what a task stores."""

import pytest
import torch
from torch import nn

import dwm_fast as dwm
from dwm_fast.errors import InputError
from dwm_fast.methods import TopScores
from dwm_fast.methods._real_masks import RealMaskOptions
from dwm_fast.nn import TopK, kind_from_dict

from .toys import conv_maker, conv_net, image_task


def test_the_largest_scores_are_kept_and_the_gradient_passes_to_all():
    torch.manual_seed(0)
    net, x = nn.Linear(5, 4, bias=False), torch.randn(3, 5)
    masked = dwm.mask_model(nn.Sequential(net), TopK(0.25))
    (scores,) = masked.mask_parameters()
    wanted = torch.zeros(20, dtype=torch.bool)
    wanted[sorted(range(20), key=lambda i: -scores.flatten()[i])[:5]] = True
    keep = masked.keep_masks()["0"]
    assert torch.equal(keep.flatten(), wanted)
    y = masked.train()(x)
    torch.testing.assert_close(y, x @ (net.weight * keep).T, rtol=0, atol=1e-6)  # 1 - s + s is 1 to a rounding
    y.sum().backward()
    torch.testing.assert_close(scores.grad, net.weight.detach() * x.sum(0))
    assert torch.equal(masked.eval()(x), nn.functional.linear(x, net.weight * keep))


def test_a_kind_is_plain_data_and_refuses_what_is_no_density():
    assert kind_from_dict(TopK(0.3, spread=0.1).to_dict()) == TopK(0.3, spread=0.1)
    with pytest.raises(InputError, match=r"density is 1\.5; expected a fraction"):
        TopK(1.5)


def test_every_layer_keeps_its_density_at_a_bit_a_weight():
    learner = TopScores(TopK(0.25), RealMaskOptions(epochs=2, lr=0.05)).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    before = {name: tensor.clone() for name, tensor in learner.shared.items()}
    figures = learner.learn(image_task("art", classes=3))
    masks = learner.masks("art")["keep"]
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"conv1": round(162 / 4), "conv2": 432 // 4}
    assert figures["fraction_kept"] == (round(162 / 4) + 108) / (162 + 432)
    assert learner.bits("art") == 162 + 432
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.shared.items())
