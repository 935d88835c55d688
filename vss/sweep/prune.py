"""The experiments of this package: train and score once, then prune, fine-tune and evaluate by every trial's recipe.

All criteria of a stage share one calibration pass, kept in a file that every trial reads a part of.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vss.core.config import PruneConfig, Recipe
from vss.core.errors import VssError
from vss.core.files import atomic, locked, read_array, safe_name, sha256_json
from vss.deploy import BACKENDS, bench
from vss.deploy.backends import AUTO
from vss.deploy.bench import unsteady
from vss.prune import CRITERIA, Statistics, collect, find_groups
from vss.run import pruning, runner
from vss.run.engines import make_engine, opened, unpruned
from vss.run.inputs import require_criterion, require_network
from vss.run.job import Job, check_run
from vss.run.project import Project, task_name
from vss.run.report import Engine, Score
from vss.run.runner import Runner
from vss.run.tracking import to_tensorboard
from vss.sweep.experiment import EXPERIMENTS, Experiment, Json, TrialDirs
from vss.train.evaluate import engine_predictor
from vss.train.header import header
from vss.train.tasks import TASKS, task_of
from vss.train.tasks.base import spread, write_panels

log = logging.getLogger(__name__)

Mode = Literal["eval", "train"]
SEPARATOR = "|"
ENGINES = {"baseline": "engine/baseline.engine.onnx", "trial": "engine/finetuned.engine.onnx"}
PATIENCE = 4
"""An unstable latency is measured for up to so many times as long."""


class PruneExperiment(Experiment):
    """Networks x criteria x budgets x seeds on any task that `vss.run` does."""

    metric = "miou_pct"
    times = True
    shared_steps: ClassVar[tuple[str, ...]] = ("train", "evaluate")

    def stage_inputs(self, recipe: Recipe) -> Json:
        return {kind: runner.depends(recipe, kind) for kind in self.shared_steps}

    def check(self, recipe: Recipe) -> None:
        """Names and options of the network and of the criterion; the budget was checked with the recipe."""
        require_network(recipe.model)
        require_criterion(recipe.prune)

    def preflight(self, recipe: Recipe, *, here: bool) -> None:
        """As a run, less engines where there are none."""
        check_run(Project.open(recipe), engines="engine" in self.shared_steps, here=here)

    def preflight_inputs(self, recipe: Recipe) -> Json:
        """All but criterion and budget, which `check` has seen, where no plan or time is to be looked at."""
        found = recipe.model_dump(mode="json", exclude={"name", "prune"})
        whole = recipe.prune.latency or recipe.prune.lender
        return found | {"prune": recipe.prune.model_dump(mode="json") if whole else recipe.prune.keep}

    def stage(self, recipes: list[Recipe], dirs: TrialDirs) -> Json:
        """The trained network, its scores, and one calibration pass per calibration set for all criteria."""
        job = job_of(recipes[0].model_copy(update={"name": "baseline"}), dirs)
        task, train = job.project.task, job.train()
        score = job.score("baseline", "train")
        sets: dict[str, list[PruneConfig]] = {}
        for recipe in recipes:
            sets.setdefault(_set_name(recipe.prune), []).append(recipe.prune)
        faults = {name: self._calibrate(job, name, configs) for name, configs in sets.items()}
        found = {
            "key": job.step.keys["train"],
            "score_key": job.step.keys["evaluate-baseline"],
            "row": _flat(score),
            "metric": task.metric,
            "title": task.title,
            "row_keys": list(task.row_keys),
            "iou_pct": score.metrics.get("iou_pct"),
            "classes": list(task.classes),
            "protocol": task.protocol,
            "curves": train.curves,
            "faults": faults,
        }
        self.finish_stage(job, found)
        return found | {"seconds": sum(record["seconds"] for record in job.step.records)}

    def finish_stage(self, job: Job, found: Json) -> None:
        """What a derived experiment adds to the stage."""

    def finish_trial(self, job: Job, dirs: TrialDirs, shared: Json, found: Json) -> None:
        """What a derived experiment adds to a trial."""

    def over_folds(self, trials: list[tuple[Recipe, TrialDirs]]) -> Json | None:
        """Out-of-fold decisions of the last network of every trial beside those of its baseline."""
        recipe, first = trials[0]
        kind = TASKS[task_of(task_name(recipe.model, header(first.shared / "baseline.safetensors").model))]
        names = self.scored(recipe)
        arrays = {
            name: [read_array((each.folder if name == names[-1] else each.shared) / f"scores/{name}.npy")
                   for _, each in trials]
            for name in names
        }  # fmt: skip
        return kind.over_folds(recipe, arrays)

    def scored(self, recipe: Recipe) -> tuple[str, ...]:
        """Names of the scores of the stage's networks, and at last that of a trial's network."""
        return "baseline", "finetuned" if recipe.finetune.epochs else "pruned"

    def _calibrate(self, job: Job, name: str, configs: list[PruneConfig]) -> dict[str, str]:
        """Write `statistics-NAME.safetensors`; returns what could not be had, with the reasons."""
        needs, config, file = _wanted(configs), configs[0], f"statistics-{name}.safetensors"
        wanted = {mode: sorted(table) for mode, table in needs.items()}
        depends = runner.depends(job.recipe.model_copy(update={"prune": config}), "statistics", wanted)
        if not any(needs.values()):
            return {}

        def work() -> Json:
            model = job.project.load(job.out / "baseline.safetensors")
            faults = _write_statistics(job.out / file, job.project, model, config, needs)
            return {"faults": faults, "detail": f"{sum(map(len, needs.values()))} statistics"}

        return dict(job.step(f"statistics-{name}", depends, ["train"], [file], work)["faults"])

    def trial(self, recipe: Recipe, dirs: TrialDirs, shared: Json) -> Json:
        """Prune, fine-tune where the recipe has epochs for it, and evaluate after both."""
        job = job_of(recipe, dirs)
        _link(dirs.shared / "baseline.safetensors", dirs.folder / "baseline.safetensors")
        job.step.keys["train"] = shared["key"]
        name = _set_name(recipe.prune)
        file = dirs.shared / f"statistics-{name}.safetensors"
        with _sparse_phase(recipe, dirs):
            pruned = job.prune(_read_statistics(file, recipe.prune, shared["faults"][name]))
        stages = {"pruned": job.score("pruned", "prune")}
        curves: list[Json] = []
        if recipe.finetune.epochs:
            curves = job.finetune("finetune", "pruned.safetensors", "prune").curves
            stages["finetuned"] = job.score("finetuned", "finetune")
            for leftover in dirs.folder.glob("finetune/*/lightning/resume.ckpt"):
                leftover.unlink()  # the fit is over; its weights are in finetuned.safetensors
        last = list(stages.values())[-1]
        row, base = _flat(last), shared["row"]
        row |= {f"pruned_{key}": value for key, value in _metrics(stages["pruned"]).items()}
        row |= {f"{kind}_kept": share for kind, share in pruned.kept.items()}
        keys = [key for key in shared["row_keys"] if row.get(key) is not None and base.get(key) is not None]
        row |= {f"{key}_change": row[key] - base[key] for key in keys}
        found = {
            "row": row,
            "stage": list(stages)[-1],
            "iou_pct": last.metrics.get("iou_pct"),
            "groups": [{"id": name, "before": w[0], "after": w[1]} for name, w in pruned.widths.items()],
            "plan_sha256": pruned.plan_sha256,
            "labels": pruned.labels,
            "curves": curves,
            "steps": job.step.records,
        }
        self.finish_trial(job, dirs, shared, found)
        to_tensorboard(dirs.folder, {f"cell/{key}": value for key, value in row.items()})
        return found

    def time(self, recipe: Recipe, dirs: TrialDirs, seconds: float) -> Json:
        """Latency of the last network and of the baseline, interleaved, in torch on the CPU or the first device."""
        project = Project.open(recipe)
        paths = {"baseline": dirs.shared / "baseline.safetensors", "trial": last_network(dirs.folder)}
        backend, size = BACKENDS["torch"], project.preprocess.size
        options: dict[str, Any] = {"size": size, "device": "cuda" if torch.cuda.is_available() else "cpu"}
        sessions = {name: backend.open(project.load(path), **options) for name, path in paths.items()}
        image = np.random.default_rng(0).standard_normal((1, 3, *size)).astype(np.float32)
        feeds = {name: {"image": image} for name in sessions}
        row = interleaved(recipe, sessions, feeds, seconds)
        return row | ({"pixels_per_s": row["fps"] * size[0] * size[1]} if "fps" in row else {})

    def pictures(self, recipe: Recipe, dirs: TrialDirs, extra: Json) -> Json:
        """Image, truth, the labels of the baseline and of each of `extra["trials"]`; segmentation alone."""
        project = Project.open(recipe)
        if project.task.metric != self.metric:
            return {"panels": []}
        root, size = dirs.folder.parent.parent, extra.get("panels", 2)
        paths = {"baseline": dirs.shared / "baseline.safetensors"}
        paths |= {each["title"]: last_network(root / "runs" / each["id"]) for each in extra["trials"]}
        predictors = {title: project.task.predictor(project.load(path)) for title, path in paths.items()}
        split = project.split(recipe.split)
        name, place = extra["name"], f"pictures/{safe_name(extra['name'])}"
        panels = write_panels(root / place, split, spread(split, size), predictors, project.data.palette)
        for panel in panels:
            panel["id"] = f"{name}: {panel['id']}"
            panel["files"] = {title: f"{place}/{path}" for title, path in panel["files"].items()}
        return {"panels": panels, "palette": project.data.palette.tolist()}


@contextlib.contextmanager
def _sparse_phase(recipe: Recipe, dirs: TrialDirs) -> Iterator[None]:
    """Trials that differ in their budget alone train their sparse phase once, in the stage's folder; others wait."""
    if not CRITERIA[recipe.prune.criterion].sparse_phase:
        yield
        return
    (dirs.shared / "sparse").mkdir(parents=True, exist_ok=True)
    _link(dirs.shared / "sparse", dirs.folder / "sparse")
    with locked(dirs.shared / "sparse" / ".lock", wait=True):
        yield


def last_network(folder: Path) -> Path:
    tuned = folder / "finetuned.safetensors"
    return tuned if tuned.is_file() else folder / "pruned.safetensors"


def job_of(recipe: Recipe, dirs: TrialDirs) -> Job:
    """A run in the folder of a trial or a stage, whose finished steps are noted."""

    def say(name: str, status: str, seconds: float, detail: str) -> None:
        log.info("%7s %-24s %8.1f s  %s", status, name, seconds, detail)
        if status in ("ok", "not passed", "not measured"):
            dirs.computed(name, steps.keys[name])

    steps = Runner(dirs.folder, say)
    return Job(Project.open(recipe), dirs.folder, steps, False, "")


def _flat(score: Score) -> Json:
    """A row: sizes and scalar metrics of one evaluated network."""
    return {key: value for key, value in score.row.items() if key != "name"} | _metrics(score)


def _metrics(score: Score) -> Json:
    found = score.metrics.items()
    return {key: v for key, v in found if isinstance(v, int | float) and not isinstance(v, bool) and key != "images"}


def _link(target: Path, link: Path) -> None:
    """A relative symbolic link, so that the folder of a sweep can be moved."""
    link.parent.mkdir(parents=True, exist_ok=True)
    relative = os.path.relpath(target, link.parent)
    if not (link.is_symlink() and os.readlink(link) == relative):
        link.unlink(missing_ok=True)
        link.symlink_to(relative)


def interleaved(recipe: Recipe, sessions: dict[str, Any], feeds: dict[str, Any], seconds: float) -> Json:
    """Times of the session `trial` beside those of `baseline`; of a noisy machine how noisy it was."""
    found = bench(
        sessions, feeds, spread=recipe.bench.spread, window_seconds=seconds / 16, min_seconds=seconds / 2,
        max_seconds=PATIENCE * seconds,
    )  # fmt: skip
    if not found["stable"]:
        return unsteady(found)
    row = found["sessions"]["trial"]
    return {
        "latency_ms_p50": row["latency_ms_p50"],
        "latency_ms_p99": row["latency_ms_p99"],
        "fps": row["throughput_fps"],
        "baseline_latency_ms_p50": found["sessions"]["baseline"]["latency_ms_p50"],
        "speedup": found["speedup"]["trial"]["ratio"],
    }


def _set_name(config: PruneConfig) -> str:
    """Of a calibration set, by its settings."""
    return sha256_json([config.batches, config.batch_size, list(config.keep)])[:8]


def _wanted(configs: Iterable[PruneConfig]) -> dict[Mode, dict[str, Any]]:
    """Mode of the batch norms -> {name of a statistic: need}, of all criteria together."""
    found: dict[Mode, dict[str, Any]] = {"eval": {}, "train": {}}
    for config in configs:
        for criterion in pruning.criteria_of(config):
            found[criterion.batch_norm_mode()] |= {str(need): need for need in criterion.needs}
    return found


def _write_statistics(
    path: Path, project: Project, model: nn.Module, config: PruneConfig, needs: dict[Mode, dict[str, Any]]
) -> dict[str, str]:
    """One pass per mode, as safetensors {mode|need|group: statistic} with the batches of every mode.

    A statistic that stops the pass is left out of it; returns {mode|need: reason}.
    """
    groups = list(find_groups(model, torch.zeros(1, 3, *project.preprocess.size), keep=config.keep))
    loss = project.task.calibration_loss()
    found: dict[str, Tensor] = {}
    seen: dict[str, str] = {}
    faults: dict[str, str] = {}

    def run(mode: Mode, names: list[str]) -> None:
        batches = project.calibration(config.batches, config.batch_size)
        results, count = collect(model, groups, [needs[mode][n] for n in names], batches, loss, batch_norm=mode)
        seen[mode] = str(count)
        for need, table in results.items():
            tensors = {group: value.detach().cpu().contiguous().clone() for group, value in table.items()}
            found.update({SEPARATOR.join((mode, need, group)): value for group, value in tensors.items()})

    for mode, table in needs.items():
        try:
            if table:
                run(mode, sorted(table))
        except VssError:
            for name in sorted(table):
                try:
                    run(mode, [name])
                except VssError as error:
                    faults[SEPARATOR.join((mode, name))] = str(error)
    with atomic(path) as temporary:
        save_file(found, temporary, metadata=seen)
    return faults


def _read_statistics(path: Path, config: PruneConfig, faults: dict[str, str]) -> Statistics | None:
    """What the criteria of `config` need in the mode of the first; None where that is nothing, a `VssError` where it
    could not be had."""
    asked = pruning.criteria_of(config)
    mode = asked[0].batch_norm_mode()
    needs = sorted({str(need) for each in asked if each.batch_norm_mode() == mode for need in each.needs})
    if not needs:
        return None
    for need in needs:
        if SEPARATOR.join((mode, need)) in faults:
            raise VssError(faults[SEPARATOR.join((mode, need))])
    collected: dict[str, dict[str, Tensor]] = {need: {} for need in needs}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (no mapping, only a method of that name)
            own_mode, need, group = name.split(SEPARATOR, 2)
            if own_mode == mode and need in needs:
                collected[need][group] = file.get_tensor(name)
        return collected, int(file.metadata()[mode])


class EngineExperiment(PruneExperiment):
    """The same, and every network is also exported, built, evaluated, gated and timed."""

    shared_steps = ("train", "evaluate", "finetune", "engine")

    def check(self, recipe: Recipe) -> None:
        """Engines are made of fine-tuned networks."""
        super().check(recipe)
        if not recipe.finetune.epochs:
            raise VssError("the experiment 'engine' fine-tunes every network; set finetune.epochs to 1 or more.")
        if recipe.build.backend == AUTO:
            raise VssError("build.backend is auto, and engines of a sweep are compared in one runtime; name it.")

    def stage_inputs(self, recipe: Recipe) -> Json:
        """The control and the engine of the baseline are shared as well."""
        return super().stage_inputs(recipe) | {"control": recipe.control}

    def finish_stage(self, job: Job, found: Json) -> None:
        """The row also has `engine_*` and, with a control, `control_*` figures."""
        keys = found["row_keys"]
        found["row"] |= _named("engine", make_engine(job, "baseline", "train"), keys)
        if job.recipe.control:
            job.finetune("control", "baseline.safetensors", "train")
            found["row"] |= _named("control", job.score("control", "control"), keys)

    def finish_trial(self, job: Job, dirs: TrialDirs, shared: Json, found: Json) -> None:
        """The row also has `engine_*` figures and `ships`: 1 where the engine passes all gates of the recipe, else 0;
        the labels say which it does not."""
        engine = make_engine(job, "finetuned", "finetune")
        steps = {"finetuned": "evaluate-finetuned", "engine": "engine-finetuned"}
        results = {name: job.scores_of(step) for name, step in steps.items()}
        stage = replace(job, out=dirs.shared, step=Runner(dirs.shared, lambda *_: None))
        results |= {name: stage.scores_of(f"evaluate-{name}") for name in unpruned(job.recipe)}
        failed = [verdict for verdict in job.project.task.verdicts(results) if verdict["passed"] is False]
        found["row"] |= _named("engine", engine, shared["row_keys"]) | {"ships": int(not failed)}
        found["row"]["engine_mib"] = engine.size_mib
        found["labels"] = [*found["labels"], *(f"{verdict['what']} {verdict['sentence']}" for verdict in failed)]

    def scored(self, recipe: Recipe) -> tuple[str, ...]:
        """The same of the trial's engine, and of the control."""
        return *unpruned(recipe), "engine-finetuned"

    def time(self, recipe: Recipe, dirs: TrialDirs, seconds: float) -> Json:
        """Latency of the trial's engine and of the baseline's, interleaved, on an image of the reported split."""
        job = job_of(recipe, dirs)
        paths = {"baseline": f"{dirs.shared}/{ENGINES['baseline']}", "trial": f"{dirs.folder}/{ENGINES['trial']}"}
        image = torch.as_tensor(job.project.split(recipe.split)[0]["image"])[None]
        with opened(job, paths) as sessions:
            preprocess = job.project.preprocess
            feeds = {name: engine_predictor(each, preprocess).feed(image) for name, each in sessions.items()}
            return interleaved(recipe, sessions, feeds, seconds)


EXPERIMENTS.add("prune", PruneExperiment())
EXPERIMENTS.add("engine", EngineExperiment())


def _named(prefix: str, step: Score | Engine, keys: Iterable[str]) -> Json:
    return {f"{prefix}_{key}": step.metrics[key] for key in keys}
