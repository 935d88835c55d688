"""Prune to a measured time: choose widths under the predicted latency, build the engine, measure it, correct, repeat.

The prediction only proposes. What counts is the real engine interleaved with the uncut one; while its time is
off the target by more than the tolerance, the predicted time that is asked for moves by the same factor, inside of the
bracket that earlier engines have given. Runs differ by more than the interval of one says, since memory lies elsewhere
and the machine is in another state: near the target both networks are made anew for two further runs, and the mean of
the three counts.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import numpy as np
from torch import Tensor, nn

from vss.core.config import Budget, LatencyConfig, PruneConfig
from vss.core.errors import NotMeasured, VssError
from vss.core.files import sha256_json
from vss.data.preprocess import Preprocess
from vss.deploy import bench, export
from vss.deploy.backends import Session, main_of, timed_plan
from vss.deploy.profile.build import QUICK, Effort, build
from vss.deploy.profile.setting import Setting, groups_and_key
from vss.deploy.profile.subject import open_subject
from vss.deploy.profile.table import LatencyTable
from vss.prune.apply import cut
from vss.prune.budget import Rounding, multiple_of, top_channels
from vss.prune.latency import Choices, LatencyModel, Target, choices, search
from vss.prune.plan import Group, Plan
from vss.run.project import Project, export_options

log = logging.getLogger(__name__)
RUNS = 3  # of engines made anew, before a target counts as met


@dataclass(frozen=True)
class Measured:
    """One engine against the uncut one: milliseconds (medians) and the ratio of times with its 95 % interval."""

    uncut_ms: float
    ms: float
    ratio: float
    low: float
    high: float

    @property
    def noise(self) -> float:
        return (self.high - self.low) / 2 / self.ratio

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Self:
        faster = figures["speedup"]["cut"]
        if faster["low"] is None:
            raise NotMeasured(f"only {figures['rounds']} rounds were measured; give the measurement more seconds.")
        uncut, cut = (figures["sessions"][name]["latency_ms_p50"] for name in ("uncut", "cut"))
        return cls(uncut, cut, 1 / faster["ratio"], 1 / faster["high"], 1 / faster["low"])

    @classmethod
    def merged(cls, runs: Sequence[Self]) -> Self:
        """Means over runs, with an interval that holds all of theirs."""
        uncut, cut, ratio = (fmean(getattr(run, name) for run in runs) for name in ("uncut_ms", "ms", "ratio"))
        return cls(uncut, cut, ratio, min(run.low for run in runs), max(run.high for run in runs))


def check_noise(found: Measured, allowed: float) -> Measured:
    """Refuse a measurement whose interval is too wide to say whether a target was met."""
    if found.noise > allowed:
        raise NotMeasured(
            f"the machine is too noisy: the time ratio {found.ratio:.3f} is known to {found.noise:.1%} (95 % interval "
            f"{found.low:.3f} to {found.high:.3f}) and {allowed:.1%} is needed; end other work, or raise "
            "prune.latency.max_seconds or prune.latency.noise."
        )
    return found


def correct(asked: float, ratio: float, goal: float, tried: list[tuple[float, float]]) -> float:
    """The predicted milliseconds to ask for next, after `ratio` was measured where `goal` is wanted.

    `tried` holds all (asked, ratio) so far; the next stays between the nearest below and above the goal.
    """
    wanted = asked * goal / ratio
    below = max((ask for ask, got in tried if got <= goal), default=0.0)
    above = min((ask for ask, got in tried if got > goal), default=math.inf)
    if below < above < math.inf and below > 0 and not below < wanted < above:
        return (below + above) / 2
    return wanted


@dataclass
class LatencyGoal:
    """Chooses channels in place of a budget; see `vss.prune.make_plan(choose=...)`.

    Attributes:
        setting: where the engines run.
        record: target, table, and every iteration, for the report.
    """

    project: Project
    model: nn.Module
    config: PruneConfig
    table: LatencyTable
    setting: Setting
    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, project: Project, model: nn.Module, config: PruneConfig, out: Path) -> LatencyGoal:
        """With the table of `prune.latency.lut`, or one that is made (or gone on with) in `out`."""
        setting, table = cls.check(project, model, config)
        table = table or _own_table(model, project.preprocess, setting, config, out)
        return cls(project, model, config, table, setting)

    @classmethod
    def check(cls, project: Project, model: nn.Module, config: PruneConfig) -> tuple[Setting, LatencyTable | None]:
        """Where engines are timed, and the table of `prune.latency.lut`, checked; what cannot be met is refused.

        `model` needs the right layers alone, so this can be asked before anything is trained.
        """
        settings, build_config = config.latency, project.recipe.build
        assert settings is not None
        Target.parse(settings.target)
        if config.steps > 1:
            raise VssError(f"prune.steps is {config.steps} and a latency target is met in one round; set it to 1.")
        setting = Setting(
            main_of(build_config), settings.device, settings.precision, build_config.threads, keep=config.keep,
            options=project.task.export_options(), plan=timed_plan(build_config),
        )  # fmt: skip
        return setting, _given_table(model, project.preprocess, setting, settings.lut) if settings.lut else None

    def __call__(self, groups: list[Group], scores: dict[str, Tensor], rounding: Rounding | None) -> dict[str, Tensor]:
        model, budget = self.table.model(), self.config.budget
        step = _asked(budget) or self.table.step
        options = choices(
            groups, scores, step=step, floor=budget.floor, rounding=rounding, exact=budget.align != 1
        )  # fmt: skip
        widths = self._approach(groups, scores, options, model)
        return _channels(groups, scores, widths)

    def sign(self, plan: Plan) -> Plan:
        """The plan with what was asked and reached in place of the budget; a target that was missed is a label."""
        last = self.record["iterations"][self.record["chosen"]]
        budget = {"kind": "latency", "target": self.record["target"], "ratio": last["ratio"], "ms": last["ms"]}
        limits, found = self.config.budget, self.record["step"]
        budget |= {"floor": limits.floor, "align": _asked(limits) or found}
        if limits.align == "auto":
            budget["align_why"] = f"auto: the latency table found that steps of {found} pay"
        labels = plan.labels
        if not self.record["met"]:
            labels = (*labels, f"latency target {self.record['target']} missed: {last['ratio']:.3f}x was measured")
        return plan.model_copy(update={"budget": budget, "labels": labels})

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _approach(
        self, groups: list[Group], scores: dict[str, Tensor], options: Choices, predict: LatencyModel
    ) -> np.ndarray:
        settings = self.config.latency
        assert settings is not None
        target, whole = Target.parse(settings.target), float(predict(np.array(self.table.full, float))[0])
        floor = float(predict(options.at(np.zeros(len(groups), np.int64)))[0]) / whole
        self.record = self._head(settings, whole, floor)
        rows, tried, found = self.record["iterations"], [], []
        with (
            tempfile.TemporaryDirectory() as name,
            self.setting.held(),
            self.engine(self.model, Path(name) / "uncut") as uncut,
        ):
            goal = target.ratio(whole)
            asked = goal * whole
            while len(rows) < settings.iterations:
                self._check_floor(goal, floor, asked / whole, settings.target)
                widths = search(options, predict, max(asked, floor * whole))
                small = cut(self.model, groups, _channels(groups, scores, widths))
                runs = self._compare(uncut, small, Path(name) / f"cut-{len(rows)}", target)
                seen = Measured.merged(runs)
                goal = target.ratio(seen.uncut_ms)
                rows.append({"asked_ms": asked, "predicted_ms": float(predict(widths)[0]), "goal": goal, **asdict(seen),
                             "widths": [*map(int, widths)], "runs": len(runs), "off": _off(seen, target)})  # fmt: skip
                log.info("asked for %.3f ms: predicted %.3f, measured %s of the uncut (target %.3fx)", asked,
                         rows[-1]["predicted_ms"], " and ".join(f"{run.ratio:.3f}x" for run in runs), goal)  # fmt: skip
                found.append(widths)
                tried.append((asked, seen.ratio))
                if rows[-1]["off"] <= settings.tolerance or any(np.array_equal(widths, each) for each in found[:-1]):
                    break
                asked = correct(asked, seen.ratio, goal, tried)
        errors = [row["off"] for row in rows]
        self.record["chosen"] = int(np.argmin(errors))
        self.record["met"] = min(errors) <= settings.tolerance
        return found[self.record["chosen"]]

    def _compare(self, uncut: Session, small: nn.Module, stem: Path, target: Target) -> list[Measured]:
        """A cut network in one run, and near the target `RUNS` of them, with both networks made anew for each."""
        settings = self.config.latency
        assert settings is not None
        with self.engine(small, stem) as engine:
            runs = [measure(uncut, engine, self.feed(uncut), settings.max_seconds, settings.noise)]
        while len(runs) < RUNS and _off(Measured.merged(runs), target) <= 2 * settings.tolerance:
            again, whole = (stem.with_name(f"{stem.name}-{name}-{len(runs)}") for name in ("again", "uncut"))
            with self.engine(self.model, whole) as fresh, self.engine(small, again) as engine:
                runs.append(measure(fresh, engine, self.feed(fresh), settings.max_seconds, settings.noise))
        return runs

    def _head(self, settings: LatencyConfig, whole: float, floor: float) -> dict[str, Any]:
        table, setting = self.table, self.setting
        return {
            "target": settings.target, "tolerance": settings.tolerance, "backend": setting.backend,
            "device": setting.device, "precision": setting.precision, "threads": setting.on_threads,
            "predicted_uncut_ms": whole, "predicted_floor": floor, "step": table.step, "alignment": table.alignment,
            "table_error": table.error, "table_drift": table.drift, "iterations": [],
            "table_sha256": sha256_json([sample.to_dict() for sample in table.samples]),
        }  # fmt: skip

    def _check_floor(self, goal: float, floor: float, asked: float, target: str) -> None:
        """Refuse what no allowed widths reach: before anything is built, or once measured times say so."""
        rows = self.record["iterations"]
        least = floor * (
            rows[-1]["ratio"] / (rows[-1]["predicted_ms"] / self.record["predicted_uncut_ms"]) if rows else 1
        )
        if asked < floor and (not rows or least > goal * (1 + self.record["tolerance"])):
            raise VssError(
                f"the latency target {target} is below the floor: with {self.config.budget.floor:.0%} of every group "
                f"left the network still takes {least:.3f}x of its time; ask for at least {least:.3f}x, or lower "
                "prune.budget.floor."
            )

    def engine(self, model: nn.Module, stem: Path) -> Session:
        if self.setting.backend == "torch":
            return self.setting.module(model, self.project.preprocess)
        onnx = stem.with_suffix(".onnx")
        export(model, onnx, parity_batches=(1,), **export_options(self.project, model))
        return self.setting.engine(onnx, stem)

    @staticmethod
    def feed(session: Session) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        feed = {}
        for name, binding in session.inputs.items():
            pixels = rng.integers(0, 256, [1, *(side or 1 for side in binding.shape[1:])])
            feed[name] = pixels.astype(binding.dtype)
        return feed


def measure(uncut: Session, cut: Session, feed: Mapping[str, np.ndarray], seconds: float, allowed: float) -> Measured:
    """Both engines interleaved on the same input, for longer until the ratio is known to `allowed` (`Measured.noise`).

    Raises `NotMeasured` when it is still too noisy after `seconds` in one run.
    """
    sessions, feeds = {"uncut": uncut, "cut": cut}, {"uncut": feed, "cut": feed}
    for least in sorted({min(each, seconds) for each in (2.0, 8.0, 24.0, seconds)}):
        found = Measured.of(bench(sessions, feeds, window_seconds=0.1, min_seconds=least, max_seconds=seconds))
        if found.noise <= allowed:
            break
    return check_noise(found, allowed)


def _asked(budget: Budget) -> int | None:
    """The step that the recipe asks for; None where the table's counts."""
    return None if budget.align in (1, "auto") else multiple_of(budget)


def _off(run: Measured, target: Target) -> float:
    """How far a measurement is from a target, relative to it."""
    return abs(run.ratio / target.ratio(run.uncut_ms) - 1)


def _channels(groups: list[Group], scores: dict[str, Tensor], widths: np.ndarray) -> dict[str, Tensor]:
    return {g.id: top_channels(scores[g.id], int(count), g.unit) for g, count in zip(groups, widths, strict=True)}


def _given_table(model: nn.Module, preprocess: Preprocess, setting: Setting, path: str) -> LatencyTable:
    table = LatencyTable.load(path)
    table.check(groups_and_key(model, preprocess.size, setting)[1], path=path, command=setting.command("TABLE"))
    if not table.done:
        raise VssError(f"the latency table {path} is not finished; go on with: {setting.command(path)}")
    return table


def _own_table(
    model: nn.Module, preprocess: Preprocess, setting: Setting, config: PruneConfig, out: Path
) -> LatencyTable:
    """The table of this folder, gone on with; one that is damaged or holds for something else is measured anew."""
    settings, path = config.latency, out / "latency_table.json"
    assert settings is not None
    if path.exists():
        try:
            LatencyTable.load(path).check(groups_and_key(model, preprocess.size, setting)[1], path=path, command="")
        except VssError:
            log.warning("%s is damaged or holds for another network or setting; it is measured anew", path)
            path.unlink()
    effort = QUICK if settings.quick else Effort()
    with tempfile.TemporaryDirectory() as folder:
        subject = open_subject(model, Path(folder), preprocess, setting)
        return build(subject, path, effort=effort, step=_asked(config.budget))
