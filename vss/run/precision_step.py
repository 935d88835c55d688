"""The part of `vss run` that makes, judges and times engines in other precisions than float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vss.core.config import Recipe
from vss.core.errors import NotFinite
from vss.core.files import sha256_artefact
from vss.deploy import BACKENDS, bench
from vss.deploy.backends import build_spec
from vss.deploy.bench import noise, pinned
from vss.deploy.quantize.precision import decide
from vss.run import runner as keys
from vss.run.precision import Typing, judge, refused
from vss.run.project import Project, export_options
from vss.run.runner import Result, Runner
from vss.train import checkpoint
from vss.train.evaluate import engine_predictor

TITLES = {"baseline": "engine baseline", "finetuned": "engine pruned"}
AFTER = {"baseline": "train", "finetuned": "finetune"}


class Job(Protocol):
    """What is used of a run."""

    project: Project
    out: Path
    step: Runner

    @property
    def recipe(self) -> Recipe: ...
    def do(
        self, name: str, kind: str, after: list[str], outputs: list[str], work: Callable[[], Result], also: Any = None
    ) -> Result: ...
    def scores_of(self, step: str) -> Result: ...
    def write_images(self, name: str, metrics: Result) -> None: ...
    def summary(self, metrics: Result) -> str: ...


def typed_engines(job: Job) -> dict[str, Any]:
    """Files, scores, times and the choice of every network in the precisions of the recipe; nothing when it has none.

    Returns:
        {"nets": {title: {"kinds": {precision: facts}, "choice": of `decide`}}, "bench": of all}.
    """
    kinds = job.recipe.precision.kinds
    if not kinds:
        return {}
    nets = {name: _engines(job, name) for name in TITLES}
    timing = _time(job, nets)
    table = {}
    for name, title in TITLES.items():
        rows = [{"precision": "fp32", "passed": True, **timing["sessions"][f"{title} fp32"]}]
        for kind, facts in nets[name]["kinds"].items():
            session = timing["sessions"][f"{title} {kind}"]
            speedup = timing["speedup_against"][f"{title} {kind}"]
            rows.append({"precision": kind, **session, "speedup": speedup, **_verdict(facts)})
        table[title] = {"kinds": nets[name]["kinds"], "choice": decide(rows)}
    return {"nets": table, "bench": timing}


def _verdict(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts["gate"][key] for key in ("passed", "sentence")}


def _engines(job: Job, name: str) -> Result:
    """One network in every precision: file, artefact, score, gate; INT8 searches when it costs too much."""
    recipe, project, config = job.recipe, job.project, job.recipe.precision
    files = {kind: _files(name, kind) for kind in config.kinds}

    def work() -> Result:
        model = checkpoint.load(job.out / f"{name}.safetensors")
        plain = job.step.result(f"engine-{name}")["export"]
        typing = Typing(
            project, model, config, job.out / f"engine/{name}.onnx", plain, export_options(project, model),
            job.out / "ranges",
        )  # fmt: skip
        references = {"torch": job.scores_of(f"evaluate-{name}"), "onnxruntime": job.scores_of(f"engine-{name}")}
        kinds = {kind: _engine(job, typing, kind, files[kind], references) for kind in config.kinds}
        told = ", ".join(
            f"{kind} {job.summary(facts['metrics']) if facts['metrics'] else 'NaN'}" for kind, facts in kinds.items()
        )
        return {"kinds": kinds, "detail": told}

    outputs = [path for each in files.values() for path in each.values()]
    after = [f"engine-{name}", f"evaluate-{name}", AFTER[name]]
    if name == "finetuned":
        after += [f"evaluate-{start}" for start in unpruned(recipe)]
    return job.do(f"precision-{name}", "precision", after, outputs, work)


def _files(name: str, kind: str) -> dict[str, str]:
    return {
        "onnx": f"engine/{name}.{kind}.onnx",
        "engine": f"engine/{name}.{kind}.engine.onnx",
        "scores": f"scores/engine-{name}-{kind}.npy",
    }


def _engine(
    job: Job, typing: Typing, kind: str, files: dict[str, str], references: Mapping[str, dict[str, Any]]
) -> Result:
    facts = _attempt(job, typing, kind, files, references, None)
    if kind != "int8" or facts["gate"]["passed"] or not typing.config.search:
        return facts
    choice = typing.search()
    path = choice.save(job.out / files["onnx"].replace(".onnx", ".choice.json"))
    first = {"gate": facts["gate"], "choice": path.name, **choice.facts}
    if choice.facts["within"]:
        facts = _attempt(job, typing, kind, files, references, choice.keep)
    return facts | {"search": first}


def _attempt(
    job: Job,
    typing: Typing,
    kind: str,
    files: dict[str, str],
    references: Mapping[str, dict[str, Any]],
    keep: tuple[str, ...] | None,
) -> Result:
    """Write, build, score and judge one file."""
    recipe, project = job.recipe, job.project
    exported = typing.write(job.out / files["onnx"], kind, keep)
    backend, spec = BACKENDS[recipe.build.backend], build_spec(recipe.build)
    backend.build(job.out / files["onnx"], job.out / files["engine"], spec)
    settings: dict[str, Any] = {"max_drop": recipe.precision.max_drop, "metric": recipe.gate.metric}
    try:
        if exported["precision"]["overflow"]:  # which onnxruntime's CPU does not show
            raise NotFinite(exported["precision"]["overflow"])
        with backend.open(job.out / files["engine"], threads=recipe.build.threads) as session:
            metrics = project.score(engine_predictor(session, project.preprocess))
        verdict = judge(typing, job.out / files["onnx"], {**references, "engine": metrics}, **settings)
        if "finetuned" in files["onnx"]:
            verdict = _shipped(job, verdict, metrics)
    except NotFinite as error:  # float16 that overflows is a precision that is not kept
        metrics = {project.task.per_image: np.empty(0)}
        verdict = refused(typing, job.out / files["onnx"], references, str(error), **settings)
    job.write_images(files["scores"], metrics)
    return {
        "export": exported,
        "metrics": metrics,
        "gate": verdict,
        "size_mib": (job.out / files["engine"]).stat().st_size / 2**20,
        "artefact": {"backend": backend.name, "spec": spec.model_dump(mode="json"), "files": files},
    }


def unpruned(recipe: Recipe) -> tuple[str, ...]:
    """The networks that no pruned engine may fall behind."""
    return ("baseline", "control") if recipe.control else ("baseline",)


def _shipped(job: Job, verdict: Result, metrics: Result) -> Result:
    """The verdict on a pruned engine (`equal`) with those against the unpruned networks (`ship`); a defect network
    has chosen its own threshold on validation for them."""
    starts = {name: job.scores_of(f"evaluate-{name}") for name in unpruned(job.recipe)}
    checks = job.project.task.against(starts, metrics)
    failed = [f"{check['what']} {check['sentence']}" for check in checks if check["passed"] is False]
    sentence = " ".join([verdict["sentence"], *failed])
    passed = verdict["passed"] and not failed
    return verdict | {"equal": verdict, "ship": checks, "passed": passed, "sentence": sentence}


def _time(job: Job, nets: Mapping[str, Result]) -> Result:
    """All files of all networks in one interleaved run, and each over the float32 file of its own network."""
    recipe, project, config = job.recipe, job.project, job.recipe.bench
    paths = {f"{title} fp32": f"engine/{name}.engine.onnx" for name, title in TITLES.items()}
    own = {}
    for name, title in TITLES.items():
        for kind, facts in nets[name]["kinds"].items():
            paths[f"{title} {kind}"] = facts["artefact"]["files"]["engine"]
            own[f"{title} {kind}"] = f"{title} fp32"

    def work() -> Result:
        with pinned(config.cores):
            return timed()

    def timed() -> Result:
        import torch

        backend = BACKENDS[recipe.build.backend]
        split = project.split(recipe.split)
        pixels = np.stack([split[i % len(split)]["image"].numpy() for i in range(config.batch_size)])
        limits = config.limits()
        with ExitStack() as stack:
            sessions = {
                name: stack.enter_context(backend.open(job.out / path, threads=recipe.build.threads))
                for name, path in paths.items()
            }
            feed = engine_predictor(next(iter(sessions.values())), project.preprocess).feed(torch.from_numpy(pixels))
            found = bench(sessions, dict.fromkeys(sessions, feed), against=own, **limits)
        ratios = ", ".join(f"{name} {each['ratio']:.2f}x" for name, each in found["speedup_against"].items())
        return {**found, "again": not found["stable"], "detail": noise(found) or ratios}

    after = [f"precision-{name}" for name in TITLES]
    return job.do("precision-bench", "precision-bench", after, [], work, keys.machine())


def merge(report: dict[str, Any], typed: Mapping[str, Any], out: Path) -> None:
    """Add rows, exports, artefacts and choices of `typed_engines` to a report, in place."""
    if not typed:
        return
    rows = {row["name"]: row for row in report["rows"]}
    for title, net in typed["nets"].items():
        for kind, facts in net["kinds"].items():
            name = f"{title} {kind}"
            report["rows"].append(_row(name, rows[title], facts, typed["bench"], net["choice"]))
            report["export"][name] = facts["export"]
            report["artefacts"][name] = sha256_artefact(out, facts["artefact"])
    report["bench"]["precision"] = {
        key: value for key, value in typed["bench"].items() if key not in ("detail", "again")
    }
    keys = ("gate", "search")
    report["precision"] = {
        title: {"choice": net["choice"]}
        | {kind: {key: facts[key] for key in keys if key in facts} for kind, facts in net["kinds"].items()}
        for title, net in typed["nets"].items()
    }


def _row(
    name: str, plain: Mapping[str, Any], facts: Mapping[str, Any], timing: Mapping[str, Any], choice: Mapping[str, Any]
) -> dict[str, Any]:
    """A row like that of the float32 engine, with this file's figures; all times are of one run."""
    session, kind = timing["sessions"][name], facts["export"]["precision"]["kind"]
    row = {key: value for key, value in plain.items() if key in ("params_m", "macs_g")}
    row |= {"name": name} | {key: facts["metrics"][key] for key in plain if key in facts["metrics"]}
    row["size_mib"] = facts["size_mib"]
    if timing["stable"]:
        row |= {key: session[key] for key in ("latency_ms_p50", "latency_ms_p90", "latency_ms_p99")}
        row |= {"fps": session["throughput_fps"]}
        row["speedup"] = timing["speedup"].get(name, {"ratio": 1.0})["ratio"]
    row["labels"] = "kept" if choice["chosen"] == kind else f"not kept: {choice['why'][kind]}"
    return row
