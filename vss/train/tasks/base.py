"""The one interface between the steps of a run and the task of its network; segmentation, the usual task.

A task is chosen by the network (`SegModel.task`). Everything a step needs that is not the same for every task is a
method here, so that a step never asks which task it serves.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vss import models
from vss.core.config import FitConfig, Recipe
from vss.core.errors import VssError
from vss.core.files import atomic, safe_name, sha256_json
from vss.core.registry import Registry
from vss.data import IGNORE, Augment, Preprocess, SegData, SegSplit, check_labels, class_weights, make_loader
from vss.train.details import class_drop_intervals, image_ious, listed_images, worst_images
from vss.train.evaluate import Predictor, evaluate, torch_predictor
from vss.train.gate import gate
from vss.train.losses import Learner, SegLearner, SegLoss

log = logging.getLogger(__name__)

Figures = dict[str, Any]
WORST = 16
"""Images that a report lists."""
EQUAL, PRUNED = "engine equals its network", "pruned against"
UNPRUNED = ("baseline", "control")
SHIP = ("max_fnr_increase", "max_ap_drop")
"""Limits of the gate on networks that decide about defects."""


class Task(ABC):
    """A task on one data set.

    Attributes:
        metric: key of the score in the results of `evaluate`, in percent, higher is better.
        title: how a sentence names it.
        row_keys: scores that every row of a report shows.
        notes: what `check_labels` found doubtful.
        per_image: key, ending in `_per_image`, of a numpy array by image in the results, for intervals; it is no JSON.
    """

    metric: ClassVar[str]
    title: ClassVar[str]
    row_keys: ClassVar[tuple[str, ...]]
    per_image: ClassVar[str]

    def __init__(self, recipe: Recipe, data: SegData, preprocess: Preprocess) -> None:
        self.recipe, self.data, self.preprocess = recipe, data, preprocess
        self.notes: list[str] = []
        self._checked: list[frozenset[str]] = []

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the network's classes."""
        return self.data.class_names

    @property
    def protocol(self) -> str:
        """The sentence to print beside every number."""
        return self.data.protocol

    def check(self) -> None:  # noqa: B027  (not every task has something to refuse)
        """Refuse data and settings that this task cannot work with, before anything is computed."""

    def check_labels(self, *splits: str) -> None:
        """Refuse splits whose masks cannot teach or judge; doubts are logged, once, and kept in `notes`.

        Splits that were looked at together need no second look.

        Masks are read once and remembered by their contents, see `vss.data.images`.
        """
        if any(set(splits) <= earlier for earlier in self._checked):
            return
        for note in check_labels(self.data, {name: self.split(name).pairs for name in dict.fromkeys(splits)}):
            if note not in self.notes:
                self.notes.append(note)
                log.warning("%s: %s", self.data.root, note)
        self._checked.append(frozenset(splits))

    # -- data ---------------------------------------------------------------------------------------------------------

    def split(self, name: str, *, augment: Augment | None = None) -> SegSplit:
        """A split at the network's size; with `augment` as training sees it."""
        recipe = self.recipe
        return SegSplit(self.data, name, self.preprocess, augment, recipe.seed, recipe.data.limit)

    def loader(self, split: SegSplit, **options: Any) -> DataLoader[Any]:
        """Batches of a split; `options` as for `vss.data.make_loader`. With `shuffle` in the order of training."""
        return make_loader(split, seed=self.recipe.seed, pin_memory=torch.cuda.is_available(), **options)

    # -- training -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def learner(self, config: FitConfig) -> Learner:
        """Loss and validation score of a training."""

    def training(self, model: nn.Module) -> AbstractContextManager[Any]:
        """What holds while a network is trained, and is put back afterwards."""
        return contextlib.nullcontext(model)

    @abstractmethod
    def calibration_loss(self) -> Callable[[Any, tuple[Tensor, Tensor]], Tensor]:
        """(model, (images, masks)) -> the loss over all heads by which channels are scored."""

    # -- evaluation ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def predictor(self, model: nn.Module, device: str = "cpu") -> Predictor:
        """A predictor from a network in torch; that of an engine is `vss.train.evaluate.engine_predictor`."""

    @abstractmethod
    def evaluate(self, predict: Predictor, split: str) -> Figures:
        """Scores on a split, in percent, and the array `per_image`."""

    def verdicts(self, results: Mapping[str, Figures]) -> list[Figures]:
        """The gates of the recipe, on the reported split.

        Args:
            results: of `evaluate`, for "finetuned" (in torch), "engine" (made of it), "baseline" and, where the run has
                one, "control".

        Returns:
            Verdicts of `vss.train.gate`, each with `what` was compared: `EQUAL`, and then those of `against`.
        """
        equal = self._verdict(EQUAL, results["finetuned"], results["engine"], self.recipe.gate.max_drop)
        return [equal, *self.against(results, results["engine"])]

    def against(self, starts: Mapping[str, Figures], engine: Figures) -> list[Figures]:
        """Verdicts on a pruned engine that must not fall behind "baseline" and, where there is one, "control"."""
        config, checks = self.recipe.gate, []
        for name in [name for name in UNPRUNED if name in starts]:
            before = starts[name]
            checks.append(self._verdict(f"{PRUNED} {name}", before, engine, config.max_drop_from_baseline))
            checks += self.limits(before, engine, config.model_dump(include={*SHIP}), name=name)
        return checks

    def _verdict(self, what: str, before: Figures, after: Figures, limit: float | None) -> Figures:
        metric = self.recipe.gate.metric or self.metric
        span = self.drop_interval(before, after) if metric == self.metric else None
        return {"what": what, **gate(before, after, metric=metric, max_drop=limit, interval=span)}

    def limits(
        self, before: Figures, after: Figures, limits: Mapping[str, float | None], *, name: str = "baseline"
    ) -> list[Figures]:
        """Verdicts of the ship rule by those `limits` (keys of `SHIP`) that are given; for networks that decide about
        defects. `name`: what `before` is called."""
        given = {key: limit for key, limit in limits.items() if limit is not None}
        return self.ship_rule(before, after, given, name) if given else []

    def ship_rule(self, before: Figures, after: Figures, limits: Mapping[str, float], name: str) -> list[Figures]:
        """See `limits`, of which there is one at least."""
        raise VssError(
            f"a limit on missed defects or on average precision came, and {self.recipe.model.name!r} segments; use "
            "the limit on the drop from the baseline."
        )

    @classmethod
    def over_folds(cls, recipe: Recipe, arrays: Mapping[str, Sequence[np.ndarray]]) -> Figures | None:
        """What the validation parts of all folds of a cross-validation say together; None where scores by image are of
        the reported split alone.

        Args:
            recipe: for its limits and rule.
            arrays: name -> `per_image` of every fold, unpruned networks first, the pruned one last.

        Returns:
            `rows`: figures by name, and `checks`: verdicts of the ship rule.
        """
        return None

    def drop_interval(self, before: Figures, after: Figures) -> list[float] | None:
        """95 % bootstrap interval of the drop of `metric` between two results of `evaluate` on the same images, in
        points; None where `vss.train.gate` gives it."""
        return None

    # -- artefacts ----------------------------------------------------------------------------------------------------

    def export_options(self) -> dict[str, Any]:
        """What an exported graph ends in."""
        return {}

    @abstractmethod
    def pictures(self, out: Path, predictors: Mapping[str, Predictor], results: Mapping[str, Figures]) -> Figures:
        """Write pictures of the reported split below `out`.

        Args:
            out: folder of the run.
            predictors: "baseline", "pruned" and "engine".
            results: what `evaluate` gave for "baseline" and "engine".

        Returns:
            Keys of a report (`vss.core.report.Report`), and `files`: the paths written, relative to `out`.
        """

    def report(self, scores: Mapping[str, Figures]) -> Figures:
        """What a report holds of this task's own: keys of `vss.core.report.Report`."""
        return {}

    @abstractmethod
    def details(self, results: Mapping[str, Figures]) -> Figures:
        """More of the kind, from figures by image: the row before pruning is the first of `results`, the engine the
        last, a control between them."""


TASKS: Registry[type[Task]] = Registry("task")


def task_of(model_name: str) -> str:
    """The task of a registered network; functions that build networks segment."""
    return str(getattr(models.MODELS[model_name], "task", "segmentation"))


@TASKS.register("segmentation")
class SegmentationTask(Task):
    """Cross-entropy, mean IoU from one confusion matrix, label maps as pictures."""

    metric = "miou_pct"
    title = "mIoU"
    row_keys = ("miou_pct", "pixel_acc_pct", "class_acc_pct", "fwiou_pct", "boundary_iou_pct")
    per_image = "confusion_per_image"

    def check(self) -> None:
        self.limits({}, {}, self.recipe.gate.model_dump(include={*SHIP}))

    def learner(self, config: FitConfig) -> SegLearner:
        weights = None
        if config.class_weights != "none":
            weights = class_weights(self.data, "train", config.class_weights)
        loss = SegLoss(
            weights=weights, ignore_index=self.data.ignore_index, aux_weight=config.aux_weight,
            label_smoothing=config.label_smoothing,
        )  # fmt: skip
        return SegLearner(len(self.classes), loss)

    def calibration_loss(self) -> Callable[[Any, tuple[Tensor, Tensor]], Tensor]:
        loss = SegLoss(ignore_index=self.data.ignore_index, aux_weight=self.recipe.train.aux_weight)

        def call(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            return loss(model.forward_train(batch[0]), batch[1])

        return call

    def predictor(self, model: nn.Module, device: str = "cpu") -> Predictor:
        return torch_predictor(model, self.preprocess, device)

    def evaluate(self, predict: Predictor, split: str) -> Figures:
        return evaluate(
            predict,
            self.split(split),
            num_classes=len(self.classes),
            class_names=self.classes,
            ignore_index=self.data.ignore_index,
            batch_size=self.recipe.eval_batch_size,
            workers=self.recipe.data.workers,
            per_image=True,
        )

    def export_options(self) -> dict[str, Any]:
        return {"labels": self.recipe.export.labels, "labels_dtype": self.recipe.export.labels_dtype}

    def pictures(self, out: Path, predictors: Mapping[str, Predictor], results: Mapping[str, Figures]) -> Figures:
        split = self.split(self.recipe.split)
        before, after = (image_ious(results[name][self.per_image]) for name in ("baseline", "engine"))
        chosen = worst_images(before, after, self.recipe.panels)
        panels = write_panels(out, split, [index for index, _ in chosen], predictors, self.data.palette)
        for panel, (index, why) in zip(panels, chosen, strict=True):
            panel["note"] = f"{why}: mean IoU {before[index]:.1f} % before pruning, {after[index]:.1f} % of the engine"
        return {"panels": panels, "files": [path for panel in panels for path in panel["files"].values()]}

    def report(self, scores: Mapping[str, Figures]) -> Figures:
        return {"iou_pct": {name: result["iou_pct"] for name, result in scores.items()}}

    def details(self, results: Mapping[str, Figures]) -> Figures:
        images = {name: np.asarray(result[self.per_image]) for name, result in results.items()}
        *starts, last = images
        return {
            "confusion": {name: counts.sum(0, dtype=np.int64).tolist() for name, counts in images.items()},
            "class_drops": {name: class_drop_intervals(images[name], images[last]) for name in starts},
            "worst": listed_images(self.split(self.recipe.split).ids, images, WORST),
        }


# -- pictures ---------------------------------------------------------------------------------------------------------


def spread(items: Sized, amount: int) -> list[int]:
    """`amount` indices evenly over a collection; all of them where it has fewer."""
    amount = min(amount, len(items))
    return [index * len(items) // amount for index in range(amount)]


def file_name(name: str) -> str:
    """An image's id as part of a file name; two ids never share one.

    >>> file_name("a_b"), file_name("a/b"), file_name("a b")
    ('a_b', 'a_b-f5effa31', 'a_b-5e229e24')
    """
    safe = safe_name(name)
    return safe if safe == name else f"{safe}-{sha256_json(name)[:8]}"


def write_panels(
    root: Path, split: SegSplit, indices: Iterable[int], predictors: Mapping[str, Predictor], palette: np.ndarray
) -> list[dict[str, Any]]:
    """Write `panels/ID-WHAT.png` below `root` for every chosen image; returns the panel list of a report.

    Args:
        split: where the images come from.
        indices: which of them.
        predictors: name -> predictor; each becomes a picture beside `image` and `truth`.
        palette: (K, 3) uint8.
    """
    panels = []
    for index in indices:
        sample, name = split[index], file_name(split.ids[index])
        pictures = {"image": sample["image"].permute(1, 2, 0).numpy(), "truth": paint(sample["mask"].numpy(), palette)}
        for title, predict in predictors.items():
            pictures[title] = paint(predict(sample["image"][None])[0].cpu().numpy(), palette)
        files = {title: f"panels/{name}-{safe_name(title)}.png" for title in pictures}
        save_pictures(root, files, pictures)
        panels.append({"id": split.ids[index], "files": files})
    return panels


def save_pictures(root: Path, files: Mapping[str, str], pictures: Mapping[str, np.ndarray]) -> None:
    """Pixels by title, into the file below `root` of that title."""
    for title, pixels in pictures.items():
        with atomic(root / files[title]) as temporary:
            Image.fromarray(pixels).save(temporary)


def paint(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H, W) labels -> (H, W, 3) uint8; void is black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    table[IGNORE] = 0
    return table[labels]
