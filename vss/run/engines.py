"""Engines of a run: made, scored, judged and timed, in float32 and in the precisions of the recipe."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vss.core.config import Recipe
from vss.core.errors import NotFinite, VssError
from vss.core.files import atomic
from vss.deploy import Session, bench, bench_end_to_end, export
from vss.deploy.backends import available, build_spec, inspected, int8_of, main_of, of_tensorrt, open_options, others_of
from vss.deploy.backends.trt_runner import read_about
from vss.deploy.bench import noise, pinned
from vss.deploy.quantize.precision import decide
from vss.run import runner
from vss.run.precision import PrecisionExporter, judge, refused
from vss.run.project import Workspace, export_options
from vss.run.report import TITLES, Beside, Engine, Timing
from vss.run.runner import Json, StepResult
from vss.train.evaluate import engine_predictor
from vss.train.tasks.base import spread

AFTER = {"baseline": "train", "finetuned": "finetune"}


@contextmanager
def opened(
    work: Workspace, paths: Mapping[str, str], runtimes: Mapping[str, str] | None = None
) -> Iterator[dict[str, Session]]:
    """Name -> session of an engine below the folder of the run, closed afterwards. `runtimes`: by name, of those that
    are not for the run's own."""
    build, sessions = work.recipe.build, dict[str, Session]()
    with ExitStack() as stack:
        for name, path in paths.items():
            runtime = (runtimes or {}).get(name) or main_of(build)
            session = available(runtime).open(work.out / path, **open_options(build, runtime))
            sessions[name] = stack.enter_context(session)
        yield sessions


def make_engine(work: Workspace, name: str, after: str) -> Engine:
    """ONNX, artefact, and the same evaluation on the engine."""
    project = work.project
    onnx, artefact, images = f"engine/{name}.onnx", f"engine/{name}.engine.onnx", f"scores/engine-{name}.npy"

    def make() -> Engine:
        model = work.project.load(work.out / f"{name}.safetensors")
        exported = export(model, work.out / onnx, **export_options(project, model))
        built, plugins = _build(work, onnx, artefact), _plugins(work, main_of(work.recipe.build))
        with opened(work, {name: artefact}) as sessions:
            metrics = project.score(engine_predictor(sessions[name], project.preprocess))
        work.write_images(images, metrics)
        return Engine(
            export=exported,
            metrics=metrics,
            artefact=built | {"files": {"onnx": onnx, "engine": artefact, "scores": images, **plugins}},
            inspector=inspected(work.out / artefact),
            size_mib=_mib(work.out / artefact),
            detail=f"{built['backend']}: {work.summary(metrics)}",
        )

    return work.do(Engine, f"engine-{name}", "engine", [f"evaluate-{name}", after], [onnx, artefact, images], make)


def _plugins(work: Workspace, runtime: str) -> dict[str, str]:
    """Role -> path of the libraries that engines of a runtime need, kept beside them in the run."""
    found = dict[str, str]()
    for index, library in enumerate(work.recipe.build.tensorrt.plugins if of_tensorrt(runtime) else ()):
        found[f"plugins {index + 1}" if index else "plugins"] = f"engine/{library.name}"
        (work.out / "engine").mkdir(parents=True, exist_ok=True)
        with atomic(work.out / "engine" / library.name) as temporary:
            shutil.copyfile(library, temporary)
    return found


def _build(work: Workspace, onnx: str, artefact: str, runtime: str | None = None) -> Json:
    build = work.recipe.build
    backend, spec = available(runtime or main_of(build)), build_spec(build, runtime)
    backend.build(work.out / onnx, work.out / artefact, spec)
    return {"backend": backend.name, "spec": spec.model_dump(mode="json")}


def _mib(path: Path) -> float:
    return path.stat().st_size / 2**20


def _pixels(work: Workspace) -> Tensor:
    split = work.project.split(work.recipe.split)
    return torch.stack([split[i % len(split)]["image"] for i in range(work.recipe.bench.batch_size)])


def time_engines(work: Workspace, references: Mapping[str, str]) -> Timing:
    """Both engines interleaved with those of `references` (step -> file), engine only and end to end."""
    project, config = work.project, work.recipe.bench
    paths = {**{title: f"engine/{name}.engine.onnx" for name, title in TITLES.items()}, **references}

    def measure() -> Timing:
        with pinned(config.cores), opened(work, paths) as sessions:
            split, pixels = project.split(work.recipe.split), _pixels(work)
            predictors = {name: engine_predictor(session, project.preprocess) for name, session in sessions.items()}
            feeds = {name: predictor.feed(pixels) for name, predictor in predictors.items()}
            engine = bench(sessions, feeds, **work.recipe.bench.limits())
            files = [split.pairs[i].image for i in spread(split.pairs, config.images)]
            whole = bench_end_to_end(predictors, files, project.preprocess, **work.recipe.bench.limits())
        noisy = noise(engine) or noise(whole)
        ratio = f"{engine['speedup']['engine pruned']['ratio']:.2f}x on {main_of(work.recipe.build)}"
        return Timing(
            engine=engine,
            end_to_end=whole,
            noise=noisy,
            again=bool(noisy),
            detail=noisy or ratio,
            status="not measured" if noisy else "ok",
        )

    after = ["engine-baseline", "engine-finetuned", *references]
    return work.do(Timing, "bench", "bench", after, [], measure, runner.machine())


def built_beside(work: Workspace) -> list[Beside]:
    """Engines of `build.also` for GPUs: of both networks in every precision of the recipe, checked against their files
    and not run."""
    return [_beside(work, runtime, name) for runtime in others_of(work.recipe.build, here=False) for name in TITLES]


def _beside(work: Workspace, runtime: str, name: str) -> Beside:
    backend, spec = available(runtime), build_spec(work.recipe.build, runtime)
    kinds = ("fp32", *work.recipe.precision.kinds)

    def make() -> Beside:
        rows, files = [], [*_plugins(work, runtime).values()]
        for kind in kinds:
            onnx = _onnx_for(work, backend.name, name, kind)
            path = f"engine/{name}.{kind}.{backend.name}.engine"
            row = {"name": TITLES[name], "runtime": backend.flavour.title, "precision": kind}
            try:
                backend.build(work.out / onnx, work.out / path, spec)
            except VssError as error:
                rows.append(row | {"passed": False, "sentence": str(error)})
                continue
            rows.append(row | _built(work.out / path, path))
            files += [onnx] if backend.name in onnx else []
            files += [path, *(f"{path}{end}" for end in (".json", ".layers.json", ".sh"))]
        failed = [row for row in rows if not row["passed"]]
        detail = "; ".join(f"{row['precision']}: {row['sentence'].rstrip('.')}" for row in failed or rows)
        return Beside(rows=rows, files=files, detail=detail, status="not passed" if failed else "ok")

    after = [f"engine-{name}", *([f"precision-{name}"] if work.recipe.precision.kinds else [])]
    return work.do(Beside, f"{backend.name}-{name}", "beside", after, [], make, backend.about()["version"])


def _onnx_for(work: Workspace, runtime: str, name: str, kind: str) -> str:
    """The ONNX file of a network in a precision; one of its own where the runtime leaves other layers in floating point
    than that of the recipe."""
    path = f"engine/{name}.onnx" if kind == "fp32" else f"engine/{name}.{kind}.onnx"
    exporter = _exporter(work, name)
    if kind != "int8" or not exporter.differs(kind, runtime):
        return path
    search = work.step.result(f"precision-{name}")["kinds"][kind].get("search") or {}
    keep = [*exporter.config.keep, *search["keep"]] if search.get("within") else None
    own = f"engine/{name}.{kind}.{runtime}.onnx"
    exporter.write(work.out / own, kind, keep, target=runtime)
    return own


def _built(engine: Path, path: str) -> Json:
    """The facts of an engine that was built and not run, as `vss.core.report.Built`."""
    about = read_about(engine) or {}
    return {
        "version": about["tensorrt"],
        "targets": about["targets"],
        "file": path,
        "sha256": about["sha256"],
        "size_mib": about["bytes"] / 2**20,
        "build_seconds": about["build_seconds"],
        "layers": about["layers"],
        "passed": all(check["passed"] for check in about["checks"]),
        "sentence": "; ".join(check["sentence"] for check in about["checks"]),
    }


# -- other precisions and runtimes ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PrecisionEngines(StepResult):
    """One network's engines beside its first one: their title (see `Runtime`) -> {"export", "metrics", "gate",
    "size_mib", "artefact", "search"?}."""

    kinds: dict[str, Json]


@dataclass(frozen=True)
class Runtime:
    """A runtime that a run scores and times its engines in; `own` is that of the recipe."""

    name: str
    own: bool
    precisions: tuple[str, ...]

    def title(self, kind: str) -> str:
        """Of an engine: `int8`, or of a further runtime `int8 openvino`."""
        return kind if self.own else f"{kind} {self.name}"

    def step(self, network: str) -> str:
        return f"precision-{network}" if self.own else f"{self.name}-{network}"

    def files(self, network: str, kind: str) -> dict[str, str]:
        """Role -> path: a file in float32 is there already, and one in another precision is the runtime's own."""
        end = kind if self.own else f"{kind}.{self.name}"
        onnx = f"engine/{network}.onnx" if kind == "fp32" else f"engine/{network}.{end}.onnx"
        scores = f"scores/engine-{network}-{end.replace('.', '-')}.npy"
        return {"onnx": onnx, "engine": f"engine/{network}.{end}.engine.onnx", "scores": scores}


def runtimes_of(recipe: Recipe) -> list[Runtime]:
    """The runtimes of a run that have engines beside the first ones, that of the recipe first."""
    kinds = recipe.precision.kinds
    own = [Runtime(main_of(recipe.build), True, kinds)] if kinds else []
    return own + [Runtime(name, False, ("fp32", *kinds)) for name in others_of(recipe.build)]


def typed_engines(work: Workspace) -> Json:
    """Files, scores, times and the choice of every network in the precisions and further runtimes of the recipe;
    nothing when it has none.

    Returns:
        {"nets": {title: {"kinds": {engine: facts}, "choice": of `decide`}}, "bench": of all}.
    """
    runtimes = runtimes_of(work.recipe)
    if not runtimes:
        return {}
    nets: dict[str, dict[str, Json]] = {name: {} for name in TITLES}
    for name in TITLES:
        for runtime in runtimes:
            nets[name] |= _precisions(work, name, runtime).kinds
    timing = _time(work, nets, [runtime.step(name) for name in TITLES for runtime in runtimes])
    table = {}
    for name, title in TITLES.items():
        rows = [{"precision": "fp32", "passed": True, **timing["sessions"][f"{title} fp32"]}]
        for kind, facts in nets[name].items():
            session = timing["sessions"][f"{title} {kind}"]
            speedup = timing["speedup_against"][f"{title} {kind}"]
            verdict = {key: facts["gate"][key] for key in ("passed", "sentence")}
            rows.append({"precision": kind, **session, "speedup": speedup, **verdict})
        table[title] = {"kinds": nets[name], "choice": decide(rows, stable=timing["stable"])}
    return {"nets": table, "bench": timing}


def _precisions(work: Workspace, name: str, runtime: Runtime) -> PrecisionEngines:
    """One network in every precision of a runtime: file, artefact, score, gate; INT8 that costs too much searches."""
    recipe = work.recipe
    files = {kind: runtime.files(name, kind) for kind in runtime.precisions}

    def make() -> PrecisionEngines:
        exporter = _exporter(work, name, runtime.name)
        references = {
            "torch": work.scores_of(f"evaluate-{name}"),
            main_of(recipe.build): work.scores_of(f"engine-{name}"),
        }
        kinds: dict[str, Json] = {
            runtime.title(kind): _with_search(work, exporter, kind, files[kind], references)
            for kind in runtime.precisions
        }
        parts = (f"{k} {work.summary(facts['metrics']) if facts['metrics'] else 'NaN'}" for k, facts in kinds.items())
        return PrecisionEngines(kinds=kinds, detail=", ".join(parts))

    plain = f"engine/{name}.onnx"
    outputs = [path for each in files.values() for path in each.values() if path != plain]
    after = [f"engine-{name}", f"evaluate-{name}", AFTER[name]]
    if name == "finetuned":
        after += [f"evaluate-{start}" for start in unpruned(recipe)]
    also = [runtime.name, asdict(int8_of(runtime.name)), *([] if runtime.own else [runner.machine()])]
    return work.do(PrecisionEngines, runtime.step(name), "precision", after, outputs, make, also)


def _exporter(work: Workspace, name: str, runtime: str | None = None) -> PrecisionExporter:
    """Of a network whose float32 file is there, for the recipe's runtime or another one."""
    model, project = work.project.load(work.out / f"{name}.safetensors"), work.project
    export = work.step.result(f"engine-{name}")["export"]
    return PrecisionExporter(
        project, model, work.recipe.precision, work.out / f"engine/{name}.onnx", export, export_options(project, model),
        work.out / "ranges", runtime or "",
    )  # fmt: skip


def _with_search(
    work: Workspace, exporter: PrecisionExporter, kind: str, files: dict[str, str], references: Mapping[str, Json]
) -> Json:
    facts = _attempt(work, exporter, kind, files, references, None)
    if kind != "int8" or facts["gate"]["passed"] or not exporter.config.search:
        return facts
    choice = exporter.search()
    path = choice.save(work.out / files["onnx"].replace(".onnx", ".choice.json"))
    first = {"gate": facts["gate"], "choice": path.name, **choice.facts}
    if choice.facts["within"]:
        facts = _attempt(work, exporter, kind, files, references, choice.keep)
    return facts | {"search": first}


def _attempt(
    work: Workspace,
    exporter: PrecisionExporter,
    kind: str,
    files: dict[str, str],
    references: Mapping[str, Json],
    keep: tuple[str, ...] | None,
) -> Json:
    recipe, project, onnx, runtime = work.recipe, work.project, work.out / files["onnx"], exporter.runtime
    exported = exporter.report if kind == "fp32" else exporter.write(onnx, kind, keep)
    built = _build(work, files["onnx"], files["engine"], runtime)
    settings: dict[str, Any] = {"max_drop": recipe.precision.max_drop, "metric": recipe.gate.metric}
    try:
        if exported.get("precision", {}).get("overflow"):  # which onnxruntime's CPU does not show
            raise NotFinite(exported["precision"]["overflow"])
        with opened(work, {kind: files["engine"]}, {kind: runtime}) as sessions:
            metrics = project.score(engine_predictor(sessions[kind], project.preprocess))
        verdict = judge(exporter, onnx, {**references, "engine": metrics}, **settings)
        if not verdict["passed"] and runtime != "onnxruntime":
            verdict |= _in_onnxruntime(work, onnx, verdict)
        if "finetuned" in files["onnx"]:
            verdict = _shipped(work, verdict, metrics)
    except NotFinite as error:  # float16 that overflows is a precision that is not kept
        metrics = {project.task.per_image: np.empty(0)}
        verdict = refused(exporter, onnx, references, str(error), **settings)
    work.write_images(files["scores"], metrics)
    return {
        "export": exported,
        "metrics": metrics,
        "gate": verdict,
        "size_mib": _mib(work.out / files["engine"]),
        "artefact": built | {"files": files},
    }


def _in_onnxruntime(work: Workspace, onnx: Path, verdict: Json) -> Json:
    """What a file that fails in another runtime scores in onnxruntime: whether the file or the runtime is at fault."""
    with available("onnxruntime").open(onnx, threads=work.recipe.build.threads) as session:
        score = work.project.score(engine_predictor(session, work.project.preprocess))[verdict["metric"]]
    right = verdict["baseline"] - score <= verdict["max_drop"]
    end = "so the runtime does not compute what the file says" if right else "so the file itself costs that much"
    sentence = f"{verdict['sentence']} The same file scores {score:.3f} in onnxruntime, {end}."
    return {"sentence": sentence, "scores": {**verdict["scores"], "engine in onnxruntime": score}}


def unpruned(recipe: Recipe) -> tuple[str, ...]:
    """The networks that no pruned engine may fall behind."""
    return ("baseline", "control") if recipe.control else ("baseline",)


def _shipped(work: Workspace, verdict: Json, metrics: Json) -> Json:
    """The verdict on a pruned engine (`equal`) with those against the unpruned networks (`ship`); a defect network
    has chosen its own threshold on validation for them."""
    starts = {name: work.scores_of(f"evaluate-{name}") for name in unpruned(work.recipe)}
    checks = work.project.task.against(starts, metrics)
    failed = [f"{check['what']} {check['sentence']}" for check in checks if check["passed"] is False]
    sentence = " ".join([verdict["sentence"], *failed])
    passed = verdict["passed"] and not failed
    return verdict | {"equal": verdict, "ship": checks, "passed": passed, "sentence": sentence}


def _time(work: Workspace, nets: Mapping[str, Mapping[str, Json]], after: list[str]) -> Json:
    """All files of all networks in one interleaved run, and each over the float32 file of its own network."""
    recipe, config = work.recipe, work.recipe.bench
    paths = {f"{title} fp32": f"engine/{name}.engine.onnx" for name, title in TITLES.items()}
    own, runtimes = {}, {}
    for name, title in TITLES.items():
        for kind, facts in nets[name].items():
            paths[f"{title} {kind}"] = facts["artefact"]["files"]["engine"]
            own[f"{title} {kind}"] = f"{title} fp32"
            runtimes[f"{title} {kind}"] = facts["artefact"]["backend"]

    def measure() -> Json:
        with pinned(config.cores), opened(work, paths, runtimes) as sessions:
            feed = engine_predictor(next(iter(sessions.values())), work.project.preprocess).feed(_pixels(work))
            found = bench(sessions, dict.fromkeys(sessions, feed), against=own, **work.recipe.bench.limits())
        ratios = ", ".join(f"{name} {each['ratio']:.2f}x" for name, each in found["speedup_against"].items())
        return {**found, "again": not found["stable"], "detail": noise(found) or ratios}

    depends = runner.depends(recipe, "precision-bench", [runner.machine(), *sorted(paths)])
    return work.step("precision-bench", depends, after, [], measure)
