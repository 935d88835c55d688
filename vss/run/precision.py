"""One network of a project in other precisions: calibration images, cached ranges, files, scores, search, verdict."""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vss.core.config import PrecisionConfig
from vss.core.errors import VssError
from vss.core.files import sha256_tensors
from vss.data.counts import CalibrationSet, choose_calibration
from vss.deploy import BACKENDS, Session, bench, export
from vss.deploy.backends import main_of, open_options
from vss.deploy.graph import SegGraph
from vss.deploy.onnx_file import runtime_of
from vss.deploy.quantize.layers import Net, check_names, groups_of, read_onnx
from vss.deploy.quantize.precision import ANY, GRAPH_OPTIONS, Precision, convert, graph_of, retype
from vss.deploy.quantize.qdq import observed, place
from vss.deploy.quantize.ranges import Method, Ranges, cache_key, measure, ranges_of
from vss.deploy.quantize.sensitivity import Choice, first_diverging, greedy_fallback, scan, sentence
from vss.run.inputs import read_list
from vss.run.project import Project, export_options, project_with
from vss.train.evaluate import engine_predictor
from vss.train.gate import comparable, gate
from vss.train.header import header

log = logging.getLogger(__name__)
BATCH = 4
"""Images that calibration holds at a time."""
Tick = Callable[[], None]


@dataclass(frozen=True)
class PrecisionExporter:
    """A network, its exported float32 file `plain` (with the report and the options of that export), and what is needed
    to write it in another precision; `cache` is a folder of ranges by hash."""

    project: Project
    model: nn.Module
    config: PrecisionConfig
    plain: Path
    report: dict[str, Any]
    options: dict[str, object]
    cache: Path
    target: str = ""
    """The runtime that files are for; "": that of the recipe."""

    @property
    def runtime(self) -> str:
        return self.target or main_of(self.project.recipe.build)

    @property
    def judge_in(self) -> str:
        """The runtime that scores and times files while layers are chosen."""
        return self.runtime if getattr(BACKENDS[self.runtime], "runs_here", False) else "onnxruntime"

    @classmethod
    def export(
        cls, project: Project, model: nn.Module, config: PrecisionConfig, folder: Path, cache: Path, **changes: object
    ) -> PrecisionExporter:
        """Write the float32 file into `folder` first; `changes` to the options of the recipe's export."""
        options = export_options(project, model) | changes
        plain = folder / "fp32.onnx"
        report = export(model, plain, **options)
        check_names(Net(read_onnx(plain)), config.keep)
        return cls(project, model, config, plain, report, options, cache)

    # -- calibration --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def calibration(self) -> CalibrationSet:
        config, listed = self.config, self.config.image_list
        return choose_calibration(
            self.project.data, count=config.images, seed=self.project.recipe.seed, split=config.split,
            ids=read_list(Path(listed)) if listed else None,
        )  # fmt: skip

    @property
    def method(self) -> Method:
        return Method(self.config.method, self.config.percent)

    def prepared(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> what the file takes."""
        if self.options.get("preprocess") is not None:
            return images.permute(0, 2, 3, 1).contiguous()
        return self.project.preprocess.normalise(images)

    def images(self, count: int, size: tuple[int, int], seed: int) -> Tensor:
        """`count` calibration images at a size, `seed` of them skipped, as the file takes them."""
        preprocess = self.project.preprocess.model_copy(update={"size": size})
        pairs = self.calibration.pairs
        chosen = [pairs[(seed + index) % len(pairs)] for index in range(count)]
        images = [preprocess.image(self.project.data.read(pair)[0]) for pair in chosen]
        return self.prepared(torch.stack(images))

    def feeds(self, size: int = BATCH) -> Iterator[dict[str, np.ndarray]]:
        """The calibration images in batches as the file takes them, for any calibrator; nothing is kept."""
        for batch in self.calibration.batches(self.project.preprocess, size):
            yield {"image": self.prepared(batch).numpy()}

    def ranges(self, plain: Path, tensors: Sequence[str]) -> Ranges:
        """Of a float32 file; measured once and kept under everything that they depend on."""
        key = cache_key(plain, self.method, self.calibration.sha256(), self.project.preprocess.sha256)
        path = self.cache / f"{key[:32]}.json"
        if path.is_file():
            try:
                return Ranges.load(path)
            except VssError as error:
                log.warning("%s It is measured again.", error)
        histograms = measure(plain, self.feeds(), tensors)
        ranges = ranges_of(
            plain, histograms, self.method, calibration=self.calibration.manifest(), allow_dead=self.config.keep
        )
        ranges.save(path)
        return ranges

    def calibrate(self) -> Ranges:
        return self.ranges(self.plain, observed(Net(read_onnx(self.plain))))

    # -- files --------------------------------------------------------------------------------------------------------

    def precision(self, kind: str, keep: Sequence[str] | None = None, *, target: str | None = None) -> Precision:
        """`target` is the runtime that the file is for, by default the exporter's own."""
        config = self.config
        kept = tuple(config.keep if keep is None else keep)
        if kind != "int8":
            return Precision(kind, kept if kind == "fp16" else ())
        return Precision(kind, kept, config.elsewhere, config.first, config.last, target or self.runtime)

    def differs(self, kind: str, target: str) -> bool:
        """Whether the file in a precision is another one for `target` than for the runtime of the recipe."""
        net, theirs, ours = Net(read_onnx(self.plain)), self.precision(kind, target=target), self.precision(kind)
        return (theirs.left(net), theirs.style) != (ours.left(net), ours.style)

    def write(
        self, path: Path, kind: str, keep: Sequence[str] | None = None, *, target: str | None = None
    ) -> dict[str, Any]:
        """The file in a precision, for a runtime; how far it is from torch is for the gate."""
        graph: SegGraph = graph_of(
            self.model, **{name: self.options[name] for name in GRAPH_OPTIONS if name in self.options}
        )
        images = self.images if kind == "int8" else None
        return retype(
            graph, self.plain, path, self.precision(kind, keep, target=target), self.report, ranges=self.ranges,
            images=images, tolerance=ANY,
        )  # fmt: skip

    def score(self, path: Path, split: str | None = None) -> dict[str, object]:
        with self._open(path) as session:
            return self.project.score(engine_predictor(session, self.project.preprocess), split=split)

    def _open(self, path: Path) -> Session:
        return BACKENDS[self.judge_in].open(path, **open_options(self.project.recipe.build, self.judge_in))

    # -- search -------------------------------------------------------------------------------------------------------

    def search(self, tick: Tick | None = None, *, timed: bool = True) -> Choice:
        """Find the layers that stay in floating point so that INT8 costs at most `max_drop` points on validation.

        `tick` is called after each group of layers that was scored; `timed`: also time every group's file, so that
        layers which save nothing go first.
        """
        task, recipe = self.project.task, self.project.recipe
        small = project_with(self.project, split="val", limit=self.config.search_images)
        here = dataclasses.replace(self, project=small)
        ranges = self.calibrate()
        net = Net(read_onnx(self.plain))
        kept = {*self.config.keep, *self.precision("int8").left(net)}
        chosen = set(place(net, kept, first=self.config.first, last=self.config.last).layers)
        every = groups_of(net, self.config.groups)
        groups = {name: [layer for layer in layers if layer in chosen] for name, layers in every.items()}
        groups = {name: layers for name, layers in groups.items() if layers}
        baseline = comparable(here.score(self.plain), task.metric)
        with tempfile.TemporaryDirectory(prefix="vss-search-") as folder:
            files: dict[tuple[str, ...], Path] = {}

            def score(keep: Sequence[str]) -> float:
                path = Path(folder) / f"{len(files)}.onnx"
                convert(self.plain, path, self.precision("int8", [*self.config.keep, *keep]), ranges)
                files[tuple(keep)] = path
                return comparable(here.score(path), task.metric)

            rows = scan(groups, score, baseline, tick)
            if timed:
                singles = dict(zip((row["group"] for row in rows), files.values(), strict=True))
                times = self.times({"fp32": self.plain, **singles})
                for row in rows:
                    row["gain_ms"] = times["fp32"] - times[row["group"]]
            found = greedy_fallback(rows, score, baseline, self.config.max_drop)
        facts: dict[str, object] = {"by": task.metric, "split": "val", "images": len(small.split("val"))}
        facts |= {"baseline": baseline, "max_drop": self.config.max_drop, "groups": rows, **found, **ranges.method}
        facts |= {"ranges_sha256": ranges.sha256(), "elsewhere": self.config.elsewhere, "seed": recipe.seed}
        return Choice(sha256_tensors(self.model.state_dict()), (*self.config.keep, *found["keep"]), facts)

    def times(self, files: dict[str, Path]) -> dict[str, float]:
        """Milliseconds a call (p50) of files in one interleaved run, one image."""
        feed = {"image": self.images(1, self.project.preprocess.size, 0).numpy()}
        limit = self.project.recipe.bench.max_seconds
        timing: dict[str, Any] = {"window_seconds": 0.05, "windows": 4, "warmup": 2}
        with ExitStack() as stack:
            sessions = {name: stack.enter_context(self._open(path)) for name, path in files.items()}
            found = bench(sessions, dict.fromkeys(sessions, feed), min_seconds=0.0, max_seconds=limit, **timing)
        return {name: row["latency_ms_p50"] for name, row in found["sessions"].items()}


def judge(
    exporter: PrecisionExporter,
    path: Path,
    results: dict[str, dict[str, object]],
    *,
    max_drop: float,
    metric: str | None = None,
) -> dict[str, object]:
    """Three-way comparison of torch, the float32 file and the file in another precision, and the gate of the last.

    Args:
        path: ONNX of the engine that was scored.
        results: of `Task.evaluate` for "torch", "onnxruntime" (the float32 file) and "engine".
        metric: in place of the task's.

    Returns:
        The verdict of `vss.train.gate` between "torch" and "engine", `scores` of all three, and after a failure
        `diverges`: the first layer that does, found on calibration images, also in the sentence.
    """
    task = exporter.project.task
    metric = metric or task.metric
    span = task.drop_interval(results["torch"], results["engine"]) if metric == task.metric else None
    verdict = gate(results["torch"], results["engine"], metric=metric, max_drop=max_drop, interval=span)
    verdict["scores"] = {name: result[metric] for name, result in results.items()}
    return verdict if verdict["passed"] else _explained(exporter, path, verdict)


def refused(
    exporter: PrecisionExporter,
    path: Path,
    results: Mapping[str, dict[str, object]],
    reason: str,
    *,
    max_drop: float,
    metric: str | None,
) -> dict[str, object]:
    """The verdict of `judge` on an engine that gives NaN, `reason` in a sentence; its figures are None."""
    name = metric or exporter.project.task.metric
    verdict = {"passed": False, "metric": name, "baseline": comparable(results["torch"], name), "candidate": None}
    verdict |= {"drop": None, "max_drop": max_drop, "sentence": f"failed: {reason}"}
    verdict["scores"] = {key: result[name] for key, result in results.items()} | {"engine": None}
    return _explained(exporter, path, verdict)


def _explained(exporter: PrecisionExporter, path: Path, verdict: dict[str, Any]) -> dict[str, object]:
    feed = {"image": exporter.images(2, exporter.project.preprocess.size, 0).numpy()}
    level = BACKENDS["onnxruntime"].open(path).describe()["optimisation"]
    verdict["diverges"] = first_diverging(exporter.plain, path, feed, optimisation=level, runtime=runtime_of(path))
    verdict["sentence"] += f" {sentence(verdict['diverges'])}"
    return verdict


def load_choice(path: Path | None, ckpt: Path) -> tuple[str, ...]:
    """Layers of a checkpoint that a file of `vss sensitivity` keeps in floating point, none without a file.

    Raises `VssError` for a file of other weights, and for a search that found no way.
    """
    if path is None:
        return ()
    choice = Choice.load(path, header(ckpt).weights_sha256)
    if not choice.facts.get("within"):
        raise VssError(f"{path} found no way to quantise this network within its limit; export fp16 or fp32 instead.")
    return choice.keep
