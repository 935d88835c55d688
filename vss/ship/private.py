"""What of a run's records may leave the house: no folder of this machine, no command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

HOME_GROUND = {"home", "root", "Users", "mnt", "media", "srv", "data", "tmp", "var", "opt", "scratch", "workspace"}
COMMANDS = ("command", "commands")


def public(record: Mapping[str, Any], *folders: Path) -> dict[str, Any]:
    """A record without its command lines, whose texts name files by their last part alone.

    Args:
        record: a report with its recipe, or another tree of JSON values.
        folders: that must not be named; the home and the working folder are among them anyway.
    """
    recipe = record.get("recipe", {})
    known = {text for text in _texts(recipe) if text.startswith(("/", "~", ".")) and "/" in text}
    known |= {str(Path(text).expanduser().resolve()) for text in known}
    known |= {str(place.resolve()) for place in (*folders, Path.home(), Path.cwd()) if len(place.resolve().parts) > 1}
    grounds = HOME_GROUND | {place.name for place in Path("/").iterdir() if place.is_dir()}
    first = "|".join(map(re.escape, sorted(grounds)))
    literal = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    # a node of a network may be called "/down/conv", so a path begins with a folder that there is
    rest = r"""(?:/[^\s/'",;()<>]+)*/?"""
    pattern = re.compile(rf"(?<![\w./~-])(?:{literal}|/(?:{first})(?![\w.-]){rest}|~{rest}(?<=[^~])|[A-Z]:\\\S+)")

    def clean(text: str) -> str:
        return pattern.sub(lambda found: _name(found[0]), text)

    kept = {key: value for key, value in record.items() if key not in COMMANDS}
    cleaned: dict[str, Any] = _mapped({**kept, **({"recipe": _mapped(recipe, _name)} if recipe else {})}, clean)
    return cleaned


def _name(text: str) -> str:
    """The last part of a path, of either kind; other text as it is."""
    if "/" in text or text.startswith("~"):
        return PurePosixPath(text).name
    return PureWindowsPath(text).name if "\\" in text else text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The tree with every text changed, keys too."""
    if isinstance(value, Mapping):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
