"""TensorRT 10 and 11 and TensorRT for RTX as runtimes: one way to build, whatever the product and the version.

The build itself runs in a process of its own (`trt_child`); what was built says so in the files beside the engine.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vss.core.config import BuildConfig
from vss.core.environment import folder_name
from vss.core.errors import GateFailed, VssError, need, one_line, unknown
from vss.core.files import atomic, file_at_work, sha256_file, write_json
from vss.core.yaml12 import parse
from vss.deploy import lint, onnx_file
from vss.deploy.backends import trt_aot, trt_child
from vss.deploy.backends.base import BuildSpec, Session, sentences
from vss.deploy.backends.trt_device import Device, Driver, EngineError, sm
from vss.deploy.backends.trt_flavour import FLAVOURS, TENSORRT_RTX, VERSION, Flavour, gpus
from vss.deploy.backends.trt_layers import check_ends, check_types, convolutions, parse_layers, summary
from vss.deploy.backends.trt_plan import ADDED, OPTIONS, BuildPlan, commands, complete, declared, refuse_unsigned, spans
from vss.deploy.backends.trt_runner import KIND, SCHEMA, read_about

if TYPE_CHECKING:
    from onnx import ModelProto

LOG = logging.getLogger(__name__)
AHEAD_OF_TIME = frozenset({trt_aot.NAME})
SIZES = ((64, 64), (256, 256), (512, 512))
"""Of images, where a verdict on a file with free sides is asked for."""


class TensorRTBackend:
    """A TensorRT. Running needs an NVIDIA GPU, and building does where its flavour has no targets."""

    def __init__(self, flavour: Flavour) -> None:
        self.flavour, self.name, self.title = flavour, flavour.name, flavour.title
        self.packages, self.devices, self.precisions = flavour.packages[:1], ("cuda",), ("fp32", "fp16", "int8")
        self.beside_int8, self.runs_here = "fp16", False
        self.float_ops, self.steps, self.steps_why = flavour.float_ops, flavour.steps, flavour.steps_why

    def unavailable(self) -> str | None:
        """Looks at the driver before TensorRT is asked anything."""
        try:
            need("polygraphy", "building TensorRT engines")
            if importlib.util.find_spec(self.flavour.module) is None:
                why = f"No module named {self.flavour.module!r}"
                return f"{self.flavour.title} cannot be imported ({why}); {self.flavour.install}."
            self._device()
            self.about()
        except ValueError as error:
            return str(error)
        return None

    def about(self, plan: BuildPlan | None = None) -> dict[str, Any]:
        """{"version", "creators", "flags"} of this TensorRT, with the plugins of a plan."""
        plan = plan or BuildPlan()
        return in_child(_request(self.flavour, plan), f"importing {self.flavour.title}", plan.time_limit_s)

    def spec(self, config: BuildConfig) -> BuildSpec:
        """What a recipe asks of it; profiles of the engine come from the file."""
        flags = {key: f"{option} (build.tensorrt.{key})" for key, option in OPTIONS.items()}
        asked = config.tensorrt.model_dump() | ({"targets": config.targets} if self.flavour.targets else {})
        plan = parse(BuildPlan, asked, source="build.tensorrt", flags=flags)
        self.check(plan)
        return BuildSpec(plan=plan)

    def check(self, plan: BuildPlan) -> None:
        """Refuse what this product has not; needs no TensorRT."""
        usual = BuildPlan()
        for name, why in self.flavour.lacks.items():
            if getattr(plan, name) != getattr(usual, name):
                option = ADDED.get(name) or f"{OPTIONS[name]} (build.tensorrt.{name})"
                raise VssError(f"{option} is not for {self.flavour.title}: {why}; leave it off.")
        for flag in plan.flags:
            if flag in self.flavour.lacks_flags:
                why = self.flavour.lacks_flags[flag]
                raise VssError(
                    f"--flag {flag} (build.tensorrt.flags) is not for {self.flavour.title}: {why}; leave it off."
                )
        if len(set(plan.targets)) < len(plan.targets):
            raise VssError(f"--targets (build.targets) is {', '.join(plan.targets)}; give each once.")
        for target in plan.targets:
            if target in self.flavour.elsewhere:
                raise VssError(
                    f"--targets {target} ({self.flavour.elsewhere[target]}) is served by TensorRT (--backend "
                    f"tensorrt, on that GPU) and not by {self.flavour.title}."
                )
            if target not in self.flavour.targets:
                shown = [f"{name} ({gpus})" for name, gpus in self.flavour.targets.items()]
                raise unknown(f"--targets of {self.flavour.title} (build.targets)", target, shown)

    def check_flags(self, plan: BuildPlan) -> None:
        """Refuse names of flags that the TensorRT which is installed has not, and libraries that it does not load."""
        known = self.about(plan)["flags"] if plan.flags or plan.plugins else []
        for flag in plan.flags:
            if flag not in known:
                known = [each for each in known if each not in self.flavour.lacks_flags]
                raise unknown(f"BuilderFlag of this {self.flavour.title} (build.tensorrt.flags)", flag, known)

    def check_device(self, plan: BuildPlan) -> None:
        """Refuse to score and time engines where their GPU is not."""
        try:
            device = Driver().device()
        except EngineError as error:
            raise VssError(
                f"build.backend is {self.name}, and a run scores and times its engines: {error} To build them for GPUs "
                f"that are not here, set build.also to [{self.name}] and leave build.backend as onnxruntime."
            ) from error
        here, targets = sm(device.capability), plan.targets or tuple(self.flavour.targets)
        if targets and here not in targets:
            raise VssError(f"build.targets is {', '.join(targets)} and a run uses {device}; add {here}.")

    def build(self, onnx: Path, out: Path, spec: BuildSpec) -> Path:
        """Build the engine `out`, for the GPU of this machine or for the targets of the plan; `named` gives it a name
        that tells both.

        Beside it: `.json` (hashes, plan, device or targets, version, inputs and outputs, checks, metadata),
        `.layers.json` (engine inspector) and `.sh` (the same build by NVIDIA's programs); all are there or none. What
        the checks found is in the JSON: see `failed_checks`. Raises `VssError`: nothing to build with; a finding of the
        lint; a bad option, cache or disk; a builder that refuses, crashes or takes too long.
        """
        if spec.optimise is not None:
            raise VssError(f"optimise is for backend onnxruntime; {self.name} takes a BuildPlan.")
        with sentences():
            return self._build(Path(onnx), Path(out), spec.plan or BuildPlan())

    def _build(self, onnx: Path, out: Path, plan: BuildPlan) -> Path:
        need("polygraphy", "building TensorRT engines")
        self.check(plan)
        device = self._device()
        model = onnx_file.load(onnx_file.require_one_file(onnx))
        refuse_unsigned(onnx, model, self.flavour)
        names = self._plugins(plan, model)
        self._heed_findings(onnx, model, names, plan)
        plan = complete(plan, model, device)
        _check_disk(out, onnx)
        if out.is_symlink():
            raise VssError(f"{out} is a link, and an engine and its JSON lie side by side; remove it or name another.")
        ahead = AHEAD_OF_TIME if plan.aot else frozenset()
        with ExitStack() as stack:
            stack.enter_context(file_at_work(out))  # two builds of one name would mix what lies beside it
            written = stack.enter_context(atomic(out))
            source = stack.enter_context(without_bodies(onnx, model, names, ahead))
            request = _request(self.flavour, plan) | {"onnx": str(source.resolve()), "out": str(written.resolve())}
            found = in_child(request, f"building {onnx.name}", plan.time_limit_s)
            if "failed" in found:
                raise VssError(f"{self.flavour.title} {found['version']} cannot build {onnx.name} ({reason(found)}).")
            for text in found["warnings"]:
                LOG.warning("%s %s: %s", self.flavour.title, found["version"], one_line(text))
            layers = _as_inspected(found["layers"])
            facts = self._facts(onnx, out, plan, model, device, found, layers)
            facts["plugins"] = sorted(names & {node.op_type for node in model.graph.node})
            _keep_better(out, facts)
            _write_beside(out, facts, layers)
        return out

    def _device(self) -> Device | None:
        """The GPU that an engine is built for; None where the plan's targets say it."""
        return None if self.flavour.targets else Driver().device()

    def _plugins(self, plan: BuildPlan, model: ModelProto) -> set[str]:
        """Op types that some plugin implements; asked for only where a plan or a file has something of the kind."""
        foreign = model.functions or any(node.domain not in ("", "ai.onnx") for node in model.graph.node)
        return set(self.about(plan)["creators"]) if plan.plugins or plan.aot or foreign else set()

    def _heed_findings(self, onnx: Path, model: ModelProto, names: set[str], plan: BuildPlan) -> None:
        """Refuse what would become another engine than the file says; a builder that needs no GPU judges the rest."""
        tag = self.flavour.tag
        column = tag if tag in lint.FLAVOURS else self.about()["version"].split(".")[0]
        for finding in lint.lint(model, plugins=sorted(names), flavours=[column], targets=plan.targets):
            judged = self.flavour.targets and finding.flavours[column] == lint.REFUSED
            if finding.severity == "error" and not judged:
                raise VssError(f"{onnx} cannot become an engine: {finding} All findings: vss lint {onnx}")
            LOG.warning("%s", finding)

    def _facts(
        self,
        onnx: Path,
        out: Path,
        plan: BuildPlan,
        model: ModelProto,
        device: Device | None,
        found: Mapping[str, Any],
        layers: Mapping[str, Any] | None,
    ) -> dict[str, object]:
        version = found["version"]
        listed = [each if isinstance(each, dict) else {"Name": each} for each in (layers or {"Layers": ()})["Layers"]]
        typed = convolutions(model, listed) if layers else {}
        cache = Path(str(plan.timing_cache).replace(VERSION, version)) if plan.timing_cache else None
        plan = plan.model_copy(update={"timing_cache": cache})
        checks = [check_ends(model, found)]
        checks += [check_types(typed, self.flavour.float_ops)] if layers and plan.verbosity == "DETAILED" else []
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "engine": out.name,
            "sha256": found["sha256"],
            "bytes": found["bytes"],
            "onnx": onnx.name,
            "onnx_sha256": sha256_file(onnx),
            "flavour": self.name,
            "tensorrt": version,
            "device": device and device.to_json(),
            "targets": list(plan.targets),
            "plan": plan.to_json(),
            "timing_cache": found["cache"],
            "build_seconds": found["seconds"],
            "inputs": found["inputs"],
            "outputs": found["outputs"],
            "layers": summary(listed) if layers else None,
            "convolutions": typed,
            "checks": [asdict(check) for check in checks],
            "commands": commands(plan, Path(os.path.relpath(onnx, out.parent)), out, cache, self.flavour),
            "metadata": {each.key: each.value for each in model.metadata_props},
        }

    def named(self, out: Path, plan: BuildPlan | None = None) -> Path:
        """`out` with what it runs on and the version: model--nvidia-l4-sm89-trt10.16.1.engine, or
        model--sm86-sm89-rtx1.7.1.116.engine."""
        with sentences():
            device, version = self._device(), self.about()["version"]
        where = re.sub(r"\W+", "-", gpus(plan.targets if plan else ()))
        if device:
            where = f"{folder_name(device.name)}-{sm(device.capability)}"
        return out.with_name(f"{out.stem}--{where}-{self.flavour.tag}{version}{out.suffix}")

    def open(self, artefact: Any, *, threads: int | None = None, **options: Any) -> Session:
        """`threads` means nothing here; other options are those of `TensorRTSession`."""
        from vss.deploy.backends.trt_session import TensorRTSession

        return TensorRTSession(Path(artefact), flavour=self.flavour, **options)


@dataclass(frozen=True)
class Verdict:
    """What a real parser and builder say of a file: whether it `parsed` and was `built`, else the `reason` in
    TensorRT's words; `crashed` where it took its process, and the `version` to name, with it."""

    parsed: bool
    built: bool
    reason: str
    crashed: bool
    version: str = ""
    layers: tuple[dict[str, Any], ...] = ()


def verdict(onnx: Path, flavour: Flavour = TENSORRT_RTX, targets: Sequence[str] = ("sm86",)) -> Verdict:
    """Parse and build a file in a process of its own and keep nothing; `targets` of a flavour that has them."""
    model = onnx_file.load(onnx_file.require_one_file(onnx))
    plan = complete(BuildPlan(targets=tuple(targets), profiles=(spans(declared(model), sizes=SIZES),)), model, None)
    try:
        found = in_child(_request(flavour, plan) | {"onnx": str(onnx.resolve()), "out": None}, f"building {onnx.name}")
    except Crashed as error:
        return Verdict(False, False, str(error), True)
    if "failed" in found:
        return Verdict(found["failed"] != "parse", False, reason(found), False, found["version"])
    layers = (_as_inspected(found["layers"]) or {"Layers": []})["Layers"]
    return Verdict(True, True, "", False, found["version"], tuple(layers))


class Crashed(VssError):
    """A builder ended its process without an answer."""


def _request(flavour: Flavour, plan: BuildPlan) -> dict[str, Any]:
    data = plan.model_dump(mode="json")
    return {
        "flavour": flavour.name,
        "plugins": [str(Path(path).resolve()) for path in plan.plugins],
        "aot": str(plan.aot.resolve()) if plan.aot else None,
        "plan": data | {"timing_cache": str(plan.timing_cache) if plan.timing_cache else None},
    }


def in_child(request: Mapping[str, Any], what: str, limit: int | None = 600) -> dict[str, Any]:
    """The answer of `trt_child` to a request. A process that ends without one, or is at work for more than `limit`
    seconds, is one sentence."""
    flavour = FLAVOURS[request["flavour"]]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | flavour.environment | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryDirectory(prefix="vss-") as name:
        folder = Path(name)
        environment |= trt_child.library_path(flavour, folder)
        (folder / "request.json").write_text(json.dumps({**request, "parent": os.getpid()}))
        command = [sys.executable, str(trt_child.__file__), name]
        try:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise Crashed(
                f"{flavour.title} was stopped: {what} took more than {limit} s; allow more with --time-limit-s "
                "(build.tensorrt.time_limit_s)."
            ) from error
        if not (folder / "answer.json").is_file():
            raise Crashed(f"{what}: {flavour.title} {_end_of(done)}")
        found: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    if "refused" in found:
        raise VssError(found["refused"])
    return found


def _end_of(done: subprocess.CompletedProcess[bytes]) -> str:
    """How a process without an answer ended, and its last words."""
    last = done.stderr.decode(errors="replace").strip().splitlines()
    words = f" ({one_line(last[-1], 200)})" if last else ""
    if done.returncode >= 0:
        return f"ended with code {done.returncode} and no answer{words}."
    name = signal.Signals(-done.returncode).name
    why = {
        "SIGKILL": "was killed; where nobody did so there was too little memory",
        "SIGSEGV": "crashed (segmentation fault); an op of the file or a plugin library may be what it cannot do",
        "SIGABRT": "aborted; an op of the file or a plugin library may be what it cannot do",
    }.get(name, f"was ended by {name}")
    return f"{why}{words}."


def reason(found: Mapping[str, Any]) -> str:
    """TensorRT's own words for a file that it refuses: the node, and what it says of it."""
    lines = [one_line(text, 600).rstrip(". ") for text in found["errors"]]
    return " ".join(lines[:3]) or "it says no reason"


def _as_inspected(layers: Any) -> dict[str, Any] | None:
    """Layers in the form of the engine inspector's JSON."""
    return {"Layers": parse_layers(layers)} if isinstance(layers, str) else layers


def _keep_better(out: Path, facts: Mapping[str, Any]) -> None:
    """Refuse to put an engine that fails a check in the place of one that passed all."""
    wrong = [check for check in facts["checks"] if not check["passed"]]
    if wrong and out.is_file() and read_about(out) and not failed_checks(out):
        raise GateFailed(
            f"{facts['engine']} is not what {facts['onnx']} asked for ({wrong[0]['what']}: {wrong[0]['sentence']}); "
            "the engine that was there stays. Give another --save to see the new one."
        )


def failed_checks(engine: Path) -> list[str]:
    """What an engine does otherwise than its ONNX file asked, as sentences; empty where all is well."""
    checks = (read_about(engine) or {}).get("checks", [])
    return [f"{check['what']}: {check['sentence']}" for check in checks if not check["passed"]]


@contextmanager
def without_bodies(onnx: Path, model: ModelProto, names: set[str], ahead: Set[str] = frozenset()) -> Iterator[Path]:
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


def _write_beside(target: Path, facts: Mapping[str, Any], layers: Mapping[str, object] | None) -> None:
    """What belongs beside an engine; each gets its name once all are written."""
    with ExitStack() as stack:
        script = stack.enter_context(atomic(target.with_name(target.name + ".sh")))
        script.write_text("".join(f"# {name}\n{line}\n" for name, line in facts["commands"].items()))
        for suffix, data in ((".json", facts), (".layers.json", layers)):
            if data is not None:
                write_json(stack.enter_context(atomic(target.with_name(target.name + suffix))), data)
