"""Surface inspection: one decision for every image, and a map of where.

The threshold of the decision is chosen on the validation split by every network and engine for itself, so it is chosen
anew after pruning and after quantisation; the reported split is looked at once, with that threshold.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from vss.core.config import FitConfig, Recipe
from vss.core.errors import VssError
from vss.data import Augment, DefectSplit, SegSplit, Targets, choose_annotated, labels_of, make_loader, read_split_file
from vss.train.details import decision_curves, drops, out_of_fold
from vss.train.evaluate import Predictor, torch_predictor
from vss.train.gate import gate
from vss.train.losses import DefectLearner, DefectLoss
from vss.train.metrics import (
    MapScores,
    choose_threshold,
    confusion_per_image,
    decision_scores,
    draws,
    interval,
    resampled_ap,
    scores,
)
from vss.train.tasks.base import SHIP, TASKS, Figures, Task, file_name, paint, save_pictures

MASK_WEIGHT = 3.0  # of defect pixels in the loss that scores channels (criterion C4 of the KSDD2 study)
SPANS = ("ap", "fnr", "f1")


@TASKS.register("defect")
class DefectTask(Task):
    """Weighted map and decision, average precision, missed defects as pictures."""

    metric = "ap_pct"
    title = "AP"
    row_keys = (
        "ap_pct", "ap_low_pct", "ap_high_pct", "fnr_pct", "fnr_low_pct", "fnr_high_pct", "recall_pct", "precision_pct",
        "f1_pct", "f1_low_pct", "f1_high_pct", "auroc_pct", "tp", "fp", "fn", "tn", "fp_at_zero_fn", "threshold",
        "pixel_iou_pct", "pixel_ap_pct", "val_ap_pct", "val_fnr_pct",
    )  # fmt: skip
    per_image = "decisions_per_image"

    @property
    def classes(self) -> tuple[str, ...]:
        return (self.data.class_names[-1],)

    @property
    def protocol(self) -> str:
        """How the split came about, and how decisions are scored."""
        counts = []
        for name, pairs in self.data.splits.items():
            labels = labels_of(self.data, pairs)
            counts.append(f"{name} {len(labels)} ({int(labels.sum())} defective)")
        return (
            f"{self.data.root.resolve().name} ({self.data.name} layout), {', '.join(counts)}; {self._shared_out()}; "
            "images are resized to one size; average precision over images without interpolation; the threshold is "
            "chosen on val; 95 % intervals: stratified bootstrap over images, Wilson for rates of misses"
        )

    def _shared_out(self) -> str:
        """Where the splits come from."""
        number, _, parts = (self.recipe.data.fold or "").partition("/")
        by_hash = "by a hash of the ids, defective and sound alike"
        if parts:
            return f"val is part {number} of {parts} of train and val {by_hash}"
        if "split by a hash" in self.data.protocol:  # as `vss.data.split.with_splits` says
            return f"splits are made {by_hash}"
        if self.data.name == "ksdd2" and not (self.data.root / "val").is_dir():
            return f"val is carved from train {by_hash}"
        return "splits are those of the data"

    def check(self) -> None:
        """Two classes, both kinds of image in every split that is used, no augmentation that could lose a defect."""
        data, recipe = self.data, self.recipe
        if data.num_classes != 2:
            raise VssError(
                f"{data.name} has {data.num_classes} classes and {recipe.model.name!r} decides about one kind of "
                "defect; give data of two classes, such as the layout ksdd2."
            )
        augment = recipe.data.augment
        if tuple(augment.get("scale", (1, 1))) != (1, 1) or augment.get("crop") is not None:
            raise VssError(
                "data.augment scales or crops, which can lose a defect; set scale to [1, 1] and crop to null."
            )
        for name in dict.fromkeys(("train", "val", recipe.split)):
            labels = labels_of(data, self.split(name).pairs)
            if labels.all() or not labels.any():
                what = "only defective" if labels.all() else "no defective"
                raise VssError(
                    f"split {name!r} of {data.root} has {what} images ({len(labels)} in all); expected both kinds: "
                    "add images, raise data.limit or give fewer folds (data.fold) where they are set."
                )
        self.targets  # noqa: B018  (a bad split file or dilation is refused now)

    # -- data ---------------------------------------------------------------------------------------------------------

    def split(self, name: str, *, augment: Augment | None = None) -> DefectSplit:
        """With `augment` the samples carry targets of the map."""
        recipe, targets = self.recipe, None if augment is None else self.targets
        still = None if augment is None else augment.model_copy(update={"scale": (1.0, 1.0)})
        return DefectSplit(self.data, name, self.preprocess, still, recipe.seed, recipe.data.limit, targets)

    @functools.cached_property
    def targets(self) -> Targets:
        """How training masks become targets, and which of them may be used."""
        config, annotated = self.recipe.defect, None
        pairs = self.split("train").pairs
        if config.annotated is not None:
            annotated = choose_annotated(self.data, pairs, config.annotated, seed=self.recipe.seed)
        elif config.split_file is not None:
            table = read_split_file(config.split_file)["train"]
            unknown = [pair.id for pair in pairs if pair.id not in table]
            if unknown:
                raise VssError(
                    f"split file {config.split_file} does not name the training image {unknown[0]} ({len(unknown)} "
                    "such); give the file that belongs to this data."
                )
            annotated = frozenset(pair.id for pair in pairs if table[pair.id])
        return Targets(
            dilate=config.dilate, power=config.distance_power, maximum=config.distance_max, annotated=annotated
        )

    def loader(self, split: SegSplit, **options: Any) -> DataLoader[Any]:
        """A shuffled loader takes defective and sound images by turns, unless `defect.balance` is false."""
        labels = labels_of(self.data, split.pairs) if self.recipe.defect.balance else None
        return make_loader(split, seed=self.recipe.seed, pin_memory=torch.cuda.is_available(), labels=labels, **options)

    # -- training -----------------------------------------------------------------------------------------------------

    def learner(self, config: FitConfig) -> DefectLearner:
        return DefectLearner(DefectLoss(delta=self.recipe.defect.delta, dynamic=self.recipe.defect.dynamic))

    @contextlib.contextmanager
    def training(self, model: nn.Module) -> Iterator[nn.Module]:
        """The gradient multiplier of the recipe, for networks that have one."""
        before = getattr(model, "gradient_multiplier", None)
        net: Any = model
        if before is not None:
            net.gradient_multiplier = self.recipe.defect.gradient_multiplier
        try:
            yield model
        finally:
            if before is not None:
                net.gradient_multiplier = before

    def calibration_loss(self) -> Callable[[Any, tuple[Tensor, Tensor]], Tensor]:
        """Map and decision alike, defect pixels of the resized map counting three times; multipliers stay at 1."""

        def call(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            heads, defect = model.forward_train(batch[0]), (batch[1] == 1).float()[:, None]
            seg = F.interpolate(heads["seg"], size=defect.shape[-2:], mode="bilinear", align_corners=False)
            maps = F.binary_cross_entropy_with_logits(seg, defect, weight=1 + (MASK_WEIGHT - 1) * defect)
            return maps + F.binary_cross_entropy_with_logits(heads["decision"].flatten(), defect.amax(dim=(1, 2, 3)))

        return call

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def drop_interval(self, before: Figures, after: Figures) -> list[float]:
        return ap_drop_interval(before, after, part=1)

    def predictor(self, model: nn.Module, device: str = "cpu") -> Predictor:
        return torch_predictor(model, self.preprocess, device, method="forward_train")

    def evaluate(self, predict: Predictor, split: str) -> Figures:
        """Figures of `vss.train.metrics.decision_scores` on the split and, as `val`, on validation.

        Also `pixel_iou_pct` (of the upsampled map at logit 0) and `pixel_ap_pct` at the size of the network,
        `threshold` (a probability) and `threshold_logit`, and `missed`, the defective images below it, lowest first.
        The array by image has rows of (0 for validation and 1 for the split, label, logit).
        """
        config = self.recipe.defect
        val = self._run(predict, "val")
        threshold = choose_threshold(
            val["labels"], val["scores"], rule=config.threshold, max_fnr_pct=config.max_fnr_pct
        )
        own = val if split == "val" else self._run(predict, split)
        found, on_val = (decision_scores(each["labels"], each["scores"], threshold) for each in (own, val))
        order = np.argsort(own["scores"], kind="stable")
        listed = [index for index in order if own["labels"][index]]
        images = [
            {"id": own["ids"][i], "logit": float(own["scores"][i]), "score": sigmoid(own["scores"][i])} for i in listed
        ]
        spans = {f"{name}_{side}_pct": found[f"{name}_interval_pct"][k] for name in SPANS for k, side in SIDES}
        rows = [np.stack([np.full(len(e["labels"]), k), e["labels"], e["scores"]], 1) for k, e in ((0, val), (1, own))]
        return {
            **found,
            **spans,
            **own["pixels"],
            "threshold": sigmoid(threshold),
            "threshold_logit": threshold,
            "val": on_val,
            "val_ap_pct": on_val["ap_pct"],
            "val_fnr_pct": on_val["fnr_pct"],
            "missed": [image for image in images if image["logit"] < threshold],
            "weakest": [image for image in images if image["logit"] >= threshold][:16],
            "images": len(own["labels"]),
            "resolution": list(self.preprocess.size),
            self.per_image: np.concatenate(rows),
        }

    def _run(self, predict: Predictor, name: str) -> Figures:
        """Labels, scores (logits) and ids of a split, and the figures of its maps."""
        split = self.split(name)
        confusion, maps, logits = torch.zeros(2, 2, dtype=torch.int64), MapScores(), []
        options: dict[str, Any] = {"batch_size": self.recipe.eval_batch_size, "num_workers": self.recipe.data.workers}
        for batch in DataLoader(split, **options):
            heads = {head: value.to("cpu").float() for head, value in predict(batch["image"]).items()}
            logits.append(heads["decision"].flatten())
            seg = F.interpolate(heads["seg"], size=self.preprocess.size, mode="bilinear", align_corners=False)[:, 0]
            confusion += confusion_per_image((seg >= 0).long(), batch["mask"], 2).sum(0)
            maps.update(seg, batch["mask"] == 1)
        pixels = {"pixel_iou_pct": scores(confusion)["iou_pct"][1], "pixel_ap_pct": maps.compute()}
        decisions = torch.cat(logits).double().numpy()
        return {"labels": split.labels, "scores": decisions, "ids": split.ids, "pixels": pixels}

    def ship_rule(self, before: Figures, after: Figures, limits: Mapping[str, float], name: str) -> list[Figures]:
        """In points on validation, each network at the threshold that it chose there.

        The verdict on average precision has the 95 % bootstrap interval of the drop over the same validation images.
        """
        spans = {"ap_pct": ap_drop_interval(before, after, part=0)} if "max_ap_drop" in limits else {}
        return ship_checks(before["val"], after["val"], limits, f"on validation, against {name}", spans)

    @classmethod
    def over_folds(cls, recipe: Recipe, arrays: Mapping[str, Sequence[np.ndarray]]) -> Figures:
        """Decisions of `vss.train.details.out_of_fold`, and the ship rule on them, with intervals."""
        config = recipe.defect
        options: dict[str, Any] = {"rule": config.threshold, "max_fnr_pct": config.max_fnr_pct}
        found = {
            name: out_of_fold([table[table[:, 0] == 0][:, 1:] for table in tables], **options)
            for name, tables in arrays.items()
        }
        *starts, last = found
        limits = {key: limit for key in SHIP if (limit := getattr(recipe.gate, key)) is not None}
        checks = []
        for name in starts:
            spans, where = drops(found[name], found[last]), f"over all folds, against {name}"
            checks += ship_checks(found[name], found[last], limits, where, spans)
        rows = {
            name: {key: value for key, value in figures.items() if not isinstance(value, np.ndarray)}
            for name, figures in found.items()
        }
        return {"rows": rows, "checks": checks}

    # -- artefacts ----------------------------------------------------------------------------------------------------

    def pictures(self, out: Path, predictors: Mapping[str, Predictor], results: Mapping[str, Figures]) -> Figures:
        """Every defect that the engine misses, worst first, then the weakest of those it finds; and sound images that
        it calls defective, highest score first, at most twice `panels`."""
        engine, amount = results["engine"], self.recipe.panels
        missed, split = engine["missed"], self.split(self.recipe.split)
        chosen = [*missed, *engine["weakest"][: max(0, amount - len(missed))]]
        _, labels, logits = engine[self.per_image][engine[self.per_image][:, 0] == 1].T
        called = ~labels.astype(bool) & (logits >= engine["threshold_logit"])
        alarms = [i for i in np.argsort(-logits, kind="stable") if called[i]]
        chosen += [{"id": split.ids[i], "score": sigmoid(logits[i]), "defective": False} for i in alarms[: 2 * amount]]
        panels = write_defects(out, split, chosen, predictors["engine"], threshold=engine["threshold"])
        return {
            "panels": [],
            "defects": panels,
            "files": [path for panel in panels for path in panel["files"].values()],
        }

    def details(self, results: Mapping[str, Figures]) -> Figures:
        found = {}
        for name, result in results.items():
            _, labels, logits = result[self.per_image][result[self.per_image][:, 0] == 1].T
            found[name] = decision_curves(labels, logits, result["threshold_logit"])
        return {"decisions": found}


SIDES = ((0, "low"), (1, "high"))


def ship_checks(
    before: Figures, after: Figures, limits: Mapping[str, float], where: str, spans: Mapping[str, list[float]]
) -> list[Figures]:
    """Verdicts on misses and average precision, those that `limits` has; `spans`: intervals of the drops by metric."""
    rules = (("max_fnr_increase", "missed defects", "fnr_pct"), ("max_ap_drop", "average precision", "ap_pct"))
    checks = []
    for key, what, metric in rules:
        if key in limits:
            options: dict[str, Any] = {"max_drop": limits[key], "interval": spans.get(metric)}
            verdict = gate(before, after, metric=metric, lower_is_better=metric == "fnr_pct", **options)
            checks.append({"what": f"{what} {where}", **verdict})
    return checks


def ap_drop_interval(before: Figures, after: Figures, *, part: int) -> list[float]:
    """95 % bootstrap interval of the drop in AP over the same images, of validation (`part` 0) or the split (1)."""
    tables = (each[DefectTask.per_image] for each in (before, after))
    first, second = (table[table[:, 0] == part] for table in tables)
    labels = first[:, 1].astype(bool)
    weights = draws(labels)
    return interval(resampled_ap(labels, first[:, 2], weights) - resampled_ap(labels, second[:, 2], weights))


def sigmoid(logit: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(logit, -700, 700))))


def write_defects(
    root: Path, split: SegSplit, images: Iterable[Mapping[str, Any]], predict: Predictor, *, threshold: float
) -> list[dict[str, Any]]:
    """Write `defects/ID-WHAT.png` below `root`: image, mask and heat map of every image; returns the list of a report.

    Args:
        split: where the images come from.
        images: `id`, `score`, a probability, and `defective`, where it is not true.
        predict: gives the heads of a defect network.
        threshold: a probability; images below it are missed.
    """
    panels = []
    for row in images:
        sample = split[split.ids.index(row["id"])]
        pixels = sample["image"].permute(1, 2, 0).numpy()
        seg = predict(sample["image"][None])["seg"].float().cpu()
        logits = F.interpolate(seg, size=pixels.shape[:2], mode="bilinear", align_corners=False)[0, 0]
        pictures = {"image": pixels, "mask": paint(sample["mask"].numpy(), MASK), "heat": heat(pixels, logits.numpy())}
        files = {title: f"defects/{file_name(row['id'])}-{title}.png" for title in pictures}
        save_pictures(root, files, pictures)
        found = {"score": row["score"], "missed": row["score"] < threshold, "defective": row.get("defective", True)}
        panels.append({"id": row["id"], "files": files, **found})
    return panels


MASK = np.array([(0, 0, 0), (255, 255, 255)], np.uint8)
HEAT = np.array([(0, 0, 60), (70, 30, 130), (200, 40, 90), (250, 150, 30), (255, 250, 150)], np.float64)


def heat(image: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: a map's probabilities as colours over the dimmed image, from dark blue (0) to yellow (1)."""
    share = 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -50, 50)))
    steps = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(share, steps, HEAT[:, channel]) for channel in range(3)], axis=2)
    return (0.35 * image + 0.65 * colours).astype(np.uint8)
