"""What can be refused before anything is trained, made or written; what the recipe alone shows is in `project`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vss import models
from vss.core.config import Recipe
from vss.core.errors import VssError, shown, unknown
from vss.data.calibration import choose_calibration
from vss.deploy.backends import BACKENDS, available, build_spec
from vss.deploy.bench import pinned
from vss.deploy.trt_plan import member
from vss.deploy.trt_runner import load_tensorrt
from vss.prune import find_groups
from vss.run.fits import check_fits
from vss.run.latency import LatencyGoal

if TYPE_CHECKING:
    from vss.run.project import Project


def check_run(project: Project, *, engines: bool = True, here: bool = True) -> None:
    """Refuse what would stop a whole run, or a cell of a sweep, after its training; builds the untrained network.

    Args:
        project: the recipe with its data.
        engines: whether it ends in engines; a cell that does not may leave the fine-tuning out.
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
