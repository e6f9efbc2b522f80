"""How much of a network the masks cover: weights counted, and what is left as it is named class by class."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

LEAST_SHARE = 0.9
"""Below this share of the weights, `mask_model` says what it leaves as it is."""

_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)
"""Tables, not factors of a product: nobody expects a mask on them."""


@dataclass(frozen=True)
class Coverage:
    """What masks cover.

    Attributes:
        masked: weights by the name of their mask.
        rest: class -> (modules, weights) of what multiplies by weights and has no mask.
        tables: the same of embeddings, which are masked only by request.
    """

    masked: Mapping[str, int]
    rest: Mapping[str, tuple[int, int]]
    tables: Mapping[str, tuple[int, int]]

    @property
    def masked_weights(self) -> int:
        """Weights that have a mask."""
        return sum(self.masked.values())

    @property
    def share(self) -> float:
        """Masked weights over all that the network multiplies by, in [0, 1]; tables without a mask do not count."""
        return self.masked_weights / max(1, self.masked_weights + sum(n for _, n in self.rest.values()))

    def __str__(self) -> str:
        lines = [
            f"masked: {self.masked_weights:,} weights ({self.share:.2%} of the weights) by {len(self.masked)} masks"
        ]
        for what, found in (("not masked", self.rest), ("tables, not masked", self.tables)):
            lines += [f"{what}: {in_words(found)}"] if found else []
        return "\n".join(lines)


def left_out(
    model: nn.Module, exclude: Iterable[str] = (), masked: Container[int] = (), tables: bool = False
) -> dict[str, tuple[int, int]]:
    """Class -> (modules, weights) of the modules that multiply by weights which are not among `masked`, by id.

    A weight is an element of a parameter of two dimensions or more. Modules that `exclude` names, or that lie in such
    a module, do not count; embeddings alone do where `tables` are asked for, and not otherwise. A tensor of several
    names counts once.
    """
    found: dict[str, tuple[int, int]] = {}
    patterns = [form for pattern in exclude for form in (pattern, f"{pattern}.*")]
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, _LOOKED_UP) != tables or any(fnmatchcase(name, p) for p in patterns):
            continue
        own = {id(p): p.numel() for p in module.parameters(recurse=False) if p.dim() > 1 and id(p) not in masked}
        weights = sum(number for key, number in own.items() if key not in seen)
        seen |= own.keys()
        if weights:
            modules, before = found.get(type(module).__name__, (0, 0))
            found[type(module).__name__] = modules + 1, before + weights
    return found


def in_words(found: Mapping[str, tuple[int, int]]) -> str:
    """The classes, those with most weights first: "24,576 weights in 8 Conv1D, ..."."""
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return ", ".join(f"{weights:,} weights in {modules} {name}" for name, (modules, weights) in ordered)
