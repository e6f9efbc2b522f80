"""Who owns which weight, of all tasks together, in one mask file: every task's mask from a few bits a weight."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwm_fast.bank.encode import CODINGS, write_mask_file
from dwm_fast.bank.file import MaskFile
from dwm_fast.bank.header import fail
from dwm_fast.bank.record import make_domain
from dwm_fast.errors import InputError

DOMAIN = "ownership"
"""Name of the one domain that such a file holds."""
MOST_TASKS = 255


@dataclass(frozen=True)
class Ownership:
    """One owner for every weight.

    Attributes:
        tasks: names of the tasks, in the order in which they were learned.
        owner: name of a weight -> uint8 of its shape: 0 = free, t = owned by the t-th task, counted from 1.
    """

    tasks: tuple[str, ...]
    owner: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not 0 < len(self.tasks) <= MOST_TASKS or len(set(self.tasks)) < len(self.tasks):
            raise InputError(f"tasks are {self.tasks}; expected 1 to {MOST_TASKS} names, each once")
        for name, owner in self.owner.items():
            most = int(owner.max()) if owner.dtype == torch.uint8 and owner.numel() else 0
            if owner.dtype != torch.uint8 or most > len(self.tasks):
                raise InputError(
                    f"owner '{name}' is {owner.dtype} with values to {most}; expected torch.uint8 with values to "
                    f"{len(self.tasks)}, the number of tasks"
                )

    @property
    def bits_per_weight(self) -> int:
        """ceil(log2(tasks + 1)), what a file in the coding "raw" takes for a weight."""
        return len(self.tasks).bit_length()

    def masks(self, task: str) -> dict[str, Tensor]:
        """Name of a weight -> bool mask of the weights that a task sees: those that it or an earlier one owns."""
        if task not in self.tasks:
            raise InputError(f"task '{task}' is not among {', '.join(self.tasks)}")
        number = self.tasks.index(task) + 1
        return {name: (owner > 0) & (owner <= number) for name, owner in self.owner.items()}


def write_ownership(path: str | os.PathLike[str], ownership: Ownership, coding: str = "raw") -> None:
    """Write a mask file atomically, with checksums of its parts (docs/format.md).

    Args:
        path: the file.
        ownership: of all tasks.
        coding: "raw": the binary digits of the owners, ceil(log2(tasks + 1)) bits a weight; "coded": near the entropy
            of the owners (needs the package `constriction`).

    Example:
        >>> import pathlib, tempfile, torch
        >>> from dwm_fast.bank import Ownership, read_ownership, write_ownership
        >>> path = pathlib.Path(tempfile.mkdtemp(), "owners.safetensors")
        >>> owner = torch.tensor([1, 0, 2, 1, 3], dtype=torch.uint8)
        >>> write_ownership(path, Ownership(("photo", "art", "sketch"), {"conv1.weight": owner}))
        >>> read_ownership(path).masks("art")["conv1.weight"].tolist()
        [True, False, True, True, False]
    """
    if coding not in CODINGS:
        raise InputError(f"coding '{coding}' is unknown; expected one of {', '.join(CODINGS)}")
    split, way = (_digits, "digits") if coding == "raw" else (_chain, "chain")
    masks = {}
    for name, owner in ownership.owner.items():
        for part, mask in enumerate(split(owner, len(ownership.tasks))):
            masks[f"{part}.{name}"] = mask
    options = {"tasks": list(ownership.tasks), "ownership": way}
    write_mask_file(path, make_domain(DOMAIN, masks, method=DOMAIN, options=options), coding)


def read_ownership(path: str | os.PathLike[str]) -> Ownership:
    """What `write_ownership` wrote; MaskFileError for a file that is broken, or of something else."""
    record = MaskFile(path).load()
    tasks, way = _described(Path(path), record.info.options)
    count = len(tasks).bit_length() if way == "digits" else len(tasks)
    parts: dict[str, list[Tensor]] = {}
    for full, mask in record.masks().items():
        number, _, name = full.partition(".")
        if number != str(len(parts.setdefault(name, []))):
            fail(Path(path), full, f"expected part {len(parts[name])} of '{name}' here")
        parts[name].append(mask)
    owner = {}
    for name, masks in parts.items():
        if len(masks) != count:
            fail(Path(path), name, f"{len(masks)} parts; expected {count} for {len(tasks)} tasks")
        owner[name] = _of_digits(Path(path), name, masks) if way == "digits" else _of_chain(Path(path), name, masks)
        if owner[name].numel() and int(owner[name].max()) > len(tasks):
            fail(Path(path), name, f"owner {int(owner[name].max())} of {len(tasks)} tasks")
    return Ownership(tasks, owner)


def _described(path: Path, options: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    tasks: Any = options.get("tasks")
    way: Any = options.get("ownership")
    if way not in ("digits", "chain"):
        fail(path, "options", "this mask file holds no ownership; expected one that write_ownership wrote")
    named = isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)
    if not named or not 0 < len(tasks) <= MOST_TASKS or len(set(tasks)) < len(tasks):
        fail(path, "options.tasks", f"expected 1 to {MOST_TASKS} names, each once")
    return tuple(tasks), way


def _digits(owner: Tensor, tasks: int) -> Iterator[Tensor]:
    """The binary digits of the owners, least first."""
    for digit in range(tasks.bit_length()):
        yield (owner >> digit & 1).bool()


def _of_digits(path: Path, name: str, digits: list[Tensor]) -> Tensor:
    shape = digits[0].shape
    for number, mask in enumerate(digits):
        if mask.shape != shape:
            fail(path, f"{number}.{name}", f"shape {tuple(mask.shape)}; expected {tuple(shape)}, that of 0.{name}")
    owner = torch.zeros(shape, dtype=torch.uint8)
    for digit, mask in enumerate(digits):
        owner |= mask.to(torch.uint8) << digit
    return owner


def _chain(owner: Tensor, tasks: int) -> Iterator[Tensor]:
    """For each task, whether it owns a weight, asked only of the weights that no earlier task owns.

    The entropies of these masks add up to that of the owners.
    """
    yield owner == 1
    left = owner[owner != 1]
    for task in range(2, tasks + 1):
        yield left == task
        left = left[left != task]


def _of_chain(path: Path, name: str, masks: list[Tensor]) -> Tensor:
    owner = torch.zeros(masks[0].shape, dtype=torch.uint8)
    flat, left = owner.view(-1), torch.arange(owner.numel())
    for number, mask in enumerate(masks, start=1):
        if mask.numel() != len(left):
            fail(path, name, f"{mask.numel()} bits for task {number}; expected {len(left)}, what earlier ones left")
        mine = mask.view(-1)
        flat[left[mine]] = number
        left = left[~mine]
    return owner
