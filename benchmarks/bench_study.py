"""The whole study on one pair of built-in domains: what the kernels are worth when everything else runs too."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import dwm_fast
from dwm_fast.methods import TrainOptions
from dwm_fast.ops import backends
from dwm_fast.pacs.config import StudyConfig, builtin_defaults
from dwm_fast.pacs.study import Study, load_data

from .context import Context
from .measure import Case, Run, Way, require

_EPOCHS = {"source": 5, "masks": 4, "tuning": 2}


def _config(context: Context) -> StudyConfig:
    """Training, mask, plain and masked fine-tuning of photo -> sketch, with few epochs."""
    base = builtin_defaults()

    def shorter(options: TrainOptions) -> TrainOptions:
        return replace(options, epochs=_EPOCHS["tuning"])

    methods = ("none", "binary")
    return replace(
        base,
        sources=("photo",),
        targets=("sketch",),
        methods=methods,
        inits=("S_end",),
        device=context.device.type,
        source=replace(base.source, epochs=_EPOCHS["source"]),
        binary=replace(base.binary, epochs=_EPOCHS["masks"]),
        tune={**base.tune, **{method: tuple(map(shorter, base.tune[method][:1])) for method in methods}},
    )


def pair(context: Context) -> Case:
    """Every stage, tables, figures and the report, in a fresh run folder."""
    config = _config(context)
    data = load_data(config)

    def study() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return Study(config, Path(folder) / "run", data).run()

    def by_reference() -> dict[str, Any]:
        with dwm_fast.use_backend("reference"):
            return study()

    def gate() -> None:
        results = study()
        before, kept = results["sources"][0]["accuracy"], results["masks"][0]["fraction_kept"]
        require(before > 0.3, f"the source network has learned nothing: accuracy {before:.3f}")
        require(0 < kept < 1, f"the mask keeps {kept:.3f} of the weights")
        require(len(results["rows"]) == 3, f"{len(results['rows'])} rows; expected none, and binary in two views")

    def made(run: Run) -> Any:
        return lambda: run

    backend = backends.chosen("sample", context.device.type)
    ways = [Way("reference backend", made(by_reference)), Way("ours", made(study), backend=backend)]
    parameters = {"pairs": 1, "methods": "none,binary", **{f"{what} epochs": n for what, n in _EPOCHS.items()}}
    return Case("study", parameters, ways, gate)
