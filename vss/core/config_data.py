"""The recipe's section on data: which images, what their masks mean, and how they are shared out over splits."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vss.core.yaml12 import Section

Side = Annotated[int, Field(ge=1, le=16384)]
Colour = tuple[float, float, float]
Byte = Annotated[int, Field(ge=0, le=255)]
Rgb = tuple[Byte, Byte, Byte]
IGNORED = "ignore"
"""What `label_map` maps to where pixels are to be ignored."""


class DataOptions(Section):
    """How a folder is read, beside its layout. What is given here stays with the checkpoint."""

    classes: tuple[str, ...] = Field(
        default=(),
        description="names of the classes in order, or a file with one a line; none: those that the folder names",
    )
    ignore_index: int | None = Field(
        default=None, ge=0, lt=1 << 31, description="value in masks that is ignored, beside 255; its class is dropped"
    )
    label_map: str | dict[int | str, int | str] = Field(
        default={},
        description="classes that become others: old to new, each a name or a number, the old one that of masks, or "
        "ignore; camvid11: the usual 11 groups of the 32 classes of CamVid",
    )
    colors: str | dict[str, Rgb] = Field(
        default={}, description="R,G,B of every class in colour masks, by name, or a file (label_colors.txt, .csv)"
    )
    split: dict[Literal["train", "val", "test"], float | str] = Field(
        default={},
        description="fractions of the images (by a hash of their names, classes spread evenly) or files with one name "
        "a line, for train, val and test; a split of the folder without a fraction stays as it is; none: the folder's "
        "own, or 0.7, 0.15 and 0.15",
    )
    fold: str | None = Field(
        default=None,
        pattern=r"^[0-9]{1,3}/[0-9]{1,3}$",
        description="K/N, for cross-validation: val is part K of N of the images of train and val together (by a hash "
        "of their names, classes spread evenly), train the rest; null: as they are",
    )
    missing_mask: Literal["refuse", "sound"] = Field(
        default="refuse", description="what an image without a mask is: a fault, or one of value 0 throughout"
    )

    @field_validator("colors", mode="before")
    @classmethod
    def _triples(cls, value: Any) -> Any:
        """`R,G,B` of a flag is a text."""
        if not isinstance(value, dict):
            return value
        return {name: part.split(",") if isinstance(part, str) else part for name, part in value.items()}

    @field_validator("label_map", mode="after")
    @classmethod
    def _numbers(cls, value: str | dict[int | str, int | str]) -> Any:
        """JSON has no numbers for keys: `"255"` is 255."""
        if isinstance(value, str):
            return value
        return {_number(old): _number(new) for old, new in value.items()}

    @model_validator(mode="after")
    def _of_one_kind(self) -> DataOptions:
        parts = list(self.split.values())
        numbers = [part for part in parts if isinstance(part, float)]
        if numbers and len(numbers) < len(parts):
            raise ValueError("split mixes fractions and files; give one kind for all")
        if numbers and (min(numbers) <= 0 or not math.isclose(sum(numbers), 1, abs_tol=1e-6)):
            raise ValueError(f"the fractions of split add up to {sum(numbers):g}; expected 1, each above 0")
        if parts and "train" not in self.split:
            raise ValueError("split names no train; give a fraction or file for it")
        return self

    @field_validator("fold")
    @classmethod
    def _a_part(cls, value: str | None) -> str | None:
        number, count = map(int, (value or "1/2").split("/"))
        if not (count >= 2 and 1 <= number <= count):
            raise ValueError(f"fold is {value}; expected K/N with N of 2 or more and K from 1 to N, such as 1/5")
        return value

    def given(self) -> dict[str, Any]:
        """The options that were set, JSON-able; what a checkpoint keeps."""
        values = {name: getattr(self, name) for name in DataOptions.model_fields}
        found = DataOptions(**values).model_dump(mode="json", exclude_defaults=True)
        return {key: found[key] for key in sorted(found)}

    def said(self) -> dict[str, Any]:
        """The options that a recipe or flags named; of a recipe that names all of them, those that were changed."""
        names = DataOptions.model_fields.keys() & self.model_fields_set
        everything = len(names) == len(DataOptions.model_fields)
        return self.given() if everything else {name: getattr(self, name) for name in sorted(names)}


def _number(value: int | str) -> int | str:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class DataConfig(DataOptions):
    """Which images, at which size, how augmented."""

    dataset: str = Field(
        default="camvid",
        description="layout of the data set, see vss data layouts; auto: the one that the folder has",
    )
    root: str = Field(default="data", description="folder of the data set")
    size: tuple[Side, Side] | None = Field(
        default=None,
        description="H,W in pixels of every image that enters the network; null: that of the checkpoint, else 360x480 "
        "made larger to the next size that the network takes",
    )
    augment: dict[str, Any] = Field(
        default={}, description="scale, crop, hflip, brightness, contrast, saturation and hue of training images"
    )
    mean: Colour | None = Field(
        default=None, description="R,G,B, 0 to 1, that images are shifted by; null: that of the checkpoint or ImageNet"
    )
    std: Colour | None = Field(default=None, description="R,G,B, above 0, that they are then divided by; likewise")
    limit: int | None = Field(default=None, ge=1, description="use only the first images of each split")
    workers: int = Field(default=0, ge=0, le=1024, description="processes that read images; 0: the main one reads")
