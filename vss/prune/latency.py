"""Latency of any widths from measured ones: a small non-negative model per unit.

With a and b the channels that a unit reads and writes, over those of the uncut network, its time is

    w0 + w1 a + w2 b + w3 ab + m (w4 + w5 ab)        every w >= 0 (scipy's `nnls`, errors weighted by 1 / time)

in one of three forms per block of 1, 4, 8, 16 or 32 channels, by what kernels do with a part of a block:

- fill: a and b are rounded up to whole blocks, m = 0;
- start: as fill, except that fewer channels than a block are read as they are (first layers);
- other: a and b as they are, m = 1 where one of them is no whole number of blocks: another kernel takes over.

The form with the least error on left-out samples is taken. The whole is the sum of the units plus a constant, the low
quantile of what a run takes beyond its units: noise only ever adds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from vss.core.config import Budget
from vss.core.errors import VssError
from vss.prune.plan import Group

if TYPE_CHECKING:
    from torch import Tensor

    from vss.prune.budget import Rounding

BLOCKS = (1, 4, 8, 16, 32)
FILL, START, OTHER = 0, 1, 2
FORMS = [(1, FILL), *((block, form) for block in BLOCKS[1:] for form in (FILL, START, OTHER))]
TERMS = 6
Array = np.ndarray | float
QUANTILE = 0.1
FOLDS = 5
BETTER = 0.98  # another form must lower the error at least this far
LIGHT = 0.002  # units below this share of the time have the plainest form


@dataclass(frozen=True)
class Affine:
    """Channels of units as affine functions of the groups' widths.

    `full` (units,) channels of the uncut network, `slope` (units, groups) channels that a unit loses with each channel
    of a group, `widths` (groups,) of the uncut network.
    """

    full: np.ndarray
    slope: np.ndarray
    widths: np.ndarray

    def __call__(self, widths: np.ndarray) -> np.ndarray:
        """(n, groups) -> (n, units)."""
        return np.asarray(np.rint(self.full - (self.widths - widths) @ self.slope.T))


@dataclass(frozen=True)
class LatencyModel:
    """Predicted milliseconds of a network at any widths; see the module.

    `blocks` and `forms` (FILL, START or OTHER) are (units,), `weights` (units, TERMS); `constant` are the milliseconds
    of a run beyond its units.
    """

    units: tuple[str, ...]
    cin: Affine
    cout: Affine
    blocks: np.ndarray
    forms: np.ndarray
    weights: np.ndarray
    constant: float

    @classmethod
    def fit(
        cls, units: Sequence[str], cin: Affine, cout: Affine, widths: np.ndarray, times: np.ndarray, totals: np.ndarray
    ) -> LatencyModel:
        """Fit all units.

        Args:
            units: names, in the order of all arrays.
            cin, cout: their channels.
            widths: (samples, groups) measured widths.
            times: (samples, units) milliseconds; 0 where a unit was not there.
            totals: (samples,) milliseconds of the whole.
        """
        blocks, kinds = np.ones(len(units), np.int64), np.full(len(units), FILL)
        weights = np.zeros((len(units), TERMS))
        read, made = cin(widths), cout(widths)
        light = times.mean(axis=0) < LIGHT * times.sum(axis=1).mean()
        for index in range(len(units)):
            sides = read[:, index], made[:, index], float(cin.full[index]), float(cout.full[index])
            forms = FORMS[:1] if light[index] else FORMS
            blocks[index], kinds[index], weights[index] = _fit_unit(sides, times[:, index], forms)
        beyond = float(np.quantile(totals - times.sum(axis=1), QUANTILE))
        return cls(tuple(units), cin, cout, blocks, kinds, weights, max(0.0, beyond))

    def by_unit(self, widths: np.ndarray) -> np.ndarray:
        """(n, groups) -> (n, units) milliseconds."""
        terms = _terms(self.cin(widths), self.cout(widths), self.cin.full, self.cout.full, self.blocks, self.forms)
        return np.asarray((terms * self.weights).sum(axis=-1))

    def __call__(self, widths: np.ndarray) -> np.ndarray:
        """(n, groups) -> (n,) milliseconds of the whole network."""
        return np.asarray(self.by_unit(np.atleast_2d(widths)).sum(axis=1) + self.constant)


def _terms(ci: Array, co: Array, full_in: Array, full_out: Array, block: Array, form: Array) -> np.ndarray:
    """(..., TERMS) features; the first four are 1 each at full width."""
    a = _rounded(ci, block, form, True) / _rounded(full_in, block, form, True)
    b = _rounded(co, block, form, False) / _rounded(full_out, block, form, False)
    parts = (np.asarray(ci) % block != 0) | (np.asarray(co) % block != 0)
    odd = (np.equal(form, OTHER) & parts).astype(float)
    return np.stack([np.ones_like(a), a, b, a * b, odd, odd * a * b], axis=-1)


def _rounded(count: Array, block: Array, form: Array, read: bool) -> np.ndarray:
    """Channels as a form counts them."""
    whole = np.ceil(np.asarray(count) / block) * block
    plain = np.equal(form, OTHER) | (np.equal(form, START) & read & np.less(count, block))
    return np.asarray(np.where(plain, count, whole))


def _fit_unit(
    sides: tuple[np.ndarray, np.ndarray, float, float], times: np.ndarray, forms: Sequence[tuple[int, int]]
) -> tuple[int, int, np.ndarray]:
    """Block, form and weights of one unit."""
    if not times.any():
        return *forms[0], np.zeros(TERMS)
    best, chosen = np.inf, forms[0]
    for form in forms if len(forms) > 1 else ():
        error = _left_out_error(_terms(*sides, *form), times)
        if error < best * BETTER:
            best, chosen = error, form
    return *chosen, _solve(_terms(*sides, *chosen), times)


def _solve(terms: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Relative errors count; of a unit that is not there at all widths (a layout change) absolute ones, or what is
    absent would outweigh what is there."""
    from scipy.optimize import nnls

    weight = 1 / times if times.all() else np.ones_like(times)
    return np.asarray(nnls(terms * weight[:, None], times * weight)[0])


def _left_out_error(terms: np.ndarray, times: np.ndarray) -> float:
    """Mean absolute error over folds, in milliseconds."""
    if len(times) < 2 * FOLDS:
        return float(np.abs(terms @ _solve(terms, times) - times).mean())
    folds = np.arange(len(times)) % FOLDS
    errors = [
        np.abs(terms[folds == fold] @ _solve(terms[folds != fold], times[folds != fold]) - times[folds == fold])
        for fold in range(FOLDS)
    ]
    return float(np.concatenate(errors).mean())


# Which widths keep the most score within a latency: a knapsack with one choice of width per group.


LOOK = 6
FEWEST_CHOICES = 4
SWAPS = 60
CHUNK = 2000
Predict = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Choices:
    """Widths (k,) int64 that each group may have, ascending, and the score (k,) float64 that stays with each."""

    widths: list[np.ndarray]
    kept: list[np.ndarray]

    def at(self, state: np.ndarray) -> np.ndarray:
        """(..., groups) positions -> widths."""
        return np.stack([w[state[..., i]] for i, w in enumerate(self.widths)], axis=-1)

    def score(self, state: np.ndarray) -> np.ndarray:
        """Kept score of states, (..., groups) positions -> (...)."""
        return np.asarray(np.sum([kept[state[..., i]] for i, kept in enumerate(self.kept)], axis=0))


def group_step(group: Group, step: int) -> int:
    """`step`, or for a group with fewer than FEWEST_CHOICES multiples of it, the largest halving with so many, never
    down to odd widths."""
    while step > 2 and group.channels < FEWEST_CHOICES * step:
        step //= 2
    return step


def widths_of(
    group: Group, step: int, floor: float, rounding: Rounding | None = None, *, exact: bool = False
) -> np.ndarray:
    """Ascending widths that a group may have: multiples of its step, not below `floor` of it, and the full width.

    `exact` takes the step as it is, however few its multiples.
    """
    from vss.prune.budget import allowed_counts

    budget = Budget(keep=1.0, floor=floor, align=step if exact else group_step(group, step))
    return np.unique(allowed_counts(group, budget, rounding).numpy())


def choices(
    groups: Sequence[Group],
    scores: dict[str, Tensor],
    *,
    step: int,
    floor: float,
    rounding: Rounding | None = None,
    exact: bool = False,
) -> Choices:
    """Widths and kept scores of all groups, see `widths_of`; scores are (C,) per group id, comparable across groups."""
    widths = [widths_of(group, step, floor, rounding, exact=exact) for group in groups]
    kept = []
    for group, each in zip(groups, widths, strict=True):
        blocks = scores[group.id].double().reshape(-1, group.unit).mean(dim=1).sort(descending=True).values
        sums = np.concatenate([[0.0], np.cumsum(blocks.numpy() * group.unit)])
        kept.append(sums[each // group.unit])
    return Choices(widths, kept)


def search(options: Choices, predict: Predict, target: float) -> np.ndarray:
    """(groups,) widths of the most kept score that `predict` puts at `target` milliseconds at most.

    Raises:
        VssError: the minimum widths are slower than the target (says how fast they are).
    """
    least = float(predict(options.at(np.zeros((1, len(options.widths)), np.int64)))[0])
    if least > target:
        raise VssError(
            f"the target of {target:.3f} ms is below the floor: at the least widths that are allowed the network "
            f"takes {least:.3f} ms; ask for more or lower the floor of a group."
        )
    state = np.array([len(each) - 1 for each in options.widths])
    now = float(predict(options.at(state[None]))[0])
    while now > target:
        state, now = _step_down(options, predict, state, now, target)
    starts = state, np.zeros_like(state)
    ends = [_repair(options, predict, start, target) for start in starts]
    return options.at(max(ends, key=options.score))


def _moves(options: Choices, state: np.ndarray, sign: int, look: int = LOOK) -> np.ndarray:
    """(n, groups) states that are up to `look` widths of one group away."""
    rows = []
    for index, widths in enumerate(options.widths):
        for far in range(1, look + 1):
            place = state[index] + sign * far
            if 0 <= place < len(widths):
                row = state.copy()
                row[index] = place
                rows.append(row)
    return np.array(rows, np.int64).reshape(-1, len(state))


def _step_down(
    options: Choices, predict: Predict, state: np.ndarray, now: float, target: float
) -> tuple[np.ndarray, float]:
    """The best move down: least score lost per millisecond saved, time below the target counts for nothing."""
    moves = _moves(options, state, -1)
    times = predict(options.at(moves))
    lost = options.score(state) - options.score(moves)
    saved = now - np.maximum(times, target)
    useful = saved > 1e-9
    if not useful.any():  # nothing saves time alone: narrow what costs the least score
        best = int(np.argmin(lost))
        return moves[best], float(times[best])
    rate = np.where(useful, lost / np.maximum(saved, 1e-12), np.inf)
    best = int(np.argmin(rate))
    return moves[best], float(times[best])


def _repair(options: Choices, predict: Predict, state: np.ndarray, target: float) -> np.ndarray:
    """Give back what fits, then exchange, until nothing raises the kept score."""
    for _ in range(SWAPS):
        state = _give_back(options, predict, state, target)
        better = _exchange(options, predict, state, target)
        if better is None:
            break
        state = better
    return state


def _give_back(options: Choices, predict: Predict, state: np.ndarray, target: float) -> np.ndarray:
    while True:
        moves = _moves(options, state, 1)
        if not len(moves):
            return state
        times = predict(options.at(moves))
        now = float(predict(options.at(state[None]))[0])
        gain = options.score(moves) - options.score(state)
        fits = (times <= target) & (gain > 0)
        if not fits.any():
            return state
        rate = np.where(fits, gain / np.maximum(times - now, 1e-9), -np.inf)
        state = moves[int(np.argmax(rate))]


def _exchange(options: Choices, predict: Predict, state: np.ndarray, target: float) -> np.ndarray | None:
    """The best pair of one move up and one down that fits and raises the kept score; None when there is none."""
    ups, downs = _moves(options, state, 1), _moves(options, state, -1)
    rows = (ups[:, None] + downs[None, :] - state).reshape(-1, len(state))
    gains = options.score(rows) - options.score(state)
    order = np.argsort(-gains)[: int((gains > 1e-12).sum())]
    for start in range(0, len(order), CHUNK):  # the first that fits is the best
        part = rows[order[start : start + CHUNK]]
        fits = predict(options.at(part)) <= target
        if fits.any():
            return np.asarray(part[int(np.argmax(fits))])
    return None


# A latency target as a user types it.


@dataclass(frozen=True)
class Target:
    """A time: `value` of the uncut network's (`relative`), or milliseconds.

    >>> Target.parse("0.5x"), Target.parse("12 ms")
    (Target(value=0.5, relative=True), Target(value=12.0, relative=False))
    """

    value: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of "0.5x" or "12ms"; anything else is refused."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(x|ms)\s*", text.lower())
        value = float(match[1]) if match else 0.0
        if match is None or not value > 0 or (match[2] == "x" and value > 1):
            raise VssError(
                f"prune.latency.target (--latency) is {text!r}; expected 0.5x (at most 1x) or a time as 12ms."
            )
        return cls(value, match[2] == "x")

    def ratio(self, uncut_ms: float) -> float:
        """Share of the uncut network's time."""
        return self.value if self.relative else self.value / uncut_ms
