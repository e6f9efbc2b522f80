"""Everything that decides a study's numbers, in one place, with its defaults, files and command-line overrides."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from dwm_fast._options import AREA, FRACTION, Rule, above, at_least, check_options, recorded, whole
from dwm_fast.errors import InputError
from dwm_fast.methods import INITS, EditMask, LearnedMask, Method, SequentialMethod, TrainOptions, load_method
from dwm_fast.pacs.config_values import read_file, replace, sequence, typed
from dwm_fast.pacs.data import DOMAINS, canonical_domain
from dwm_fast.pacs.data.any import ImageOptions, is_other
from dwm_fast.pacs.data.layouts import find_domain
from dwm_fast.pacs.data.listed import domain_name
from dwm_fast.pacs.pairs import config as of_pairs
from dwm_fast.pacs.pairs.config import METHODS
from dwm_fast.pacs.sequence import config as of_sequences

__all__ = ["DOMAINS", "METHODS", "StudyConfig", "builtin_defaults", "from_dict", "load_config", "real_defaults"]

_DEVIATIONS = "a number of standard deviations"


@dataclass(frozen=True)
class StudyConfig:
    """One study. Lists make the grid; everything else is the same for every cell.

    Attributes:
        data: path of PACS or of any other data set, or "torchvision:NAME"; None for the built-in procedural images.
        data_root: folder in which torchvision looks for its data sets.
        splits: folder of lists that say which images train and which test, or None.
        images: how a data set that is not PACS becomes domains.
        validation: fraction of each class of the training images to evaluate on, in place of the test images, which are
            then never looked at; None for the test images.
        backbone: "small" or a torchvision classifier by name.
        weights: path of a checkpoint, "torchvision" for the weights it recommends for the backbone, or None.
        image_size: side of the images held in memory and used for evaluation, in pixels.
        train_size: side of the crops trained on, in pixels.
        crop_scale: smallest fraction of an image's area that a training crop covers.
        tune_size, tune_scale: the same two for fine-tuning on the target; tune_size None is image_size.
        sources, targets, methods, inits, seeds: the grid; a pair of equal domains is left out; sources or
            targets () are all domains of the data.
        source: how the source network is trained.
        binary, edit: how the masks are learned.
        deviations: threshold of `naive`; edit_threshold: threshold of `edit`; both in standard deviations.
        edit_spread: standard deviation of the edits' start values, in units of the threshold.
        logit_init, tau: start logit and temperature of `binary`.
        tune: method -> the ways it is fine-tuned on the target, for a method that is not in it those of "binary"; the
            first of "none" is the baseline.
        pairwise: method of pairs -> options in place of its own defaults, for those that have no entry above.
        own_methods: "file.py:Class" or "module:Class" of the methods from outside that `methods` may name.
        sequence: domains to learn one after the other with one backbone, or "all" that the data have, instead of the
            grid of pairs; None for that.
        orders: with a sequence: how many orders of its domains are learned, rotations of it; or the orders themselves,
            `sequence` the first.
        sequential: method -> options in place of its own defaults, for a sequence.
        alone: with a sequence: train a network for each later domain by itself too, for the forward transfer.
        batch_size: images a step.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        amp: "auto" (bf16 on a GPU), "bf16" or "off".
        threads: of the CPU that torch computes on, by which sums on a CPU differ in their last bits; None leaves their
            number to torch (all cores, or OMP_NUM_THREADS).
    """

    data: str | None = None
    splits: str | None = None
    data_root: str | None = field(default=None, metadata={"later": True})
    images: ImageOptions = field(default=ImageOptions(), metadata={"later": True})
    validation: Annotated[float | None, FRACTION] = field(default=None, metadata={"later": True})
    backbone: str = "small"
    weights: str | None = None
    image_size: Annotated[int, whole(1)] = 32
    train_size: Annotated[int, whole(1)] = 32
    crop_scale: Annotated[float, AREA] = 0.7
    tune_size: Annotated[int | None, whole(1)] = None
    tune_scale: Annotated[float, AREA] = 0.7
    sources: tuple[str, ...] = DOMAINS
    targets: tuple[str, ...] = DOMAINS
    methods: tuple[str, ...] = METHODS
    inits: tuple[str, ...] = INITS
    seeds: tuple[int, ...] = (0,)
    source: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=20, lr=1e-2))
    binary: LearnedMask = field(default_factory=lambda: LearnedMask(epochs=12, lr=0.05, source_budget=0.1))
    edit: LearnedMask = field(default_factory=lambda: LearnedMask(epochs=12, lr=0.05, source_budget=0.1))
    deviations: Annotated[float, at_least(0, _DEVIATIONS)] = 1.0
    edit_threshold: Annotated[float, above(0, _DEVIATIONS)] = 0.5
    edit_spread: Annotated[float, at_least(0)] = 0.1
    logit_init: Annotated[float, Rule("a finite number", lambda value: True)] = 2.0
    tau: Annotated[float, above(0, "a temperature")] = 1.0
    tune: of_pairs.Tunes = field(
        default_factory=lambda: {
            method: tuple(
                TrainOptions(epochs=5, lr=1e-2, batch_norm="per-domain", kept_decay=pull)
                for pull in ((None, 10.0) if method == "binary" else (None,))
            )
            for method in METHODS
        }
    )
    pairwise: of_pairs.Options | None = field(default=None, metadata={"later": True})
    own_methods: tuple[str, ...] = field(default=(), metadata={"later": True})
    sequence: tuple[str, ...] | None = None
    orders: of_sequences.Orders = field(default=1, metadata={"later": True})
    sequential: of_sequences.Options = field(default_factory=dict)
    alone: bool = field(default=False, metadata={"later": True})
    batch_size: Annotated[int, whole(1)] = 32
    device: str = "auto"
    amp: Annotated[str, Rule("auto, bf16 or off", ("auto", "bf16", "off").__contains__)] = "auto"
    threads: Annotated[int | None, whole(1)] = field(default=None, metadata={"later": True})

    def __post_init__(self) -> None:
        if self.sequence is not None:
            of_sequences.check_sequence(self.sequence)
            of_sequences.check_orders(self.sequence, self.orders)
            default = {f.name: f.default for f in dataclasses.fields(self)}
            _exclude(name for name in ("sources", "targets", "inits") if getattr(self, name) not in (default[name], ()))
        elif self.alone:
            raise InputError("alone=True without a sequence; it gives a sequence's forward transfer: give sequence too")
        elif self.orders != 1:
            raise InputError(f"orders={self.orders} without a sequence, whose orders they are; give sequence too")
        offered = of_pairs.offered() if self.sequence is None else tuple(of_sequences.offered())
        for name, values, allowed in (("methods", self.methods, offered), ("inits", self.inits, INITS)):
            if not values or set(values) - set(allowed):
                raise InputError(f"{name}: given {', '.join(values) or 'none'}; expected some of {', '.join(allowed)}")
        if not self.seeds or not (self.pairs() or self.sequence or self._all_domains()):
            raise InputError(
                f"nothing to do: seeds {list(self.seeds)}, sources {list(self.sources)}, targets {list(self.targets)}; "
                "expected a seed and a pair of two different domains"
            )
        check_options(self, "{name}={value}; expected {wanted}")
        for name in ("splits", "data_root"):
            if getattr(self, name) is not None and self.data is None:
                raise InputError(f"{name}={getattr(self, name)} without data; give --data PATH too")
        if self.source.kept_decay is not None:
            raise InputError(
                f"source: kept_decay is {self.source.kept_decay}; expected none: a source network is trained in whole"
            )
        of_pairs.check_ways(self.tune)

    def pairs(self) -> list[tuple[str, str]]:
        """Ordered pairs of source and target."""
        return [(s, t) for s in self.sources for t in self.targets if s != t]

    def ways(self, method: str) -> tuple[TrainOptions, ...]:
        """The ways a method of pairs is fine-tuned on the target."""
        return of_pairs.ways_of(self.tune, method)

    def pair_method(self, name: str) -> Method:
        """A method of pairs without an entry of its own, by name, with the configuration's options."""
        self._load_own()
        return of_pairs.with_options(name, self.pairwise)

    def _load_own(self) -> None:
        """Register the methods from outside: this process may be another one than where the configuration was read."""
        for reference in self.own_methods:
            load_method(reference)

    def _all_domains(self) -> bool:
        """Whether the data say which domains there are."""
        if self.sequence is not None:
            return self.sequence == of_sequences.ALL
        return self.data is not None and not (self.sources and self.targets)

    def domains(self) -> tuple[str, ...]:
        """Every domain that is trained on or evaluated, by name; () for all that the data have."""
        return () if self._all_domains() else self.sequence or tuple(sorted({*self.sources, *self.targets}))

    def in_orders(self) -> tuple[tuple[str, ...], ...]:
        """The orders in which a sequence is learned, `sequence` the first."""
        return of_sequences.orders_of(self.sequence or (), self.orders)

    def with_domains(self, there: Sequence[str]) -> StudyConfig:
        """The same study with the names of its domains, of those that are `there`, in place of "all".

        Raises InputError for a domain that is not there, and where one alone is.
        """
        unknown = next((domain for domain in self.domains() if domain not in there), None)
        if unknown is not None:
            raise InputError(f"unknown domain '{unknown}'; the data have {', '.join(there)}")
        if not self._all_domains():
            return self
        if len(there) < 2:
            raise InputError(f"the data have one domain, {there[0]}; cut it by class with --split-classes, such as 10")
        if self.sequence is not None:
            return dataclasses.replace(self, sequence=tuple(there))
        return dataclasses.replace(self, sources=self.sources or tuple(there), targets=self.targets or tuple(there))

    def sequential_method(self, name: str) -> SequentialMethod:
        """A method of sequences by name, with the configuration's options."""
        self._load_own()
        return of_sequences.with_options(name, self.sequential, builtin=self.data is None)

    def with_task_epochs(self, epochs: int) -> StudyConfig:
        """The same sequence with so many epochs of each later domain, for every method that counts them.

        Raises InputError where there is no sequence.
        """
        if self.sequence is None:
            raise InputError("--task-epochs needs --sequence; the epochs of pairs are --mask-epochs and --tune-epochs")
        return from_dict({"sequential": of_sequences.epochs_of(self.methods, epochs)}, self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back: the entries that this kind of study reads."""
        others = of_sequences.ENTRIES if self.sequence is None else of_pairs.ENTRIES
        plain: dict[str, Any] = json.loads(json.dumps(recorded(self)))
        return {key: value for key, value in plain.items() if key not in others}


def builtin_defaults() -> StudyConfig:
    """The study on the built-in procedural images: minutes on two CPU cores."""
    return StudyConfig()


def real_defaults() -> StudyConfig:
    """The study on real PACS with ResNet-18: photo -> sketch takes well under an hour on two CPU cores.

    Fine-tuning sees whole images: two epochs are too few for crops. Under binary masks it is done in two ways: kept
    weights frozen, and pulled to their start. Rates and pulls were chosen on validation images (docs/results).
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
            "binary": (
                TrainOptions(epochs=2, lr=5e-4, batch_norm="per-domain"),
                TrainOptions(epochs=2, lr=3e-4, batch_norm="per-domain", start_decay=30.0, kept_decay=100.0),
            ),
        },
    )


def from_dict(data: Mapping[str, Any], base: StudyConfig) -> StudyConfig:
    """`base` with the entries of `data` in place of its own. Unknown entries and wrong values: InputError."""
    data = of_sequences.spelled_out(_with_own_methods(data, base))
    images = data.get("data", base.data)
    other = is_other(images)
    changes: dict[str, Any] = {}
    if other:
        changes |= {key: () for key in ("sources", "targets") if getattr(base, key) == DOMAINS}
    hints = get_type_hints(StudyConfig)
    for key, value in data.items():
        if key not in hints:
            raise InputError(f"config: unknown entry '{key}'; expected some of {', '.join(hints)}")
        if key in ("sequence", "sources", "targets"):
            changes[key] = None if value is None else _domains(key, sequence(value), images)
        elif key == "orders" and isinstance(value, list):
            changes[key] = tuple(_domains("sequence", order, images) for order in value)
        else:
            changes[key] = _read(key, value, getattr(base, key), hints[key])
    if "sequence" in data and "orders" not in data and not isinstance(base.orders, int):
        changes["orders"] = 1  # those of the file were of its own sequence
    if changes.get("sequence", base.sequence) is not None:
        _exclude(key for key in of_pairs.ENTRIES if key in data)
        if "methods" not in data and base.sequence is None and base.methods == METHODS:
            changes["methods"] = of_sequences.SEQUENTIAL
    return dataclasses.replace(base, **changes)


def load_config(path: str | Path, base: StudyConfig | None = None) -> StudyConfig:
    """Read a .toml, .yaml or .json file of entries over `base`; without it, over the defaults for its `data`."""
    entries = read_file(Path(path))
    if base is None:
        base = builtin_defaults() if entries.get("data") is None else real_defaults()
    return from_dict(entries, base)


def _with_own_methods(data: Mapping[str, Any], base: StudyConfig) -> Mapping[str, Any]:
    """`data` with methods from outside loaded: each goes by its name in `methods`, its place is in `own_methods`."""
    given = [str(value) for value in sequence(data.get("methods", ()))]
    listed = [str(value) for value in sequence(data.get("own_methods", ()))]
    names = {place: load_method(place) for place in [*base.own_methods, *listed, *(g for g in given if ":" in g)]}
    if not names:
        return data
    methods = {"methods": [names.get(value, value) for value in given]} if "methods" in data else {}
    return {**data, "own_methods": tuple(names), **methods}


def _read(key: str, value: Any, old: Any, hint: Any) -> Any:
    if key == "sequential":
        return of_sequences.read_options(value, old)
    if key == "pairwise":
        return of_pairs.read_options(value, old)
    if key == "orders":
        return typed(key, value, int)
    if key in ("methods", "inits"):
        return tuple(dict.fromkeys(str(v) for v in sequence(value)))
    if key == "seeds":
        return tuple(dict.fromkeys(typed("seeds", v, int) for v in sequence(value)))
    if key in ("data", "data_root", "splits", "weights"):
        path = typed(key, value, hint)
        return None if path is None else os.path.expanduser(path)
    if key == "tune":
        return of_pairs.read_tunes(value, old)
    if key == "images" and isinstance(value, Mapping) and isinstance(value.get("split_classes"), int):
        value = {**value, "split_classes": str(value["split_classes"])}
    if isinstance(old, (TrainOptions, LearnedMask, ImageOptions)):
        return replace(key, value, old)
    return typed(key, value, hint)


def _domains(key: str, values: Sequence[Any], data: str | None) -> tuple[str, ...]:
    """Names of domains as the data have them: other data than PACS are asked when they are loaded."""
    texts, other = [str(value) for value in values], is_other(data)
    unknown = next((text for text in texts if find_domain(text) is None), None)
    if data is not None and not other and unknown is not None and not Path(os.path.expanduser(data)).exists():
        raise InputError(f"data={data}: no such file or folder (asked for domain '{unknown}' of it); give its path")
    if key == "sequence" and tuple(texts) == of_sequences.ALL:
        return of_sequences.ALL if other else DOMAINS
    names = [domain_name(text) if other else canonical_domain(text) for text in texts]
    return tuple(names if key == "sequence" else dict.fromkeys(names))


def _exclude(entries: Iterable[str]) -> None:
    """Raise InputError for an entry of pairs that stands beside a sequence."""
    for entry in entries:
        raise InputError(f"sequence and {entry} exclude each other: a sequence has no pairs; leave out one of them")
