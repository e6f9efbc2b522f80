"""Everything that decides a study's numbers, in one place, with its defaults, files and command-line overrides."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from dwm_fast.errors import InputError
from dwm_fast.methods import INITS, EditMask, LearnedMask, SequentialMethod, TrainOptions
from dwm_fast.pacs import sequence_options
from dwm_fast.pacs.config_values import read_file, replace, sequence, typed
from dwm_fast.pacs.data import DOMAINS, canonical_domain

METHODS = ("none", "naive", "edit", "binary")
_OF_PAIRS = ("sources", "targets", "inits", "edit", "binary", "tune", "tune_size", "tune_scale")
"""Entries that only the study of pairs reads."""
_OF_SEQUENCES = ("sequence", "sequential")


@dataclass(frozen=True)
class StudyConfig:
    """One study. Lists make the grid; everything else is the same for every cell.

    Attributes:
        data: path of real PACS, or None for the built-in procedural images.
        splits: folder of the official train and crossval lists, or None.
        backbone: "small" or a torchvision classifier by name.
        weights: path of a checkpoint, "torchvision" for the weights it recommends for the backbone, or None.
        image_size: side of the images held in memory and used for evaluation, in pixels.
        train_size: side of the crops trained on, in pixels.
        crop_scale: smallest fraction of an image's area that a training crop covers.
        tune_size, tune_scale: the same two for fine-tuning on the target; tune_size None is image_size.
        sources, targets, methods, inits, seeds: the grid; a pair of equal domains is left out.
        source: how the source network is trained.
        binary, edit: how the masks are learned.
        deviations: threshold of `naive`; edit_threshold: threshold of `edit`; both in standard deviations.
        edit_spread: standard deviation of the edits' start values, in units of the threshold.
        logit_init, tau: start logit and temperature of `binary`.
        tune: method -> the ways it is fine-tuned on the target; the first of "none" is the baseline.
        sequence: domains to learn one after the other with one backbone, instead of the grid of pairs; None for that.
        sequential: method -> options in place of its own defaults, for a sequence.
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
    tune_size: int | None = None
    tune_scale: float = 0.7
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
    edit_spread: float = 0.1
    logit_init: float = 2.0
    tau: float = 1.0
    tune: Mapping[str, tuple[TrainOptions, ...]] = field(
        default_factory=lambda: {
            method: (TrainOptions(epochs=5, lr=1e-2, batch_norm="per-domain"),) for method in METHODS
        }
    )
    sequence: tuple[str, ...] | None = None
    sequential: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    batch_size: int = 32
    device: str = "auto"
    amp: str = "auto"

    def __post_init__(self) -> None:
        self._check_sequence()
        offered = METHODS if self.sequence is None else tuple(sequence_options.offered())
        for name, values, allowed in (("methods", self.methods, offered), ("inits", self.inits, INITS)):
            unknown = [v for v in values if v not in allowed]
            if unknown or not values:
                raise InputError(f"{name}: given {', '.join(values) or 'none'}; expected some of {', '.join(allowed)}")
        if not self.seeds or not self.pairs():
            raise InputError(
                f"nothing to do: seeds {list(self.seeds)}, sources {list(self.sources)}, targets {list(self.targets)}; "
                "expected a seed and a pair of two different domains"
            )
        for name in ("image_size", "train_size", "tune_size", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}; expected a whole number of at least 1")
        for name, fine, wanted in (
            ("crop_scale", 0 < self.crop_scale <= 1, "a fraction of the area above 0 and up to 1"),
            ("tune_scale", 0 < self.tune_scale <= 1, "a fraction of the area above 0 and up to 1"),
            ("deviations", self.deviations >= 0, "a number of standard deviations of at least 0"),
            ("edit_threshold", self.edit_threshold > 0, "a number of standard deviations above 0"),
            ("edit_spread", self.edit_spread >= 0, "a number of at least 0"),
            ("tau", self.tau > 0, "a temperature above 0"),
            ("amp", self.amp in ("auto", "bf16", "off"), "auto, bf16 or off"),
        ):
            if not fine:
                raise InputError(f"{name}={getattr(self, name)}; expected {wanted}")
        if self.splits is not None and self.data is None:
            raise InputError(f"splits={self.splits} without data; the lists belong to real PACS: give --data PATH too")
        for method, ways in self.tune.items():
            if len({(way.batch_norm, f"{way.lr:g}") for way in ways}) < max(1, len(ways)):
                raise InputError(
                    f"tune.{method} has {len(ways)} ways; expected at least one, and no two with the same batch_norm "
                    "and lr, by which results name them"
                )

    def _check_sequence(self) -> None:
        if self.sequence is None:
            return
        if len(self.sequence) < 2:
            given = ", ".join(self.sequence) or "none"
            raise InputError(f"sequence: given {given}; expected at least two domains, such as photo,art")
        repeated = [domain for domain in self.sequence if self.sequence.count(domain) > 1]
        if repeated:
            raise InputError(f"sequence: {repeated[0]} is in it more than once; expected every domain once")
        default = {f.name: f.default for f in dataclasses.fields(self)}
        clash = [name for name in ("sources", "targets", "inits") if getattr(self, name) != default[name]]
        if clash:
            raise InputError(_clash(clash[0]))

    def pairs(self) -> list[tuple[str, str]]:
        """Ordered pairs of source and target."""
        return [(s, t) for s in self.sources for t in self.targets if s != t]

    def domains(self) -> tuple[str, ...]:
        """Every domain that is trained on or evaluated, by name."""
        return self.sequence or tuple(sorted({*self.sources, *self.targets}))

    def sequential_method(self, name: str) -> SequentialMethod:
        """A method of sequences by name, with the configuration's options."""
        return sequence_options.with_options(name, self.sequential, builtin=self.data is None)

    def with_task_epochs(self, epochs: int) -> StudyConfig:
        """The same sequence with so many epochs of each later domain, for every method that counts them."""
        return from_dict({"sequential": sequence_options.epochs_of(self.methods, epochs)}, self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back: the entries that this kind of study reads."""
        others = _OF_SEQUENCES if self.sequence is None else _OF_PAIRS
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {key: value for key, value in plain.items() if key not in others}


def builtin_defaults() -> StudyConfig:
    """The study on the built-in procedural images: minutes on two CPU cores."""
    return StudyConfig()


def real_defaults() -> StudyConfig:
    """The study on real PACS with ResNet-18: photo -> sketch takes well under an hour on two CPU cores.

    Fine-tuning sees whole images: under frozen batch norm two epochs are too few for crops.
    """
    return StudyConfig(
        backbone="resnet18",
        image_size=128,
        train_size=128,
        crop_scale=0.7,
        tune_scale=1.0,
        source=TrainOptions(epochs=5, lr=3e-4),
        binary=LearnedMask(),
        edit=EditMask().options,
        edit_threshold=0.1,
        tune={
            "none": (TrainOptions(epochs=2, lr=3e-4, batch_norm="shared"),),
            "naive": (TrainOptions(epochs=2, lr=3e-4, batch_norm="shared"),),
            "edit": (TrainOptions(epochs=2, lr=1e-3, batch_norm="frozen"),),
            "binary": (TrainOptions(epochs=2, lr=1e-3, batch_norm="frozen"),),
        },
    )


def from_dict(data: Mapping[str, Any], base: StudyConfig) -> StudyConfig:
    """`base` with the entries of `data` in place of its own. Unknown entries and wrong values: InputError."""
    changes: dict[str, Any] = {}
    hints = get_type_hints(StudyConfig)
    for key, value in data.items():
        if key not in hints:
            raise InputError(f"config: unknown entry '{key}'; expected some of {', '.join(hints)}")
        changes[key] = _read(key, value, getattr(base, key), hints[key])
    if changes.get("sequence", base.sequence) is not None:
        clash = [key for key in _OF_PAIRS if key in data]
        if clash:
            raise InputError(_clash(clash[0]))
        if "methods" not in data and base.sequence is None and base.methods == METHODS:
            changes["methods"] = sequence_options.SEQUENTIAL
    return dataclasses.replace(base, **changes)


def load_config(path: str | Path, base: StudyConfig | None = None) -> StudyConfig:
    """Read a .toml, .yaml or .json file of entries over `base`; without it, over the defaults for its `data`."""
    entries = read_file(Path(path))
    if base is None:
        base = builtin_defaults() if entries.get("data") is None else real_defaults()
    return from_dict(entries, base)


def _read(key: str, value: Any, old: Any, hint: Any) -> Any:
    if key == "sequence":
        return None if value is None else tuple(canonical_domain(str(v)) for v in sequence(value))
    if key == "sequential":
        return sequence_options.read_options(value, old)
    if key in ("sources", "targets"):
        return tuple(dict.fromkeys(canonical_domain(str(v)) for v in sequence(value)))
    if key in ("methods", "inits"):
        return tuple(dict.fromkeys(str(v) for v in sequence(value)))
    if key == "seeds":
        return tuple(dict.fromkeys(typed("seeds", v, int) for v in sequence(value)))
    if key == "tune":
        if not isinstance(value, Mapping):
            raise InputError("config: tune: expected a section for each method, such as 'binary: {lr: 0.0003}'")
        return {**old, **{m: _read_tunes(m, v, old) for m, v in value.items()}}
    if isinstance(old, (TrainOptions, LearnedMask)):
        return replace(key, value, old)
    return typed(key, value, hint)


def _read_tunes(method: str, value: Any, old: Mapping[str, tuple[TrainOptions, ...]]) -> tuple[TrainOptions, ...]:
    if method not in METHODS:
        raise InputError(f"config: tune: unknown method '{method}'; expected some of {', '.join(METHODS)}")
    entries = value if isinstance(value, list) else [value]
    return tuple(replace(f"tune.{method}", entry, old[method][0]) for entry in entries)


def _clash(entry: str) -> str:
    return f"sequence and {entry} exclude each other: a sequence has no pairs; leave out one of them"
