"""Objects that behave like TensorRT's builder, config, network, engine and context, and allow no more than those.

A builder cannot be made without TensorRT's library. What its classes offer can be seen, though: every attribute that a
recorder is asked for must exist on the real class of the bindings, and every call must fit one of the signatures that
the class documents (number of arguments, enums of the right enum). A name that this version does not have raises
AttributeError, as the real object would, and is remembered with the file that asked.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

trt: Any = importlib.import_module(os.environ.get("VSS_TEST_TENSORRT", "tensorrt"))


class Log:
    """What happened: (class, name, arguments) per call and assignment; `missing` are names that do not exist."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, tuple[Any, ...]]] = []
        self.missing: list[tuple[str, str, str]] = []

    def of(self, kind: str, name: str) -> list[tuple[Any, ...]]:
        """The arguments of every call or assignment of that name."""
        return [arguments for k, n, arguments in self.calls if (k, n) == (kind, name)]

    def asked_by_us(self) -> list[str]:
        """Names that do not exist and were asked for by vss itself."""
        return [f"{kind}.{name}" for kind, name, file in self.missing if "/vss/" in file]


class Recorder:
    """A stand-in for an object of `real`; `answers` are values of properties and functions for methods."""

    def __init__(self, real: type, log: Log, **answers: Any) -> None:
        object.__setattr__(self, "_state", (real, log, answers))

    def __getattr__(self, name: str) -> Any:
        real, log, answers = object.__getattribute__(self, "_state")
        if not hasattr(real, name):
            log.missing.append((real.__name__, name, sys._getframe(1).f_code.co_filename))
            raise AttributeError(f"{real.__name__} of TensorRT {trt.__version__} has no {name}")
        if isinstance(inspect.getattr_static(real, name), property):
            return answers.get(name)
        signatures = parse(getattr(real, name).__doc__ or "", name)

        def call(*arguments: Any, **named: Any) -> Any:
            fault = misfit(signatures, arguments, named)
            if fault:
                raise TypeError(f"{real.__name__}.{name}{arguments}{named}: {fault}")
            log.calls.append((real.__name__, name, (*arguments, *named.values())))
            answer = answers.get(name)
            return answer(*arguments, **named) if callable(answer) else answer

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        real, log, answers = object.__getattribute__(self, "_state")
        member = inspect.getattr_static(real, name, None)
        if not isinstance(member, property) or member.fset is None:
            log.missing.append((real.__name__, name, sys._getframe(1).f_code.co_filename))
            raise AttributeError(f"{real.__name__} of TensorRT {trt.__version__} has no {name} to be set")
        log.calls.append((real.__name__, name, (value,)))
        answers[name] = value

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        return iter(())


Signature = list[tuple[str, str, bool]]  # (name, type, has a default) of every argument after self


def parse(text: str, name: str) -> list[Signature]:
    """The signatures in a docstring of pybind11."""
    found = []
    for line in text.splitlines():
        match = re.match(rf"(?:\d+\. )?{name}\((.*)\) -> ", line.strip())
        if not match:
            continue
        parts = [part for part in re.split(r",\s*(?![^\[(<]*[\])>])", match[1]) if part]
        arguments = [re.match(r"\*?\*?(\w+)(?::\s*([^=]+?))?(\s*=.*)?$", part.strip()) for part in parts]
        found.append([(a[1], (a[2] or "").strip(), a[3] is not None) for a in arguments if a and a[1] != "self"])
    return found


def misfit(signatures: list[Signature], arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
    """Why a call fits no signature; empty when one does, or when none is documented."""
    faults = []
    for signature in signatures:
        names = [name for name, _, _ in signature]
        given = dict(zip(names, arguments, strict=False)) | named
        lacking = [name for name, _, default in signature if not default and name not in given]
        strange = [name for name in named if name not in names]
        wrong = [
            f"{name} is {value!r}" for name, kind, _ in signature if name in given
            for value in [given[name]] if not fits(kind, value)
        ]  # fmt: skip
        fault = ", ".join([*lacking, *strange, *wrong]) or ("too many" if len(arguments) > len(names) else "")
        if not fault:
            return ""
        faults.append(fault)
    return "; ".join(faults)


def fits(kind: str, value: Any) -> bool:
    """Whether a value may stand for an argument of a documented type; enums, text and numbers are judged."""
    enum = getattr(trt, kind.split(".")[-1], None)
    if isinstance(enum, type) and hasattr(enum, "__members__"):
        return isinstance(value, enum)
    if kind == "str":
        return isinstance(value, str)
    if kind in ("int", "typing.SupportsInt"):
        return isinstance(value, int) and not hasattr(type(value), "__members__")
    if kind == "bool":
        return isinstance(value, bool)
    return True


class Tensors:
    """What an engine and its context say about tensors; running doubles the input into every output."""

    def __init__(self, inputs: dict[str, tuple[Any, tuple]], outputs: dict[str, tuple[Any, Callable]]) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}


def engine(
    log: Log,
    tensors: Tensors,
    run: Callable[[Tensors, int], bool],
    layers: str = '{"Layers": []}',
    times: Mapping[str, float] | None = None,
) -> Recorder:
    """A deserialised engine; `run(tensors, stream)` is what execute_async_v3 does.

    Args:
        layers: what its inspector says.
        times: layer -> milliseconds, told to the profiler of a context that has one.
    """
    everything = [*tensors.inputs, *tensors.outputs]

    def set_shape(name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = tensors.inputs[name][1]
        fits = len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if fits:
            tensors.shapes[name] = tuple(shape)
        return fits

    def shape_of(name: str) -> tuple[int, ...]:
        if name in tensors.inputs:
            low, _, high = tensors.inputs[name][1]
            return tuple(a if a == b else -1 for a, b in zip(low, high, strict=True))
        return (-1, 2)

    def context_shape(name: str) -> tuple[int, ...]:
        return tensors.outputs[name][1](tensors.shapes)

    def context(*options: Any) -> Recorder:
        def execute(stream: int) -> bool:
            for name, ms in (times or {}).items() if made.profiler else ():
                made.profiler.report_layer_time(name, ms)
            return run(tensors, stream)

        made = Recorder(
            trt.IExecutionContext,
            log,
            set_input_shape=set_shape,
            get_tensor_shape=context_shape,
            set_tensor_address=lambda name, address: tensors.addresses.__setitem__(name, address) or True,
            execute_async_v3=execute,
            set_optimization_profile_async=lambda profile, stream: profile == 0,
        )
        return made

    mode = trt.TensorIOMode
    return Recorder(
        trt.ICudaEngine,
        log,
        num_io_tensors=len(everything),
        get_tensor_name=lambda index: everything[index],
        get_tensor_mode=lambda name: mode.INPUT if name in tensors.inputs else mode.OUTPUT,
        get_tensor_dtype=lambda name: (tensors.inputs | tensors.outputs)[name][0],
        get_tensor_shape=shape_of,
        get_tensor_profile_shape=lambda name, profile: list(tensors.inputs[name][1]),
        create_execution_context=context,
        create_runtime_config=lambda: runtime_config(log),
        create_engine_inspector=lambda: Recorder(trt.EngineInspector, log, get_engine_information=lambda form: layers),
    )


def runtime_config(log: Log) -> Recorder:
    """Of TensorRT for RTX; its cache is that of another GPU where its bytes say so."""
    cache = Recorder(
        trt.IRuntimeCache,
        log,
        serialize=lambda: Host(b"kernels of this GPU"),
        deserialize=lambda blob: blob == b"kernels of this GPU",
    )
    return Recorder(trt.IRuntimeConfig, log, create_runtime_cache=lambda: cache, set_runtime_cache=lambda made: True)


class Host:
    """A host memory block with the interface of IHostMemory that is used."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __bytes__(self) -> bytes:
        return self.data

    def __len__(self) -> int:
        return len(self.data)


class Install:
    """Puts recorders in the place of trt.Builder, trt.OnnxParser and trt.Runtime."""

    def __init__(
        self, monkeypatch: Any, *, image: tuple[int, ...] = (-1, 3, 8, 8), plan: bytes = b"engine bytes"
    ) -> None:
        self.log, self.runtimes, self.parsed = Log(), [], list[bytes]()
        self.caches: dict[int, bytes] = {}
        self.plan = lambda: plan
        self.loads = True
        self.measured = b"measured|"
        tensors = Tensors({"image": (trt.DataType.FLOAT, ((1, 3, 8, 8),) * 3)}, {})
        self.config = self._config()
        tensor = Recorder(
            trt.ITensor, self.log, name="image", shape=image, dtype=trt.DataType.FLOAT, is_shape_tensor=False
        )
        network = Recorder(
            trt.INetworkDefinition, self.log, num_inputs=1, num_outputs=0, num_layers=0, get_input=lambda index: tensor
        )
        profile = Recorder(
            trt.IOptimizationProfile,
            self.log,
            get_shape=lambda name: self.log.of("IOptimizationProfile", "set_shape")[-1][1:],
        )
        builder = Recorder(
            trt.Builder,
            self.log,
            create_network=lambda flags: network,
            create_builder_config=lambda: self.config,
            create_optimization_profile=lambda: profile,
            build_serialized_network=lambda network, config: Host(self.plan()) if self.plan() else None,
        )

        def parse_file(path: str) -> bool:
            self.parsed.append(Path(path).read_bytes())
            return True

        parser = Recorder(trt.OnnxParser, self.log, parse_from_file=parse_file, num_errors=0)

        self.deserialise: Callable[[bytes], Any] = lambda blob: engine(self.log, tensors, lambda tensors, stream: True)

        real = trt.Runtime

        def runtime(logger: Any) -> Recorder:
            made = Recorder(real, self.log, deserialize_cuda_engine=lambda blob: self.deserialise(blob))
            self.runtimes.append(made)
            return made

        monkeypatch.setattr(trt, "Builder", lambda logger: builder)
        monkeypatch.setattr(trt, "OnnxParser", lambda network, logger: parser)
        monkeypatch.setattr(trt, "Runtime", runtime)

    def _config(self) -> Recorder:
        state: dict[str, Any] = {"flags": {trt.BuilderFlag.TF32}, "cache": None}
        self.state = state

        def cache(data: bytes) -> Any:
            if bytes(data).startswith(b"broken"):
                return None
            held = [bytes(data)]

            def combine(other: Recorder, ignore_mismatch: bool) -> bool:
                held.append(bytes(other.serialize()))
                return True

            return Recorder(
                trt.ITimingCache, self.log, serialize=lambda: Host(b"measured|" + b"".join(held)), combine=combine
            )

        def set_cache(value: Any, ignore_mismatch: bool) -> bool:
            state["cache"] = value
            return not bytes(value.serialize()).endswith(b"other device")

        return Recorder(
            trt.IBuilderConfig,
            self.log,
            set_flag=state["flags"].add,
            clear_flag=state["flags"].discard,
            get_flag=lambda flag: flag in state["flags"],
            create_timing_cache=cache,
            set_timing_cache=set_cache,
            get_timing_cache=lambda: state["cache"],
            get_tactic_sources=lambda: 0,
            get_preview_feature=lambda feature: False,
            get_memory_pool_limit=lambda pool: 0,
            get_quantization_flag=lambda flag: False,
            add_optimization_profile=lambda profile: 0,
            num_optimization_profiles=1,
            DLA_core=-1,
            default_device_type=trt.DeviceType.GPU,
            engine_capability=trt.EngineCapability.STANDARD,
            flags=0,
            set_calibration_profile=lambda profile: state.update(calibration=profile) or True,
            get_calibration_profile=lambda: state["calibration"],
        )
