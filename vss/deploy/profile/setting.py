"""Where and how a network runs: what a latency table holds for, and how an engine for it is made."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from vss.core.environment import environment
from vss.core.errors import VssError
from vss.core.files import sha256_file, sha256_json
from vss.deploy import BACKENDS, BuildPlan, BuildSpec, onnx_file, spans
from vss.deploy.backends import available
from vss.deploy.backends.base import Session
from vss.deploy.backends.eager import check_place
from vss.deploy.backends.trt import declared
from vss.deploy.profile.units import pinned, usable_threads
from vss.deploy.profile.variants import example_of
from vss.deploy.quantize.layers import Net, read_onnx
from vss.deploy.quantize.precision import Precision, convert
from vss.deploy.quantize.qdq import observed
from vss.deploy.quantize.ranges import Ranges
from vss.prune import find_groups
from vss.prune.plan import Group

if TYPE_CHECKING:
    from vss.data.transforms import Preprocess

WHERE = {
    "onnxruntime": (("cpu",), ("fp32", "int8")),
    "torch": (("cpu", "cuda"), ("fp32", "fp16")),
    "tensorrt": (("cuda",), ("fp32", "fp16", "int8")),
}
"""backend -> devices and precisions of which it is timed, the usual one first."""
VERSIONS = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "torch": ("torch",), "tensorrt": ("tensorrt",)}
BESIDE_INT8 = {"onnxruntime": "fp32", "tensorrt": "fp16"}
PLAIN = BuildPlan()


@dataclass(frozen=True)
class Setting:
    """Where and how a network runs.

    Attributes:
        backend: "onnxruntime", "torch" or "tensorrt".
        device: "cpu" or "cuda"; "" is the usual one of the backend.
        precision: "fp32", "fp16" or "int8". All INT8 ranges are 1, since a time does not depend on them; what is not
            INT8 runs in float16 in TensorRT and in float32 in onnxruntime. float16 in torch is channels last.
        threads: on a CPU; None for one per usable core.
        batch: images.
        options: of the export, such as labels=True.
        keep: layers whose channels stay.
        plan: how TensorRT builds.
    """

    backend: str = "onnxruntime"
    device: str = ""
    precision: str = "fp32"
    threads: int | None = None
    batch: int = 1
    options: Mapping[str, Any] = field(default_factory=lambda: {"labels": True})
    keep: Sequence[str] = ()
    plan: BuildPlan = PLAIN

    def __post_init__(self) -> None:
        backend = BACKENDS.canonical(self.backend)
        if backend not in WHERE:
            raise VssError(f"the layers of {backend} cannot be timed; expected one of {', '.join(WHERE)}.")
        devices, precisions = WHERE[backend]
        device = self.device or devices[0]
        if device not in devices or self.precision not in precisions:
            raise VssError(
                f"{backend} is timed in {' or '.join(precisions)} on {' or '.join(devices)}; got {self.precision} on "
                f"{device}."
            )
        object.__setattr__(self, "backend", backend)
        object.__setattr__(self, "device", device)

    @property
    def on_gpu(self) -> bool:
        """Whether the network runs on a GPU, where threads mean nothing."""
        return self.device == "cuda"

    @property
    def on_threads(self) -> int | None:
        """Threads that it runs on; None for what runs on a GPU."""
        return None if self.on_gpu else usable_threads(self.threads)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep what runs on a CPU on its cores."""
        with pinned(self.on_threads) if self.on_threads else contextlib.nullcontext():
            yield

    def check(self) -> None:
        """Raise the sentence that says what is missing here."""
        available(self.backend)
        if self.backend == "torch":
            check_place(self.device, self.precision)

    def typed(self, source: Path, out: Path) -> Path:
        """A float32 ONNX file in this precision; `source` itself where that is float32."""
        if self.precision == "fp32":
            return source
        if self.precision == "fp16":
            convert(source, out, Precision("fp16"))
            return out
        values = dict.fromkeys(observed(Net(read_onnx(source))), 1.0)
        precision = Precision("int8", elsewhere=BESIDE_INT8[self.backend])
        convert(source, out, precision, Ranges({"method": "minmax"}, sha256_file(source), values))
        return out

    def engine(self, onnx: Path, stem: Path) -> Session:
        """Built of a float32 ONNX file and opened; files are put beside `stem`."""
        backend = available(self.backend)
        source = self.typed(onnx, stem.with_name(f"{stem.name}.{self.precision}.onnx"))
        suffix, spec = ".engine.onnx", BuildSpec()
        if self.backend == "tensorrt":
            profile = spans(declared(onnx_file.load(source)), [1, self.batch, max(8, self.batch)])
            suffix, spec = ".engine", BuildSpec(plan=dataclasses.replace(self.plan, profiles=(profile,)))
        built: Path = backend.build(source, stem.with_name(stem.name + suffix), spec)
        session: Session = backend.open(built, threads=self.on_threads)
        return session

    def module(self, model: nn.Module, preprocess: Preprocess) -> Session:
        """A network opened in torch, as its engine would be used."""
        assert self.backend == "torch"
        return BACKENDS["torch"].open(
            model, size=preprocess.size, preprocess=preprocess, device=self.device, precision=self.precision,
            cuda_graph=self.on_gpu, threads=self.on_threads, **self.options,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What a table of this holds for, besides the network: device, driver, versions and so on. All JSON types."""
        about = environment()
        packages = about["packages"]
        facts = {
            "device": about["machine"],
            "driver": about["devices"][0]["driver"] if self.on_gpu and about["devices"] else None,
            "versions": {name: packages[name] for name in VERSIONS[self.backend] if name in packages},
            "backend": self.backend,
            "precision": self.precision,
            "batch": self.batch,
            "threads": self.on_threads,
        }
        if self.backend == "tensorrt":
            left_out = ("profiles", "timing_cache", "verbosity", "calibration")
            facts["build"] = {key: value for key, value in self.plan.to_json().items() if key not in left_out}
        return facts

    def command(self, save: str) -> str:
        """The command that makes a table; CKPT stands for the uncut network."""
        usual = Setting(self.backend)
        parts = ["vss", "lut", "build", "--ckpt", "CKPT", "--save", save, "--backend", self.backend]
        for name in ("device", "precision"):
            parts += [f"--{name}", getattr(self, name)] if getattr(self, name) != getattr(usual, name) else []
        parts += ["--threads", str(self.threads)] if self.threads else []
        parts += [] if self.options.get("labels", True) else ["--no-labels"]
        dtype = self.options.get("labels_dtype", "int32")
        parts += ["--labels-dtype", dtype] if dtype != "int32" else []
        parts += _plan_flags(self.plan)
        return shlex.join([*parts, *(part for name in self.keep for part in ("--keep", name))])


def _plan_flags(plan: BuildPlan) -> list[str]:
    """The flags of `vss lut build` for what a recipe can ask of TensorRT."""
    flags = [part for name in plan.flags for part in ("--flag", name)]
    flags += ["--workspace-mib", str(plan.workspace_mib)] if plan.workspace_mib is not None else []
    flags += ["--level", str(plan.optimisation_level)] if plan.optimisation_level is not None else []
    flags += ["--hardware", plan.hardware.lower()] if plan.hardware != "NONE" else []
    flags += ["--version-compatible"] if plan.version_compatible else []
    return flags + ([] if plan.tf32 else ["--no-tf32"])


def table_key(model: Any, groups: Sequence[Group], size: tuple[int, int], setting: Setting) -> dict[str, Any]:
    """What a table holds for: the network's shapes, and where and how it runs. All JSON types."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    members = [[group.id, group.channels, group.unit] for group in groups]
    return setting.facts() | {
        "resolution": list(size),
        "network": getattr(model, "name", "") or type(model).__name__,
        "shapes_sha256": sha256_json([shapes, members, sorted(setting.options.items())]),
    }


def groups_and_key(model: nn.Module, size: tuple[int, int], setting: Setting) -> tuple[list[Group], dict[str, Any]]:
    """The groups of a network and what a table of it holds for, (H, W) pixels."""
    groups = list(find_groups(model, example_of(size), keep=setting.keep))
    return groups, table_key(model, groups, size, setting)
