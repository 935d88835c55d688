"""TensorRT 10 and 11 as a runtime: one way to build, whatever the version; what was built says so beside the file.

Its timing cache is one file per device and version, shared by builds that run at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vss.core.environment import folder_name
from vss.core.errors import VssError, need
from vss.core.files import atomic, sha256_file, write_json
from vss.deploy import lint, onnx_file
from vss.deploy.backends import trt_aot
from vss.deploy.backends.base import BuildSpec, Session
from vss.deploy.backends.trt_plan import BuildPlan, commands, config_arguments, member, spans
from vss.deploy.backends.trt_runner import (  # fmt: skip
    KIND,
    SCHEMA,
    Device,
    Driver,
    EngineError,
    inspect_layers,
    load_plugins,
    load_tensorrt,
)

CACHE_KIND, CACHE_SCHEMA = "vss.timing_cache", 1
LOG = logging.getLogger(__name__)


def default_folder() -> Path:
    """Where timing caches are kept: VSS_CACHE, or vss in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VSS_CACHE") or Path(base) / "vss") / "timing"


class TimingCache:
    """A file in TensorRT's own format, so that trtexec and polygraphy read it, with a JSON of its hash beside it.

    The JSON is written first and names the old and the new content, so that a process killed between the two writes
    leaves a pair that agrees. Another process's lock is waited for `wait` seconds.
    """

    def __init__(self, path: Path, *, wait: float = 10.0) -> None:
        self.path, self._wait = path, wait
        self._beside = path.with_name(path.name + ".json")

    def read(self) -> bytes:
        """The content, empty when there is none yet; refuses a damaged file."""
        with self._lock():
            return self._read()

    def apply(self, config: Any) -> None:
        """Give a builder config what was measured before."""
        data = self.read()
        cache = config.create_timing_cache(data)
        if cache is None:
            raise VssError(f"the timing cache {self.path} is damaged ({len(data)} bytes); remove it.")
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            raise VssError(
                f"the timing cache {self.path} is of another device or TensorRT version; give another --timing-cache."
            )

    def merge(self, config: Any) -> int:
        """Add what a build has measured to what other builds have written meanwhile; returns the bytes written."""
        measured = config.get_timing_cache()
        with self._lock():
            before = self._read()
            if before and (other := config.create_timing_cache(before)) is not None:
                measured.combine(other, ignore_mismatch=False)
            data = bytes(measured.serialize())
            self._write(before, data)
        return len(data)

    def _read(self) -> bytes:
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise VssError(f"the timing cache {self.path} cannot be read ({error.strerror or error}).") from error
        if data and self._beside.exists():
            try:
                known = json.loads(self._beside.read_text())["sha256"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise VssError(f"{self._beside} is damaged; remove it and {self.path.name}.") from error
            if _digest(data) not in known:
                raise VssError(f"the timing cache {self.path} is damaged ({len(data)} bytes); remove it.")
        return data

    def _write(self, before: bytes, data: bytes) -> None:
        known = [_digest(each) for each in (data, before) if each]
        write_json(self._beside, {"kind": CACHE_KIND, "schema": CACHE_SCHEMA, "bytes": len(data), "sha256": known})
        with atomic(self.path) as temporary:
            temporary.write_bytes(data)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise VssError(
                f"the timing cache {self.path} cannot be used ({error.strerror or error}); give another --timing-cache."
            ) from error
        try:
            self._wait_for(handle)
            yield
        finally:
            os.close(handle)

    def _wait_for(self, handle: int) -> None:
        import fcntl  # POSIX alone; TensorRT engines are built on Linux

        end = time.monotonic() + self._wait
        while True:
            try:
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    raise VssError(
                        f"the timing cache {self.path} is locked by another process (waited {self._wait:g} s); wait "
                        "for that build, or give another --timing-cache."
                    ) from error
                time.sleep(0.05)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class TensorRTBackend:
    """TensorRT. Building and running need an NVIDIA GPU; an engine belongs to its GPU and its TensorRT."""

    name = "tensorrt"

    def unavailable(self) -> str | None:
        """Looks at the driver before TensorRT is asked anything."""
        try:
            need("polygraphy", "building TensorRT engines")
            load_tensorrt()
            Driver().device()
        except ValueError as error:
            return str(error)
        return None

    def build(self, onnx: Path, out: Path, spec: BuildSpec) -> Path:
        """Build the engine `out`, for the GPU and the TensorRT of this machine; `named` gives it a name that tells
        both.

        Beside it: `.json` (hashes, plan, device, version, metadata), `.layers.json` (engine inspector) and `.sh` (the
        same build by trtexec and by polygraphy). Raises `VssError`: nothing to build with; a finding of the lint; a bad
        option, cache or disk.
        """
        if spec.optimise is not None:
            raise VssError("optimise is for backend onnxruntime; tensorrt takes a BuildPlan.")
        try:
            device, trt = Driver().device(), load_tensorrt()
            return _build(trt, device, Path(onnx), Path(out), spec.plan or BuildPlan())
        except EngineError as error:
            raise VssError(str(error)) from error

    def named(self, out: Path) -> Path:
        """`out` with GPU, compute capability and TensorRT of this machine: model--nvidia-l4-sm89-trt10.16.1.engine."""
        try:
            return engine_path(out, Driver().device(), load_tensorrt().__version__)
        except EngineError as error:
            raise VssError(str(error)) from error

    def open(self, artefact: Any, *, threads: int | None = None, **options: Any) -> Session:
        """`threads` means nothing here; other options are those of `TensorRTSession`."""
        from vss.deploy.backends.trt_session import TensorRTSession

        return TensorRTSession(Path(artefact), **options)


def engine_path(out: Path, device: Device, version: str) -> Path:
    """`out` with GPU, compute capability and TensorRT version in its name."""
    major, minor = device.capability
    return out.with_name(f"{out.stem}--{folder_name(device.name)}-sm{major}{minor}-trt{version}{out.suffix}")


def _build(trt: Any, device: Device, onnx: Path, out: Path, plan: BuildPlan) -> Path:
    need("polygraphy", "building TensorRT engines")
    model = onnx_file.load(onnx_file.require_one_file(onnx))
    names = _plugin_names(trt, plan)
    ahead = trt_aot.register(trt, plan.aot) if plan.aot else set()
    names |= ahead
    _refuse_findings(onnx, model, names)
    plan = complete(plan, model, device, trt.__version__)
    _check_disk(out, onnx)
    started = time.perf_counter()
    with without_bodies(onnx, model, names, ahead) as source:
        engine, cached = _serialised(trt, source, plan)
    seconds = time.perf_counter() - started
    facts = {
        "kind": KIND,
        "schema": SCHEMA,
        "engine": out.name,
        "sha256": hashlib.sha256(engine).hexdigest(),
        "bytes": len(engine),
        "onnx": onnx.name,
        "onnx_sha256": sha256_file(onnx),
        "tensorrt": trt.__version__,
        "device": {"name": device.name, "capability": list(device.capability), "memory_mib": device.memory_mib},
        "plan": plan.to_json(),
        "timing_cache": cached,
        "plugins": sorted(names & {node.op_type for node in model.graph.node}),
        "build_seconds": round(seconds, 3),
        "commands": commands(plan, onnx, out, _cache_of(plan)),
        "metadata": {each.key: each.value for each in model.metadata_props},
    }
    _write(trt, out, engine, facts)
    return out


def dry_commands(plan: BuildPlan, onnx: Path, out: Path) -> dict[str, str]:
    """The shell commands of a plan without a GPU or TensorRT: what `build` would write beside the engine."""
    cache = plan.timing_cache or default_folder() / "timing.cache"
    return commands(plan, onnx, out, cache)


def complete(plan: BuildPlan, model: Any, device: Device, version: str) -> BuildPlan:
    """The plan with what was left to us: one profile for free dimensions, the timing cache of this device."""
    changes: dict[str, Any] = {}
    if not plan.profiles:
        changes["profiles"] = (spans(declared(model)),)
    if plan.timing_cache is None:
        name = f"{folder_name(device.name)}-sm{device.capability[0]}{device.capability[1]}-trt{version}.cache"
        changes["timing_cache"] = default_folder() / name
    return plan.model_copy(update=changes)


def declared(model: Any) -> dict[str, list[int | str]]:
    """Input name -> dims, int or symbol."""
    constants = {each.name for each in model.graph.initializer}
    return {
        value.name: [dim.dim_value or dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
        if value.name not in constants
    }


def _cache_of(plan: BuildPlan) -> Path:
    assert plan.timing_cache is not None  # `complete` has set it
    return plan.timing_cache


def _plugin_names(trt: Any, plan: BuildPlan) -> set[str]:
    """Load the plan's libraries; every op type that some plugin implements."""
    load_plugins(trt, plan.plugins)
    return {creator.name for creator in trt.get_plugin_registry().all_creators}


def _refuse_findings(onnx: Path, model: Any, names: set[str]) -> None:
    found = lint.lint(model, plugins=sorted(names))
    for finding in found:
        if finding.severity == "error":
            raise VssError(f"{onnx} cannot become an engine: {finding} All findings: vss lint {onnx}")
        LOG.warning("%s", finding)


@contextmanager
def without_bodies(onnx: Path, model: Any, names: set[str], ahead: Set[str] = frozenset()) -> Iterator[Path]:
    """The file to parse: TensorRT prefers a function body to a plugin, so bodies of plugin ops are taken out.

    Args:
        names: op types that plugins implement.
        ahead: those of them that are ahead-of-time Python plugins; their nodes say so.
    """
    replaced = [function for function in model.functions if function.name in names]
    trt_aot.mark_nodes(model, ahead)
    if not replaced:
        yield onnx
        return
    for function in replaced:
        model.functions.remove(function)
    with tempfile.TemporaryDirectory(prefix="vss-") as folder:
        path = Path(folder) / onnx.name
        need("onnx", "building TensorRT engines").save(model, str(path))
        yield path


def _check_disk(target: Path, onnx: Path) -> None:
    """An engine takes about as much as its ONNX; refuse before a long build rather than after it."""
    folder = next(each for each in (target.parent, *target.absolute().parents) if each.exists())
    free, wanted = shutil.disk_usage(folder).free, 2 * onnx.stat().st_size
    if free < wanted:
        raise VssError(
            f"{folder} has {free >> 20} MiB left and the engine may take {(wanted >> 20) + 1}; free some space or "
            "choose another place."
        )


def _serialised(trt: Any, onnx: Path, plan: BuildPlan) -> tuple[bytes, Mapping[str, Any]]:
    """Parse, configure and build through polygraphy."""
    from polygraphy.backend.trt import create_config, engine_bytes_from_network, network_from_onnx_path
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    cache = TimingCache(_cache_of(plan))
    arguments = config_arguments(trt, plan)
    try:
        with G_LOGGER.verbosity(G_LOGGER.WARNING):
            builder, network, parser = network_from_onnx_path(str(onnx), strongly_typed=True)
            config = create_config(builder, network, **arguments)
            for flag in plan.flags:
                config.set_flag(member(trt.BuilderFlag, flag))
            cache.apply(config)
            engine = bytes(engine_bytes_from_network((builder, network, parser), config))
    except PolygraphyException as error:
        raise VssError(f"TensorRT {trt.__version__} cannot build {onnx.name} ({_line(error)}).") from error
    try:
        return engine, {"file": cache.path.name, "bytes": cache.merge(config)}
    except VssError as error:  # the engine is good; what was measured is lost, and the report says so
        LOG.warning("%s", error)
        return engine, {"file": cache.path.name, "bytes": 0, "not_saved": str(error)}


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")


def _write(trt: Any, target: Path, engine: bytes, facts: dict[str, Any]) -> None:
    """The engine and what belongs beside it; the JSON that vouches for it comes last."""
    with atomic(target) as temporary:
        temporary.write_bytes(engine)
    with atomic(target.with_name(target.name + ".sh")) as temporary:
        temporary.write_text("".join(f"# {name}\n{line}\n" for name, line in facts["commands"].items()))
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    if facts["plan"]["version_compatible"]:
        runtime.engine_host_code_allowed = True
    opened = runtime.deserialize_cuda_engine(engine)
    if opened is None:
        raise VssError(f"TensorRT {trt.__version__} cannot load {target.name}, which it has just built.")
    if facts["plan"]["verbosity"] != "NONE":
        layers = inspect_layers(trt, opened)
        write_json(target.with_name(target.name + ".layers.json"), layers)
        facts["layers"] = len(layers.get("Layers", []))
    write_json(target.with_name(target.name + ".json"), facts)
