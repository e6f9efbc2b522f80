"""KSM: its rule by hand, half precision that predicts what it stores, the published sizes."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision

from dwm_fast.bank import MaskBank
from dwm_fast.methods import KSM, presets
from dwm_fast.methods._real_masks import RealMaskOptions
from dwm_fast.nn import KernelSoft, mask_model, merge

from .toys import conv_maker, conv_net, image_task, images_for_tests

QUICK = KSM(options=RealMaskOptions(epochs=3, lr=0.01, batch_norm="per-domain"))


def learned(method=QUICK):
    learner = method.learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    learner.learn(image_task("art", classes=3))
    return learner


def test_what_is_stored_predicts_the_same_bits_after_later_tasks(tmp_path):
    learner = learned()
    with torch.no_grad():
        before = {name: learner.network(name)(images_for_tests()) for name in ("photo", "art")}
    learner.learn(image_task("sketch", classes=5))
    bank = learner.bank()
    bank.save(tmp_path)
    loaded = MaskBank.load(tmp_path, bank.backbone)
    assert loaded.info("art").form == "soft"
    with torch.no_grad():
        for name, expected in before.items():
            loaded.activate(name)
            assert torch.equal(loaded(images_for_tests()), expected)


def test_scales_are_halves_of_one_a_dropped_kernel():
    learner = learned()
    masks, scales = learner.masks("art"), learner.scales("art")
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {"conv1": (6, 3, 1, 1), "conv2": (8, 6, 1, 1)}
    dropped = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert 0 < sum(dropped.values()) < 18 + 48
    assert {name: scale.numel() for name, scale in scales.items()} == dropped
    assert all(scale.dtype == torch.float16 and ((scale >= 0) & (scale <= 0.5)).all() for scale in scales.values())


def test_a_tasks_weight_is_the_backbones_times_one_or_its_scale():
    learner = learned()
    weight, mask = learner.network("art").conv2.weight, learner.masks("art")["conv2"]
    expected = torch.ones(8, 6, 1, 1)
    expected[~mask] = learner.scales("art")["conv2"].float()
    assert torch.equal(weight, conv_net().conv2.weight * expected)


@pytest.mark.parametrize(("batch_norm", "norms"), [("frozen", 0), ("per-domain", 32 * 4 * (6 + 8))])
def test_bits_are_one_a_kernel_sixteen_a_dropped_one_and_batch_norm(batch_norm, norms):
    learner = learned(dataclasses.replace(QUICK, options=dataclasses.replace(QUICK.options, batch_norm=batch_norm)))
    dropped = sum(int((~mask).sum()) for mask in learner.masks("art").values())
    assert learner.bits("art") == 18 + 48 + 16 * dropped + norms
    assert (learner.bits("photo"), learner.masks("photo"), learner.scales("photo")) == (0, {}, {})


def test_resnet18_has_the_published_number_of_kernels():
    with torch.device("meta"):
        model = torchvision.models.resnet18(weights=None)
    masked = mask_model(model, KernelSoft(), exclude="fc")
    kernels = sum(p.numel() for p in masked.mask_parameters())
    assert kernels == 1_392_832
    assert round(kernels / 8 / 2**20, 3) == 0.166


def test_the_backbone_is_bit_identical_and_the_first_task_is_it():
    learner = learned()
    state = conv_net().state_dict()
    assert all(torch.equal(t, state[k.removeprefix("shared/")]) for k, t in learner.state().items() if "shared/" in k)
    assert torch.equal(learner.network("photo")(images_for_tests()), conv_net()(images_for_tests()))


def test_noise_changes_training_and_not_the_rule():
    quiet, noisy = learned(), learned(dataclasses.replace(QUICK, kind=KernelSoft(noisy=True)))
    assert not torch.equal(quiet.network("art")(images_for_tests()), noisy.network("art")(images_for_tests()))


def test_the_papers_preset():
    paper = presets()["ksm-paper"]
    assert paper.kind == KernelSoft(threshold=5e-3, init=1e-2, noisy=False)
    options = paper.options
    assert (options.epochs, options.lr, options.head_lr, options.eps) == (30, 2e-4, 2e-4, 1e-8)
    assert (options.batch_norm, options.schedule) == ("per-domain", "cosine")
    assert [options.factor(step, 10) for step in (0, 150, 300)] == pytest.approx([1.0, 0.5, 0.0])


def test_it_learns():
    task = image_task("art", steps=6)
    once = dataclasses.replace(task, batches=lambda epoch: task.batches(0))
    options = RealMaskOptions(epochs=30, lr=5e-3, head_lr=0.02, batch_norm="per-domain")
    learner = KSM(options=options).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    learner.learn(once)
    images, labels = next(iter(task.batches(0)))
    assert F.cross_entropy(learner.network("art")(images), labels) < 0.9 * math.log(4)


def test_any_model_can_wear_a_kernel_soft_mask():
    masked = mask_model(conv_net(), KernelSoft(), batch_norm="frozen")
    shapes = {name: tuple(layer.mask_logits.shape) for name, layer in masked.mask_layers().items()}
    assert shapes == {"conv1": (6, 3, 1, 1), "conv2": (8, 6, 1, 1), "fc": (4, 8)}
    # all start above the threshold
    assert torch.equal(masked.eval()(images_for_tests()), conv_net()(images_for_tests()))
    assert float(masked.train().sparsity_penalty()) == 0.0
    with torch.no_grad():
        for parameter in masked.mask_parameters():
            parameter.uniform_(-0.01, 0.02)
    assert torch.equal(merge(masked.eval())(images_for_tests()), masked(images_for_tests()))


def test_a_masked_model_goes_into_a_bank_with_its_scales(tmp_path):
    net = conv_net()
    masked = mask_model(net, KernelSoft())
    with torch.no_grad():
        for parameter in masked.mask_parameters():
            parameter.uniform_(-0.01, 0.02)
    bank = MaskBank(net)
    bank.add("art", masked)
    assert bank.info("art").form == "soft"
    bank.activate("art")
    with torch.no_grad():
        # scales are rounded to half precision: relative 2**-11 of a weight, through two layers and a head
        torch.testing.assert_close(bank(images_for_tests()), masked.eval()(images_for_tests()), rtol=1e-2, atol=1e-2)
