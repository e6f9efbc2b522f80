"""Where the images of PACS lie: four layouts on disk, read into one plain list of records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dwm_fast.errors import DataError, InputError

DOMAINS = ("photo", "art", "cartoon", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
ALIASES: Mapping[str, tuple[str, ...]] = {
    "photo": ("photo", "p"),
    "art": ("art", "art_painting", "artpainting", "a"),
    "cartoon": ("cartoon", "c"),
    "sketch": ("sketch", "s"),
}
FOLDER_NAMES: Mapping[str, str] = {d: "art_painting" if d == "art" else d for d in DOMAINS}
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp"})
LAYOUTS = (
    "<domain>/<class>/*.jpg, kfold/<domain>/<class>/*.jpg (DomainBed), "
    "images/<domain>/<class>/*.jpg with splits/ (Dassl), or *.parquet (Hugging Face)"
)
_INFLATION = 20
_SHORT_NAME = {alias: domain for domain, aliases in ALIASES.items() for alias in aliases}


@dataclass(frozen=True)
class Record:
    """One image before decoding.

    ``name`` is ``<domain folder>/<class>/<file>`` in every layout, so that the same images sort alike and
    match the same list lines wherever they lie; ``source`` is a path, the encoded bytes, or what opens the image;
    ``origin`` says where for messages.
    """

    domain: str
    label: int
    name: str
    source: Path | bytes | Callable[[], Image.Image]
    origin: str
    has_file_name: bool = True


@dataclass(frozen=True)
class Layout:
    """What was recognised: the records of all wanted domains, and the folder of official lists if any.

    `left_out` counts what lies in the folders and was not taken, by reason.
    """

    kind: str
    root: Path
    records: list[Record]
    splits: Path | None
    left_out: Counter[str] = field(default_factory=Counter)


def find_domain(name: str) -> str | None:
    """Short name (photo, art, cartoon, sketch) of a domain given under any alias, or None."""
    return _SHORT_NAME.get(name.strip().lower())


def canonical_domain(name: str) -> str:
    """Short name of a domain: ``canonical_domain("art_painting") == "art"``; case does not matter.

    Raises InputError, naming the accepted names, for anything else.
    """
    domain = find_domain(name)
    if domain is None:
        accepted = "; ".join(f"{d} ({', '.join(a[1:])})" for d, a in ALIASES.items())
        raise InputError(f"unknown domain {name!r}: expected one of {accepted}")
    return domain


def read_layout(path: Path, domains: Sequence[str]) -> Layout:
    """Recognise the layout under `path` and list the images of `domains` (short names), undecoded.

    Raises DataError where the path is missing, nothing is recognised, or a domain or class has no images.
    """
    try:
        return _recognise(path, domains)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check name and rights") from error


def check_complete(domain: str, records: Sequence[Record], path: Path) -> None:
    """Raise DataError where a domain is empty or one of its seven classes has no image."""
    if not records:
        raise DataError(f"{path}: domain {domain!r} is empty; expected images of {', '.join(CLASSES)}")
    missing = [c for i, c in enumerate(CLASSES) if all(r.label != i for r in records)]
    if missing:
        what = "class" if len(missing) == 1 else "classes"
        raise DataError(
            f"{path}: domain {domain!r} has no image of {what} {', '.join(missing)}; "
            f"expected all of {', '.join(CLASSES)}"
        )


def _recognise(path: Path, domains: Sequence[str]) -> Layout:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give the folder or parquet file that holds PACS")
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise DataError(f"{path}: expected a folder or a .parquet file; unpack archives first")
        return Layout("parquet", path, _read_parquet([path], domains), None)
    for root in (path, path / "PACS", path / "pacs"):
        if not root.is_dir():
            continue
        splits = root / "splits"
        lists = splits if splits.is_dir() and any(splits.glob("*_kfold.txt")) else None
        for kind, base in (("folder", root), ("kfold", root / "kfold"), ("dassl", root / "images")):
            folders = _domain_folders(base)
            if folders:
                left_out: Counter[str] = Counter()
                return Layout(kind, root, _read_folders(base, folders, domains, left_out), lists, left_out)
        files = parquet_files(root)
        if files:
            return Layout("parquet", root, _read_parquet(files, domains), lists)
    raise DataError(f"{path}: no PACS images found; looked for {LAYOUTS}")


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def _named_like_domains(base: Path) -> list[Path]:
    """Folders under `base` that are named like a domain."""
    inside = _visible(base) if base.is_dir() else []
    return [folder for folder in inside if find_domain(folder.name) is not None and folder.is_dir()]


def _domain_folders(base: Path) -> dict[str, Path]:
    """The same by short name."""
    found: dict[str, Path] = {}
    for folder in _named_like_domains(base):
        domain = canonical_domain(folder.name)
        if domain in found:
            raise DataError(f"{folder}: a second folder of domain {domain!r} beside {found[domain].name}; keep one")
        found[domain] = folder
    return found


def _read_folders(
    base: Path, folders: Mapping[str, Path], domains: Sequence[str], left_out: Counter[str]
) -> list[Record]:
    records: list[Record] = []
    for domain in domains:
        if domain not in folders:
            have = ", ".join(f.name for f in folders.values())
            raise DataError(f"{base}: no folder of domain {domain!r} (found {have}); add {FOLDER_NAMES[domain]}/")
        found = list(_read_domain_folder(domain, folders[domain], left_out))
        check_complete(domain, found, folders[domain])
        records += found
    return records


def _read_domain_folder(domain: str, folder: Path, left_out: Counter[str]) -> Iterator[Record]:
    classes: dict[str, Path] = {}
    for class_folder in _visible(folder):
        name = class_folder.name.lower()
        if name not in CLASSES or not class_folder.is_dir():
            left_out[f"beside the classes of {domain}"] += 1
            continue
        if name in classes:
            raise DataError(f"{class_folder}: a second folder of class {name!r} beside {classes[name].name}; keep one")
        classes[name] = class_folder
        for file in _visible(class_folder):
            if file.is_symlink() and not file.exists():
                raise DataError(f"{file}: a link to a file that is not there; mend the link or remove it")
            if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file():
                full = f"{FOLDER_NAMES[domain]}/{name}/{file.name}"
                yield Record(domain, CLASSES.index(name), full, file, str(file))
            else:
                left_out["folders inside a class" if file.is_dir() else f"'{file.suffix.lower()}' files"] += 1


def holds_pacs(path: Path) -> bool:
    """Whether a folder or file has the look of PACS: its domains and, most of what lies in them, its classes."""
    for root in (path, path / "PACS", path / "pacs"):
        for base in (root, root / "kfold", root / "images"):
            folders = _named_like_domains(base)
            seen = {p.name.lower() for folder in folders for p in _visible(folder) if p.is_dir()}
            if seen and 2 * len(seen & set(CLASSES)) >= len(seen):  # folders of images alone are classes of other data
                return True
        files = parquet_files(root) if root.is_dir() else [root] if root.suffix.lower() == ".parquet" else []
        if files and root.exists():
            return _parquet_of_pacs(files[0])
    return False


def _parquet_of_pacs(file: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            names = class_label_names(table.schema_arrow.metadata)
            if not {"domain", "label"} <= set(table.schema_arrow.names):
                return False
            domains = names.get("domain") or pq.read_table(file, columns=["domain"])["domain"].unique().to_pylist()
    except (pa.ArrowException, OSError):
        return False
    named = all(isinstance(domain, str) and find_domain(domain) is not None for domain in domains)
    return named and {name.lower() for name in names.get("label", ())} <= set(CLASSES)


def parquet_files(root: Path) -> list[Path]:
    """Parquet files up to two folders down, as on the hub; a wrong path is not searched to its bottom."""
    files = {p for depth in ("", "*/", "*/*/") for p in root.glob(f"{depth}*.parquet") if p.is_file()}
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts))


def _read_parquet(files: Sequence[Path], domains: Sequence[str]) -> list[Record]:
    records = [record for file in files for record in _read_parquet_file(file, domains)]
    for domain in domains:
        check_complete(
            domain,
            [r for r in records if r.domain == domain],
            files[0] if len(files) == 1 else files[0].parent,
        )
    return records


def _read_parquet_file(file: Path, domains: Sequence[str]) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            image = schema.field("image").type if "image" in schema.names else None
            fields = [] if image is None or not pa.types.is_struct(image) else [f.name for f in image]
            if not {"domain", "label"} <= set(schema.names) or "bytes" not in fields:
                raise DataError(
                    f"{file}: expected the columns image{{bytes, path}}, domain and label; "
                    f"found {', '.join(f'{f.name}: {f.type}' for f in schema)}"
                )
            names = class_label_names(schema.metadata)
            size = file.stat().st_size
            check_inflation(file, size, unpacked(table.metadata))
            row = taken = 0
            for batch in table.iter_batches(batch_size=64, columns=["image", "domain", "label"]):
                taken += batch.nbytes
                check_inflation(file, size, taken)
                for item in batch.to_pylist():
                    record = _parquet_record(file, row, item, names)
                    row += 1
                    if record.domain in domains:
                        yield record
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file ({first_line(error)}); fetch it again") from error


def unpacked(metadata: Any) -> int:
    """Bytes that a parquet file's columns say they take unpacked."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    return sum(group.column(i).total_uncompressed_size for group in groups for i in range(group.num_columns))


def check_inflation(file: Path, size: int, taken: int) -> None:
    """Raise DataError for a parquet file that unpacks to far more than its size: encoded images hardly shrink."""
    if taken > _INFLATION * size + (1 << 20):
        raise DataError(
            f"{file}: {size:,} bytes that unpack to more than {_INFLATION} times as many, which encoded images do not; "
            "fetch it again"
        )


def class_label_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Names of the ClassLabel columns, from the metadata that the `datasets` package writes."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {k: v["names"] for k, v in features.items() if isinstance(v, dict) and "names" in v}
    except (KeyError, TypeError, ValueError):
        return {}


def _parquet_record(file: Path, row: int, item: Mapping[str, Any], names: Mapping[str, list[str]]) -> Record:
    image = item["image"] or {}
    stored = image.get("path")
    stored = stored if isinstance(stored, str) else None
    parts = stored.replace("\\", "/").split("/") if stored else []
    origin = f"{file}, row {row}" + (f" ({stored})" if stored else "")
    data = image.get("bytes")
    if not data:
        raise DataError(f"{origin}: no image bytes in the row; expected the encoded image in image.bytes")
    given = _value_name(item["domain"], names.get("domain"))
    domain = find_domain(given) if given is not None else None
    if domain is None:
        raise DataError(
            f"{origin}: domain {item['domain']!r} is none of {', '.join(DOMAINS)}; "
            "expected a name, or a number with ClassLabel names in the file"
        )
    label = _parquet_label(origin, item["label"], names.get("label"))
    named = parts[-2].lower() if len(parts) >= 2 and parts[-2].lower() in CLASSES else None
    if named is not None and named != CLASSES[label]:
        raise DataError(
            f"{origin}: label {item['label']!r} means {CLASSES[label]}, the path says {named}; "
            "expected labels that count from 0 (dog) to 6 (person)"
        )
    base = parts[-1] if parts else f"row-{row:06d}"
    name = f"{FOLDER_NAMES[domain]}/{CLASSES[label]}/{base}"
    return Record(domain, label, name, data, origin, has_file_name=bool(parts))


def _value_name(value: Any, names: Sequence[str] | None) -> str | None:
    """The name behind a string or a ClassLabel number; None where a number has no name."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and names is not None and 0 <= value < len(names):
        return names[value]
    return None


def _parquet_label(origin: str, value: Any, names: Sequence[str] | None) -> int:
    named = _value_name(value, names)
    if named is not None and named.lower() in CLASSES:
        return CLASSES.index(named.lower())
    if named is None and isinstance(value, int) and 0 <= value < len(CLASSES):
        return value
    hint = "; labels seem to count from 1, subtract 1" if value == len(CLASSES) else ""
    raise DataError(f"{origin}: label {value!r}; expected 0 (dog) to 6 (person) or a class name{hint}")


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).splitlines()), type(error).__name__)
