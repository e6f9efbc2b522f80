"""The stages around a mask: frozen means frozen, every policy does what it says, nothing is forgotten."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from dwm_fast.errors import InputError
from dwm_fast.graphs import CaptureError
from dwm_fast.methods import BATCH_NORM_POLICIES, TrainOptions, masked_view, reinitialise, source_view, train
from dwm_fast.methods import _loop as loop
from dwm_fast.methods.transfer import make_schedule, norm_state

from .toys import conv_net, image_batches, under_mask

LAYERS = ("conv1", "conv2", "fc")
NORMS = {
    f"bn{i}.{part}" for i in (1, 2) for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}


def random_keep(net, share=0.4, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(net.get_submodule(n).weight.shape, generator=generator) < share for n in LAYERS}


def tune(net, keep, policy="shared", epochs=2, **options):
    options = {"epochs": epochs, "lr": 0.05, "weight_decay": 0.1, "batch_norm": policy, **options}
    return train(net, image_batches(), 3, TrainOptions(**options), keep=keep)


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int32)


def probe():
    return torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("policy", BATCH_NORM_POLICIES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["one-cycle", "constant"])
def test_kept_weights_are_bit_identical_after_fine_tuning(policy, optimizer, schedule):
    net = conv_net()
    keep = random_keep(net)
    before = copy.deepcopy(net)
    tune(net, keep, policy, optimizer=optimizer, schedule=schedule)
    for name, mask in keep.items():
        old, new = bits(before.get_submodule(name).weight), bits(net.get_submodule(name).weight)
        assert torch.equal(old[mask], new[mask]), name
        assert (old[~mask] != new[~mask]).float().mean() > 0.9, f"{name}: the reuse weights did not learn"


def test_kept_weights_stay_when_a_gradient_is_not_finite():
    net = conv_net()
    keep = random_keep(net)
    before = copy.deepcopy(net)
    bad = [(torch.full((4, 3, 6, 6), float("nan")), torch.zeros(4, dtype=torch.int64))]
    train(net, lambda _: iter(bad), 1, TrainOptions(epochs=1), keep=keep)
    for name, mask in keep.items():
        assert torch.equal(bits(before.get_submodule(name).weight)[mask], bits(net.get_submodule(name).weight)[mask])


def test_frozen_leaves_statistics_and_affine_parameters_of_the_source():
    source = conv_net()
    net = tune(copy.deepcopy(source), random_keep(source), "frozen")
    states = source.state_dict(), net.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in NORMS)
    assert source_view(net, source, "frozen") is net


def test_frozen_trains_on_the_statistics_of_the_source():
    """In training the output is that of eval mode, not one that depends on the batch."""
    source = conv_net()
    seen = []
    hook = nn.modules.batchnorm.BatchNorm2d.register_forward_hook
    net = copy.deepcopy(source)
    hook(net.bn1, lambda module, args, output: seen.append((args[0].detach(), output.detach())))
    tune(net, None, "frozen", epochs=1)
    for given, output in seen:
        assert torch.allclose(source.bn1(given), output)


def test_shared_follows_the_target_and_the_source_is_evaluated_with_it():
    source = conv_net()
    net = tune(copy.deepcopy(source), random_keep(source), "shared")
    states = source.state_dict(), net.state_dict()
    assert not any(torch.equal(states[0][name], states[1][name]) for name in NORMS)
    assert source_view(net, source, "shared") is net


def test_per_domain_gives_the_source_its_own_and_nothing_else_of_its_own():
    source = conv_net()
    net = tune(copy.deepcopy(source), random_keep(source), "per-domain")
    tuned = copy.deepcopy(net.state_dict())
    view = source_view(net, source, "per-domain").state_dict()
    for name, value in view.items():
        assert torch.equal(value, (source.state_dict() if name in NORMS else tuned)[name]), name
    assert not any(torch.equal(tuned[name], source.state_dict()[name]) for name in NORMS)
    assert all(torch.equal(v, tuned[k]) for k, v in net.state_dict().items()), "the target's network was changed"


def test_norm_state_is_exactly_the_norm_layers():
    net = conv_net()
    state = norm_state(net)
    assert set(state) == NORMS
    net.bn1.weight.data.zero_()
    assert not torch.equal(state["bn1.weight"], net.bn1.weight)


@pytest.mark.parametrize("policy", BATCH_NORM_POLICIES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masked_view_is_the_masked_source_network_to_the_last_bit(policy, optimizer):
    source = conv_net()
    keep = random_keep(source)
    net = copy.deepcopy(source)
    reinitialise(net, keep, "random", {}, seed=1)
    tune(net, keep, policy, optimizer=optimizer)
    view = masked_view(net, source, keep)
    with torch.no_grad():
        assert torch.equal(view(probe()), under_mask(source, keep)(probe()))
        assert not torch.equal(net(probe()), source(probe()))


@pytest.mark.parametrize("init", ["S_start", "random"])
def test_reinitialise_touches_reuse_weights_only(init):
    net, start = conv_net(), conv_net(seed=9).state_dict()
    before = copy.deepcopy(net.state_dict())
    keep = random_keep(net)
    reinitialise(net, keep, init, start, seed=4)
    for name, value in net.state_dict().items():
        mask = keep.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if mask is None:
            assert torch.equal(value, before[name]), name
            continue
        assert torch.equal(value[mask], before[name][mask])
        assert not (value[~mask] == before[name][~mask]).any()
        if init == "S_start":
            assert torch.equal(value[~mask], start[name][~mask])


def test_s_end_changes_nothing():
    net = conv_net()
    before = copy.deepcopy(net.state_dict())
    reinitialise(net, random_keep(net), "S_end", {}, seed=4)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_random_is_a_draw_of_the_layers_own_initialisation_by_the_seed():
    nets = []
    for seed in (4, 4, 5):
        nets.append(conv_net())
        reinitialise(nets[-1], {"conv2": torch.zeros(8, 6, 3, 3, dtype=torch.bool)}, "random", {}, seed)
    assert torch.equal(nets[0].conv2.weight, nets[1].conv2.weight)
    assert not torch.equal(nets[0].conv2.weight, nets[2].conv2.weight)
    bound = 1 / (6 * 9) ** 0.5  # torch: uniform in +- 1 / sqrt(fan_in)
    assert nets[0].conv2.weight.abs().max() <= bound
    assert nets[0].conv2.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_random_leaves_the_generators_of_the_process_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    reinitialise(conv_net_without_seed(), {"0": torch.zeros(3, 2, dtype=torch.bool)}, "random", {}, seed=4)
    assert torch.equal(torch.rand(3), expected)


def conv_net_without_seed():
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(nn.Linear(2, 3))


@pytest.mark.gpu
def test_random_leaves_the_gpu_generator_alone():
    model = conv_net().cuda()  # it seeds every generator
    torch.cuda.manual_seed(11)
    before = torch.cuda.get_rng_state()
    reinitialise(model, {"fc": torch.zeros(4, 8, dtype=torch.bool)}, "random", {}, seed=4)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_training_without_a_mask_is_plain_adamw():
    """The baseline, against a loop in plain torch."""
    mine, plain = conv_net(), conv_net()
    tune(mine, None, schedule="constant", optimizer="adamw")
    plain.train()
    optimizer = torch.optim.AdamW(plain.parameters(), 0.05, weight_decay=0.1, fused=True)
    for epoch in range(2):
        for x, y in image_batches()(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            optimizer.step()
    for mine_value, value in zip(mine.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine_value, value)


def test_every_weight_is_trained_again_after_a_frozen_policy():
    net = tune(conv_net(), None, "frozen", epochs=1)
    before = copy.deepcopy(net.state_dict())
    tune(net, None, "shared", epochs=1)
    assert not any(torch.equal(before[name], net.state_dict()[name]) for name in NORMS)
    assert not net.training
    assert all(p.grad is None for p in net.parameters())


def test_one_cycle_warms_up_over_a_fifth_and_ends_near_nothing():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.5)
    schedule = make_schedule(optimizer, TrainOptions(lr=0.5), steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step() if len(rates) < 100 else None
    assert max(rates) == pytest.approx(0.5)
    assert rates.index(max(rates)) in range(18, 22)
    assert rates[-1] < 1e-3 * 0.5


def test_progress_is_told_every_step():
    told = []
    train(conv_net(), image_batches(), 3, TrainOptions(epochs=2), progress=told.append)
    assert len(told) == 6
    assert all(figures["loss"].ndim == 0 and not figures["loss"].requires_grad for figures in told)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_norm": "thawed"},
        {"optimizer": "lion"},
        {"schedule": "steps"},
        {"lr": -1.0},
        {"epochs": -1},
        {"weight_decay": -0.1},
        {"label_smoothing": 1.0},
    ],
)
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is .*expected"):
        TrainOptions(**wrong)


def test_an_unknown_init_is_named():
    with pytest.raises(InputError, match="init is 'S_middle'; expected one of S_start, S_end, random"):
        reinitialise(conv_net(), {}, "S_middle", {}, 0)


class TestFastStep:
    """Where a GPU's graph takes over from the eager step, played on a CPU."""

    def steps(self, monkeypatch, capture):
        monkeypatch.setattr(loop, "_on_gpu", lambda images: True)
        monkeypatch.setattr(loop, "capture_step", capture)
        eager = []

        def step(images, labels):
            eager.append(len(images))
            return images.sum()

        return loop.FastStep(step, restore=()), eager

    def test_first_batch_is_captured_once_and_other_shapes_run_eagerly(self, monkeypatch):
        replayed, captures = [], []

        def capture(step, *examples, restore):
            captures.append(examples)
            return lambda images, labels: replayed.append(len(images)) or images.sum()

        fast, eager = self.steps(monkeypatch, capture)
        for size in (4, 4, 3, 4):
            assert fast(torch.ones(size), torch.ones(size)) == size
        assert (replayed, eager, len(captures)) == ([4, 4, 4], [3], 1)

    def test_a_failed_capture_is_one_warning_and_the_eager_step(self, monkeypatch):
        def capture(step, *examples, restore):
            raise CaptureError("the step waits for the device")

        fast, eager = self.steps(monkeypatch, capture)
        with pytest.warns(RuntimeWarning, match="without a CUDA graph: the step waits") as caught:
            assert [fast(torch.ones(2), torch.ones(2)).item() for _ in range(3)] == [2.0] * 3
        assert eager == [2, 2, 2]
        assert len(caught) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("policy", BATCH_NORM_POLICIES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("masked", [True, False])
def test_gpu_captured_and_eager_training_agree(policy, optimizer, masked, monkeypatch):
    captured = []
    original = loop.capture_step
    monkeypatch.setattr(loop, "capture_step", lambda *a, **k: captured.append(original(*a, **k)) or captured[-1])

    def tuned():
        net = conv_net().cuda()
        keep = {k: v.cuda() for k, v in random_keep(net).items()} if masked else None
        options = TrainOptions(epochs=3, lr=0.01, optimizer=optimizer, batch_norm=policy)
        losses = []
        train(
            net,
            image_batches(device="cuda"),
            3,
            options,
            keep=keep,
            progress=lambda figures: losses.append(float(figures["loss"])),
        )
        return net, losses, keep

    graph, graph_losses, keep = tuned()
    assert [run.captured for run in captured] == [True]
    monkeypatch.setattr(loop, "_on_gpu", lambda images: False)
    eager, eager_losses, _ = tuned()
    assert graph_losses == pytest.approx(eager_losses, rel=1e-3)
    assert len(set(graph_losses)) == 9
    source = conv_net()
    for name in LAYERS:
        one, other = graph.get_submodule(name).weight, eager.get_submodule(name).weight
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        if keep is not None:
            mask = keep[name].cpu()
            assert torch.equal(bits(one.cpu())[mask], bits(source.get_submodule(name).weight)[mask])


def test_start_decay_pulls_what_is_trained_toward_its_start_by_rate_times_c():
    """Against the formula, after a step of plain SGD; kept weights, one of them -0.0, stay to the bit."""
    net = conv_net()
    with torch.no_grad():
        net.conv2.weight[0, 0, 0, 0] = -0.0
    keep = {"conv2": torch.zeros(8, 6, 3, 3, dtype=torch.bool)}
    keep["conv2"][0] = True
    start = copy.deepcopy(net.state_dict())
    plain, pulled = copy.deepcopy(net), copy.deepcopy(net)
    for each, decay in ((plain, 0.0), (pulled, 3.0)):
        options = TrainOptions(
            epochs=1, lr=0.05, optimizer="sgd", schedule="constant", weight_decay=0.0, start_decay=decay
        )
        train(each, lambda epoch: itertools.islice(image_batches()(epoch), 1), 1, options, keep=keep)
    for name, parameter in pulled.named_parameters():
        moved = plain.get_parameter(name).detach()
        expected = moved - (moved - start[name]) * torch.tensor(0.05).mul(3.0)
        assert torch.equal(parameter.detach(), expected)
    kept = pulled.conv2.weight.detach()[0]
    assert torch.equal(kept.view(torch.int32), start["conv2.weight"][0].view(torch.int32))
    assert not torch.equal(pulled.conv2.weight[1:], plain.conv2.weight[1:])


@pytest.mark.parametrize("steps", range(1, 12))
def test_the_schedule_of_a_few_steps_ends_below_where_it_was_highest(steps):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.5)
    schedule = make_schedule(optimizer, TrainOptions(lr=0.5), steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) <= 0.5
    assert steps == 1 or rates[-1] < 1e-4 * max(rates)


@pytest.mark.parametrize("start_decay", [0.0, 3.0])
def test_kept_weights_may_be_pulled_to_their_start_in_place_of_frozen(start_decay):
    """Against the formula, after a step of plain SGD: rate * c, c by the weight's bit; without a mask one c for all."""
    net = conv_net()
    keep = {"conv2": torch.rand(8, 6, 3, 3, generator=torch.Generator().manual_seed(2)) < 0.5}
    start = copy.deepcopy(net.state_dict())
    free, pulled = copy.deepcopy(net), copy.deepcopy(net)
    options = TrainOptions(epochs=1, lr=0.05, optimizer="sgd", schedule="constant", weight_decay=0.0)
    pulling = replace(options, start_decay=start_decay, kept_decay=7.0)
    for each, chosen in ((free, options), (pulled, pulling)):
        mask = keep if each is pulled else None
        train(each, lambda epoch: itertools.islice(image_batches()(epoch), 1), 1, chosen, keep=mask)
    for name, parameter in pulled.named_parameters():
        moved = free.get_parameter(name).detach()
        c = torch.full_like(moved, start_decay)
        if name == "conv2.weight":
            c = torch.where(keep["conv2"], 7.0, c)
            assert not torch.equal(parameter[keep["conv2"]], start[name][keep["conv2"]]), "kept weights are trained"
        assert torch.equal(parameter.detach(), moved - (moved - start[name]) * (torch.tensor(0.05) * c)), name
