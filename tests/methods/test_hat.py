"""HAT: annealing, penalty and compensation against the paper's formulas, and what freezing units means."""

import math

import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.methods import HAT, TrainOptions
from dwm_fast.methods.hat import annealed, compensation, gated, penalty

from .toys import conv_maker, conv_net, image_task, images_for_tests


def test_sharpness_goes_from_one_over_smax_to_smax_along_a_line():
    assert [annealed(step, 5, 400.0) for step in range(5)] == pytest.approx(
        [1 / 400 + (400 - 1 / 400) * (b - 1) / (5 - 1) for b in range(1, 6)]
    )
    assert annealed(0, 1, 400.0) == 1 / 400


def test_the_penalty_asks_only_for_units_that_nobody_has():
    units = {"a": torch.tensor([0.5, 1.0, 0.25]), "b": torch.tensor([1.0])}
    before = {"a": torch.tensor([True, False, False]), "b": torch.tensor([False])}
    assert penalty(units, before) == pytest.approx((1.0 + 0.25 + 1.0) / 3)
    everything = {name: torch.ones_like(mask) for name, mask in before.items()}
    assert penalty(units, everything) == 0


def test_compensation_gives_the_gradient_that_a_sharpness_of_1_would():
    """With it, d sigmoid(s e)/de becomes smax times d sigmoid(e)/de: sigma' = 1 / (2 (cosh + 1))."""
    e = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(2.5, dtype=torch.float64)
    (s * e).sigmoid().sum().backward()
    mended = e.grad * compensation(e.detach(), s, 400.0)
    plain = torch.tensor([400 * math.exp(-x) / (1 + math.exp(-x)) ** 2 for x in e.tolist()], dtype=torch.float64)
    torch.testing.assert_close(mended, plain, rtol=1e-12, atol=0)


def test_gates_multiply_outputs_and_are_gone_afterwards():
    net, x = conv_net(), images_for_tests()
    before, units = net(x), {"conv1": torch.tensor([1.0, 0, 1, 0, 1, 0]), "conv2": torch.linspace(0, 1, 8)}
    with gated(net, units):
        found = net(x)
    y = net.bn1(net.conv1(x) * units["conv1"].view(1, 6, 1, 1)).relu()
    y = net.bn2(net.conv2(y) * units["conv2"].view(1, 8, 1, 1)).relu()
    assert torch.equal(found, net.fc(y.mean((2, 3))))
    assert torch.equal(net(x), before)


def test_rows_and_biases_of_needed_units_are_never_written_and_the_others_are():
    learner = HAT(TrainOptions(epochs=3, lr=0.05, batch_norm="frozen")).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    before, needed = dict(learner.shared), {k: m.clone() for k, m in learner.task_masks["photo"]["keep"].items()}
    assert all(mask.shape == (n,) for mask, n in zip(needed.values(), (6, 8), strict=True))
    figures = learner.learn(image_task("art"))
    assert figures["fraction_frozen"] == sum(int(m.sum()) for m in needed.values()) / 14
    for name, unit in needed.items():
        assert unit.any()
        assert not unit.all()
        old, new = before[f"{name}.weight"], learner.shared[f"{name}.weight"]
        assert torch.equal(old[unit], new[unit])
        assert (old[~unit] != new[~unit]).all()
    assert torch.equal(before["conv1.bias"][needed["conv1"]], learner.shared["conv1.bias"][needed["conv1"]])


def test_a_task_costs_a_bit_a_unit_and_its_bank_serves_its_network():
    learner = HAT(TrainOptions(epochs=1, lr=0.01, batch_norm="frozen")).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    learner.learn(image_task("art", classes=3))
    assert learner.bits("art") == 14 + 32 * 6  # and the bias of conv1, cut to the task's units
    bank = learner.bank()
    for name in ("photo", "art"):
        bank.activate(name)
        with torch.no_grad():
            assert torch.equal(bank(images_for_tests()), learner.network(name)(images_for_tests()))


def test_a_high_coefficient_leaves_fewer_units():
    def kept(coefficient):
        method = HAT(TrainOptions(epochs=6, lr=0.01, batch_norm="frozen"), coefficient=coefficient, embedding_lr=0.2)
        return method.learner(conv_maker, "fc").begin(image_task("photo"), conv_net())["fraction_kept"]

    assert kept(50.0) < kept(0.0)


def test_wrong_options_are_named():
    with pytest.raises(InputError, match="expected frozen or per-domain"):
        HAT(TrainOptions(batch_norm="shared"))
    with pytest.raises(InputError, match=r"largest is 1\.0; expected a sharpness above 1"):
        HAT(largest=1.0)
