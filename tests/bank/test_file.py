"""Mask files: what is written comes back, at the size that was promised, and other programs can read it."""

from __future__ import annotations

import json
import lzma
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from dwm_fast.bank import MaskFile, encode_domain, make_domain, write_mask_file
from dwm_fast.bank.record import DomainMasks
from dwm_fast.errors import BackendUnavailable, InputError, MaskFileError

from . import reader

HERE = Path(__file__).parent
RESNET18_CONVS = (
    [(64, 3, 7, 7)]
    + [(64, 64, 3, 3)] * 4
    + [(128, 64, 3, 3), (128, 128, 3, 3), (128, 64, 1, 1), (128, 128, 3, 3), (128, 128, 3, 3)]
    + [(256, 128, 3, 3), (256, 256, 3, 3), (256, 128, 1, 1), (256, 256, 3, 3), (256, 256, 3, 3)]
    + [(512, 256, 3, 3), (512, 512, 3, 3), (512, 256, 1, 1), (512, 512, 3, 3), (512, 512, 3, 3)]
)
"""The convolutions of torchvision's ResNet-18: 11,166,912 weights."""


def _resnet18(p: float, seed: int = 0, **extra: object) -> DomainMasks:
    generator = torch.Generator().manual_seed(seed)
    names = [f"layer{i // 5 + 1}.{i % 5 // 2}.conv{i % 2 + 1}_{i}.weight" for i in range(len(RESNET18_CONVS))]
    masks = {n: torch.rand(s, generator=generator) < p for n, s in zip(names, RESNET18_CONVS, strict=True)}
    return make_domain("sketch", masks, **extra)


def _entropy_bytes(record: DomainMasks) -> float:
    total = 0.0
    for n, ones in zip(record.info.layout.numels, record.info.ones, strict=True):
        for count in (ones, n - ones):
            total -= count * math.log2(count / n) if count else 0.0
    return total / 8


shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
dtypes = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]
)


@st.composite
def domains(draw: st.DrawFn) -> DomainMasks:
    """Any domain: masks of any shape and density, state of any dtype, every form."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    form = draw(st.sampled_from(["binary", "ternary", "soft", "edit", "kept"]))
    masks, values, state = {}, {}, {}
    for i, shape in enumerate(draw(st.lists(shapes, max_size=4))):
        density = draw(st.sampled_from([0.0, 0.03, 0.5, 1.0]))
        mask = torch.rand(shape, generator=generator) < density
        masks[f"layer{i}.weight"] = mask
        n = math.prod(shape)
        if form == "ternary":
            values[f"layer{i}.weight"] = torch.randint(0, 256, ((n + 7) // 8,), generator=generator, dtype=torch.uint8)
        elif form == "kept":
            dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
            values[f"layer{i}.weight"] = torch.randn(int(mask.sum()), generator=generator).to(dtype)
        elif form != "binary":
            size = draw(st.sampled_from([n, n - int(mask.sum())]))
            values[f"layer{i}.weight"] = torch.randn(size, generator=generator).half()
    for i, shape in enumerate(draw(st.lists(shapes, max_size=3))):
        state[f"bn{i}.running_mean"] = (9 * torch.randn(shape, generator=generator)).to(draw(dtypes))
    return make_domain(
        draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        masks,
        form=form,
        method=draw(st.text(max_size=20)),
        classes=draw(st.lists(st.text(max_size=8), max_size=4)),
        options=draw(
            st.dictionaries(st.text(max_size=5), st.integers() | st.floats(allow_nan=False, allow_infinity=False))
        ),
        state=state,
        values=values,
        fingerprint="f" * 64,
    )


def _assert_same(a: DomainMasks, b: DomainMasks) -> None:
    assert a.info == b.info
    assert torch.equal(a.bits, b.bits)
    for x, y in ((a.state, b.state), (a.values, b.values)):
        assert set(x) == set(y)
        for name in x:
            assert x[name].dtype == y[name].dtype
            assert x[name].shape == y[name].shape
            assert (
                x[name].contiguous().view(-1).view(torch.uint8).tolist() == y[name].view(-1).view(torch.uint8).tolist()
            )


@settings(max_examples=120, deadline=None)
@given(record=domains(), coding=st.sampled_from(["raw", "coded"]))
def test_every_domain_comes_back_exactly(
    record: DomainMasks, coding: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("file") / "domain.safetensors"
    write_mask_file(path, record, coding)
    _assert_same(MaskFile(path).load(), record)


@settings(max_examples=60, deadline=None)
@given(record=domains(), coding=st.sampled_from(["raw", "coded"]))
def test_a_program_written_from_the_specification_reads_the_same(
    record: DomainMasks, coding: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("file") / "domain.safetensors"
    write_mask_file(path, record, coding)
    content, masks = reader.read(path)
    assert content["domain"] == record.info.domain
    assert masks == {name: mask.flatten().int().tolist() for name, mask in record.masks().items()}


def test_channel_coding_follows_the_specification_along_both_dimensions(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.rand(12, generator=generator) ** 4
    by_output = torch.rand(12, 6, 8, 8, generator=generator) < rows[:, None, None, None]
    masks = {"out": by_output, "in": by_output.transpose(0, 1).contiguous()}
    record = make_domain("sketch", masks)
    write_mask_file(tmp_path / "x.safetensors", record, "coded")
    stored = MaskFile(tmp_path / "x.safetensors").stored
    assert [(s.plan.coding, s.plan.axis) for s in stored.values()] == [("channel", 0), ("channel", 1)]
    _, found = reader.read(tmp_path / "x.safetensors")
    assert found == {name: mask.flatten().int().tolist() for name, mask in masks.items()}
    _assert_same(MaskFile(tmp_path / "x.safetensors").load(), record)


def test_a_domain_stored_against_another_comes_back_and_is_smaller(tmp_path: Path) -> None:
    base = make_domain("photo", {"w": torch.rand(64, 64) < 0.5})
    near = make_domain("art", {"w": base.masks()["w"] ^ (torch.rand(64, 64) < 0.02)})
    write_mask_file(tmp_path / "photo.safetensors", base)
    write_mask_file(tmp_path / "art.safetensors", near, "coded", base)
    file = MaskFile(tmp_path / "art.safetensors")
    assert file.payload_nbytes < 0.25 * 64 * 64 / 8
    _assert_same(file.load(lambda name: {"photo": base}[name]), near)
    _, found = reader.read(tmp_path / "art.safetensors")
    assert found["w"] == near.masks()["w"].flatten().int().tolist()
    other = make_domain("photo", {"w": ~base.masks()["w"]})
    with pytest.raises(MaskFileError, match=r"art.safetensors: reference: domain 'photo' has other masks"):
        file.load(lambda name: other)
    with pytest.raises(MaskFileError, match=r"art.safetensors: reference: stored against domain 'photo'"):
        file.load()


def test_resnet18_takes_exactly_one_bit_per_weight_and_a_header_below_16_kib(tmp_path: Path) -> None:
    state = {}
    for i, shape in enumerate(RESNET18_CONVS):
        for kind in ("weight", "bias", "running_mean", "running_var"):
            state[f"layer{i // 5 + 1}.{i % 5 // 2}.bn{i}.{kind}"] = torch.randn(shape[0])
        state[f"layer{i // 5 + 1}.{i % 5 // 2}.bn{i}.num_batches_tracked"] = torch.tensor(7)
    state |= {"fc.weight": torch.randn(7, 512), "fc.bias": torch.randn(7)}
    options = {"kind": "gumbel-sigmoid", "tau": 1.0, "init": 2.0, "hard": True, "lr": 0.05, "epochs": 20}
    pacs = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    record = _resnet18(0.5, state=state, classes=pacs, method="gumbel-sigmoid", options=options, fingerprint="a" * 64)
    write_mask_file(tmp_path / "x.safetensors", record)
    file = MaskFile(tmp_path / "x.safetensors")
    assert sum(record.info.layout.numels) == 11_166_912
    assert file.payload_nbytes == 1_395_864
    assert file.header_nbytes < 16 << 10


@pytest.mark.parametrize("p", [0.5, 0.2, 0.1, 0.03])
def test_coded_masks_are_within_one_percent_of_their_entropy(p: float, tmp_path: Path) -> None:
    record = _resnet18(p)
    write_mask_file(tmp_path / "x.safetensors", record, "coded")
    file = MaskFile(tmp_path / "x.safetensors")
    assert file.payload_nbytes <= 1.01 * _entropy_bytes(record)
    packed = torch.cat([record.bits[part] for part in record.info.layout.slices()]).numpy().tobytes()
    assert file.payload_nbytes <= len(lzma.compress(packed[: 1 << 18], preset=1)) * len(packed) / (1 << 18)
    assert torch.equal(file.load().bits, record.bits)


def test_equal_domains_make_equal_bytes() -> None:
    for coding in ("raw", "coded"):
        first, second = (encode_domain(_small(), coding) for _ in range(2))
        assert first == second


def _small() -> DomainMasks:
    mask = torch.arange(200).reshape(10, 20) % 7 < 3
    state = {"bn.weight": torch.arange(10.0), "fc.weight": torch.ones(2, 5, dtype=torch.bfloat16)}
    return make_domain("sketch", {"a": mask, "b": mask[:, :3], "c": torch.tensor(True)}, state=state)


def test_the_safetensors_library_reads_the_same_tensors(tmp_path: Path) -> None:
    record = _small()
    write_mask_file(tmp_path / "x.safetensors", record)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["content"])["domain"] == "sketch"
        assert torch.equal(file.get_tensor("state.fc.weight"), record.state["fc.weight"])
        keep = np.unpackbits(file.get_tensor("bits.a").numpy(), bitorder="little")[:200]
    assert keep.tolist() == record.masks()["a"].flatten().int().tolist()


def test_raw_bits_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    write_mask_file(tmp_path / "x.safetensors", _small())
    file = MaskFile(tmp_path / "x.safetensors")
    first, second = file.stored_bytes("a"), file.stored_bytes("a")
    assert first.data_ptr() == second.data_ptr()
    assert first.untyped_storage().nbytes() == file.nbytes


def test_an_open_file_stays_what_it_was_when_it_is_replaced(tmp_path: Path) -> None:
    path, old = tmp_path / "x.safetensors", _small()
    write_mask_file(path, old)
    file = MaskFile(path)
    write_mask_file(path, make_domain("other", {"w": torch.rand(500, 9) < 0.5}))
    _assert_same(file.load(), old)
    path.unlink()
    _assert_same(file.load(), old)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write_mask_file(path, _small())
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(MaskFileError, match=r"cannot write .*x.safetensors: No space left on device"):
        write_mask_file(path, _resnet18(0.5))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_without_constriction_coding_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    record = make_domain("sketch", {"w": torch.rand(64, 64) < 0.1})
    assert encode_domain(record, "raw")
    with pytest.raises(BackendUnavailable, match=r"pip install 'dwm-fast\[coding\]'"):
        encode_domain(record, "coded")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domain": "../up"}, "cannot name a file"),
        ({"domain": ""}, "cannot name a file"),
        ({"masks": {"w": torch.ones(3)}}, "torch.bool"),
        ({"form": "other"}, "binary, ternary, soft, edit, kept"),
        ({"form": "edit"}, "'w' is missing"),
        ({"values": {"w": torch.zeros(3)}}, "too many"),
        ({"form": "soft", "values": {"w": torch.zeros(7)}}, "one per zero bit"),
        ({"form": "kept", "values": {"w": torch.zeros(10)}}, "one per one bit"),
        ({"state": {"w": torch.zeros(3)}}, "both a mask and a value"),
        ({"options": {"f": print}}, "plain data"),
    ],
)
def test_what_cannot_be_stored_is_refused_at_once(arguments: dict[str, object], message: str) -> None:
    given = {"domain": "sketch", "masks": {"w": torch.tensor([True, False, True])}} | arguments
    with pytest.raises(InputError, match=message):
        make_domain(**given)


def _golden_mask(shape: tuple[int, ...], modulus: int) -> Tensor:
    i = torch.arange(math.prod(shape))
    return ((i * i * 7 + 3 * i) % 11 < 4).logical_and(i % modulus == 0).reshape(shape)


def golden_domains() -> dict[str, DomainMasks]:
    """What the files in golden/ hold, by file name."""
    masks = {
        "stem.weight": _golden_mask((3, 3, 3, 3), 1),
        "scalar": torch.tensor(True),
        "empty": torch.zeros(0, 4, dtype=torch.bool),
        "channels": torch.cat([torch.ones(6, 500).bool(), torch.zeros(6, 500).bool()]),
        "sparse": _golden_mask((900,), 30),
    }
    state = {"bn.running_mean": torch.arange(3.0), "steps": torch.tensor(5)}
    common = {"method": "gumbel-sigmoid", "classes": ["dog", "house"], "options": {"tau": 1.0}, "fingerprint": "c" * 64}
    sign = torch.tensor([0b101, 0], dtype=torch.uint8)
    near = {**masks, "stem.weight": ~masks["stem.weight"]}
    return {
        "raw": make_domain("raw", masks, state=state, **common),
        "coded": make_domain("coded", masks, state=state, **common),
        "near": make_domain("near", near, **common),
        "ternary": make_domain("ternary", {"w": _golden_mask((3, 3), 1)}, form="ternary", values={"w": sign}),
        "edit": make_domain("edit", {"w": _golden_mask((4,), 1)}, form="edit", values={"w": torch.arange(4.0).half()}),
    }


@pytest.mark.parametrize("name", ["raw", "coded", "near", "ternary", "edit"])
def test_golden_files_of_version_1_stay_readable(name: str) -> None:
    golden = golden_domains()
    file = MaskFile(HERE / "golden" / f"{name}.safetensors")
    _assert_same(file.load(golden.__getitem__), golden[name])
    _, masks = reader.read(HERE / "golden" / f"{name}.safetensors")
    assert masks == {n: m.flatten().int().tolist() for n, m in golden[name].masks().items()}
