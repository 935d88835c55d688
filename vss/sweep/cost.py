"""What a sweep will cost, before it starts: one training step and one evaluation are timed, the rest is counting."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from vss import steps
from vss.config import FitConfig, Recipe
from vss.prune import make_criterion
from vss.sweep.study import Json

OVERHEAD_S = 3.0
"""Of one cell beside training and evaluation: tracing, budget search, the proof of the cut, files. A guess; a sweep's
time left follows the pace that it keeps."""
BACKWARD = 2.0
"""A backward pass costs about twice a forward one (one product for the input, one for the weights)."""


def estimate(recipes: list[Recipe]) -> Json:
    """Seconds of the part that these recipes share and of each of their cells.

    Args:
        recipes: of one shared part, all with one network, data and training.

    Returns:
        {"shared": s, "cells": [s]}; a cell's fine-tuning is taken to shrink with the MACs that it keeps.
    """
    first = recipes[0]
    project = steps.Project.open(first)
    image = _seconds_per_image(project)
    val, test = (len(project.split(name)) for name in ("val", first.split))
    train = len(project.task.loader(project.split("train"), batch_size=1, shuffle=True))  # of one epoch
    step = (1 + BACKWARD) * image
    passes = {(r.prune.batches * r.prune.batch_size) for r in recipes if _has_needs(r)}
    shared = _fit(first.train, train, val, image) if not first.model.checkpoint else 0.0
    shared += test * image + sum(min(train, images) * step for images in passes)
    cells = []
    for recipe in recipes:
        keep = recipe.prune.budget.keep
        recalibrate = min(train, recipe.prune.recalibrate * recipe.prune.batch_size) * image * keep
        evaluations = (2 if recipe.finetune.epochs else 1) * test * image * keep
        fit = _fit(recipe.finetune, train, val, image * keep) if recipe.finetune.epochs else 0.0
        cells.append(OVERHEAD_S + recalibrate + evaluations + fit)
    return {"shared": shared + OVERHEAD_S, "cells": cells}


def _has_needs(recipe: Recipe) -> bool:
    return bool(make_criterion(recipe.prune.criterion, **recipe.prune.options).needs)


def _fit(config: FitConfig, train: int, val: int, image: float) -> float:
    """Seconds of a fit; distillation adds one forward of the unpruned network."""
    per_image = (1 + BACKWARD + (1 if config.distill else 0)) * image
    return config.epochs * train * per_image + config.epochs // config.val_every * val * image


def _seconds_per_image(project: steps.Project) -> float:
    """Of one forward pass in training mode, from one timed step after a first one that is not."""
    config = project.recipe.train
    device = "cuda" if torch.cuda.is_available() and config.accelerator != "cpu" else "cpu"
    model, loss = project.build_model().to(device).train(), project.task.calibration_loss()
    images, masks = next(iter(project.calibration(1, config.batch_size)))
    batch = images.to(device), masks.to(device)

    def step() -> None:
        loss(model, batch).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    _time(step)
    return _time(step) / (1 + BACKWARD) / len(images)


def _time(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
