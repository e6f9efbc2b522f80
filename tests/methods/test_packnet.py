"""PackNet: who owns which weight, what pruning frees, and that nothing of an earlier task is ever written again."""

import dataclasses
import itertools
import math

import pytest
import torch

from dwm_fast.bank import MaskBank
from dwm_fast.errors import InputError
from dwm_fast.methods import PackNet, TrainOptions, presets
from dwm_fast.methods.packnet import prune_smallest

from .toys import conv_maker, conv_net, image_task, images_for_tests

QUICK = PackNet(
    training=TrainOptions(2, 0.01, batch_norm="frozen"), retraining=TrainOptions(1, 0.01, batch_norm="frozen")
)


def owners(*values):
    return torch.tensor(values, dtype=torch.uint8)


class TestPruneSmallest:
    def test_frees_the_smallest_half_by_magnitude(self):
        weight = torch.tensor([0.1, -0.5, 0.3, -0.2])
        assert prune_smallest(weight, owners(1, 1, 1, 1), 1, 0.5).tolist() == [0, 1, 1, 0]

    def test_counts_and_prunes_only_what_the_task_owns(self):
        weight = torch.tensor([0.01, 0.5, 0.02, 0.4, 0.3, 0.2])
        owner = owners(1, 2, 0, 2, 2, 2)
        # three quarters of the four weights of task 2: 0.2, 0.3, 0.4
        assert prune_smallest(weight, owner, 2, 0.75).tolist() == [1, 2, 0, 0, 0, 0]

    def test_equal_values_at_the_cut_go_together(self):
        weight = torch.tensor([0.2, -0.2, 0.2, 0.7])
        assert prune_smallest(weight, owners(1, 1, 1, 1), 1, 0.25).tolist() == [0, 0, 0, 1]

    @pytest.mark.parametrize(("count", "freed"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4)])
    def test_rounds_half_to_even_as_the_formula_does_in_python(self, count, freed):
        weight = torch.arange(1.0, count + 1)
        pruned = prune_smallest(weight, torch.ones(count, dtype=torch.uint8), 1, 0.5)
        assert int((pruned == 0).sum()) == freed

    @pytest.mark.parametrize(("fraction", "left"), [(0.0, [1, 1]), (1.0, [0, 0])])
    def test_nothing_and_everything(self, fraction, left):
        assert prune_smallest(torch.tensor([1.0, 2.0]), owners(1, 1), 1, fraction).tolist() == left

    def test_an_empty_tensor_and_a_task_without_weights_have_nothing_to_free(self):
        assert prune_smallest(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.uint8), 1, 0.5).shape == (0, 3)
        assert prune_smallest(torch.tensor([1.0]), owners(2), 1, 1.0).tolist() == [2]

    def test_the_given_map_is_left_alone(self):
        owner = owners(1, 1)
        prune_smallest(torch.tensor([1.0, 2.0]), owner, 1, 0.5)
        assert owner.tolist() == [1, 1]


@pytest.fixture(scope="module")
def stages():
    """The learner's owner maps and weights after each of three tasks."""
    learner = QUICK.learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    after = [learner.state()]
    for name in ("art", "sketch"):
        learner.learn(image_task(name))
        after.append(learner.state())
    return learner, after


def test_ownership_after_three_tasks_has_the_sizes_of_the_formula(stages):
    """conv1 has 162 weights, conv2 432: the first task frees a half, each later one three quarters of what it owns."""
    _, after = stages
    for layer, total in (("conv1", 162), ("conv2", 432)):
        free, owned = total, {}
        for number, fraction in ((1, 0.5), (2, 0.75), (3, 0.75)):
            freed = round(fraction * free)
            owned[number], free = free - freed, freed
            owner = after[number - 1][f"owner/{layer}"]
            found = {n: int((owner == n).sum()) for n in owned}
            assert (found, int((owner == 0).sum())) == (owned, free)


def test_no_weight_changes_hands_and_owned_weights_stay_to_the_last_bit(stages):
    _, after = stages
    for before, later in itertools.pairwise(after):
        for layer in ("conv1", "conv2"):
            owned = before[f"owner/{layer}"] > 0
            assert torch.equal(before[f"owner/{layer}"][owned], later[f"owner/{layer}"][owned])
            old, new = (state[f"shared/{layer}.weight"] for state in (before, later))
            assert torch.equal(old[owned], new[owned])
            assert not torch.equal(old, new)


def test_free_weights_are_zero_and_biases_and_batch_norm_are_frozen_after_the_first_task(stages):
    _, after = stages
    for state in after:
        for layer in ("conv1", "conv2"):
            assert (state[f"shared/{layer}.weight"][state[f"owner/{layer}"] == 0] == 0).all()
    fixed = [k for k in after[0] if k.startswith("shared/") and k not in ("shared/conv1.weight", "shared/conv2.weight")]
    assert "shared/conv1.bias" in fixed
    assert "shared/bn2.running_var" in fixed
    assert all(torch.equal(after[0][key], after[2][key]) for key in fixed)
    assert not torch.equal(after[0]["shared/bn1.running_mean"], conv_net().bn1.running_mean)


def test_a_task_sees_weights_of_owners_up_to_itself(stages):
    learner, after = stages
    owner = after[2]["owner/conv2"]
    for number, name in enumerate(("photo", "art", "sketch"), start=1):
        mask = learner.masks(name)["conv2"]
        assert torch.equal(mask, (owner > 0) & (owner <= number))
        weight = learner.network(name).conv2.weight
        assert (weight[~mask] == 0).all()
        assert torch.equal(weight[mask], after[2]["shared/conv2.weight"][mask])


def test_a_task_adds_one_bit_a_weight(stages):
    learner, _ = stages
    assert {learner.bits(name) for name in ("photo", "art", "sketch")} == {162 + 432}


def test_figures_are_the_fractions_owned_and_free():
    learner = QUICK.learner(conv_maker, "fc")
    first = learner.begin(image_task("photo"), conv_net())
    assert first == {"fraction_owned": 0.5, "fraction_free": 0.5}
    second = learner.learn(image_task("art"))
    # 297 free weights, round(0.75 * 81) = 61 of conv1 and round(0.75 * 216) = 162 of conv2 freed again
    assert second == {"fraction_owned": (297 - 223) / 594, "fraction_free": 223 / 594}


def test_domains_read_back_from_the_banks_files_predict_the_same_bits(stages, tmp_path):
    learner, _ = stages
    bank = learner.bank()
    bank.save(tmp_path)
    loaded = MaskBank.load(tmp_path, bank.backbone)
    for name in ("photo", "art", "sketch"):
        loaded.activate(name)
        with torch.no_grad():
            assert torch.equal(loaded(images_for_tests()), learner.network(name)(images_for_tests()))


def test_it_learns():
    """The second task ends with an eighth of the weights, and still fits its batches better than chance."""
    task = image_task("sketch", steps=6)
    options = TrainOptions(40, 0.02, batch_norm="frozen")
    learner = PackNet(training=options, retraining=options).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    one_epoch = dataclasses.replace(task, batches=lambda epoch: task.batches(0))
    learner.learn(one_epoch)
    images, labels = next(iter(task.batches(0)))
    loss = torch.nn.functional.cross_entropy(learner.network("sketch")(images), labels)
    assert loss < 0.9 * math.log(4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prune": ()}, "prune is .*; expected fractions from 0 to 1"),
        ({"prune": (0.5, 1.5)}, "prune is .*; expected fractions from 0 to 1"),
        ({"training": TrainOptions(batch_norm="shared")}, "training.batch_norm is 'shared'; expected 'frozen'"),
        ({"retraining": TrainOptions(batch_norm="per-domain")}, "retraining.batch_norm is 'per-domain'"),
    ],
)
def test_options_out_of_range_are_named(wrong, message):
    with pytest.raises(InputError, match=message):
        PackNet(**wrong)


def test_the_papers_preset():
    paper = presets()["packnet-paper"]
    assert paper.prune == (0.5, 0.75)
    assert (paper.training.epochs, paper.training.lr, paper.retraining.epochs, paper.retraining.lr) == (
        20,
        1e-3,
        10,
        1e-4,
    )
    assert {(o.optimizer, o.weight_decay, o.schedule) for o in (paper.training, paper.retraining)} == {
        ("sgd", 0.0, "step")
    }
