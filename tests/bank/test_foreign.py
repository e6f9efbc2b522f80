"""Masks that other programs wrote come in unchanged, and go out so that they read them."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

from dwm_fast.bank import (
    MaskBank,
    as_masks,
    as_ternary,
    from_packbits,
    from_pruned,
    make_domain,
    read_foreign,
    read_ternary,
    to_packbits,
    to_pruned,
    write_foreign,
)
from dwm_fast.bank.record import effective_weight
from dwm_fast.errors import InputError, MaskFileError

from . import nets


def _masks() -> dict[str, torch.Tensor]:
    return nets.masks_for(nets.small_net(), 3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float16])
def test_state_dicts_of_any_dtype_are_masks(dtype: torch.dtype) -> None:
    masks = _masks()
    found = as_masks({name: mask.to(dtype) for name, mask in masks.items()})
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    arrays = as_masks({name: mask.to(dtype).numpy() for name, mask in masks.items()})
    assert all(torch.equal(arrays[name], masks[name]) for name in masks)


def test_scores_are_not_taken_for_masks() -> None:
    with pytest.raises(InputError, match=r"'w'.*values other than 0 and 1"):
        as_masks({"w": torch.tensor([0.0, 0.5])})


def test_modules_pruned_by_torch_come_in_and_go_out() -> None:
    net = nets.small_net()
    original = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    prune.l1_unstructured(net.conv1, "weight", amount=0.4)
    prune.random_unstructured(net.hidden, "weight", amount=0.7)
    masks = from_pruned(net)
    assert set(masks) == {"conv1.weight", "hidden.weight"}
    plain = nets.small_net()
    plain.load_state_dict(original)
    bank = MaskBank(plain)
    bank.add("pruned", masks)
    bank.activate("pruned")
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(bank(x), net(x))
    again = to_pruned(nets.small_net(), bank.masks("pruned"))
    assert prune.is_pruned(again)
    assert torch.equal(again(x), net(x))
    assert all(torch.equal(m, masks[n]) for n, m in from_pruned(again).items())
    with pytest.raises(InputError, match="no pruning masks"):
        from_pruned(plain)
    with pytest.raises(InputError, match="fits no parameter"):
        to_pruned(plain, {"conv1.weight": torch.ones(3).bool()})


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), max_size=4).map(tuple),
    order=st.sampled_from(["big", "little"]),
    seed=st.integers(0, 2**31),
)
def test_packbits_come_in_and_go_out(shape: tuple[int, ...], order: str, seed: int) -> None:
    keep = np.random.default_rng(seed).random(shape) < 0.5
    packed = np.packbits(keep.reshape(-1), bitorder=order)
    masks = from_packbits({"w": packed}, {"w": shape}, order)
    assert np.array_equal(masks["w"].numpy(), keep)
    out, shapes = to_packbits(masks, order)
    assert np.array_equal(out["w"], packed)
    assert shapes == {"w": shape}


def test_packbits_with_wrong_shapes_are_refused() -> None:
    packed = {"w": np.zeros(3, np.uint8)}
    with pytest.raises(InputError, match="no shape"):
        from_packbits(packed, {})
    with pytest.raises(InputError, match=r"expected uint8 of shape \(4,\)"):
        from_packbits(packed, {"w": (25,)})
    with pytest.raises(InputError, match="'big' or 'little'"):
        from_packbits(packed, {"w": (24,)}, "middle")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("form", ["bool", "uint8", "float32", "packbits"])
def test_exported_files_come_back(form: str, suffix: str, tmp_path: Path) -> None:
    masks, path = _masks(), tmp_path / f"masks{suffix}"
    if form == "packbits" and suffix == ".safetensors":
        with pytest.raises(InputError, match=r"packbits go to .npz"):
            write_foreign(path, masks, form)
        return
    write_foreign(path, masks, form)
    found = read_foreign(path)
    assert set(found) == set(masks)
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    if suffix == ".safetensors":
        assert load_file(path)["conv1.weight"].dtype == getattr(torch, form)


def test_files_that_hold_no_masks_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "pickled.npz", w=np.array([{"a": 1}], dtype=object))
    with pytest.raises(MaskFileError, match=r"pickled.npz: cannot be read as masks"):
        read_foreign(tmp_path / "pickled.npz")
    for name in ("x.safetensors", "x.npz"):
        (tmp_path / name).write_bytes(b"PK\x03\x04nothing")
        with pytest.raises(MaskFileError, match=rf"{name}: cannot be read as masks"):
            read_foreign(tmp_path / name)
    save_file({"w": torch.rand(3)}, tmp_path / "scores.safetensors")
    with pytest.raises(MaskFileError, match="other than 0 and 1"):
        read_foreign(tmp_path / "scores.safetensors")
    with pytest.raises(InputError, match=r"cannot export 'bool' to masks.pt"):
        write_foreign(tmp_path / "masks.pt", _masks(), "bool")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.float32])
def test_ternary_masks_of_bytes_come_in_with_their_signs(dtype: type, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-1, 2, (20, 7))
    np.savez(tmp_path / "bird.npz", **{"conv1.weight": values.astype(np.int8).astype(dtype)})
    keep, signs = read_ternary(tmp_path / "bird.npz")
    record = make_domain("bird", keep, form="ternary", values=signs)
    found = effective_weight(record, "conv1.weight", keep["conv1.weight"], torch.ones(20, 7))
    assert np.array_equal(found.numpy(), values)
    with pytest.raises(InputError, match="values other than 0 and 1"):
        as_ternary({"w": np.array([2.0])})


def test_packbits_of_the_other_order_are_told_by_their_padding(tmp_path: Path) -> None:
    keep = np.ones((3, 7), bool)
    for order, other in (("big", "little"), ("little", "big")):
        packed = np.packbits(keep, bitorder=order)
        assert from_packbits({"w": packed}, {"w": (3, 7)}, order)["w"].all()
        with pytest.raises(InputError, match=rf"bit order '{other}'.*bit_order='{order}'"):
            from_packbits({"w": packed}, {"w": (3, 7)}, other)
    np.savez(tmp_path / "m.npz", **{"w": np.packbits(keep, bitorder="little"), "w.shape": np.array([3, 7])})
    assert read_foreign(tmp_path / "m.npz", bit_order="little")["w"].all()


def test_only_buffers_beside_an_original_are_pruning_masks() -> None:
    net = nets.small_net()
    net.register_buffer("attn_mask", torch.tril(torch.ones(4, 4)))
    net.register_buffer("window_mask", torch.tensor([[0.0, -100.0]]))
    net.pattern_orig = torch.nn.Parameter(torch.ones(4))  # of another shape than the buffer beside it
    net.register_buffer("pattern_mask", torch.ones(3))
    prune.l1_unstructured(net.hidden, "weight", 0.5)
    assert list(from_pruned(net)) == ["hidden.weight"]
    state = {name: t for name, t in net.state_dict().items() if t.dtype == torch.float32}
    assert list(as_masks(state)) == ["hidden.weight"]


@pytest.mark.parametrize("shape", [[-8, -8], [-1], [2**40, 2**40], [1.5], [[2]], [1] * 20], ids=str)
def test_shapes_that_no_mask_has_are_refused(shape: list[Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", **{"w": np.zeros(8, np.uint8), "w.shape": np.array(shape)})
    with pytest.raises(MaskFileError, match=r"m.npz: cannot be read as masks"):
        read_foreign(tmp_path / "m.npz")


def test_files_without_masks_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz")
    save_file({}, tmp_path / "m.safetensors")
    for name in ("m.npz", "m.safetensors"):
        with pytest.raises(MaskFileError, match="holds no masks"):
            read_foreign(tmp_path / name)
    np.savez(tmp_path / "m.npz", **{"w.shape": np.array([8, 8])})
    with pytest.raises(MaskFileError, match=r"'w\.shape' is the shape of 'w', which is not there"):
        read_foreign(tmp_path / "m.npz")


def test_an_npz_is_as_large_as_it_says(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "liar.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = "{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + "\n"
        archive.writestr(
            "w.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 9
        )
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", bytes(200 << 20))
    for name, message in (("liar", "as long as its header says"), ("bomb", "more than masks are")):
        with pytest.raises(MaskFileError, match=message):
            read_foreign(tmp_path / f"{name}.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(MaskFileError, match="no ordinary file"):
        read_foreign(tmp_path / "pipe.npz")
