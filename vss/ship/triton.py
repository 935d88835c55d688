"""Triton model repositories, written through Triton's own protobuf schema.

One repository per way to run the engine (`VARIANTS`). Where pre- or post-processing is not in the graph the model is an
ensemble `NAME` of `NAME_pre`, `NAME_net` and `NAME_post`, so that a client always sends uint8 (N, H, W, 3) RGB and gets
labels; see the schema in https://github.com/triton-inference-server/common, protobuf/model_config.proto.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vss.core.environment import package_version
from vss.core.errors import VssError, need, unknown
from vss.core.files import write_text
from vss.deploy import Binding
from vss.deploy.backends import BACKENDS, onnx_runner, trt_runner

CONFIG = "config.pbtxt"
LABELS = "labels.txt"
TYPES = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "int8": "TYPE_INT8", "int32": "TYPE_INT32", "int64": "TYPE_INT64",
    "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One way in which Triton runs an engine: what server it takes, the engine's name in the version folder, backend
    or platform, device."""

    server: str
    file: str
    backend: str = ""
    platform: str = ""
    gpu: bool = False


VARIANTS = {
    "onnxruntime": Variant("Triton with the onnxruntime backend", "model.onnx", backend="onnxruntime"),
    "python": Variant("Triton with the python backend alone", "model.onnx", backend="python"),
    "tensorrt": Variant(
        "Triton with the tensorrt backend, on the GPU that the engine was built on",
        "model.plan",
        platform="tensorrt_plan",
        gpu=True,
    ),
}
RTX_MAGIC = b"vtrt"
"""How an engine of TensorRT for RTX begins."""


INSTEAD = (
    "serve the ONNX file by onnxruntime or by the python backend, from a run with build.backend onnxruntime or openvino"
)


@dataclass(frozen=True)
class Serving:
    """How an engine is served.

    Args:
        name: of the model.
        inputs, outputs: the engine's bindings; the first dimension is the batch.
        mean, std: of the normalisation, for engines that take float32 (N, 3, H, W).
        labels: class names, written to the label file of the outputs with classes.
        max_batch: images that the server may put into one execution.
        delay_us: how long a request may wait for others, microseconds.
        instances: copies of the engine that work at the same time.
        threads: of each copy on the CPU; 0 leaves the choice to the runtime.
        as_written: the runtime must not rewrite the graph.
        backend: the runtime that the python backend opens the engine in.
    """

    name: str
    inputs: Mapping[str, Binding]
    outputs: Mapping[str, Binding]
    mean: Sequence[float] = (0.0, 0.0, 0.0)
    std: Sequence[float] = (1.0, 1.0, 1.0)
    labels: Sequence[str] = ()
    max_batch: int = 8
    delay_us: int = 2000
    instances: int = 1
    threads: int = 0
    as_written: bool = False
    backend: str = "onnxruntime"

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.instances < 1 or self.delay_us < 0 or self.threads < 0:
            raise VssError(
                f"max_batch {self.max_batch}, instances {self.instances}, delay {self.delay_us} us and threads "
                f"{self.threads} cannot be served; expected at least 1, 1, 0 and 0."
            )
        for name, binding in {**self.inputs, **self.outputs}.items():
            if binding.dtype not in TYPES:
                raise VssError(f"{name!r} is {binding}; Triton serves {', '.join(TYPES)}.")
        image = self.inputs.get("image")
        if len(self.inputs) != 1 or image is None or image.dtype not in ("uint8", "float32") or len(image.shape) != 4:
            raise VssError(
                f"the engine takes {', '.join(f'{n} {b}' for n, b in self.inputs.items())}; expected one image, uint8 "
                "(N, H, W, 3) or float32 (N, 3, H, W): export it with vss."
            )

    @property
    def pre(self) -> bool:
        """Whether the image must be normalised before the engine."""
        return self.inputs["image"].dtype == "float32"

    @property
    def post(self) -> bool:
        """Whether labels must be made of logits after the engine."""
        return "logits" in self.outputs

    @property
    def size(self) -> tuple[int | None, int | None]:
        shape = self.inputs["image"].shape
        return (shape[2], shape[3]) if self.pre else (shape[1], shape[2])

    @property
    def client_inputs(self) -> dict[str, Binding]:
        return {"image": Binding((None, *self.size, 3), "uint8")}

    @property
    def client_outputs(self) -> dict[str, Binding]:
        rest = {name: binding for name, binding in self.outputs.items() if name != "logits"}
        return ({"labels": Binding((None, *self.outputs["logits"].shape[2:]), "uint8")} if self.post else {}) | rest


def write_repository(folder: Path, variant: str, serving: Serving, engine: Path) -> Path:
    """Write a repository for one variant into `folder` (made anew by the caller); returns it.

    Args:
        engine: the artefact: an ONNX file, or a TensorRT plan for the variant "tensorrt".
    """
    if variant == "openvino":
        raise VssError(
            "Triton's own openvino backend is not in the server of nvidia-pytriton; OpenVINO runs inside of the python "
            "backend: use the variant python."
        )
    if variant not in VARIANTS:
        raise unknown("Triton variant", variant, VARIANTS)
    if variant == "tensorrt":
        with engine.open("rb") as file:
            if file.read(len(RTX_MAGIC)) == RTX_MAGIC:
                raise VssError(
                    f"{engine} is of TensorRT for RTX, which Triton's tensorrt backend does not load; {INSTEAD}."
                )
    kind, pb = VARIANTS[variant], schema()
    ensemble = serving.pre or serving.post
    name = f"{serving.name}_net" if ensemble else serving.name
    config = _engine_config(pb, serving, kind, name)
    version = _model(folder, config, serving)
    shutil.copyfile(engine, version / kind.file)
    if kind.backend == "python":
        _python_model(version)
        shutil.copyfile(str(onnx_runner.__file__), version / "onnx_runner.py")
    if ensemble:
        for step in [*(["pre"] if serving.pre else []), *(["post"] if serving.post else [])]:
            _python_model(_model(folder, _step_config(pb, serving, step), serving))
        _model(folder, _ensemble_config(pb, serving), serving)
    return folder


def schema() -> Any:
    need("tritonclient.grpc", "writing and reading Triton configurations")
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2


def parse(path: Path) -> Any:
    """A config.pbtxt as a protobuf message; `VssError` with line and column when it does not follow the schema."""
    pb = schema()
    from google.protobuf import text_format

    try:
        return text_format.Parse(path.read_text(), pb.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise VssError(f"{path} does not follow Triton's schema ({error}).") from error


def _model(folder: Path, config: Any, serving: Serving) -> Path:
    """Write config.pbtxt and the label file of one model; returns its version folder."""
    from google.protobuf import text_format

    place = folder / config.name
    (place / "1").mkdir(parents=True)
    write_text(place / CONFIG, text_format.MessageToString(config))
    if any(output.label_filename for output in config.output):
        write_text(place / LABELS, "\n".join(serving.labels) + "\n")
    return place / "1"


def _python_model(version: Path) -> None:
    shutil.copyfile(Path(__file__).with_name("python_model.py"), version / "model.py")


def _bindings(config: Any, serving: Serving, inputs: Mapping[str, Binding], outputs: Mapping[str, Binding]) -> None:
    config.max_batch_size = serving.max_batch
    for values, fields in ((inputs, config.input), (outputs, config.output)):
        for name, binding in values.items():
            dims = [-1 if side is None else side for side in binding.shape[1:]]
            fields.add(name=name, data_type=TYPES[binding.dtype], dims=dims)
    for field in config.output:
        if field.name in ("labels", "logits") and serving.labels:
            field.label_filename = LABELS


def _scheduling(pb: Any, config: Any, serving: Serving, gpu: bool) -> None:
    """Batching, instances, version policy and warm-up with one image and with a full batch."""
    config.version_policy.latest.num_versions = 1
    group = pb.ModelInstanceGroup
    config.instance_group.add(count=serving.instances, kind=group.KIND_GPU if gpu else group.KIND_CPU)
    if serving.max_batch > 1:
        config.dynamic_batching.preferred_batch_size.append(serving.max_batch)
        config.dynamic_batching.max_queue_delay_microseconds = serving.delay_us
    for batch in sorted({1, serving.max_batch}):
        warm = config.model_warmup.add(name=f"batch of {batch}", batch_size=batch, count=1)
        for field in config.input:
            sample = warm.inputs[field.name]
            sample.data_type, sample.zero_data = field.data_type, True
            if any(side < 0 for side in field.dims):
                raise VssError("an engine with a free height or width cannot be served; export it at one size.")
            sample.dims.extend(field.dims)


def _engine_config(pb: Any, serving: Serving, kind: Variant, name: str) -> object:
    config = pb.ModelConfig(name=name, backend=kind.backend, platform=kind.platform)
    _bindings(config, serving, serving.inputs, serving.outputs)
    _scheduling(pb, config, serving, kind.gpu)
    if kind.platform == "tensorrt_plan":
        config.optimization.cuda.graphs = True
    if kind.backend == "onnxruntime" and serving.threads:
        config.parameters["intra_op_thread_count"].string_value = str(serving.threads)
    if kind.backend == "onnxruntime" and serving.as_written:
        config.optimization.graph.level = 2  # in this backend: no optimisation at all
    if kind.backend == "python":
        config.parameters["role"].string_value = "engine"
        config.parameters["runtime"].string_value = serving.backend
        config.parameters["as_written"].string_value = str(int(serving.as_written))
        config.parameters["threads"].string_value = str(serving.threads)
    return config


def _step_config(pb: Any, serving: Serving, step: str) -> object:
    config = pb.ModelConfig(name=f"{serving.name}_{step}", backend="python")
    if step == "pre":
        _bindings(config, serving, serving.client_inputs, serving.inputs)
    else:
        labels = {"labels": serving.client_outputs["labels"]}
        _bindings(config, serving, {"logits": serving.outputs["logits"]}, labels)
    _scheduling(pb, config, serving, False)
    values = {"role": step, "mean": _numbers(serving.mean), "std": _numbers(serving.std)}
    for key in values if step == "pre" else ("role",):
        config.parameters[key].string_value = values[key]
    return config


def _numbers(values: Sequence[float]) -> str:
    return " ".join(repr(float(value)) for value in values)


def _ensemble_config(pb: Any, serving: Serving) -> object:
    config = pb.ModelConfig(name=serving.name, platform="ensemble")
    _bindings(config, serving, serving.client_inputs, serving.client_outputs)
    config.version_policy.latest.num_versions = 1
    inner = "normalised" if serving.pre else "image"

    def step(name: str, takes: dict[str, str], gives: dict[str, str]) -> None:
        added = config.ensemble_scheduling.step.add(model_name=f"{serving.name}_{name}", model_version=-1)
        added.input_map.update(takes)
        added.output_map.update(gives)

    if serving.pre:
        step("pre", {"image": "image"}, {"image": inner})
    step("net", {"image": inner}, {name: name for name in serving.outputs})
    if serving.post:
        step("post", {"logits": "logits"}, {"labels": "labels"})
    return config


ON_GPU = ("pycuda", "cuda-python")
"""Memory of the device, from one of them."""


@dataclass(frozen=True)
class Runtime:
    """One runtime.

    Attributes:
        packages: distributions that run its engines; those that are here are written down with their versions.
        runner: the modules beside run.py that open them.
        variants: the Triton repositories that serve them, see `vss.ship.triton.VARIANTS`; the best first.
        cpp: the smallest program in C++ that runs them.
    """

    packages: tuple[str, ...]
    runner: tuple[Path, ...]
    variants: tuple[str, ...] = ()
    cpp: str = ""

    @property
    def versions(self) -> dict[str, str]:
        return {name: version for name in self.packages if (version := package_version(name))}


ONNX = (Path(str(onnx_runner.__file__)),)
TRT = tuple(Path(str(trt_runner.__file__)).with_name(name) for name in trt_runner.ALONE)
RUNTIMES = {
    "onnxruntime": Runtime(("onnxruntime",), ONNX, ("onnxruntime", "python"), "ort_example.cpp"),
    "openvino": Runtime(("openvino",), ONNX, ("python",)),
    "tensorrt": Runtime(("tensorrt", *ON_GPU), TRT, ("tensorrt",), "trt_example.cpp"),
    "tensorrt_rtx": Runtime(("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", *ON_GPU), TRT),
}


def runtime_of(backend: str) -> Runtime:
    """The row of a runtime; raises `VssError` for one whose engines no bundle holds."""
    name = BACKENDS.canonical(backend)
    if name not in RUNTIMES:
        raise unknown("runtime of a bundle", name, RUNTIMES)
    return RUNTIMES[name]
