"""What only a sequence reads of a configuration: its domains, and the options of methods that learn one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dwm_fast import methods as all_methods
from dwm_fast.errors import InputError
from dwm_fast.methods import SequentialMethod
from dwm_fast.pacs.config_values import merged, method_options, named, replace
from dwm_fast.pacs.config_values import sequence as as_list

Options = Mapping[str, Mapping[str, Any]]
"""Method -> options in place of its own defaults."""

Orders = int | tuple[tuple[str, ...], ...]
"""How many rotations of a sequence, or the orders of its domains one by one."""

ENTRIES = ("sequence", "orders", "sequential", "alone")
"""Entries that only the study of sequences reads."""
ALL = ("all",)
"""In place of a sequence: every domain of the data, in their order."""
SEQUENTIAL = ("none", "piggyback", "ksm", "spg", "packnet", "binary")
"""What a sequence runs by default; the other methods and presets such as "piggyback-paper" are offered beside them."""
BUILTIN: Options = {
    "none": {"options": {"epochs": 5, "lr": 1e-2}},
    "piggyback": {"options": {"epochs": 10, "lr": 3e-3, "head_lr": 1e-2, "batch_norm": "per-domain"}},
    "ksm": {"options": {"epochs": 10, "lr": 3e-3, "head_lr": 1e-2}},
    "spg": {"epochs": 12, "lr": 0.25, "head_factor": 1.0},
    "packnet": {"training": {"epochs": 8, "lr": 2e-2}, "retraining": {"epochs": 4, "lr": 1e-2}},
    "hat": {"options": {"epochs": 8, "lr": 1e-2}},
    "top-scores": {"options": {"epochs": 10, "lr": 3e-3, "head_lr": 1e-2}},
    "fggm": {"options": {"epochs": 5, "lr": 1e-2}},
    "low-rank": {"options": {"epochs": 5, "lr": 1e-2}},
    "cpg": {"training": {"epochs": 8, "lr": 1e-2}, "pruning": {"epochs": 3, "lr": 5e-3}, "mask_lr": 3e-3},
    "binary": {
        "options": {"epochs": 5, "lr": 1e-2, "batch_norm": "per-domain"},
        "binary": {"options": {"epochs": 12, "lr": 0.05, "source_budget": 0.1}},
    },
}
"""Options of methods for the built-in images and their small network; the methods' own defaults are for real images."""


def check_sequence(domains: Sequence[str]) -> None:
    """Raise InputError for domains that are no sequence."""
    if tuple(domains) == ALL:
        return
    if len(domains) < 2:
        given = ", ".join(domains) or "none"
        raise InputError(f"sequence: given {given}; expected at least two domains, such as photo,art")
    repeated = [domain for domain in domains if domains.count(domain) > 1]
    if repeated:
        raise InputError(f"sequence: {repeated[0]} is in it more than once; expected every domain once")


def orders_of(sequence: Sequence[str], orders: int | Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """The orders in which a study learns the domains, `sequence` first.

    A number asks for rotations: each begins one domain later than the one before, so that of all rotations every domain
    is learned first once, last once, and once at every place between.

    >>> orders_of(["photo", "art", "sketch"], 2)
    (('photo', 'art', 'sketch'), ('art', 'sketch', 'photo'))
    """
    if isinstance(orders, int):
        return tuple((*sequence[start:], *sequence[:start]) for start in range(orders))
    return tuple(tuple(order) for order in orders)


def check_orders(sequence: tuple[str, ...], orders: Orders) -> None:
    """Raise InputError for orders that are none of this sequence's domains."""
    if isinstance(orders, int):
        most = None if sequence == ALL else len(sequence)
        if orders < 1 or (most is not None and orders > most):
            known = f"1 to {most}, as many as {','.join(sequence)} has rotations" if most else "a number from 1 on"
            raise InputError(f"orders is {orders}; expected {known}, or the orders themselves: photo,art;art,photo")
        return
    for order in orders:
        if sorted(order) != sorted(sequence):
            raise InputError(
                f"orders: {','.join(order)} has other domains than {','.join(sequence)}; expected the same in all"
            )
    if not orders or orders[0] != sequence:
        first = ",".join(orders[0]) if orders else "missing"
        raise InputError(f"orders: the first is {first}, and sequence is {','.join(sequence)}; leave sequence out")
    if len(set(orders)) < len(orders):
        twice = next(order for order in orders if orders.count(order) > 1)
        raise InputError(f"orders: {','.join(twice)} is among them more than once; expected every order once")


def spelled_out(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Entries with `sequence` and `orders` for the shorter spellings: text with semicolons, or orders alone."""
    given, orders = data.get("sequence"), data.get("orders")
    if isinstance(given, str) and ";" in given:
        if orders is not None:
            raise InputError(f"sequence: {given} has several orders, and orders is given too; leave out one of them")
        orders = [order for order in given.split(";") if order.strip()]
        data = {key: value for key, value in data.items() if key != "sequence"} | {"orders": orders}
    if not isinstance(orders, (list, tuple)):
        return data
    orders = list(map(as_list, orders))
    first = {} if "sequence" in data or not orders else {"sequence": orders[0]}
    return {**data, **first, "orders": orders if len(orders) > 1 else 1}


def offered() -> dict[str, SequentialMethod]:
    """Every method of sequences and every preset, by name."""
    return {**all_methods.sequential_methods(), **all_methods.presets()}


def with_options(name: str, options: Options, builtin: bool = False) -> SequentialMethod:
    """A method by name, with its entry of `options`, which for built-in images stands over that of `BUILTIN`."""
    own = BUILTIN.get(name, {}) if builtin else {}
    method: SequentialMethod = replace(
        f"sequential.{name}", merged(own, options.get(name, {})), named("sequential", name, offered())
    )
    return method


def read_options(value: Any, old: Options) -> dict[str, Mapping[str, Any]]:
    """`old` with the sections of `value`, typed, put over it. Unknown methods, entries and wrong values: InputError."""
    return method_options("sequential", value, old, offered())


def epochs_of(names: Iterable[str], epochs: int) -> dict[str, Any]:
    """Options of so many epochs a task: a method's `epochs`, or those of its section `options` or `training`."""
    found: dict[str, Any] = {}
    for name in names:
        method = named("sequential", name, offered())
        section = next((s for s in ("options", "training") if hasattr(getattr(method, s, None), "epochs")), None)
        if hasattr(method, "epochs"):
            found[name] = {"epochs": epochs}
        elif section is not None:
            found[name] = {section: {"epochs": epochs}}
    return found
