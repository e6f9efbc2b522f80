"""A Hugging Face data set on disk: parquet files as on the hub, or what `save_to_disk` writes (arrow files)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwm_fast.errors import DataError, InputError
from dwm_fast.pacs.data.layouts import Record, check_inflation, class_label_names, first_line, parquet_files, unpacked
from dwm_fast.pacs.data.listed import Listed, domain_name, gathered, naturally, part_of

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "img"),
    "label": ("label", "labels"),
    "domain": ("domain",),
}
"""What a column is for, and the names that are tried where none is given."""


@dataclass(frozen=True)
class _Row:
    """One row: where it stands, its image and the names that its columns give."""

    part: str
    origin: str
    image: Any
    label: str
    domain: str | None


def find_files(path: Path) -> list[tuple[str, Path]]:
    """(part, file) of the data set's parquet or arrow files; [] where `path` holds neither."""
    if path.is_file():
        return [(part_of(path.stem) or "", path)] if path.suffix.lower() in (".parquet", ".arrow") else []
    parquet = parquet_files(path)
    if parquet:
        return [(part_of(file.stem) or part_of(file.parent.name) or "", file) for file in parquet]
    folders = [("", path), *((part_of(f.name) or "", f) for f in sorted(path.iterdir()) if f.is_dir())]
    return [(part, file) for part, folder in folders for file in _arrow_files(folder)]


def read_hugging(path: Path, files: Sequence[tuple[str, Path]], columns: Mapping[str, str]) -> Listed:
    """List the images of `files` as `find_files` gives them.

    Args:
        path: of the data set, for its name.
        files: its files.
        columns: of "image", "label" and "domain", the names of those that are not called as in `COLUMNS`. A set without
            a column of domains is one domain, called like the folder or file.

    Raises:
        InputError: `columns` names one that the set has not.
        DataError: a needed column is missing, a label or an image in a row is none, or a file cannot be read.
    """
    name = path.resolve().stem if path.is_file() else path.resolve().name
    found: list[tuple[str, str, str, Record]] = []
    order: dict[str, None] = {}
    for part, file in files:
        for row in _rows(part, file, columns, order):
            domain = domain_name(name if row.domain is None else row.domain)
            base, data = _image(row)
            record = Record(domain, 0, f"{domain}/{row.label}/{base}", data, row.origin)
            found.append((domain, row.label, row.part, record))
    used = {kind for _, kind, _, _ in found}
    classes = [kind for kind in order if kind in used] if used <= set(order) else naturally(used)
    listed = gathered(name, found, classes, "the data set's own train and test parts")
    unused = len(order.keys() - used)
    if unused:
        listed.left_out["names of classes without an image"] = unused
    return listed


def _arrow_files(folder: Path) -> list[Path]:
    """The arrow files of a folder that `save_to_disk` wrote, or those that lie in one without its state."""
    state = folder / "state.json"
    if not state.is_file():
        return sorted(file for file in folder.glob("*.arrow") if not file.name.startswith("cache-"))
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        files = [folder / Path(one["filename"]).name for one in content["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state}: not a readable state of a data set ({first_line(error)}); save it again") from error
    if content.get("_indices_data_files"):
        raise DataError(f"{folder}: rows are chosen by an index of their own; save it again after flatten_indices()")
    return files


def _rows(part: str, file: Path, columns: Mapping[str, str], order: dict[str, None]) -> Iterator[_Row]:
    """The rows of a file; the class names that it declares go into `order`."""
    import pyarrow as pa

    try:
        schema, batches = _opened(file)
        names = class_label_names(schema.metadata)
        chosen = _chosen(file, schema, columns)
        order |= dict.fromkeys(names.get(chosen["label"], ()))
        number = 0
        for batch in batches(sorted(set(chosen.values()))):
            for item in batch.to_pylist():
                origin = f"{file}, row {number}"
                label = _named(origin, "label", item[chosen["label"]], names.get(chosen["label"]))
                own = chosen.get("domain")
                domain = None if own is None else _named(origin, "domain", item[own], names.get(own))
                yield _Row(part, origin, item[chosen["image"]], label, domain)
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable {file.suffix} file ({first_line(error)}); fetch it again") from error


def _opened(file: Path) -> tuple[Any, Any]:
    """Schema of a file, and columns -> its record batches with these."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix.lower() == ".parquet":
        table = pq.ParquetFile(file)
        check_inflation(file, file.stat().st_size, unpacked(table.metadata))
        return table.schema_arrow, lambda columns: table.iter_batches(batch_size=64, columns=columns)
    source = pa.memory_map(str(file))
    try:
        reader = pa.ipc.open_stream(source)  # what the package `datasets` writes
        return reader.schema, lambda columns: (batch.select(columns) for batch in reader)
    except pa.ArrowInvalid:
        whole = pa.ipc.open_file(source)
        return whole.schema, lambda columns: (
            whole.get_batch(i).select(columns) for i in range(whole.num_record_batches)
        )


def _chosen(file: Path, schema: Any, columns: Mapping[str, str]) -> dict[str, str]:
    """What a column is for -> its name in the file; "domain" only where there is one."""
    have = ", ".join(f"{f.name}: {f.type}" for f in schema)
    chosen = {}
    for what, tried in COLUMNS.items():
        given = columns.get(what)
        if given is not None and given not in schema.names:
            raise InputError(f"columns: {what}={given}, and {file} has no such column; it has {have}")
        name = given or next((one for one in tried if one in schema.names), None)
        if name is not None:
            chosen[what] = name
        elif what != "domain":
            raise DataError(
                f"{file}: no column {' or '.join(tried)}; it has {have}; name yours by --columns {what}=NAME"
            )
    return chosen


def _named(origin: str, what: str, value: Any, names: Sequence[str] | None) -> str:
    """The name behind a text or a number."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        if names is not None and 0 <= value < len(names):
            return names[value]
        if names is None and value >= 0:
            return str(value)
    raise DataError(
        f"{origin}: {what} {value!r}; expected one name or number an image, with a name where there are any"
    )


def _image(row: _Row) -> tuple[str, bytes]:
    """File name (made of the row where there is none) and encoded bytes of a row's image."""
    image = row.image
    stored = image.get("path") if isinstance(image, Mapping) else None
    data = image.get("bytes") if isinstance(image, Mapping) else image
    if not isinstance(data, bytes) or not data:
        raise DataError(f"{row.origin}: no image bytes in the row; expected the encoded image in image.bytes")
    base = stored.replace("\\", "/").rpartition("/")[2] if isinstance(stored, str) else ""
    return base or Path(row.origin).name.replace(", ", " "), data
