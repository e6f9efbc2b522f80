"""Everything that decides a study's numbers, in one place, with its defaults, files and command-line overrides."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dwm_fast.errors import InputError
from dwm_fast.methods import INITS, LearnedMask, TrainOptions
from dwm_fast.pacs.data import DOMAINS, canonical_domain

METHODS = ("none", "naive", "edit", "binary")


@dataclass(frozen=True)
class StudyConfig:
    """One study. Lists make the grid; everything else is the same for every cell.

    Attributes:
        data: path of real PACS, or None for the built-in procedural images.
        splits: folder of the official train and crossval lists, or None.
        backbone, weights: network by name and checkpoint path ("torchvision" for its own weights), or None.
        image_size: side of the images held in memory and used for evaluation, in pixels.
        train_size: side of the crops trained on, in pixels.
        crop_scale: smallest fraction of an image's area that a training crop covers.
        sources, targets, methods, inits, seeds: the grid; a pair of equal domains is left out.
        source: how the source network is trained.
        binary, edit: how the masks are learned.
        deviations: threshold of `naive`; edit_threshold: threshold of `edit`; both in standard deviations.
        logit_init, tau: start logit and temperature of `binary`.
        tune: method -> the ways it is fine-tuned on the target; the first of "none" is the baseline.
        batch_size: images a step.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        amp: "auto" (bf16 on a GPU), "bf16" or "off".
    """

    data: str | None = None
    splits: str | None = None
    backbone: str = "small"
    weights: str | None = None
    image_size: int = 32
    train_size: int = 32
    crop_scale: float = 0.7
    sources: tuple[str, ...] = DOMAINS
    targets: tuple[str, ...] = DOMAINS
    methods: tuple[str, ...] = METHODS
    inits: tuple[str, ...] = INITS
    seeds: tuple[int, ...] = (0,)
    source: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=20, lr=1e-2))
    binary: LearnedMask = field(default_factory=lambda: LearnedMask(epochs=12, lr=0.05, source_budget=0.1))
    edit: LearnedMask = field(default_factory=lambda: LearnedMask(epochs=12, lr=0.05, source_budget=0.1))
    deviations: float = 1.0
    edit_threshold: float = 0.5
    logit_init: float = 2.0
    tau: float = 1.0
    tune: Mapping[str, tuple[TrainOptions, ...]] = field(
        default_factory=lambda: {
            method: (TrainOptions(epochs=5, lr=1e-2, batch_norm="per-domain"),) for method in METHODS
        }
    )
    batch_size: int = 32
    device: str = "auto"
    amp: str = "auto"

    def __post_init__(self) -> None:
        for name, values, allowed in (("methods", self.methods, METHODS), ("inits", self.inits, INITS)):
            unknown = [v for v in values if v not in allowed]
            if unknown or not values:
                raise InputError(f"{name}: given {', '.join(values) or 'none'}; expected some of {', '.join(allowed)}")
        if not self.seeds or not self.pairs():
            raise InputError(
                f"nothing to do: seeds {list(self.seeds)}, sources {list(self.sources)}, targets {list(self.targets)}; "
                "expected a seed and a pair of two different domains"
            )
        for name in ("image_size", "train_size", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}; expected a whole number of at least 1")
        if not 0 < self.crop_scale <= 1:
            raise InputError(f"crop_scale={self.crop_scale}; expected a fraction of the area above 0 and up to 1")
        if self.amp not in ("auto", "bf16", "off"):
            raise InputError(f"amp='{self.amp}'; expected auto, bf16 or off")

    def pairs(self) -> list[tuple[str, str]]:
        """Ordered pairs of source and target."""
        return [(s, t) for s in self.sources for t in self.targets if s != t]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain


def builtin_defaults() -> StudyConfig:
    """The study on the built-in procedural images: minutes on two CPU cores."""
    return StudyConfig()


def real_defaults() -> StudyConfig:
    """The study on real PACS at 128 pixels with ResNet-18: under an hour a pair on two CPU cores."""
    return StudyConfig(
        backbone="resnet18",
        image_size=128,
        train_size=96,
        crop_scale=0.5,
        source=TrainOptions(epochs=5, lr=5e-4),
        binary=LearnedMask(epochs=6, lr=0.05),
        edit=LearnedMask(epochs=6, lr=0.05),
        tune={
            "none": (TrainOptions(epochs=2, lr=3e-4, batch_norm="shared"),),
            "naive": (TrainOptions(epochs=2, lr=3e-4, batch_norm="shared"),),
            "edit": (TrainOptions(epochs=2, lr=3e-4, batch_norm="frozen"),),
            "binary": (TrainOptions(epochs=2, lr=3e-4, batch_norm="frozen"),),
        },
    )


def from_dict(data: Mapping[str, Any], base: StudyConfig) -> StudyConfig:
    """`base` with the entries of `data` in place of its own. Unknown entries: InputError."""
    changes: dict[str, Any] = {}
    for key, value in data.items():
        if key not in {f.name for f in dataclasses.fields(StudyConfig)}:
            raise InputError(f"config: unknown entry '{key}'; expected some of {', '.join(_names(StudyConfig))}")
        changes[key] = _read(key, value, getattr(base, key))
    return dataclasses.replace(base, **changes)


def load_config(path: str | Path, base: StudyConfig) -> StudyConfig:
    """Read a .toml, .yaml or .json file of entries over `base`."""
    path = Path(path)
    try:
        text = path.read_text()
        data = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"config: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise InputError(f"config: {path}: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping):
        raise InputError(f"config: {path} holds {type(data).__name__}; expected entries such as 'seeds: [0, 1, 2]'")
    return from_dict(data, base)


def _names(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _read(key: str, value: Any, old: Any) -> Any:
    if key in ("sources", "targets"):
        return tuple(canonical_domain(str(v)) for v in _sequence(value))
    if key in ("methods", "inits"):
        return tuple(str(v) for v in _sequence(value))
    if key == "seeds":
        return tuple(int(v) for v in _sequence(value))
    if key == "tune":
        if not isinstance(value, Mapping):
            raise InputError("config: tune: expected a section for each method, such as 'binary: {lr: 0.0003}'")
        return {**old, **{m: _read_tunes(m, v, old) for m, v in value.items()}}
    if isinstance(old, (TrainOptions, LearnedMask)):
        return _replace(key, value, old)
    return value


def _read_tunes(method: str, value: Any, old: Mapping[str, tuple[TrainOptions, ...]]) -> tuple[TrainOptions, ...]:
    if method not in METHODS:
        raise InputError(f"config: tune: unknown method '{method}'; expected some of {', '.join(METHODS)}")
    entries = value if isinstance(value, list) else [value]
    return tuple(_replace(f"tune.{method}", entry, old[method][0]) for entry in entries)


def _replace(key: str, value: Any, old: Any) -> Any:
    if not isinstance(value, Mapping):
        raise InputError(f"config: {key} is {value!r}; expected entries such as {_names(type(old))}")
    unknown = set(value) - set(_names(type(old)))
    if unknown:
        raise InputError(
            f"config: {key}: unknown entry '{sorted(unknown)[0]}'; expected some of {', '.join(_names(type(old)))}"
        )
    return dataclasses.replace(old, **{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})


def _sequence(value: Any) -> Sequence[Any]:
    if isinstance(value, str):
        return [v.strip() for v in value.split(",") if v.strip()]
    return value if isinstance(value, (list, tuple)) else [value]
