"""Lottery tickets: the rounds of pruning and rewinding, written out again."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dwm_fast.errors import InputError
from dwm_fast.methods import LotteryTicket, TrainOptions
from dwm_fast.methods.lottery import survivors

from .toys import INPUTS, trained_mlp, vector_batches, vector_task

SGD = TrainOptions(epochs=1, lr=0.05, optimizer="sgd", weight_decay=0.0, schedule="constant")


def start_network():
    torch.manual_seed(4)
    return torch.nn.Sequential(torch.nn.Linear(INPUTS, 48), torch.nn.ReLU(), torch.nn.Linear(48, 4))


def test_the_smallest_of_what_is_left_go():
    weight = torch.tensor([0.0, -5.0, 1.0, 2.0, -3.0, 0.5])
    kept = torch.tensor([False, True, True, True, True, True])
    assert survivors(weight, kept, 0.4).tolist() == [False, True, False, True, True, False]
    assert survivors(weight, kept, 0.01).tolist() == kept.tolist()  # round(0.05) of them


def test_two_rounds_are_those_of_the_paper():
    """Round 2 in plain autograd: the start values under the mask, SGD with momentum 0.9 on the masked network."""
    model, start = trained_mlp(), start_network().state_dict()
    task = dataclasses.replace(vector_task(), start=start)
    found = LotteryTicket(rounds=2, prune=0.3, options=SGD).find(model, task)
    masks = {}
    for name in ("0", "2"):
        size = model.get_submodule(name).weight.detach().abs().flatten()
        masks[name] = (size > size.sort().values[round(0.3 * size.numel()) - 1]).view(
            model.get_submodule(name).weight.shape
        )
    values = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    speed = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    for x, y in vector_batches(1):  # the second round's epoch
        hidden = F.linear(x, values["0.weight"] * masks["0"], values["0.bias"]).relu()
        loss = F.cross_entropy(F.linear(hidden, values["2.weight"] * masks["2"], values["2.bias"]), y)
        for name, gradient in zip(values, torch.autograd.grad(loss, list(values.values())), strict=True):
            speed[name] = 0.9 * speed[name] + gradient
            with torch.no_grad():
                values[name] -= 0.05 * speed[name]
    for name, mask in masks.items():
        size = values[f"{name}.weight"].detach().abs()[mask]
        cut = size.sort().values[round(0.3 * size.numel()) - 1]
        expected = mask & (values[f"{name}.weight"].detach().abs() > cut)
        assert int((expected != found.keep[name]).sum()) <= 2  # rounding may swap the two weights beside the cut
        assert int(found.keep[name].sum()) == int(expected.sum())
    assert [row["fraction_kept"] for row in found.history] == pytest.approx([1.0, 0.7], abs=1e-3)


def test_the_network_is_left_alone_and_a_start_is_needed():
    model = trained_mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    LotteryTicket(rounds=2, options=SGD).find(
        model, dataclasses.replace(vector_task(), start=start_network().state_dict())
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(InputError, match="rewinds weights to their start"):
        LotteryTicket().find(model, vector_task())
