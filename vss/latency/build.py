"""Measure a latency table, coarse to fine.

1. The uncut network, again from time to time, so that the machine's drift is known.
2. Alignment: the same random widths rounded to 1, 2, 4, 8, 16 and 32; the smallest step whose time per MAC is within
   3 % of the best is taken.
3. Random independent widths on a coarse grid of that step, then where the left-out error of a unit is largest and
   nothing near was measured, until the error is small or the limit is reached.
4. Random widths of which the model has seen nothing: the error that the table states.
5. Widths of single groups around the heaviest layers, one channel apart: the cliffs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vss.errors import VssError
from vss.latency.fit import LatencyModel
from vss.latency.knapsack import widths_of
from vss.latency.subject import Subject, channels
from vss.latency.table import FITTED, LatencyTable, Role, Sample

log = logging.getLogger(__name__)
STEPS = (1, 2, 4, 8, 16, 32)
TOLERATED = 0.03
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
        error: median left-out error at which no more are taken.
        tests: samples that the model never sees.
        cliffs: groups whose single widths are scanned.
        floor: least fraction of a group.
    """

    vectors: int = 3
    coarse: int = 24
    batch: int = 12
    limit: int = 96
    error: float = 0.02
    tests: int = 30
    cliffs: int = 2
    floor: float = 0.1

    @property
    def most(self) -> int:
        """Readings of a build that needs its limit."""
        repeats = self.limit // self.batch + 2
        return repeats + self.vectors * len(STEPS) + self.limit + self.tests + self.cliffs * len(OFFSETS)


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
    """Measure what `path` does not hold yet, and return the whole table.

    Args:
        subject: the network.
        path: the table; written after every reading.
        effort: how much to measure.
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
        self._done = {sample.name: sample for sample in table.samples}

    def everything(self, step: int | None) -> None:
        """All stages; each sample that is there already is taken as it is."""
        self.read("full-0", "full", self.table.full)
        if not self.table.step:
            self.align(step)
        self.fit()
        for index in range(self.effort.tests):
            self.read(f"test-{index}", "test", self._random(10_000 + index))
        self.cliffs()
        self.read("full-end", "full", self.table.full)
        self.finish()

    def read(self, name: str, role: Role, widths: Sequence[int]) -> Sample:
        """Measure one width vector, unless it was."""
        if name not in self._done:
            start = time.monotonic()
            reading = self.subject.read([int(width) for width in widths])
            sample = Sample(name, role, tuple(int(width) for width in widths), reading)
            self._done[name] = sample
            self.table.samples.append(sample)
            self.table.save(self.path)
            self._taken, self._spent = self._taken + 1, self._spent + time.monotonic() - start
        left = max(0, self.effort.most - len(self._done))
        self._progress(len(self._done), self.effort.most, left * self._spent / max(1, self._taken))
        return self._done[name]

    # -- alignment ----------------------------------------------------------------------------------------------------

    def align(self, given: int | None) -> None:
        """Time per MAC at every step, over the best, as a mean of vectors."""
        moving = self._know_channels()
        rng = np.random.default_rng([self.seed, 1])
        costs = np.zeros((self.effort.vectors, len(STEPS)))
        for row in range(self.effort.vectors):
            share = rng.uniform(0.3, 0.9, len(self.table.full))
            for column, step in enumerate(STEPS):
                widths = [_nearest(g, s, step) for g, s in zip(self.subject.groups, share, strict=True)]
                sample = self.read(f"align-{row}-{step}", "align", widths)
                shapes = self.subject.shapes(widths)
                macs = sum(each.macs for unit, each in shapes.items() if unit in moving)
                costs[row, column] = sum(ms for unit, ms in sample.reading.units.items() if unit in moving) / macs
        mean = (costs / costs.min(axis=1, keepdims=True)).mean(axis=0) if len(costs) else np.ones(len(STEPS))
        self.table.alignment = {str(step): float(value / mean.min()) for step, value in zip(STEPS, mean, strict=True)}
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
        while count < self.effort.limit and float(np.median(np.abs(self.table.left_out()))) > self.effort.error:
            for widths in self._needed(count):
                self.read(f"fine-{count}", "fit", widths)
                count += 1
            self.read(f"full-{count}", "full", self.table.full)
            self._know_channels()

    def _widths(self) -> list[np.ndarray]:
        return [widths_of(group, self.table.step, self.table.floor) for group in self.subject.groups]

    def _random(self, index: int) -> list[int]:
        rng = np.random.default_rng([self.seed, 3, index])
        return [int(rng.choice(each)) for each in self._widths()]

    def _needed(self, count: int) -> list[list[int]]:
        """The next batch: candidates far, in the channels of badly predicted units, from what was measured."""
        units, measured, times, totals = self.table.arrays(*FITTED)
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
        return chosen

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
        totals = [sample.reading.total for sample in self.table.of_role("full")]
        self.table.drift = max(totals) / min(totals) - 1
        self.table.error = self.table.test() if self.effort.tests else {}
        self.table.done = True
        self.table.save(self.path)
        if self.table.drift > 0.1:
            log.warning(
                "the machine is noisy: the uncut network took %.2f to %.2f ms during the build (%.0f %%); build the "
                "table again on a quiet machine.", min(totals), max(totals), 100 * self.table.drift,
            )  # fmt: skip


def heaviest_groups(table: LatencyTable) -> list[int]:
    """Groups by the time of the units that they change, most first."""
    reading = table.of_role("full")[0].reading
    weight = np.zeros(len(table.groups))
    for unit, (_, _, slopes) in table.channels.items():
        for index in slopes:
            weight[int(index)] += reading.units.get(unit, 0.0)
    return [int(index) for index in np.argsort(-weight)]


def _nearest(group: Any, share: float, step: int) -> int:
    """The multiple of `step` (and of the group's unit) nearest to a share of the group, at least one, at most all."""
    step = int(np.lcm(step, group.unit))
    return min(group.channels, max(step, round(group.channels * share / step) * step))


def _at(widths: np.ndarray, share: float) -> int:
    """The allowed width nearest to a share of the full one."""
    return int(widths[np.abs(widths - share * widths[-1]).argmin()])
