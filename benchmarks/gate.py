"""Which areas of the library are red, from the report of a test run."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

EVERYTHING = "everything"
"""The area of a report that is missing or cannot be read."""


def red_areas(junit: Path) -> set[str]:
    """Names of test files with a failure or an error, tests/kernels/test_sample.py as "sample".

    A report that is missing, broken off or without a single test makes everything red.
    """
    try:
        cases = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {EVERYTHING}
    if not cases:
        return {EVERYTHING}
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    return {_area(f"{c.get('classname', '')} {c.get('name', '')}") for c in bad}


def _area(test: str) -> str:
    found = re.search(r"test_(\w+)", test)
    return found.group(1) if found else EVERYTHING
