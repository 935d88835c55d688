"""What the result of a step depends on: the whole recipe, less what is listed here with reasons, and data by content.

A new key of a recipe is in the key of every step until it is listed. `tests/run/test_keys.py` changes every key in
turn and records what each step reads. A step has a version, raised when its result changes its meaning.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vss.core.config import Recipe
from vss.core.environment import environment
from vss.core.errors import VssError
from vss.core.files import sha256_file, sha256_json, sha256_tensors
from vss.prune import CRITERIA

if TYPE_CHECKING:
    from torch import nn

    from vss.run.project import Project

VERSIONS = {
    "train": 1, "sparse": 1, "prune": 1, "finetune": 1, "evaluate": 1, "engine": 1, "gate": 2, "bench": 1, "panels": 1,
    "precision": 2, "precision-bench": 1, "statistics": 1, "cell": 2,
}  # fmt: skip
"""Kinds of steps, with the version of their results."""

FILES = ("model.checkpoint", "model.backbone_weights", "defect.split_file", "precision.image_list", "prune.latency.lut")
"""Keys that name a file: its content counts, and not where it lies."""

Reasons = dict[str, str]

LABELS: Reasons = {
    "name": "a label of files and pages",
    "references": "each is a run of its own, with keys of its own",
    "data.workers": "samples are functions of seed, epoch and index",
}


def _later(keys: str) -> Reasons:
    return dict.fromkeys(keys.split(), "other steps alone read it")


def _through(keys: str) -> Reasons:
    return dict.fromkeys(keys.split(), "it comes in through the key of the network")


MAKING = "train sparse dmcp prune finetune"
UNREAD: dict[str, Reasons] = {
    "train": _later(
        "split eval_batch_size control panels sparse dmcp prune finetune export precision build gate bench"
    ),
    "sparse": _later("split eval_batch_size control panels finetune export precision build gate bench")
    | _later("prune.recalibrate prune.epochs_between prune.latency prune.budget.floor prune.budget.scope"),
    "prune": _later("split eval_batch_size control panels precision gate bench"),
    "finetune": _later("split eval_batch_size control panels export precision build gate bench")
    | _through("sparse dmcp prune"),
    "evaluate": _later("control panels export precision build gate bench") | _through(MAKING),
    "engine": _later("control panels precision gate bench") | _through(MAKING),
    "gate": _later("panels precision bench") | _through(MAKING),
    "bench": _later("control panels precision gate eval_batch_size") | _through(f"{MAKING} export"),
    "panels": _later("control precision gate bench eval_batch_size") | _through(f"{MAKING} export"),
    "precision": _later("panels bench") | _through(MAKING),
    "precision-bench": _later("control panels gate eval_batch_size") | _through(f"{MAKING} export"),
    "statistics": _later("split eval_batch_size control panels finetune sparse dmcp export precision build gate bench")
    | _later("prune.criterion prune.options prune.budget prune.steps prune.epochs_between prune.recalibrate")
    | _later("prune.latency"),
    "cell": {},
}
"""Kind of step -> what does not matter for it, with the reason. What some recipes make matter is in `unread`."""


def unread(recipe: Recipe, kind: str) -> Reasons:
    """Keys of this recipe, with all that is below them, that do not matter for a step, with the reasons."""
    found = LABELS | UNREAD[kind]
    criterion = CRITERIA.canonical(recipe.prune.criterion)
    if kind == "prune":
        if not recipe.prune.epochs_between:
            found |= {"finetune": "there is no fine-tuning between rounds"}
        if recipe.prune.latency is None:
            found |= dict.fromkeys(("export", "build"), "no engine is built")
        if not CRITERIA[criterion].sparse_phase:
            found |= {"sparse": "the criterion has no sparse phase"}
    if kind in ("prune", "sparse") and criterion == "dmcp":
        found |= {"sparse": "the criterion searches in place of a sparse phase"}
    elif kind in ("prune", "sparse"):
        found |= {"dmcp": "the criterion has no search"}
    if kind == "sparse" and criterion != "dmcp":
        names = ("options", "budget", "batches", "batch_size", "steps")
        found |= {f"prune.{name}": "the phase goes before scoring and cutting" for name in names}
    return found


def depends(recipe: Recipe, kind: str, also: Any = None) -> Any:
    """JSON-able data whose hash is the key of a step of `kind`; `also` is what is not in the recipe, such as data."""
    content = recipe.model_dump(mode="json")
    for key in unread(recipe, kind):
        _drop(content, key)
    for key in FILES:
        _hash(content, key)
    return {"step": kind, "version": VERSIONS[kind], "recipe": content, "also": also}


def _drop(content: dict[str, Any], key: str) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        content = content.get(parent) or {}
    content.pop(leaf, None)


def _hash(content: dict[str, Any], key: str) -> None:
    """Put the hash of a file in place of its path."""
    *parents, leaf = key.split(".")
    section: Any = content
    for parent in parents:
        section = section.get(parent) or {}
    if section.get(leaf) is None:
        return
    path = Path(section[leaf])
    try:
        stat = path.stat()
        section[leaf] = _sha256(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    except OSError as error:
        raise VssError(f"{key} is {path}, which cannot be read ({error.strerror or error}); name a file.") from error


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, *state: int) -> str:
    return sha256_file(path)


def of_data(project: Project, *splits: str) -> Any:
    """What samples of these splits are made of, beside the recipe: contents, classes, and how masks are read."""
    data = project.data
    contents = {name: project.split(name).sha256() for name in splits}
    return [contents, list(data.class_names), data.ignore_index, data.palette.tolist()]


@functools.cache
def machine() -> str:
    """Hash of what times depend on beside the network: processor, devices, runtimes."""
    facts = environment()
    packages = {name: facts["packages"].get(name) for name in RUNTIMES}
    devices = [device.get("name") for device in facts["devices"]]
    return sha256_json([facts["cpu"]["model"], facts["cpu"]["usable_cores"], devices, packages])


RUNTIMES = ("torch", "onnxruntime", "onnxruntime-gpu", "tensorrt")


def fit_folder(parent: Path, about: Any, nets: Iterable[nn.Module]) -> Path:
    """Where a fit works: named by all that it comes from, weights too, so that it never goes on with another one's."""
    return parent / sha256_json([about, [sha256_tensors(net.state_dict()) for net in nets]])[:12]
