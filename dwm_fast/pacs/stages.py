"""The stages folder: one file a finished stage, with its tensors, its figures and the settings it was made with."""

from __future__ import annotations

import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dwm_fast._files import write_atomic
from dwm_fast.errors import InputError
from dwm_fast.pacs.claims import FOLDER, Claims, differences

Finished = tuple[dict[str, Tensor], dict[str, Any]]
"""A stage's tensors and figures."""


class StageFolder:
    """Finished stages by name, one safetensors file each, and each done by one process at a time.

    Args:
        folder: where the files lie; made when the first is written. Locks lie in the folder .locks beside it.
        device: where stages are computed, for their figures.

    Attributes:
        waits: called with the name of a stage before waiting for another process that is at it.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        self.folder = folder
        self.device = torch.device("cpu") if device is None else device
        self.claims = Claims(folder.parent / FOLDER)
        self.waits: Callable[[str], object] = lambda _: None

    def path(self, name: str) -> Path:
        """The file of a stage."""
        return self.folder / f"{name}.safetensors"

    def check(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Whether a stage is done; InputError when it was done with other settings."""
        header = self._header(name)
        if header is None:
            return False
        different = differences(header["settings"], json.loads(json.dumps(settings)))
        if different:
            raise InputError(
                f"{self.path(name)} was made with other settings ({', '.join(different)}); choose another --out, or "
                "give the settings of that run to go on with it"
            )
        return True

    def taken(self, name: str) -> bool:
        """Whether a process is at a stage at this moment."""
        return self.claims.taken(self.path(name).stem)

    def figures(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The figures of a finished stage, as `read` gives them, without reading its tensors."""
        header = self._header(name) if self.check(name, settings) else None
        return None if header is None else header["figures"]

    def thin(self, name: str) -> None:
        """Leave a finished stage, where it is there, its figures and settings alone: `read` then gives no tensors."""
        header = self._header(name)
        if header is None:
            return
        with safe_open(self.path(name), framework="pt") as file:
            if not file.keys():
                return
        write_atomic(self.path(name), save({}, metadata={key: json.dumps(part) for key, part in header.items()}))

    def read(self, name: str, settings: Mapping[str, Any]) -> Finished | None:
        """Tensors and figures of a finished stage; None where it is not done or its file is broken.

        Raises InputError when it was made with other settings.
        """
        if not self.check(name, settings):
            return None
        header = self._header(name)
        try:
            with safe_open(self.path(name), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        return None if header is None else (tensors, header["figures"])

    def once(
        self,
        name: str,
        settings: Mapping[str, Any],
        make: Callable[[], Finished],
        enough: Callable[[Finished], bool] = lambda _: True,
    ) -> Finished:
        """A stage as `read` gives it, where that is `enough`; else as `make` does, claimed so that no other does it."""
        kept = self.read(name, settings)
        if kept is not None and enough(kept):
            return kept
        with self.claims.stage(self.path(name).stem, self.waits):
            kept = self.read(name, settings)  # another may have done it meanwhile
            return kept if kept is not None and enough(kept) else make()

    def _header(self, name: str) -> dict[str, Any] | None:
        """Settings and figures of a stage's file; None where there is none or it is broken."""
        if not self.path(name).exists():
            return None
        try:
            with safe_open(self.path(name), framework="pt") as file:
                header = {key: _strict(text) for key, text in (file.metadata() or {}).items()}
        except (OSError, SafetensorError, ValueError):
            return None
        return header if all(isinstance(header.get(key), dict) for key in ("figures", "settings")) else None

    def write(
        self, name: str, tensors: Mapping[str, Tensor], figures: dict[str, Any], settings: dict[str, Any], begun: float
    ) -> Finished:
        """Keep a stage that began at `begun` (time.perf_counter), and return it as `read` would.

        Its figures get the seconds that it took, the device, and the number of threads on the CPU.

        Raises InputError, with nothing kept, where a figure or a tensor is not finite: nothing is found out from it.
        """
        check_finite(name, figures, tensors)
        machine = {"device": device_name(self.device), "threads": torch.get_num_threads()}
        figures = {**figures, "seconds": time.perf_counter() - begun, **machine}
        plain = {key: tensor.contiguous() for key, tensor in tensors.items()}
        header = {"figures": json.dumps(figures), "settings": json.dumps(settings)}
        write_atomic(self.path(name), save(plain, metadata=header))
        return plain, json.loads(json.dumps(figures))


def device_name(device: torch.device) -> str:
    """What computes, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def check_finite(stage: str, figures: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError, naming the first, where a stage's figures (nested ones too) or tensors are not finite."""
    diverged = next(itertools.chain(_not_finite(figures), _not_finite_tensors(tensors)), None)
    if diverged is not None:
        raise InputError(
            f"stage {stage}: {diverged} is not finite, so its training diverged; lower its rate (--source-lr, "
            "--mask-lr, --tune-lr, or lr in the file of --config) or give --amp off; finished stages are kept"
        )


def _strict(text: str) -> Any:
    """What strict JSON says. A stage with NaN was kept by an earlier release, and counts as broken."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _not_finite(figures: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the numbers in nested figures that are NaN or infinite."""
    if isinstance(figures, Mapping):
        for key, value in figures.items():
            yield from _not_finite(value, f"{name}.{key}" if name else str(key))
    elif isinstance(figures, (list, tuple)):
        for value in figures:
            yield from _not_finite(value, name)
    elif isinstance(figures, float) and not math.isfinite(figures):
        yield name


def _not_finite_tensors(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            yield f"tensor {name}"
