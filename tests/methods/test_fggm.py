"""FGGM: Fisher information and the choice of rows, by the formula written out."""

import dataclasses

import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.methods import FGGM
from dwm_fast.methods.fggm import fisher, high_rows
from dwm_fast.nn import maskable_weights

from .toys import conv_maker, conv_net, image_task, trained_mlp, vector_task


def test_fisher_is_the_mean_of_squared_gradients_of_single_images():
    net, task = conv_net(), image_task("photo")
    found = fisher(net, {"fc": net.fc.weight}, task, images=10)["fc"]
    images, labels = (torch.cat(parts)[:10] for parts in zip(*task.batches(0), strict=True))
    with torch.no_grad():
        features = net.bn2(net.conv2(net.bn1(net.conv1(images)).relu())).relu().mean((2, 3))
        wrong = torch.nn.functional.one_hot(labels, 4) - net.fc(features).softmax(1)  # d log p / d logits
    expected = (wrong[:, :, None] * features[:, None, :]).square().mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def test_rows_above_the_quantile_are_taken_in_their_layer_or_over_all():
    information = {"a": torch.arange(10.0)[:, None].expand(10, 3), "b": 100 + torch.arange(10.0).view(10, 1, 1, 1)}
    layer = high_rows(information, 0.7, "layer")
    assert layer["a"].shape == (10, 3)
    assert layer["a"].all(1).tolist() == layer["b"].flatten().tolist() == [False] * 7 + [True] * 3
    over_all = high_rows(information, 0.7, "global")
    assert not over_all["a"].any()
    assert over_all["b"].flatten().tolist() == [False] * 4 + [True] * 6  # 0.3 of 20 rows


def test_a_pair_s_mask_keeps_the_other_rows_and_leaves_the_network_alone():
    net, task = trained_mlp(), vector_task()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    keep = FGGM(images=40).find(net, dataclasses.replace(task, target=vector_task(seed=1))).keep
    weights = {name: there.weight for name, there in maskable_weights(net).items()}
    trained = high_rows(fisher(net, weights, task, 40), 0.7, "layer")
    assert {name: torch.equal(mask, ~trained[name]) for name, mask in keep.items()} == {"0": True, "2": True}
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    with pytest.raises(InputError, match="fggm looks at the target"):
        FGGM().find(net, task)


def test_in_a_sequence_other_rows_are_never_written():
    learner = FGGM(images=8).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    before = dict(learner.shared)
    figures = learner.learn(image_task("art"))
    changed = {
        n: (before[f"{n}.weight"] != learner.shared[f"{n}.weight"]).flatten(1).any(1) for n in ("conv1", "conv2")
    }
    assert {name: int(rows.sum()) for name, rows in changed.items()} == {"conv1": 2, "conv2": 3}  # above the quantile
    assert figures["fraction_frozen"] == (4 * 27 + 5 * 54) / (6 * 27 + 8 * 54)
