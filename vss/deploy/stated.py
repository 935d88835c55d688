"""What an exported file says of the images it takes: size, mean, std and channel order travel in its metadata.

Every runtime's session gives the metadata of its file, so that no engine is ever fed by a guess.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

from vss.core.errors import VssError, shown
from vss.core.files import parse_json

KEY = "vss.preprocess"
ORDER = "RGB"
FIELDS = ("size", "mean", "std", "order")


class Images(Protocol):
    """What is used of `vss.data.transforms.Preprocess`."""

    @property
    def mean(self) -> tuple[float, float, float]: ...
    @property
    def std(self) -> tuple[float, float, float]: ...


def text_of(images: Images, size: tuple[int, int]) -> str:
    """The value of `KEY` in a file that takes images of `size`, (H, W)."""
    values = {"size": list(size), "mean": list(images.mean), "std": list(images.std), "order": ORDER}
    return json.dumps(values)


def stated(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """{"size", "mean", "std"} of a file's metadata, as `vss.data.transforms.Preprocess` takes them; None where the file
    says nothing.

    Raises:
        VssError: a value that is damaged, or another channel order than RGB.
    """
    if KEY not in metadata:
        return None
    values = parse_json(metadata[KEY], source=f"the file's metadata {KEY}", kind="vss export")
    numbers = {"size": (2, int), "mean": (3, float), "std": (3, float)}
    if (
        not isinstance(values, dict)
        or set(values) != set(FIELDS)
        or not all(
            isinstance(values[key], list)
            and len(values[key]) == count
            and all(type(each) in (int, kind) and math.isfinite(each) for each in values[key])
            for key, (count, kind) in numbers.items()
        )
    ):
        raise VssError(f"the file's metadata {KEY} is {shown(values)}; expected {', '.join(FIELDS)}: export it again.")
    if values.pop("order") != ORDER:
        raise VssError(
            f"the file takes channels in another order than {ORDER}, which vss does not feed; export it again."
        )
    return values
