"""`vss run`: all steps in order, each skipped when its inputs have not changed (vss.run.runner), each resumable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vss.core.config import Recipe
from vss.core.errors import GateFailed
from vss.core.files import at_work, atomic, read_array, sha256_artefact
from vss.core.report import write_report
from vss.deploy import bench, bench_end_to_end, export
from vss.deploy.backends import available, build_spec, inspected
from vss.deploy.bench import noise, pinned
from vss.prune import Statistics
from vss.run import runner as keys
from vss.run import steps
from vss.run.frame import frame, write_failed
from vss.run.page import write_page
from vss.run.precision_step import merge, typed_engines, unpruned
from vss.run.preflight import check_run
from vss.run.project import Project, export_options
from vss.run.references import References
from vss.run.runner import Result, Runner
from vss.train import checkpoint
from vss.train.evaluate import engine_predictor
from vss.train.pictures import spread

log = logging.getLogger(__name__)


def run(
    recipe: Recipe,
    out: Path | str,
    *,
    say: Callable[[str, str, float, str], None] | None = None,
    progress: bool = True,
    command: str = "",
) -> Result:
    """Do a whole recipe; returns the report, which is also `out/report.json` beside `out/report.html`.

    Raises:
        GateFailed: after everything is written, when a gate did not pass.
    """
    out, project = Path(out), Project.open(recipe)
    check_run(project)
    with at_work(out):
        job = Job(project, out, Runner(out, say or _log), progress, command)
        try:
            report = job.everything()
        except BaseException as error:
            write_failed(job, error)
            raise
    failed = [check for check in report["gate"]["checks"] if check["passed"] is False]
    if failed:
        told = " ".join(f"Gate {check['what']} {check['sentence']}" for check in failed)
        raise GateFailed(f"{told} See {out / 'report.html'}.")
    return report


def _log(name: str, status: str, seconds: float, detail: str) -> None:
    log.info("%s: %s (%.1f s) %s", name, status, seconds, detail)


@dataclass
class Job:
    """The steps of one recipe in one folder, each remembered by `step`; `vss.sweep` calls some of them."""

    project: Project
    out: Path
    step: Runner
    progress: bool
    command: str

    @property
    def recipe(self) -> Recipe:
        return self.project.recipe

    def everything(self) -> Result:
        references = References.open(self)
        train = self.train()
        pruned = self.prune()
        finetuned = self.finetune("finetune", "pruned.safetensors", "prune")
        control = self.finetune("control", "baseline.safetensors", "train") if self.recipe.control else None
        nets = {"baseline": "train", "pruned": "prune", "finetuned": "finetune"}
        if control:
            nets["control"] = "control"
        scores = {name: self.score(name, after) for name, after in nets.items()}
        engines = {name: self.engine(name, after) for name, after in (("baseline", "train"), ("finetuned", "finetune"))}
        gates = self.gates()
        extra = references.make()
        timing = self.bench(references.engines)
        pictures = self.panels()
        typed = typed_engines(self)
        report = self.report(train, pruned, finetuned, control, scores, engines, gates, timing, pictures, extra)
        merge(report, typed, self.out)
        write_report(self.out / "report.json", report)
        write_page(self.out / "report.json", self.out / "report.html")
        return report

    # -- networks -----------------------------------------------------------------------------------------------------

    def train(self) -> Result:
        recipe, project = self.recipe, self.project

        def work() -> Result:
            model = project.build_model()
            if recipe.model.checkpoint:
                project.save(model, self.out / "baseline.safetensors")
                return {"detail": f"taken from {recipe.model.checkpoint}", "curves": []}
            result = steps.train(project, model, recipe.train, self.folder("train", model), progress=self.progress)
            project.save(model, self.out / "baseline.safetensors", _best(result))
            return self._fit_facts(result)

        return self.do("train", "train", [], ["baseline.safetensors"], work, keys.of_data(project, "train", "val"))

    def do(
        self, name: str, kind: str, after: list[str], outputs: list[str], work: Callable[[], Result], also: Any = None
    ) -> Result:
        """A step of a kind of `vss.run.runner`; `also` is what it depends on beside recipe and earlier steps."""
        return self.step(name, keys.depends(self.recipe, kind, also), after, outputs, work)

    def folder(self, name: str, *nets: nn.Module) -> Path:
        """Where the fit of a step works; `nets` are the networks that it starts from."""
        return keys.fit_folder(self.out / name, self.step.keys[name], nets)

    def prune(self, statistics: Statistics | None = None) -> Result:
        """Plan, cut, proof; `statistics` of the baseline save the calibration pass and change nothing."""
        config = self.recipe.prune
        also = keys.machine() if config.latency else None

        def work() -> Result:
            model = checkpoint.load(self.out / "baseline.safetensors")
            _, facts = steps.prune(self.project, model, config, self.out, progress=self.progress, statistics=statistics)
            kept = ", ".join(f"{share:.1%} of {kind}" for kind, share in facts["kept"].items())
            return facts | {"detail": "; ".join([f"{facts['criterion']}: kept {kept}", *facts["labels"]])}

        return self.do("prune", "prune", ["train"], ["plan.json", "pruned.safetensors"], work, also)

    def finetune(self, name: str, source: str, after: str) -> Result:
        config = self.recipe.finetune
        target = "finetuned.safetensors" if name == "finetune" else f"{name}.safetensors"

        def work() -> Result:
            model = checkpoint.load(self.out / source)
            teacher = checkpoint.load(self.out / "baseline.safetensors") if config.distill else None
            folder = self.folder(name, *filter(None, (model, teacher)))
            result = steps.train(self.project, model, config, folder, teacher=teacher, progress=self.progress)
            self.project.save(model, self.out / target, _best(result))
            return self._fit_facts(result)

        return self.do(name, "finetune", [after], [target], work)

    # -- figures ------------------------------------------------------------------------------------------------------

    def score(self, name: str, after: str) -> Result:
        """Metrics of a network in torch; the figures by image go beside, for intervals."""
        recipe = self.recipe
        path, images = self.out / f"{name}.safetensors", f"scores/{name}.npy"

        def work() -> Result:
            model = checkpoint.load(path)
            result = steps.torch_score(self.project, model)
            self.write_images(images, result)
            row = steps.size_row(name, model, self.project, path)
            return {"row": row, "metrics": result, "detail": self.summary(result)}

        also = keys.of_data(self.project, recipe.split, "val")
        return self.do(f"evaluate-{name}", "evaluate", [after], [images], work, also)

    def write_images(self, name: str, metrics: Result) -> None:
        """Take the array by image out of the metrics and write it."""
        value = metrics.pop(self.project.task.per_image)
        with atomic(self.out / name) as temporary:
            np.save(temporary, value.astype(np.int32) if value.dtype == np.int64 else value)

    def summary(self, metrics: Result) -> str:
        task = self.project.task
        return f"{task.title} {metrics[task.metric]:.2f}"

    def _fit_facts(self, result: Result) -> Result:
        score = result[f"best_{result['metric']}"]
        keys = ("best_epoch", "metric", "steps", "epochs", "precision", "curves")
        detail = f"best val {self.project.task.title} {score:.2f} in epoch {result['best_epoch'] + 1}"
        return {key: result[key] for key in keys} | {"best_score": score, "detail": detail}

    def engine(self, name: str, after: str) -> Result:
        """ONNX, artefact, and the same evaluation on the engine."""
        recipe, project = self.recipe, self.project
        onnx, artefact, images = f"engine/{name}.onnx", f"engine/{name}.engine.onnx", f"scores/engine-{name}.npy"

        def work() -> Result:
            model = checkpoint.load(self.out / f"{name}.safetensors")
            exported = export(model, self.out / onnx, **export_options(project, model))
            backend, spec = available(recipe.build.backend), build_spec(recipe.build)
            backend.build(self.out / onnx, self.out / artefact, spec)
            with backend.open(self.out / artefact, threads=recipe.build.threads) as session:
                metrics = project.score(engine_predictor(session, project.preprocess))
            self.write_images(images, metrics)
            return {
                "export": exported,
                "metrics": metrics,
                "artefact": {
                    "backend": backend.name,
                    "spec": spec.model_dump(mode="json"),
                    "files": {"onnx": onnx, "engine": artefact, "scores": images},
                },
                "inspector": inspected(self.out / artefact),
                "size_mib": (self.out / artefact).stat().st_size / 2**20,
                "detail": f"{backend.name}: {self.summary(metrics)}",
            }

        return self.do(f"engine-{name}", "engine", [f"evaluate-{name}", after], [onnx, artefact, images], work)

    def scores_of(self, step: str) -> Result:
        """What a step of an evaluation found, with the array by image."""
        images = read_array(self.out / f"scores/{step.removeprefix('evaluate-')}.npy")
        return self.step.result(step)["metrics"] | {self.project.task.per_image: images}

    def gates(self) -> Result:
        """The verdicts of the task on the pruned engine; the head of the result is the first that failed."""
        task = self.project.task
        sources = {name: f"evaluate-{name}" for name in ("finetuned", *unpruned(self.recipe))}

        def work() -> Result:
            results = {name: self.scores_of(step) for name, step in sources.items()}
            verdicts = task.verdicts(results | {"engine": self.scores_of("engine-finetuned")})
            checks = [{"engine": "engine pruned", **verdict} for verdict in verdicts]
            failed = [check for check in checks if check["passed"] is False]
            detail = "; ".join(f"{check['what']}: {check['sentence'].rstrip('.')}" for check in failed or checks)
            status = {"status": "not passed"} if failed else {}
            return {**(failed or checks)[0], "passed": not failed, "checks": checks, "detail": detail, **status}

        return self.do("gate", "gate", [*sources.values(), "engine-finetuned"], [], work)

    def bench(self, references: Mapping[str, str]) -> Result:
        """Both engines interleaved with those of `references` (step -> file), engine only and end to end."""
        recipe, project, config = self.recipe, self.project, self.recipe.bench

        def work() -> Result:
            with pinned(config.cores):
                return timed()

        def timed() -> Result:
            backend = available(recipe.build.backend)
            paths = {"engine baseline": "engine/baseline.engine.onnx", "engine pruned": "engine/finetuned.engine.onnx"}
            paths |= references
            split = project.split(recipe.split)
            pixels = np.stack([split[i % len(split)]["image"].numpy() for i in range(config.batch_size)])
            limits = config.limits()
            files = [split.pairs[i].image for i in spread(split.pairs, config.images)]
            import torch

            with ExitStack() as stack:
                sessions = {
                    name: stack.enter_context(backend.open(self.out / path, threads=recipe.build.threads))
                    for name, path in paths.items()
                }
                predictors = {name: engine_predictor(s, project.preprocess) for name, s in sessions.items()}
                feeds = {name: p.feed(torch.from_numpy(pixels)) for name, p in predictors.items()}
                engine = bench(sessions, feeds, **limits)
                whole = bench_end_to_end(predictors, files, project.preprocess, **limits)
            ratio = engine["speedup"]["engine pruned"]["ratio"]
            noisy = noise(engine) or noise(whole)
            detail = noisy or f"{ratio:.2f}x on {backend.name}"
            status = {"status": "not measured"} if noisy else {}
            return {
                "engine": engine, "end_to_end": whole, "again": bool(noisy), "noise": noisy, "detail": detail, **status
            }  # fmt: skip

        after = ["engine-baseline", "engine-finetuned", *references]
        return self.do("bench", "bench", after, [], work, keys.machine())

    def panels(self) -> Result:
        """Pictures: image, truth, and what each network says."""
        recipe, project = self.recipe, self.project

        def work() -> Result:
            nets = {name: checkpoint.load(self.out / f"{name}.safetensors") for name in ("baseline", "pruned")}
            predictors = {name: project.task.predictor(net) for name, net in nets.items()}
            scores = {"engine": self.step.result("engine-finetuned")["metrics"]}
            path, backend = self.out / "engine/finetuned.engine.onnx", available(recipe.build.backend)
            with backend.open(path, threads=recipe.build.threads) as session:
                predictors["engine"] = engine_predictor(session, project.preprocess)
                pictures = project.task.pictures(self.out, predictors, scores)
            return pictures | {"detail": f"{len(pictures['files'])} pictures"}

        after = ["evaluate-baseline", "evaluate-pruned", "engine-finetuned"]
        return self.do("panels", "panels", after, [], work)

    # -- report -------------------------------------------------------------------------------------------------------

    def report(
        self,
        train: Result,
        pruned: Result,
        finetuned: Result,
        control: Result | None,
        scores: dict[str, Result],
        engines: dict[str, Result],
        gates: Result,
        timing: Result,
        pictures: Result,
        references: Mapping[str, tuple[Result, Result]],
    ) -> Result:
        names = {"baseline": "engine baseline", "finetuned": "engine pruned"}
        keys = self.project.task.row_keys
        rows = [_row(name, scores[name]["row"], scores[name]["metrics"], keys) for name in scores]
        for name, (score, engine) in references.items():
            names[name], scores[name], engines[name] = name, score, engine
        for name, title in names.items():
            static = scores[name]["row"] | {"size_mib": engines[name]["size_mib"]}
            timed = _timing(timing["engine"], timing["end_to_end"], title)
            if title == "engine pruned" and "speedup" in timed:
                ratio = scores["baseline"]["row"]["macs_g"] / static["macs_g"]
                timed["speedup_per_mac_reduction"] = timed["speedup"] / ratio
            rows.append(_row(title, static, engines[name]["metrics"], keys) | timed)
        for row in rows:
            if pruned["labels"] and row["name"] in ("pruned", "finetuned", "engine pruned"):
                row["labels"] = "; ".join(pruned["labels"])
            if row["name"] in references:
                row["labels"] = "not pruned, trained and fine-tuned as long, on the engine"
        metrics = {name: result["metrics"] for name, result in scores.items()}
        metrics |= {names[name]: result["metrics"] for name, result in engines.items()}
        curves = {"train": train["curves"], "sparse": pruned["phase"].get("curves", [])}
        curves["finetune"] = finetuned["curves"]
        if control:
            curves["control"] = control["curves"]
        return frame(self, "ok") | {
            "rows": rows,
            "curves": {name: rows for name, rows in curves.items() if rows},
            "groups": [{"id": g, "before": w[0], "after": w[1]} for g, w in pruned["widths"].items()],
            "locked": pruned["locked"],
            "classes": list(self.project.data.class_names),
            "palette": self.project.data.palette.tolist(),
            **self.project.task.report(metrics),
            **{key: value for key, value in pictures.items() if key not in ("files", "detail")},
            "checks": pruned["checks"],
            "bench": {key: timing[key] for key in ("engine", "end_to_end", "noise")},
            "gate": gates,
            "plan": {key: pruned[key] for key in PLAN_FACTS}
            | {key: value for key, value in pruned["phase"].items() if key not in ("curves", "labels")},
            "export": {names[name]: result["export"] for name, result in engines.items()},
            "inspector": {names[n]: r["inspector"] for n, r in engines.items() if r["inspector"]},
            "artefacts": {names[n]: sha256_artefact(self.out, r["artefact"]) for n, r in engines.items()},
        }


PLAN_FACTS = ("criterion", "options", "budget", "calibration", "labels", "kept")


def _best(result: Result) -> dict[str, float]:
    """The best validation score of a fit, under its name."""
    return {f"val_{result['metric']}": result[f"best_{result['metric']}"]}


def _row(name: str, static: Result, metrics: Result, keys: Iterable[str]) -> Result:
    return static | {"name": name} | {key: metrics[key] for key in keys}


def _timing(engine: Result, whole: Result, name: str) -> Result:
    """Times of a row; those of a noisy machine are left out, the report's `bench` has them."""
    session, request = engine["sessions"][name], whole["sessions"][name]
    end_to_end = {"end_to_end_ms_p50": request["latency_ms_p50"]} if whole["stable"] else {}
    if not engine["stable"]:
        return end_to_end
    return {
        "latency_ms_p50": session["latency_ms_p50"],
        "latency_ms_p90": session["latency_ms_p90"],
        "latency_ms_p99": session["latency_ms_p99"],
        "fps": session["throughput_fps"],
        "speedup": engine["speedup"].get(name, {"ratio": 1.0})["ratio"],
        **end_to_end,
    }
