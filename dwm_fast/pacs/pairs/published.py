"""The paper's own figures and findings (Khanna et al. 2023, arXiv 2308.13957), and ours held against them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from dwm_fast.pacs.pairs.table import Key, baseline_key, cell, row_key
from dwm_fast.pacs.tables import MISSING, Stat, markdown, number
from dwm_fast.pacs.words import of_pacs

# The one published table, (S gain, T drop) by re-initialisation and domain.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    init: dict(zip(("photo", "art", "cartoon", "sketch"), values, strict=True))
    for init, values in {
        "S_start": ((-0.029, -0.025), (0.062, -0.030), (0.035, -0.019), (0.054, -0.056)),
        "S_end": ((-0.014, -0.027), (0.051, -0.038), (0.021, -0.016), (0.043, -0.059)),
        "random": ((-0.014, -0.027), (0.064, -0.036), (0.001, -0.021), (0.023, -0.058)),
    }.items()
}
Runs = Sequence[Mapping[str, Any]]
_FEWEST_PAIRS = 6
"""Of a finding on pairs: half of PACS; one pair alone says nothing about "consistently"."""


def beside_published(results: Mapping[str, Any]) -> str:
    """Binary masking by re-initialisation and source, ours above the paper's, Markdown; "" without all four sources.

    Ours is the view `shared`, kept weights frozen as the paper's are, the first batch-norm policy and rate that ran.
    """
    runs = [run for run in _as_published(results) if run["method"] == "binary"]
    domains = list(PUBLISHED["S_start"])
    if not of_pacs(results) or {run["source"] for run in runs} != set(domains):
        return ""
    body = []
    for init, published in PUBLISHED.items():
        ours = [run for run in runs if run["init"] == init]
        if not ours:
            continue
        chosen = [run for run in ours if row_key(run) == row_key(ours[0])]
        cells = [cell([run for run in chosen if run["source"] == domain]) for domain in domains]
        body.append([init, "ours", *(_both(one.s_gain, one.t_drop) for one in cells)])
        body.append([init, "published", *(_both(*map(Stat, published[domain])) for domain in domains)])
    title = (
        "**Binary masking beside the published table** (S gain / T drop; the paper names neither network nor settings)"
    )
    return "\n".join([title, "", markdown(["init", "", *domains], body), ""])


def _as_published(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs that the paper's method made: seen as one network, and with kept weights frozen, not pulled."""
    return [run for run in results["rows"] if run["view"] == "shared" and run.get("kept_decay") is None]


def _both(gain: Stat, drop: Stat) -> str:
    return MISSING if gain.mean is None else f"{number(gain, True)} / {number(drop, True)}"


def findings(results: Mapping[str, Any]) -> list[str]:
    """Which of the paper's three findings hold here, a sentence each; none unless the study can say it.

    Each method stands with the re-initialisation, policy and rate that has its highest mean S gain, on the pairs and
    seeds that all of them have, in the view `shared`. Ways that pull kept weights are not the paper's, and left out.
    """
    chosen = _best_of_each(results)
    if not of_pacs(results) or not {"none", "binary"} <= set(chosen):
        return []
    pairs = {method: _by_pair(runs) for method, runs in chosen.items()}
    count = len(pairs["none"])
    if count < _FEWEST_PAIRS:
        return []
    best = sum(
        pairs["binary"][pair]["source_after"] >= max(one[pair]["source_after"] for one in pairs.values())
        for pair in pairs["none"]
    )
    pulled = any(run.get("kept_decay") is not None for run in results["rows"])
    frozen = " with kept weights frozen" if pulled else ""
    said = [
        f"Of the paper's findings: binary masking{frozen} leaves the highest accuracy on the source in {best} of "
        f"{count} pairs, against {_names(chosen)} (published: consistently)."
    ]
    targets = [fmean(run["target_after"] for run in runs) for runs in chosen.values()]
    said.append(
        f"Mean target accuracies of these {len(targets)} methods lie within {max(targets) - min(targets):.3f} "
        "(published: very similar)."
    )
    if "edit" in chosen:
        above = sum(
            pairs["edit"][pair]["target_after"] > pairs["binary"][pair]["target_after"] for pair in pairs["none"]
        )
        said.append(f"On the target edit is above binary in {above} of {count} pairs (published: slightly, at times).")
    return said


def _names(chosen: Mapping[str, Any]) -> str:
    others = [name for name in chosen if name != "binary"]
    return others[0] if len(others) == 1 else f"{', '.join(others[:-1])} and {others[-1]}"


def _best_of_each(results: Mapping[str, Any]) -> dict[str, Runs]:
    """Method -> the runs of its best configuration, all on the same pairs and seeds; {} where they share none."""
    groups: dict[Key, list[Mapping[str, Any]]] = defaultdict(list)
    for run in _as_published(results):
        if run.get("s_gain") is not None:
            groups[row_key(run)].append(run)
    baseline = baseline_key(results)
    groups = {key: runs for key, runs in groups.items() if key[0] != "none" or key == baseline}
    if not groups:
        return {}
    common = set.intersection(*({_where(run) for run in runs} for runs in groups.values()))
    best: dict[str, Runs] = {}
    for key, runs in groups.items():
        kept = [run for run in runs if _where(run) in common]
        if kept and (key[0] not in best or _gain(kept) > _gain(best[key[0]])):
            best[key[0]] = kept
    return best


def _where(run: Mapping[str, Any]) -> tuple[str, str, int]:
    return run["source"], run["target"], run["seed"]


def _gain(runs: Runs) -> float:
    return fmean(run["s_gain"] for run in runs)


def _by_pair(runs: Runs) -> dict[tuple[str, str], dict[str, float]]:
    """Pair -> its accuracies, means over seeds."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[run["source"], run["target"]].append(run)
    metrics = ("source_after", "target_after")
    return {pair: {name: fmean(run[name] for run in part) for name in metrics} for pair, part in groups.items()}
