"""A whole study small enough for a test: a narrow network, a few procedural images of 16 pixels."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dwm_fast.methods import LearnedMask, TrainOptions
from dwm_fast.pacs import backbones, study
from dwm_fast.pacs.backbones import SmallResNet
from dwm_fast.pacs.config import METHODS, StudyConfig, from_dict
from dwm_fast.pacs.data import PacsData
from dwm_fast.pacs.pairs import figures
from dwm_fast.pacs.procedural import procedural

from .killing import CALLS, serve

# With fewer than 16 channels oneDNN writes past its workspace in the backward of strided 1x1 convolutions over
# channels_last (its issue 6035: a block is 8 channels with AVX2, 16 with AVX-512).
NarrowNet = functools.partial(SmallResNet, width=16)
BINARY = LearnedMask(epochs=1, lr=3.0, coefficient=0.01)  # two steps that take some logits below 0, not all
EDIT = LearnedMask(epochs=1, lr=0.5, source_budget=0.3)
CONFIG = StudyConfig(
    image_size=16,
    train_size=16,
    sources=("photo", "sketch"),
    targets=("photo", "sketch"),
    inits=("S_start",),
    source=TrainOptions(epochs=2, lr=1e-2),
    binary=BINARY,
    edit=EDIT,
    tune={method: (TrainOptions(epochs=1, lr=1e-2, batch_norm="per-domain"),) for method in METHODS},
    batch_size=16,
    device="cpu",
)


@functools.cache
def tiny_data() -> PacsData:
    return procedural(image_size=16, train_per_class=5, test_per_class=2)


def config(**changes: Any) -> StudyConfig:
    """CONFIG with entries changed, as a file would."""
    return from_dict(changes, CONFIG)


def tiny(monkeypatch: Any) -> None:
    """Make "small" the narrow network, load the tiny data, and leave the settings of the process alone."""
    monkeypatch.setattr(backbones, "SmallResNet", NarrowNet)
    monkeypatch.setattr(study, "procedural", lambda image_size: tiny_data())
    monkeypatch.setattr(study, "prepared", contextlib.nullcontext)


def stages(folder: Path) -> list[str]:
    """Names of the finished stages."""
    return sorted(file.stem for file in (folder / "stages").glob("*.safetensors"))


def without_seconds(results: Any) -> Any:
    """Results with every measured time taken out."""
    if isinstance(results, dict):
        return {key: without_seconds(value) for key, value in results.items() if key != "seconds"}
    return [without_seconds(value) for value in results] if isinstance(results, list) else results


def serve_one_pair() -> None:
    """Run the study of one pair for a `killing.Runner`, without figures."""
    importlib.import_module("torch._dynamo")  # torch's optimisers import it; once for all children
    backbones.SmallResNet = NarrowNet
    data = tiny_data()
    one_pair = dataclasses.replace(CONFIG, sources=("photo",), targets=("sketch",), methods=("none", "binary"))

    def run(folder: Path, report: Callable[[], None]) -> None:
        def draw_nothing(results: Any) -> dict[str, bytes]:
            for _ in range(CALLS):
                report()
            return {}

        figures.draw_all = draw_nothing
        study.Study(one_pair, folder, data).run(report_step=lambda _: report())

    serve(run)


if __name__ == "__main__":
    serve_one_pair()
