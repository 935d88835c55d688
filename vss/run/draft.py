"""A recipe in the making, as text: every key under the reason why it is so, and at the head what is in the folder."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vss.core.config import Recipe
from vss.core.errors import counted
from vss.core.yaml12 import flow, overridden, parse

Json = dict[str, Any]
WIDTH = 110
LISTED = 40
"""Classes that a recipe lists."""


@dataclass
class Draft:
    """A recipe in the making: dotted keys, each with its value and why it is so."""

    values: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def set(self, key: str, value: Any, why: str) -> None:
        self.values[key], self.why[key] = value, why

    def recipe(self, name: str) -> Recipe:
        found: Recipe = parse(Recipe, overridden({"name": name}, self.values.items()), source="the new recipe")
        return found

    def text(self, head: str) -> str:
        """YAML with comments; sections in the order of `Recipe`, keys without a section first."""
        order = list(Recipe.model_fields)
        lines, above = [f"# {line}".rstrip() for line in head.splitlines()], list[str]()
        for key in sorted(self.values, key=lambda key: ("." in key, order.index(key.partition(".")[0]))):
            *parents, leaf = key.split(".")
            same = sum(parents[: i + 1] == above[: i + 1] for i in range(len(parents)))
            if not parents or not same:
                lines.append("")
            for depth in range(same, len(parents)):
                lines.append(f"{'  ' * depth}{parents[depth]}:")
            indent = "  " * len(parents)
            lines += [f"{indent}# {line}" for line in textwrap.wrap(self.why[key], WIDTH - len(indent))]
            lines.append(f"{indent}{leaf}: {flow(self.values[key])}")
            above = parents
        return "\n".join(lines) + "\n"


def in_words(seconds: float) -> str:
    """A time as people say it.

    >>> in_words(20), in_words(1000), in_words(9000)
    ('1 minute', '17 minutes', '2.5 hours')
    """
    if seconds < 5400:
        return counted(max(1, round(seconds / 60)), "minute")
    return f"{seconds / 3600:.1f} hours"


def head(root: str, figures: Json, to: Path, seconds: float, machine: object) -> str:
    """The comment above the recipe: what it is for, what is in the folder, what to do next."""
    images = ", ".join(f"{facts['pairs']} {split}" for split, facts in figures["splits"].items())
    lines = [
        f"Written by vss init for {root}: {images} images, layout {figures['dataset']}.",
        f"Next: vss run {to} (train, prune, fine-tune, export, gate, time), which ends in runs/{to.stem}/report.html.",
        f"Training takes about {in_words(seconds)} on {machine}; stopped, the same command goes on.",
        "All other keys have their defaults: vss run RECIPE --dry-run prints them.",
        "",
        *class_table(figures["splits"]),
    ]
    for warning in figures["warnings"]:
        lines += ["", *textwrap.wrap(f"Note: {warning}.", WIDTH)]
    return "\n".join(lines)


def class_table(splits: Mapping[str, Json]) -> list[str]:
    """Every class with its share of the labelled pixels and the images that show it, over all splits."""
    names = list(next(iter(splits.values()))["classes"])
    pixels, images = (
        {name: sum(facts["classes"][name][key] for facts in splits.values()) for name in names}
        for key in ("pixels", "images")
    )
    total, shown = max(1, sum(pixels.values())), names
    if len(names) > LISTED:
        kept = set(sorted(names, key=lambda name: -pixels[name])[:LISTED])
        shown = [name for name in names if name in kept]
    width = max(len("class"), *(len(name) for name in shown))
    rows = [f"{name:<{width}}  {100 * pixels[name] / total:7.2f}  {images[name]:7}" for name in shown]
    more = [f"and {counted(len(names) - len(shown), 'class', 'classes')} of fewer pixels"] if shown != names else []
    return [f"{'class':<{width}}  pixels %   images", *rows, *more]
