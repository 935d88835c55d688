"""A recipe with its data opened: what every step of the job starts from."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vss import models
from vss.core.config import FitConfig, Recipe
from vss.core.errors import VssError, shown, steadily
from vss.core.files import atomic, read_array
from vss.core.yaml12 import parse
from vss.data import Augment, Preprocess, SegData, SegSplit, open_data, require_classes
from vss.models import factory
from vss.prune import count
from vss.run import inputs, network, runner
from vss.run.runner import Json, Runner, T
from vss.train import checkpoint
from vss.train.checkpoint import Checkpoint
from vss.train.evaluate import Predictor
from vss.train.header import header
from vss.train.tasks import TASKS, Task, task_of

if TYPE_CHECKING:
    from vss.train.fit import FitData, Phase


@dataclass(frozen=True)
class Project:
    """A recipe with its data set opened, and the one preprocessing of every step."""

    recipe: Recipe
    data: SegData
    preprocess: Preprocess

    def __post_init__(self) -> None:
        if self.recipe.model.factory:
            factory.use(self.recipe.model.factory, self.recipe.model.options)

    @classmethod
    def open(cls, recipe: Recipe) -> Project:
        """Open the data set and check what can be checked before anything is computed."""
        inputs.require_job(recipe)
        recipe = with_size(recipe)
        start = recipe.model.checkpoint  # its mean and std are the run's, and how its data was read
        own = (header(start).preprocess if start else None) or {}
        recipe = inputs.with_options(recipe, start)
        data = open_data(recipe.data.dataset, recipe.data.root, recipe.data)
        said = {key: value for key, value in recipe.data.model_dump(include={"mean", "std"}).items() if value}
        project = cls(recipe, data, parse(Preprocess, own | said | {"size": recipe.data.size}, source="data"))
        check_crop(project)
        project.task.check()
        return project

    @functools.cached_property
    def task(self) -> Task:
        """What the network is for; a checkpoint of other classes than those of the data is refused."""
        config = self.recipe.model
        if not config.checkpoint:
            return TASKS[task_of(config.name)](self.recipe, self.data, self.preprocess)
        saved = header(config.checkpoint)
        name = network.task_name(config, saved.model)
        task = TASKS[task_of(name)](self.recipe, self.data, self.preprocess)
        count = saved.num_classes or 0
        if config.replace_head:
            return task
        require_classes(config.checkpoint, saved.classes, str(self.data.root), task.classes, count=count)
        return task

    @functools.cached_property
    def augment(self) -> Augment:
        return parse(Augment, self.recipe.data.augment, source="data.augment")

    def split(self, name: str, *, augment: bool = False) -> SegSplit:
        return self.task.split(name, augment=self.augment if augment else None)

    def build_model(self) -> Any:
        """The unpruned network of the recipe, seeded, or the one in `model.checkpoint`."""
        return network.build(self.recipe.model, len(self.task.classes), self.preprocess.size, self.recipe.seed)

    def read(self, path: Path | str) -> Checkpoint:
        """A checkpoint that this project wrote or was given, see `vss.run.network`."""
        config = self.recipe.model
        if str(path) != config.checkpoint:  # what was written here has its head already
            config = config.model_copy(update={"replace_head": False})
        return network.read(path, config, classes=len(self.task.classes), seed=self.recipe.seed)

    def load(self, path: Path | str) -> Any:
        return self.read(path).model

    def save(self, model: nn.Module, path: Path, metrics: dict[str, float] | None = None) -> None:
        """Write a checkpoint that knows its preprocessing and classes."""
        info: dict[str, Any] = {"dataset": self.data.name, "metrics": metrics or {}, "recipe": self.recipe.name}
        info |= {"data": self.data.kept} if self.data.kept else {}
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

    def score(self, predict: Predictor, *, split: str | None = None) -> dict[str, Any]:
        """The metrics of a predictor on the recipe's split, with the array `per_image` of the task."""
        self.task.check_labels(split or self.recipe.split)
        return self.task.evaluate(predict, split or self.recipe.split)

    def score_net(self, model: nn.Module, *, split: str | None = None) -> dict[str, Any]:
        """Metrics of a network in torch, on the GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        result = self.score(self.task.predictor(model, device), split=split)
        model.to("cpu")
        return result

    def size_row(self, name: str, model: nn.Module, path: Path) -> dict[str, Any]:
        """The static half of a row of a report."""
        return {"name": name, **count(model, self.preprocess.size), "size_mib": path.stat().st_size / 2**20}

    def train(
        self,
        model: nn.Module,
        config: FitConfig,
        run_dir: Path,
        *,
        teacher: nn.Module | None = None,
        progress: bool = True,
        phase: Phase | None = None,
    ) -> dict[str, Any]:
        """Train or fine-tune `model` in place; see `vss.train.fit.fit`."""
        from vss.train.fit import check_settings, fit

        check_settings(config)  # before the data is hashed
        self.task.check_labels("train", "val")
        settings: dict[str, Any] = {"save": self.save, "seed": self.recipe.seed, "progress": progress}
        with self.task.training(model):
            return fit(model, self.fit_data(config), config, run_dir, teacher=teacher, phase=phase, **settings)

    def fingerprint(self, *splits: str) -> Any:
        """What samples of these splits are made of, beside the recipe: contents, classes, and how masks are read."""
        data = self.data
        contents = {name: self.split(name).sha256() for name in splits}
        return [contents, list(data.class_names), data.ignore_index, data.palette.tolist()]

    def fit_data(self, config: FitConfig) -> FitData:
        from vss.train.fit import FitData

        recipe = self.recipe
        data = recipe.data.model_dump(mode="json", exclude={"root", "workers"})  # neither changes what is learnt
        return FitData(
            train=lambda rank, world: self.loader("train", config, rank, world),
            val=lambda rank, world: self.loader("val", config, rank, world),
            normalise=self.preprocess.normalise,
            learner=self.task.learner(config),
            about={
                "data": data | {name: self.split(name).sha256() for name in ("train", "val")},
                "preprocess": self.preprocess.sha256,
                "classes": list(self.task.classes),
                "defect": recipe.defect.model_dump(mode="json"),
            },
        )


@dataclass
class Workspace:
    """The folder in which the steps of one recipe work, each remembered by `step`."""

    project: Project
    out: Path
    step: Runner
    progress: bool = True
    command: str = ""

    @property
    def recipe(self) -> Recipe:
        return self.project.recipe

    def do(
        self,
        result: type[T],
        name: str,
        kind: str,
        after: list[str],
        outputs: list[str],
        work: Callable[[], T],
        also: Any = None,
    ) -> T:
        """A step of a kind of `VERSIONS`; `also` is what it depends on beside recipe and earlier steps."""
        depends_on = runner.depends(self.recipe, kind, also)
        return result.of(self.step(name, depends_on, after, outputs, lambda: asdict(work())))

    def folder(self, name: str, *nets: nn.Module) -> Path:
        """Where the fit of a step works; `nets` are the networks that it starts from."""
        return runner.fit_folder(self.out / name, self.step.keys[name], nets)

    def write_images(self, name: str, metrics: Json) -> None:
        """Take the array by image out of the metrics and write it."""
        value = metrics.pop(self.project.task.per_image)
        with atomic(self.out / name) as temporary:
            np.save(temporary, value.astype(np.int32) if value.dtype == np.int64 else value)

    def scores_of(self, step: str) -> Json:
        """What a step of an evaluation found, with the array by image."""
        images = read_array(self.out / f"scores/{step.removeprefix('evaluate-')}.npy")
        return self.step.result(step)["metrics"] | {self.project.task.per_image: images}

    def summary(self, metrics: Json) -> str:
        task = self.project.task
        return f"{task.title} {metrics[task.metric]:.2f}"


def export_options(project: Project, model: nn.Module) -> dict[str, Any]:
    """How the recipe exports a network, as `vss.deploy.export` takes it."""
    config, plans = project.recipe.export, getattr(model, "plans", ())
    return {
        "size": project.preprocess.size,
        "preprocess" if config.preprocess else "expects": project.preprocess,
        "opset": config.opset,
        "plugins": config.plugins,
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
    recipe, preprocess = inputs.recipe_around(path, data_root=data_root, dataset=dataset, recipe=recipe)
    project = Project(recipe, open_data(recipe.data.dataset, recipe.data.root, recipe.data), preprocess)
    project.task  # noqa: B018  (other classes than those of the data are refused now)
    return project


def network_to_prune(
    recipe: Recipe,
    ckpt: Path | None,
    model: str | None,
    weights: Path | None,
    *,
    dataset: str | None,
    data_root: str | None,
    size: list[int] | None,
) -> tuple[Project, nn.Module]:
    """A checkpoint, or the flat state dict `weights` of the network `model` that something else has trained, with its
    data opened. `size` is that of images, (H, W), of a named network alone; a checkpoint knows its own."""
    where: Any = {"dataset": dataset, "data_root": data_root}
    named, source = inputs.recipe_to_prune(recipe, ckpt, model, weights, **where, size=size)
    if source == ckpt:
        project = project_of(source, **where, recipe=recipe)
        return project, project.load(source)
    project = Project.open(named)
    return project, project.build_model()


def teacher_of(path: Path, project: Project, student: nn.Module) -> nn.Module:
    """The teacher in a checkpoint; one that means something else by its outputs or inputs is refused."""
    saved = project.read(path)
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


USUAL = (360, 480)
"""H, W where neither recipe nor checkpoint says: half of CamVid's, as in the SegNet split."""


def with_size(recipe: Recipe) -> Recipe:
    """The recipe with `data.size` where it has none: the checkpoint's, or the usual one made larger to what the network
    takes."""
    if recipe.data.size is not None:
        return recipe
    size: Any = USUAL
    if recipe.model.checkpoint:
        size = tuple((header(recipe.model.checkpoint).preprocess or {}).get("size", USUAL))
    else:
        count = 2 if recipe.model.factory else 1  # classes; few, since the size alone is asked for
        multiple = models.build(recipe.model.name, count, **recipe.model.options).size_multiple
        size = tuple(-(-side // multiple) * multiple for side in USUAL)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"size": size})})


def check_crop(project: Project) -> None:
    """A crop is part of an image: what is larger is padding alone."""
    crop, size = project.augment.crop, project.preprocess.size
    if crop and (crop[0] > size[0] or crop[1] > size[1]):
        raise VssError(
            f"data.augment.crop is {crop[0]}x{crop[1]} and images have {size[0]}x{size[1]} (data.size); crop at most "
            "that."
        )
