"""The unpruned networks of `references`: trained, scored and timed beside the pruned one, to see whether to prune.

Each is trained by the recipe's `train` and then by `finetune`, as the control is, so that it has had as many steps as
the pruned network; its engine is timed in turns with the two of the run. It works in its own folder below `references`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from vss.core.config import ModelConfig
from vss.core.errors import VssError
from vss.core.files import safe_name
from vss.run.project import Project
from vss.run.runner import Result, Runner

FOLDER = "references"


def title_of(config: ModelConfig) -> str:
    """The row of a reference: its name and options, or its checkpoint.

    >>> title_of(ModelConfig(name="unet", options={"width": 8}))
    'reference unet width=8'
    """
    parts = [config.name, *(f"{key}={value}" for key, value in config.options.items())]
    return " ".join(["reference", *([Path(config.checkpoint).stem] if config.checkpoint else parts)])


@dataclass(frozen=True)
class References:
    """Title -> the job of one network (`vss.run.Job`, with a recipe, folder and steps of its own)."""

    jobs: Mapping[str, Any]
    keys: dict[str, str]

    @classmethod
    def open(cls, job: Any) -> Self:
        """Of a run; what can be refused is refused now, before anything is trained."""
        found: dict[str, Any] = {}
        for config in job.recipe.references:
            title, recipe = title_of(config), job.recipe.model_copy(update={"model": config, "references": ()})
            folder = job.out / FOLDER / safe_name(re.sub(r"[^\w.=-]+", "-", title.removeprefix("reference ")))
            if folder in [each.out for each in found.values()]:
                raise VssError(f"two references are called {title!r}; give one, or other options.")
            project = Project(recipe, job.project.data, job.project.preprocess)
            if type(project.task) is not type(job.project.task):
                raise VssError(f"{title} is not for the task of {job.recipe.model.name}; their scores do not compare.")
            project.build_model()
            steps = Runner(folder, job.step.say, job.step.records, title=f"{title}: ")
            found[title] = replace(job, project=project, out=folder, step=steps)
        return cls(found, job.step.keys)

    @property
    def engines(self) -> dict[str, str]:
        """Title -> engine below the folder of the run."""
        return {title: f"{FOLDER}/{job.out.name}/engine/control.engine.onnx" for title, job in self.jobs.items()}

    def make(self) -> dict[str, tuple[Result, Result]]:
        """Title -> results of the steps that score the network in torch, and that make and score its engine."""
        found = {}
        for title, job in self.jobs.items():
            job.train()
            job.finetune("control", "baseline.safetensors", "train")
            score, engine = job.score("control", "control"), job.engine("control", "control")
            self.keys[title] = job.step.keys["engine-control"]
            artefact = engine["artefact"]
            files = {role: f"{FOLDER}/{job.out.name}/{name}" for role, name in artefact["files"].items()}
            found[title] = score, engine | {"artefact": artefact | {"files": files}}
        return found
