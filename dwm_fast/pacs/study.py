"""The study: every cell of the grid, and the run folder with results, table, figures, masks and report."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import dwm_fast
from dwm_fast import ops
from dwm_fast._files import write_atomic
from dwm_fast.bank import fingerprint, make_domain, write_mask_file
from dwm_fast.errors import InputError
from dwm_fast.pacs import figures, report, table
from dwm_fast.pacs.backbones import LoadReport, load_weights
from dwm_fast.pacs.config import StudyConfig
from dwm_fast.pacs.data import PacsData, load_pacs
from dwm_fast.pacs.lab import Lab, Mask
from dwm_fast.pacs.procedural import procedural

_IN_DEVICE_MEMORY = 0.25
"""Largest fraction of the device's free memory that the decoded images may take there."""


@dataclass(frozen=True)
class Stage:
    """One line of progress: what is being done, and how to do it."""

    name: str
    label: str
    run: Callable[[], str]


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one. Raises InputError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device '{name}' cannot be used here: {reason}; try --device cpu") from error
    return device


def load_data(config: StudyConfig) -> PacsData:
    """The images a configuration asks for: real PACS from `config.data`, or the built-in procedural ones."""
    if config.data is None:
        return procedural(image_size=config.image_size)
    return load_pacs(config.data, config.splits, config.image_size, config.domains())


def prepare_machine(device: torch.device) -> None:
    """Process-wide settings: speed on a CPU, the same sums in every run on a GPU."""
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    if device.type != "cpu":
        return
    # Second moments of logit gradients are often subnormal, and arithmetic on those takes a hundred times longer.
    torch.set_flush_denormal(True)
    if platform.libc_ver()[0] == "glibc":
        # Keep freed memory: a step's tensors are many megabytes each, and fresh pages cost more than the arithmetic.
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


class Study:
    """Runs a configuration in a folder; an interrupted one goes on where it was.

    Args:
        config: what to run.
        folder: the run folder; made if need be. A finished stage in it that was made with other settings is refused.
        data: the images; loaded from the configuration by default.
    """

    lab_type: ClassVar[type[Lab]] = Lab

    def __init__(self, config: StudyConfig, folder: Path | str, data: PacsData | None = None) -> None:
        self.config = config
        self.folder = Path(folder)
        self.device = choose_device(config.device)
        prepare_machine(self.device)
        data = load_data(config) if data is None else data
        self.data = data.to(self.device) if self._fits(data) else data
        self.lab = self.lab_type(config, self.data, self.folder, self.device)
        self._refuse_other_settings()
        write_atomic(self.folder / "config.json", json.dumps(config.to_dict(), indent=1))

    def _fits(self, data: PacsData) -> bool:
        if self.device.type != "cuda":
            return self.device.type == "cpu"
        return data.nbytes < _IN_DEVICE_MEMORY * torch.cuda.mem_get_info(self.device)[0]

    def _refuse_other_settings(self) -> None:
        """Raise InputError when a stage of the grid is in the folder with other settings, before anything is done."""
        config, lab = self.config, self.lab
        for seed, source in itertools.product(config.seeds, self._sources()):
            planned = [lab.source_stage(source, seed)]
            planned += [lab.mask_stage(source, method, seed) for method in self._masking()]
            for target, (method, init) in itertools.product(self._targets(source), self._ways()):
                planned += lab.tune_stages(source, target, method, init, seed)
            for name, settings in planned:
                lab.stages.check(name, settings)

    def weights_report(self) -> LoadReport | None:
        """What the checkpoint gives the network; None where there is none, or no source network left to train."""
        cells = itertools.product(self._sources(), self.config.seeds)
        to_train = not all(self.lab.stages.check(*self.lab.source_stage(*cell)) for cell in cells)
        if self.config.weights is None or not to_train:
            return None
        return load_weights(self.lab.network(), self.config.weights, self.config.backbone)

    def stages(self) -> Iterator[Stage]:
        """Every stage in order; running one reads it from the folder where it is done."""
        config, lab = self.config, self.lab
        for seed, source in itertools.product(config.seeds, self._sources()):
            yield Stage(
                f"source-{source}-seed{seed}",
                f"source {source}",
                lambda s=source, k=seed: _say("accuracy", lab.source(s, k).figures["accuracy"]),  # type: ignore[misc]
            )
            for method in self._masking():
                yield Stage(
                    f"mask-{method}-{source}-seed{seed}",
                    f"mask {source}, {method}",
                    lambda s=source, m=method, k=seed: _mask_says(lab.mask(s, m, k).figures),  # type: ignore[misc]
                )
            for target, (method, init) in itertools.product(self._targets(source), self._ways()):
                yield Stage(
                    f"tune-{source}-{target}-{method}-{init}-seed{seed}",
                    f"{source} -> {target}, {method}" + (f", {init}" if init != "-" else ""),
                    lambda s=source, t=target, m=method, i=init, k=seed: _rows_say(lab.rows(s, t, m, i, k)),  # type: ignore[misc]
                )

    def _ways(self) -> list[tuple[str, str]]:
        """(method, init) of the grid; "none" has no re-initialisation and always runs first, as the baseline."""
        return [("none", "-"), *itertools.product(self._masking(), self.config.inits)]

    def _masking(self) -> list[str]:
        return [method for method in self.config.methods if method != "none"]

    def _targets(self, source: str) -> list[str]:
        return [t for s, t in self.config.pairs() if s == source]

    def run(
        self,
        progress: Callable[[int, int, Stage, str | None], None] = lambda *_: None,
        report_step: Callable[[Mapping[str, Tensor]], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Run what is not done yet, then write everything the folder is for.

        Args:
            progress: called with (done, total, stage, None) before a stage and (done, total, stage, figures) after.
            report_step: called with the figures of every training step (tensors on the device).

        Returns:
            The results as in results.json.
        """
        self.lab.report = report_step
        stages = list(self.stages())
        for number, stage in enumerate(stages):
            progress(number, len(stages), stage, None)
            progress(number + 1, len(stages), stage, stage.run())
        results = self.results()
        self.write(results)
        return results

    def results(self) -> dict[str, Any]:
        """Everything that was measured, from the folder, as plain data."""
        config, lab = self.config, self.lab
        sources = self._sources()
        methods = self._masking()
        trained = [lab.source(s, k).figures for k, s in itertools.product(config.seeds, sources)]
        masks = {(k, s, m): lab.mask(s, m, k) for k, s, m in itertools.product(config.seeds, sources, methods)}
        rows = [
            row
            for seed, (source, target), (method, init) in itertools.product(config.seeds, config.pairs(), self._ways())
            for row in lab.rows(source, target, method, init, seed)
        ]
        return {
            "format": 1,
            "data": self.described(),
            "config": config.to_dict(),
            "versions": versions(self.device),
            "sources": trained,
            "masks": [mask.figures for mask in masks.values()],
            "rows": [_with_gains(row, rows) for row in rows],
            "overlap": [
                {"method": m, "seed": k, "a": a, "b": b, "jaccard": _jaccard(masks[k, a, m], masks[k, b, m])}
                for k, m in itertools.product(config.seeds, methods)
                for a, b in itertools.combinations(sources, 2)
            ],
        }

    def described(self) -> dict[str, Any]:
        """The images, as results tell of them."""
        data = self.data
        return {
            "name": data.name,
            "real": data.real,
            "domains": list(data.domains),
            "classes": list(data.classes),
            "image_size": data.image_size,
            "fingerprint": data.fingerprint,
            "counts": {n: {"train": len(d.train), "test": len(d.test)} for n, d in data.domains.items()},
        }

    def write(self, results: dict[str, Any]) -> None:
        """Write results, tables, figures and report into the folder."""
        write_atomic(self.folder / "results.json", json.dumps(results, indent=1))
        table.write_rows_csv(results, self.folder / "results.csv")
        self._write_masks()
        rows = table.paper_table(results)
        table.to_csv(rows, self.folder / "table.csv")
        write_atomic(self.folder / "table.md", table.to_markdown(rows))
        drawn = figures.draw_all(results, self.folder / "figures")
        report.write_report(results, self.folder, drawn, command=self.command())

    def _write_masks(self) -> None:
        """The keep masks as mask files, one bit per weight: masks/<method>-<source>-seed<k>.safetensors."""
        folder = self.folder / "masks"
        folder.mkdir(exist_ok=True)
        for seed, source, method in itertools.product(self.config.seeds, self._sources(), self._masking()):
            mask = self.lab.mask(source, method, seed)
            keep = {f"{layer}.weight": bits for layer, bits in (mask.found.keep or {}).items()}
            weights = self.lab.source(source, seed).end
            record = make_domain(
                source,
                keep,
                method=method,
                classes=self.data.classes,
                options={"data": self.data.name, "seed": seed, "backbone": self.config.backbone},
                fingerprint=fingerprint({name: weights[name] for name in keep}),
            )
            write_mask_file(folder / f"{method}-{source}-seed{seed}.safetensors", record)

    def _sources(self) -> list[str]:
        return list(dict.fromkeys(s for s, _ in self.config.pairs()))

    def command(self) -> str:
        """A command line that repeats the study."""
        return "dwm-fast " + shlex.join(sys.argv[1:]) if sys.argv[0].endswith("dwm-fast") else "dwm-fast pacs"


def versions(device: torch.device) -> dict[str, str]:
    """Versions and hardware that a result depends on."""
    import torchvision

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return {
        "dwm_fast": dwm_fast.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "device": name,
    }


def _with_gains(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with S gain and T drop against the first way of "none" on the same source, target and seed."""
    base = next(r for r in rows if r["method"] == "none" and all(r[k] == row[k] for k in ("source", "target", "seed")))
    return {
        **row,
        "s_gain": row["source_after"] - base["source_after"],
        "t_drop": row["target_after"] - base["target_after"],
    }


def _jaccard(a: Mask, b: Mask) -> float:
    assert a.found.keep is not None
    assert b.found.keep is not None
    names = list(a.found.keep)
    bits_a, bits_b = (ops.pack([keep[n] for n in names]) for keep in (a.found.keep, b.found.keep))
    return ops.jaccard(bits_a, bits_b, [a.found.keep[n].numel() for n in names])


def _say(what: str, value: float) -> str:
    return f"{what} {value:.3f}"


def _mask_says(given: Mapping[str, Any]) -> str:
    return f"keeps {given['fraction_kept']:.1%}, masked accuracy {given['masked_accuracy']:.3f}"


def _rows_say(rows: list[dict[str, Any]]) -> str:
    shared = [r for r in rows if r["view"] == "shared"]
    return "; ".join(f"source {r['source_after']:.3f}, target {r['target_after']:.3f}" for r in shared)
