"""Any data set as domains: what is read from folders, lists, parquet, arrow and torchvision, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from PIL import Image

from dwm_fast.bank.record import check_domain_name
from dwm_fast.errors import DataError, DwmError, InputError
from dwm_fast.pacs.data import PacsData
from dwm_fast.pacs.data.any import ImageOptions, Place, is_other, load_any
from dwm_fast.pacs.data.class_splits import class_splits
from dwm_fast.pacs.data.listed import domain_name, naturally
from dwm_fast.pacs.data.vision import _class_names, download_torchvision

from ..pacs_for_tests import LAYOUTS, build

OFFICE = {"Art": 3, "Real World": 4}
"""Domains of Office-Home, each with so many images a class; "Art" is a name of PACS too."""
KINDS = ("Alarm_Clock", "Bed", "Fan")


def colour(domain: int, kind: int, number: int) -> tuple[int, int, int]:
    return 40 * domain + 10, 60 * kind + 20, 30 * number + 5


def png(fill: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 6), fill).save(out, "png")
    return out.getvalue()


def write_office(root: Path, between: str = "", kinds: tuple[str, ...] = KINDS) -> Path:
    for d, (domain, count) in enumerate(OFFICE.items()):
        for k, kind in enumerate(kinds):
            folder = root / domain / between / kind
            folder.mkdir(parents=True, exist_ok=True)
            for n in range(count):
                (folder / f"{n:05d}.png").write_bytes(png(colour(d, k, n)))
    return root


def write_rows(file: Path, rows: list[dict[str, Any]], names: dict[str, list[str]], write: Callable[..., None]) -> Path:
    table = pa.Table.from_pylist(rows)
    features = {column: {"names": listed, "_type": "ClassLabel"} for column, listed in names.items()}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    write(table, file)
    return file


def write_arrow(table: pa.Table, file: Path) -> None:
    """As `save_to_disk` does, with its state."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    state = {"_data_files": [{"filename": file.name}], "_indices_data_files": None}
    (file.parent / "state.json").write_text(json.dumps(state))


def rows(counts: dict[str, int], image: str = "img", label: str = "fine_label") -> list[dict[str, Any]]:
    """So many images of each class, by the classes' order."""
    return [
        {image: {"bytes": png(colour(0, k, n)), "path": None}, label: k}
        for k, count in enumerate(counts.values())
        for n in range(count)
    ]


def load(path: Path | str, root: Path | None = None, **options: Any) -> PacsData:
    place = Place(str(path), None if root is None else str(root), options.pop("lists", None))
    more = {name: options.pop(name) for name in ("domains", "validation", "image_size") if name in options}
    return load_any(place, ImageOptions(**options), **{"image_size": 4, **more})


def test_a_folder_of_domains_and_classes_is_read_pixel_for_pixel(tmp_path: Path) -> None:
    data = load(write_office(tmp_path / "office"))
    assert (data.name, data.real, data.classes) == ("office", True, KINDS)
    assert list(data.domains) == ["art", "real-world"]
    for d, (domain, count) in enumerate(zip(data.domains.values(), OFFICE.values(), strict=True)):
        assert domain.classes == KINDS
        assert domain.labels.bincount().tolist() == [count] * 3
        for image, label, name in zip(domain.images, domain.labels.tolist(), domain.names, strict=True):
            assert image[:, 0, 0].tolist() == list(colour(d, label, int(Path(name).stem)))
        assert sorted([*domain.train.tolist(), *domain.test.tolist()]) == list(range(3 * count))
        assert domain.labels[domain.test].tolist() == [0, 1, 2]  # a tenth, at least one of each class
    assert data.split == "0.1 of each class held out for testing, by a hash of the names"


def test_the_holdout_is_the_fraction_asked_for_and_no_other_images_the_second_time(tmp_path: Path) -> None:
    write_office(tmp_path)
    first, again = (load(tmp_path, holdout=0.5).domains["real-world"] for _ in range(2))
    assert first.labels[first.test].bincount().tolist() == [2, 2, 2]
    assert first.test.tolist() == again.test.tolist()


@pytest.mark.parametrize("between", ["above", "below"])
def test_parts_of_a_folder_above_or_below_its_domains_are_its_split(tmp_path: Path, between: str) -> None:
    for part in ("train", "test"):
        write_office(tmp_path / part) if between == "above" else write_office(tmp_path, part)
    data = load(tmp_path)
    for domain, count in zip(data.domains.values(), OFFICE.values(), strict=True):
        assert len(domain.train) == len(domain.test) == 3 * count
    assert data.split == (
        "the folder's own train and test parts; 21 of the test images are training images of their domain too"
    )


def test_a_folder_of_classes_is_one_domain_and_val_tests_where_there_is_no_test(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        for k in (1, 2, 10):
            (tmp_path / "birds" / part / f"{k}").mkdir(parents=True)
            for n in range(count):
                (tmp_path / "birds" / part / f"{k}" / f"{n}.png").write_bytes(png(colour(0, k, n)))
    data = load(tmp_path / "birds")
    assert (list(data.domains), data.classes) == (["birds"], ("1", "2", "10"))
    assert (len(data.domains["birds"].train), len(data.domains["birds"].test)) == (9, 6)


def write_domainnet_lists(root: Path) -> Path:
    """The last image of each class tests; the numbers count the classes from the last."""
    for domain, count in OFFICE.items():
        for part, chosen in (("train", range(count - 1)), ("test", [count - 1])):
            lines = [f"{domain}/{kind}/{n:05d}.png {2 - k}" for k, kind in enumerate(KINDS) for n in chosen]
            (root / f"{domain}_{part}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_lists_of_domainnet_choose_the_parts_and_the_order_of_the_classes(tmp_path: Path) -> None:
    data = load(write_domainnet_lists(write_office(tmp_path)))
    assert data.classes == KINDS[::-1]
    for domain, count in zip(data.domains.values(), OFFICE.values(), strict=True):
        assert {Path(domain.names[i]).stem for i in domain.test} == {f"{count - 1:05d}"}
        assert len(domain.train) == 3 * (count - 1)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_hugging_face_set_is_read_from_parquet_and_from_what_save_to_disk_wrote(tmp_path: Path, kind: str) -> None:
    write = pq.write_table if kind == "parquet" else write_arrow
    names = {"fine_label": ["cat", "dog", "unused"]}
    for part, counts in (("train", {"cat": 3, "dog": 2}), ("test", {"cat": 1, "dog": 1})):
        place = f"data/{part}-00000-of-00001.parquet" if kind == "parquet" else f"{part}/data-00000-of-00001.arrow"
        write_rows(tmp_path / "pets" / place, rows(counts), names, write)
    data = load(tmp_path / "pets", columns="label=fine_label")
    pets = data.domains["pets"]
    assert data.classes == ("cat", "dog")
    assert (pets.labels[pets.train].bincount().tolist(), pets.labels[pets.test].bincount().tolist()) == ([3, 2], [1, 1])
    for image, label in zip(pets.images, pets.labels.tolist(), strict=True):
        assert image[1, 0, 0] == colour(0, label, 0)[1]
    assert data.left_out == {"names of classes without an image": 1}


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_set_that_is_all_in_one_part_has_no_split_of_its_own(tmp_path: Path, part: str) -> None:
    made = rows({"cat": 4, "dog": 4}, "image", "label")
    write_rows(tmp_path / "data" / f"{part}-00000-of-00001.parquet", made, {}, pq.write_table)
    data = load(tmp_path, holdout=0.25)
    (domain,) = data.domains.values()
    assert (len(domain.train), len(domain.test)) == (6, 2)
    assert data.split == "0.25 of each class held out for testing, by a hash of the names"


def test_a_folder_with_a_train_part_alone_is_held_out_of_and_images_in_no_part_are_named(tmp_path: Path) -> None:
    write_office(tmp_path / "office" / "train")
    assert len(load(tmp_path / "office").domains["art"].test) == 3
    made = rows({"cat": 2, "dog": 2}, "image", "label")
    for part in ("train", "test", "extra"):
        write_rows(tmp_path / "svhn" / f"{part}.parquet", made, {}, pq.write_table)
    with pytest.raises(DataError, match=r"the parts test, train and images in no part, such as .*extra.parquet, row 0"):
        load(tmp_path / "svhn")


def test_a_column_of_domains_makes_domains(tmp_path: Path) -> None:
    made = [
        {"image": png(colour(d, k, n)), "label": kind, "style": style}
        for d, style in enumerate(("ink", "oil"))
        for k, kind in enumerate(("cat", "dog"))
        for n in range(2)
    ]
    data = load(write_rows(tmp_path / "x.parquet", made, {}, pq.write_table), columns="domain=style")
    assert (list(data.domains), data.classes) == (["ink", "oil"], ("cat", "dog"))


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-100's own files with 100 classes, 3 training images and 1 test image each, and their checksums."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    names = [f"kind{k:02d}" for k in range(100)]
    generator = np.random.default_rng(0)
    lists: dict[str, list[list[str]]] = {}
    for part, each in (("train", 3), ("test", 1)):
        labels = np.arange(100).repeat(each)
        pixels = generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        pixels[:, 0] = labels
        content = pickle.dumps({"data": pixels, "fine_labels": labels.tolist()})
        (folder / part).write_bytes(content)
        lists[part] = [[part, hashlib.md5(content).hexdigest()]]
    content = pickle.dumps({"fine_label_names": names})
    (folder / "meta").write_bytes(content)
    meta = {"filename": "meta", "key": "fine_label_names", "md5": hashlib.md5(content).hexdigest()}
    cifar = torchvision.datasets.CIFAR100
    for name, value in (("train_list", lists["train"]), ("test_list", lists["test"]), ("meta", meta)):
        monkeypatch.setattr(cifar, name, value)
    return root


def test_split_cifar100_is_ten_domains_of_ten_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_cifar(tmp_path, monkeypatch)
    place = Place("torchvision:CIFAR100", str(root))
    data = load_any(place, ImageOptions(split_classes="10"), image_size=32)
    assert list(data.domains) == [f"classes-{k}-{k + 9}" for k in range(0, 100, 10)]
    assert data.name == "CIFAR100, classes split into 10 domains"
    for first, domain in zip(range(0, 100, 10), data.domains.values(), strict=True):
        assert domain.classes == tuple(f"kind{k:02d}" for k in range(first, first + 10))
        assert domain.images[:, 0, 0, 0].tolist() == (domain.labels + first).tolist()  # the class is the first pixel
        assert (len(domain.train), len(domain.test)) == (30, 10)
    assert len({data.fingerprint, load_any(place, ImageOptions(split_classes="5"), image_size=32).fingerprint}) == 2


def write_mnist(root: Path, name: str = "MNIST") -> Path:
    """MNIST's own files, three images of each digit to train, one to test; no checksums are asked for."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for part, each in (("train", 3), ("t10k", 1)):
        labels = bytes(digit for digit in range(10) for _ in range(each))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + labels)
        head = struct.pack(">IIII", 2051, len(labels), 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + b"".join(bytes([20 * k]) * 784 for k in labels))
    return root


def test_two_sets_of_torchvision_are_two_domains_with_classes_of_their_own(tmp_path: Path) -> None:
    write_mnist(write_mnist(tmp_path), "FashionMNIST")
    data = load("torchvision:MNIST,FashionMNIST", tmp_path, classes="own")
    assert [data.classes_of(d)[0] for d in data.domains] == ["0", "T-shirt/top"]
    assert (list(data.domains), len(data.classes)) == (["mnist", "fashionmnist"], 20)
    assert data.domains["mnist"].images[:, :, 0, 0].tolist() == [[20 * k] * 3 for k in data.domains["mnist"].labels]
    with pytest.raises(DataError, match=r"'mnist' and 'fashionmnist' have different classes.*--classes own"):
        load("torchvision:MNIST,FashionMNIST", tmp_path)


def test_digits_have_the_same_classes_in_every_set_of_torchvision() -> None:
    class Usps:
        """Has no names of classes; nor has SVHN."""

    mnist = torchvision.datasets.MNIST
    assert _class_names(mnist, 9) == _class_names(Usps(), 9) == [str(digit) for digit in range(10)]


def test_torchvision_fetches_a_set_where_that_is_asked_for_and_never_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(dataset: Any) -> None:
        asked.append(dataset.train)
        if len(asked) == 1:
            write_mnist(Path(dataset.root))

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fetch)
    with pytest.raises(DataError, match=r"MNIST cannot be read in .* or fetch it with --download"):
        load("torchvision:MNIST", tmp_path / "new")
    assert asked == []
    download_torchvision("torchvision:MNIST", str(tmp_path / "new"))
    assert asked == [True, False]
    assert len(load("torchvision:MNIST", tmp_path / "new").domains["mnist"].test) == 10
    with pytest.raises(InputError, match=r"torchvision cannot fetch it; put it into .* by hand"):
        download_torchvision("torchvision:FER2013", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda _: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(DataError, match=r"MNIST cannot be read in .*no network\)$"):
        download_torchvision("torchvision:MNIST", str(tmp_path / "other"))


def test_domains_may_have_classes_of_their_own_where_that_is_said(tmp_path: Path) -> None:
    write_office(tmp_path)
    for file in (tmp_path / "Art" / "Fan").iterdir():
        file.unlink()
    (tmp_path / "Art" / "Fan").rmdir()
    with pytest.raises(DataError, match=r"'art' and 'real-world' have different classes \('art' lacks Fan\)"):
        load(tmp_path)
    data = load(tmp_path, classes="own")
    assert [data.classes_of(d) for d in data.domains] == [KINDS[:2], KINDS]


def test_a_validation_part_is_held_out_of_the_training_images_and_no_test_image_is_there(tmp_path: Path) -> None:
    write_domainnet_lists(write_office(tmp_path))
    domain = load(tmp_path, validation=0.3).domains["real-world"]
    assert {Path(name).stem for name in domain.names} == {"00000", "00001", "00002"}
    assert sorted(domain.labels[domain.test].tolist()) == [0, 1, 2]


def test_class_splits_come_out_even_or_one_class_apart() -> None:
    classes = [f"k{i}" for i in range(11)]
    found = class_splits("4", classes)
    assert [len(own) for own in found.values()] == [3, 3, 3, 2]
    assert [one for own in found.values() for one in own] == classes
    assert class_splits("a=k0+k2,B c=k1+k3", classes) == {"a": ("k0", "k2"), "b-c": ("k1", "k3")}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("6", "expected 2 to 5 domains, each of at least 2"),
        ("1", "expected 2 to 5"),
        ("a=k0", "at least 2 classes each"),
        ("a=k0+k1,a=k2+k3", "different names"),
        ("a=k0+k1,b=k1+k2", "class 'k1' is in a and in b"),
        ("a=k0+nine", "no class 'nine'; the nearest are"),
        ("a", "expected a number of domains"),
    ],
)
def test_a_wrong_class_split_is_refused(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        class_splits(text, [f"k{i}" for i in range(11)])


def test_names_of_domains_go_into_files_and_numbers_within_names_count() -> None:
    assert [domain_name(n) for n in ("Real World", "art_painting", "CIFAR-100")] == [
        "real-world", "art-painting", "cifar-100",
    ]  # fmt: skip
    assert [domain_name(n) for n in (" Öl ", "O\u0308l", "a+b", "日本 2")] == ["ol", "ol", "a-b", "u65e5u672c-2"]
    for name in ("Straße", "Фото", "ｆｕｌｌ", "x" * 100):
        assert check_domain_name(domain_name(name))
    for name in ("...", "x" * 101):
        with pytest.raises(DataError, match="rename it"):
            domain_name(name)
    assert naturally(["b10", "B2", "a", "b2x", "b2"]) == ["a", "B2", "b2", "b2x", "b10"]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_pacs_is_told_from_other_data_in_every_layout(tmp_path: Path, kind: str) -> None:
    assert not is_other(str(build(kind, tmp_path)))


def test_what_only_shares_names_with_pacs_is_other_data(tmp_path: Path) -> None:
    assert is_other(str(write_office(tmp_path / "office")))
    sketch = tmp_path / "net" / "sketch"
    for kind in ("dog", "horse", "axe", "banana", "zebra"):
        (sketch / kind).mkdir(parents=True)
    assert is_other(str(tmp_path / "net"))
    for kind in ("a", "b", "c", "p", "s"):  # letters, some of which are short names of PACS' domains
        (tmp_path / "letters" / kind).mkdir(parents=True)
        (tmp_path / "letters" / kind / "0.png").write_bytes(png((0, 0, 0)))
    assert is_other(str(tmp_path / "letters"))
    assert is_other("torchvision:CIFAR10")
    assert not is_other(None)
    assert not is_other(str(tmp_path / "nowhere"))


def _empty_class(root: Path) -> None:
    (root / "Art" / "Mug").mkdir()


def _broken(root: Path) -> None:
    (root / "Art" / "Bed" / "00001.png").write_bytes(b"no image")


def _two_depths(root: Path) -> None:
    (root / "Art" / "00001.png").write_bytes(b"")


def _one_list(root: Path) -> None:
    (root / "Art_train.txt").write_text("Art/Bed/00000.png 0\n")


def _absent(root: Path) -> None:
    file = write_domainnet_lists(root) / "Art_train.txt"
    file.write_text(file.read_text() + "Art/Bed/77777.png 1\n")


def _two_numbers(root: Path) -> None:
    file = write_domainnet_lists(root) / "Art_test.txt"
    file.write_text(file.read_text().replace("Bed/00002.png 1", "Bed/00002.png 2"))


def _twice(root: Path) -> None:
    file = write_domainnet_lists(root) / "Real World_test.txt"
    file.write_text(file.read_text() + "Real World/Bed/00000.png 1\n")


def _no_test_image(root: Path) -> None:
    file = write_domainnet_lists(root) / "Art_test.txt"
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if "Fan" not in line))


def _not_a_line(root: Path) -> None:
    file = write_domainnet_lists(root) / "Art_test.txt"
    file.write_text("Bed/00000.png 1\n")


def _parts_beside_classes(root: Path) -> None:
    shutil.copytree(root / "Art" / "Bed", root / "Art" / "test" / "Bed")
    shutil.copytree(root / "Art" / "Bed", root / "Art" / "train" / "Bed")


def _two_folders_of_a_domain(root: Path) -> None:
    (root / "real_world" / "Glasses").mkdir(parents=True)
    (root / "real_world" / "Glasses" / "0.png").write_bytes(png((0, 0, 0)))


def _alike(root: Path) -> None:
    shutil.copytree(root / "Real World", root / "real_world")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_empty_class, r"Art/Mug: a class without an image"),
        (_broken, r"Art/Bed/00001.png: unreadable image"),
        (_two_depths, r"images directly in Art/ and in folders of"),
        (_alike, r"real_world/.*: a second folder of real-world/.* beside .*Real World"),
        (_twice, r"Real World_test.txt, line 4: real-world/Bed/00000.png was already named in .*_train.txt, line 4"),
        (_no_test_image, r"domain 'art' has no test image of class Fan"),
        (_not_a_line, r"Art_test.txt, line 1: 'Bed/00000.png 1'; expected '<domain>/<class>/<image> <number>'"),
        (_parts_beside_classes, r"Art/test: a class without an image"),
        (_two_folders_of_a_domain, r"real_world: a second folder of domain 'real-world' beside .*Real World; rename"),
        (_one_list, r"expected one list art_test.txt, found none"),
        (_absent, r"Art_train.txt, line 7: names art/Bed/77777.png, which is not among the images"),
        (_two_numbers, r"Art_test.txt, line 2: number 2 for class Bed, which had 1 before"),
    ],
)
def test_a_spoiled_folder_is_refused_by_name(tmp_path: Path, spoil: Callable[[Path], None], match: str) -> None:
    spoil(write_office(tmp_path))
    with pytest.raises(DataError, match=match):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"columns": "label=style"}, "columns: label=style, and .* has no such column; it has img"),
        ({"columns": "style=x"}, "expected NAME for some of image=, label=, domain="),
        ({}, "no column label or labels; it has img.*name yours by --columns label=NAME"),
        ({"columns": "label=fine_label", "domains": ["ink"]}, "unknown domain 'ink': x has x"),
        ({"columns": "label=fine_label", "domains": []}, "domains is empty: x has x"),
        ({"columns": "label=fine_label", "image_size": 0}, "image_size=0: expected a positive number of pixels"),
        ({"columns": "label=fine_label", "split_classes": "²"}, "split_classes: '²'; expected a number of domains"),
        ({"columns": "label=fine_label", "lists": "folder"}, "splits does not go with data=.*a Hugging Face data set"),
        ({"columns": "label=fine_label", "holdout": 1.5}, "holdout is 1.5; expected a fraction between 0 and 1"),
        ({"columns": "label=fine_label", "classes": "all"}, "images.classes is 'all'; expected one of same, own"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    file = write_rows(tmp_path / "x.parquet", rows({"cat": 2, "dog": 2}), {}, pq.write_table)
    with pytest.raises(DwmError, match=match):
        load(file, **options)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"image": {"bytes": None, "path": "x.png"}, "label": 0}, "row 4: no image bytes in the row"),
        ({"image": {"bytes": png((0, 0, 0)), "path": None}, "label": -1}, "row 4: label -1"),
        ({"image": {"bytes": png((0, 0, 0)), "path": None}, "label": 5}, "row 4: label 5"),
        ({"image": {"bytes": png((0, 0, 0)), "path": None}, "label": 2}, "only 1 image of class cow"),
    ],
)
def test_a_spoiled_row_is_refused_by_number(tmp_path: Path, row: dict[str, Any], match: str) -> None:
    made = [*rows({"cat": 2, "dog": 2}, "image", "label"), row]
    file = write_rows(tmp_path / "x.parquet", made, {"label": ["cat", "dog", "cow"]}, pq.write_table)
    with pytest.raises(DataError, match=match):
        load(file)


@pytest.mark.parametrize(
    ("name", "root", "match"),
    [
        ("CIFAR1000", "x", "torchvision has no data set 'CIFAR1000'; the nearest are CIFAR100"),
        ("FakeData", "x", "torchvision has no data set 'FakeData'"),
        ("CIFAR100", None, "without data_root; give the folder"),
        ("CIFAR100", "x", "CIFAR100 cannot be read in .*x .*or fetch it with --download"),
        ("MNIST,MNIST", "x", "each once"),
    ],
)
def test_a_wrong_name_of_torchvision_or_missing_files_are_refused(
    tmp_path: Path, name: str, root: str | None, match: str
) -> None:
    with pytest.raises(DwmError, match=match):
        load(f"torchvision:{name}", None if root is None else tmp_path / root)
    assert not (tmp_path / "x").exists()


def test_images_that_no_memory_holds_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"21 images of 1000000 pixels take 63000\.0 GB of memory, and this machine"):
        load_any(Place(str(write_office(tmp_path))), ImageOptions(), image_size=1_000_000)


def test_test_images_that_train_too_are_counted_and_others_are_not(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_office(tmp_path / part)
    for n, file in enumerate(sorted((tmp_path / "test").rglob("*.png"))):
        file.write_bytes(png((n, 250, 0)))
    assert load(tmp_path).split == "the folder's own train and test parts"
    (tmp_path / "test" / "Art" / "Bed" / "00000.png").write_bytes(png(colour(0, 2, 2)))
    assert load(tmp_path).split.endswith("; 1 of the test images are training images of their domain too")


def test_accents_that_are_written_in_two_ways_are_one_class(tmp_path: Path) -> None:
    for domain, kind in (("one", "caf\u00e9"), ("two", "cafe\u0301")):
        write_office(tmp_path / domain, kinds=(kind, "bar"))
        for found in list((tmp_path / domain).iterdir()):
            found.rename(tmp_path / f"{domain}-{found.name}")
        (tmp_path / domain).rmdir()
    assert load(tmp_path).classes == ("bar", "caf\u00e9")
    for folder in [f for f in tmp_path.iterdir() if f.is_dir()]:
        for part, numbers in (("train", "01"), ("test", "2")):
            lines = [
                f"{folder.name}/{kind}/0000{n}.png {kind == 'bar':d}" for n in numbers for kind in ("bar", "caf\u00e9")
            ]
            (tmp_path / f"{folder.name}_{part}.txt").write_text("\n".join(lines), encoding="utf-8")
    assert len(load(tmp_path).domains["one-art"].train) == 4


def test_hidden_files_beside_the_classes_are_no_images(tmp_path: Path) -> None:
    write_office(tmp_path)
    (tmp_path / "Art" / "._00000.png").write_bytes(b"what macOS leaves")
    assert len(load(tmp_path).domains["art"].images) == 9


def test_a_path_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    for path, match in (
        (tmp_path / "no", "no such file or folder"),
        (tmp_path, "no images found; looked for <domain>"),
    ):
        with pytest.raises(DataError, match=re.escape(str(path)) + f": {match}"):
            load(path)
    none = write_rows(tmp_path / "none.parquet", rows({"cat": 1}, "image", "label"), {}, pq.write_table)
    pq.write_table(pq.read_table(none)[:0], none)
    with pytest.raises(DataError, match="none: no image is listed"):
        load(none)
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(DataError, match="unpack archives first"):
        load(tmp_path / "x.zip")
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"not a readable \.parquet file"):
        load(tmp_path / "x.parquet")
