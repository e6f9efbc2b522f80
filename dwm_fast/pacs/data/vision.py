"""Data sets of torchvision by name, from a folder where they lie; fetched only where that is asked for."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dwm_fast.errors import DataError, InputError
from dwm_fast.pacs.data.layouts import Record, first_line
from dwm_fast.pacs.data.listed import TEST, TRAIN, Listed, domain_name, gathered

PREFIX = "torchvision:"
_TRAIN_SPLITS, _TEST_SPLITS = ("train", "trainval"), ("test", "val")


def names_of(data: str) -> list[str]:
    """The data sets that ``torchvision:NAME[,NAME]`` names. InputError for none, a repeated or an unknown one."""
    import torchvision

    names = [name.strip() for name in data.removeprefix(PREFIX).split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError(f"data={data}: expected data sets of torchvision, each once, such as {PREFIX}CIFAR100")
    known = [name for name in torchvision.datasets.__all__ if _takes_root(getattr(torchvision.datasets, name))]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or ["CIFAR100", "MNIST"]
            raise InputError(f"data={data}: torchvision has no data set '{name}'; the nearest are {', '.join(near)}")
    return names


def read_torchvision(data: str, root: str | None) -> Listed:
    """List the images of data sets of torchvision, each a domain called like it.

    A set's own parts are taken (``train=`` or ``split=``; where there is no test part, its validation part); one
    without parts is listed whole.

    Args:
        data: ``torchvision:NAME[,NAME]``.
        root: folder in which torchvision looks for it.

    Raises:
        InputError: an unknown name, or no `root`.
        DataError: the files are not there, or the set has not one class an image.
    """
    names = names_of(data)
    found: list[tuple[str, str, str, Record]] = []
    classes: dict[str, None] = {}
    for name in names:
        sets = {part: _opened(name, _root(data, root), keywords) for part, keywords in _ways(name)}
        labels = {part: _labels(name, dataset) for part, dataset in sets.items()}
        kinds = _class_names(next(iter(sets.values())), max(map(max, labels.values())))
        classes |= dict.fromkeys(kinds)
        domain = domain_name(name)
        for part, dataset in sets.items():
            for i, label in enumerate(labels[part]):
                source = functools.partial(_image, dataset, i)
                where = f"torchvision {name}, {part or 'image'} {i}"
                record = Record(domain, 0, f"{domain}/{kinds[label]}/{part}-{i:07d}", source, where)
                found.append((domain, kinds[label], part, record))
    used = {kind for _, kind, _, _ in found}
    order = [domain_name(name) for name in names]
    split = "torchvision's own train and test parts"
    listed = gathered(", ".join(names), found, [k for k in classes if k in used], split, order)
    if len(used) < len(classes):
        listed.left_out.update(Counter({"names of classes without an image": len(classes) - len(used)}))
    return listed


def download_torchvision(data: str, root: str | None) -> None:
    """Let torchvision fetch the data sets that `data` names into `root`. DataError where that fails."""
    for name in names_of(data):
        for _, keywords in _ways(name):
            _opened(name, _root(data, root), keywords, download=True)


def _root(data: str, root: str | None) -> str:
    if root is None:
        raise InputError(f"data={data} without data_root; give the folder that torchvision keeps it in: --data-root")
    return root


def _takes_root(dataset: Any) -> bool:
    """Whether a data set is made from a folder alone, without naming more."""
    if not isinstance(dataset, type):
        return False
    needed = [
        p.name
        for p in inspect.signature(dataset).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    return needed == ["root"] and "loader" not in list(inspect.signature(dataset).parameters)[1:2]


def _ways(name: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(part, arguments) in which a data set is opened: its train and test parts, or the whole of it."""
    import torchvision

    dataset = getattr(torchvision.datasets, name)
    parameters = inspect.signature(dataset).parameters
    if "train" in parameters:
        return [(TRAIN, {"train": True}), (TEST, {"train": False})]
    if "split" not in parameters:
        return [("", {})]
    allowed = _allowed_splits(dataset)
    train = next((one for one in _TRAIN_SPLITS if one in allowed), None)
    test = next((one for one in _TEST_SPLITS if one in allowed), None)
    if train is None or test is None:
        raise InputError(
            f"data={PREFIX}{name}: its splits are {', '.join(allowed) or 'unknown'}; expected train and test"
        )
    return [(TRAIN, {"split": train}), (TEST, {"split": test})]


def _allowed_splits(dataset: Any) -> Sequence[str]:
    """The words that a data set's constructor checks its `split` against; they stand in its source alone."""
    try:
        source = inspect.getsource(dataset)
    except (OSError, TypeError):
        return ()
    return [one for one in (*_TRAIN_SPLITS, *_TEST_SPLITS) if f'"{one}"' in source or f"'{one}'" in source]


def _opened(name: str, root: str, keywords: Mapping[str, Any], download: bool = False) -> Any:
    import torchvision

    dataset = getattr(torchvision.datasets, name)
    can = "download" in inspect.signature(dataset).parameters
    if download and not can:
        raise InputError(f"data={PREFIX}{name}: torchvision cannot fetch it; put it into {root} by hand")
    extra = {"download": download} if can else {}
    try:
        Path(root).mkdir(parents=True, exist_ok=True) if download else None
        return dataset(root=root, **keywords, **extra)
    except Exception as error:  # every data set has errors of its own for files that are not there
        more = "" if download else "; give the --data-root where it is, or fetch it with --download"
        raise DataError(f"torchvision {name} cannot be read in {root} ({first_line(error)}){more}") from error


def _labels(name: str, dataset: Any) -> list[int]:
    """One whole number an image."""
    given = next(
        (v for v in (getattr(dataset, a, None) for a in ("targets", "labels", "_labels")) if v is not None), None
    )
    values: Any = getattr(given, "tolist", lambda: given)()
    if values is None or len(values) != len(dataset):
        values = [dataset[i][1] for i in range(len(dataset))]
    values = [int(v) if isinstance(v, torch.Tensor) and v.numel() == 1 else v for v in values]
    wrong = next((v for v in values if not isinstance(v, int) or isinstance(v, bool) or v < 0), None)
    if wrong is not None or not values:
        raise DataError(f"torchvision {name}: a label is {wrong!r}; expected one class an image, as in CIFAR100")
    return list(values)


def _class_names(dataset: Any, highest: int) -> list[str]:
    """Names of the classes from 0 on; their numbers where the data set has none, or says them first ("0 - zero")."""
    given = getattr(dataset, "classes", None) or ()
    names = [str(one) if isinstance(one, str) else ", ".join(map(str, one)) for one in given]
    plain = [str(i) for i in range(highest + 1)]
    numbered = all(name.startswith(f"{i} - ") for i, name in enumerate(names))  # MNIST, whose classes are those of SVHN
    return names if len(set(names)) == len(names) > highest and not numbered else plain


def _image(dataset: Any, number: int) -> Image.Image:
    image = dataset[number][0]
    if not isinstance(image, Image.Image):
        raise TypeError(f"a {type(image).__name__}; expected a picture")
    return image
