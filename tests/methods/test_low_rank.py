"""Low-rank reuse: singular directions by NumPy in fp64, and what a sequence may move."""

import numpy as np
import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.methods import LowRank, TrainOptions
from dwm_fast.methods.low_rank import carried, free_part, top_directions

from .toys import conv_maker, conv_net, image_task, trained_mlp, vector_task


def orthonormal(n, columns, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, columns)))[0]


U, V = orthonormal(6, 4, 0), orthonormal(9, 4, 1)
W = torch.from_numpy(U @ np.diag([4.0, 3.0, 2.0, 1.0]) @ V.T)  # squares 16, 9, 4, 1 of 30


def test_the_free_part_is_what_projections_leave():
    kept = torch.from_numpy(U[:, :2]), torch.from_numpy(V[:, :2])
    matrix = torch.from_numpy(np.random.default_rng(2).standard_normal((6, 9)))
    left, right = np.eye(6) - U[:, :2] @ U[:, :2].T, np.eye(9) - V[:, :2] @ V[:, :2].T
    np.testing.assert_allclose(free_part(matrix, kept).numpy(), left @ matrix.numpy() @ right, atol=1e-14)


@pytest.mark.parametrize(("energy", "rank"), [(0.3, 1), (0.5, 1), (0.55, 2), (0.8, 2), (0.9, 3), (0.99, 4)])
def test_the_fewest_directions_that_hold_the_energy_are_kept(energy, rank):
    left, right = top_directions(W, energy)
    assert left.shape == (6, rank)
    assert right.shape == (9, rank)
    np.testing.assert_allclose((left @ left.T).numpy(), U[:, :rank] @ U[:, :rank].T, atol=1e-13)
    np.testing.assert_allclose((right @ right.T).numpy(), V[:, :rank] @ V[:, :rank].T, atol=1e-13)


def test_kept_directions_stay_and_as_few_as_needed_are_added():
    """With the second direction of W kept, 21 of 30 are free; the top one of that, 16, leaves 5."""
    kept = torch.from_numpy(U[:, 1:2]), torch.from_numpy(V[:, 1:2])
    left, right = top_directions(W, 0.5, kept)
    assert torch.equal(left[:, :1], kept[0])
    assert torch.equal(right[:, :1], kept[1])
    np.testing.assert_allclose((left @ left.T).numpy(), U[:, :2] @ U[:, :2].T, atol=1e-13)
    assert top_directions(W, 0.29, kept)[0].shape == (6, 1)  # 21.3 may be free
    assert top_directions(torch.zeros(6, 9), 0.5)[0].shape == (6, 0)


def test_a_pair_keeps_the_weights_that_the_top_directions_carry():
    net = trained_mlp()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = LowRank(energy=0.6).find(net, vector_task())
    assert list(found.keep) == ["0", "2"]
    for name, mask in found.keep.items():
        matrix = before[f"{name}.weight"].double().numpy()
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        rank = next(k for k in range(1, len(s) + 1) if (s[:k] ** 2).sum() >= 0.6 * (s**2).sum())
        low = u[:, :rank] @ np.diag(s[:rank]) @ vh[:rank]
        margin = np.abs(low) - np.abs(matrix - low)
        sure = np.abs(margin) > 1e-5  # fp32: the two parts of a few elements are as large as each other
        assert sure.mean() > 0.99
        assert np.array_equal(mask.numpy()[sure], margin[sure] >= 0)
        assert 0.1 < mask.float().mean() < 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_filter_is_a_row_of_its_layers_matrix():
    weight = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(carried(weight, 0.5), carried(weight.reshape(5, 18), 0.5).view(5, 2, 3, 3))


def test_later_tasks_move_weights_orthogonally_to_all_kept_directions():
    """fp32: a product sums at most 54 terms, each rounded by 2^-24 of at most the largest weight, and two follow."""
    options = TrainOptions(3, 0.02, batch_norm="frozen")
    learner = LowRank(options=options).learner(conv_maker, "fc")
    figures = [learner.begin(image_task("photo"), conv_net())]
    for name in ("art", "sketch"):
        before, shared = {k: dict(v) for k, v in learner.memory.items()}, dict(learner.shared)
        figures.append(learner.learn(image_task(name)))
        for layer in ("conv1", "conv2"):
            old, new = (tensors[f"{layer}.weight"].flatten(1) for tensors in (shared, learner.shared))
            left, right = before["left"][layer], before["right"][layer]
            bound = 2 * 54 * 54 * 2**-24 * float(new.abs().max())
            assert left.shape[1] > 0
            assert (left.T @ (new - old)).abs().max() < bound
            assert ((new - old) @ right).abs().max() < bound
            assert (new - old).abs().max() > 20 * bound
            assert torch.equal(learner.memory["left"][layer][:, : left.shape[1]], left)
        assert torch.equal(shared["conv1.bias"], learner.shared["conv1.bias"])
    ranks = [learner.memory["left"][layer].shape[1] for layer in ("conv1", "conv2")]
    free = (6 - ranks[0]) * (27 - ranks[0]) + (8 - ranks[1]) * (54 - ranks[1])
    assert figures[-1]["fraction_frozen"] == 1 - free / (6 * 27 + 8 * 54)


def test_wrong_options_are_named():
    with pytest.raises(InputError, match="expected frozen or per-domain: earlier tasks need theirs"):
        LowRank(options=TrainOptions(batch_norm="shared"))
    with pytest.raises(InputError, match=r"energy is 1\.0; expected a fraction between 0 and 1"):
        LowRank(energy=1.0)
