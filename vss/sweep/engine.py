"""The study that ends in engines: as `prune`, and every network is exported, built, evaluated, gated and timed as an
engine.

The shared part also has the engine of the baseline and, where the recipe has a control, the unpruned network fine-tuned
for as long: that is what a cell must not fall behind.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.core.files import read_array
from vss.deploy.backends import available
from vss.run.job import Job
from vss.run.precision_step import unpruned
from vss.run.project import Project
from vss.run.runner import Result, Runner
from vss.sweep.prune import PruneStudy, in_turns
from vss.sweep.study import STUDIES, Json, Place
from vss.train.evaluate import engine_predictor

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
        sessions = {name: backend.open(path, threads=recipe.build.threads) for name, path in paths.items()}
        image = torch.as_tensor(project.split(recipe.split)[0]["image"])[None]
        feeds = {name: engine_predictor(each, project.preprocess).feed(image) for name, each in sessions.items()}
        times = in_turns(recipe, sessions, feeds, seconds)
        for session in sessions.values():
            session.close()
        return times


STUDIES.add("engine", EngineStudy())


def _named(prefix: str, step: Result, keys: Iterable[str]) -> Json:
    return {f"{prefix}_{key}": step["metrics"][key] for key in keys}


def _result(job: Job, place: Place, step: str) -> Json:
    """Scores of a finished step of a cell or the shared part, with the array by image."""
    metrics: Json = Runner(place.folder, lambda *_: None).result(step)["metrics"]
    images = read_array(place.folder / "scores" / f"{step.removeprefix('evaluate-')}.npy")
    return metrics | {job.project.task.per_image: images}
