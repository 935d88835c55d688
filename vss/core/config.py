"""Recipes: one YAML file says a whole run. Unknown keys are refused with the closest name."""

from __future__ import annotations

import os.path
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from vss.core.errors import VssError, unknown
from vss.core.yaml12 import Override, Section, overridden, parse, read_yaml

RECIPES = Path(__file__).parent.parent / "run" / "recipes"
TINY, HUGE = 2.0**-126, 3.4e38  # what float32, in which networks learn, can hold
Weight = Annotated[float, Field(ge=0, le=1e6)]  # of a part of a loss in 32 bits
Side = Annotated[int, Field(ge=1, le=16384)]


class DataConfig(Section):
    """Which images, at which size, how augmented."""

    dataset: str = Field(default="camvid", description="layout of the data set: camvid, cityscapes, ksdd2 or masks")
    root: str = Field(default="data", description="folder of the data set")
    size: tuple[Side, Side] | None = Field(
        default=None,
        description="H,W in pixels of every image that enters the network; null: that of the checkpoint, else 360x480 "
        "made larger to the next size that the network takes",
    )
    augment: dict[str, Any] = Field(
        default={}, description="scale, crop, hflip, brightness, contrast, saturation and hue of training images"
    )
    limit: int | None = Field(default=None, ge=1, description="use only the first images of each split")
    workers: int = Field(default=0, ge=0, le=1024, description="processes that read images; 0: the main one reads")


class ModelConfig(Section):
    """Which network, and where its first weights come from."""

    name: str = Field(default="unet", description="name of the network")
    options: dict[str, Any] = Field(default={}, description="options of the network, by name")
    backbone_weights: str | None = Field(default=None, description="file of weights that the backbone starts from")
    checkpoint: str | None = Field(default=None, description="start from this checkpoint and do not train")

    @field_validator("options")
    @classmethod
    def _classes_are_the_datas(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "num_classes" in value:
            raise ValueError("num_classes is no option; it is the number of classes of the data set")
        return value


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
    val_every: int = Field(default=1, ge=1, description="epochs between validations")
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


class Budget(Section):
    """How much may stay after pruning."""

    kind: Literal["channels", "params", "macs"] = Field(default="macs", description="what is counted")
    keep: float = Field(default=0.5, ge=0.001, le=1, description="largest fraction that stays")
    scope: Literal["global", "local"] = Field(
        default="global", description="rank all channels together, or cut the same fraction of every group"
    )
    floor: float = Field(default=0.1, ge=0, le=1, description="smallest fraction of a group that is kept")
    align: int | Literal["auto"] = Field(
        default=1, description="kept widths are multiples of this; auto: of what costs the target no extra kernels"
    )

    @field_validator("align", mode="before")
    @classmethod
    def _a_step(cls, value: Any) -> Any:
        if value == "auto" or (str(value).removesuffix(".0").isdecimal() and float(value) >= 1):
            return value
        raise ValueError("expected a whole number from 1, or auto")

    @model_validator(mode="after")
    def _floor_leaves_room(self) -> Self:
        if self.kind == "channels" and self.floor > self.keep:
            raise ValueError(f"floor {self.floor} is above keep {self.keep}")
        return self


class LatencyConfig(Section):
    """Prune to a measured time on `build.backend`, in place of the budget, of which `floor` and `align` still count."""

    target: str = Field(description="time to reach, measured: 0.5x of the uncut network's, or 12ms")
    device: Literal["", "cpu", "cuda"] = Field(default="", description="of backend torch, which runs on the cpu else")
    precision: Literal["fp32", "fp16", "int8"] = Field(default="fp32", description="of the engines that are timed")
    lut: str | None = Field(default=None, description="table of `vss lut build`; null: made in the run's folder")
    tolerance: float = Field(default=0.03, gt=0, lt=1, description="of the measured time")
    iterations: int = Field(default=6, ge=1, le=1000, description="engines that may be built")
    noise: float = Field(default=0.02, gt=0, lt=1, description="half the 95 % interval of a time that counts")
    max_seconds: float = Field(default=30.0, gt=0, le=86400, description="of one measurement")
    quick: bool = Field(default=False, description="a small table, for trying out")


class PruneConfig(Section):
    """How channels are scored and how many stay."""

    criterion: str = Field(default="taylor", description="what channels are scored by; `vss methods` lists them")
    options: dict[str, Any] = Field(default={}, description="options of the criterion, by name")
    budget: Budget = Budget()
    batches: int = Field(default=30, ge=1, description="calibration batches, from the training split")
    batch_size: int = Field(default=8, ge=1, description="images of a calibration batch")
    steps: int = Field(default=1, ge=1, le=20, description="rounds of scoring and cutting")
    epochs_between: int = Field(default=0, ge=0, description="fine-tuning epochs between rounds")
    recalibrate: int = Field(default=50, ge=0, description="batches for batch-norm statistics after the cut")
    keep: tuple[str, ...] = Field(default=(), description="layers whose channels are not cut")
    latency: LatencyConfig | None = None


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


class ExportConfig(Section):
    """What the ONNX file contains."""

    opset: int = Field(default=20, ge=18, le=25, description="version of the ONNX operators")
    labels: bool = Field(default=True, description="give class numbers, with the argmax in the file")
    labels_dtype: Literal["int32", "uint8"] = Field(default="int32", description="type of the class numbers")
    preprocess: bool = Field(default=True, description="take uint8 images, with the normalisation in the file")
    plugins: bool = Field(
        default=False, description="use the nodes of the TensorRT plugins, with bodies of standard ops"
    )


class PrecisionConfig(Section):
    """Which precisions the engines are made in besides float32, and how INT8 is calibrated and judged."""

    kinds: tuple[Literal["fp16", "int8"], ...] = Field(default=(), description="none: float32 alone")
    method: Literal["minmax", "percentile", "entropy"] = Field(
        default="percentile", description="how INT8 ranges come from the calibration images"
    )
    percent: float = Field(default=99.99, ge=50, le=100, description="of the magnitudes inside a percentile range")
    images: int = Field(default=64, ge=1, description="calibration images, from the training split, of every class")
    split: Literal["train"] = Field(default="train", description="of the calibration images; no other is allowed")
    image_list: str | None = Field(default=None, description="file with ids of calibration images, one a line")
    elsewhere: Literal["fp32", "fp16"] = Field(default="fp32", description="what is not INT8 in an INT8 file")
    first: bool = Field(default=True, description="INT8 in the layers at the input")
    last: bool = Field(default=False, description="INT8 in the layers at the outputs")
    keep: tuple[str, ...] = Field(default=(), description="layers that stay in floating point")
    max_drop: float = Field(default=0.5, ge=0, description="points that a precision may cost")
    search: bool = Field(default=True, description="where INT8 costs more, look for the layers to keep")
    groups: int = Field(default=16, ge=1, description="most groups of layers that the search tells apart")
    search_images: int = Field(default=64, ge=1, description="validation images that the search scores on")


class TensorRTConfig(Section):
    """How a TensorRT engine is built. Precision is none of it: it is that of the ONNX file."""

    workspace_mib: int | None = Field(
        default=None, ge=1, le=1 << 20, description="scratch memory of a layer in MiB; null: all there is"
    )
    optimisation_level: int | None = Field(
        default=None, ge=0, le=5, description="how long the fastest engine is searched for; null: TensorRT's own, 3"
    )
    tf32: bool = Field(default=True, description="float32 layers may use TF32")
    hardware: Literal["NONE", "SAME_COMPUTE_CAPABILITY", "AMPERE_PLUS"] = Field(
        default="NONE", description="other GPUs that the engine runs on"
    )
    version_compatible: bool = Field(default=False, description="the engine loads in newer releases of TensorRT too")
    flags: tuple[str, ...] = Field(default=(), description="further names of trt.BuilderFlag")
    plugins: tuple[Path, ...] = Field(
        default=(), description="libraries with plugins; what they implement replaces function bodies of the ONNX"
    )
    time_limit_s: int | None = Field(
        default=3600, ge=1, le=1 << 20, description="seconds after which a build is stopped"
    )


class OpenVINOConfig(Section):
    """Where and how OpenVINO runs a file."""

    device: str = Field(default="CPU", description="CPU, or another of its devices: GPU, GPU.1, NPU, AUTO")
    precision: Literal["f32", "bf16", "f16"] = Field(
        default="f32", description="what it computes in where the file says float32; all else is judged by the gate"
    )
    cache: Path | None = Field(default=None, description="folder of compiled models, so that a file opens faster")


class BuildConfig(Section):
    """Which runtime."""

    backend: str = Field(
        default="onnxruntime",
        description="runtime: onnxruntime, openvino, tensorrt, tensorrt_rtx, torch for timing, or for vss run auto: "
        "the fastest that is installed and passes the gate",
    )
    targets: tuple[str, ...] = Field(
        default=(), description="tensorrt_rtx: GPUs to build for, which need not be here, such as sm86 and sm89"
    )
    also: tuple[str, ...] = Field(
        default=(), description="further runtimes; engines for GPUs are built and not run, the others run as well"
    )
    threads: int | None = Field(default=None, ge=1, le=4096, description="CPU threads; null: one per usable core")
    tensorrt: TensorRTConfig = Field(default_factory=TensorRTConfig, description="read by tensorrt and tensorrt_rtx")
    openvino: OpenVINOConfig = Field(default_factory=OpenVINOConfig, description="read by openvino")


class GateConfig(Section):
    """Two gates: the engine equals its network, and the pruned engine keeps up with the baseline and the control."""

    metric: str | None = Field(default=None, description="null: that of the task, such as miou_pct or ap_pct")
    max_drop: float = Field(default=0.1, ge=0, description="points, engine against the same network in torch")
    max_drop_from_baseline: float | None = Field(
        default=1.0, ge=0, description="points, pruned engine against the baseline and the control; null: not judged"
    )
    max_fnr_increase: float | None = Field(
        default=None, ge=0, description="defect networks: points of missed defects on validation, against the same two"
    )
    max_ap_drop: float | None = Field(
        default=None, ge=0, description="defect networks: points of average precision on validation, likewise"
    )


class TimeLimits(Section):
    """How long to measure."""

    spread: float = Field(default=0.03, gt=0, description="of window medians, up to which a time is stable and printed")
    min_seconds: float = Field(default=2.0, gt=0, description="seconds that measuring takes at least")
    max_seconds: float = Field(default=30.0, gt=0, le=86400, description="seconds after which measuring ends, above 0")

    @model_validator(mode="after")
    def _there_is_time(self) -> Self:
        if self.min_seconds > self.max_seconds:
            raise ValueError(f"min_seconds {self.min_seconds} is above max_seconds {self.max_seconds}")
        return self

    def limits(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in TimeLimits.model_fields}


class BenchConfig(TimeLimits):
    """How long to measure, and where."""

    cores: tuple[int, ...] | None = Field(default=None, description="numbers of the cores that threads are pinned to")
    batch_size: int = Field(default=1, ge=1, le=65536, description="images per call")
    images: int = Field(default=16, ge=1, description="real images that go round")


class Recipe(Section):
    """A whole run: train, prune, fine-tune, evaluate, export, build, gate, bench, report."""

    name: str = Field(default="run", description="of the run, in its report and folder")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of everything that is random")
    split: Literal["val", "test"] = Field(default="test", description="split of the reported numbers")
    eval_batch_size: int = Field(default=8, ge=1, le=65536, description="images of a batch while scoring")
    control: bool = Field(default=True, description="also fine-tune the unpruned net, for a fair comparison")
    panels: int = Field(default=4, ge=0, description="qualitative pictures in the report")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    references: tuple[ModelConfig, ...] = Field(default=(), description="unpruned networks, to see whether to prune")
    train: FitConfig = FitConfig()
    sparse: SparseConfig = SparseConfig()
    dmcp: DmcpConfig = DmcpConfig()
    prune: PruneConfig = PruneConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    defect: DefectConfig = DefectConfig()
    export: ExportConfig = ExportConfig()
    precision: PrecisionConfig = PrecisionConfig()
    build: BuildConfig = BuildConfig()
    gate: GateConfig = GateConfig()
    bench: BenchConfig = BenchConfig()


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(
    name: str | None, overrides: Iterable[Override] = (), *, flags: Mapping[str, str] | None = None
) -> Recipe:
    """Read a packaged recipe by name or any YAML file by path (None: the defaults), then apply overrides.

    `flags` are the options of the command line that gave overrides, by dotted key: faults name them.
    """
    data, source = dict[str, Any](), "the command line"
    if name is not None:
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            if name not in recipes():
                raise unknown("recipe", name, recipes())
            path = RECIPES / f"{name}.yaml"
        if not os.path.exists(path):
            raise VssError(f"recipe {path} does not exist; packaged ones: {', '.join(recipes())}.")
        data, source = {"name": path.stem} | read_yaml(path, kind="recipe"), str(path)
    recipe: Recipe = parse(Recipe, overridden(data, overrides), source=source, flags=flags)
    return recipe
