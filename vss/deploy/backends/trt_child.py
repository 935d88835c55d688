"""Builds an engine in a process of its own: a builder that crashes, hangs or is killed takes nothing else with it.

    python trt_child.py FOLDER

reads `request.json` of a folder and writes `answer.json`, both described at `answer`. Run as a file, so that neither
torch nor the rest of vss is imported; one process holds one TensorRT.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vss.core.errors import VssError, need, unknown
from vss.core.files import atomic, write_error, write_json

if TYPE_CHECKING:
    from tensorrt import IBuilder, IBuilderConfig, INetworkDefinition


if __package__:
    from vss.deploy.backends.trt_flavour import FLAVOURS, VERSION, Flavour
    from vss.deploy.backends.trt_runner import inspect_layers, load_plugins, load_tensorrt
else:
    sys.path.append(str(Path(__file__).parent))
    from trt_flavour import FLAVOURS, VERSION, Flavour  # type: ignore[no-redef]
    from trt_runner import (  # type: ignore[no-redef]
        inspect_layers,
        load_plugins,
        load_tensorrt,
    )

CACHE_KIND, CACHE_SCHEMA = "vss.timing_cache", 1
LAYERS = "Layers:"
"""Start of the message in which TensorRT for RTX lists the layers of an engine that it has built."""
NOISE = ("cudaError 35", "--- Begin node ---", "--- End node ---")
"""Messages of severity ERROR that name no reason: no driver on this machine, frames around a node."""


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

    def apply(self, config: IBuilderConfig) -> None:
        """Give a builder config what was measured before."""
        data = self.read()
        cache = config.create_timing_cache(data)
        if cache is None:
            raise VssError(f"the timing cache {self.path} is damaged ({len(data)} bytes); remove it.")
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            raise VssError(
                f"the timing cache {self.path} is of another device or TensorRT version; give another --timing-cache."
            )

    def merge(self, config: IBuilderConfig) -> int:
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


def answer(request: Mapping[str, Any]) -> dict[str, object]:
    """Do what a request asks.

    Args:
        request: {"flavour", "plugins", "aot"} asks for the version and the plugins that there are; with "onnx" and
            "plan" (JSON of a `BuildPlan` whose profiles and timing cache are set) for an engine as well, written to
            the file "out", which must be there, unless that is null.

    Returns:
        {"version", "creators", "flags"}, and of an engine {"inputs", "outputs": name -> {"dtype", "shape"}, "layers",
        "cache", "bytes", "sha256", "seconds", "warnings"}, where layers are the inspector's JSON or the text
        of the builder's log; or {"failed": "parse" or "build", "errors"} where TensorRT refuses.
    """
    flavour = FLAVOURS[request["flavour"]]
    need("polygraphy", "building TensorRT engines")
    trt = load_tensorrt(flavour)
    load_plugins(trt, request["plugins"], flavour)
    creators = {creator.name for creator in trt.get_plugin_registry().all_creators}
    if request["aot"]:
        from vss.deploy.backends import trt_aot

        creators |= trt_aot.register(trt, Path(request["aot"]))
    flags = sorted(trt.BuilderFlag.__members__)
    about = {"version": trt.__version__, "creators": sorted(creators), "flags": flags}
    return about | _build(trt, flavour, request) if request.get("onnx") else about


def _build(trt: ModuleType, flavour: Flavour, request: Mapping[str, Any]) -> dict[str, object]:
    """Parse, configure and build through polygraphy, with a logger that keeps what TensorRT says."""
    from polygraphy.backend import trt as loaders
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    messages = _listen(trt, loaders)
    plan, started, stage = request["plan"], time.perf_counter(), "parse"
    where = plan["timing_cache"] and plan["timing_cache"].replace(VERSION, trt.__version__)
    cache = TimingCache(Path(where)) if where else None
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            builder, network, parser = loaders.network_from_onnx_path(request["onnx"], strongly_typed=True)
            stage = "build"
            config = _config(trt, flavour, plan, builder, network)
            if cache:
                cache.apply(config)
            engine = bytes(loaders.engine_bytes_from_network((builder, network, parser), config))
    except PolygraphyException as error:
        errors = [text for level, text in messages if level == "ERROR"] or [str(error)]
        return {"failed": stage, "errors": [text for text in errors if not any(each in text for each in NOISE)]}
    seconds = round(time.perf_counter() - started, 3)
    if request["out"]:
        _write(Path(request["out"]), engine)
    ends = {
        side: [getattr(network, f"get_{side}")(index) for index in range(getattr(network, f"num_{side}s"))]
        for side in ("input", "output")
    }
    return {
        **{
            f"{side}s": {each.name: {"dtype": each.dtype.name, "shape": list(each.shape)} for each in tensors}
            for side, tensors in ends.items()
        },
        "layers": _layers(trt, flavour, engine, plan, messages),
        "cache": _merged(cache, config) if cache else None,
        "bytes": len(engine),
        "sha256": hashlib.sha256(engine).hexdigest(),
        "seconds": seconds,
        "warnings": list(dict.fromkeys(text for level, text in messages if level == "WARNING")),
    }


def _write(path: Path, engine: bytes) -> None:
    """Into a file that is there: one that its owner has taken away meanwhile is not made again."""
    try:
        with path.open("r+b") as file:
            file.write(engine)
    except OSError as error:
        raise write_error(path.parent, error) from error


def _listen(trt: Any, loaders: ModuleType) -> list[tuple[str, str]]:
    """Make the logger of every builder and parser to come one that keeps errors, warnings and the list of layers."""
    kept: list[tuple[str, str]] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            level = severity.name.replace("INTERNAL_", "")
            if level in ("ERROR", "WARNING") or text.startswith(LAYERS):
                kept.append((level, text))

    loaders.util.TRT_LOGGER = logger = Logger()
    if loaders.get_trt_logger() is not logger:
        raise VssError("this polygraphy keeps its logger in another place; install polygraphy 0.53.")
    return kept


def _config(
    trt: ModuleType, flavour: Flavour, plan: Mapping[str, Any], builder: IBuilder, network: INetworkDefinition
) -> IBuilderConfig:
    arguments = config_arguments(trt, plan)
    if flavour.targets:
        from polygraphy.backend.tensorrt_rtx import create_config_rtx

        for name in ("tf32", "version_compatible", "hardware_compatibility_level"):
            del arguments[name]
        targets = [(int(name[2:-1]), int(name[-1])) for name in plan["targets"]]
        config = create_config_rtx(builder, network, compute_capabilities=targets or None, **arguments)
        if not plan["tf32"]:
            config.clear_flag(trt.BuilderFlag.TF32)
    else:
        from polygraphy.backend.trt import create_config

        config = create_config(builder, network, **arguments)
    for flag in plan["flags"]:
        config.set_flag(member(trt.BuilderFlag, flag))
    return config


def config_arguments(trt: ModuleType, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of polygraphy's CreateConfig: every name resolved in the enums of this TensorRT."""
    from polygraphy.backend.trt import Profile

    profiles = [Profile() for _ in plan["profiles"]] or [Profile()]
    for made, wanted in zip(profiles, plan["profiles"], strict=False):
        for name, span in wanted.items():
            made.add(name, *(tuple(span[step]) for step in ("low", "best", "high")))
    arguments: dict[str, Any] = {
        "profiles": profiles,
        "tf32": plan["tf32"],
        "version_compatible": plan["version_compatible"],
        "profiling_verbosity": member(trt.ProfilingVerbosity, plan["verbosity"]),
        "hardware_compatibility_level": member(trt.HardwareCompatibilityLevel, plan["hardware"]),
        "builder_optimization_level": plan["optimisation_level"],
        "max_aux_streams": plan["auxiliary_streams"],
    }
    if plan["workspace_mib"] is not None:
        arguments["memory_pool_limits"] = {member(trt.MemoryPoolType, "WORKSPACE"): plan["workspace_mib"] << 20}
    return arguments


def member(enum: Any, name: str) -> Any:
    """The member of a TensorRT enum by name, or the sentence that lists what this version has."""
    names = enum.__members__
    if name not in names:
        raise unknown(f"{enum.__name__} of this TensorRT", name, names)
    return names[name]


def _layers(
    trt: ModuleType, flavour: Flavour, engine: bytes, plan: Mapping[str, object], messages: list[tuple[str, str]]
) -> dict[str, Any] | str | None:
    """What became of the network: the builder's own list where it logs one, else the inspector's of the engine."""
    if flavour.targets:
        return next((text for _, text in reversed(messages) if text.startswith(LAYERS)), None)
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    if plan["version_compatible"]:
        runtime.engine_host_code_allowed = True
    opened = runtime.deserialize_cuda_engine(engine)
    if opened is None:
        raise VssError(f"TensorRT {trt.__version__} cannot load the engine that it has just built.")
    return inspect_layers(trt, opened) if plan["verbosity"] != "NONE" else None


def _merged(cache: TimingCache, config: IBuilderConfig) -> dict[str, Any]:
    try:
        return {"file": cache.path.name, "bytes": cache.merge(config)}
    except VssError as error:  # the engine is good; what was measured is lost, and the report says so
        return {"file": cache.path.name, "bytes": 0, "not_saved": str(error)}


def library_path(flavour: Flavour, folder: Path) -> dict[str, str]:
    """Put a link into a folder and give the environment in which the loader finds a library by its name without a
    version: where it does not, the parser aborts the process at the first plugin."""
    name, package = flavour.unversioned or ("", "")
    found = importlib.util.find_spec(package) if package else None
    libraries = [
        path for place in (found and found.submodule_search_locations) or () for path in Path(place).glob(f"{name}.*")
    ]
    if not libraries:
        return {}
    (folder / name).symlink_to(libraries[0].resolve())
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))}


def main(folder: Path) -> None:
    """One request, one answer; a sentence of ours is an answer too, everything else ends the process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: a build ends with the one that asked for it
    request = json.loads((folder / "request.json").read_text())
    if os.getppid() != request["parent"]:  # which has ended before this process could ask to be told
        sys.exit(1)
    try:
        found = answer(request)
    except ValueError as error:
        if not type(error).__module__.startswith(("vss.", "trt_")):
            raise
        found = {"refused": str(error)}
    unfinished = folder / "unfinished.json"
    unfinished.write_text(json.dumps(found))
    unfinished.rename(folder / "answer.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
