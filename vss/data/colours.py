"""Tables of the colours of classes: `label_colors.txt`, `labelmap.txt` (CVAT) and `.csv`."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from vss.core.errors import VssError, shown
from vss.data.base import IGNORE, ValueTable, folded, read_lines
from vss.data.masks import packed

VOID_NAMES = frozenset({"void", "unlabeled", "unlabelled", "ignore", "ignored"})
"""Classes that are ignored where a table has two others."""

Colour = tuple[int, int, int]
FORM = "R G B NAME, one class a line"


def read_colours(path: Path) -> dict[str, Colour]:
    """{class: its colour}, in the order of the file.

    Raises:
        VssError: a line of another form, a number above 255, a class or a colour given twice.
    """
    lines = read_lines(path, FORM)
    rows = _csv_rows(path, lines) if path.suffix.lower() == ".csv" else _text_rows(path, lines)
    found: dict[str, Colour] = {}
    for number, name, numbers in rows:
        if any(value > 255 for value in numbers):
            raise VssError(f"line {number} of {path} has a colour above 255; expected {FORM}.")
        if name in found:
            raise VssError(f"line {number} of {path} names {shown(name)} again; give every class one colour.")
        found[name] = (numbers[0], numbers[1], numbers[2])
    if not found:
        raise VssError(f"{path} names no class; expected {FORM}.")
    return found


def _text_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, str, list[int]]]:
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        if match := re.fullmatch(r"([^:]+):(\d+),(\d+),(\d+)(:.*)?", line):  # CVAT: name:r,g,b:parts:actions
            name, numbers = match[1], match.groups()[1:4]
        elif match := re.fullmatch(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\S.*)", line):
            name, numbers = match[4], match.groups()[:3]
        elif match := re.fullmatch(r"(.*\S)[\s,:]+(\d+)[\s,]+(\d+)[\s,]+(\d+)", line):
            name, numbers = match[1], match.groups()[1:4]
        else:
            raise VssError(f"line {number} of {path} is {shown(line)}; expected {FORM}.")
        yield number, name.strip(" ,:"), [int(value) for value in numbers]


def _csv_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, str, list[int]]]:
    """Columns r, g, b and name by their heads; without heads the first is the name."""
    table = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    heads = [cell.casefold() for cell in table[0]] if table else []
    columns = [next((i for i, head in enumerate(heads) if head in names), None)
               for names in (("name", "class", "label"), ("r", "red"), ("g", "green"), ("b", "blue"))]  # fmt: skip
    headed = None not in columns
    places = [i for i in columns if i is not None] if headed else [0, 1, 2, 3]
    for number, row in enumerate(table, start=1):
        if not row or (headed and number == 1):
            continue
        cells = [row[i] for i in places if i < len(row)]
        if len(cells) < 4 or not all(cell.isdecimal() for cell in cells[1:]):
            raise VssError(f"line {number} of {path} is {shown(','.join(row))}; expected name,r,g,b.")
        yield number, cells[0], [int(cell) for cell in cells[1:]]


def colours_of(
    table: Mapping[str, Colour], mapped: Collection[int | str] = ()
) -> tuple[tuple[str, ...], np.ndarray, ValueTable]:
    """(class names, palette, what decodes a `ColourFile`).

    A class of `VOID_NAMES` is ignored where two others are, unless it is one of the `mapped`, of which
    `data.label_map` says what they are.
    """
    said = {folded(str(name)) for name in mapped}
    names = [name for name in table if folded(name) not in VOID_NAMES - said]
    if len(names) < 2:
        names = list(table)
    if len(names) > IGNORE:
        raise VssError(f"the table of colours names {len(names)} classes; expected at most {IGNORE}.")
    owner: dict[Colour, str] = {}
    for name, colour in table.items():
        if owner.setdefault(colour, name) != name:
            raise VssError(f"the table of colours gives {shown(owner[colour])} and {shown(name)} one colour, {colour}; "
                           "correct it.")  # fmt: skip
    pairs = {packed(colour): names.index(name) if name in names else IGNORE for name, colour in table.items()}
    palette = np.array([table[name] for name in names], np.uint8)
    some = ", ".join(f"{','.join(map(str, colour))} ({name})" for name, colour in list(table.items())[:4])
    expected = f"the {len(table)} colours of the table, {some}" + (", ..." if len(table) > 4 else "")
    return tuple(names), palette, ValueTable(pairs, expected, colours=True)
