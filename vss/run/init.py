"""`vss init`: the first recipe for a folder of images and masks, from what is in it and the machine at hand.

Schedules are those of the packaged recipes, whose figures are measured; what depends on the folder is decided here:
task, network, size, splits, epochs. Every key has a line that says why. Nothing is random, and no time that is measured
decides anything: the same folder on the same machine gives the same recipe, but for the estimate at its head.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vss import models
from vss.core.config import RECIPES, DataOptions, Recipe
from vss.core.errors import VssError, counted, listed
from vss.core.files import target_of, write_text
from vss.core.yaml12 import flow, overridden, parse, parse_yaml, read_yaml
from vss.data import SegData, labels_of
from vss.data.check import check
from vss.data.readers import AUTO, as_found
from vss.data.split import ALL, FRACTIONS, with_splits
from vss.deploy.profile.units import usable_threads
from vss.run.job import check_run
from vss.run.project import Project
from vss.train.tasks import task_of

Json = dict[str, Any]
WIDTH, LISTED = 110, 40
"""Of a comment, in characters; classes that a recipe lists."""
CARVED = {"train": 0.85, "val": 0.15}
"""Where a folder has test images of its own and nothing to validate on."""
DEFECTS = ("anomaly", "ksdd2")
"""Layouts of sound and defective images."""
SOUND_SHARE = 0.25
"""In other layouts, of two classes: the share of images without the second from which every image is decided about."""
RARE_PCT = 2.0
"""Percent of the labelled pixels below which a class is rare: a loss that counts pixels alike hardly sees it."""
STEPS, EPOCHS = {"cpu": 1100, "cuda": 20_000}, {"cpu": (4, 80), "cuda": (15, 200)}
"""Steps that a first training takes, and the fewest and most epochs: on two cores, those of `camvid_unet`."""
PIXELS_A_GIB, MAX_PIXELS = 32_768, 2048 * 1024
"""Pixels of an image for each GiB of a GPU: eight images and the activations of a U-Net of width 32 then fit."""
GIVEN = "as it was given to vss init"


@dataclass
class Draft:
    """A recipe in the making: dotted keys, each with its value and why it is so."""

    values: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def set(self, key: str, value: object, why: str) -> None:
        self.values[key], self.why[key] = value, why

    def recipe(self, name: str) -> Recipe:
        return parse(Recipe, overridden({"name": name}, self.values.items()), source="the new recipe")

    def text(self, head: str) -> str:
        """YAML with comments; sections in the order of `Recipe`, keys without a section first."""
        order = list(Recipe.model_fields)
        lines, above = [f"# {line}".rstrip() for line in head.splitlines()], list[str]()
        for key in sorted(self.values, key=lambda key: ("." in key, order.index(key.partition(".")[0]))):
            *parents, leaf = key.split(".")
            same = sum(parents[: i + 1] == above[: i + 1] for i in range(len(parents)))
            if not parents or not same:
                lines.append("")
            for depth in range(same, len(parents)):
                lines.append(f"{'  ' * depth}{parents[depth]}:")
            indent = "  " * len(parents)
            lines += [f"{indent}# {line}" for line in textwrap.wrap(self.why[key], WIDTH - len(indent))]
            lines.append(f"{indent}{leaf}: {flow(self.values[key])}")
            above = parents
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Machine:
    """What trains: usable cores, and the memory of the first GPU in bytes, 0 without one."""

    cores: int
    memory: int = 0

    @classmethod
    def here(cls) -> Machine:
        found = torch.cuda.is_available()
        return cls(usable_threads(None), torch.cuda.get_device_properties(0).total_memory if found else 0)

    @property
    def device(self) -> str:
        return "cuda" if self.memory else "cpu"

    def __str__(self) -> str:
        return f"a GPU of {self.memory >> 30} GiB" if self.memory else counted(self.cores, "core")

    def pixels(self, base: int) -> int:
        """Most pixels of an image that this trains in a reasonable time; `base`: of a recipe for two cores."""
        if self.memory:
            return min(MAX_PIXELS, (self.memory >> 30) * PIXELS_A_GIB)
        return base * max(2, min(self.cores, 32)) // 2


def init(
    root: Path | str,
    to: Path,
    *,
    layout: str = AUTO,
    options: DataOptions | None = None,
    model: str | None = None,
    force: bool = False,
) -> Json:
    """Write the recipe `to` for the folder `root`.

    Args:
        layout: name of the layout, where two fit.
        options: how the folder is read, beside its layout.
        model: the network, in place of the one that is chosen.
        force: replace a file that is there.

    Returns:
        The figures of `vss.data.check.check`, with `recipe`, `task` and `seconds` (of training, estimated).

    Raises:
        VssError: no layout fits, or two; masks are missing, or something else that a run would refuse.
    """
    refuse_target(to, force=force)
    options = options or DataOptions()
    given = options.given()
    data = as_found(layout, root, options)
    split, why = choose_split(data, options)
    if split:
        options = options.model_copy(update={"split": split})
    data = with_splits(data, options)
    figures = check(data)
    if problems := figures["problems"]:
        more = f" ({counted(len(problems) - 1, 'more problem')}: vss data check {root})" if problems[1:] else ""
        raise VssError(f"{problems[0]}{more}; mend the folder, then vss init writes its recipe.")
    draft, machine = Draft(), Machine.here()
    draft.set("data.dataset", data.name, "found by looking at the folder; vss data layouts draws every layout")
    draft.set("data.root", str(root), "the folder; data.* keys say how it is read and stay with every checkpoint")
    for key, value in given.items():
        draft.set(f"data.{key}", value, GIVEN)
    if split and "split" not in given:
        draft.set("data.split", split, why)
    if "test" not in data.splits:
        draft.set("split", "val", "the folder has no test images; figures of images that training chose by are kinder")
    add_network(draft, data, figures, machine, model)
    add_schedule(draft, data, figures, machine)
    project = Project.open(draft.recipe(to.stem))
    check_run(project)
    seconds = seconds_of(project, machine)
    text = draft.text(head(str(root), figures, to, seconds, machine))
    parse(Recipe, {"name": to.stem} | parse_yaml(text, source=str(to)), source=str(to))
    write_text(to, text)
    return figures | {"recipe": project.recipe, "task": task_of(project.recipe.model.name), "seconds": seconds}


def refuse_target(to: Path, *, force: bool) -> None:
    """Refuse a name that no run would take, and a file that is there unless it may be replaced."""
    if to.suffix not in (".yaml", ".yml"):
        raise VssError(f"--save is {to}, no name of a recipe, since `vss run` reads .yaml files; give NAME.yaml.")
    if target_of(to).exists() and not force:
        raise VssError(f"{to} exists already; give --force to replace it, or another --save.")


def choose_split(data: SegData, options: DataOptions) -> tuple[dict[str, Any], str]:
    """`data.split`, and why; empty where the folder's own splits serve."""
    own = set(data.splits)
    if options.split or {"train", "val"} <= own:
        return {}, ""
    if own == {ALL}:
        return FRACTIONS, (
            "the folder has no splits: shares of the images by a hash of their names, every class spread evenly, equal "
            "images in one split"
        )
    if data.name == "anomaly" and not labels_of(data, data.splits.get("train", [])).any():
        return FRACTIONS, (
            "the training images of the folder are all sound, and a network that finds defects must be shown some: all "
            "images are shared out anew, sound and defective evenly"
        )
    if {"train", "test"} <= own:
        return CARVED, (
            "the folder has nothing to validate on: a part of its training images, by a hash of their names; its test "
            "images stay as they are"
        )
    return FRACTIONS, f"the folder has {listed(sorted(own)) or 'nothing'} alone: all images are shared out"


def is_decision(data: SegData) -> bool:
    """Whether every image is to be judged sound or defective: two classes, the second absent in many images of every
    split and present in others."""
    if data.num_classes != 2 or data.name in DEFECTS:
        return data.name in DEFECTS
    labels = [labels_of(data, pairs) for pairs in data.splits.values()]
    both = all(each.any() and not each.all() for each in labels)
    return both and bool((~np.concatenate(labels)).mean() >= SOUND_SHARE)


def add_network(draft: Draft, data: SegData, figures: Json, machine: Machine, model: str | None) -> None:
    """Task, network and size."""
    decides = task_of(model) == "defect" if model else is_decision(data)
    train, base = figures["splits"]["train"], base_of(decides, machine)
    size = [int(side) for side in next(iter(train["sizes"]["common"])).split("x")]
    pixels = machine.pixels(math.prod(base["data"]["size"]))
    name = model or ("segdecnet" if decides else "unet")
    options: Json = base["model"].get("options", {}) if name == base["model"]["name"] else {}
    if name == "unet":
        least = min(size) * min(1.0, math.sqrt(pixels / math.prod(size)))
        depth = max(1, min(4, int(math.log2(max(least, 8) / 4))))  # four pixels or more at the bottom
        options = {"width": 32 if machine.memory else 16} | ({"depth": depth} if depth < 4 else {})
    why = f"task segmentation: a class for every pixel, {data.num_classes} of them; it learns from few images"
    if decides:
        images, shows = (
            sum(facts[key] if key == "pairs" else facts["classes"][data.class_names[-1]][key]
                for facts in figures["splits"].values())
            for key in ("pairs", "images")
        )  # fmt: skip
        why = (
            f"task defect: {images - shows} of {images} images show no {data.class_names[-1]}, so that it decides "
            "about every image and shows where; --model unet marks pixels alone"
        )
    draft.set("model.name", name, GIVEN if model else why)
    if options:
        draft.set("model.options", options, f"small enough to be trained on {machine}; wider is better and slower")
    network = models.build(name, 1 if decides else data.num_classes, **options)
    multiple = network.size_multiple
    fitted = fitted_size(size, pixels, multiple, least=network.least_side if decides else 0)
    many = train["sizes"]["distinct"]
    kinds = f"images have {many} sizes, the most frequent is" if many > 1 else "images are"
    step = f", in steps of {multiple}, which {name} needs" if multiple > 1 else ""
    draft.set(
        "data.size", list(fitted),
        f"height, width of what enters the network: {kinds} {size[0]}x{size[1]}, and about {pixels:,} pixels are "
        f"trained on {machine} in time{step}; larger shows smaller things and takes longer",
    )  # fmt: skip


def fitted_size(size: Sequence[int], pixels: int, multiple: int, *, least: int = 0) -> tuple[int, int]:
    """The largest (H, W) of about the shape of `size` with at most `pixels`, in steps of `multiple`.

    Neither side is below `least`, nor the longer one below twice that.

    >>> fitted_size((360, 480), 17_920, 16), fitted_size((24, 20), 17_920, 4), fitted_size((24, 20), 0, 8, least=64)
    ((112, 144), (24, 20), (128, 112))
    """
    small = max(least / min(size), 2 * least / max(size))
    scale = max(small, min(1.0, math.sqrt(pixels / math.prod(size))))
    rounds = math.ceil if scale == small else math.floor if scale < 1 else round
    height, width = (max(1, rounds(side * scale / multiple)) * multiple for side in size)
    return height, width


def base_of(decides: bool, machine: Machine) -> Json:
    """The packaged recipe whose schedule is taken."""
    name = ("ksdd" if machine.memory else "ksdd_small") if decides else "camvid_unet"
    return read_yaml(RECIPES / f"{name}.yaml", kind="recipe")


TAKEN = ("train", "finetune", "defect", "export", "gate", "panels", "data.augment", "prune.criterion", "prune.keep")
"""What of a packaged recipe is taken, and `prune.budget`; what has its default anyway is left out."""

WHY = {
    "data.augment": "images are mirrored alone: brightness and colour may be what tells a defect",
    "train.batch_size": "images of a step",
    "train.lr": "highest learning rate",
    "train.ema": "the average of the last weights is validated and kept",
    "train.val_every": "epochs between validations; the best one is kept",
    "finetune.lr": "lower than that of training: the first steps must not undo more than the cut did",
    "finetune.ema": "as in training",
    "finetune.distill": "the uncut network teaches the cut one",
    "prune.criterion": "what channels are scored by; vss methods lists all",
    "prune.keep": "the head that decides stays as it is",
    "prune.budget.kind": "what is counted: channels, params or macs",
    "prune.budget.scope": "the same fraction of every layer",
    "prune.budget.keep": "fraction that stays: smaller is faster and less exact",
    "prune.budget.align": "widths in steps of 8, which runtimes compute without waste",
    "prune.budget.floor": "fraction of a layer that stays at least, so that none becomes a bottleneck",
    "export.labels": "the decision and its map are given as they are",
    "panels": "images that the report pictures",
    "gate.max_drop_from_baseline": "points of {title} that pruning may cost; settle it before you look at results",
    "gate.max_fnr_increase": "points of missed defects that pruning may cost on validation",
    "gate.max_ap_drop": "points of average precision that pruning may cost on validation",
    "build.threads": "threads of the engine: set what it will have where it runs; times of one are stable soonest",
}


def add_schedule(draft: Draft, data: SegData, figures: Json, machine: Machine) -> None:
    """Training, cut and fine-tuning as in a packaged recipe, as long as suits the number of images; and what people
    will want to change before they believe the verdict."""
    decides = task_of(draft.values["model.name"]) == "defect"
    base = base_of(decides, machine)
    leaves, defaults, train = dict(_leaves(base)), DEFAULTS, figures["splits"]["train"]
    for key, value in leaves.items():
        taken = key.startswith("prune.budget") or {key, key.partition(".")[0]} & {*TAKEN}
        if taken and value != defaults[key] and (decides or key != "data.augment"):
            draft.set(key, value, WHY.get(key, f"as in the packaged recipe {base['name']}, whose figures are measured"))
    draft.set("prune.budget.keep", leaves["prune.budget.keep"], WHY["prune.budget.keep"])
    shares = {row["pixels_pct"]: name for name, row in train["classes"].items() if row["pixels"]}
    rare = f"rare classes count more: {shares[min(shares)]} is {min(shares):.2g} % of the training pixels"
    batch = min(leaves["train.batch_size"], train["pairs"])
    seen = 2 * int(labels_of(data, data.splits["train"]).sum()) if decides else train["pairs"]
    steps, (least, most) = max(1, seen // batch), EPOCHS[machine.device]
    epochs = max(least, min(most, round(STEPS[machine.device] / steps)))
    after = max(2, round(epochs * leaves["finetune.epochs"] / leaves["train.epochs"]))
    whom = "defective and sound images by turns" if decides else f"{counted(train['pairs'], 'training image')}"
    why = f"passes over {whom}: {steps * epochs:,} steps of {counted(batch, 'image')}, for {machine}"
    tuned = "passes after the cut; the uncut network gets as many, for a fair comparison"
    for section, count, reason in (("train", epochs, why), ("finetune", after, tuned)):
        draft.set(f"{section}.epochs", count, reason)
        changes = {"batch_size": batch, "val_every": max(1, count // 12)}
        changes |= {"class_weights": "log" if not decides and min(shares) < RARE_PCT else "none"}
        for name, value in changes.items():
            draft.values.pop(f"{section}.{name}", None)
            if value != defaults[f"{section}.{name}"]:
                draft.set(f"{section}.{name}", value, rare if name == "class_weights" else WHY[f"train.{name}"])
    limit, title = "gate.max_drop_from_baseline", "average precision" if decides else "mean IoU"
    draft.set(limit, defaults[limit], WHY[limit].format(title=title))
    draft.set("build.threads", 1, WHY["build.threads"])


def seconds_of(project: Project, machine: Machine) -> float:
    """Seconds that all trainings of a run take, from one batch that is read and one step: without validation."""
    recipe, device = project.recipe, machine.device
    loader = project.loader("train", recipe.train, 0, 1)
    start = time.perf_counter()
    batch = {key: value.to(device) for key, value in next(iter(loader)).items() if isinstance(value, torch.Tensor)}
    read = (time.perf_counter() - start) / max(1, recipe.data.workers)
    model, learner = project.build_model().to(device).train(), project.task.learner(recipe.train).to(device)
    images = project.preprocess.normalise(batch["image"])
    for _ in range(2):  # the first one allocates
        start = time.perf_counter()
        learner(model.forward_train(images), batch).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        step = time.perf_counter() - start
    teaches = 4 / 3 if recipe.finetune.distill else 1  # the teacher's forward pass, a third of a step
    tuned = recipe.finetune.epochs * (step * teaches + read) * (1 + recipe.control)
    return len(loader) * (recipe.train.epochs * (step + read) + tuned)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """(dotted key, value) of a recipe; options and augmentation are values."""
    found: list[tuple[str, object]] = []
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and key not in ("options", "augment")
        found += _leaves(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return found


DEFAULTS = dict(_leaves(Recipe().model_dump(mode="json")))
"""Dotted key -> default."""


def in_words(seconds: float) -> str:
    """A time as people say it.

    >>> in_words(20), in_words(1000), in_words(9000)
    ('1 minute', '17 minutes', '2.5 hours')
    """
    if seconds < 5400:
        return counted(max(1, round(seconds / 60)), "minute")
    return f"{seconds / 3600:.1f} hours"


def head(root: str, figures: Json, to: Path, seconds: float, machine: object) -> str:
    """The comment above the recipe: what it is for, what is in the folder, what to do next."""
    images = ", ".join(f"{facts['pairs']} {split}" for split, facts in figures["splits"].items())
    lines = [
        f"Written by vss init for {root}: {images} images, layout {figures['dataset']}.",
        f"Next: vss run {to} (train, prune, fine-tune, export, gate, time), which ends in runs/{to.stem}/report.html.",
        f"Training takes about {in_words(seconds)} on {machine}; stopped, the same command goes on.",
        "All other keys have their defaults: vss run RECIPE --dry-run prints them.",
        "",
        *class_table(figures["splits"]),
    ]
    for warning in figures["warnings"]:
        lines += ["", *textwrap.wrap(f"Note: {warning}.", WIDTH)]
    return "\n".join(lines)


def class_table(splits: Mapping[str, Json]) -> list[str]:
    """Every class with its share of the labelled pixels and the images that show it, over all splits."""
    names = list(next(iter(splits.values()))["classes"])
    pixels, images = (
        {name: sum(facts["classes"][name][key] for facts in splits.values()) for name in names}
        for key in ("pixels", "images")
    )
    total, kept = max(1, sum(pixels.values())), sorted(names, key=lambda name: -pixels[name])[:LISTED]
    shown = [name for name in names if name in kept]
    width = max(len("class"), *(len(name) for name in shown))
    rows = [f"{name:<{width}}  {100 * pixels[name] / total:7.2f}  {images[name]:7}" for name in shown]
    more = [f"and {counted(len(names) - len(shown), 'class', 'classes')} of fewer pixels"] if shown != names else []
    return [f"{'class':<{width}}  pixels %   images", *rows, *more]
