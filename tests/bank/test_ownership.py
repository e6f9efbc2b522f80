"""Ownership in one file: as the format's page says, as small as it says, and every task's mask is the one it was."""

import math

import numpy as np
import pytest
import torch

from dwm_fast.bank import MaskFile, Ownership, make_domain, read_ownership, write_mask_file, write_ownership
from dwm_fast.errors import InputError, MaskFileError
from dwm_fast.methods import PackNet, TrainOptions

from ..methods.toys import conv_maker, conv_net, image_task
from .reader import read

TASKS = ("photo", "art", "cartoon", "sketch", "infograph")


def owners(tasks=5, seed=0, shapes=((7, 3, 3, 3), (40, 11), (0, 4), ())):
    """Each later task owns half of what is left, as after pruning."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i, shape in enumerate(shapes):
        draw = -torch.rand(shape, generator=generator).log2().floor()  # k with probability 2^-k
        found[f"layer{i}.weight"] = torch.where(draw > tasks, 0, draw).to(torch.uint8)
    return Ownership(TASKS[:tasks], found)


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("coding", ["raw", "coded"])
def test_every_owner_comes_back(tmp_path, coding, tasks):
    ownership = owners(tasks)
    write_ownership(tmp_path / "o.safetensors", ownership, coding)
    back = read_ownership(tmp_path / "o.safetensors")
    assert back.tasks == TASKS[:tasks]
    assert list(back.owner) == list(ownership.owner)
    assert all(torch.equal(back.owner[name], owner) for name, owner in ownership.owner.items())


def test_a_reader_of_the_formats_page_finds_the_binary_digits(tmp_path):
    ownership = owners()
    write_ownership(tmp_path / "o.safetensors", ownership)
    _, masks = read(tmp_path / "o.safetensors")
    for name, owner in ownership.owner.items():
        value = sum(2**k * np.asarray(masks[f"{k}.{name}"]).reshape(owner.shape).astype(int) for k in range(3))
        assert np.array_equal(value, owner.numpy())


def test_a_reader_of_the_formats_page_finds_the_chain(tmp_path):
    ownership = owners()
    write_ownership(tmp_path / "o.safetensors", ownership, "coded")
    _, masks = read(tmp_path / "o.safetensors")
    for name, owner in ownership.owner.items():
        asked = [np.asarray(masks[f"{k}.{name}"]).reshape(-1).tolist() for k in range(5)]
        found = []
        for _ in range(owner.numel()):  # element by element, from the front of each mask
            found.append(next((k + 1 for k in range(5) if asked[k].pop(0)), 0))
        assert found == owner.reshape(-1).tolist()
        assert asked == [[]] * 5


def test_a_file_takes_ceil_log2_of_tasks_and_one_bits_a_weight_or_its_entropy(tmp_path):
    """Coded: an ANS step on a state of 2^32 or more, at frequencies of 24 bits, loses at most log2(1 + 2^-8) bits; the
    rounding of the frequency less than one bit a mask here, and the state's last words 96."""
    for tasks, digits in ((1, 1), (2, 2), (3, 2), (4, 3), (5, 3)):
        ownership = owners(tasks, shapes=((64, 32, 3, 3),))
        owner = ownership.owner["layer0.weight"]
        write_ownership(tmp_path / "raw", ownership)
        write_ownership(tmp_path / "coded", ownership, "coded")
        assert ownership.bits_per_weight == digits == math.ceil(math.log2(tasks + 1))
        assert MaskFile(tmp_path / "raw").payload_nbytes * 8 == digits * owner.numel()
        share = torch.bincount(owner.flatten().long()).double() / owner.numel()
        entropy = float(-(share * share.log2()).nan_to_num().sum()) * owner.numel()
        asked = sum(int(((owner == 0) | (owner >= k)).sum()) for k in range(1, tasks + 1))
        coded = MaskFile(tmp_path / "coded").payload_nbytes * 8
        assert entropy <= coded + 1
        assert coded <= entropy + asked * math.log2(1 + 2**-8) + 97 * tasks


def test_packnets_masks_come_back_from_the_file(tmp_path):
    quick = TrainOptions(1, 0.01, batch_norm="frozen")
    learner = PackNet(training=quick, retraining=quick).learner(conv_maker, "fc")
    learner.begin(image_task("photo"), conv_net())
    learner.learn(image_task("art"))
    learner.learn(image_task("sketch"))
    for coding in ("raw", "coded"):
        write_ownership(tmp_path / coding, learner.ownership(), coding)
        back = read_ownership(tmp_path / coding)
        for task in ("photo", "art", "sketch"):
            masks = {f"{layer}.weight": mask for layer, mask in learner.masks(task).items()}
            assert back.masks(task).keys() == masks.keys()
            assert all(torch.equal(back.masks(task)[name], mask) for name, mask in masks.items())
    assert 8 * MaskFile(tmp_path / "raw").payload_nbytes == 2 * (162 + 6 + 432)  # 162 bits fill 21 bytes


def test_a_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "o.safetensors"
    write_ownership(path, owners())
    data = bytearray(path.read_bytes())
    data[MaskFile(path).header_nbytes] ^= 1
    path.write_bytes(data)
    with pytest.raises(MaskFileError, match="checksum differs"):
        read_ownership(path)


def forged(path, masks, **options):
    described = {"tasks": ["photo", "art"], "ownership": "digits", **options}
    write_mask_file(path, make_domain("ownership", masks, options=described))


@pytest.mark.parametrize(
    ("masks", "options", "message"),
    [
        ({}, {"ownership": "bits"}, "holds no ownership; expected one that write_ownership wrote"),
        ({}, {"tasks": []}, "expected 1 to 255 names"),
        ({}, {"tasks": ["photo", "photo"]}, "expected 1 to 255 names, each once"),
        ({}, {"tasks": ["photo", 3]}, "expected 1 to 255 names"),
        ({"0.a": [1], "2.a": [0]}, {}, "2.a: expected part 1 of 'a' here"),
        ({"0.a": [1]}, {}, "a: 1 parts; expected 2 for 2 tasks"),
        ({"0.a": [1], "1.a": [1]}, {}, "a: owner 3 of 2 tasks"),
        ({"0.a": [1, 0], "1.a": [1]}, {}, r"1\.a: shape \(1,\); expected \(2,\), that of 0\.a"),
        ({"0.a": [1, 0], "1.a": [1, 0, 0]}, {}, r"1\.a: shape \(3,\); expected \(2,\), that of 0\.a"),
        ({"0.a": [1, 0], "1.a": [1, 1]}, {"ownership": "chain"}, "2 bits for task 2; expected 1"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, masks, options, message):
    forged(tmp_path / "f", {name: torch.tensor(bits).bool() for name, bits in masks.items()}, **options)
    with pytest.raises(MaskFileError, match=message):
        read_ownership(tmp_path / "f")


def test_wrong_arguments_are_named(tmp_path):
    owner = {"a": torch.tensor([0, 1, 3], dtype=torch.uint8)}
    with pytest.raises(InputError, match=r"owner 'a' is torch\.uint8 with values to 3; .* values to 2"):
        Ownership(("photo", "art"), owner)
    with pytest.raises(InputError, match=r"owner 'a' is torch\.int64"):
        Ownership(("photo",), {"a": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(InputError, match="expected 1 to 255 names, each once"):
        Ownership(("photo", "photo", "art"), owner)
    three = Ownership(("photo", "art", "sketch"), owner)
    with pytest.raises(InputError, match="task 'clipart' is not among photo, art, sketch"):
        three.masks("clipart")
    with pytest.raises(InputError, match="coding 'zip' is unknown"):
        write_ownership(tmp_path / "o", three, "zip")
