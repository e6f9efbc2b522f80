"""A data set of one domain cut by class into several: split CIFAR-100 and its like."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from dwm_fast.errors import InputError
from dwm_fast.pacs.data.listed import Listed, domain_name

FEWEST = 2
"""Classes of a domain: with one there is nothing to tell apart."""
Splits = dict[str, tuple[str, ...]]
"""Domain -> its classes."""


def class_splits(text: str, classes: Sequence[str]) -> Splits:
    """The domains that `text` asks for: a number of them, or each with a name and its classes.

    >>> class_splits("2", ["cat", "dog", "car", "ship", "van"])
    {'classes-0-2': ('cat', 'dog', 'car'), 'classes-3-4': ('ship', 'van')}
    >>> class_splits("pets=cat+dog,wheels=car+van", ["cat", "dog", "car", "ship", "van"])
    {'pets': ('cat', 'dog'), 'wheels': ('car', 'van')}

    Raises InputError for too many domains, an unknown or repeated class, or a domain of fewer than two.
    """
    return _equal(int(text), classes) if text.strip().isdecimal() else _named(text, classes)


def split_by_classes(listed: Listed, text: str) -> Listed:
    """The one domain of a data set cut into those of `class_splits`. InputError where there are more domains."""
    domains = list(dict.fromkeys(r.domain for r in listed.records))
    if len(domains) > 1:
        raise InputError(f"split_classes cuts a data set of one domain; {listed.name} has {', '.join(domains)}")
    splits = class_splits(text, listed.classes)
    place = {kind: domain for domain, kinds in splits.items() for kind in kinds}
    both = [
        (replace(r, domain=place[listed.classes[r.label]]), part)
        for r, part in zip(listed.records, listed.parts, strict=True)
        if listed.classes[r.label] in place
    ]
    order = {domain: i for i, domain in enumerate(splits)}
    both.sort(key=lambda one: order[one[0].domain])
    left_out = Counter(listed.left_out)
    if len(both) < len(listed.records):
        left_out["images of classes in no split"] = len(listed.records) - len(both)
    records, parts = [record for record, _ in both], [part for _, part in both]
    name = f"{listed.name}, classes split into {len(splits)} domains"
    return replace(listed, name=name, records=records, parts=parts, left_out=left_out)


def _equal(count: int, classes: Sequence[str]) -> Splits:
    """So many domains of the classes in order; the first ones have one class more where it does not come out even."""
    most = len(classes) // FEWEST
    if not 2 <= count <= most:
        raise InputError(
            f"split_classes={count} of {len(classes)} classes; expected 2 to {most} domains, each of at least {FEWEST}"
        )
    each, more = divmod(len(classes), count)
    edges = itertools.accumulate((each + (i < more) for i in range(count)), initial=0)
    return {f"classes-{a}-{b - 1}": tuple(classes[a:b]) for a, b in itertools.pairwise(edges)}


def _named(text: str, classes: Sequence[str]) -> Splits:
    found: Splits = {}
    taken: dict[str, str] = {}
    for part in text.split(","):
        name, _, listed = part.partition("=")
        members = tuple(one.strip() for one in listed.split("+") if one.strip())
        if not name.strip() or len(members) < FEWEST or domain_name(name) in found:
            raise InputError(
                f"split_classes: '{part.strip()}'; expected a number of domains, or NAME=CLASS+CLASS,NAME=CLASS+CLASS "
                f"with different names and at least {FEWEST} classes each"
            )
        for kind in members:
            if kind not in classes:
                near = difflib.get_close_matches(kind, classes, n=3, cutoff=0.4) or classes[:3]
                raise InputError(f"split_classes: no class '{kind}'; the nearest are {', '.join(near)}")
            if kind in taken:
                raise InputError(f"split_classes: class '{kind}' is in {taken[kind]} and in {name.strip()}; keep one")
            taken[kind] = name.strip()
        found[domain_name(name)] = members
    return found
