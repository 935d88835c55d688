"""What a runtime is: a `Backend` builds and opens artefacts, a `Session` runs one and owns the checks of its feed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
from pydantic import Field

from vss.core.closeness import ENGINE, refuse_not_finite
from vss.core.config import BuildConfig, OpenVINOConfig
from vss.core.errors import NotFinite, VssError, need
from vss.core.sections import Section
from vss.deploy.backends import onnx_runner, trt_device
from vss.deploy.backends.trt_plan import BuildPlan
from vss.deploy.onnx_file import stated

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class Binding:
    """One input or output of a session: shape with None for a dimension that is free, numpy dtype name."""

    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} ({', '.join('any' if side is None else str(side) for side in self.shape)})"

    def accepts(self, array: np.ndarray) -> bool:
        """Whether dtype, rank and every fixed dimension agree."""
        if array.dtype.name != self.dtype or array.ndim != len(self.shape):
            return False
        return all(want in (None, have) for want, have in zip(self.shape, array.shape, strict=True))


class Session(ABC):
    """An opened artefact.

    Attributes:
        inputs, outputs: name -> Binding.
    """

    inputs: dict[str, Binding]
    outputs: dict[str, Binding]

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; arrays in, arrays out, on the host. Raises `VssError` for a wrong name, dtype or shape."""
        if feed.keys() != self.inputs.keys():
            raise VssError(f"the engine takes the inputs {sorted(self.inputs)}, got {sorted(feed)}.")
        for name, array in feed.items():
            if not self.inputs[name].accepts(array):
                got = f"{array.dtype.name} {tuple(array.shape)}"
                raise VssError(f"input {name!r} takes {self.inputs[name]}, got {got}: convert or resize it first.")
        return self._run(feed)

    @abstractmethod
    def _run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def probe(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The numbers that hidden labels are chosen by, on a feed; empty where the runtime does not show them."""
        return {}

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Backend, version, device, threads and the artefact's own metadata, as JSON-ready data."""

    @property
    def images(self) -> dict[str, Any] | None:
        """{"size", "mean", "std"} of the images that the artefact was made for, by its own metadata; None where it says
        nothing of them."""
        return stated(self.describe().get("metadata", {}))

    def close(self) -> None:  # noqa: B027  (most sessions free everything with the object)
        """Free what the session holds; it is not used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def sentences() -> Iterator[None]:
    """What the runners refuse, which stand alone, as an error of this package."""
    try:
        yield
    except (onnx_runner.EngineError, trt_device.EngineError) as error:
        raise VssError(str(error)) from error


def check_finite(session: Session, feed: Mapping[str, np.ndarray], what: str = "the engine") -> dict[str, np.ndarray]:
    """Run once and give the outputs; raises `NotFinite` where they, or the logits behind labels, are not finite."""
    found = session.run(feed)
    floats = {name: value for name, value in found.items() if value.dtype.kind == "f"}
    refuse_not_finite((floats or session.probe(feed)).values(), what, ENGINE)
    return found


def refuse_nan(model: ModelProto, path: Path) -> None:
    """Weights that are NaN; an engine with labels would hide them."""
    onnx = need("onnx", "looking into ONNX files")
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.dtype.kind == "f" and np.isnan(value).any():
            raise NotFinite(f"{path} holds NaN in {tensor.name}; {ENGINE}.")


@dataclass(frozen=True)
class Int8:
    """How a runtime wants INT8 written, so that it computes what the file says; the field `int8` of a backend.

    Attributes:
        unsigned: activations are uint8, with zero point 0 where nothing is negative and 128 elsewhere; int8 with zero
            point 0 otherwise.
        weight_bits: 8; or 7 where two products of uint8 and int8 are added up in 16 bits, which 255 * 127 * 2 leaves.
        one_reader: whether the result of a layer without a bias that several nodes read reaches them through a
            LeakyRelu of slope 1, which changes nothing.
        tied: whether the inputs of a Concat share one range; otherwise each has its own, and the runtime adapts them.
    """

    unsigned: bool = False
    weight_bits: Literal[7, 8] = 8
    one_reader: bool = False
    tied: bool = True


INT8_OF_CPUS = Int8(unsigned=True, weight_bits=7, one_reader=True, tied=False)
"""What ONNX Runtime and OpenVINO both compute in INT8 and as it is written, so that one file serves both."""


class BuildSpec(Section):
    """What an artefact is built for."""

    optimise: str | None = Field(
        default=None,
        description="onnxruntime: null keeps the ONNX as it is and optimises at every opening; basic or extended "
        "optimises once, at build time; levels beyond are tied to the machine and are not offered",
    )
    plan: BuildPlan | None = Field(default=None, description="tensorrt: null is a plan with profiles from the file")
    openvino: OpenVINOConfig | None = Field(default=None, description="openvino: null is the CPU in float32")


class Backend(Protocol):
    """A runtime, as the registry holds it.

    Further fields say what it does to an ONNX file; one without them has no such rule:

    - `steps`: precision -> op of a convolution -> channels of which its widths are multiples; `steps_why` says why;
    - `float_ops`: ONNX ops that it runs in floating point, quantised or not;
    - `int8`: types and bits of Q/DQ that it computes as written, see `Int8`.
    """

    name: str
    title: str
    beside_int8: str
    """Precision of what is not quantised, in the INT8 files that are timed."""
    runs_here: bool
    """Whether its engines run on any processor, so that `build.backend: auto` tries them."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions whose versions its times depend on."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Where its layers are timed, the usual place first; none: they are not."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """In what its layers are timed, the usual one first."""

    def unavailable(self) -> str | None:
        """None when it can run here, else why not and what to install."""

    def spec(self, config: BuildConfig) -> BuildSpec:
        """What a recipe asks of it; raises `VssError` for what it has not."""

    def build(self, onnx: Path, out: Path, spec: BuildSpec) -> Path:
        """Make the artefact `out` of an ONNX file; whole or absent."""

    def open(self, artefact: object, *, threads: int | None = None, **options: Any) -> Session:
        """Open an artefact; `threads` of None leaves the choice to the runtime."""
