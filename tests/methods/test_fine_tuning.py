"""none, domain after domain: plain fine-tuning is `train` on the network as it is, under the batch-norm policy."""

import copy

import pytest
import torch
from torch import nn

from dwm_fast.methods import FineTuning, TrainOptions, train

from .toys import conv_maker, conv_net, image_task

OPTIONS = {policy: TrainOptions(epochs=2, lr=0.01, batch_norm=policy) for policy in ("frozen", "shared", "per-domain")}
NORM = ("weight", "bias", "running_mean", "running_var")


def learned(policy):
    learner = FineTuning(OPTIONS[policy]).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    learner.learn(image_task("art", classes=3, seed=8))
    return learner


@pytest.mark.parametrize("policy", OPTIONS)
def test_it_is_the_same_training_as_the_two_domain_studys(policy):
    expected = conv_net()
    torch.manual_seed(8)
    expected.fc = nn.Linear(8, 3)
    task = image_task("art", classes=3)
    train(expected, task.batches, task.steps_per_epoch, OPTIONS[policy])
    mine = learned(policy).network("art").state_dict()
    assert all(torch.equal(mine[key], value) for key, value in expected.state_dict().items())


def test_an_earlier_task_has_its_own_head_over_the_newest_weights():
    learner = learned("shared")
    photo, art = learner.network("photo"), learner.network("art")
    assert torch.equal(photo.fc.weight, conv_net().fc.weight)
    assert torch.equal(photo.conv1.weight, art.conv1.weight)
    assert not torch.equal(photo.conv1.weight, conv_net().conv1.weight)


@pytest.mark.parametrize(("policy", "own"), [("per-domain", True), ("shared", False), ("frozen", False)])
def test_whose_batch_norm_an_earlier_task_is_seen_with(policy, own):
    learner = learned(policy)
    photo, art, start = learner.network("photo").bn2, learner.network("art").bn2, conv_net().bn2
    for name in NORM:
        now, newest, first = (getattr(norm, name) for norm in (photo, art, start))
        assert torch.equal(now, first if own else newest)
        assert torch.equal(newest, first) is (policy == "frozen")


@pytest.mark.parametrize(("policy", "bits"), [("per-domain", 32 * 4 * (6 + 8)), ("shared", 0), ("frozen", 0)])
def test_a_task_adds_nothing_but_its_batch_norm(policy, bits):
    learner = learned(policy)
    assert {learner.bits(name) for name in ("photo", "art")} == {bits}


def test_a_network_handed_out_is_a_copy():
    learner = learned("shared")
    network = learner.network("art")
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in learner.network("art").state_dict().items())
