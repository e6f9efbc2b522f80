"""Everything that decides a study's numbers, in one place, with its defaults, files and command-line overrides."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from dwm_fast import methods as all_methods
from dwm_fast.errors import InputError
from dwm_fast.methods import INITS, LearnedMask, TrainOptions
from dwm_fast.methods.sequence import SequentialMethod
from dwm_fast.pacs.data import DOMAINS, canonical_domain

METHODS = ("none", "naive", "edit", "binary")
SEQUENTIAL = ("none", "piggyback", "ksm", "spg", "packnet", "binary")
"""What a sequence runs by default; presets such as "piggyback-paper" are offered beside them."""
_OF_PAIRS = ("sources", "targets", "inits", "edit", "binary", "tune")
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
        sources, targets, methods, inits, seeds: the grid; a pair of equal domains is left out.
        source: how the source network is trained.
        binary, edit: how the masks are learned.
        deviations: threshold of `naive`; edit_threshold: threshold of `edit`; both in standard deviations.
        logit_init, tau: start logit and temperature of `binary`.
        tune: method -> the ways it is fine-tuned on the target; the first of "none" is the baseline.
        sequence: domains to learn one after the other with one backbone, instead of the grid of pairs; None for that.
        sequential: method -> options that differ from its own defaults, for a sequence.
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
    sequence: tuple[str, ...] | None = None
    sequential: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    batch_size: int = 32
    device: str = "auto"
    amp: str = "auto"

    def __post_init__(self) -> None:
        self._check_sequence()
        offered = METHODS if self.sequence is None else tuple(_offered())
        for name, values, allowed in (("methods", self.methods, offered), ("inits", self.inits, INITS)):
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
        for name, fine, wanted in (
            ("crop_scale", 0 < self.crop_scale <= 1, "a fraction of the area above 0 and up to 1"),
            ("deviations", self.deviations >= 0, "a number of standard deviations of at least 0"),
            ("edit_threshold", self.edit_threshold > 0, "a number of standard deviations above 0"),
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
        method: SequentialMethod = _replace(
            f"sequential.{name}", self.sequential.get(name, {}), _sequential(name)
        )
        return method

    def with_task_epochs(self, epochs: int) -> StudyConfig:
        """The same sequence with so many epochs of each later domain, for every method that counts them.

        That is the method's own entry `epochs`, or the one of its section `options` or `training`.
        """
        sequential: dict[str, Any] = {}
        for name in self.methods:
            method = self.sequential_method(name)
            section = next((s for s in ("options", "training") if hasattr(getattr(method, s, None), "epochs")), None)
            if hasattr(method, "epochs"):
                sequential[name] = {"epochs": epochs}
            elif section is not None:
                sequential[name] = {section: {"epochs": epochs}}
        return from_dict({"sequential": sequential}, self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back: the entries that this kind of study reads."""
        others = _OF_SEQUENCES if self.sequence is None else _OF_PAIRS
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {key: value for key, value in plain.items() if key not in others}


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
            "none": (TrainOptions(epochs=3, lr=3e-4, batch_norm="shared"),),
            "naive": (TrainOptions(epochs=3, lr=3e-4, batch_norm="shared"),),
            "edit": (TrainOptions(epochs=3, lr=2e-3, batch_norm="frozen"),),
            "binary": (TrainOptions(epochs=3, lr=2e-3, batch_norm="frozen"),),
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
            changes["methods"] = SEQUENTIAL
    return dataclasses.replace(base, **changes)


def load_config(path: str | Path, base: StudyConfig | None = None) -> StudyConfig:
    """Read a .toml, .yaml or .json file of entries over `base`; without it, over the defaults for its `data`."""
    entries = _read_file(Path(path))
    if base is None:
        base = builtin_defaults() if entries.get("data") is None else real_defaults()
    return from_dict(entries, base)


def _read_file(path: Path) -> Mapping[str, Any]:
    readers = {".toml": tomllib.loads, ".json": json.loads}
    try:
        data = readers.get(path.suffix, yaml.safe_load)(path.read_text())
    except OSError as error:
        raise InputError(f"config: cannot read {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"config: {path}: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping):
        raise InputError(f"config: {path} holds {type(data).__name__}; expected entries such as 'seeds: [0, 1, 2]'")
    return data


def _read(key: str, value: Any, old: Any, hint: Any) -> Any:
    if key == "sequence":
        return None if value is None else tuple(canonical_domain(str(v)) for v in _sequence(value))
    if key == "sequential":
        return {**old, **_read_sequential(value, old)}
    if key in ("sources", "targets"):
        return tuple(dict.fromkeys(canonical_domain(str(v)) for v in _sequence(value)))
    if key in ("methods", "inits"):
        return tuple(dict.fromkeys(str(v) for v in _sequence(value)))
    if key == "seeds":
        return tuple(dict.fromkeys(_typed("seeds", v, int) for v in _sequence(value)))
    if key == "tune":
        if not isinstance(value, Mapping):
            raise InputError("config: tune: expected a section for each method, such as 'binary: {lr: 0.0003}'")
        return {**old, **{m: _read_tunes(m, v, old) for m, v in value.items()}}
    if isinstance(old, (TrainOptions, LearnedMask)):
        return _replace(key, value, old)
    return _typed(key, value, hint)


def _read_tunes(method: str, value: Any, old: Mapping[str, tuple[TrainOptions, ...]]) -> tuple[TrainOptions, ...]:
    if method not in METHODS:
        raise InputError(f"config: tune: unknown method '{method}'; expected some of {', '.join(METHODS)}")
    entries = value if isinstance(value, list) else [value]
    return tuple(_replace(f"tune.{method}", entry, old[method][0]) for entry in entries)


def _read_sequential(value: Any, old: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Options by method, as `StudyConfig.sequential` holds them: typed, and only those that are given."""
    if not isinstance(value, Mapping):
        raise InputError("config: sequential: expected a section for each method, such as 'piggyback: {epochs: 3}'")
    read = {}
    for name, given in value.items():
        method = _replace(f"sequential.{name}", given, _sequential(name))
        read[name] = _merged(old.get(name, {}), _given(dataclasses.asdict(method), given))
    return read


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options with those of `new` in place of the old."""
    deeper = {k: _merged(old[k], v) for k, v in new.items() if isinstance(v, Mapping) and k in old}
    return {**old, **new, **deeper}


def _offered() -> dict[str, SequentialMethod]:
    return {**all_methods.sequential_methods(), **all_methods.presets()}


def _sequential(name: str) -> Any:
    offered = _offered()
    if name not in offered:
        raise InputError(f"config: sequential: unknown method '{name}'; expected some of {', '.join(offered)}")
    return offered[name]


def _given(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of nested `options` that `given` names."""
    return {
        name: _given(options[name], value) if isinstance(options[name], dict) else options[name]
        for name, value in given.items()
    }


def _clash(entry: str) -> str:
    return f"sequence and {entry} exclude each other: a sequence has no pairs; leave out one of them"


def _replace(key: str, value: Any, old: Any) -> Any:
    types = get_type_hints(type(old))
    hints = {field.name: types[field.name] for field in dataclasses.fields(old)}
    if not isinstance(value, Mapping):
        raise InputError(f"config: {key} is {value!r}; expected a section with some of {', '.join(hints)}")
    for name in value:
        if name not in hints:
            raise InputError(f"config: {key}: unknown entry '{name}'; expected some of {', '.join(hints)}")
    changes = {
        name: _replace(f"{key}.{name}", given, getattr(old, name))
        if dataclasses.is_dataclass(getattr(old, name))
        else _typed(f"{key}.{name}", given, hints[name])
        for name, given in value.items()
    }
    try:
        return dataclasses.replace(old, **changes)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type an option has. Numbers may come as text: YAML reads 3e-4 as text."""
    kinds = set(get_args(hint)) or {hint}
    if value is None and type(None) in kinds:
        return None
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"config: {name} is {value!r}; expected a list")
        return tuple(_typed(name, element, get_args(hint)[0]) for element in value)
    if bool in kinds and not isinstance(value, bool):
        raise InputError(f"config: {name} is {value!r}; expected true or false")
    if int in kinds or float in kinds:
        return _number(name, value, whole=int in kinds)
    if str in kinds and get_origin(hint) is not Sequence and not isinstance(value, str):
        raise InputError(f"config: {name} is {value!r}; expected text")
    return tuple(value) if isinstance(value, list) else value


def _number(name: str, value: Any, whole: bool) -> float | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value if whole else float(value)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number) or (whole and not number.is_integer()):
        raise InputError(f"config: {name} is {value!r}; expected a {'whole ' if whole else ''}number")
    return int(number) if whole else number


def _sequence(value: Any) -> Sequence[Any]:
    if isinstance(value, str):
        return [v.strip() for v in value.split(",") if v.strip()]
    return value if isinstance(value, (list, tuple)) else [value]
