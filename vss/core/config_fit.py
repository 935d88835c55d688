"""What a recipe says of training, fine-tuning, and the phases between them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from vss.core.yaml12 import Section

TINY, HUGE = 2.0**-126, 3.4e38  # what float32, in which networks learn, can hold
Weight = Annotated[float, Field(ge=0, le=1e6)]  # of a part of a loss in 32 bits


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
