"""Which layout a folder has, told from its names alone, and the list of classes beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vss.data.labels import IGNORE
from vss.errors import VssError

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


def read_class_names(path: Path) -> tuple[str, ...]:
    """One class name a line; blank lines do not count."""
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise VssError(f"{path} cannot be read ({error}); expected a text file with one class name a line.") from error
    if not names or len(set(names)) != len(names) or len(names) > IGNORE:
        raise VssError(
            f"{path} holds {len(names)} names, {len(set(names))} different; expected 1..255 different names."
        )
    return names
