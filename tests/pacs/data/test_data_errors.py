"""What is wrong with a copy of PACS is said in one line that names the place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dwm_fast.errors import DataError, InputError
from dwm_fast.pacs.data import DOMAINS, load_pacs

from ..pacs_for_tests import ALL, name, png, write_lists, write_parquet, write_tree


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda root: (root / old).rename(root / new) and None


def clear(folder: str) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        for file in sorted((root / folder).rglob("*.png")):
            file.unlink()

    return act


def spoil(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / file).write_bytes(content) and None


BROKEN_FOLDERS = {
    "missing class": (rename("sketch/guitar", "sketch/gitar"), "sketch.*no image of class guitar"),
    "missing domain": (rename("cartoon", "drawings"), "no folder of domain 'cartoon'.*add cartoon/"),
    "empty domain": (clear("art_painting"), "art_painting: domain 'art' is empty"),
    "corrupt image": (spoil("photo/dog/pic_1.png", b"not an image"), "pic_1.png: unreadable image"),
    "cut image": (spoil("photo/dog/pic_2.png", png(("photo", 0, 2), 64)[:90]), "pic_2.png: unreadable image"),
    "two of a domain": (lambda r: (r / "art").mkdir(), "second folder of domain 'art'"),
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_broken_folder_is_one_line_that_names_the_place(case: str, tmp_path: Path) -> None:
    spoiling, message = BROKEN_FOLDERS[case]
    spoiling(write_tree(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        load_pacs(tmp_path, image_size=8)
    assert "\n" not in str(caught.value)


def test_nothing_to_load_is_said_with_the_layouts_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        load_pacs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="xxx: "):
        load_pacs(tmp_path / ("x" * 300))
    with pytest.raises(DataError, match=r"looked for.*kfold/.*images/.*parquet"):
        load_pacs(tmp_path)
    (tmp_path / "pacs.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"pacs\.zip: expected a folder or a \.parquet file"):
        load_pacs(tmp_path / "pacs.zip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": lambda i: i[1] + 1}, r"row 0 \(photo/dog/pic_0.png\): label 1 means elephant.*says dog"),
        ({"label": lambda i: i[1] + 1, "path": lambda i: None}, "label 7; expected 0 .*count from 1"),
        ({"label": lambda i: 9, "path": lambda i: None}, "label 9; expected 0"),
        ({"domain": lambda i: DOMAINS.index(i[0])}, "domain 0 is none of photo.*ClassLabel"),
        ({"domain": lambda i: "clipart"}, "domain 'clipart' is none of"),
        ({"items": [i for i in ALL if i[0] != "sketch"]}, "domain 'sketch' is empty"),
        ({"items": [i for i in ALL if i[:2] != ("art", 3)]}, "domain 'art' has no image of class guitar"),
    ],
)
def test_wrong_parquet_names_file_and_row(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "pacs.parquet", **change)
    with pytest.raises(DataError, match=message) as caught:
        load_pacs(file, image_size=8)
    assert str(file) in str(caught.value)


def test_unreadable_parquet_rows_columns_and_files(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    rows = [{"bytes": b"junk" if i == ("photo", 2, 1) else png(i), "path": name(i)} for i in ALL]
    columns = {"image": rows, "domain": [i[0] for i in ALL], "label": [i[1] for i in ALL]}
    pq.write_table(pa.table(columns), file)
    with pytest.raises(DataError, match=r"a\.parquet, row 9 \(photo/giraffe/pic_1\.png\): unreadable image"):
        load_pacs(file, image_size=8)
    pq.write_table(pa.table({"image": rows, "target": columns["label"]}), file)
    with pytest.raises(DataError, match=r"expected the columns .*found image: struct.*target: int64"):
        load_pacs(file)
    file.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file"):
        load_pacs(file)


def test_wrong_lists_name_list_and_line(tmp_path: Path) -> None:
    root, lists = write_tree(tmp_path / "a"), tmp_path / "lists"

    def fails(message: str) -> None:
        with pytest.raises(DataError, match=message):
            load_pacs(root, splits=lists, image_size=8)

    fails("lists: no such folder")
    write_lists(lists, first=0)
    fails(r"photo_train_kfold\.txt, line 1: label 0 for class dog, expected 1 .*count from 0")
    photo = write_lists(lists) / "photo_train_kfold.txt"
    good = photo.read_text()
    photo.write_text(good + "photo/dog/pic_77.png 1\n")
    fails(r"photo_train_kfold\.txt, line 22: names 'photo/dog/pic_77\.png', which is not among")
    photo.write_text(good + "photo/dog/pic_3.png 1\n")
    fails(r"crossval_kfold\.txt, line 1: photo/dog/pic_3\.png was already named in .*train_kfold\.txt, line 22")
    photo.write_text(good + "sketch/dog/pic_0.png 1\n")
    fails("line 22: names an image of sketch in a list of domain 'photo'")
    photo.write_text("what is this\n")
    fails(r"line 1: 'what is this'; expected '<domain>/<class>/<file> <label 1 to 7>'")
    photo.write_text(good.split("photo/person")[0])
    fails(r"photo_train_kfold\.txt: names no image of person")
    photo.unlink()
    (lists / "photo_crossval_kfold.txt").unlink()
    fails(r"no train and no crossval list of domain 'photo' \(photo_test_kfold\.txt contains the training images")


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    for arguments in ({"holdout": 0.0}, {"holdout": 1.5}, {"image_size": 0}, {"domains": []}, {"domains": ["x"]}):
        with pytest.raises(InputError):
            load_pacs(root, **{"image_size": 8, **arguments})


def test_two_lists_of_one_domain_are_refused_and_not_chosen_from(tmp_path: Path) -> None:
    root, lists = write_tree(tmp_path / "a"), write_lists(tmp_path / "lists")
    (lists / "art_train_kfold.txt").write_bytes((lists / "art_painting_train_kfold.txt").read_bytes())
    with pytest.raises(DataError, match=r"art_train_kfold.txt: a second train list of domain 'art' beside art_paint"):
        load_pacs(root, splits=lists, image_size=8)
    with pytest.raises(DataError, match="a second train list"):
        load_pacs(root, splits=lists, image_size=8, domains=["art"])
    assert load_pacs(root, splits=lists, image_size=8, domains=["photo"]).domains["photo"].names


def test_two_folders_of_a_class_that_differ_in_case_are_refused(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "photo" / "Dog").mkdir()
    with pytest.raises(DataError, match=r"photo/dog: a second folder of class 'dog' beside Dog; keep one"):
        load_pacs(root, image_size=8)


def test_a_link_to_nowhere_is_named_and_not_left_out(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "photo" / "dog" / "moved.png").symlink_to(root / "gone.png")
    with pytest.raises(DataError, match=r"moved\.png: a link to a file that is not there"):
        load_pacs(root, image_size=8)


@pytest.mark.parametrize("label", ["²", "1²", "٣", "1.0", "-1", "+1", "one", "1" * 400, ""])
def test_a_label_that_is_no_number_is_one_line(label: str, tmp_path: Path) -> None:
    root, lists = write_tree(tmp_path / "a"), write_lists(tmp_path / "lists")
    photo = lists / "photo_train_kfold.txt"
    photo.write_text(f"photo/dog/pic_0.png {label}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: .*expected '<domain>/<class>/<file> <label 1 to 7>'") as caught:
        load_pacs(root, splits=lists, image_size=8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["one large value", "one value in many rows", "many rows without bytes"])
def test_a_small_parquet_file_that_unpacks_to_much_is_refused_before_it_does(form: str, tmp_path: Path) -> None:
    zeros = b"\0" * (16 << 20)
    count = {"one large value": 1, "one value in many rows": 20_000, "many rows without bytes": 2_000_000}[form]
    value = {"one large value": zeros, "one value in many rows": zeros[:20_000], "many rows without bytes": None}[form]
    image = pa.StructArray.from_arrays(
        [
            pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value], pa.binary())).cast(
                pa.binary()
            )
        ],
        ["bytes"],
    )
    columns = {"image": image, "domain": pa.array(["photo"] * count), "label": pa.array([0] * count)}
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), file, compression="zstd")
    assert file.stat().st_size < 100_000
    with pytest.raises(
        DataError, match=r"a\.parquet.*(unpack to more than 20 times|no image bytes in the row)"
    ) as caught:
        load_pacs(file, image_size=8)
    assert "\n" not in str(caught.value)
