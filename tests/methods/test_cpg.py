"""CPG: pruning, release and picks against the paper's formulas, and that no owned weight is ever written again."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from dwm_fast.errors import InputError
from dwm_fast.methods import CPG, TrainOptions
from dwm_fast.methods.cpg import accuracy, cuts, prune_available, released, sparsity
from dwm_fast.nn import Threshold

from .toys import conv_maker, conv_net, image_task, images_for_tests

TRAINING = TrainOptions(2, 0.01, batch_norm="frozen")
QUICK = CPG(training=TRAINING, pruning=dataclasses.replace(TRAINING, epochs=1), goal=0.0, every=1)


def test_sparsity_goes_from_start_to_target_along_a_cube():
    assert sparsity(0.0, 0.1, 0.9) == pytest.approx(0.1, abs=1e-15)
    assert sparsity(1.0, 0.1, 0.9) == 0.9
    assert sparsity(0.5, 0.0, 0.8) == pytest.approx(0.8 * 7 / 8, abs=1e-15)
    assert sparsity(0.25, 0.2, 0.6) == pytest.approx(0.6 - 0.4 * 27 / 64, abs=1e-15)


def test_cuts_come_every_so_many_steps_and_end_when_half_are_done():
    assert cuts(40, 8) == {8: 0.4, 16: 0.8, 20: 1.0}
    assert cuts(40, 10) == {10: 0.5, 20: 1.0}
    assert cuts(3, 10) == {1: 1.0}
    assert cuts(1, 1) == {1: 1.0}


class TestPruneAvailable:
    def test_what_is_free_already_counts(self):
        weight = torch.tensor([0.0, 0.0, 0.3, -0.1, 0.2, 9.0])
        owner = torch.tensor([0, 0, 2, 2, 2, 1], dtype=torch.uint8)
        # five are free or of task 2: 3 of 5 shall be free, two are
        assert prune_available(weight, owner, 2, 0.6).tolist() == [0, 0, 2, 0, 2, 1]
        assert prune_available(weight, owner, 2, 0.4).tolist() == owner.tolist()
        assert prune_available(weight, owner, 2, 0.0).tolist() == owner.tolist()
        assert prune_available(weight, owner, 2, 1.0).tolist() == [0, 0, 0, 0, 0, 1]

    def test_equal_values_at_the_cut_go_together(self):
        owner = torch.ones(4, dtype=torch.uint8)
        assert prune_available(torch.tensor([0.2, -0.2, 0.2, 0.7]), owner, 1, 0.25).tolist() == [0, 0, 0, 1]


def test_released_weights_are_free_a_share_of_them_and_more_hold_fewer():
    owner = {"a": torch.arange(4000, dtype=torch.uint8).view(40, 100) % 4}
    few, many, all_ = (released(owner, share, 3)["a"] for share in (0.25, 0.75, 1.0))
    free = owner["a"] == 0
    assert not (few & ~many).any()
    assert torch.equal(all_, free)
    assert not (many & ~free).any()
    for share, found in ((0.25, few), (0.75, many)):  # 1000 draws: four standard deviations
        assert abs(int(found.sum()) - 1000 * share) < 4 * (1000 * share * (1 - share)) ** 0.5
    assert not torch.equal(released(owner, 0.25, 4)["a"], few)


def test_accuracy_counts_right_answers_on_the_training_images():
    task, network = image_task("photo"), conv_net()
    right = 0
    for images, labels in task.batches(0):
        for image, label in zip(images, labels, strict=True):
            right += int(network(image[None]).argmax()) == int(label)
    assert accuracy(network, task) == right / 24


@pytest.fixture(scope="module")
def stages():
    """A learner after three tasks, and its state after each."""
    learner = dataclasses.replace(QUICK, growth=(1.0,)).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    after = [learner.state()]
    for name in ("art", "sketch"):
        learner.learn(image_task(name))
        after.append(learner.state())
    return learner, after


def test_three_quarters_of_what_a_task_may_use_are_free_in_the_end(stages):
    _, after = stages
    for layer, total in (("conv1", 162), ("conv2", 432)):
        available = total
        for number, state in enumerate(after, start=1):
            owner = state[f"owner/{layer}"]
            left = round(0.75 * available)
            assert (int((owner == 0).sum()), int((owner == number).sum())) == (left, available - left)
            available = left


def test_owned_weights_and_what_tasks_share_stay_to_the_last_bit(stages):
    _, after = stages
    for before, later in itertools.pairwise(after):
        for layer in ("conv1", "conv2"):
            owned = before[f"owner/{layer}"] > 0
            assert torch.equal(before[f"owner/{layer}"][owned], later[f"owner/{layer}"][owned])
            old, new = (state[f"shared/{layer}.weight"] for state in (before, later))
            assert torch.equal(old[owned], new[owned])
            assert (new[later[f"owner/{layer}"] == 0] == 0).all()
            assert not torch.equal(old, new)
    weights = ("shared/conv1.weight", "shared/conv2.weight")
    fixed = [key for key in after[0] if key.startswith("shared/") and key not in weights]
    assert all(torch.equal(after[0][key], after[2][key]) for key in fixed)
    assert "shared/conv1.bias" in fixed


def test_a_task_uses_all_its_own_weights_and_picks_of_earlier_ones_alone(stages):
    learner, after = stages
    for layer in ("conv1", "conv2"):
        owner = after[2][f"owner/{layer}"]
        for number, name in enumerate(("photo", "art", "sketch"), start=1):
            keep = learner.masks(name)[layer]
            assert keep[owner == number].all()
            assert not keep[(owner == 0) | (owner > number)].any()
            weight = learner.network(name).get_submodule(layer).weight
            assert torch.equal(weight, torch.where(keep, after[2][f"shared/{layer}.weight"], 0.0))


def test_one_step_moves_picks_and_released_weights_as_the_formulas_say():
    """Piggyback's gradient dL/dr = dL/dW_eff * W on owned weights, Adam's first step on both, nothing else moved.

    Of Adam's step -lr g / (abs(g) + eps) sqrt((1 - 0.999) / (1 - 0.999)) is 1 up to the fp32 error of 1 - 0.999,
    2^-24 / 0.001 relative at most: 6e-5.
    """
    training = TrainOptions(1, 0.5, batch_norm="frozen", schedule="constant", weight_decay=0.0)
    learner = dataclasses.replace(QUICK, training=training, mask_lr=0.02).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    task = image_task("art", steps=1)
    learned = learner._pick_and_train(task, 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(task.seed)
        network = learner.fresh(task)
    images, labels = next(iter(task.batches(0)))
    F.cross_entropy(network.eval()(images), labels).backward()
    moved = 0
    for layer, owner in learner.owner.items():
        weight, gradient = (
            t.detach() for t in (network.get_submodule(layer).weight, network.get_submodule(layer).weight.grad)
        )
        of_r = gradient * weight
        r = 0.01 - 0.02 * of_r.double() / (of_r.double().abs() + 1e-15)
        mine = learned.owner[layer] == 2
        assert torch.equal(learned.keep[layer], torch.where(owner > 0, r > 0.005, mine))
        step = -0.5 * gradient.double() / (gradient.double().abs() + 1e-8)
        expected = torch.where(mine, step, torch.where(learned.keep[layer], weight, 0.0).double())
        found = learned.network.get_submodule(layer).weight.detach().double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
        assert torch.equal(found[owner > 0], expected[owner > 0])
        assert not mine[owner > 0].any()
        moved += int((~learned.keep[layer] & (owner > 0)).sum())
    assert moved > 0


def test_free_weights_are_released_step_by_step_until_the_goal_is_met():
    def figures(goal, **options):
        learner = dataclasses.replace(QUICK, goal=goal, **options).learner(conv_maker, "fc")
        learner.begin(image_task("photo"), conv_net())
        return learner.learn(image_task("art"))

    met = figures(0.0, growth=(0.25, 0.5, 1.0))
    assert (met["share_released"], met["goal_met"], met["sparsity"]) == (0.25, True, 0.75)
    missed = figures(1.0, growth=(0.25, 0.5, 1.0), slack=0.0)
    assert (missed["share_released"], missed["goal_met"]) == (1.0, False)


def test_the_last_stage_of_pruning_that_meets_the_goal_counts(monkeypatch):
    told = iter([0.9, 0.9, 0.889, 0.95, 0.9])  # trained; after each stage; the fourth is never asked
    monkeypatch.setattr("dwm_fast.methods.cpg.accuracy", lambda network, task: next(told))
    learner = dataclasses.replace(QUICK, goal=None, slack=0.01).learner(conv_maker, "fc")
    figures = learner.begin(image_task("photo"), conv_net())
    assert figures["sparsity"] == 0.25
    assert figures["accuracy_on_training_images"] == 0.9
    free = round(0.25 * 162) + round(0.25 * 432)
    assert figures["fraction_free"] == free / 594
    assert sum(int((owner == 0).sum()) for owner in learner.owner.values()) == free
    assert next(told) == 0.95


def test_where_even_the_first_stage_misses_the_goal_nothing_is_pruned(monkeypatch):
    told = iter([0.9, 0.5])
    monkeypatch.setattr("dwm_fast.methods.cpg.accuracy", lambda network, task: next(told))
    figures = dataclasses.replace(QUICK, goal=None).learner(conv_maker, "fc").begin(image_task("photo"), conv_net())
    assert (figures["sparsity"], figures["fraction_free"], figures["fraction_owned"]) == (0.0, 0.0, 1.0)


def test_its_own_goal_is_the_accuracy_of_a_network_fine_tuned_in_full():
    learner = dataclasses.replace(QUICK, goal=None).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    task = image_task("art")
    with torch.random.fork_rng():
        torch.manual_seed(task.seed)
        network = learner.fresh(task).eval()
    for key, parameter in network.named_parameters():
        parameter.requires_grad_("bn" not in key)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=6, pct_start=0.2, cycle_momentum=False)
    for images, labels in itertools.chain(task.batches(0), task.batches(1)):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        schedule.step()
    right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in task.batches(0))
    assert learner.learn(task)["goal"] == right / 24


def test_a_task_costs_a_bit_a_weight_and_its_bank_serves_its_network(stages):
    learner, _ = stages
    assert {learner.bits(name) for name in ("photo", "art", "sketch")} == {162 + 432}
    bank = learner.bank()
    for name in ("photo", "art", "sketch"):
        bank.activate(name)
        with torch.no_grad():
            assert torch.equal(bank(images_for_tests()), learner.network(name)(images_for_tests()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sparsities": ()}, r"sparsities is \(\); expected fractions above 0 to 1, one at least, in rising order"),
        ({"growth": (1.0, 0.5)}, r"growth is \(1\.0, 0\.5\); expected fractions"),
        ({"kind": Threshold(ternary=True)}, "kind is ternary; expected"),
        ({"training": TrainOptions(batch_norm="shared")}, "'shared' in training .* expected frozen or per-domain"),
        ({"pruning": TrainOptions(batch_norm="frozen")}, "'frozen' in pruning; expected .* the same in both"),
        (
            {"training": TrainOptions(batch_norm="frozen", start_decay=0.1)},
            r"training\.start_decay is 0\.1; expected 0",
        ),
        ({"pruning": TrainOptions(batch_norm="per-domain", kept_decay=1.0)}, r"kept_decay is 1\.0; expected None"),
        ({"pruning": TrainOptions(0, batch_norm="per-domain")}, r"pruning\.epochs is 0; expected at least 1"),
        ({"goal": 1.5}, r"goal is 1\.5"),
        ({"every": 0}, "every is 0"),
    ],
)
def test_options_out_of_range_are_named(wrong, message):
    with pytest.raises(InputError, match=message):
        CPG(**wrong)
