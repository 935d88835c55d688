"""Semantic segmentation: a label for every pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vss.core.config import FitConfig
from vss.data import class_weights
from vss.train.evaluate import Predictor, evaluate, torch_predictor
from vss.train.losses import SegLearner, SegLoss
from vss.train.pictures import spread, write_panels
from vss.train.tasks.base import TASKS, Figures, Task


@TASKS.register("segmentation")
class SegmentationTask(Task):
    """Cross-entropy, mean IoU from one confusion matrix, label maps as pictures."""

    metric = "miou_pct"
    title = "mIoU"
    row_keys = ("miou_pct", "pixel_acc_pct", "class_acc_pct", "fwiou_pct", "boundary_iou_pct")
    per_image = "confusion_per_image"

    def check(self) -> None:
        """Gates on missed defects belong to defect networks."""
        config = self.recipe.gate
        self.limits({}, {}, max_fnr_increase=config.max_fnr_increase, max_ap_drop=config.max_ap_drop)

    def learner(self, config: FitConfig) -> SegLearner:
        """Cross-entropy with the class weights of the training split, where the recipe wants them."""
        weights = None
        if config.class_weights != "none":
            weights = class_weights(self.data, "train", config.class_weights)
        return SegLearner(
            len(self.classes), ignore_index=self.data.ignore_index, weights=weights, aux_weight=config.aux_weight,
            label_smoothing=config.label_smoothing,
        )  # fmt: skip

    def calibration_loss(self) -> Callable[[Any, tuple[Tensor, Tensor]], Tensor]:
        """The unweighted cross-entropy over all heads."""
        loss = SegLoss(ignore_index=self.data.ignore_index, aux_weight=self.recipe.train.aux_weight)

        def call(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            return loss(model.forward_train(batch[0]), batch[1])

        return call

    def predictor(self, model: nn.Module, device: str = "cpu") -> Predictor:
        """uint8 (N, 3, H, W) -> (N, H, W) labels."""
        return torch_predictor(model, self.preprocess, device)

    def evaluate(self, predict: Predictor, split: str) -> Figures:
        """See `vss.train.evaluate.evaluate`."""
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
        """Labels, where the recipe wants them."""
        return {"labels": self.recipe.export.labels, "labels_dtype": self.recipe.export.labels_dtype}

    def pictures(self, out: Path, predictors: Mapping[str, Predictor], results: Mapping[str, Figures]) -> Figures:
        """Image, truth and what every network says, of images spread evenly over the split."""
        split = self.split(self.recipe.split)
        panels = write_panels(out, split, spread(split, self.recipe.panels), predictors, self.data.palette)
        return {"panels": panels, "files": [path for panel in panels for path in panel["files"].values()]}

    def report(self, scores: Mapping[str, Figures]) -> Figures:
        """IoU of every class."""
        return {"iou_pct": {name: result["iou_pct"] for name, result in scores.items()}}
