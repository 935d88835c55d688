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
from vss.core.config import FitConfig, ModelConfig, Recipe
from vss.core.errors import VssError, one_line, shown, steadily
from vss.core.files import atomic, read_array
from vss.core.networks import repeated
from vss.core.yaml12 import parse
from vss.data import Augment, Preprocess, SegData, SegSplit, open_data, require_classes
from vss.models import factory
from vss.models.weights import head_of
from vss.prune import count
from vss.run import inputs, runner
from vss.run.runner import Json, Runner, T
from vss.train import checkpoint
from vss.train.checkpoint import Checkpoint, matching
from vss.train.evaluate import Predictor
from vss.train.header import header
from vss.train.tasks import TASKS, Task, task_of

if TYPE_CHECKING:
    from vss.train.fit import FitData, Phase


GUESS = 7
"""Classes of a network that is built to see which of its tensors depend on their number."""


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
        name = task_name(config, saved.model)
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
        return build_network(self.recipe.model, len(self.task.classes), self.preprocess.size, self.recipe.seed)

    def read(self, path: Path | str) -> Checkpoint:
        """A checkpoint that this project wrote or was given, see `read_network`."""
        config = self.recipe.model
        if str(path) != config.checkpoint:  # what was written here has its head already
            config = config.model_copy(update={"replace_head": False})
        return read_network(path, config, classes=len(self.task.classes), seed=self.recipe.seed)

    def load(self, path: Path | str) -> Any:
        return self.read(path).model

    def save(self, model: nn.Module, path: Path, metrics: dict[str, float] | None = None) -> None:
        """Write a checkpoint that knows its preprocessing and classes."""
        info: dict[str, object] = {"dataset": self.data.name, "metrics": metrics or {}, "recipe": self.recipe.name}
        info |= {"data": self.data.kept} if self.data.kept else {}
        checkpoint.save(
            model, path, preprocess=self.preprocess.model_dump(mode="json"), classes=self.task.classes, info=info
        )

    def loader(self, name: str, config: FitConfig, rank: int, world: int) -> DataLoader[object]:
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

    def score(self, predict: Predictor, *, split: str | None = None) -> dict[str, object]:
        """The metrics of a predictor on the recipe's split, with the array `per_image` of the task."""
        self.task.check_labels(split or self.recipe.split)
        return self.task.evaluate(predict, split or self.recipe.split)

    def score_net(self, model: nn.Module, *, split: str | None = None) -> dict[str, object]:
        """Metrics of a network in torch, on the GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        result = self.score(self.task.predictor(model, device), split=split)
        model.to("cpu")
        return result

    def size_row(self, name: str, model: nn.Module, path: Path) -> dict[str, object]:
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
    ) -> dict[str, object]:
        """Train or fine-tune `model` in place; see `vss.train.fit.fit`."""
        from vss.train.fit import check_settings, fit

        check_settings(config)  # before the data is hashed
        self.task.check_labels("train", "val")
        settings: dict[str, Any] = {"save": self.save, "seed": self.recipe.seed, "progress": progress}
        with self.task.training(model):
            return fit(model, self.fit_data(config), config, run_dir, teacher=teacher, phase=phase, **settings)

    def fingerprint(self, *splits: str) -> list[object]:
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
        also: object = None,
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


def teacher_of(path: Path, project: Project, student: nn.Module) -> nn.Module:
    """The teacher in a checkpoint; one that means something else by its outputs or inputs is refused."""
    saved = project.read(path)
    own: dict[str, object] = {"task": str(getattr(student, "task", ""))}
    theirs: dict[str, object] = {"task": str(getattr(saved.model, "task", ""))}
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


# The network of a recipe: built anew, from weights of others, or from a checkpoint, under a name or by a factory.


def read_network(path: Path | str, config: ModelConfig, *, classes: int | None = None, seed: int = 0) -> Checkpoint:
    """A checkpoint, loaded into what the factory of `config` builds unless it is of a registered network.

    `classes`: their number, where it is known and the file does not say it; with `config.replace_head` that of the
    network in place of the file's, whose new head is drawn by `seed`.
    """
    saved = header(path)
    foreign = config.factory and (saved.model == config.factory or saved.model not in models.MODELS)
    if not foreign and not config.replace_head:
        return checkpoint.read(path)
    torch.manual_seed(seed)
    count = classes if config.replace_head else saved.num_classes or len(saved.classes) or classes
    if foreign:
        model = _made(path, str(config.factory), config.options, count)
    else:
        model = models.build(saved.model, count or 0, **saved.options)
    return checkpoint.read(path, model=model, replace_head=config.replace_head)


def _made(path: Path | str, name: str, options: dict[str, object], count: int | None) -> Any:
    """What a factory builds for a checkpoint; where nobody says the number of classes, its tensors do."""
    entry: Any = models.MODELS[name]
    if count is None and entry.counts(options):
        trial = entry.build(GUESS, options)
        found = checkpoint.uncut_shapes(path)
        rename = matching(found, trial.state_dict()) or str
        theirs = {rename(tensor): shape for tensor, shape in found.items()}
        twice = repeated(trial.state_dict())
        own = {name: tuple(value.shape) for name, value in trial.state_dict().items() if name not in twice}
        pairs = [zip(own[tensor], theirs[tensor], strict=True) for tensor in head_of(own, theirs, GUESS)]
        count = next((there for pair in pairs for here, there in pair if here != there), GUESS)
    return entry.build(count, options)


def task_name(config: ModelConfig, saved_model: str = "") -> str:
    """The registered name, by which a task is chosen, of a network or of a checkpoint that says `saved_model`."""
    return config.name if config.factory and saved_model not in models.MODELS else saved_model or config.name


def build_network(config: ModelConfig, classes: int, size: tuple[int, int], seed: int) -> Any:
    """The unpruned network of a recipe, seeded, or the one in its checkpoint; it takes images of `size`."""
    if config.checkpoint:
        return read_network(config.checkpoint, config, classes=classes, seed=seed).model
    torch.manual_seed(seed)
    model = models.build(config.name, classes, **config.options)
    models.check_multiple(config.name, size, model.size_multiple)
    if config.factory:
        try_size(model, size)
    if config.backbone_weights:
        if not hasattr(model, "backbone"):
            raise VssError(f"model.backbone_weights came and {config.name} has no backbone; leave the key out.")
        models.load_backbone(model.get_submodule("backbone"), config.backbone_weights)
    if config.weights:
        models.load_weights(model, config.weights, classes=classes, replace_head=config.replace_head)
    return model


@torch.no_grad()
def try_size(model: Any, size: tuple[int, int]) -> None:
    """Refuse a network of a factory that does not take RGB images of `size` (H, W), or gives no map of classes."""
    training = model.training
    image = torch.zeros(1, 3, *size)
    try:
        found = model.eval()(image)
    except VssError:
        raise
    except Exception as error:  # a network of somebody else may raise anything
        raise VssError(
            f"the network of {model.name} does not take images of {size[0]}x{size[1]} in RGB ({type(error).__name__}: "
            f"{one_line(str(error)).rstrip('.')}); give another --input-size (data.size), or change the network."
        ) from error
    finally:
        model.train(training)
    if not isinstance(found, torch.Tensor | tuple):
        raise VssError(f"the network of {model.name} gives a {type(found).__name__}; expected a tensor.")
