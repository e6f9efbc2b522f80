"""binary, domain after domain: the union of what earlier domains need is frozen; each can be seen under its bits."""

import pytest
import torch

from dwm_fast.bank import MaskBank
from dwm_fast.methods import Binary, BinarySequence, LearnedMask, TrainOptions

from .toys import conv_maker, conv_net, image_task, images_for_tests, under_mask

NAMES = ("photo", "art", "sketch")


def method(policy="frozen"):
    return BinarySequence(
        Binary(options=LearnedMask(epochs=4, lr=0.3, coefficient=0.1)),
        TrainOptions(epochs=2, lr=0.01, batch_norm=policy),
    )


def run(policy="frozen"):
    """The learner, and its state and masks after each task."""
    learner = method(policy).learner(conv_maker, "fc")
    states, figures = [], []
    for i, name in enumerate(NAMES):
        task = image_task(name)
        figures.append(learner.begin(task, conv_net()) if i == 0 else learner.learn(task))
        states.append(learner.state())
    return learner, states, figures


@pytest.fixture(scope="module")
def sequence():
    return run()


def masks(learner, name):
    return learner.task_masks[name]["keep"]


def test_masks_cover_every_layer_but_the_head_and_drop_something(sequence):
    learner, _, figures = sequence
    for name, row in zip(NAMES, figures, strict=True):
        found = masks(learner, name)
        assert set(found) == {"conv1", "conv2"}
        kept = sum(int(mask.sum()) for mask in found.values()) / (162 + 432)
        assert row["fraction_kept"] == pytest.approx(kept)
        assert 0.1 < kept < 0.9


def test_the_union_of_earlier_masks_is_frozen_and_the_rest_moves(sequence):
    learner, states, figures = sequence
    for layer in ("conv1", "conv2"):
        union = torch.zeros_like(masks(learner, "photo")[layer])
        for i, name in enumerate(NAMES[:-1]):
            union |= masks(learner, name)[layer]
            old, new = (states[j][f"shared/{layer}.weight"] for j in (i, i + 1))
            assert torch.equal(old[union], new[union])
            if not union.all():
                assert not torch.equal(old, new)
    unions = [masks(learner, "photo")[layer] | masks(learner, "art")[layer] for layer in ("conv1", "conv2")]
    assert figures[2]["fraction_frozen"] == pytest.approx(sum(int(u.sum()) for u in unions) / (162 + 432))


def test_the_masked_view_is_the_network_of_its_time_under_its_mask(sequence):
    learner, _, _ = sequence
    keep = masks(learner, "photo")
    expected = under_mask(conv_net(), keep)(images_for_tests())
    assert torch.equal(learner.network("photo", "masked")(images_for_tests()), expected)


def test_the_shared_view_is_one_network(sequence):
    learner, states, _ = sequence
    for name in NAMES:
        network = learner.network(name)
        for layer in ("conv1", "conv2"):
            assert torch.equal(network.get_submodule(layer).weight, states[2][f"shared/{layer}.weight"])


@pytest.mark.parametrize(
    ("policy", "own"), [("frozen", 32 * 6), ("shared", 32 * (6 + 4 * 14)), ("per-domain", 32 * (6 + 4 * 14))]
)
def test_a_task_adds_a_bit_a_weight_and_what_else_later_training_changes(policy, own):
    """conv1's bias of 6 always; weight, bias, mean and variance of 6 + 8 channels unless batch norm is frozen."""
    learner, _, _ = run(policy)
    assert {learner.bits(name) for name in NAMES} == {162 + 432 + own}


@pytest.mark.parametrize("policy", ["frozen", "shared", "per-domain"])
def test_whose_batch_norm_the_shared_view_has(policy):
    learner, states, _ = run(policy)
    mean = learner.network("photo").bn1.running_mean
    newest = states[2]["shared/bn1.running_mean"]
    first = conv_net().bn1.running_mean
    assert torch.equal(newest, first) is (policy == "frozen")
    assert torch.equal(mean, newest if policy == "shared" else first)


def test_domains_read_back_from_the_banks_files_are_the_masked_view(sequence, tmp_path):
    learner, _, _ = sequence
    bank = learner.bank()
    bank.save(tmp_path)
    loaded = MaskBank.load(tmp_path, bank.backbone)
    with torch.no_grad():
        for name in NAMES:
            loaded.activate(name)
            assert torch.equal(loaded(images_for_tests()), learner.network(name, "masked")(images_for_tests()))


def test_layers_that_the_masks_leave_out_are_free_and_kept_for_the_masked_view():
    options = LearnedMask(epochs=1, lr=1.5, coefficient=0.1, exclude="conv2")
    learner = BinarySequence(Binary(options=options), method().options).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    before = learner.network("photo", "masked")(images_for_tests())
    learner.learn(image_task("art"))
    assert set(masks(learner, "art")) == {"conv1"}
    assert torch.equal(learner.network("photo", "masked")(images_for_tests()), before)
    assert learner.bits("photo") == 162 + 32 * (6 + 432)
