"""Runs of the study -> docs/results and docs/methods: what was run and what it gave; no figure is typed by hand.

python -m benchmarks.dev.record RUN NAME COMMIT    take a run folder in as docs/results/NAME
python -m benchmarks.dev.record                    write the pages' generated blocks anew

docs/results/README.md shows every run; the page of a method, between `<!-- generated: found METHOD -->` and
`<!-- end generated -->`, its lines of every sequence.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from dwm_fast.pacs.pairs import finding, published, table
from dwm_fast.pacs.sequence import finding as sequence_finding
from dwm_fast.pacs.sequence import table as sequence_table
from dwm_fast.pacs.tables import number

from .checkout import TREE

RESULTS = Path("docs/results")
METHODS = Path("docs/methods")
_BLOCK = re.compile(r"(<!-- generated: runs -->\n).*?(<!-- end generated -->)", re.DOTALL)
_FOUND = re.compile(r"(<!-- generated: found ([\w-]+) -->\n).*?(<!-- end generated -->)", re.DOTALL)
_PATHS = ("data", "splits", "weights")


def taken(results: Mapping[str, Any], commit: str) -> dict[str, Any]:
    """The results as they are kept: with the commit, and without the folders of the machine they were made on."""
    config = dict(results["config"])
    for key in _PATHS:
        if config.get(key):
            config[key] = PurePath(config[key]).name
    return {**results, "config": config, "versions": {**results["versions"], "commit": commit}}


def tables(results: Mapping[str, Any]) -> str:
    """The run's tables, Markdown."""
    if results.get("kind") == "sequence":
        whole = sequence_table.to_markdown(sequence_table.sequence_table(results))
        return whole + sequence_table.orders_markdown(results)
    return "\n".join([table.to_markdown(table.paper_table(results)), published.beside_published(results)])


def words(results: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences."""
    if results.get("kind") == "sequence":
        return sequence_finding.finding(results)
    return finding.finding(results)


def section(name: str, results: Mapping[str, Any]) -> str:
    """One run's part of the page."""
    config, versions = results["config"], results["versions"]
    made = ", ".join(f"{key} {versions[key]}" for key in ("torch", "python", "commit"))
    facts = (
        f"{results['data']['name']}, {config['backbone']}, images of {config['image_size']} px, training crops of "
        f"{config['train_size']} px; {versions['device']}; {made}. "
        f"[Configuration]({name}/config.json), [everything measured]({name}/results.json)."
    )
    return "\n\n".join([f"## {name}", facts, " ".join(words(results)), tables(results).strip()]) + "\n"


def page(text: str, folder: Path) -> str:
    """The page's text with its generated block written anew from the runs in `folder`."""
    body = "\n".join(section(name, results) for name, results in runs_in(folder).items())
    return _BLOCK.sub(lambda m: m.group(1) + "\n" + body + "\n" + m.group(2), text)


def runs_in(folder: Path) -> dict[str, Any]:
    """Name of a recorded run -> its results."""
    return {p.parent.name: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*/results.json"))}


def _found_in(name: str, results: Mapping[str, Any], method: str) -> list[str]:
    """What a recorded sequence gave for a method, beside plain fine-tuning: a list item for each view."""
    rows = sequence_table.sequence_table(results)
    plain = next((row for row in rows if row.method == "none"), None)
    lines = []
    for row in (row for row in rows if row.method == method):
        ends = ", ".join(f"{domain} {number(value)}" for domain, value in row.final.items())
        view = "" if row.view == "shared" else f", view {row.view}"
        beside = ""
        if plain is not None and method != "none":
            beside = f" (plain fine-tuning: {number(plain.average)} and {number(plain.forgetting, True)})"
        lines.append(
            f"- [{name}](../results/README.md#{name}){view}: {ends} after the last domain; average "
            f"{number(row.average)}, forgetting {number(row.forgetting, True)}{beside}; "
            f"{sequence_table.storage(row.bits_added)} a domain added."
        )
    return lines


def method_page(text: str, runs: Mapping[str, Any]) -> str:
    """A method's page with its generated block written anew."""

    def block(match: re.Match[str]) -> str:
        sequences = {name: results for name, results in runs.items() if results.get("kind") == "sequence"}
        lines = [line for name, results in sequences.items() for line in _found_in(name, results, match.group(2))]
        body = "\n".join(lines) or "- In no recorded sequence yet."
        return f"{match.group(1)}{body}\n{match.group(3)}"

    return _FOUND.sub(block, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dev.record", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run", nargs="?", type=Path, help="run folder of dwm-fast pacs")
    parser.add_argument("name", nargs="?", help="its name in docs/results")
    parser.add_argument("commit", nargs="?", help="the commit that ran")
    given = parser.parse_args(argv)
    if given.run is not None:
        if not given.name or not given.commit:
            parser.error("RUN needs a NAME and the COMMIT that ran")
        results = taken(json.loads((given.run / "results.json").read_text(encoding="utf-8")), given.commit)
        folder = TREE / RESULTS / given.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(results["config"], indent=1) + "\n", encoding="utf-8")
    readme = TREE / RESULTS / "README.md"
    readme.write_text(page(readme.read_text(encoding="utf-8"), TREE / RESULTS), encoding="utf-8")
    for path in sorted((TREE / METHODS).glob("*.md")):
        path.write_text(method_page(path.read_text(encoding="utf-8"), runs_in(TREE / RESULTS)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
