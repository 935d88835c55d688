"""Which classes a data set has in the end: `classes`, `ignore_index` and `label_map` of the options over its own.

Also the tables of their colours: `label_colors.txt`, `labelmap.txt` (CVAT) and `.csv`.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vss.core.errors import VssError, counted, listed, shown, unknown
from vss.core.sections import IGNORED, DataOptions
from vss.data.base import (
    IGNORE,
    LabelTable,
    SegData,
    ValueTable,
    folded,
    generic_palette,
    read_class_names,
    read_lines,
    table_of,
)
from vss.data.masks import packed

GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "camvid11": {
        "Sky": ("Sky",),
        "Building": ("Archway", "Bridge", "Building", "Tunnel", "Wall"),
        "Pole": ("Column_Pole", "TrafficCone"),
        "Road": ("LaneMkgsDriv", "LaneMkgsNonDriv", "Road"),
        "Pavement": ("ParkingBlock", "RoadShoulder", "Sidewalk"),
        "Tree": ("Tree", "VegetationMisc"),
        "SignSymbol": ("Misc_Text", "SignSymbol", "TrafficLight"),
        "Fence": ("Fence",),
        "Car": ("Car", "OtherMoving", "SUVPickupTruck", "Train", "Truck_Bus"),
        "Pedestrian": ("Animal", "CartLuggagePram", "Child", "Pedestrian"),
        "Bicyclist": ("Bicyclist", "MotorcycleScooter"),
    }
}
"""Ready maps, new class -> old ones. camvid11: the grouping of the SegNet paper (MathWorks, camvidPixelLabelIDs)."""

Owners = dict[int, str | None]
"""{stored value: name of its class, None where it is ignored}."""

VOID_NAMES = frozenset({"void", "unlabeled", "unlabelled", "ignore", "ignored"})
"""Classes that are ignored where a table has two others."""

Colour = tuple[int, int, int]
FORM = "R G B NAME, one class a line"


def given_names(options: DataOptions, root: Path) -> tuple[str, ...]:
    """`data.classes`: names, or those in a file."""
    names = options.classes
    if len(names) == 1 and names[0].endswith(".txt"):
        return read_class_names(found_file(names[0], root, "data.classes"))
    twice = [name for i, name in enumerate(names) if folded(name) in map(folded, names[:i])]
    if twice:
        raise VssError(f"data.classes names {shown(twice[0])} twice; give every class once.")
    return names


def found_file(text: str, root: Path, key: str) -> Path:
    """A file of the options: below the data root, or a path by itself."""
    found = next((path for path in (root / text, Path(text)) if path.is_file()), None)
    if found is None:
        raise VssError(f"{key} names the file {text}, which is neither in {root} nor here; give its path.")
    return found


def with_classes(data: SegData, options: DataOptions) -> SegData:
    """The data set with the classes of the options. Raises `VssError` for what does not fit."""
    if not (options.classes or options.label_map or options.ignore_index is not None):
        return data
    if not isinstance(data.decode, LabelTable | ValueTable):
        raise VssError(f"the layout {data.name!r} decodes masks by itself; leave data.classes, data.label_map and "
                       "data.ignore_index off.")  # fmt: skip
    final = list(given_names(options, data.root))
    names = list(data.class_names)
    renamed = bool(final) and not options.label_map and data.numbered and len(final) == len(names)
    if renamed:
        names = final
    owners: Owners = {value: None if index == IGNORE else names[index] for value, index in data.decode.pairs.items()}
    if options.ignore_index is not None:
        _require_numbers(data, "data.ignore_index")
        owners[options.ignore_index] = None
    _apply(owners, label_map(options, names), names, final, data)
    used = {name for name in owners.values() if name is not None}
    order = final or _in_order(names, owners)
    if extra := [name for name in _in_order(names, owners) if name not in order]:
        raise VssError(
            f"data.classes leaves out {listed(map(shown, extra[:4]))} of {data.root}; add "
            f"{'it' if len(extra) == 1 else 'them'}, or say what becomes of pixels of that class: "
            f"--label-map {shown(extra[0])}={IGNORED} (data.label_map)."
        )
    if empty := [name for name in order if name not in used]:
        raise VssError(
            f"no value of the masks of {data.root} is {listed(map(shown, empty[:4]))}, which data.classes names; take "
            "the name out, or map a class to it (data.label_map)."
        )
    pairs = {value: IGNORE if name is None else order.index(name) for value, name in owners.items()}
    expected = f"those of {len(order)} classes" if not data.numbered else ", ".join(map(str, sorted(pairs)[:40]))
    colours = isinstance(data.decode, ValueTable) and data.decode.colours
    table = table_of(pairs, expected=data.decode.expected if colours else expected, colours=colours)
    return dataclasses.replace(
        data,
        class_names=tuple(order),
        palette=_palette(data, order),
        decode=table,
        protocol=data.protocol + f", {counted(len(order), 'class', 'classes')} by {_said(options)}",
    )


def _said(options: DataOptions) -> str:
    keys = [key for key in ("classes", "ignore_index", "label_map") if key in options.given()]
    return listed([f"data.{key}" for key in keys])


def _require_numbers(data: SegData, key: str) -> None:
    if not data.numbered:
        raise VssError(f"{key} gives a number, and classes of the layout {data.name!r} have names alone; use its name.")


def label_map(options: DataOptions, names: Sequence[str]) -> Mapping[int | str, int | str]:
    """`data.label_map`, a ready one written out for the classes that there are."""
    if not isinstance(options.label_map, str):
        return options.label_map
    if options.label_map not in GROUPS:
        raise unknown("ready label map", options.label_map, GROUPS)
    known = {folded(name): name for name in names}
    groups = {old: new for new, olds in GROUPS[options.label_map].items() for old in olds}
    return {known[folded(old)]: new for old, new in groups.items() if folded(old) in known}


def _apply(
    owners: Owners, wanted: Mapping[int | str, int | str], names: Sequence[str], final: Sequence[str], data: SegData
) -> None:
    """Let every old class of the map have its new name; all of them at once, so that names may be exchanged."""
    known = {folded(name): name for name in (*names, *final)}
    before = dict(owners)
    for old, new in wanted.items():
        target = _target(new, names, final, known)
        if isinstance(old, int):
            _require_numbers(data, "data.label_map")
            owners[old] = target
            continue
        values = [value for value, name in before.items() if name is not None and folded(name) == folded(old)]
        if not values:
            raise unknown(f"class in data.label_map of {data.root}", old, names)
        owners.update(dict.fromkeys(values, target))


def _target(new: int | str, names: Sequence[str], final: Sequence[str], known: Mapping[str, str]) -> str | None:
    if new == IGNORED:
        return None
    if isinstance(new, str):
        return known.get(folded(new), new)
    order = final or names
    if new >= len(order):
        raise VssError(f"data.label_map maps to class {new}, and there are {len(order)}; give 0 to {len(order) - 1}.")
    return order[new]


def _in_order(names: Sequence[str], owners: Owners) -> list[str]:
    """The names in use: those that the set had in their order, each old one's new name in its place; then the rest."""
    used = [owners[value] for value in sorted(owners)]
    kept = [name for name in names if name in used]
    return list(dict.fromkeys([*kept, *(name for name in used if name is not None)]))


def _palette(data: SegData, order: Sequence[str]) -> np.ndarray:
    """(K, 3) uint8: the colours that classes had, the generic ones for new names."""
    had = dict(zip(data.class_names, data.palette, strict=True))
    return np.array(
        [had.get(name, new) for name, new in zip(order, generic_palette(len(order)), strict=True)], np.uint8
    )


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
