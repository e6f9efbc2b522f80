"""Pruning to a density or a pattern: one-shot scores by hand, LEAP and MaskLLM on a toy task, and what they promise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dwm_fast as dwm
from dwm_fast.errors import InputError
from dwm_fast.methods import LEAP, Magnitude, MaskLLM, MaskTraining, Wanda, meet_density, pruning_methods
from dwm_fast.methods.one_shot import input_norms
from tests.methods.toys import conv_net, trained_mlp, under_mask, vector_batches, vector_task

SHORT = MaskTraining(steps=120, lr=0.01)


@pytest.fixture(scope="module")
def trained():
    return trained_mlp()


def test_magnitude_keeps_the_largest_of_each_layer_and_of_each_group():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -5, 2, 3], [0.5, 4, -6, 0.1]])
    keep = Magnitude(0.5).find(model, vector_task()).keep
    assert keep["0"].tolist() == [[False, True, False, True], [False, True, True, False]]
    keep = Magnitude(pattern="1:2").find(model, vector_task()).keep
    assert keep["0"].tolist() == [[False, True, False, True], [False, True, True, False]]
    keep = Magnitude(0.25).find(model, vector_task()).keep
    assert keep["0"].tolist() == [[False, True, False, False], [False, False, True, False]]


def test_wanda_weighs_by_the_norm_of_the_input_within_a_row(trained):
    task = vector_task()
    keep = Wanda(0.25, batches=3).find(trained, task).keep
    rows = torch.cat([x for _, (x, _) in zip(range(3), vector_batches(0), strict=False)]).double()
    norms = input_norms(trained, {"0": trained[0]}, task, 3)["0"]
    # 192 squares summed in fp32
    torch.testing.assert_close(norms.double(), rows.norm(dim=0), rtol=192 * 2.0**-24, atol=0)
    scores = trained[0].weight.detach() * norms
    for row, mask in zip(scores.abs(), keep["0"], strict=True):
        assert int(mask.sum()) == 6
        assert row[mask].min() >= row[~mask].max()


def test_leap_meets_the_density_and_beats_the_one_shot_masks(trained):
    before = copy.deepcopy(trained.state_dict())
    task = vector_task()
    found = LEAP(0.3, SHORT).find(trained, task)
    assert abs(found.fraction_kept - 0.3) <= 0.005
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    losses = {name: task.loss(under_mask(trained, mask)) for name, mask in (
        ("leap", found.keep),
        ("wanda", Wanda(0.3).find(trained, task).keep),
        ("magnitude", Magnitude(0.3).find(trained, task).keep),
    )}  # fmt: skip
    assert losses["leap"] < losses["wanda"]
    assert losses["leap"] < losses["magnitude"]


def test_maskllm_keeps_2_of_4_and_beats_the_one_shot_masks(trained):
    task = vector_task()
    options = MaskTraining(steps=120, lr=0.01, clip_norm=1.0)
    found = MaskLLM("1:4", options).find(trained, task)
    assert all((mask.view(-1, 4).sum(1) == 1).all() for mask in found.keep.values())
    learned = task.loss(under_mask(trained, found.keep))
    for other in (Wanda(pattern="1:4"), Magnitude(pattern="1:4")):
        assert learned < task.loss(under_mask(trained, other.find(trained, task).keep))


def test_the_same_seed_finds_the_same_mask(trained):
    options = MaskTraining(steps=6)
    for method in (LEAP(0.4, options), MaskLLM(training=options)):
        first, again = (method.find(trained, vector_task(seed=3)).keep for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_any_density_is_met_from_any_logits_and_their_order_stays():
    masked = dwm.mask_model(nn.Linear(40, 50), dwm.GumbelSigmoid(init=2.0, spread=1.0), seed=0)
    before = next(masked.mask_parameters()).detach().clone()
    for density in (0.9, 0.1, 0.5):
        assert abs(meet_density(masked, density) - density) <= 0.005
        after = next(masked.mask_parameters()).detach()
        assert torch.equal(before.flatten().argsort(stable=True), after.flatten().argsort(stable=True))


def test_the_presets_hold_the_published_constants():
    methods = pruning_methods()
    leap, maskllm = methods["leap-paper"], methods["maskllm-paper"]
    assert (leap.tau, leap.kappa, leap.spread, leap.density_weight, leap.norm_weight) == (
        (4.0, 0.05), (25.0, 350.0), 0.014, 7.0, 10.0
    )  # fmt: skip
    assert (leap.training.steps, leap.training.lr, leap.training.warmup) == (2000, 1e-3, 5)
    assert leap.training.betas == maskllm.training.betas == (0.9, 0.95)
    assert (maskllm.tau, maskllm.kappa, maskllm.spread, maskllm.norm_weight) == (
        (4.0, 0.05),
        (100.0, 500.0),
        0.01,
        1e-5,
    )
    assert maskllm.training.clip_norm == 1.0
    assert leap.training.strength == maskllm.training.strength == 3.0


def test_the_rate_rises_and_falls_by_a_cosine():
    training = MaskTraining(steps=105, lr=1.0, warmup=5)
    assert [training.rate(s) for s in (0, 4, 5, 55)] == pytest.approx([0.2, 1.0, 1.0, 0.5])
    assert training.rate(104) < 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LEAP(density=1.0), "density is 1.0"),
        (lambda: MaskLLM(pattern="2/4"), "pattern is '2/4'; expected n:m"),
        (lambda: MaskLLM(pattern="4:4"), "n=4 of m=4"),
        (lambda: MaskTraining(steps=0), "steps is 0"),
        (lambda: Magnitude(pattern="2:5").find(trained_mlp(), vector_task()), "no whole groups of 5"),
        (lambda: Wanda().find(conv_net(), vector_task()), "wanda knows linear layers alone; exclude 'conv1', 'conv2'"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
