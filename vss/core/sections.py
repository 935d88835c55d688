"""The larger sections of a recipe: which data, how they are trained on, and the phases between training and pruning."""

from __future__ import annotations

import math
import typing
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Side = Annotated[int, Field(ge=1, le=16384)]
Colour = tuple[float, float, float]
Byte = Annotated[int, Field(ge=0, le=255)]
Rgb = tuple[Byte, Byte, Byte]
IGNORED = "ignore"
"""What `label_map` maps to where pixels are to be ignored."""
TINY, HUGE = 2.0**-126, 3.4e38  # what float32, in which networks learn, can hold
Weight = Annotated[float, Field(ge=0, le=1e6)]  # of a part of a loss in 32 bits


class Section(BaseModel):
    """A part of a recipe; no unknown keys, no NaN or infinity, no truth value for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and not _takes_bool(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("Input should be no truth value")
        return value


def _takes_bool(annotation: object) -> bool:
    return annotation in (bool, Any) or any(_takes_bool(part) for part in typing.get_args(annotation))


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
    def _triples(cls, value: object) -> object:
        """`R,G,B` of a flag is a text."""
        if not isinstance(value, dict):
            return value
        return {name: part.split(",") if isinstance(part, str) else part for name, part in value.items()}

    @field_validator("label_map", mode="after")
    @classmethod
    def _numbers(cls, value: str | dict[int | str, int | str]) -> object:
        """JSON has no numbers for keys: `"255"` is 255."""
        if isinstance(value, str):
            return value
        return {_number(old): _number(new) for old, new in value.items()}

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
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


class FitConfig(Section):
    """One training or fine-tuning phase."""

    epochs: int = Field(default=50, ge=0, description="passes over the training images")
    batch_size: int = Field(default=8, ge=1, description="images per process and step")
    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="how weights are updated")
    lr: float = Field(default=0.01, ge=TINY, le=HUGE, description="highest learning rate, above 0")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd")
    weight_decay: float = Field(default=5e-4, ge=0, le=1000, description="pull of all weights towards zero")
    poly_power: float = Field(default=0.9, ge=0, le=100, description="lr falls as (1 - step/steps)^power")
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate rises")
    grad_clip: float | None = Field(default=None, gt=0, description="largest norm of all gradients; null: none")
    ema: float | None = Field(default=None, gt=0, lt=1, description="decay of the averaged weights; null: off")
    class_weights: Literal["none", "median", "log"] = Field(
        default="none", description="of the loss, by frequency: median over frequency, or 1 / log(1.02 + frequency)"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="of the loss: part of the truth that is uniform"
    )
    aux_weight: Weight = Field(default=0.4, description="weight of the loss of every auxiliary head")
    distill: Weight = Field(default=0.0, description="weight of the distillation loss from the unpruned network")
    temperature: float = Field(default=2.0, ge=0.01, le=1e6, description="of the distillation loss")
    freeze: tuple[str, ...] = Field(
        default=(), description="layers that are not trained, with what is below them; * stands for any part of a name"
    )
    freeze_norms: bool = Field(default=False, description="norm layers keep their statistics, scales and shifts")
    val_every: int = Field(
        default=1, ge=1, description="epochs between validations; the last epoch is always validated"
    )
    precision: Literal["auto", "32-true", "16-mixed", "bf16-mixed"] = Field(
        default="auto", description="auto: bf16-mixed where the hardware has it, else 32-true"
    )
    accelerator: str = Field(default="auto", description="of Lightning: auto, cpu or gpu")
    devices: int | str = Field(default="auto", description="number of devices of each machine, or auto")
    num_nodes: int = Field(default=1, ge=1, description="number of machines")
    strategy: str = Field(default="auto", description="of Lightning, such as ddp, for many devices")


class FinetuneConfig(FitConfig):
    """As `train`. Gradients are clipped: the first steps of a cut network, at a rate at which the whole one learns, may
    undo more of it than the cut did."""

    epochs: int = Field(default=20, ge=0, description="passes over the training images")
    lr: float = Field(default=0.005, ge=TINY, le=HUGE, description="highest learning rate, above 0")
    grad_clip: float | None = Field(default=1.0, gt=0, description="largest norm of all gradients; null: none")


class SparseConfig(Section):
    """The sparse phase of `slimming` and `fn`, between training and pruning; all else is as in `train`."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    epochs: int = Field(default=0, ge=0, description="0: none, and the run is labelled so")
    lr: float | None = Field(default=None, ge=TINY, le=HUGE, description="null: that of train")
    lambda_: Weight = Field(default=1e-4, alias="lambda", description="strength of the penalty on scales")
    group_lasso: bool = Field(default=True, description="coupled norm layers shrink together; false: each by itself")


class DmcpConfig(Section):
    """The search of `dmcp`, between training and pruning, for the budget of `prune`; all else is as in `train`.

    `warmup` of the steps train weights at many widths, the next `joint` train widths too, the rest leave widths alone.
    """

    epochs: int = Field(default=0, ge=0, description="0: none; then prune.options must give the widths")
    lr: float | None = Field(default=None, ge=TINY, le=HUGE, description="of the weights; null: that of train")
    order: str = Field(default="l1", description="criterion that orders channels before the search")
    min_width: float = Field(default=0.1, gt=0, le=1, description="fraction of each group that always stays")
    offset: float = Field(default=0.1, gt=0, le=1, description="fraction of a group in one block of its chain")
    form: Literal["sigmoid", "exp"] = Field(default="sigmoid", description="how alpha gives a probability")
    start: float = Field(default=3.7, description="first value of alpha; 3.7 is 0.9 of the width with sigmoid")
    optimizer: Literal["adam", "sgd"] = Field(default="adam", description="of alpha; sgd is Nesterov with momentum 0.9")
    alpha_lr: float = Field(default=0.02, ge=TINY, le=HUGE, description="falls to a fifth of it as a cosine")
    mac_weight: Weight = Field(default=0.1, description="weight of the cost loss")
    warmup: float = Field(default=0.2, ge=0, le=1, description="fraction of the steps that trains weights alone")
    joint: float = Field(default=0.6, ge=0, le=1, description="fraction of the steps that trains widths too")
    final: Literal["expected", "sampled"] = Field(
        default="expected", description="how the widths are chosen at the end"
    )
    tolerance: float = Field(default=0.01, gt=0, description="of sampled widths, relative to the budget")
    tries: int = Field(default=1000, ge=1, description="draws before the expected widths are taken instead")

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if self.warmup + self.joint > 1 + 1e-9:
            raise ValueError(f"warmup {self.warmup} and joint {self.joint} are more than all steps")
        return self


class DefectConfig(Section):
    """Networks that decide about defects (task defect); others do not read it. Bozic et al., 2021."""

    delta: Weight = Field(default=1.0, description="weight of the decision's loss")
    dynamic: bool = Field(default=True, description="move from the map's loss to the decision's over the epochs")
    gradient_multiplier: Weight = Field(
        default=0.0, description="of the decision's gradients into the map and its features, while training"
    )
    balance: bool = Field(default=True, description="defective and sound images by turns, equally many in an epoch")
    dilate: int = Field(
        default=15, ge=1, le=1023, description="training masks grow by a square of so many stored pixels, odd"
    )
    distance_power: float = Field(default=2.0, ge=0, le=100, description="how fast weights fall off towards the edge")
    distance_max: float = Field(default=3.0, gt=0, le=1e6, description="largest weight of a pixel, mid-defect")
    annotated: int | None = Field(
        default=None, ge=0, description="mixed supervision: so many defective training images have a mask; null: all"
    )
    split_file: str | None = Field(default=None, description="or those of a published split_weakly_N.pyb")
    threshold: Literal["f1", "fnr"] = Field(
        default="f1", description="chosen on validation: best F1, or highest with at most max_fnr_pct missed"
    )
    max_fnr_pct: float = Field(default=0.0, ge=0, lt=100, description="percent of defects that threshold fnr may miss")

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.annotated is not None and self.split_file is not None:
            raise ValueError("annotated and split_file both say which masks may be used; give one")
        return self
