"""Which widths keep the most score within a latency: a knapsack with one choice of width per group.

Greedy: while the predicted latency is above the target, take the step down (of any group, up to `LOOK` widths at once,
so that a cliff several widths away is seen) that loses the least score per millisecond saved. Repair: give back what
still fits, best score per millisecond first, and exchange pairs of steps (one down, one up) that raise the kept score.
The same from the least widths up; the better of the two counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vss.core.errors import VssError
from vss.prune.budget import Budget, Rounding, allowed_counts
from vss.prune.groups import Group

LOOK = 6
FEWEST_CHOICES = 4
SWAPS = 60
CHUNK = 2000
Predict = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Choices:
    """Widths that each group may have, ascending, and the score that stays with each.

    Attributes:
        widths: per group (k,) int64.
        kept: per group (k,) float64, sum of the scores of the best `widths` channels.
    """

    widths: list[np.ndarray]
    kept: list[np.ndarray]

    def at(self, state: np.ndarray) -> np.ndarray:
        """(..., groups) positions -> widths."""
        return np.stack([w[state[..., i]] for i, w in enumerate(self.widths)], axis=-1)

    def score(self, state: np.ndarray) -> np.ndarray:
        """Kept score of states, (..., groups) positions -> (...)."""
        return np.sum([kept[state[..., i]] for i, kept in enumerate(self.kept)], axis=0)


def group_step(group: Group, step: int) -> int:
    """`step`, or for a group with fewer than FEWEST_CHOICES multiples of it, the largest halving with so many."""
    while step > 1 and group.channels < FEWEST_CHOICES * step:
        step //= 2
    return step


def widths_of(
    group: Group, step: int, floor: float, rounding: Rounding | None = None, *, exact: bool = False
) -> np.ndarray:
    """Ascending widths that a group may have: multiples of its step, not below `floor` of it, and the full width.

    `exact` takes the step as it is, however few its multiples.
    """
    budget = Budget.make(kind="macs", keep=1.0, floor=floor, align=step if exact else group_step(group, step))
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
    """(groups,) widths of the most kept score whose predicted latency is at most `target` milliseconds.

    Args:
        options: of `choices`.
        predict: (n, groups) widths -> (n,) milliseconds.
        target: milliseconds.

    Raises:
        VssError: the least widths are slower than the target (says how fast they are).
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
            return part[int(np.argmax(fits))]
    return None
