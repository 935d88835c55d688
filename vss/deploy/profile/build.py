"""Measure a latency table, coarse to fine.

1. The uncut network, again after every few readings, so that the machine's drift is known.
2. Alignment: the same random widths rounded to 1, 2, 4, 8, 16 and 32, each read twice; the smallest step whose time per
   MAC is within 3 % of the best is taken.
3. Random independent widths on a coarse grid of that step, then in batches where the error of a unit is largest and
   nothing near was measured, until a batch is as it was predicted or the limit is reached.
4. Random widths of which the model has seen nothing: the error that the table states.
5. Widths of single groups around the heaviest layers, one channel apart: the cliffs.

Where the readings of the uncut network differ, after the alignment scan or at the end, the machine was busy: everything
is read again and the minimum over the passes counts, up to `Effort.passes` times.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vss.core.errors import VssError
from vss.deploy.profile.subject import Subject, channels
from vss.deploy.profile.table import FITTED, LatencyTable, Role, Sample
from vss.deploy.profile.units import Reading
from vss.prune.latency import LatencyModel, widths_of
from vss.prune.plan import Group

log = logging.getLogger(__name__)
STEPS = (1, 2, 4, 8, 16, 32)
TOLERATED = 0.03
STEADY = 0.04  # readings of the uncut network that differ by more are those of a busy machine
NOISY = 0.1  # and those that still do, after all passes, end vss lut build and vss explain with exit code 3
REPEAT = 12  # every so many readings, one is of the uncut network
COARSE = (0.3, 0.5, 0.75, 1.0)
OFFSETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32)
CANDIDATES = 64
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        vectors: random width vectors of the alignment scan, each at six steps.
        coarse: samples of the coarse grid.
        batch: samples between two looks at the error.
        limit: most samples that the model is fitted on.
        error: median error of a batch, predicted before it is fitted, at which no more are taken.
        tests: samples that the model never sees.
        cliffs: groups whose single widths are scanned.
        floor: least fraction of a group.
        passes: how often a busy machine is asked for the same reading.
    """

    vectors: int = 3
    coarse: int = 24
    batch: int = 12
    limit: int = 96
    error: float = 0.02
    tests: int = 30
    cliffs: int = 2
    floor: float = 0.1
    passes: int = 3

    @property
    def most(self) -> int:
        """Readings of a build that needs its limit and is on a quiet machine."""
        others = self.vectors * len(STEPS) + self.limit + self.tests + self.cliffs * len(OFFSETS)
        scan = self.vectors * len(STEPS) + 3  # the part of it that is read twice, with the uncut network
        return others + others // (REPEAT - 1) + 3 + scan


QUICK = Effort(vectors=1, coarse=10, batch=10, limit=20, error=0.05, tests=5, cliffs=1)


def build(
    subject: Subject,
    path: Path,
    *,
    effort: Effort | None = None,
    step: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure what the table `path` does not hold yet, and return the whole table; it is written after every reading.

    Args:
        step: alignment to use in place of the discovered one.
        seed: of the random widths.
        progress: called with (readings done, most that may be needed, seconds left at most).
    """
    effort = effort or Effort()
    if not subject.groups:
        raise VssError("no prunable channels were found; there is nothing to make a latency table of.")
    work = _Build(subject, _opened(subject, path, effort), path, effort, seed, progress or (lambda *_: None))
    if not work.table.done:
        work.everything(step)
    return work.table


def _opened(subject: Subject, path: Path, effort: Effort) -> LatencyTable:
    groups = [[group.id, group.channels, group.unit] for group in subject.groups]
    if not path.exists():
        return LatencyTable(dict(subject.key), groups, effort.floor)
    table = LatencyTable.load(path)
    table.check(subject.key, path=path, command=f"remove {path}, or give another --save, and run vss lut build again")
    return table


class _Build:
    def __init__(
        self, subject: Subject, table: LatencyTable, path: Path, effort: Effort, seed: int, progress: Progress
    ) -> None:
        self.subject, self.table, self.path, self.effort, self.seed = subject, table, path, effort, seed
        self._progress, self._spent, self._taken = progress, 0.0, 0
        self._place = {sample.name: index for index, sample in enumerate(table.samples)}
        self._readings = sum(sample.reads for sample in table.samples)
        self._most = max(effort.most, self._readings)

    def everything(self, step: int | None) -> None:
        """All stages; each sample that is there already is taken as it is."""
        self.read("full-0", "full", self.table.full)
        if not self.table.step:
            self.align(step)
        if not self.table.of_role("test"):  # else how much is needed was decided before
            self.fit()
        for index in range(self.effort.tests):
            self.read(f"test-{index}", "test", self._random(10_000 + index))
        self.cliffs()
        self.read("full-end", "full", self.table.full)
        self._most = self._readings
        self.settle()
        self.finish()

    def read(self, name: str, role: Role, widths: Sequence[int]) -> Sample:
        """Measure one width vector, unless it was."""
        if name not in self._place:
            reading = self._timed(widths)
            self._place[name] = len(self.table.samples)
            self.table.samples.append(Sample(name, role, tuple(int(width) for width in widths), reading))
            self.table.save(self.path)
        self._report_progress()
        if len(self.table.samples) % REPEAT == 0:
            self.read(f"full-{len(self.table.samples)}", "full", self.table.full)
        return self.table.samples[self._place[name]]

    def settle(self, least: int = 1) -> None:
        """Read everything again while the readings of the uncut network differ: what disturbs only ever adds time."""
        for count in range(2, self.effort.passes + 1):
            low, high = self.table.uncut_range()
            todo = [index for index, sample in enumerate(self.table.samples) if sample.reads < count]
            if count > least:
                if high / low - 1 <= STEADY:
                    return
                self._most += len(todo)
                log.info(
                    "the machine is busy: the uncut network took %.2f to %.2f ms; everything is read again and the "
                    "minimum counts (pass %d of at most %d).", low, high, count, self.effort.passes,
                )  # fmt: skip
            for index in todo:
                sample = self.table.samples[index]
                self.table.samples[index] = sample.again(self._timed(sample.widths))
                self.table.save(self.path)
                self._report_progress()

    def _timed(self, widths: Sequence[int]) -> Reading:
        start = time.monotonic()
        reading = self.subject.read([int(width) for width in widths]).rounded()  # as a build that goes on reads it
        self._taken, self._spent = self._taken + 1, self._spent + time.monotonic() - start
        self._readings += 1
        return reading

    def _report_progress(self) -> None:
        left = max(0, self._most - self._readings)
        self._progress(self._readings, self._most, left * self._spent / max(1, self._taken))

    # -- alignment ----------------------------------------------------------------------------------------------------

    def align(self, given: int | None) -> None:
        """Time per MAC at every step, over the best, as a mean of vectors."""
        moving = self._know_channels()
        rng = np.random.default_rng([self.seed, 1])
        costs = np.zeros((self.effort.vectors, len(STEPS)))
        for row in range(self.effort.vectors):
            share = rng.uniform(0.3, 0.9, len(self.table.full))
            for step in STEPS:
                widths = [_nearest(g, s, step) for g, s in zip(self.subject.groups, share, strict=True)]
                self.read(f"align-{row}-{step}", "align", widths)
        self.read("full-align", "full", self.table.full)
        self.settle(least=2)
        for place in np.ndindex(costs.shape):
            sample = self.table.samples[self._place[f"align-{place[0]}-{STEPS[place[1]]}"]]
            shapes = self.subject.shapes(sample.widths)
            macs = sum(each.macs for unit, each in shapes.items() if unit in moving)
            costs[place] = sum(ms for unit, ms in sample.reading.units.items() if unit in moving) / macs
        cost = (costs / costs.min(axis=1, keepdims=True)).mean(axis=0) if len(costs) else np.ones(len(STEPS))
        self.table.alignment = {str(step): float(value / cost.min()) for step, value in zip(STEPS, cost, strict=True)}
        good = [step for step in STEPS if self.table.alignment[str(step)] <= 1 + TOLERATED]
        self.table.step = given or good[0]
        log.info("widths are taken in steps of %d; time per MAC over the best: %s", self.table.step, ", ".join(
            f"{step}: {value:.2f}" for step, value in self.table.alignment.items()))  # fmt: skip
        self.table.save(self.path)

    def _know_channels(self) -> set[str]:
        """Find the channels of all units seen; returns those that change with widths."""
        units = sorted({unit for sample in self.table.samples for unit in sample.reading.units})
        if set(units) - set(self.table.channels):
            self.table.set_channels(units, *channels(self.subject, units))
        moving = {unit for unit, (_, _, slopes) in self.table.channels.items() if slopes}
        return moving | {unit for unit in units if unit.startswith("Reorder")}

    # -- fit ----------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Samples of the model: coarse grid, then where it is needed."""
        for index in range(self.effort.coarse):
            rng = np.random.default_rng([self.seed, 2, index])
            share = rng.choice(COARSE, len(self.table.full))
            self.read(f"coarse-{index}", "fit", [_at(each, s) for each, s in zip(self._widths(), share, strict=True)])
        self._know_channels()
        count = self.effort.coarse
        while count < self.effort.limit:
            model, batch = self._needed(count)
            seen = [self.read(f"fine-{count + index}", "fit", widths) for index, widths in enumerate(batch)]
            self._know_channels()
            count += len(seen)
            if _surprise(model, seen) <= self.effort.error:
                return

    def _widths(self) -> list[np.ndarray]:
        return [widths_of(group, self.table.step, self.table.floor) for group in self.subject.groups]

    def _random(self, index: int) -> list[int]:
        rng = np.random.default_rng([self.seed, 3, index])
        return [int(rng.choice(each)) for each in self._widths()]

    def _needed(self, count: int) -> tuple[LatencyModel, list[list[int]]]:
        """The model so far, and the next batch: far from all measured ones in the channels of badly predicted units."""
        end = self._place.get(f"fine-{count}", len(self.table.samples))
        fitted = [sample for sample in self.table.samples[:end] if sample.role in FITTED]
        units, measured, times, totals = self.table.arrays(fitted)
        model = LatencyModel.fit(units, *self.table.affine(), measured, times, totals)
        wrong = np.abs(model.by_unit(measured) - times).mean(axis=0)

        def place(widths: np.ndarray) -> np.ndarray:
            return np.stack([model.cin(widths) / model.cin.full, model.cout(widths) / model.cout.full], axis=-1)

        pool = np.array([self._random(count * CANDIDATES + index) for index in range(CANDIDATES)], float)
        chosen: list[list[int]] = []
        known = place(measured)
        for _ in range(min(self.effort.batch, self.effort.limit - count)):
            far = np.abs(place(pool)[:, None] - known[None]).sum(axis=-1).min(axis=1)
            best = int(np.argmax(far @ wrong))
            chosen.append([int(width) for width in pool[best]])
            known = np.concatenate([known, place(pool[best : best + 1])])
            pool = np.delete(pool, best, axis=0)
        return model, chosen

    # -- the rest -----------------------------------------------------------------------------------------------------

    def cliffs(self) -> None:
        """Single widths of the groups that the heaviest units read or write."""
        for index in heaviest_groups(self.table)[: self.effort.cliffs]:
            group = self.subject.groups[index]
            for offset in OFFSETS:
                width = (group.channels - offset) // group.unit * group.unit
                if width >= max(1, group.channels // 4):
                    widths = [width if i == index else count for i, count in enumerate(self.table.full)]
                    self.read(f"cliff-{index}-{width}", "cliff", widths)

    def finish(self) -> None:
        """The error on unseen widths, and how far the machine has drifted."""
        self._know_channels()
        low, high = self.table.uncut_range()
        self.table.drift = high / low - 1
        self.table.error = self.table.test() if self.effort.tests else {}
        self.table.done = True
        self.table.save(self.path)
        if self.table.drift > NOISY:
            log.warning(
                "the machine is noisy: the uncut network took %.2f to %.2f ms during the build (%.0f %%); build the "
                "table again on a quiet machine.", low, high, 100 * self.table.drift,
            )  # fmt: skip


def _surprise(model: LatencyModel, seen: Sequence[Sample]) -> float:
    """Median relative error of the sum of the units in samples that the model has not seen."""
    predicted = model.by_unit(np.array([sample.widths for sample in seen], float)).sum(axis=1)
    return float(np.median(np.abs(predicted / [sum(sample.reading.units.values()) for sample in seen] - 1)))


def heaviest_groups(table: LatencyTable) -> list[int]:
    """Groups by the time of the units that they change, most first."""
    reading = table.of_role("full")[0].reading
    weight = np.zeros(len(table.groups))
    for unit, (_, _, slopes) in table.channels.items():
        for index in slopes:
            weight[int(index)] += reading.units.get(unit, 0.0)
    return [int(index) for index in np.argsort(-weight)]


def _nearest(group: Group, share: float, step: int) -> int:
    """The multiple of `step` (and of the group's unit) nearest to a share of the group, at least one, at most all."""
    step = int(np.lcm(step, group.unit))
    return int(min(group.channels, max(step, round(group.channels * share / step) * step)))


def _at(widths: np.ndarray, share: float) -> int:
    """The allowed width nearest to a share of the full one."""
    return int(widths[np.abs(widths - share * widths[-1]).argmin()])
