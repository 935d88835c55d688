"""The model of a unit recovers laws that it can express, and its blocks show where nothing is saved."""

from __future__ import annotations

import numpy as np
import pytest

from vss.prune.latency import FILL, OTHER, START, Affine, LatencyModel

RNG = np.random.default_rng(0)
FULL = np.array([64.0, 128.0])


def affine(rows: list[list[float]]) -> Affine:
    return Affine(np.array(rows) @ FULL, np.array(rows), FULL)


def fitted(law: object, widths: np.ndarray) -> LatencyModel:
    """One layer from group 0 to group 1."""
    times = np.array([[law(a, b)] for a, b in widths])  # type: ignore[operator]
    return LatencyModel.fit(["l"], affine([[1, 0]]), affine([[0, 1]]), widths, times, times[:, 0] + 0.3)


def every(step: int) -> np.ndarray:
    return np.array([[a, b] for a in range(step, 65, step) for b in range(step, 129, step)], float)


LAWS = {
    "product": (lambda a, b: 0.1 + 2e-3 * a + 1e-4 * a * b, FILL),
    "filled": (lambda a, b: 0.1 + 1e-4 * np.ceil(a / 16) * 16 * np.ceil(b / 16) * 16, FILL),
    "first": (lambda a, b: 0.1 + 1e-4 * (a if a < 16 else np.ceil(a / 16) * 16) * np.ceil(b / 16) * 16, START),
    "another kernel": (lambda a, b: 0.1 + 1e-4 * a * b * (1.5 if a % 16 or b % 16 else 1), OTHER),
}


@pytest.mark.parametrize("law", LAWS)
def test_known_laws_are_found(law: str) -> None:
    rule, form = LAWS[law]
    widths = RNG.permutation(every(4))
    model = fitted(rule, widths[:120])
    unseen = widths[120:]
    wanted = np.array([rule(a, b) for a, b in unseen])
    assert np.abs(model(unseen) / (wanted + 0.3) - 1).max() < 1e-3
    assert model.forms[0] == form
    assert model.blocks[0] == (1 if law == "product" else 16)
    assert model.constant == pytest.approx(0.3, abs=1e-6)


def test_nothing_is_saved_inside_a_block() -> None:
    model = fitted(LAWS["filled"][0], every(4))
    times = model(np.array([[64, 128], [64, 116], [64, 113], [64, 112]], float))
    assert times[0] == pytest.approx(times[1]) == pytest.approx(times[2])
    assert times[3] < 0.92 * times[0]


def test_a_unit_that_comes_and_goes_counts_by_its_mean() -> None:
    """A layout change that some widths need: absent samples must not drive its predicted time to zero."""
    widths = RNG.permutation(every(4))
    times = np.where(RNG.random(len(widths)) < 0.4, 0.1 + 1e-3 * widths[:, 0], 0.0)[:, None]
    sides = affine([[1, 0]]), affine([[0, 1]])
    model = LatencyModel.fit(["ReorderInput:cat"], *sides, widths, times, times[:, 0])
    assert model.by_unit(widths).mean() == pytest.approx(times.mean(), rel=0.02)
