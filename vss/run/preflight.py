"""A project's fits: training and fine-tuning through `vss.train.fit`, and what is refused before one starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vss import models
from vss.core.config import FitConfig, Recipe
from vss.core.errors import VssError, shown, unknown
from vss.data import require_classes
from vss.data.counts import choose_calibration
from vss.deploy.backends import BACKENDS, available, build_spec
from vss.deploy.backends.trt_plan import member
from vss.deploy.backends.trt_runner import load_tensorrt
from vss.deploy.bench import pinned
from vss.prune import find_groups
from vss.run.latency import LatencyGoal
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


# What can be refused before anything is trained, made or written; what the recipe alone shows is in `project`.


def check_run(project: Project, *, engines: bool = True, here: bool = True) -> None:
    """Refuse what would stop a whole run, or a trial of a sweep, after its training; builds the untrained network.

    Args:
        project: the recipe with its data.
        engines: whether it ends in engines; a trial that does not may leave the fine-tuning out.
        here: whether this machine does the work, so that it must have the devices, the backend and the cores.
    """
    recipe = project.recipe
    if here:
        check_fits(project, tuned=engines or recipe.finetune.epochs > 0)
    if engines:
        check_build(recipe, here=here)
    if engines and here:
        with pinned(recipe.bench.cores):
            pass
    check_metric(project)
    if recipe.precision.kinds:
        check_calibration(project)
    elif recipe.precision.keep:
        raise VssError("precision.keep is given and precision.kinds names no precision to make; add fp16 or int8.")
    check_network(project, project.build_model())
    project.task.check_labels("train", "val", recipe.split)


def check_build(recipe: Recipe, *, here: bool) -> None:
    """The runtime takes what the recipe says, and is on this machine where it must be."""
    build, backend = recipe.build, BACKENDS.canonical(recipe.build.backend)
    if backend == "torch":
        raise VssError("build.backend is torch, and a run builds engines; choose onnxruntime or tensorrt.")
    if backend == "tensorrt" and build.threads is not None:
        raise VssError(f"build.threads is {build.threads} and means nothing to a TensorRT engine; leave it away.")
    build_spec(build)
    if here:
        available(backend)
    if here and backend == "tensorrt":
        trt = load_tensorrt()
        for flag in build.tensorrt.flags:
            member(trt.BuilderFlag, flag)


def check_calibration(project: Project) -> None:
    """The images that `precision.image_list` names are training images."""
    if project.recipe.precision.image_list:
        from vss.run.precision import read_list

        choose_calibration(project.data, ids=read_list(Path(project.recipe.precision.image_list)))


def check_metric(project: Project) -> None:
    """`gate.metric` is a score of the task, higher is better."""
    metric, task = project.recipe.gate.metric, project.task
    ends = ("_low_pct", "_high_pct")
    known = [key for key in task.row_keys if key.endswith("_pct") and not key.endswith(ends) and "fnr" not in key]
    if metric is not None and metric not in known:
        raise VssError(f"gate.metric is {shown(metric)}; expected one of {', '.join(known)}.")


def check_network(project: Project, model: torch.nn.Module) -> None:
    """What depends on the layers: the size of images and crops, names of layers, latency tables."""
    config, multiple = project.recipe.prune, int(getattr(model, "size_multiple", 1))
    name = project.recipe.model.name
    models.check_multiple(name, project.preprocess.size, multiple)
    if project.augment.crop:
        models.check_multiple(f"{name} (data.augment.crop)", project.augment.crop, multiple)
    layers = dict(model.named_modules())
    for layer in project.recipe.precision.keep:
        if layer not in layers:
            raise unknown("layer of precision.keep", layer, layers.keys() - {""})
    if config.keep:
        find_groups(model, torch.zeros(1, 3, *project.preprocess.size), keep=config.keep)
    if config.latency:
        LatencyGoal.check(project, model, config)
