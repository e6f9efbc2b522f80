"""What a study found, in words made from its numbers: who keeps the source best, at what target cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from dwm_fast.pacs.pairs import published
from dwm_fast.pacs.pairs.table import Cell, Key, ambiguous, baseline_key, cell, in_order, key_order, row_key
from dwm_fast.pacs.tables import Stat, number
from dwm_fast.pacs.words import classes_differ, data_name, limits

EQUAL = 0.02  # target accuracies within two points count as equal

_FEWEST_RUNS = 6
"""Of an interval: a bootstrap over fewer is too narrow to mean what it says."""
_RESAMPLES = 9999

Runs = list[Mapping[str, Any]]


def finding(results: Mapping[str, Any]) -> list[str]:
    """Sentences in plain text, the answer first, then what limits it.

    Configurations are compared in the view `shared` on the runs (source, target, seed) that all of them have.
    """
    shared = _groups(results, "shared")
    baseline = baseline_key(results)
    rivals = [key for key in shared if key[0] != "none"]
    data = data_name(results)
    if not shared:
        return [f"No fine-tuning run on {data} has finished yet."]
    if baseline is None or not rivals:
        missing = "no plain fine-tuning (none) to compare with" if rivals else "only plain fine-tuning (none)"
        return [f"On {data} there is {missing} so far, so there is nothing to say about masks."]
    common = set.intersection(*({_run(run) for run in runs} for runs in shared.values()))
    if not common:
        return [f"On {data} no pair and seed has been run by every configuration yet: nothing can be compared."]
    compared = {key: [run for run in runs if _run(run) in common] for key, runs in shared.items()}
    cells = {key: cell(compared[key]) for key in rivals}
    if any(one.s_gain.mean is None or one.t_drop.mean is None for one in cells.values()):
        return [f"On {data} some runs have no S gain or T drop: nothing can be compared."]
    best = max(rivals, key=lambda key: cells[key].s_gain.rank)
    return [
        *_headline(data, best, cells),
        *_intervals(compared[best]),
        *_pairs_above(compared[best]),
        *_other_rates({key: runs for key, runs in compared.items() if key[0] == "none" and key != baseline}),
        *_per_source(results, best, {key: compared[key] for key in rivals}),
        *published.findings(results),
        *_masked(results, best, common),
        *_limits(results, cells, best, common),
    ]


def _groups(results: Mapping[str, Any], view: str) -> dict[Key, Runs]:
    groups: dict[Key, Runs] = defaultdict(list)
    for run in results["rows"]:
        if run["view"] == view:
            groups[row_key(run)].append(run)
    return {key: groups[key] for key in sorted(groups, key=key_order)}


def _run(run: Mapping[str, Any]) -> tuple[str, str, int]:
    return run["source"], run["target"], run["seed"]


def _name(key: Key, keys: Iterable[Key]) -> str:
    method, init, policy, _, used = key
    rate = f", rate {used}" if used.lr is not None and ambiguous(key, keys) else ""
    return f"{method} masking with {init} (batch norm {policy}{rate})"


def _against(after: Stat, difference: Stat) -> str:
    """'0.614 against 0.444': this configuration and the baseline of the same runs."""
    return f"{number(Stat(after.mean, None))} against {after.rank - difference.rank:.3f}"


def _headline(data: str, best: Key, cells: Mapping[Key, Cell]) -> list[str]:
    top = cells[best]
    gain, drop = top.s_gain.rank, top.t_drop.rank
    source = f"{_against(top.source_after, top.s_gain)} with plain fine-tuning (S gain {number(top.s_gain, True)})"
    before = f"before fine-tuning it was {number(Stat(top.source_before.mean, None))}"
    if gain > 0:
        said = [f"On {data}, {_name(best, cells)} keeps the source best: accuracy {source}; {before}."]
    else:
        said = [
            f"On {data}, no mask keeps the source better than plain fine-tuning does.",
            f"Closest comes {_name(best, cells)}: accuracy {source}; {before}.",
        ]
    verdict = "equal within two points"
    if abs(drop) > EQUAL:
        verdict = f"more than two points {'above' if drop > 0 else 'below'}"
    target = f"{_against(top.target_after, top.t_drop)} (T drop {number(top.t_drop, True)}), {verdict}"
    said.append(f"On the target it reaches {target}.")
    near = [key for key, one in cells.items() if one.t_drop.rank >= -EQUAL]
    if drop < -EQUAL and near:
        other = max(near, key=lambda key: cells[key].s_gain.rank)
        one = cells[other]
        said.append(
            f"Among those within two points of plain fine-tuning on the target, {_name(other, cells)} keeps most: "
            f"S gain {number(one.s_gain, True)}, T drop {number(one.t_drop, True)}."
        )
    if top.s_gain.spread is not None and 0 < gain <= top.s_gain.spread:
        said.append("That S gain is no larger than its spread over seeds.")
    return said


def interval(differences: Iterable[float]) -> tuple[float, float]:
    """95 % confidence interval of a mean of paired differences: percentile bootstrap (Efron 1979), 9999 resamples.

    The same differences give the same interval.
    """
    import numpy as np
    from scipy.stats import bootstrap

    values = np.asarray(list(differences))
    found = bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)


def _by_pair(runs: Runs) -> list[Runs]:
    pairs: dict[tuple[str, str], Runs] = defaultdict(list)
    for run in runs:
        pairs[run["source"], run["target"]].append(run)
    return list(pairs.values())


def _intervals(runs: Runs) -> list[str]:
    """How sure the winner's differences to plain fine-tuning are, over its pairs and seeds.

    Where there are enough pairs, what is resampled is pairs, each with the mean over its seeds: seeds of one pair are
    alike, and counting them one by one would make the interval too narrow.
    """
    pairs = _by_pair(runs)
    by_pair = len(pairs) >= _FEWEST_RUNS
    drawn = pairs if by_pair else [[run] for run in runs]
    if len(drawn) < _FEWEST_RUNS:
        return []
    said = []
    for metric, name in (("s_gain", "S gain"), ("t_drop", "T drop")):
        low, high = interval(fmean(run[metric] for run in part) for part in drawn)
        verdict = "which excludes 0" if low > 0 or high < 0 else "which holds 0"
        said.append(f"{name} from {low:+.3f} to {high:+.3f}, {verdict}")
    over = f"{len(drawn)} {'pairs' if by_pair else 'paired runs'}"
    return [f"Over {over} the means lie, with 95 % confidence (bootstrap), at {'; '.join(said)}."]


def _pairs_above(runs: Runs) -> list[str]:
    """In how many pairs the winner keeps the source better than plain fine-tuning, by the mean over seeds."""
    gains = [fmean(run["s_gain"] for run in pair) for pair in _by_pair(runs)]
    if len(gains) < 2:
        return []
    return [
        f"It keeps the source better than plain fine-tuning in {sum(gain > 0 for gain in gains)} of {len(gains)} pairs."
    ]


def _other_rates(plain: Mapping[Key, Runs]) -> list[str]:
    """What plain fine-tuning gives in the ways that are not the baseline."""
    cells = {key: cell(runs) for key, runs in plain.items()}
    said = []
    for (_, _, policy, _, (lr, _)), one in cells.items():
        source, target = (number(Stat(after.mean, None)) for after in (one.source_after, one.target_after))
        rate = "" if lr is None else f" at rate {lr:g}"
        said.append(
            f"Plain fine-tuning with batch norm {policy}{rate} leaves {source} on the source and reaches {target} on "
            "the target."
        )
    return said


def _per_source(results: Mapping[str, Any], best: Key, compared: Mapping[Key, Runs]) -> list[str]:
    """On how many source domains the winning method is the winner."""
    winners: dict[str, str] = {}
    for source in in_order(results, (run["source"] for runs in compared.values() for run in runs)):
        gains = {key: cell([run for run in runs if run["source"] == source]) for key, runs in compared.items()}
        winners[source] = max(gains, key=lambda key: gains[key].s_gain.rank)[0]
    if len(winners) < 2:
        return []
    lost = ", ".join(f"{method} on {source}" for source, method in winners.items() if method != best[0])
    count = sum(method == best[0] for method in winners.values())
    tail = f" (otherwise {lost})" if lost else ""
    return [f"By source domain, {best[0]} masking keeps the source best on {count} of {len(winners)}{tail}."]


def _masked(results: Mapping[str, Any], best: Key, common: set[tuple[str, str, int]]) -> list[str]:
    """What the masked view says of the winner."""
    cells = {
        key: cell([run for run in runs if _run(run) in common])
        for key, runs in _groups(results, "masked").items()
        if key[:3] == best[:3]
    }
    own = cells.get((*best[:3], "masked", best[4]))
    if own is None or not own.runs:
        return []
    pulled = best[4].kept_decay is not None
    kept = number(Stat(own.fraction_kept.mean, None), digits=2)
    said = [
        f"Evaluated under its own bits (view masked) its source network {'is' if pulled else 'stays'} at "
        f"{number(own.source_after)}, with {kept} of the weights kept."
    ]
    frozen = next((one for key, one in cells.items() if pulled and key[4].kept_decay is None and one.runs), None)
    return said if frozen is None else [*said, f"Where they are frozen it stays at {number(frozen.source_after)}."]


def _limits(
    results: Mapping[str, Any], cells: Mapping[Key, Cell], best: Key, common: set[tuple[str, str, int]]
) -> list[str]:
    top = cells[best]
    said = [f"These numbers average {top.coverage}."]
    if common != {_run(run) for run in results["rows"]}:
        said.append("Only the runs that every configuration has are compared here; the table shows all of them.")
    if classes_differ(results):
        said.append(
            "Source and target have different classes: the target gets a new head, and the source is judged with its "
            "own head on the fine-tuned network."
        )
    return said + limits(results, top.seeds, len(cells), "winner", "configurations")
