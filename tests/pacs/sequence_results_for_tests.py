"""Results of a sequence written by hand, for the tests of what people look at."""

from __future__ import annotations

from typing import Any

from dwm_fast.pacs.sequence.table import measures

STAND_IN = "procedural stand-in (not PACS)"
SEQUENCE = ["photo", "art", "sketch"]
MATRICES = {
    ("none", "shared", 0): [[0.9], [0.6, 0.7], [0.4, 0.6, 0.8]],
    ("none", "shared", 1): [[0.9], [0.8, 0.7], [0.6, 0.6, 0.9]],
    ("binary", "shared", 0): [[0.9], [0.9, 0.8], [0.8, 0.8, 0.7]],
    ("binary", "masked", 0): [[0.9], [0.9, 0.8], [0.9, 0.8, 0.7]],
}


def results(real: bool = False) -> dict[str, Any]:
    """`none` with two seeds, `binary` with one and two views; accuracies as in MATRICES."""
    rows = [
        {
            "method": method,
            "seed": seed,
            "position": i,
            "view": view,
            "after": SEQUENCE[i],
            "on": SEQUENCE[j],
            "accuracy": accuracy,
            "loss": 1 - accuracy,
        }
        for (method, view, seed), matrix in MATRICES.items()
        for i, line in enumerate(matrix)
        for j, accuracy in enumerate(line)
    ]
    tasks = [
        {
            "method": method,
            "seed": seed,
            "position": i,
            "domain": SEQUENCE[i],
            "bits": bits,
            "seconds": seconds,
            "figures": {"fraction_kept": 0.25},
        }
        for method, seed in (("none", 0), ("none", 1), ("binary", 0))
        for i, (bits, seconds) in enumerate([(50, 9.0), (100, 2.0), (300, 4.0)])
    ]
    return {
        "format": 1,
        "kind": "sequence",
        "data": {
            "name": "PACS" if real else STAND_IN,
            "real": real,
            "domains": ["photo", "art", "cartoon", "sketch"],
            "classes": ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"],
            "image_size": 32,
            "counts": {"photo": {"train": 90, "test": 10}, "art": {"train": 80, "test": 20}},
        },
        "config": {"backbone": "small", "seeds": [0, 1], "sequence": SEQUENCE},
        "versions": {"dwm_fast": "0.1.0", "torch": "2.11", "device": "cpu"},
        "sequence": SEQUENCE,
        "methods": {"none": {"epochs": 3}, "binary": {"lr": 0.05}},
        "sources": [{"source": "photo", "seed": k, "accuracy": 0.92, "loss": 0.1, "seconds": 7.0} for k in (0, 1)],
        "tasks": tasks,
        "rows": rows,
        "measures": measures(SEQUENCE, rows, tasks, dict.fromkeys(SEQUENCE, 10)),
    }
