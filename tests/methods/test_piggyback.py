"""Piggyback: the mask rule and its gradient by hand, the frozen backbone, the published sizes."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision

from dwm_fast import ops
from dwm_fast.bank import MaskBank
from dwm_fast.errors import InputError
from dwm_fast.methods import Piggyback, presets
from dwm_fast.methods._real_masks import RealMaskOptions, learn_real_masks
from dwm_fast.methods.piggyback import gradient_divisors
from dwm_fast.nn import Threshold, mask_model

from .toys import conv_maker, conv_net, image_task, images_for_tests

QUICK = Piggyback(options=RealMaskOptions(epochs=2, lr=0.02))


def learned(method=QUICK, network=None):
    learner = method.learner(conv_maker, "fc")
    learner.begin(image_task("photo"), network or conv_net())
    learner.learn(image_task("art", classes=3))
    return learner


class TestRule:
    """m = 1[r > 5e-3], strict; ternary: -1 if r < 0, +1 if r > 5e-3, else 0; dL/dr = dL/d(m W) W."""

    R = torch.tensor([[5e-3, 5.001e-3, 0.0, -0.0, -1e-9, 1.0]])

    @pytest.mark.parametrize(
        ("ternary", "expected"), [(False, [0, 1, 0, 0, 0, 1]), (True, [0, 1, 0, 0, -1, 1])], ids=["binary", "ternary"]
    )
    def test_value_and_gradient(self, ternary, expected):
        layer = torch.nn.Linear(6, 1, bias=False)
        torch.nn.init.constant_(layer.weight, 3.0)  # whole numbers: sums are exact in any order
        masked = mask_model(layer, Threshold(ternary=ternary)).train()
        r = next(masked.mask_parameters())
        r.data.copy_(self.R)
        x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
        masked(x).backward()
        assert torch.equal(masked(x), (x * torch.tensor(expected) * layer.weight).sum(1, keepdim=True))
        assert torch.equal(r.grad, x * layer.weight)  # neither clipped nor noisy, at every r
        assert masked.keep_masks()[""].tolist() == [[value != 0 for value in expected]]

    def test_the_bias_is_never_masked(self):
        layer = torch.nn.Linear(3, 2)
        masked = mask_model(layer, Threshold(init=0.0))
        assert torch.equal(masked(torch.ones(1, 3)), layer.bias[None])


class TestStart:
    def test_ones(self):
        assert Threshold().initial(torch.randn(3, 4)).eq(1e-2).all()

    def test_uniform_spreads_over_both_signs_and_follows_the_seed(self):
        kind = Threshold(scheme="uniform", init=0.02)
        torch.manual_seed(3)
        first, second = kind.initial(torch.zeros(100, 100)), kind.initial(torch.zeros(100, 100))
        torch.manual_seed(3)
        assert torch.equal(kind.initial(torch.zeros(100, 100)), first)
        assert not torch.equal(first, second)
        assert -0.02 <= first.min() < -0.0199
        assert 0.0199 < first.max() <= 0.02
        # mean 0 with deviation 0.02 / sqrt(3) / 100 = 1.2e-4: five of them
        assert abs(float(first.mean())) < 6e-4

    def test_weight_based_is_the_layers_mean_magnitude(self):
        weight = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
        assert Threshold(scheme="weight_based_1s").initial(weight).eq(1.5).all()
        assert Threshold(scheme="weight_based_1s").initial(torch.empty(0, 3)).shape == (0, 3)

    def test_unknown_schemes_are_named(self):
        with pytest.raises(InputError, match="scheme='2s'; expected one of 1s, uniform, weight_based_1s"):
            Threshold(scheme="2s")


class TestGradientScale:
    WEIGHT = torch.tensor([[1.0, -2.0], [3.0, 0.0]])

    def test_divisors_are_the_mean_magnitude_or_each_weights_own(self):
        assert gradient_divisors({"a": self.WEIGHT}, "none") == {}
        assert float(gradient_divisors({"a": self.WEIGHT}, "average")["a"]) == 1.5
        assert gradient_divisors({"a": self.WEIGHT}, "individual")["a"].tolist() == [[1.0, 2.0], [3.0, math.inf]]
        assert float(gradient_divisors({"a": torch.zeros(2)}, "average")["a"]) == math.inf

    @pytest.mark.parametrize("divisor", [0.25, 4.0])
    def test_they_divide_the_gradient_that_adam_sees(self, divisor):
        """With an eps far above the gradient Adam's first step is lr * g / eps: linear in the gradient."""
        options = RealMaskOptions(epochs=1, lr=1.0, eps=1e6, schedule="constant")
        moves = []
        for d in (1.0, divisor):
            task = image_task("photo", steps=1)
            divisors = {layer: torch.tensor(d) for layer in ("conv1", "conv2")}
            masked = learn_real_masks(conv_net(), Threshold(init=1.0), "fc", options, task, divisors)
            moves.append((masked.mask_layers()["conv2"].mask_logits.detach() - 1.0).double())
        # both moves are differences of numbers near 1: each is rounded by up to 2**-24
        torch.testing.assert_close(moves[1] * divisor, moves[0], rtol=1e-4, atol=(1 + divisor) * 2.0**-23)

    def test_unknown_scales_are_named(self):
        with pytest.raises(InputError, match="gradient_scale is 'sum'; expected none, average or individual"):
            Piggyback(gradient_scale="sum")


@pytest.mark.parametrize("scale", ["none", "average", "individual"])
@pytest.mark.parametrize("scheme", ["1s", "uniform", "weight_based_1s"])
def test_every_scheme_and_scale_learns_some_mask(scheme, scale):
    method = dataclasses.replace(QUICK, kind=Threshold(scheme=scheme), gradient_scale=scale)
    learner = learned(method)
    kept = torch.cat([m.flatten() for m in learner.masks("art")["keep"].values()])
    assert 0 < kept.float().mean() < 1
    assert learner.network("art")(images_for_tests()).isfinite().all()


def test_the_backbone_is_bit_identical_at_the_end():
    network = conv_net()
    before = copy.deepcopy(network.state_dict())
    learner = learned(network=network)
    state = learner.state()
    shared = {key.removeprefix("shared/"): value for key, value in state.items() if key.startswith("shared/")}
    assert {k for k in before if not k.startswith("fc.")} == set(shared)
    assert all(torch.equal(value, before[key]) for key, value in shared.items())


def test_the_first_task_is_the_backbone_itself():
    learner = learned()
    assert torch.equal(learner.network("photo")(images_for_tests()), conv_net()(images_for_tests()))
    assert (learner.masks("photo"), learner.bits("photo")) == ({}, 0)


@pytest.mark.parametrize("batch_norm", ["frozen", "per-domain"])
def test_bits_are_one_a_weight_and_batch_norm_where_the_task_has_its_own(batch_norm):
    method = Piggyback(options=RealMaskOptions(epochs=1, batch_norm=batch_norm))
    norms = 32 * 4 * (6 + 8)  # weight, bias, mean and variance of 6 and 8 channels
    assert learned(method).bits("art") == 162 + 432 + (norms if batch_norm == "per-domain" else 0)
    ternary = dataclasses.replace(method, kind=Threshold(ternary=True))
    assert learned(ternary).bits("art") == 2 * (162 + 432) + (norms if batch_norm == "per-domain" else 0)


def test_frozen_batch_norm_stays_the_backbones_and_trained_one_moves():
    frozen = learned().network("art")
    assert torch.equal(frozen.bn1.running_mean, conv_net().bn1.running_mean)
    trained = learned(Piggyback(options=RealMaskOptions(epochs=1, batch_norm="per-domain"))).network("art")
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        assert not torch.equal(getattr(trained.bn1, tensor), getattr(conv_net().bn1, tensor))
    # conv biases are the backbone's whatever the policy
    assert torch.equal(trained.conv1.bias, conv_net().conv1.bias)


@pytest.mark.parametrize("ternary", [False, True])
def test_domains_read_back_from_the_banks_files_predict_the_same_bits_after_later_tasks(ternary, tmp_path):
    method = dataclasses.replace(QUICK, kind=Threshold(ternary=ternary, init=1e-3 if ternary else 1e-2))
    learner = learned(method)
    with torch.no_grad():
        before = {name: learner.network(name)(images_for_tests()) for name in ("photo", "art")}
    learner.learn(image_task("sketch", classes=5))
    bank = learner.bank()
    bank.save(tmp_path)
    loaded = MaskBank.load(tmp_path, bank.backbone)
    with torch.no_grad():
        for name, expected in before.items():
            loaded.activate(name)
            assert torch.equal(loaded(images_for_tests()), expected)


@pytest.mark.parametrize(
    ("name", "layers", "weights", "nbytes"),
    [
        ("resnet18", "conv", 11_166_912, 1_395_864),
        ("resnet50", "conv", 23_454_912, 2_931_864),
        ("vgg16", "all but the classifier", 134_248_128, 16_781_016),
    ],
)
def test_published_sizes(name, layers, weights, nbytes):
    """METHODS section 2: masked weights, and bytes at one bit each; from the layers' shapes alone."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    masked = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)] + linear[:-1]
    numels = [m.weight.numel() for m in masked]
    assert sum(numels) == weights
    assert sum((n + 7) // 8 for n in numels) == nbytes


def test_a_resnet18_task_is_stored_in_exactly_the_published_bytes():
    def make(classes):
        return torchvision.models.resnet18(num_classes=classes)

    learner = Piggyback(options=RealMaskOptions(epochs=0)).learner(make, "fc")
    learner.begin(image_task("photo", classes=7), make(7))
    learner.learn(image_task("art", classes=7))
    assert learner.bits("art") == 8 * 1_395_864
    packed = [value for key, value in learner.state().items() if key.startswith("keep/")]
    masks = learner.masks("art")["keep"].values()
    assert len(packed) == 20
    assert sum((m.numel() + 7) // 8 for m in masks) == 1_395_864
    assert sum(p.numel() for p in packed) == sum(ops.packed_nbytes(m.numel()) for m in masks)


def test_the_papers_preset():
    paper = presets()["piggyback-paper"]
    assert paper.kind == Threshold(threshold=5e-3, init=1e-2, ternary=False)
    options = paper.options
    assert (options.epochs, options.lr, options.head_lr, options.eps) == (30, 1e-4, 1e-4, 1e-8)
    assert options.batch_norm == "frozen"
    factors = [options.factor(step, 10) for step in (0, 149, 150, 299)]
    assert factors == pytest.approx([1.0, 1.0, 0.1, 0.1])


def test_masks_and_head_take_adams_steps_at_their_own_rates():
    """Adam's first step moves every element with a gradient by its rate, whatever the gradient's size."""
    options = RealMaskOptions(epochs=1, lr=0.25, head_lr=0.125, eps=1e-30, schedule="constant")
    network = conv_net()
    masked = learn_real_masks(network, Threshold(init=1.0), "fc", options, image_task("photo", steps=1))
    moved = (masked.mask_layers()["conv2"].mask_logits.detach() - 1.0).abs()
    assert torch.equal(moved.unique(), torch.tensor([0.0, 0.25]))  # some features are dead: no gradient, no step
    head = (masked.model.fc.bias - network.fc.bias).detach().abs()
    # differences of numbers of size up to 1: rounded by 2**-24
    torch.testing.assert_close(head, torch.full_like(head, 0.125), rtol=0, atol=2.0**-23)


def test_it_learns_what_the_frozen_features_allow():
    task = image_task("art", steps=6)
    once = dataclasses.replace(task, batches=lambda epoch: task.batches(0))
    learner = Piggyback(options=RealMaskOptions(epochs=40, lr=3e-3, head_lr=0.02)).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    learner.learn(once)
    images, labels = next(iter(task.batches(0)))
    assert F.cross_entropy(learner.network("art")(images), labels) < 0.9 * math.log(4)


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": -1}, {"lr": 0.0}, {"head_lr": -1.0}, {"eps": -1e-9}, {"schedule": "linear"}, {"batch_norm": "shared"}],
)
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is .*; expected"):
        RealMaskOptions(**wrong)
