"""Result files -> the tables and figures of docs, so that no figure is typed by hand.

python -m benchmarks.dev.report            rewrite the generated blocks and figures
python -m benchmarks.dev.report FILE...    take result files of another machine in, then the same
python -m benchmarks.dev.report --check    exit with 1 when a block is not what the result files say
python -m benchmarks.dev.report --short FILE...    one line per case, for a terminal

A machine without git stamps its rows with a fingerprint of the files that it measured. They are taken in when a recent
commit here has that fingerprint, and then carry the commit; others come from an edited tree and are refused.

A block lies between `<!-- generated: NAME -->` and `<!-- end generated -->`; NAME is `results` (every way of every
case), `summary` (a line for each of the leading cases) or `modelled` (`benchmarks.dev.modelled`).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dwm_fast.errors import DwmError, InputError

from ..results import ResultFile, Row, merged, read
from ..table import by_case, case_lines, shown_number
from .checkout import TREE
from .figures import bars, draw_all, figure_name, limit_of
from .modelled import modelled_block
from .source import RESULTS, resolve

PAGES = ("docs/benchmarks.md",)
FIGURES = Path("docs/figures")
_LEADING = (
    "sample forward",
    "step mask training",
    "update FrozenAdamW",
    "linear from bits",
    "bank linear",
    "bits pack",
    "bits Jaccard",
)
"""Cases of the summary, in its order."""
_BLOCK = re.compile(r"(<!-- generated: (results|summary|modelled) -->\n).*?(<!-- end generated -->)", re.DOTALL)
_NONE = "No results are recorded yet; `dwm-fast bench` records them.\n"


def recorded(tree: Path) -> list[Row]:
    """Rows of every full result file of the checkout."""
    files = sorted(p for p in (tree / RESULTS).glob("*.csv") if not p.stem.endswith("-quick"))
    return merged([], [row for path in files for row in read(path)])


def _device_note(rows: Sequence[Row]) -> str:
    commits = sorted({r.commit for r in rows})
    dates = sorted(r.date[:10] for r in rows)
    versions = sorted({f"torch {r.torch}, Triton {r.triton}, Python {r.python}" for r in rows})
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(versions)}; commit {', '.join(commits)}; {days}."


def _case_table(case: str, parameters: str, rows: Sequence[Row]) -> list[str]:
    out = [f"**{case}** ({parameters.replace(';', ', ')})", ""]
    out += ["| way | ms | p20..p80 | rate, size | ours is |", "|---|---:|---:|---:|---:|"]
    return [*out, *("| " + " | ".join(line) + " |" for line in case_lines(rows)), ""]


def _by_device(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [(device, [r for r in rows if r.device == device]) for device in sorted({r.device for r in rows})]


def results_block(rows: Sequence[Row]) -> str:
    """Markdown of all cases, device by device, a table each."""
    if not rows:
        return _NONE
    lines = []
    for device, here in _by_device(rows):
        lines += [f"### {device}", "", _device_note(here), ""]
        if bars(here):
            lines += [f"![time of every way over the limit's](figures/{figure_name(device, 'bars')})", ""]
        for (case, parameters, _), group in by_case(here).items():
            lines += _case_table(case, parameters, group)
    return "\n".join(lines)


def _summary_line(case: str, parameters: str, rows: Sequence[Row]) -> str | None:
    """Ours, and how many times as fast it is as the limit and as each rival of eager PyTorch, its compiler or NumPy."""
    times = {r.way: r for r in rows if r.metric == "time"}
    over = {r.metric.removeprefix("speed-up over "): r.p50 for r in rows if r.way == "ours"}
    if "ours" not in times:
        return None
    limit = limit_of(list(times))
    others = [way for way in times if way in over and way != limit and not way.startswith("ours")]
    rivals = [f"{way}: {shown_number(over[way])}x" for way in others]
    cells = [
        f"{case} ({parameters.replace(';', ', ')})",
        f"{shown_number(times['ours'].p50)} ms",
        f"{limit}: {shown_number(over[limit])}x" if limit in over else "",
        "; ".join(rivals),
    ]
    return f"| {' | '.join(cells)} |"


def summary_block(rows: Sequence[Row]) -> str:
    """Markdown of the leading cases, a line each, device by device."""
    if not rows:
        return _NONE
    lines = []
    for device, here in _by_device(rows):
        groups = sorted(by_case(r for r in here if r.case in _LEADING).items(), key=lambda g: _LEADING.index(g[0][0]))
        found = [_summary_line(case, parameters, group) for (case, parameters, _), group in groups]
        lines += [f"**{device}** ({_device_note(here).rstrip('.')})", ""]
        lines += ["| what | ours | ours over the limit | ours over the others |", "|---|---:|---|---|"]
        lines += [*(line for line in found if line), ""]
    return "\n".join(lines)


def short_lines(rows: Sequence[Row]) -> list[str]:
    """One line per case: ours, and how many times as fast as each other way it is."""
    lines = []
    for (case, parameters, _), group in by_case(rows).items():
        times = {r.way: r for r in group if r.metric == "time"}
        if "ours" not in times:
            lines += [f"{case} {way}: {shown_number(r.p50)} ms" for way, r in times.items()]
            continue
        ratios = [r for r in group if r.way == "ours" and r.metric.startswith("speed-up over ")]
        text = ", ".join(f"{r.metric.removeprefix('speed-up over ')} {shown_number(r.p50)}x" for r in ratios)
        lines.append(f"{case} [{parameters}]: {shown_number(times['ours'].p50)} ms; over {text}")
    return lines


def filled(page: str, rows: Sequence[Row]) -> str:
    """The page with its generated blocks written anew."""
    blocks = {"results": results_block(rows), "summary": summary_block(rows), "modelled": modelled_block()}
    return _BLOCK.sub(lambda m: m.group(1) + blocks[m.group(2)] + m.group(3), page)


def with_commits(rows: Sequence[Row], tree: Path) -> list[Row]:
    """Rows whose fingerprints are replaced by commits. InputError for a fingerprint that no recent commit has."""
    known: dict[str, str] = {}
    for commit in {row.commit for row in rows}:
        found = resolve(tree, commit) if commit.startswith("tree:") else commit
        if found is None or commit.startswith("release "):
            raise InputError(f"no recent commit is {commit}: the rows come from an edited tree or an installed package")
        known[commit] = found
    return [replace(row, commit=known[row.commit]) for row in rows]


def take(files: Sequence[Path], tree: Path) -> None:
    """Put result files of another machine into the checkout's own: all of them, or (InputError) none."""
    taken = {path: with_commits(read(path), tree) for path in files}
    for path, rows in taken.items():
        ResultFile(tree / RESULTS / path.name).record(rows)
        print(f"{path}: {len(rows)} rows into {RESULTS}/{path.name}")


def rewrite(tree: Path, check: bool) -> int:
    """Write the generated blocks and figures anew; with `check` only say which are not up to date, and return 1."""
    rows = recorded(tree)
    stale = []
    for name in PAGES:
        path = tree / name
        before = path.read_text(encoding="utf-8")
        after = filled(before, rows)
        if after != before:
            stale.append(name)
            if not check:
                path.write_text(after, encoding="utf-8")
    if check:
        print(
            "".join(f"{name} is not what the result files say; run python -m benchmarks.dev.report\n" for name in stale)
        )
        return 1 if stale else 0
    written = draw_all(rows, tree / FIGURES)
    print("\n".join(f"wrote {name}" for name in (*stale, *(p.relative_to(tree).as_posix() for p in written))))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dev.report", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="change nothing; 1 when a page is out of date")
    parser.add_argument("--short", action="store_true", help="print one line per case of the given files")
    parser.add_argument("files", nargs="*", type=Path, help="result files of another machine")
    given = parser.parse_args(argv)
    try:
        if given.short:
            print("\n".join(short_lines([row for path in given.files for row in read(path)])))
            return 0
        take(given.files, TREE)
        return rewrite(TREE, given.check)
    except (DwmError, ValueError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
