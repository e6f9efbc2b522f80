"""What a bank holds in memory of each domain, in which form, and how many bytes that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dwm_fast.bank.record import DomainMasks
from dwm_fast.bank.runner import Patch
from dwm_fast.bank.stores import Store


@dataclass(frozen=True)
class Holding:
    """One domain of a bank.

    Attributes:
        domain, form: its name, and the form of its masks ("binary", "kept", ...).
        stored_nbytes: bits, own tensors and values in memory; 0 while they are on disk alone.
        ready_nbytes: masked weights and whatever else the next call needs; 0 while the next call has to make it.
        from_bits, from_kept: names of the large weights whose few rows are multiplied straight from the bits, and from
            kept weights alone, which are chosen where they are faster; both are in `ready_nbytes`.
    """

    domain: str
    form: str
    stored_nbytes: int
    ready_nbytes: int
    from_bits: tuple[str, ...] = ()
    from_kept: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """ "hot": ready for the next call; "warm": its bits are in memory; "cold": on disk."""
        return "hot" if self.ready_nbytes else "warm" if self.stored_nbytes else "cold"


@dataclass(frozen=True)
class ServedHolding:
    """Domains that are prepared for mixed batches.

    Attributes:
        names: the domains.
        nbytes: what is held for them beside the backbone.
        stores: by name, kept weights that few rows of a mixed batch are multiplied with in the place of a large weight.
    """

    names: tuple[str, ...]
    nbytes: int
    stores: Mapping[str, Store]

    def __str__(self) -> str:
        text = f"together {', '.join(self.names)}: {self.nbytes:,} bytes"
        for name, one in self.stores.items():
            what = "the union of their kept weights" if one.form == "union" else "kept weights of each"
            read = (
                f"{one.read.dense:,} of all weights, {one.read.separate:,} of each domain's, {one.read.union:,} of the"
            )
            text += f"; few rows of {name} from {what}, {one.nbytes:,} bytes (a product reads {read} union)"
        return text


@dataclass(frozen=True)
class Holdings:
    """All domains of a bank, and the budget that what is kept for reuse stays under.

    Attributes:
        domains: in the bank's order.
        hot_nbytes: what is kept for reuse now: ready domains, domains read from disk, networks for mixed batches.
        memory_budget: the most of that.
        served: sets of domains that are prepared for mixed batches.
    """

    domains: tuple[Holding, ...]
    hot_nbytes: int
    memory_budget: int
    served: tuple[ServedHolding, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.hot_nbytes:,} bytes are kept for reuse, at most {self.memory_budget:,}"]
        for one in self.domains:
            held = f"{one.stored_nbytes:,} bytes stored, {one.ready_nbytes:,} ready"
            text = f"{one.domain} ({one.form}): {one.state}, {held}"
            for names, source in ((one.from_kept, "kept weights"), (one.from_bits, "bits")):
                text += f"; few rows from {source}: {', '.join(names)}" if names else ""
            lines.append(text)
        lines += map(str, self.served)
        return "\n".join(lines)


def holding(domain: str, form: str, record: DomainMasks | None, patch: tuple[Patch, int] | None) -> Holding:
    """What is held of a domain: `record` where its bits are in memory, `patch` with its bytes where it is ready."""
    stored = 0
    if record is not None:
        tensors = (record.bits, *record.state.values(), *record.values.values())
        stored = sum(t.numel() * t.element_size() for t in tensors)
    straight: Mapping[str, object] = {} if patch is None else patch[0].straight
    kept = tuple(name for name, one in straight.items() if getattr(one, "kept", None) is not None)
    return Holding(
        domain,
        form,
        stored,
        0 if patch is None else patch[1],
        tuple(name for name in straight if name not in kept),
        kept,
    )
