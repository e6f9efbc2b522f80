"""naive: kept is what lies MORE than one standard deviation from its layer's mean."""

import pytest
import torch
from torch import nn

from dwm_fast.methods import Naive, NoMask

from .toys import conv_net, vector_task


def linear(rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows)
    return layer


def keep(model, **options):
    return Naive(**options).find(model, vector_task()).keep


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        ([[-3.0, -1.0, 1.0, 3.0]], [[True, False, False, True]]),  # mean 0, deviation sqrt(5)
        ([[-1.0, 1.0, 1.0, -1.0]], [[False] * 4]),  # all exactly one deviation from the mean: not MORE
        ([[5.0, 5.0, 5.0, 5.0]], [[False] * 4]),  # no deviation
        ([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 8.0]], [[False] * 4, [False, False, False, True]]),
        ([[11.0, 9.5, 10.0, 10.0, 13.0]], [[False, False, False, False, True]]),  # mean 10.7, deviation 1.25
    ],
)
def test_rule_by_hand(weights, kept):
    assert keep(nn.Sequential(linear(weights)))["0"].tolist() == kept


def test_each_layer_has_its_own_mean_and_deviation():
    rows = torch.randn(4, 8)
    net = nn.Sequential(linear(rows.tolist()), linear((1000 * rows + 70).tolist()))
    masks = keep(net)
    assert torch.equal(masks["0"], masks["1"])


def test_more_deviations_keep_fewer():
    net = conv_net()
    counts = [sum(int(m.sum()) for m in keep(net, deviations=d).values()) for d in (0.0, 0.5, 1.0, 2.0)]
    total = sum(m.weight.numel() for m in (net.conv1, net.conv2, net.fc))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == total
    assert 0 < counts[2] < 0.5 * total


def test_only_layers_that_fit_the_patterns_have_a_mask():
    assert set(keep(conv_net())) == {"conv1", "conv2", "fc"}
    assert set(keep(conv_net(), include=["conv*"], exclude=["conv2"])) == {"conv1"}


def test_model_is_left_as_it_was_and_counts_are_right():
    net = conv_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = Naive().find(net, vector_task())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert found.counts()["fc"] == (int(found.keep["fc"].sum()), 32)
    kept, total = (sum(column) for column in zip(*found.counts().values(), strict=True))
    assert found.fraction_kept == kept / total
    assert found.coefficient is None
    assert found.within_budget is None


def test_none_keeps_nothing():
    found = NoMask().find(conv_net(), vector_task())
    assert found.keep is None
    assert found.fraction_kept == 0
    assert found.counts() == {}
