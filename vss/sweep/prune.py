"""The study of this package: train once, score once, then prune, fine-tune and evaluate by every cell's recipe."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from vss import models
from vss.core.config import PruneConfig, Recipe
from vss.core.errors import VssError
from vss.core.files import read_array, safe_name
from vss.core.locks import locked
from vss.deploy import BACKENDS, bench
from vss.deploy.backends import available
from vss.deploy.bench import unsteady
from vss.prune import CRITERIA, make_criterion
from vss.run import runner as keys
from vss.run.job import Job
from vss.run.precision_step import unpruned
from vss.run.preflight import check_run
from vss.run.project import Project
from vss.run.runner import Result, Runner
from vss.sweep import calibrate
from vss.sweep.after import to_tensorboard
from vss.sweep.study import STUDIES, Json, Place, Study
from vss.train import checkpoint
from vss.train.evaluate import engine_predictor
from vss.train.pictures import spread, write_panels

log = logging.getLogger(__name__)


PATIENCE = 4
"""A latency that does not stand still is measured for up to so many times as long."""


def in_turns(recipe: Recipe, sessions: dict[str, Any], feeds: dict[str, Any], seconds: float) -> Json:
    """Times of the session `cell` beside those of `baseline`; of a noisy machine how noisy it was."""
    found = bench(
        sessions,
        feeds,
        min_seconds=seconds / 2,
        max_seconds=PATIENCE * seconds,
        window_seconds=seconds / 16,
        spread=recipe.bench.spread,
    )
    if not found["stable"]:
        return unsteady(found)
    row = found["sessions"]["cell"]
    return {
        "latency_ms_p50": row["latency_ms_p50"],
        "latency_ms_p99": row["latency_ms_p99"],
        "fps": row["throughput_fps"],
        "baseline_latency_ms_p50": found["sessions"]["baseline"]["latency_ms_p50"],
        "speedup": found["speedup"]["cell"]["ratio"],
    }


class PruneStudy(Study):
    """Networks x criteria x budgets x seeds on any task that `vss.run.Job` does."""

    metric = "miou_pct"
    times = True
    shared_steps: ClassVar[tuple[str, ...]] = ("train", "evaluate")

    def share_of(self, recipe: Recipe) -> Json:
        """The trained network and its scores."""
        return {kind: keys.depends(recipe, kind) for kind in self.shared_steps}

    def check(self, recipe: Recipe) -> None:
        """Names and options of the network and of the criterion; the budget was checked with the recipe."""
        models.MODELS.canonical(recipe.model.name)
        make_criterion(recipe.prune.criterion, **recipe.prune.options)

    def preflight(self, recipe: Recipe, *, here: bool) -> None:
        """As a run, less engines where there are none."""
        check_run(Project.open(recipe), engines="engine" in self.shared_steps, here=here)

    def preflight_of(self, recipe: Recipe) -> Json:
        """All but criterion and budget, which `check` has seen."""
        found = recipe.model_dump(mode="json", exclude={"name", "prune"})
        return found | {"prune": recipe.prune.model_dump(mode="json") if recipe.prune.latency else recipe.prune.keep}

    def share(self, recipes: list[Recipe], place: Place) -> Json:
        """The trained network, its scores, and one calibration pass per calibration set for all criteria."""
        job = job_of(recipes[0].model_copy(update={"name": "baseline"}), place)
        task, train = job.project.task, job.train()
        score = job.score("baseline", "train")
        sets = calibrate.calibrations(recipes)
        faults = {name: self._calibrate(job, name, configs) for name, configs in sets.items()}
        found = {
            "key": job.step.keys["train"],
            "score_key": job.step.keys["evaluate-baseline"],
            "row": _flat(score),
            "metric": task.metric,
            "title": task.title,
            "row_keys": list(task.row_keys),
            "iou_pct": score["metrics"].get("iou_pct"),
            "classes": list(task.classes),
            "protocol": task.protocol,
            "curves": train.get("curves", []),
            "faults": faults,
        }
        self.finish_share(job, found)
        return found | {"seconds": sum(record["seconds"] for record in job.step.records)}

    def finish_share(self, job: Job, found: Json) -> None:
        """What another study adds to the shared part."""

    def finish_cell(self, job: Job, place: Place, shared: Json, found: Json) -> None:
        """What another study adds to a cell."""

    def _calibrate(self, job: Job, name: str, configs: list[PruneConfig]) -> dict[str, str]:
        """Write `statistics-NAME.safetensors`; returns what could not be had, with the reasons."""
        needs, config, file = calibrate.wanted(configs), configs[0], f"statistics-{name}.safetensors"
        wanted = {mode: sorted(table) for mode, table in needs.items()}
        depends = keys.depends(job.recipe.model_copy(update={"prune": config}), "statistics", wanted)
        if not any(needs.values()):
            return {}

        def work() -> Json:
            model = checkpoint.load(job.out / "baseline.safetensors")
            found, seen, faults = calibrate.measure(job.project, model, config, needs)
            calibrate.write(job.out / file, found, seen)
            return {"faults": faults, "detail": f"{sum(map(len, needs.values()))} statistics"}

        faults: dict[str, str] = job.step(f"statistics-{name}", depends, ["train"], [file], work)["faults"]
        return faults

    def cell(self, recipe: Recipe, place: Place, shared: Json) -> Json:
        """Prune, fine-tune where the recipe has epochs for it, and evaluate after both."""
        job = job_of(recipe, place)
        _link(place.shared / "baseline.safetensors", place.folder / "baseline.safetensors")
        job.step.keys["train"] = shared["key"]
        name = calibrate.set_name(recipe.prune)
        file = place.shared / f"statistics-{name}.safetensors"
        with _sparse_phase(recipe, place):
            pruned = job.prune(calibrate.read(file, recipe.prune, shared["faults"][name]))
        stages = {"pruned": job.score("pruned", "prune")}
        curves: list[Json] = []
        if recipe.finetune.epochs:
            curves = job.finetune("finetune", "pruned.safetensors", "prune")["curves"]
            stages["finetuned"] = job.score("finetuned", "finetune")
            for leftover in place.folder.glob("finetune/*/lightning/resume.ckpt"):
                leftover.unlink()  # the fit is over; its weights are in finetuned.safetensors
        last = list(stages.values())[-1]
        row, base = _flat(last), shared["row"]
        row |= {f"pruned_{key}": value for key, value in _metrics(stages["pruned"]).items()}
        row |= {f"{kind}_kept": share for kind, share in pruned["kept"].items()}
        keys = [key for key in shared["row_keys"] if row.get(key) is not None and base.get(key) is not None]
        row |= {f"{key}_change": row[key] - base[key] for key in keys}
        found = {
            "row": row,
            "stage": list(stages)[-1],
            "iou_pct": last["metrics"].get("iou_pct"),
            "groups": [{"id": name, "before": w[0], "after": w[1]} for name, w in pruned["widths"].items()],
            "plan_sha256": pruned["plan_sha256"],
            "labels": pruned["labels"],
            "curves": curves,
            "steps": job.step.records,
        }
        self.finish_cell(job, place, shared, found)
        to_tensorboard(place.folder, row)
        return found

    def time(self, recipe: Recipe, place: Place, seconds: float) -> Json:
        """Latency of the last network and of the baseline, in turns, in torch on the CPU or the first device."""
        project = Project.open(recipe)
        paths = {"baseline": place.shared / "baseline.safetensors", "cell": last_network(place.folder)}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        backend, size = BACKENDS["torch"], project.preprocess.size
        options: dict[str, Any] = {"size": size, "device": device}
        sessions = {name: backend.open(checkpoint.load(path), **options) for name, path in paths.items()}
        image = np.random.default_rng(0).standard_normal((1, 3, *size)).astype(np.float32)
        feeds = {name: {"image": image} for name in sessions}
        row = in_turns(recipe, sessions, feeds, seconds)
        return row | ({"pixels_per_s": row["fps"] * size[0] * size[1]} if "fps" in row else {})

    def pictures(self, recipe: Recipe, place: Place, extra: Json) -> Json:
        """Image, truth, what the baseline says and what each of `extra["cells"]` says; segmentation alone."""
        project = Project.open(recipe)
        if project.task.metric != self.metric:
            return {"panels": []}
        root, size = place.folder.parent.parent, extra.get("panels", 2)
        paths = {"baseline": place.shared / "baseline.safetensors"}
        paths |= {cell["title"]: last_network(root / "runs" / cell["id"]) for cell in extra["cells"]}
        predictors = {title: project.task.predictor(checkpoint.load(path)) for title, path in paths.items()}
        split = project.split(recipe.split)
        folder = root / "pictures" / safe_name(extra["name"])
        panels = write_panels(folder, split, spread(split, size), predictors, project.data.palette)
        files = [
            {title: f"pictures/{safe_name(extra['name'])}/{path}" for title, path in panel["files"].items()}
            for panel in panels
        ]
        found = [{"id": f"{extra['name']}: {panel['id']}", "files": f} for panel, f in zip(panels, files, strict=True)]
        return {"panels": found, "palette": project.data.palette.tolist()}


STUDIES.add("prune", PruneStudy())


@contextlib.contextmanager
def _sparse_phase(recipe: Recipe, place: Place) -> Iterator[None]:
    """Cells that differ in their budget alone train their sparse phase once: it lies in the shared part, and who comes
    second waits for the first and finds it done."""
    if not CRITERIA[recipe.prune.criterion].sparse_phase:
        yield
        return
    (place.shared / "sparse").mkdir(parents=True, exist_ok=True)
    _link(place.shared / "sparse", place.folder / "sparse")
    with locked(place.shared / "sparse" / ".lock", wait=True):
        yield


def last_network(folder: Path) -> Path:
    """The network that a cell came to."""
    tuned = folder / "finetuned.safetensors"
    return tuned if tuned.is_file() else folder / "pruned.safetensors"


def job_of(recipe: Recipe, place: Place) -> Job:
    """A run in the folder of a cell or a shared part, whose finished steps are noted."""
    runner = Runner(place.folder, lambda *_: None)

    def say(name: str, status: str, seconds: float, detail: str) -> None:
        log.info("%7s %-24s %8.1f s  %s", status, name, seconds, detail)
        if status in ("ok", "not passed", "not measured"):
            place.computed(name, runner.keys[name])

    runner.say = say
    return Job(Project.open(recipe), place.folder, runner, place.progress, "")


def _flat(score: Json) -> Json:
    """A row: sizes and scalar metrics of one evaluated network."""
    static = {key: value for key, value in score["row"].items() if key != "name"}
    return static | _metrics(score)


def _metrics(score: Json) -> Json:
    return {
        key: value
        for key, value in score["metrics"].items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in ("images",)
    }


def _link(target: Path, link: Path) -> None:
    """A relative symbolic link, so that the folder of a sweep can be moved."""
    link.parent.mkdir(parents=True, exist_ok=True)
    relative = os.path.relpath(target, link.parent)
    if link.is_symlink() and os.readlink(link) == relative:
        return
    link.unlink(missing_ok=True)
    link.symlink_to(relative)


# The experiment that ends in engines: every network is also exported, built, evaluated, gated and timed.


ENGINES = {"baseline": "engine/baseline.engine.onnx", "cell": "engine/finetuned.engine.onnx"}


class EngineStudy(PruneStudy):
    """Networks x criteria x budgets x seeds, from training to engines that pass the gates or do not."""

    shared_steps = ("train", "evaluate", "finetune", "engine")

    def check(self, recipe: Recipe) -> None:
        """Engines are made of fine-tuned networks."""
        super().check(recipe)
        if not recipe.finetune.epochs:
            raise VssError("the study 'engine' fine-tunes every network; set finetune.epochs to 1 or more.")

    def share_of(self, recipe: Recipe) -> Json:
        """The control and the engine of the baseline are shared as well."""
        return super().share_of(recipe) | {"control": recipe.control}

    def finish_share(self, job: Job, found: Json) -> None:
        """The row also has `engine_*` and, with a control, `control_*` figures."""
        keys = found["row_keys"]
        found["row"] |= _named("engine", job.engine("baseline", "train"), keys)
        if job.recipe.control:
            job.finetune("control", "baseline.safetensors", "train")
            found["row"] |= _named("control", job.score("control", "control"), keys)

    def finish_cell(self, job: Job, place: Place, shared: Json, found: Json) -> None:
        """The row also has `engine_*` figures and `ships`: 1 where the engine passes all gates of the recipe, else 0;
        the labels say which it does not."""
        engine = job.engine("finetuned", "finetune")
        steps = {"finetuned": "evaluate-finetuned", "engine": "engine-finetuned"}
        results = {name: _result(job, place, step) for name, step in steps.items()}
        common = Place(place.shared, place.shared, place.computed)
        results |= {name: _result(job, common, f"evaluate-{name}") for name in unpruned(job.recipe)}
        failed = [verdict for verdict in job.project.task.verdicts(results) if verdict["passed"] is False]
        found["row"] |= _named("engine", engine, shared["row_keys"]) | {"ships": int(not failed)}
        found["row"]["engine_mib"] = engine["size_mib"]
        found["labels"] = [*found["labels"], *(f"{verdict['what']} {verdict['sentence']}" for verdict in failed)]

    def time(self, recipe: Recipe, place: Place, seconds: float) -> Json:
        """Latency of the cell's engine and of the baseline's, in turns, on an image of the reported split."""
        project, backend = Project.open(recipe), available(recipe.build.backend)
        paths = {"baseline": place.shared / ENGINES["baseline"], "cell": place.folder / ENGINES["cell"]}
        image = torch.as_tensor(project.split(recipe.split)[0]["image"])[None]
        with ExitStack() as stack:
            sessions = {
                name: stack.enter_context(backend.open(path, threads=recipe.build.threads))
                for name, path in paths.items()
            }
            feeds = {name: engine_predictor(each, project.preprocess).feed(image) for name, each in sessions.items()}
            return in_turns(recipe, sessions, feeds, seconds)


STUDIES.add("engine", EngineStudy())


def _named(prefix: str, step: Result, keys: Iterable[str]) -> Json:
    return {f"{prefix}_{key}": step["metrics"][key] for key in keys}


def _result(job: Job, place: Place, step: str) -> Json:
    """Scores of a finished step of a cell or the shared part, with the array by image."""
    metrics: Json = Runner(place.folder, lambda *_: None).result(step)["metrics"]
    images = read_array(place.folder / "scores" / f"{step.removeprefix('evaluate-')}.npy")
    return metrics | {job.project.task.per_image: images}
