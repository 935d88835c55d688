"""The experiment whose networks end as engines: exported, built, evaluated, gated and timed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch

from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.core.files import read_array
from vss.deploy.backends import AUTO, available, main_of, open_options
from vss.run.engines import make_engine, unpruned
from vss.run.job import Job
from vss.run.project import Project
from vss.run.report import Engine, Score
from vss.run.runner import Runner
from vss.sweep.experiment import EXPERIMENTS, Json, TrialDirs
from vss.sweep.prune import PruneExperiment, interleaved
from vss.train.evaluate import engine_predictor

ENGINES = {"baseline": "engine/baseline.engine.onnx", "trial": "engine/finetuned.engine.onnx"}


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
        results = {name: _result(job, dirs, step) for name, step in steps.items()}
        common = TrialDirs(dirs.shared, dirs.shared, dirs.computed)
        results |= {name: _result(job, common, f"evaluate-{name}") for name in unpruned(job.recipe)}
        failed = [verdict for verdict in job.project.task.verdicts(results) if verdict["passed"] is False]
        found["row"] |= _named("engine", engine, shared["row_keys"]) | {"ships": int(not failed)}
        found["row"]["engine_mib"] = engine.size_mib
        found["labels"] = [*found["labels"], *(f"{verdict['what']} {verdict['sentence']}" for verdict in failed)]

    def scored(self, recipe: Recipe) -> tuple[str, ...]:
        """The same of the trial's engine, and of the control."""
        return *unpruned(recipe), "engine-finetuned"

    def time(self, recipe: Recipe, dirs: TrialDirs, seconds: float) -> Json:
        """Latency of the trial's engine and of the baseline's, interleaved, on an image of the reported split."""
        project, runtime = Project.open(recipe), main_of(recipe.build)
        paths = {"baseline": dirs.shared / ENGINES["baseline"], "trial": dirs.folder / ENGINES["trial"]}
        image = torch.as_tensor(project.split(recipe.split)[0]["image"])[None]
        with ExitStack() as stack:
            sessions = {
                name: stack.enter_context(available(runtime).open(path, **open_options(recipe.build, runtime)))
                for name, path in paths.items()
            }
            feeds = {name: engine_predictor(each, project.preprocess).feed(image) for name, each in sessions.items()}
            return interleaved(recipe, sessions, feeds, seconds)


EXPERIMENTS.add("engine", EngineExperiment())


def _named(prefix: str, step: Score | Engine, keys: Iterable[str]) -> Json:
    return {f"{prefix}_{key}": step.metrics[key] for key in keys}


def _result(job: Job, dirs: TrialDirs, step: str) -> Json:
    """Scores of a finished step of a trial or a stage, with the array by image."""
    metrics: Json = Runner(dirs.folder, lambda *_: None).result(step)["metrics"]
    images = read_array(dirs.folder / "scores" / f"{step.removeprefix('evaluate-')}.npy")
    return metrics | {job.project.task.per_image: images}
