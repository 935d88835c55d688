"""Steps that remember: each is skipped when its inputs have not changed and its files are whole.

A step is up to date when the hash of everything it depends on (its part of the recipe, the data's fingerprint, the
steps before it) is the one in its record and the files it wrote still have their hashes. It depends on the whole
recipe, less the keys of `UNREAD`, which are listed with reasons, and on data by content.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from vss.core.config import Recipe
from vss.core.environment import environment
from vss.core.errors import VssError
from vss.core.files import read_json, sha256_file, sha256_json, sha256_tensors, write_json

if TYPE_CHECKING:
    from torch import nn


log = logging.getLogger(__name__)

KIND, SCHEMA = "vss.step", 2
Json = dict[str, Any]
WANTED: dict[str, type] = {"key": str, "seconds": float, "outputs": dict, "result": dict}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step returns; its fields are the JSON of its record. A `status` other than "ok" is told once."""

    detail: str = ""
    status: str = "ok"

    @classmethod
    def of(cls, result: Json) -> Self:
        return cls(**result)


T = TypeVar("T", bound=StepResult)


@dataclass
class Runner:
    """Runs steps, remembers them in `out/steps/`; `title` stands before every name that is told."""

    out: Path
    say: Callable[[str, str, float, str], None]
    records: list[Json] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    title: str = ""

    def __call__(
        self, name: str, depends: object, after: list[str], outputs: list[str], work: Callable[[], Json]
    ) -> Json:
        """Do `work` unless its record is up to date.

        Args:
            depends: JSON-able data that the result depends on.
            after: names of steps whose results it reads.
            outputs: files it writes, relative to `out`.
            work: returns JSON-able figures; more files that it wrote are under `files`. With a true `again` they are
                never up to date; a `status` is told in place of "ok".
        """
        key = sha256_json([name, depends, [self.keys[step] for step in after]])
        self.keys[name] = key
        old = self._record(name)
        if (
            old
            and old["key"] == key
            and not old["result"].get("again")
            and all(self._same(path, digest) for path, digest in old["outputs"].items())
        ):
            return self._done(name, "skipped", old["seconds"], "up to date", old["result"])
        start = time.monotonic()
        try:
            result = work()
        except BaseException as error:
            stopped = isinstance(error, BrokenPipeError) or not isinstance(error, Exception)
            text = "" if stopped else str(error) or type(error).__name__
            self._done(name, "interrupted" if stopped else "failed", time.monotonic() - start, text, {})
            raise
        seconds, status = time.monotonic() - start, str(result.pop("status", "ok"))
        hashes = {path: sha256_file(self.out / path) for path in [*outputs, *result.get("files", [])]}
        write_record(self._path(name), KIND, {"key": key, "seconds": seconds, "outputs": hashes, "result": result})
        return self._done(name, status, seconds, result.get("detail", ""), result)

    def result(self, name: str) -> Json:
        record = self._record(name)
        if record is None:
            raise VssError(f"{self._path(name)} is no whole record of a step; repeat the command that writes it.")
        return dict(record["result"])

    def _path(self, name: str) -> Path:
        return self.out / "steps" / f"{name}.json"

    def _record(self, name: str) -> Json | None:
        return read_record(self._path(name), KIND, WANTED)

    def _same(self, path: str, digest: str) -> bool:
        file = self.out / path
        return file.is_file() and sha256_file(file) == digest

    def _done(self, name: str, status: str, seconds: float, detail: str, result: Json) -> Json:
        name = f"{self.title}{name}"
        self.records.append({"name": name, "status": status, "seconds": seconds, "detail": detail})
        self.say(name, status, seconds, detail)
        return result


def write_record(path: Path, kind: str, body: Json) -> None:
    body = json.loads(json.dumps(body, allow_nan=False))  # keys of dictionaries are text, as they are when it is read
    write_json(path, {"kind": kind, "schema": SCHEMA, "sha256": sha256_json(body), **body})


def read_record(path: Path, kind: str, wanted: Mapping[str, type]) -> Json | None:
    """A record that is whole; None where there is none. A damaged or foreign one is as none: its work is done again.

    `wanted` are keys that it must have, and what their values are.
    """
    if not path.exists():
        return None
    try:
        data = read_json(path, kind=kind, schema=SCHEMA)
    except VssError as error:
        log.warning("%s It is made again.", error)
        return None
    body = {key: value for key, value in data.items() if key not in ("kind", "schema", "sha256")}
    changed = data["schema"] > 1 and data.get("sha256") != sha256_json(body)  # the first schema had no hash
    if changed or not all(isinstance(body.get(name), each) for name, each in wanted.items()):
        log.warning("%s is not as it was written; it is made again.", path)
        return None
    return body


VERSIONS = {
    "train": 1, "sparse": 1, "prune": 1, "finetune": 1, "evaluate": 1, "engine": 1, "gate": 2, "bench": 1, "panels": 2,
    "precision": 2, "precision-bench": 1, "beside": 1, "statistics": 1, "cell": 2,
}  # fmt: skip
"""Kinds of steps, with the version of their results."""

FILES = (
    "model.checkpoint",
    "model.backbone_weights",
    "model.weights",
    "defect.split_file",
    "precision.image_list",
    "prune.latency.lut",
    "build.tensorrt.plugins",
)
"""Keys that name a file, or a list of files: its content counts, and not where it lies."""

Reasons = dict[str, str]

AHEAD = ("tensorrt_rtx", "rtx")
"""Runtimes that build for GPUs elsewhere."""

LABELS: Reasons = {
    "name": "a label of files and pages",
    "track": "where the figures go as well",
    "references": "each is a run of its own, with keys of its own",
    "data.workers": "samples are functions of seed, epoch and index",
    "build.openvino.cache": "what is compiled is the same",
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
    | _later("prune.recalibrate prune.epochs_between prune.latency prune.widths")
    | _later("prune.budget.floor prune.budget.scope"),
    "prune": _later("split eval_batch_size control panels precision gate bench build.also"),
    "finetune": _later("split eval_batch_size control panels export precision build gate bench")
    | _through("sparse dmcp prune"),
    "evaluate": _later("control panels export precision build gate bench") | _through(MAKING),
    "engine": _later("control panels precision gate bench build.also") | _through(MAKING),
    "beside": _later("control panels gate bench eval_batch_size split") | _through(MAKING),
    "gate": _later("panels precision bench") | _through(MAKING),
    "bench": _later("control panels precision gate eval_batch_size build.also") | _through(f"{MAKING} export"),
    "panels": _later("control precision gate bench eval_batch_size build.also") | _through(f"{MAKING} export"),
    "precision": _later("panels bench build.also") | _through(MAKING),
    "precision-bench": _later("control panels gate eval_batch_size build.also") | _through(f"{MAKING} export"),
    "statistics": _later("split eval_batch_size control panels finetune sparse dmcp export precision build gate bench")
    | _later("prune.criterion prune.options prune.budget prune.steps prune.epochs_between prune.recalibrate")
    | _later("prune.latency prune.widths"),
    "cell": {},
}
"""Kind of step -> what does not matter for it, with the reason. What some recipes make matter is in `unread`."""


ENGINES = ("backend", "also", "kinds")
"""What of `build` and `precision` says which engines are made."""


def unread(recipe: Recipe, kind: str) -> Reasons:
    """Keys of this recipe, with all that is below them, that do not matter for a step, with the reasons."""
    found = LABELS | UNREAD[kind]
    if kind not in ("beside", "cell") and recipe.build.backend not in AHEAD:
        found |= {"build.targets": "the runtime builds for this machine"}
    if kind not in ("prune", "sparse"):
        return found
    from vss.prune import CRITERIA  # brings torch: the driver and the workers of a sweep start without

    criterion = CRITERIA.canonical(recipe.prune.criterion)
    if kind == "prune":
        if not recipe.prune.epochs_between:
            found |= {"finetune": "there is no fine-tuning between rounds"}
        if recipe.prune.latency is None:
            found |= dict.fromkeys(("export", "build"), "no engine is built")
        if not CRITERIA[criterion].sparse_phase:
            found |= {"sparse": "the criterion has no sparse phase"}
    if criterion == "dmcp":
        found |= {"sparse": "the criterion searches in place of a sparse phase"}
    else:
        found |= {"dmcp": "the criterion has no search"}
    if kind == "sparse" and criterion != "dmcp":
        names = ("options", "budget", "batches", "batch_size", "steps")
        found |= {f"prune.{name}": "the phase goes before scoring and cutting" for name in names}
    elif recipe.prune.budget.align == "auto":  # widths are for the engines that are made
        found.pop("build.also", None)
        for section in {"build", "precision"} & found.keys():
            del found[section]
            names = type(getattr(recipe, section)).model_fields
            found |= _later(" ".join(f"{section}.{name}" for name in names if name not in ENGINES))
    return found


def depends(recipe: Recipe, kind: str, also: object = None) -> Json:
    """JSON-able data whose hash is the key of a step of `kind`; `also` is what is not in the recipe, such as data."""
    content = recipe.model_dump(mode="json")
    for key in unread(recipe, kind):
        section, leaf = _place(content, key)
        section.pop(leaf, None)
    for key in (*FILES, *(["prune.widths"] if recipe.prune.lender else [])):
        section, leaf = _place(content, key)
        if section.get(leaf) is not None:
            section[leaf] = _content(key, section[leaf])
    return {"step": kind, "version": VERSIONS[kind], "recipe": content, "also": also}


def _place(content: Json, key: str) -> tuple[Json, str]:
    """The section that a dotted key is in, and its last word."""
    *parents, leaf = key.split(".")
    for parent in parents:
        content = content.get(parent) or {}
    return content, leaf


def _content(key: str, named: object) -> str | list[str]:
    """The hash of a file, or those of a list of files."""
    if isinstance(named, list):
        return [str(_content(key, each)) for each in named]
    path = Path(str(named))
    try:
        stat = path.stat()
        return _sha256(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    except OSError as error:
        raise VssError(f"{key} is {path}, which cannot be read ({error.strerror or error}); name a file.") from error


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, *state: int) -> str:
    return sha256_file(path)


@functools.cache
def machine() -> str:
    """Hash of what times depend on beside the network: processor, devices, runtimes."""
    facts = environment()
    packages = {name: facts["packages"].get(name) for name in RUNTIMES}
    devices = [device.get("name") for device in facts["devices"]]
    return sha256_json([facts["cpu"]["model"], facts["cpu"]["usable_cores"], devices, packages])


RUNTIMES = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13")


def fit_folder(parent: Path, about: object, nets: Iterable[nn.Module]) -> Path:
    """Where a fit works: named by all that it comes from, weights too, so that it never goes on with another one's."""
    return parent / sha256_json([about, [sha256_tensors(net.state_dict()) for net in nets]])[:12]
