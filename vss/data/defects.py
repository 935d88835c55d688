"""Defect images: is there a defect, where, how much each position of the map counts, and whose masks may be used."""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from vss.core.errors import VssError
from vss.core.files import require_file
from vss.data.base import IGNORE, Pair, SegData
from vss.data.counts import count_classes
from vss.data.transforms import Key, SegSplit

DEFECT = 1


def labels_of(data: SegData, pairs: Collection[Pair]) -> np.ndarray:
    """(n,) bool, True where the stored mask shows a defect; masks are read once."""
    return count_classes(data, list(pairs)).rows[:, DEFECT] > 0


def distance_weights(mask: np.ndarray, *, power: float = 2.0, maximum: float = 3.0) -> np.ndarray:
    """How much each pixel counts in the loss of the map (Bozic et al. 2021, section 3.2).

    Inside each defect (8-connected) the distance to its edge, divided by the largest one there, to the `power`, times
    `maximum`; 1 elsewhere, and where an image is all defect.

    Args:
        mask: (H, W) bool.

    Returns:
        (H, W) float32, from 0 to `maximum`.
    """
    weights = np.ones(mask.shape, np.float32)
    if not mask.any() or mask.all():
        return weights
    distance = ndimage.distance_transform_edt(mask)
    regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
    tops = np.concatenate([[1.0], ndimage.maximum(distance, regions, range(1, count + 1))])
    weights[mask] = (maximum * (distance / tops[regions]) ** power)[mask]
    return weights


def shrink(x: Tensor, stride: int) -> Tensor:
    """(H, W) float -> (H / stride, W / stride): mean over windows of 2 stride + 1, reflected at the border.

    This is how the published code brings mask and weights to the size of the map; a mask becomes soft.
    """
    padded = F.pad(x[None, None], (stride,) * 4, mode="reflect")
    return F.avg_pool2d(padded, 2 * stride + 1, stride=stride)[0, 0]


@dataclass(frozen=True)
class Targets:
    """How masks become targets of the map.

    Attributes:
        stride: image size / map size.
        dilate: side in stored pixels of the square by which masks grow, odd; 1 leaves them.
        power, maximum: see `distance_weights`.
        annotated: ids of the images whose mask may be used (mixed supervision); None: all.
    """

    stride: int = 8
    dilate: int = 1
    power: float = 2.0
    maximum: float = 3.0
    annotated: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if self.dilate < 1 or self.dilate % 2 == 0:
            raise VssError(f"defect.dilate is {self.dilate}; expected an odd number of pixels, 1 for none.")

    def of(self, mask: Tensor) -> dict[str, Tensor]:
        """(H, W) int64 with 0, 1 and 255 for void -> `target` and `weight`, (H / stride, W / stride) float32."""
        defect = mask == DEFECT
        weight = torch.from_numpy(distance_weights(defect.numpy(), power=self.power, maximum=self.maximum))
        weight[mask == IGNORE] = 0
        return {"target": shrink(defect.float(), self.stride), "weight": shrink(weight, self.stride)}


@dataclass(eq=False, repr=False)
class DefectSplit(SegSplit):
    """A `SegSplit` whose samples also have `label`: float32, 1 for a defect.

    With `targets` (training) samples have `target` and `weight`, see `Targets.of`, and `annotated`: float32, 0 where
    the map is not to be taught; their mask is the dilated one.
    """

    targets: Targets | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels = labels_of(self.data, self.pairs)

    def read(self, pair: Pair) -> tuple[Image.Image, np.ndarray]:
        """As stored; in training the mask is dilated."""
        image, mask = super().read(pair)
        if self.targets is not None and self.targets.dilate > 1:
            mask = ndimage.maximum_filter(mask, size=self.targets.dilate, mode="constant")
        return image, mask

    def __getitem__(self, key: Key) -> dict[str, Any]:
        item = super().__getitem__(key)
        item["label"] = torch.tensor(float(self.labels[item["index"]]))
        if self.targets is not None:
            known = self.targets.annotated
            taught = known is None or self.pairs[item["index"]].id in known
            item |= {**self.targets.of(item["mask"]), "annotated": torch.tensor(float(taught))}
        return item


def choose_annotated(data: SegData, pairs: Collection[Pair], count: int, *, seed: int = 0) -> frozenset[str]:
    """Ids whose masks may be used when `count` defective images have one: those, chosen by SHA-256 of seed and id,
    and all sound ones, whose masks are known to be empty."""
    labels = labels_of(data, pairs)
    defective = [pair.id for pair, label in zip(pairs, labels, strict=True) if label]
    if not 0 <= count <= len(defective):
        raise VssError(f"defect.annotated is {count}; expected 0..{len(defective)}, the defective training images.")
    defective.sort(key=lambda name: hashlib.sha256(f"annotated:{seed}:{name}".encode()).digest())
    sound = [pair.id for pair, label in zip(pairs, labels, strict=True) if not label]
    return frozenset(defective[:count]) | frozenset(sound)


# The published split files of mixed supervision (`split_weakly_N.pyb`), read without running what is in them.


MAX_BYTES = 4 << 20
HARMLESS = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET",
    "BINGET", "LONG_BINGET", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "NEWTRUE", "NEWFALSE", "TUPLE",
    "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "EMPTY_LIST", "APPEND", "APPENDS",
})  # fmt: skip
"""Instructions of the pickle format that only make or place numbers, booleans, lists and tuples."""

PLACES = frozenset({"PUT", "LONG_BINPUT"})
"""Those with a number that the standard reader makes room for: a large one would take all memory."""


class _Plain(pickle.Unpickler):
    """A second lock behind the first: no name is ever looked up."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("it asks for an object outside the file")


def read_split_file(path: Path | str) -> dict[str, dict[str, bool]]:
    """{"train": {id: has a pixel annotation}, "test": ...}; ids are the numbers as text.

    Raises:
        VssError: a missing, large or damaged file, one that holds more than numbers, or one of another structure.
    """
    path = Path(path)
    try:
        data = require_file(path, kind="split (split_*.pyb)", limit=MAX_BYTES).read_bytes()
    except OSError as error:
        raise VssError(f"split file {path} cannot be read ({error.strerror or error}); give a split_*.pyb.") from error
    value = _load(path, data)
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _structure(path)
    return {name: _part(path, part) for name, part in zip(("train", "test"), value, strict=True)}


def _load(path: Path, data: bytes) -> object:
    try:
        for code, value, _ in pickletools.genops(data):
            if code.name in PLACES and int(str(value)) > MAX_BYTES:
                raise VssError(f"split file {path} is damaged (place {value} in its table); get it again.")
            if code.name not in HARMLESS:
                raise VssError(
                    f"split file {path} holds more than lists of numbers (instruction {code.name}) and was not "
                    "loaded; get the published file, or give defect.annotated in its place."
                )
        return _Plain(io.BytesIO(data)).load()
    except VssError:
        raise
    except (pickle.UnpicklingError, ValueError, IndexError, EOFError, KeyError, TypeError, AttributeError,
            OverflowError, MemoryError, RecursionError) as error:  # fmt: skip
        # what the standard reader raises for damaged files; it has no common class for them
        raise VssError(f"split file {path} is damaged ({error}); get the published file again.") from error


def _part(path: Path, part: object) -> dict[str, bool]:
    if not isinstance(part, list | tuple):
        raise _structure(path)
    found: dict[str, bool] = {}
    for row in part:
        if not isinstance(row, list | tuple) or len(row) != 2:
            raise _structure(path)
        number, annotated = row
        if type(number) is not int or number < 0 or type(annotated) is not bool or str(number) in found:
            raise _structure(path)
        found[str(number)] = annotated
    return found


def _structure(path: Path) -> VssError:
    return VssError(
        f"split file {path} has another structure; expected two lists, train and test, of (image number, true or "
        "false), each number once."
    )
