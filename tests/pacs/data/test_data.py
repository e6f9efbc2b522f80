"""PACS loads the same from every layout, and never tests on training images."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dwm_fast.errors import DataError, InputError
from dwm_fast.pacs.data import CLASSES, DOMAINS, PacsData, canonical_domain, download_pacs, load_pacs, pixels
from dwm_fast.pacs.data import load as data
from dwm_fast.pacs.data.layouts import read_layout
from dwm_fast.pacs.data.splits import train_list

from ..pacs_for_tests import FOLDERS, LAYOUTS, PER_CLASS, build, colour, name, write_lists, write_parquet, write_tree


def check_pixels(found: PacsData) -> None:
    assert tuple(found.domains) == DOMAINS
    assert (found.name, found.real, found.classes) == ("PACS", True, CLASSES)
    for domain, images in found.domains.items():
        assert len(images.names) == len(images.images) == 7 * PER_CLASS
        for i, stored in enumerate(images.names):
            item = (domain, CLASSES.index(stored.split("/")[1]), int(stored[-5]))
            assert stored == name(item)
            assert int(images.labels[i]) == item[1]
            assert tuple(images.images[i, :, 3, 3].tolist()) == colour(item)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_gives_the_same_images_labels_and_split(kind: str, tmp_path: Path) -> None:
    found = load_pacs(build(kind, tmp_path / "a"), image_size=8, holdout=0.25, seed=3)
    check_pixels(found)
    plain = load_pacs(write_tree(tmp_path / "b"), image_size=8, holdout=0.25, seed=3)
    assert found.fingerprint == plain.fingerprint
    assert len(found.fingerprint) == 64


@pytest.mark.parametrize("kind", LAYOUTS)
def test_official_lists_split_every_layout(kind: str, tmp_path: Path) -> None:
    found = load_pacs(build(kind, tmp_path / "a"), splits=write_lists(tmp_path / "lists"), image_size=8)
    for images in found.domains.values():
        held = {images.names[i] for i in images.test.tolist()}
        trained = {images.names[i] for i in images.train.tolist()}
        assert held == {n for n in images.names if n.endswith("_3.png")}
        assert trained == set(images.names) - held


def test_lists_beside_the_images_are_used_without_asking(tmp_path: Path) -> None:
    write_tree(tmp_path / "images")
    write_lists(tmp_path / "splits")
    (tmp_path / "splits" / "photo_test_kfold.txt").write_text("never read\n")
    photo = load_pacs(tmp_path, image_size=8).domains["photo"]
    assert {photo.names[i][-6:] for i in photo.test.tolist()} == {"_3.png"}


def test_holdout_is_stratified_disjoint_and_seeded(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    first, again, other = (load_pacs(root, image_size=8, holdout=0.5, seed=s) for s in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    for images in first.domains.values():
        assert torch.equal(torch.cat([images.train, images.test]).sort().values, torch.arange(28))
        assert torch.bincount(images.labels[images.test]).tolist() == [2] * 7
    few = load_pacs(root, image_size=8, holdout=0.01).domains["photo"]
    assert torch.bincount(few.labels[few.test]).tolist() == [1] * 7
    most = load_pacs(root, image_size=8, holdout=0.99).domains["photo"]
    assert torch.bincount(most.labels[most.train]).tolist() == [1] * 7


def test_only_the_wanted_domains_load_under_any_alias_in_fixed_order(tmp_path: Path) -> None:
    found = load_pacs(write_tree(tmp_path), image_size=8, domains=["Sketch", "A"])
    assert tuple(found.domains) == ("art", "sketch")


def test_images_are_resized_and_counted_in_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serial = load_pacs(write_tree(tmp_path), image_size=12)
    monkeypatch.setattr(pixels, "POOL_FROM", 10)
    seen: list[tuple[int, int]] = []
    pooled = load_pacs(tmp_path, image_size=12, progress=lambda done, total: seen.append((done, total)))
    assert pooled.domains["art"].images.shape == (28, 3, 12, 12)
    assert pooled.fingerprint == serial.fingerprint
    assert seen == [(100, 112), (112, 112)]


def test_class_label_numbers_and_names_are_understood(tmp_path: Path) -> None:
    order = ["sketch", "photo", "art_painting", "cartoon"]
    shuffled = list(CLASSES[::-1])
    features = {"domain": {"names": order, "_type": "ClassLabel"}, "label": {"names": shuffled}}
    file = write_parquet(
        tmp_path / "a.parquet",
        domain=lambda i: order.index(FOLDERS[i[0]]),
        label=lambda i: shuffled.index(CLASSES[i[1]]),
        features=features,
    )
    check_pixels(load_pacs(file, image_size=8))
    check_pixels(load_pacs(write_parquet(tmp_path / "b.parquet", label=lambda i: CLASSES[i[1]]), image_size=8))


def test_parquet_without_paths_loads_with_the_own_holdout(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", path=lambda i: None)
    assert len(load_pacs(file, image_size=8).domains["photo"].test) == 7
    with pytest.raises(DataError, match=r"a\.parquet, row 0.*drop --splits"):
        load_pacs(file, splits=write_lists(tmp_path / "lists"), image_size=8)


def test_to_moves_every_tensor(tmp_path: Path) -> None:
    moved = load_pacs(write_tree(tmp_path), image_size=8).to("meta")
    for images in moved.domains.values():
        kinds = {t.device.type for t in (images.images, images.labels, images.train, images.test)}
        assert kinds == {"meta"}
    assert moved.nbytes == 4 * 28 * 3 * 8 * 8


def test_fingerprint_sees_pixels_labels_and_splits(tmp_path: Path) -> None:
    base = load_pacs(write_tree(tmp_path), image_size=8)
    for field, row in (("images", 5), ("labels", 5), ("train", 0), ("test", 0)):
        sets = dict(base.domains)
        changed = getattr(sets["art"], field).clone()
        changed[row] += 1
        sets["art"] = data.replace(sets["art"], **{field: changed})
        assert data.fingerprint(sets) != base.fingerprint


def test_domain_aliases() -> None:
    for alias, short in {"P": "photo", "art_painting": "art", "ArtPainting": "art", "c": "cartoon"}.items():
        assert canonical_domain(alias) == short
    with pytest.raises(InputError, match=r"'quickdraw'.*photo \(p\).*art_painting.*sketch \(s\)"):
        canonical_domain("quickdraw")


def test_download_asks_the_hub_and_wraps_its_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(**arguments: Any) -> str:
        asked.update(arguments)
        write_parquet(Path(arguments["local_dir"]) / "data" / "train-00000-of-00001.parquet")
        return str(arguments["local_dir"])

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    folder = download_pacs(tmp_path / "fetched")
    assert (asked["repo_id"], asked["repo_type"]) == ("flwrlabs/pacs", "dataset")
    check_pixels(load_pacs(folder, image_size=8))

    def offline(**arguments: Any) -> str:
        raise ConnectionError("no route\nto host")

    hub.snapshot_download = offline  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"flwrlabs/pacs could not be downloaded into .* \(no route\)") as caught:
        download_pacs(tmp_path / "again")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"pip install 'dwm-fast\[hub\]'"):
        download_pacs(tmp_path / "again")


def test_what_was_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    root = build("folder", tmp_path / "data")
    extra = root / "photo" / "dog"
    picture = (extra / "pic_0.png").read_bytes()
    for file in ("a.gif", "b.tif", "c.TIF", "README"):
        (extra / file).write_bytes(picture)
    (extra / "more").mkdir()
    (root / "photo" / "cats").mkdir()
    (extra / "d.jfif").write_bytes(picture)
    (extra / "e.JPE").write_bytes(picture)
    data = load_pacs(root, image_size=8, domains=["photo"])
    assert data.left_out == {
        "'.gif' files": 1,
        "'.tif' files": 2,
        "'.txt' files": 1,
        "'' files": 1,
        "folders inside a class": 1,
        "beside the classes of photo": 1,
    }
    assert len(data.domains["photo"].names) == 7 * PER_CLASS + 2


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["utf-8", "utf-8-sig"]),
    st.sampled_from([" ", "  ", "\t", " \t "]),
    st.sampled_from(["\n", "\r\n", " \n", "\n\n"]),
    st.sampled_from(["/", "\\"]),
    st.sampled_from(["", "  ", "\t"]),
)
def test_lists_are_read_as_people_have_them(
    tmp_path: Path, encoding: str, gap: str, end: str, slash: str, before: str
) -> None:
    lists = tmp_path / "lists"
    write_lists(lists)
    plain = load_pacs(tree(tmp_path), splits=lists, image_size=8, domains=["photo"])
    for file in lists.glob("photo_*"):
        lines = [line.rsplit(" ", 1) for line in file.read_text().splitlines()]
        text = "".join(f"{before}{path.replace('/', slash)}{gap}{label}{end}" for path, label in lines)
        file.write_bytes(text.encode(encoding))
    assert load_pacs(tree(tmp_path), splits=lists, image_size=8, domains=["photo"]).fingerprint == plain.fingerprint


def tree(folder: Path) -> Path:
    """The images, written once."""
    return folder / "data" if (folder / "data").exists() else build("folder", folder / "data")


def test_names_with_spaces_are_read_from_lists(tmp_path: Path) -> None:
    root, lists = build("folder", tmp_path / "data"), tmp_path / "lists"
    write_lists(lists)
    plain = load_pacs(root, splits=lists, image_size=8, domains=["photo"])
    for file in (root / "photo").rglob("pic_*.png"):
        file.rename(file.with_name(file.name.replace("pic_", "my  holiday pic ")))
    for file in lists.glob("photo_*"):
        file.write_text(file.read_text().replace("pic_", "my  holiday pic "))
    assert load_pacs(root, splits=lists, image_size=8, domains=["photo"]).fingerprint == plain.fingerprint


def test_file_names_that_are_no_utf8_and_list_names_with_odd_line_breaks_work(tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    for label, kind in enumerate(CLASSES):
        folder = tmp_path / "photo" / kind
        folder.mkdir(parents=True)
        for file in (b"caf\xe9.png", "line\u2028break.png".encode()):
            with open(os.fsencode(folder) + b"/" + file, "wb") as out:
                Image.new("RGB", (8, 8)).save(out, "PNG")
        with open(lists / "photo_train_kfold.txt", "a", encoding="utf-8") as out:
            out.write(f"photo/{kind}/line\u2028break.png {label + 1}\n")
    own = load_pacs(tmp_path, image_size=8, domains=["photo"]).domains["photo"]
    assert len(own.train) == len(own.test) == len(CLASSES)
    layout = read_layout(tmp_path, ["photo"])
    assert len(train_list(lists, "photo", layout.records)) == len(CLASSES)
