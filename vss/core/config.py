"""Recipes: one YAML file says a whole run. Unknown keys are refused with the closest name."""

from __future__ import annotations

import os.path
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vss.core.errors import VssError, unknown
from vss.core.sections import DataConfig as DataConfig
from vss.core.sections import DataOptions as DataOptions
from vss.core.sections import DefectConfig as DefectConfig
from vss.core.sections import DmcpConfig as DmcpConfig
from vss.core.sections import FinetuneConfig as FinetuneConfig
from vss.core.sections import FitConfig as FitConfig
from vss.core.sections import Section as Section
from vss.core.sections import SparseConfig as SparseConfig
from vss.core.yaml12 import Override, overridden, parse, read_yaml

RECIPES = Path(__file__).parent.parent / "run" / "recipes"


class ModelConfig(Section):
    """Which network, and where its first weights come from."""

    name: str = Field(default="unet", description="name of the network")
    factory: str | None = Field(
        default=None,
        description="function of yours that builds the network, MODULE:NAME, in place of the name; it runs your code",
    )
    options: dict[str, Any] = Field(default={}, description="options of the network or of the function, by name")
    backbone_weights: str | None = Field(default=None, description="file of weights that the backbone starts from")
    weights: str | None = Field(default=None, description="file of weights that the whole network starts from")
    checkpoint: str | None = Field(default=None, description="start from this checkpoint and do not train")
    replace_head: bool = Field(
        default=False, description="weights or checkpoint are of other classes: layers of other sizes start anew"
    )

    @model_validator(mode="after")
    def _one_network(self) -> Self:
        if self.factory is None:
            if "num_classes" in self.options:
                raise ValueError("num_classes is no option; it is the number of classes of the data set")
        elif "name" in self.model_fields_set and self.name not in ("unet", self.factory):
            raise ValueError(f"name {self.name!r} and factory {self.factory!r} both say which network; give one")
        else:
            object.__setattr__(self, "name", self.factory)
        sources = [key for key in ("checkpoint", "weights", "backbone_weights") if getattr(self, key)]
        if len(sources) > 1:
            raise ValueError(f"{sources[0]} and {sources[1]} both say where weights come from; give one")
        return self


class Budget(Section):
    """How much may stay after pruning."""

    kind: Literal["channels", "params", "macs"] = Field(default="macs", description="what is counted")
    keep: float = Field(default=0.5, ge=0.001, le=1, description="largest fraction that stays")
    scope: Literal["auto", "global", "local", "isomorphic"] = Field(
        default="auto",
        description="global: all channels are ranked together; local: every group loses the same fraction; isomorphic: "
        "groups of equal structure are ranked together and each such set loses the same fraction; auto: as the "
        "criterion was published",
    )
    floor: float = Field(default=0.1, ge=0, le=1, description="smallest fraction of a group that is kept")
    ratios: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default={},
        description="fraction of the channels of some layers that is removed, by name or pattern, such as "
        "decoder.*; the last that fits a layer counts, and all others are cut to the budget",
    )
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
    keep: tuple[str, ...] = Field(
        default=(), description="layers whose channels are not cut; * stands for any part of a name"
    )
    widths: str | None = Field(
        default=None,
        description="in place of the budget's own: keep the widths of this plan (a plan.json), or those that this "
        "criterion would keep; `criterion` says which channels",
    )
    latency: LatencyConfig | None = None

    @property
    def lender(self) -> str | None:
        """The plan file whose widths are kept; None where `widths` names a criterion, or nothing."""
        return self.widths if self.widths and self.widths.endswith(".json") else None

    @model_validator(mode="after")
    def _one_allocation(self) -> Self:
        if self.widths is None:
            return self
        if self.latency:
            raise ValueError("widths and latency both say how many channels stay; give one")
        if self.steps > 1:
            raise ValueError(f"widths are those of one cut, and steps is {self.steps}; set steps to 1")
        if self.budget.ratios:
            raise ValueError("widths and budget.ratios both say how many channels stay; give one")
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
    panels: int = Field(default=4, ge=0, description="images that the report pictures, the worst ones")
    track: tuple[Literal["tensorboard", "mlflow"], ...] = Field(
        default=(), description="where the report's figures go as well: RUN/tensorboard, RUN/mlruns"
    )
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
    return parse(Recipe, overridden(data, overrides), source=source, flags=flags)
