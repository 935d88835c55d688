"""Which layout a folder has, told from its names alone, and the list of classes beside it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from vss.core.errors import VssError
from vss.core.files import MAX_JSON, require_file
from vss.data.labels import IGNORE, folded

SPLITS = ("train", "val", "test")

LAYOUTS: dict[str, tuple[Callable[[Path], bool], str]] = {
    "cityscapes": (
        lambda root: (root / "leftImg8bit").is_dir(),
        "leftImg8bit/{train,val,test}/CITY/*_leftImg8bit.png and gtFine/...",
    ),
    "masks": (
        lambda root: (root / "images").is_dir() and (root / "masks").is_dir(),
        "images/SPLIT/, masks/SPLIT/ and classes.txt",
    ),
    "camvid": (
        lambda root: any((root / f"{split}annot").is_dir() for split in SPLITS),
        "{train,val,test}/NAME.* and {train,val,test}annot/NAME.png",
    ),
    "ksdd2": (
        lambda root: any(next((root / split).glob("*_GT*.*"), None) is not None for split in SPLITS),
        "{train,test}/NAME.png and {train,test}/NAME_GT.png",
    ),
}
"""Layout name -> (does a folder look like it, what it consists of)."""

DRAWINGS = {name: f"expected {parts}" for name, (_, parts) in LAYOUTS.items()} | {
    "masks": "expected images/train/NAME.*, images/val/NAME.*, images/test/NAME.*, the same names as PNG below "
    "masks/train, masks/val and masks/test (8-bit grey or palette, values 0..K-1, 255 is ignored), and classes.txt "
    "with K names, one a line, the first for 0"
}
"""Layout name -> what to put where, for sentences."""


PLACES = {
    "cityscapes": "leftImg8bit/{0} and gtFine/{0} with labels",
    "masks": "images/{0} and masks/{0}",
    "camvid": "{0} and {0}annot",
    "ksdd2": "{0}/NAME.png and {0}/NAME_GT.png",
}
"""Layout name -> where a split lies."""


def absent_split(layout: str, split: str, known: Iterable[str]) -> str:
    """Half a sentence about one of `SPLITS` that a data set does not have: what there is, what to add or to change."""
    known = list(known)
    place = PLACES[layout].format(split) if layout in PLACES else f"images and masks for {split!r}"
    needs = {"train": f"training needs {place}", "val": f"training (and --split val) needs {place}"}
    other = ", or report on val with --split val (in a recipe, split: val)" if "val" in known else ""
    return f"no split {split!r} (it has {', '.join(known) or 'none'}); " + needs.get(
        split, f"the scores that are reported need {place}{other}"
    )


def guess_layout(root: Path | str) -> str | None:
    """The name of the built-in layout that a folder looks like, or None."""
    root = Path(root)
    return next((name for name, (looks_like, _) in LAYOUTS.items() if looks_like(root)), None)


def require_layout(root: Path, name: str) -> None:
    """Refuse a folder that does not look like the layout `name`; says what it looks like instead."""
    looks_like, expected = LAYOUTS[name]
    if looks_like(root):
        return
    other = guess_layout(root)
    inside = [child for child in sorted(root.iterdir()) if child.is_dir() and guess_layout(child)]
    if other is not None:
        advice = f"it looks like {other!r}: choose that dataset"
    elif inside:
        advice = f"{inside[0]} inside it looks like {guess_layout(inside[0])!r}: give that folder"
    else:
        advice = f"give the folder that holds these, or one of another layout ({', '.join(LAYOUTS)})"
    raise VssError(f"{root} is not laid out as {name!r} ({expected}); {advice}.")


def read_lines(path: Path, expected: str) -> list[str]:
    """Stripped lines of a text file in UTF-8, with or without a byte order mark, in composed form (NFC)."""
    if path.exists():
        require_file(path, kind="text", limit=MAX_JSON)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VssError(f"{path} cannot be read ({reason}); expected a text file in UTF-8 with {expected}.") from error
    return [line.strip() for line in unicodedata.normalize("NFC", text).splitlines()]


def read_class_names(path: Path) -> tuple[str, ...]:
    """One class name a line, the first that of value 0; blank lines may stand at the end alone, since they count."""
    lines = read_lines(path, "one class name a line, the first for mask value 0")
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise VssError(
            f"line {lines.index('') + 1} of {path} is blank, and mask values are line numbers from 0; name the class, "
            "or remove the line if the masks count without it."
        )
    different = len({folded(name) for name in lines})
    if not lines or different != len(lines) or len(lines) > IGNORE:
        raise VssError(f"{path} holds {len(lines)} names, {different} different; expected 1..255 different names.")
    return tuple(lines)
