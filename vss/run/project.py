"""A recipe with its data opened: what every step of the job starts from."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vss import models
from vss.core.config import FitConfig, Recipe, parse
from vss.core.errors import VssError, steadily
from vss.data import Augment, Preprocess, SegData, SegSplit, open_data, require_classes
from vss.prune import CRITERIA, make_criterion
from vss.prune.latency import Target
from vss.train import checkpoint
from vss.train.evaluate import Predictor
from vss.train.tasks import TASKS, Task, task_of


@dataclass(frozen=True)
class Project:
    """A recipe with its data opened.

    Attributes:
        recipe: what to do.
        data: the data set.
        preprocess: the one preprocessing of every step.
    """

    recipe: Recipe
    data: SegData
    preprocess: Preprocess

    @classmethod
    def open(cls, recipe: Recipe) -> Project:
        """Open the data set and check what can be checked before anything is computed."""
        make_criterion(recipe.prune.criterion, **recipe.prune.options)
        check_recipe(recipe)
        recipe = with_size(recipe)
        data = open_data(recipe.data.dataset, recipe.data.root)
        start = recipe.model.checkpoint  # its mean and std are the run's
        own = (checkpoint.read(start).preprocess if start else None) or {}
        project = cls(recipe, data, Preprocess(**own | {"size": recipe.data.size}))
        check_crop(project)
        project.task.check()
        return project

    @functools.cached_property
    def task(self) -> Task:
        """What the network is for; a checkpoint of other classes than those of the data is refused."""
        config = self.recipe.model
        if not config.checkpoint:
            return TASKS[task_of(config.name)](self.recipe, self.data, self.preprocess)
        saved = checkpoint.header(config.checkpoint)
        task = TASKS[task_of(saved.model)](self.recipe, self.data, self.preprocess)
        count = saved.num_classes or 0
        require_classes(config.checkpoint, saved.classes, str(self.data.root), task.classes, count=count)
        return task

    @functools.cached_property
    def augment(self) -> Augment:
        """Training augmentation; unknown keys are refused."""
        return parse(Augment, self.recipe.data.augment, source="data.augment")

    def split(self, name: str, *, augment: bool = False) -> SegSplit:
        """A split at the network's size."""
        return self.task.split(name, augment=self.augment if augment else None)

    def build_model(self) -> Any:
        """The unpruned network of the recipe, seeded, or the one in `model.checkpoint`."""
        config = self.recipe.model
        if config.checkpoint:
            return checkpoint.load(config.checkpoint)
        torch.manual_seed(self.recipe.seed)
        model = models.build(config.name, len(self.task.classes), **config.options)
        models.check_multiple(config.name, self.preprocess.size, model.size_multiple)
        if config.backbone_weights:
            if not hasattr(model, "backbone"):
                raise VssError(f"model.backbone_weights came and {config.name} has no backbone; leave the key out.")
            models.load_backbone(model.get_submodule("backbone"), config.backbone_weights)
        return model

    def save(self, model: nn.Module, path: Path, metrics: dict[str, float] | None = None) -> None:
        """Write a checkpoint that knows its preprocessing and classes."""
        info = {"dataset": self.data.name, "metrics": metrics or {}, "recipe": self.recipe.name}
        checkpoint.save(
            model, path, preprocess=self.preprocess.model_dump(mode="json"), classes=self.task.classes, info=info
        )

    def loader(self, name: str, config: FitConfig, rank: int, world: int) -> DataLoader[Any]:
        """Training (shuffled, augmented) or validation loader of one process."""
        train, workers = name == "train", self.recipe.data.workers
        split = self.split(name, augment=train)
        share = {"drop_last": train, "rank": rank, "world": world, "workers": workers}
        return self.task.loader(split, batch_size=config.batch_size, shuffle=train, **share)

    def calibration(self, batches: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Fixed batches of training images, no augmentation: ((N, 3, H, W) float32, (N, H, W) int64)."""
        loader = self.task.loader(self.split("train"), batch_size=batch_size, shuffle=True)
        sampler: Any = loader.sampler
        sampler.set_epoch(1_000_000)  # an order of its own, the same in every round and run
        count = min(batches, len(loader))
        for batch in steadily(itertools.islice(loader, count), "calibration batch", count):
            yield self.preprocess.normalise(batch["image"]), batch["mask"]

    def score(self, predict: Predictor, *, split: str | None = None, per_image: bool = True) -> dict[str, Any]:
        """The metrics of a predictor on the recipe's split; without `per_image` they are all JSON-able."""
        self.task.check_labels(split or self.recipe.split)
        result = self.task.evaluate(predict, split or self.recipe.split)
        return result if per_image else {key: value for key, value in result.items() if key != self.task.per_image}


def export_options(project: Project, model: nn.Module) -> dict[str, Any]:
    """How the recipe exports a network, as `vss.deploy.export` takes it."""
    config, plans = project.recipe.export, getattr(model, "plans", ())
    return {
        "size": project.preprocess.size,
        "preprocess" if config.preprocess else "expects": project.preprocess,
        "opset": config.opset,
        "class_names": project.task.classes,
        **project.task.export_options(),
        "plan_sha256": plans[-1].sha256() if plans else None,
    }


def project_with(project: Project, *, split: str, limit: int) -> Project:
    """The same project, scored on another split and on so many images of it, evenly spread."""
    recipe = project.recipe
    data = recipe.data.model_copy(update={"limit": min(limit, recipe.data.limit or limit)})
    return Project(recipe.model_copy(update={"split": split, "data": data}), project.data, project.preprocess)


def project_of(path: Path | str, *, data_root: str | None, dataset: str | None, recipe: Recipe) -> Project:
    """A project around a checkpoint: its own data set name and image size unless others are given."""
    saved = checkpoint.header(path)
    if saved.preprocess is None:
        raise VssError(f"{path} does not say its preprocessing; save it with vss.save(..., preprocess=...).")
    data = {"dataset": dataset or saved.info.get("dataset", recipe.data.dataset), "size": saved.preprocess["size"]}
    if data_root:
        data["root"] = data_root
    recipe = Recipe.model_validate(
        recipe.model_dump() | {"data": recipe.data.model_dump() | data, "model": {"checkpoint": str(path)}}
    )
    project = Project(recipe, open_data(recipe.data.dataset, recipe.data.root), Preprocess(**saved.preprocess))
    project.task  # noqa: B018  (other classes than those of the data are refused now)
    return project


USUAL = (360, 480)
"""H, W where neither recipe nor checkpoint says: half of CamVid's, as in the SegNet split."""


def with_size(recipe: Recipe) -> Recipe:
    """The recipe with `data.size` where it has none: the checkpoint's, or the usual one made larger to what the network
    takes."""
    if recipe.data.size is not None:
        return recipe
    size: Any = USUAL
    if recipe.model.checkpoint:
        size = tuple((checkpoint.read(recipe.model.checkpoint).preprocess or {}).get("size", USUAL))
    else:
        multiple = models.build(recipe.model.name, 1, **recipe.model.options).size_multiple
        size = tuple(-(-side // multiple) * multiple for side in USUAL)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"size": size})})


def check_recipe(recipe: Recipe) -> None:
    """Refuse what the recipe alone shows to be impossible."""
    config = recipe.prune
    if CRITERIA.canonical(config.criterion) == "dmcp" and config.steps > 1:
        raise VssError(f"prune.steps is {config.steps} and dmcp searches all widths at once; set it to 1.")
    CRITERIA.canonical(recipe.dmcp.order)
    if config.latency:
        Target.parse(config.latency.target)
        if config.steps > 1:
            raise VssError(f"prune.steps is {config.steps} and a latency target is met in one round; set it to 1.")


def check_crop(project: Project) -> None:
    """A crop is part of an image: what is larger is padding alone."""
    crop, size = project.augment.crop, project.preprocess.size
    if crop and (crop[0] > size[0] or crop[1] > size[1]):
        raise VssError(
            f"data.augment.crop is {crop[0]}x{crop[1]} and images have {size[0]}x{size[1]} (data.size); crop at most "
            "that."
        )
