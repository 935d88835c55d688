"""A project's fits: training and fine-tuning through `vss.train.fit`, and what is refused before one starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from vss.core.config import FitConfig
from vss.core.errors import VssError, shown
from vss.data import require_classes
from vss.train import checkpoint

if TYPE_CHECKING:
    from vss.run.project import Project


def train(
    project: Project,
    model: nn.Module,
    config: FitConfig,
    run_dir: Path,
    *,
    teacher: nn.Module | None = None,
    progress: bool = True,
    phase: Any = None,
) -> dict[str, Any]:
    """Train or fine-tune `model` in place; see `vss.train.fit`."""
    from vss.train.fit import check_settings, fit

    check_settings(config)  # before the data is hashed
    project.task.check_labels("train", "val")
    settings: dict[str, Any] = {"save": project.save, "seed": project.recipe.seed, "progress": progress}
    with project.task.training(model):
        return fit(model, fit_data(project, config), config, run_dir, teacher=teacher, phase=phase, **settings)


def fit_data(project: Project, config: FitConfig) -> Any:
    """Loaders, loss and score, as `vss.train.fit` takes them."""
    from vss.train.fit import FitData

    recipe = project.recipe
    data = recipe.data.model_dump(mode="json", exclude={"root", "workers"})  # neither changes what is learnt
    return FitData(
        train=lambda rank, world: project.loader("train", config, rank, world),
        val=lambda rank, world: project.loader("val", config, rank, world),
        normalise=project.preprocess.normalise,
        learner=project.task.learner(config),
        about={
            "data": data | {name: project.split(name).sha256() for name in ("train", "val")},
            "preprocess": project.preprocess.sha256,
            "classes": list(project.task.classes),
            "defect": recipe.defect.model_dump(mode="json"),
        },
    )


def check_fits(project: Project, *, tuned: bool = True) -> None:
    """Refuse what a fit of a run could not start with, before the first of them does; `tuned`: it is fine-tuned."""
    from vss.train.fit import check_norms, check_settings

    recipe = project.recipe
    configs = [recipe.train] * (not recipe.model.checkpoint) + [recipe.finetune] * tuned
    for config in configs:
        check_settings(config)
    if recipe.train.distill:
        raise VssError(f"train.distill is {recipe.train.distill} and a first training has no teacher; set it to 0.")
    single = next((config for config in configs if config.batch_size == 1), None)
    if single:
        image = project.split("train", augment=True)[0]["image"]
        check_norms(project.build_model(), project.preprocess.normalise(image[None]), single)


def teacher_of(path: Path, project: Project, student: nn.Module) -> nn.Module:
    """The teacher in a checkpoint; one that means something else by its outputs or inputs is refused."""
    saved = checkpoint.read(path)
    own: dict[str, Any] = {"task": str(getattr(student, "task", ""))}
    theirs: dict[str, Any] = {"task": str(getattr(saved.model, "task", ""))}
    for key in ("mean", "std"):
        own[key] = list(getattr(project.preprocess, key))
        theirs[key] = list((saved.preprocess or {}).get(key, own[key]))
    for key, value in own.items():
        if value != theirs[key]:
            raise VssError(
                f"the teacher {path} has {key} {shown(theirs[key])} and the network has {shown(value)}; "
                "give as --teacher a network that was trained for the same."
            )
    count = int(getattr(saved.model, "num_classes", 0) or 0)
    require_classes(f"the teacher {path}", saved.classes, "the network", project.task.classes, count=count)
    return saved.model
