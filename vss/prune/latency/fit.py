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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

BLOCKS = (1, 4, 8, 16, 32)
FILL, START, OTHER = 0, 1, 2
FORMS = [(1, FILL), *((block, form) for block in BLOCKS[1:] for form in (FILL, START, OTHER))]
TERMS = 6
QUANTILE = 0.1
FOLDS = 5
BETTER = 0.98  # another form must lower the error at least this far
LIGHT = 0.002  # units below this share of the time have the plainest form


@dataclass(frozen=True)
class Affine:
    """Channels of units as affine functions of the groups' widths.

    Attributes:
        full: (units,) channels of the uncut network.
        slope: (units, groups) channels that a unit loses with each channel of a group.
        widths: (groups,) widths of the uncut network.
    """

    full: np.ndarray
    slope: np.ndarray
    widths: np.ndarray

    def __call__(self, widths: np.ndarray) -> np.ndarray:
        """(n, groups) -> (n, units)."""
        return np.rint(self.full - (self.widths - widths) @ self.slope.T)


@dataclass(frozen=True)
class LatencyModel:
    """Predicted milliseconds of a network at any widths; see the module.

    Attributes:
        blocks: (units,) block of the unit's form.
        forms: (units,) FILL, START or OTHER.
        weights: (units, TERMS).
        constant: milliseconds of a run beyond its units.
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
        return (terms * self.weights).sum(axis=-1)

    def __call__(self, widths: np.ndarray) -> np.ndarray:
        """(n, groups) -> (n,) milliseconds of the whole network."""
        return self.by_unit(np.atleast_2d(widths)).sum(axis=1) + self.constant


def _terms(ci: Any, co: Any, full_in: Any, full_out: Any, block: Any, form: Any) -> np.ndarray:
    """(..., TERMS) features; the first four are 1 each at full width."""
    a = _rounded(ci, block, form, True) / _rounded(full_in, block, form, True)
    b = _rounded(co, block, form, False) / _rounded(full_out, block, form, False)
    odd = ((form == OTHER) & ((ci % block != 0) | (co % block != 0))).astype(float)
    return np.stack([np.ones_like(a), a, b, a * b, odd, odd * a * b], axis=-1)


def _rounded(count: Any, block: Any, form: Any, read: bool) -> np.ndarray:
    """Channels as a form counts them."""
    whole = np.ceil(count / block) * block
    plain = (form == OTHER) | ((form == START) & read & (count < block))
    return np.where(plain, count, whole)


def _fit_unit(
    sides: tuple[Any, Any, float, float], times: np.ndarray, forms: Sequence[tuple[int, int]]
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
    weight = 1 / times if times.all() else np.ones_like(times)
    return nnls(terms * weight[:, None], times * weight)[0]


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
