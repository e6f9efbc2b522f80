"""Small synthetic copies of PACS in every layout, for the tests of its data."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dwm_fast.pacs.data import CLASSES, DOMAINS

PER_CLASS = 4
FOLDERS = {"photo": "photo", "art": "art_painting", "cartoon": "cartoon", "sketch": "sketch"}
Item = tuple[str, int, int]
ALL: list[Item] = [(d, c, k) for d in DOMAINS for c in range(7) for k in range(PER_CLASS)]


def colour(item: Item) -> tuple[int, int, int]:
    return DOMAINS.index(item[0]) * 60 + 10, item[1] * 30 + 5, item[2] * 40 + 3


def png(item: Item, size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), colour(item)).save(out, "png")
    return out.getvalue()


def name(item: Item) -> str:
    return f"{FOLDERS[item[0]]}/{CLASSES[item[1]]}/pic_{item[2]}.png"


def write_tree(base: Path) -> Path:
    for item in ALL:
        file = base / name(item)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(item))
    (base / "photo" / "dog" / ".DS_Store").write_bytes(b"x")
    (base / "photo" / "dog" / "notes.txt").write_bytes(b"x")
    return base


def write_lists(folder: Path, first: int = 1) -> Path:
    """Official lists that hold out the last image of each class."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        mine = [i for i in ALL if i[0] == domain]
        for kind, keep in (("train", mine[:0]), ("crossval", mine[:0]), ("test", mine)):
            if kind != "test":
                keep = [i for i in mine if (i[2] == PER_CLASS - 1) == (kind == "crossval")]
            text = "".join(f"{name(i)} {i[1] + first}\n" for i in keep)
            (folder / f"{FOLDERS[domain]}_{kind}_kfold.txt").write_text(text)
    return folder


def write_parquet(
    file: Path,
    items: list[Item] | None = None,
    path: Callable[[Item], str | None] = name,
    label: Callable[[Item], Any] = lambda i: i[1],
    domain: Callable[[Item], Any] = lambda i: FOLDERS[i[0]],
    features: dict[str, Any] | None = None,
) -> Path:
    rows = ALL if items is None else items
    table = pa.table(
        {
            "image": [{"bytes": png(i), "path": path(i)} for i in rows],
            "domain": [domain(i) for i in rows],
            "label": [label(i) for i in rows],
        }
    )
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
    return file


def build(kind: str, root: Path) -> Path:
    if kind == "folder":
        return write_tree(root)
    if kind == "nested":
        write_tree(root / "PACS")
        return root
    if kind == "kfold":
        write_tree(root / "kfold")
        return root
    if kind == "dassl":
        write_tree(root / "images")
        return root
    if kind == "parquet":
        return write_parquet(root / "pacs.parquet")
    if kind == "bare names":
        return write_parquet(root / "pacs.parquet", path=lambda i: f"pic_{i[2]}.png")
    half = len(ALL) // 2
    write_parquet(root / "data" / "train-00000-of-00002.parquet", ALL[:half])
    write_parquet(root / "data" / "train-00001-of-00002.parquet", ALL[half:])
    return root


LAYOUTS = ("folder", "nested", "kfold", "dassl", "parquet", "parquet folder", "bare names")
