"""The stand-in is named for what it is, repeats exactly, varies, and its styles differ truly."""

from __future__ import annotations

import time

import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.pacs.data import DOMAINS, PacsData, fingerprint
from dwm_fast.pacs.data.procedural import procedural
from dwm_fast.pacs.data.procedural_shapes import SHAPES, distance


@pytest.fixture(scope="module")
def standin() -> PacsData:
    return procedural()


def test_it_says_that_it_is_not_pacs(standin: PacsData) -> None:
    assert standin.name == "procedural stand-in (not PACS)"
    assert standin.real is False
    assert standin.classes == SHAPES
    assert tuple(standin.domains) == DOMAINS


def test_default_set_is_balanced_small_and_split(standin: PacsData) -> None:
    for images in standin.domains.values():
        assert images.images.shape == (7 * 110, 3, 32, 32)
        assert images.images.dtype == torch.uint8
        assert torch.bincount(images.labels[images.train]).tolist() == [80] * 7
        assert torch.bincount(images.labels[images.test]).tolist() == [30] * 7
        assert len(images.names) == len(set(images.names)) == 770


def test_it_is_drawn_in_seconds_on_one_core() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        begin = time.process_time()
        procedural()
        assert time.process_time() - begin < 5
    finally:
        torch.set_num_threads(threads)


def test_same_seed_same_images_another_seed_others() -> None:
    first, again, other = (procedural(24, 3, 2, seed=s) for s in (4, 4, 5))
    assert first.fingerprint == again.fingerprint == fingerprint(first.domains)
    assert first.fingerprint != other.fingerprint


def test_test_images_do_not_depend_on_the_number_of_training_images() -> None:
    small, large = (procedural(24, count, 2).domains["art"] for count in (2, 5))
    assert torch.equal(small.images[small.test], large.images[large.test])


def test_no_two_images_are_alike(standin: PacsData) -> None:
    for images in standin.domains.values():
        assert len(torch.unique(images.images.flatten(1), dim=0)) == len(images.images)


def test_styles_differ_as_their_names_promise(standin: PacsData) -> None:
    light, colour, flat = {}, {}, {}
    for name, images in standin.domains.items():
        pixels = images.images.float() / 255
        light[name] = pixels.mean().item()
        colour[name] = (pixels.amax(1) - pixels.amin(1)).mean().item()
        flat[name] = ((pixels[..., 1:] - pixels[..., :-1]).abs().amax(1) < 0.004).float().mean().item()
    assert colour["sketch"] == 0
    assert light["sketch"] > 0.8
    assert colour["cartoon"] == max(colour.values())
    assert flat["cartoon"] > 0.5
    assert max(flat["photo"], flat["art"]) < 0.2


def test_distances_are_those_of_the_shapes() -> None:
    """Areas by counting points agree with the textbook formulas, and the sign tells inside from outside."""
    axis = torch.linspace(-1.5, 1.5, 601)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pi, root3 = torch.pi, 3**0.5
    expected = {
        "disc": pi * 0.86**2,
        "ring": pi * (0.90**2 - 0.46**2),
        "triangle": 3 * root3 / 4 * 1.12**2,
        "square": (2 * 0.76) ** 2,
        "star": 5 * 1.08 * 0.46 * torch.sin(torch.tensor(pi / 5)).item(),
        "cross": 2 * 4 * 0.94 * 0.30 - 4 * 0.30**2,
    }
    inside = distance(torch.arange(7), x.expand(7, -1, -1), y.expand(7, -1, -1)) < 0
    areas = dict(zip(SHAPES, (inside.float().mean((1, 2)) * 9.03).tolist(), strict=True))
    for shape, area in expected.items():
        assert areas[shape] == pytest.approx(area, rel=0.02), shape
    assert 0.3 < areas["crescent"] < 1.5


def test_impossible_sizes_are_refused() -> None:
    for arguments in ((8, 2, 2, 0), (32, 0, 2, 0), (32, 2, 0, 0), (32, 2, 2, -1)):
        with pytest.raises(InputError, match="expected at least 16 pixels"):
            procedural(*arguments)
