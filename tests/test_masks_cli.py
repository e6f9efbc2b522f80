"""dwm-fast masks: what it prints is what the files hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from dwm_fast.bank import MaskBank, MaskFile, make_domain, read_foreign, write_foreign, write_mask_file
from dwm_fast.errors import InputError, MaskFileError
from dwm_fast.masks_cli import masks_app

A = torch.arange(400).reshape(20, 20) % 4 == 0
B = torch.arange(400).reshape(20, 20) % 8 == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    net = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Linear(20, 3))
    bank = MaskBank(net)
    bank.add("a", {"0": A}, method="piggyback", classes=["x", "y"], options={"lr": 0.1})
    bank.add("b", {"0": B}, state={"1.bias": torch.ones(3)})
    bank.save(tmp_path / "bank", coding="coded", reference="a")
    return tmp_path / "bank"


def _run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(masks_app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def test_inspect_shows_description_sizes_and_masks(folder: Path) -> None:
    shown = _run("inspect", folder / "a.safetensors").output
    for text in ("piggyback", "x, y", "100 of 400 weights (25.00 %)", '{"lr": 0.1}', "0.weight", "20 x 20"):
        assert text in shown
    data = json.loads(_run("inspect", folder / "b.safetensors", "--json").output)
    assert data["domain"] == "b"
    assert data["tensors"] == [
        {"name": "0.weight", "shape": [20, 20], "weights": 400, "kept": 50, "coding": data["tensors"][0]["coding"]}
    ]
    assert data["extras"] == ["state.1.bias"]
    assert data["bytes"]["file"] == (folder / "b.safetensors").stat().st_size


def test_diff_counts_what_both_and_only_one_keeps(folder: Path) -> None:
    result = _run("diff", folder / "a.safetensors", folder / "b.safetensors", "--json", status=1)
    data = json.loads(result.output)
    assert data["total"] == {"both": 50, "only_a": 50, "only_b": 0, "neither": 300}
    assert data["description"]["method"] == ["piggyback", ""]
    shown = _run("diff", folder / "a.safetensors", folder / "b.safetensors", status=1).output
    assert "0.5000" in shown
    assert "equal" not in _run("diff", folder / "a.safetensors", folder / "a.safetensors").output


def test_overlap_is_a_table_a_figure_and_data(folder: Path, tmp_path: Path) -> None:
    data = json.loads(_run("overlap", folder, "--json", "--figure", tmp_path / "heat.png").output)
    assert data == {"domains": ["a", "b"], "measure": "jaccard", "matrix": [[1.0, 0.5], [0.5, 1.0]]}
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(_run("overlap", folder, "--measure", "xor", "--json").output)["matrix"] == [[0, 50], [50, 0]]
    assert "0.5000" in _run("overlap", folder).output


def test_convert_changes_the_coding_and_brings_in_other_forms(folder: Path, tmp_path: Path) -> None:
    _run("convert", folder / "b.safetensors", tmp_path / "raw.safetensors", "--domain", "c")
    file = MaskFile(tmp_path / "raw.safetensors")
    assert (file.coding, file.info.domain) == ("raw", "c")
    assert torch.equal(file.load().masks()["0.weight"], B)
    assert torch.equal(file.load().state["1.bias"], torch.ones(3))
    write_foreign(tmp_path / "theirs.npz", {"w": A}, "packbits")
    _run("convert", tmp_path / "theirs.npz", tmp_path / "ours.safetensors", "--coding", "coded")
    record = MaskFile(tmp_path / "ours.safetensors").load()
    assert record.info.domain == "theirs"
    assert torch.equal(record.masks()["w"], A)
    reference = ["--coding", "coded", "--reference", folder / "a.safetensors"]
    _run("convert", folder / "b.safetensors", folder / "b2.safetensors", *reference)
    assert MaskFile(folder / "b2.safetensors").info.domain == "b"


def test_export_writes_what_other_programs_read(folder: Path, tmp_path: Path) -> None:
    _run("export", folder / "b.safetensors", tmp_path / "b.npz", "--form", "packbits")
    _run("export", folder / "b.safetensors", tmp_path / "b.safetensors", "--form", "uint8")
    for name in ("b.npz", "b.safetensors"):
        assert torch.equal(read_foreign(tmp_path / name)["0.weight"], B)


def test_verify_finds_what_is_wrong_and_says_so_by_its_status(folder: Path) -> None:
    assert "2 domains" in _run("verify", folder).output
    assert "ok" in _run("verify", folder / "a.safetensors", folder / "b.safetensors").output
    path = folder / "a.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (folder / "stray.safetensors").write_bytes(b"")
    shown = _run("verify", folder, status=1).output
    assert "sha256: checksum differs" in shown
    assert "stray.safetensors: not in index.json" in shown
    _run("verify", path, status=1)


def test_mistakes_are_the_librarys_own_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MaskFileError, match=r"none.safetensors: cannot be read"):
        _run("inspect", tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"packbits go to .npz"):
        _run("export", folder / "a.safetensors", tmp_path / "x.safetensors", "--form", "packbits")
    with pytest.raises(MaskFileError, match=r"none.npz: cannot be read"):
        _run("convert", tmp_path / "none.npz", tmp_path / "x.safetensors")
    with pytest.raises(MaskFileError, match="no such folder"):
        _run("overlap", tmp_path / "none")


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    name = "blocks[bold].weight[/bold]"
    record = make_domain("a", {name: A}, method="[red]m[/red]", classes=["[x]"])
    path = tmp_path / "[blue]a[" / "blue].safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mask_file(path, record)
    shown = _run("inspect", path).output
    for text in (name, "[red]m[/red]", "[x]", "[blue]a[/blue]"):
        assert text in shown
    assert name in _run("diff", path, path).output
    assert "[blue]" in _run("verify", path).output


def test_convert_takes_ternary_masks_and_either_bit_order(tmp_path: Path) -> None:
    values = np.array([[-1, 0, 1], [1, 1, -1]], np.int8)
    np.savez(tmp_path / "t.npz", w=values)
    _run("convert", tmp_path / "t.npz", tmp_path / "t.safetensors", "--ternary")
    record = MaskFile(tmp_path / "t.safetensors").load()
    assert record.info.form == "ternary"
    assert np.array_equal(record.masks()["w"].numpy(), values != 0)
    keep = np.ones((3, 7), bool)
    np.savez(tmp_path / "p.npz", **{"w": np.packbits(keep, bitorder="little"), "w.shape": np.array([3, 7])})
    with pytest.raises(MaskFileError, match="--bit-order little"):
        _run("convert", tmp_path / "p.npz", tmp_path / "p.safetensors")
    _run("convert", tmp_path / "p.npz", tmp_path / "p.safetensors", "--bit-order", "little")
    assert MaskFile(tmp_path / "p.safetensors").load().masks()["w"].all()
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(MaskFileError, match="holds no masks"):
        _run("convert", tmp_path / "empty.npz", tmp_path / "e.safetensors")
    assert not (tmp_path / "e.safetensors").exists()
