"""Learning a mask: the model stays, the budget holds, and what the source does not need goes."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import dwm_fast as dwm
from dwm_fast.errors import InputError
from dwm_fast.methods import Binary, BinarySequence, EditMask, LearnedMask, TrainOptions, masked_view, train
from dwm_fast.methods.learned import _meet_budget, _objective, learn_mask

from .toys import USED, conv_net, image_batches, trained_mlp, under_mask, vector_task

OPTIONS = LearnedMask(epochs=6, lr=0.1, source_budget=0.05)


@pytest.fixture(scope="module")
def model():
    return trained_mlp()


def binary(model, **changes):
    return learn_mask(model, dwm.GumbelSigmoid(), dataclasses.replace(OPTIONS, **changes), vector_task())


@pytest.fixture(scope="module")
def found(model):
    return binary(model)


@pytest.mark.parametrize("method", [Binary(options=OPTIONS), EditMask(options=OPTIONS)], ids=lambda m: m.name)
def test_model_is_left_bit_identical(model, method):
    mine = copy.deepcopy(model)
    method.find(mine, vector_task())
    for (name, old), new in zip(model.state_dict().items(), mine.state_dict().values(), strict=True):
        assert torch.equal(old, new), name
    assert all(p.requires_grad and p.grad is None for p in mine.parameters())
    assert {type(m) for m in mine.modules()} == {type(m) for m in model.modules()}


def test_mask_is_within_the_budget_it_says(model, found):
    loss = vector_task().loss
    assert found.within_budget is True
    assert loss(under_mask(model, found.keep)) <= loss(model) + OPTIONS.source_budget
    assert {name: mask.shape for name, mask in found.keep.items()} == {
        name: model.get_submodule(name).weight.shape for name in ("0", "2")
    }
    assert all(mask.dtype == torch.bool for mask in found.keep.values())


def test_what_the_source_does_not_need_is_dropped(found):
    first = found.keep["0"].float()
    assert found.fraction_kept < 0.5
    assert first[:, USED:].mean() < 0.3 * first[:, :USED].mean()


def test_a_larger_budget_gives_a_sparser_mask(model, found):
    assert binary(model, source_budget=0.4).fraction_kept < found.fraction_kept


def test_history_has_a_row_an_epoch_and_progress_is_told_every_step(model):
    told = []
    found = learn_mask(
        model, dwm.GumbelSigmoid(), dataclasses.replace(OPTIONS, epochs=2), vector_task(progress=told.append)
    )
    assert [set(row) for row in found.history] == [{"loss", "fraction_kept", "coefficient"}] * 2
    assert len(told) == 2 * 20
    assert all(figures["loss"].ndim == 0 for figures in told)


def test_the_same_seed_finds_the_same_mask(model):
    short = dataclasses.replace(OPTIONS, epochs=2)
    masks = [learn_mask(model, dwm.GumbelSigmoid(), short, vector_task(seed=seed)).keep["0"] for seed in (3, 3, 4)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_the_same_seed_finds_the_same_edits_whatever_was_drawn_before(model):
    masks = []
    for other in (1, 2):
        torch.manual_seed(other)
        masks.append(EditMask(options=OPTIONS).find(model, vector_task()).keep)
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name]), name


def test_the_rate_is_constant_and_then_falls_to_zero_by_half_a_cosine():
    options = LearnedMask(lr=0.4, decay=0.5)
    assert [options.rate(step, 8) for step in range(5)] == [0.4] * 5
    assert options.rate(6, 8) == pytest.approx(0.2)  # cos(pi / 2) = 0: half way down
    assert options.rate(8, 8) == 0.0
    assert [LearnedMask(lr=0.4, decay=0.0).rate(step, 8) for step in (0, 7)] == [0.4, 0.4]
    assert LearnedMask(lr=0.4, decay=1.0).rate(4, 8) == pytest.approx(0.2)


def test_a_fixed_coefficient_stays_and_a_larger_one_is_sparser(model):
    found = [binary(model, coefficient=c, epochs=3) for c in (0.3, 3.0)]
    assert [f.coefficient for f in found] == pytest.approx([0.3, 3.0])
    assert [f.within_budget for f in found] == [None, None]
    assert found[1].fraction_kept < found[0].fraction_kept


def test_a_clip_that_never_bites_gives_the_mask_of_the_folded_step(model):
    """The penalty through autograd and the penalty inside the optimiser are the same gradient."""
    masks = [binary(model, coefficient=1.0, epochs=2, clip_norm=norm).keep["0"] for norm in (None, 1e9)]
    assert (masks[0] == masks[1]).float().mean() > 0.99


def test_a_clip_that_bites_changes_the_mask(model):
    with_clip = binary(model, coefficient=1.0, epochs=2, clip_norm=1e-14).keep["0"]  # far below Adam's eps
    assert with_clip.all()


def test_several_masks_a_batch_work_too(model):
    found = binary(model, epochs=2, mask_samples=4)
    assert found.within_budget is True


def test_edit_reuses_what_was_edited_far(model):
    found = learn_mask(model, dwm.Edit(spread=0.1), OPTIONS, vector_task())
    assert isinstance(found.within_budget, bool)
    assert 0 < found.fraction_kept < 0.9
    first = found.keep["0"].float()
    assert first[:, USED:].mean() < first[:, :USED].mean()


def test_only_layers_that_fit_the_patterns_have_a_mask(model):
    assert set(binary(model, epochs=0, include=["2"]).keep) == {"2"}


def test_batch_norm_statistics_of_the_model_stay(monkeypatch):
    net = conv_net()
    before = copy.deepcopy(net.state_dict())
    task = dataclasses.replace(vector_task(), batches=image_batches(), loss=lambda network: 0.0)
    learn_mask(net, dwm.GumbelSigmoid(), LearnedMask(epochs=1), task)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class TestMeetBudget:
    """The end under a budget, on masks whose loss is known: the fraction dropped."""

    def masked(self, *logits):
        net = torch.nn.Sequential(*[torch.nn.Linear(100, 1) for _ in logits])
        masked = dwm.mask_model(net, dwm.GumbelSigmoid())
        for parameter, values in zip(masked.mask_parameters(), logits, strict=True):
            parameter.data.copy_(values.view(1, 100))
        return masked

    def task(self):
        return dataclasses.replace(vector_task(), loss=lambda masked: 1 - masked.fraction_kept())

    @pytest.mark.parametrize("start", [-150.0, -95.0])
    @pytest.mark.parametrize("limit", [0.25, 0.5, 0.9])
    def test_a_mask_above_it_is_loosened_no_more_than_needed(self, start, limit):
        masked = self.masked(torch.randperm(100) + start, torch.randperm(100) + start)
        assert _meet_budget(masked, self.task(), limit) is True
        assert 1 - limit <= masked.fraction_kept() <= 1 - limit + 0.03

    def test_a_mask_within_it_stays_as_learned(self):
        logits = torch.randperm(100) - 40.0  # keeps 60 %
        masked = self.masked(logits)
        assert _meet_budget(masked, self.task(), 0.5) is True
        assert torch.equal(next(masked.mask_parameters()).flatten(), logits)

    def test_keeps_the_order_of_the_logits_over_layers(self):
        low, high = torch.randperm(100).float() - 300, torch.randperm(100).float() - 200
        masked = self.masked(low, high)
        _meet_budget(masked, self.task(), 0.75)
        masks = list(masked.keep_masks().values())
        assert not masks[0].any()
        kept, dropped = high[masks[1][0]], high[~masks[1][0]]
        assert kept.min() > dropped.max()

    def test_says_when_no_mask_is_within_it(self):
        masked = self.masked(torch.randperm(100).float())
        assert _meet_budget(masked, self.task(), -0.5) is False

    @pytest.mark.parametrize(("limit", "within"), [(0.5, True), (0.1, False)])
    def test_edits_have_no_shift_and_stay(self, limit, within):
        masked = dwm.mask_model(torch.nn.Linear(100, 1), dwm.Edit())
        edits = next(masked.mask_parameters())
        edits.data[:, :20] = 2.0  # kept: 80 %
        before = edits.detach().clone()
        assert _meet_budget(masked, self.task(), limit) is within
        assert torch.equal(edits, before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"epochs": -1},
        {"source_budget": 0.0},
        {"control_every": 0},
        {"coefficient": -1.0},
        {"clip_norm": 0.0},
        {"mask_samples": 0},
        {"eps": float("nan")},
    ],
)
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is .*; expected"):
        LearnedMask(**wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_gpu_captured_and_eager_learning_agree(clip_norm, monkeypatch):
    def learn():
        net = trained_mlp().cuda()
        task = vector_task()

        def batches(epoch):
            return ((x.cuda(), y.cuda()) for x, y in task.batches(epoch))

        def loss(network):
            with torch.no_grad():
                return float(sum(F.cross_entropy(network.eval()(x), y) for x, y in batches(0)) / 20)

        cuda = dataclasses.replace(task, batches=batches, loss=loss)
        return learn_mask(net, dwm.GumbelSigmoid(), dataclasses.replace(OPTIONS, clip_norm=clip_norm), cuda)

    captured = learn()
    monkeypatch.setattr("dwm_fast.methods._loop._on_gpu", lambda images: False)
    eager = learn()
    assert captured.within_budget is True
    assert captured.fraction_kept == pytest.approx(eager.fraction_kept, abs=0.05)
    assert (captured.keep["0"] == eager.keep["0"]).float().mean() > 0.9


def test_the_unmasked_objective_is_the_divergence_from_the_unmasked_network(model):
    """Mean over images of sum_c p_c (log p_c - log q_c), its gradient reaching the mask alone; no label is read."""
    model = copy.deepcopy(model)
    model.zero_grad(set_to_none=True)
    masked = dwm.mask_model(copy.deepcopy(model), dwm.GumbelSigmoid(init=0.0), seed=3).eval()
    with torch.no_grad():
        for parameter in masked.mask_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    images, labels = next(iter(vector_task().batches(0)))
    objective = _objective(masked, model, dataclasses.replace(OPTIONS, objective="unmasked"), vector_task())
    p, q = model(images).double().softmax(1), masked(images).double().softmax(1)
    expected = (p * (p.log() - q.log())).sum(1).mean()
    found = objective(images, labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)  # fp32 logs of probabilities
    assert found.item() > 0.01
    assert torch.equal(objective(images, labels.flip(0)), found)
    masked.train()
    objective(images, labels).backward()
    assert all(p.grad is not None for p in masked.mask_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_mask_learned_without_labels_keeps_to_its_budget(model):
    found = binary(model, objective="unmasked")
    loss = vector_task().loss
    assert loss(under_mask(model, found.keep)) <= loss(model) + OPTIONS.source_budget
    assert found.fraction_kept < 0.7


def test_the_sum_of_logits_has_the_slope_of_its_coefficient_over_the_batch():
    """All weights 0, so nothing else pulls at a logit. Adam's step under a constant gradient g is lr g / (g + eps); eps
    is what g has to be, 0.01 / 64, so that a step is lr / 2: after 20 steps a logit stands at 2 - 10 lr."""
    dead = torch.nn.Sequential(torch.nn.Linear(24, 8), torch.nn.Linear(8, 4))
    for parameter in dead.parameters():
        torch.nn.init.zeros_(parameter)

    def kept(lr):
        options = LearnedMask(1, lr, decay=0.0, eps=0.01 / 64, coefficient=0.01, regulariser="sum-logits")
        return learn_mask(dead, dwm.GumbelSigmoid(init=2.0), options, vector_task()).fraction_kept

    assert (kept(0.199), kept(0.201)) == (1.0, 0.0)


def test_biases_have_masks_by_request_and_one_that_harms_is_dropped(model):
    spoiled = copy.deepcopy(model)
    spoiled[2].bias.data = torch.tensor([9.0, 0.5, -0.5, 0.25])
    options = dataclasses.replace(OPTIONS, coefficient=0.0, source_budget=0.01, epochs=3, biases=True)
    found = learn_mask(spoiled, dwm.GumbelSigmoid(), options, vector_task())
    assert {name: tuple(mask.shape) for name, mask in found.keep.items()} == {
        "0": (48, 24),
        "2": (4, 48),
        "0.bias": (48,),
        "2.bias": (4,),
    }
    assert not found.keep["2.bias"][0]
    assert list(binary(model, epochs=1).keep) == ["0", "2"]
    assert list(binary(model, epochs=1, biases=True, exclude=["2"]).keep) == ["0", "0.bias"]

    under = masked_view(spoiled, spoiled, found.keep)
    expected = [torch.where(found.keep[f"{i}.bias"], spoiled[i].bias.detach(), 0.0) for i in (0, 2)]
    assert all(torch.equal(under[i].bias, bias) for i, bias in zip((0, 2), expected, strict=True))
    tuned = train(copy.deepcopy(spoiled), vector_task().batches, 20, TrainOptions(1, 0.01), keep=found.keep)
    for i in (0, 2):
        changed = tuned[i].bias != spoiled[i].bias
        assert not changed[found.keep[f"{i}.bias"]].any()
        assert changed[~found.keep[f"{i}.bias"]].all()


def test_the_other_regulariser_wants_a_coefficient_and_logits(model):
    with pytest.raises(InputError, match="regulariser is 'sum-logits' without a coefficient"):
        LearnedMask(regulariser="sum-logits")
    options = LearnedMask(coefficient=1e-4, regulariser="sum-logits")
    with pytest.raises(InputError, match="'sum-logits' for Edit; expected GumbelSigmoid"):
        learn_mask(model, dwm.Edit(), options, vector_task())
    with pytest.raises(InputError, match=r"binary\.options\.biases is True; expected False"):
        BinarySequence(Binary(options=LearnedMask(biases=True)))
