"""SPG: what is measured and how the step is slowed, against METHODS section 4 written out again."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwm_fast.errors import InputError
from dwm_fast.methods import SPG, FineTuning, Task, TrainOptions, presets, spg

from .toys import INPUTS, conv_maker, conv_net, image_task, images_for_tests, vector_batches


class Net(nn.Module):
    """(B, 3) -> (B, classes), without batch norm."""

    def __init__(self, classes=2):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def net(seed=0, classes=2):
    torch.manual_seed(seed)
    return Net(classes).double()


def make(classes):
    return Net(classes).double()


def task(name, seed=0, steps=2, classes=2):
    def batches(epoch):
        generator = torch.Generator().manual_seed(100 * len(name) + epoch)
        for _ in range(steps):
            yield torch.randn(6, 3, generator=generator).double(), torch.randint(classes, (6,), generator=generator)

    return Task(name, classes, batches, steps, lambda network: 1.0, seed)


def formula(total):
    """abs(tanh((g - mean) / unbiased std)), by Python floats."""
    values = total.flatten().tolist()
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return torch.tensor([abs(math.tanh((v - mean) / std)) for v in values]).view(total.shape)


def gradient_sum(network, batches, loss):
    """Signed sum over batches of the gradients of `loss(logits, labels)` in the body's two tensors."""
    sums = [torch.zeros_like(p) for p in network.body.parameters()]
    for images, labels in batches:
        network.zero_grad()
        loss(network(images), labels).backward()
        for total, parameter in zip(sums, network.body.parameters(), strict=True):
            total += parameter.grad
    return sums


def gammas(learner):
    state = learner.state()
    return [state["gamma/body.weight"], state["gamma/body.bias"]]


def assert_close(mine, expected):
    for a, b in zip(mine, expected, strict=True):
        # both are rounded to fp32 once; sums of a dozen fp64 terms differ by far less
        torch.testing.assert_close(a, b.float(), rtol=2.0**-22, atol=2.0**-22)


def test_importance_of_the_first_task_is_that_of_its_cross_entropy():
    network = net()
    learner = SPG().learner(make, "head")
    learner.begin(task("a"), network)
    expected = [formula(g) for g in gradient_sum(net(), task("a").batches(0), F.cross_entropy)]
    assert_close(gammas(learner), expected)


def test_importance_of_a_later_task_is_the_maximum_over_heads_and_tasks_on_its_own_data():
    method = SPG(epochs=1, lr=0.05)
    learner = method.learner(make, "head")
    learner.begin(task("a"), net())
    before = gammas(learner)
    learner.learn(task("bb", classes=3))
    now = task("bb", classes=3)
    own = [formula(g) for g in gradient_sum(learner.network("bb"), now.batches(1), F.cross_entropy)]
    old_head = learner.network("a")  # the shared body as it is now, with the first task's head
    others = [formula(g) for g in gradient_sum(old_head, now.batches(1), lambda logits, labels: logits.sum())]
    expected = [torch.stack([a.float(), b.float(), c]).amax(0) for a, b, c in zip(own, others, before, strict=True)]
    assert_close(gammas(learner), expected)
    assert any((now > old).any() for now, old in zip(gammas(learner), before, strict=True))


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_training_scales_the_bodys_gradients_by_1_minus_gamma_and_the_heads_by_1_minus_its_mean(factor):
    method = SPG(epochs=2, lr=0.2, schedule="plateau", head_factor=factor)
    learner = method.learner(make, "head")
    learner.begin(task("a"), net())
    gamma = [g.double() for g in gammas(learner)]
    mean = sum(float(g.sum()) for g in gamma) / sum(g.numel() for g in gamma)
    second = task("bb", seed=5)
    learner.learn(second)

    torch.manual_seed(5)
    head = nn.Linear(4, 2)  # what a fresh head of this seed is
    expected = net()
    expected.head.load_state_dict(head.state_dict())
    for epoch in range(2):
        for images, labels in second.batches(epoch):
            expected.zero_grad()
            F.cross_entropy(expected(images), labels).backward()
            with torch.no_grad():
                for p, g in zip(expected.body.parameters(), gamma, strict=True):
                    p -= 0.2 * (1 - g) * p.grad
                for p in expected.head.parameters():
                    p -= 0.2 * factor * (1 - mean) * p.grad
    mine = learner.network("bb").state_dict()
    for key, value in expected.state_dict().items():
        # the loss is taken in fp32 logits: four steps with gradients near 1 and rounding 2**-24
        torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-6)


def test_a_weight_of_full_importance_never_moves_again():
    learner = SPG(epochs=3, lr=1.0).learner(make, "head")
    learner.begin(task("a"), net())
    learner.gamma["body.weight"].fill_(1.0)
    learner.learn(task("bb"))
    assert torch.equal(learner.network("bb").body.weight, net().body.weight)
    assert not torch.equal(learner.network("bb").body.bias, net().body.bias)


def test_the_heads_gradient_is_clipped_before_it_is_scaled():
    def head_after(clip):
        learner = SPG(epochs=1, lr=1.0, schedule="plateau", head_clip=clip, head_factor=1.0).learner(make, "head")
        learner.begin(task("a"), net())
        rate = 1 - float(learner.mean_importance())
        learner.learn(task("bb", steps=1, seed=4))
        torch.manual_seed(4)
        start = nn.Linear(4, 2).double()
        ends = zip(learner.network("bb").head.parameters(), start.parameters(), strict=True)
        return float(torch.cat([(a - b).detach().flatten() for a, b in ends]).norm()), rate

    moved, rate = head_after(1e-3)
    assert moved == pytest.approx(1e-3 * rate, rel=1e-3)  # clip_grad_norm_ adds 1e-6 to the norm it divides by
    assert head_after(1e4)[0] > 10 * moved


@pytest.mark.parametrize("policy", ["frozen", "shared", "per-domain"])
def test_measuring_leaves_batch_norm_and_weights_as_they_were(policy):
    learner = SPG(batch_norm=policy).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    mine = learner.network("photo").state_dict()
    for key, value in conv_net().state_dict().items():
        assert torch.equal(mine[key], value), key


def test_measuring_is_done_with_the_statistics_of_each_batch():
    """Train mode: the importance does not depend on the running statistics, under a frozen policy it does."""
    found = {}
    for policy in ("per-domain", "frozen"):
        for shift in (0.0, 1.0):
            network = conv_net()
            network.bn2.running_mean += shift
            learner = SPG(batch_norm=policy).learner(conv_maker, "fc")
            learner.begin(image_task("photo"), network)
            found[policy, shift] = learner.state()["gamma/conv1.weight"]
    assert torch.equal(found["per-domain", 0.0], found["per-domain", 1.0])
    assert not torch.equal(found["frozen", 0.0], found["frozen", 1.0])


def test_a_task_adds_its_batch_norm_where_it_has_its_own_and_nothing_else():
    for policy, bits in (("frozen", 0), ("shared", 0), ("per-domain", 32 * 4 * (6 + 8))):
        learner = SPG(epochs=1, batch_norm=policy).learner(conv_maker, "fc")
        learner.begin(image_task("photo"), conv_net())
        learner.learn(image_task("art"))
        assert {learner.bits(name) for name in ("photo", "art")} == {bits}


def test_earlier_tasks_keep_their_batch_norm_under_per_domain_and_follow_under_shared():
    for policy, kept in (("per-domain", True), ("shared", False)):
        learner = SPG(epochs=1, batch_norm=policy).learner(conv_maker, "fc")
        learner.begin(image_task("photo"), conv_net())
        learner.learn(image_task("art"))
        mean = learner.network("photo").bn1.running_mean
        assert torch.equal(mean, conv_net().bn1.running_mean) is kept
        assert torch.equal(mean, learner.network("art").bn1.running_mean) is not kept


def test_plateau_cuts_the_rate_by_a_third_until_it_is_too_low():
    """The loss never falls: with patience 1 the rate is cut after epochs 3, 5, 7, ..."""
    told = []
    flat = task("bb", steps=1)
    flat = Task(flat.name, 2, flat.batches, 1, lambda network: told.append(1) or 1.0, 0)
    learner = SPG(epochs=100, lr=0.9, schedule="plateau", patience=1, min_lr=0.05).learner(make, "head")
    learner.begin(task("a"), net())
    figures = learner.learn(flat)
    # 0.9, 0.3, 0.1, 0.0333: the third cut, after epoch 7, ends it
    assert (figures["epochs"], len(told)) == (7, 7)


def test_the_authors_end_holds_the_lowest_rate_and_takes_the_best_weights_back():
    """Patience 1; after 5 and 4 only epoch 9 is lower. Rates: 0.9 to epoch 4, 0.3 to epoch 6, then 0.1, held."""
    losses = iter([5.0, 4.0, 4.5, 4.5, 4.5, 4.5, 4.5, 4.5, 3.0, 3.5, 3.5, 3.5, 3.5])
    seen, rates = [], []

    def loss(network):
        seen.append({key: value.clone() for key, value in network.state_dict().items()})
        return next(losses)

    real = spg.soft_masked_sgd

    def told(weights, gradients, gammas, lr):
        rates.append(float(lr))
        real(weights, gradients, gammas, lr)

    flat = task("bb", steps=1)
    method = SPG(epochs=100, lr=0.9, schedule="plateau", patience=1, min_lr=0.1, stop_after=3)
    learner = method.learner(make, "head")
    learner.begin(task("a"), net())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spg, "soft_masked_sgd", told)
        figures = learner.learn(Task(flat.name, 2, flat.batches, 1, loss, 0))
    # at 0.1 from epoch 7 on: epochs 7 and 8 in vain, 9 is the best, 10 to 12 are three in vain
    assert figures["epochs"] == 12
    assert rates == pytest.approx([0.9] * 4 + [0.3] * 2 + [0.1] * 6)
    ended = learner.network("bb").state_dict()
    assert all(torch.equal(ended[key], seen[8][key]) for key in ended)
    assert not all(torch.equal(ended[key], seen[11][key]) for key in ended)


def test_it_forgets_less_than_plain_fine_tuning():
    """Two tasks that want the same weights: SPG's first task is worse off by less than plain SGD's would be."""

    def mlp(classes):
        return nn.Sequential(nn.Linear(INPUTS, 48), nn.ReLU(), nn.Linear(48, classes))

    torch.manual_seed(0)
    start = mlp(4)
    optimizer = torch.optim.Adam(start.parameters(), lr=0.01)
    for epoch in range(6):
        for x, y in vector_batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(start(x), y).backward()
            optimizer.step()

    def other(epoch):  # the same inputs, other labels
        return ((x.roll(4, 1), y) for x, y in vector_batches(epoch))

    x, y = next(iter(vector_batches(50)))
    losses = {}
    for name, method in (
        ("spg", SPG(epochs=4, lr=0.3, schedule="plateau")),
        ("none", FineTuning(TrainOptions(epochs=4, lr=0.3, optimizer="sgd", schedule="constant", weight_decay=0.0))),
    ):
        learner = method.learner(mlp, "2")
        learner.begin(Task("a", 4, vector_batches, 20, lambda network: 1.0), copy.deepcopy(start))
        learner.learn(Task("b", 4, other, 20, lambda network: 1.0))
        losses[name] = F.cross_entropy(learner.network("a")(x), y).item()
    assert losses["spg"] < 0.7 * losses["none"]


def test_domains_of_a_bank_predict_the_same_bits():
    learner = SPG(epochs=1).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    learner.learn(image_task("art", classes=3))
    bank = learner.bank()
    for name in ("photo", "art"):
        bank.activate(name)
        with torch.no_grad():
            assert torch.equal(bank(images_for_tests()), learner.network(name)(images_for_tests()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": -1},
        {"lr": 0.0},
        {"schedule": "step"},
        {"factor": 1.0},
        {"patience": -1},
        {"min_lr": -1.0},
        {"head_clip": 0.0},
        {"head_factor": 0.0},
        {"batch_norm": "none"},
        {"stop_after": 0},
    ],
)
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is .*; expected"):
        SPG(**wrong)


def test_the_papers_preset():
    paper = presets()["spg-paper"]
    assert (paper.lr, paper.schedule, paper.factor, paper.patience, paper.min_lr) == (0.25, "plateau", 1 / 3, 4, 1e-3)
    assert (paper.epochs, paper.stop_after, paper.head_factor, paper.head_clip) == (500, 5, 1.0, 1e4)
