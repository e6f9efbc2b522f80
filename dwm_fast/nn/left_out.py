"""What a mask cannot reach: weights of other modules than Linear and Conv2d, counted and named."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)
"""Tables, not factors of a product: nobody expects a mask on them."""


def left_out(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, tuple[int, int]]:
    """Class -> (modules, weights) of the modules that multiply by weights and are neither Linear nor Conv2d.

    A weight is an element of a parameter of two dimensions or more. Modules that `exclude` names, or that lie in such
    a module, do not count.
    """
    found: dict[str, tuple[int, int]] = {}
    patterns = [form for pattern in exclude for form in (pattern, f"{pattern}.*")]
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, *_LOOKED_UP)) or any(fnmatchcase(name, p) for p in patterns):
            continue
        weights = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
        if weights:
            modules, before = found.get(type(module).__name__, (0, 0))
            found[type(module).__name__] = modules + 1, before + weights
    return found


def in_words(found: dict[str, tuple[int, int]]) -> str:
    """The classes, those with most weights first: "24,576 weights in 8 Conv1D, ..."."""
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return ", ".join(f"{weights:,} weights in {modules} {name}" for name, (modules, weights) in ordered)
