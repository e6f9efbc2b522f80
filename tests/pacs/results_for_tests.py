"""Small study results written by hand, for the tests of what people look at."""

from __future__ import annotations

from typing import Any

STAND_IN = "procedural stand-in (not PACS)"


def row(
    source: str,
    target: str,
    method: str,
    seed: int,
    gain: float,
    drop: float,
    view: str = "shared",
    **other: Any,
) -> dict[str, Any]:
    """One run; plain fine-tuning leaves 0.40 on the source and reaches 0.90 on the target."""
    return {
        "source": source,
        "target": target,
        "method": method,
        "init": "-" if method == "none" else "S_start",
        "seed": seed,
        "bn_policy": "frozen",
        "lr": 3e-4,
        "view": view,
        "source_before": 0.95,
        "source_after": 0.40 + gain,
        "target_after": 0.90 + drop,
        "fraction_kept": 0.0 if method == "none" else 0.25,
        "s_gain": gain,
        "t_drop": drop,
        "seconds": 1.0,
    } | other


def results(rows: list[dict[str, Any]], real: bool = False, name: str | None = None) -> dict[str, Any]:
    """A study with these runs, two seeds of masks for photo and art, and their overlap."""
    layers = [
        {"name": "conv1", "kept": 50, "total": 100},
        {"name": "layer1.0.conv1", "kept": 200, "total": 900},
    ]
    mask = {
        "method": "binary",
        "kept": 250,
        "total": 1000,
        "fraction_kept": 0.25,
        "masked_accuracy": 0.94,
        "source_accuracy": 0.95,
        "within_budget": True,
        "coefficient": 61.5,
        "seconds": 1.0,
        "layers": layers,
    }
    where = [(source, seed) for source in ("photo", "art") for seed in (0, 1)]
    return {
        "format": 1,
        "data": {
            "name": name or ("PACS" if real else STAND_IN),
            "real": real,
            "domains": ["photo", "art", "cartoon", "sketch"],
            "classes": ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"],
            "image_size": 32,
            "counts": {"photo": {"train": 90, "test": 10}, "art": {"train": 80, "test": 20}},
        },
        "config": {
            "backbone": "small",
            "epochs": 4,
            "weights": None,
            "seeds": [0, 1],
            "binary": {"tau": 1.0},
        },
        "versions": {"dwm_fast": "0.1.0", "torch": "2.11", "device": "cpu"},
        "sources": [
            {"source": source, "seed": seed, "accuracy": 0.95, "loss": 0.1, "seconds": 1.0} for source, seed in where
        ],
        "masks": [{"source": source, "seed": seed, **mask} for source, seed in where],
        "rows": rows,
        "overlap": [{"method": "binary", "seed": seed, "a": "photo", "b": "art", "jaccard": 0.3} for seed in (0, 1)],
    }


def two_seeds() -> list[dict[str, Any]]:
    """Photo to art and to sketch, seeds 0 and 1: none, naive, and binary in both views."""
    rows = []
    binary = {("art", 0): 0.10, ("sketch", 0): 0.20, ("art", 1): 0.20, ("sketch", 1): 0.30}
    for (target, seed), gain in binary.items():
        rows += [
            row("photo", target, "binary", seed, gain, -0.01),
            row("photo", target, "binary", seed, 0.54, -0.01, view="masked"),
            row("photo", target, "none", seed, 0.0, 0.0),
            row("photo", target, "naive", seed, 0.02, 0.01 * seed),
        ]
    return rows
