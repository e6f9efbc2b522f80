"""Words that the findings of both wings share: what the images are, and what limits a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dwm_fast.pacs.data import CLASSES, DOMAINS


def data_name(results: Mapping[str, Any]) -> str:
    """The data set as it stands in a sentence: 'PACS', 'the procedural stand-in (not PACS)'."""
    name = str(results["data"]["name"])
    return name if results["data"]["real"] else f"the {name}"


def of_pacs(results: Mapping[str, Any]) -> bool:
    """Whether the images are PACS, which alone can be held against the published figures."""
    data = results["data"]
    return bool(data["real"]) and tuple(data["classes"]) == CLASSES and set(data["domains"]) <= set(DOMAINS)


def classes_differ(results: Mapping[str, Any]) -> bool:
    """Whether some domains have other classes than others."""
    return len({tuple(own) for own in results["data"].get("classes_of", {}).values()}) > 1


def classes_of(results: Mapping[str, Any], domain: str) -> list[str]:
    """Names of a domain's classes."""
    data = results["data"]
    return list(data.get("classes_of", {}).get(domain, data["classes"]))


def said_of(data: Mapping[str, Any]) -> str:
    """What images results have as `data`: 'CIFAR100: 60000 images, 100 classes, 1 domain; test images: ...'.

    Results of earlier releases, which did not count them, have their name alone.
    """
    if "images" not in data:
        return str(data["name"])
    count = len(data["domains"])
    split = f"; test images: {data['split']}" if data["split"] else ""
    domains = f"{count} domain{'s' * (count != 1)}"
    return f"{data['name']}: {data['images']} images, {len(data['classes'])} classes, {domains}{split}"


def limits(results: Mapping[str, Any], seeds: int, rivals: int, first: str, of: str, order: str = "") -> list[str]:
    """Sentences on what the numbers cannot tell: chance, the choice of the `first` among `rivals`, the images."""
    said = []
    if seeds == 1:
        said.append("With one seed there is no spread: small differences may be chance.")
    if rivals > 1:
        order = f", {order}" if order else ""
        said.append(f"The {first} is the highest of {rivals} {of} on these same test images{order}.")
    if not results["data"]["real"]:
        said.append("The images are procedural, not PACS: they test the pipeline, not the published findings.")
    return said
