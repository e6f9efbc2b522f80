"""Runs of the study -> docs/results: what was run, what it gave, and one page, so that no figure is typed by hand.

python -m benchmarks.record RUN NAME COMMIT    take a run folder in as docs/results/NAME
python -m benchmarks.record                    write the page's generated block anew
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from dwm_fast.pacs import finding, sequence_finding, sequence_table, table

from .checkout import TREE

RESULTS = Path("docs/results")
_BLOCK = re.compile(r"(<!-- generated: runs -->\n).*?(<!-- end generated -->)", re.DOTALL)
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
        return sequence_table.to_markdown(sequence_table.sequence_table(results))
    return table.to_markdown(table.paper_table(results))


def words(results: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences."""
    return (sequence_finding if results.get("kind") == "sequence" else finding).finding(results)


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
    runs = {p.parent.name: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*/results.json"))}
    body = "\n".join(section(name, results) for name, results in runs.items())
    return _BLOCK.sub(lambda m: m.group(1) + "\n" + body + "\n" + m.group(2), text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=(__doc__ or "").splitlines()[0])
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
