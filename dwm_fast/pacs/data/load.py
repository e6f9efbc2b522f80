"""The images of a study, decoded once and held in memory, and how PACS is loaded or fetched."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from dwm_fast.errors import DataError, InputError
from dwm_fast.pacs.data.layouts import CLASSES, DOMAINS, Record, canonical_domain, read_layout
from dwm_fast.pacs.data.pixels import Progress, decode_all
from dwm_fast.pacs.data.splits import holdout_split, official_split, train_list

HUB_DATASET = "flwrlabs/pacs"
VALIDATION = ", validation part of the training images"
"""What the name of a data set says where its test images stayed unread."""


@dataclass(frozen=True)
class DomainSet:
    """One domain: `images` (N, 3, H, W) uint8; `labels` (N,), `train` and `test` positions, int64.

    `classes` are the names that its labels count, where they are its own; empty where they are those of the data set.
    """

    images: Tensor
    labels: Tensor
    train: Tensor
    test: Tensor
    names: list[str]
    classes: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> DomainSet:
        """The same set with all tensors on `device`."""
        return replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            train=self.train.to(device),
            test=self.test.to(device),
        )


@dataclass(frozen=True)
class PacsData:
    """All domains of a study, in order: of PACS photo, art, cartoon, sketch.

    `real` is False for procedural images. `classes` are the names of all classes, each once; `classes_of` a domain
    are those that its labels count. `fingerprint` is the SHA-256 of pixels, labels and splits, and of the classes of
    domains that have their own: two data sets with the same fingerprint give the same study. `left_out` counts the
    files that were not taken, by reason. `split` says in words which images train and which test.
    """

    name: str
    real: bool
    domains: dict[str, DomainSet]
    classes: tuple[str, ...]
    image_size: int
    fingerprint: str
    left_out: Mapping[str, int] = field(default_factory=dict)
    split: str = ""

    def classes_of(self, domain: str) -> tuple[str, ...]:
        """The names that the labels of a domain count."""
        return self.domains[domain].classes or self.classes

    def to(self, device: torch.device | str) -> PacsData:
        """The same data with all tensors on `device`."""
        return replace(self, domains={name: domain.to(device) for name, domain in self.domains.items()})

    @property
    def nbytes(self) -> int:
        """Bytes of all images, to decide whether they fit on a device."""
        return sum(d.images.numel() for d in self.domains.values())


def load_pacs(
    path: str | os.PathLike[str],
    splits: str | os.PathLike[str] | None = None,
    image_size: int = 128,
    domains: Iterable[str] | None = None,
    holdout: float = 0.1,
    seed: int = 0,
    progress: Progress | None = None,
    validation: float | None = None,
) -> PacsData:
    """Load PACS from any of its usual layouts, recognised by themselves.

    Args:
        path: folder ``<domain>/<class>/*``, DomainBed's ``kfold/``, Dassl's ``images/`` with ``splits/``, or
            a Hugging Face parquet file or folder of them; also a folder that holds one of these as ``PACS/``.
        splits: folder of the official ``<domain>_{train,crossval}_kfold.txt`` lists (labels 1 to 7). Without
            it, lists in ``path/splits`` are used if there are any, else an own hold-out. The official
            ``test`` lists contain the training images and are never used.
        image_size: side of the square images in pixels; others are resized (bicubic).
        domains: names or aliases of the domains to load; all four by default.
        holdout: fraction of each class held out for testing where no lists are used, in (0, 1).
        seed: chooses the own hold-out.
        progress: called as ``progress(done, total)`` while images are decoded.
        validation: fraction of each class of the TRAINING images held out in place of the test images, in (0, 1); the
            test images are then not decoded, and an official crossval list is not read. What is held out depends on
            `seed` and the images' names alone.

    Raises:
        InputError: unknown domain, impossible `image_size` or `holdout`.
        DataError: anything missing, incomplete or unreadable on disk; names the file.
    """
    if image_size < 1:
        raise InputError(f"image_size={image_size}: expected a positive number of pixels, such as 128")
    wanted = DOMAINS if domains is None else tuple(canonical_domain(d) for d in domains)
    wanted = tuple(d for d in DOMAINS if d in wanted)
    if not wanted:
        raise InputError("domains is empty: expected at least one of " + ", ".join(DOMAINS))
    layout = read_layout(Path(path), wanted)
    lists = layout.splits if splits is None else Path(splits)
    groups = {d: sorted((r for r in layout.records if r.domain == d), key=lambda r: r.name) for d in wanted}
    positions = {}
    for d, records in groups.items():
        if validation is None:
            positions[d] = holdout_split(records, holdout, seed) if lists is None else official_split(lists, d, records)
            continue
        train = holdout_split(records, holdout, seed)[0] if lists is None else train_list(lists, d, records)
        groups[d] = [records[i] for i in train]
        positions[d] = holdout_split(groups[d], validation, seed)
    pixels = decode_all([r for records in groups.values() for r in records], image_size, progress)
    sets: dict[str, DomainSet] = {}
    start = 0
    for domain, records in groups.items():
        images = pixels[start : start + len(records)]
        start += len(records)
        train, test = positions[domain]
        sets[domain] = DomainSet(
            images=images,
            labels=torch.tensor([r.label for r in records]),
            train=torch.tensor(train),
            test=torch.tensor(test),
            names=[r.name for r in records],
        )
    name = "PACS" if validation is None else f"PACS{VALIDATION}"
    split = f"{holdout:g} of each class held out for testing" if lists is None else "the official lists"
    return PacsData(name, True, sets, CLASSES, image_size, fingerprint(sets), layout.left_out, split)


def validation_part(data: PacsData, fraction: float, seed: int = 0) -> PacsData:
    """The training images alone, a part of each class held out for evaluation in place of the test images.

    Args:
        data: any images in memory; `load_pacs` does the same without decoding the test images.
        fraction: of each class, in (0, 1).
        seed: chooses, by the images' names, as in `load_pacs`.
    """
    sets = {}
    for name, domain in data.domains.items():
        positions = domain.train.tolist()
        names, labels = [domain.names[i] for i in positions], domain.labels[domain.train]
        records = [Record(name, int(k), n, b"", n) for n, k in zip(names, labels, strict=True)]
        train, held = holdout_split(records, fraction, seed, data.classes_of(name))
        parts = torch.tensor(train), torch.tensor(held)
        sets[name] = DomainSet(domain.images[domain.train], labels, *parts, names, domain.classes)
    return replace(data, name=data.name + VALIDATION, domains=sets, fingerprint=fingerprint(sets))


def fingerprint(domains: Mapping[str, DomainSet]) -> str:
    """SHA-256 (hex) over the names of the domains, their pixels, labels, splits and own classes, in order."""
    digest = hashlib.sha256()
    for name, domain in domains.items():
        digest.update(f"{name} {tuple(domain.images.shape)} {len(domain.train)} {len(domain.test)};".encode())
        for tensor in (domain.images, domain.labels, domain.train, domain.test):
            digest.update(tensor.cpu().contiguous().numpy().data)
        if domain.classes:
            digest.update(json.dumps(domain.classes).encode())
    return digest.hexdigest()


def download_pacs(folder: str | os.PathLike[str]) -> Path:
    """Fetch PACS from the Hugging Face hub (about 190 MB) into `folder`; returns it, ready for `load_pacs`.

    Needs the optional package huggingface_hub. Raises DataError where that or the network is missing.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise DataError("downloading needs the package huggingface_hub: pip install 'dwm-fast[hub]'") from error
    target = Path(folder)
    try:
        huggingface_hub.snapshot_download(
            repo_id=HUB_DATASET, repo_type="dataset", local_dir=str(target), allow_patterns=["*.parquet"]
        )
    except Exception as error:  # the hub client raises the errors of several HTTP libraries
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{HUB_DATASET} could not be downloaded into {target} ({reason}); "
            "check network and folder, or fetch the data set by hand and give its path"
        ) from error
    return target
