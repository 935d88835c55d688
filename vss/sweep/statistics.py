"""Figures over seeds and blocks: means with intervals, ranks of criteria with significance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

LEVEL = 0.95


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and half-width of the 95 % t-interval of the mean; the latter two need two values."""
    from scipy.stats import t

    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return {"n": count, "mean": mean, "sd": None, "half": None}
    sd = statistics.stdev(values)
    return {
        "n": count,
        "mean": mean,
        "sd": sd,
        "half": float(t.ppf((1 + LEVEL) / 2, count - 1)) * sd / math.sqrt(count),
    }


def ranking(blocks: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Criteria ranked within blocks (one network, budget and seed each) and compared with the best.

    Ranks as in Demsar (2006): 1 is best, ties share their mean rank; the Friedman test asks whether criteria differ at
    all, the Wilcoxon signed-rank test whether one differs from the best, corrected after Holm.

    Args:
        blocks: block -> {criterion: score, higher is better}; blocks that lack a criterion are left out.

    Returns:
        `rows` [{"name", "rank", "mean", "wins", "gap": mean difference to the best, "p": corrected, or None}], best
        first; `blocks` used; `friedman_p` or None; `least_p`: the smallest p that so many blocks can give.
    """
    from scipy.stats import friedmanchisquare, rankdata

    names = list(dict.fromkeys(name for block in blocks.values() for name in block))
    whole = [block for block in blocks.values() if all(name in block for name in names)]
    if not whole or len(names) < 2:
        return {"rows": [], "blocks": len(whole), "friedman_p": None, "least_p": None}
    table = [[block[name] for name in names] for block in whole]
    ranks = [rankdata([-value for value in row]) for row in table]
    mean_rank = {name: sum(float(row[i]) for row in ranks) / len(ranks) for i, name in enumerate(names)}
    scores = {name: [row[i] for row in table] for i, name in enumerate(names)}
    order = sorted(names, key=lambda name: (mean_rank[name], -statistics.fmean(scores[name])))
    raw = {name: _wilcoxon(scores[order[0]], scores[name]) for name in order[1:]}
    corrected = holm(raw)
    rows = [
        {
            "name": name,
            "rank": mean_rank[name],
            "mean": statistics.fmean(scores[name]),
            "wins": sum(block[name] == max(block[other] for other in names) for block in whole),
            "gap": statistics.fmean(scores[name]) - statistics.fmean(scores[order[0]]),
            "p": corrected.get(name),
        }
        for name in order
    ]
    friedman = None
    if len(names) > 2 and len(whole) > 1 and any(len(set(row)) > 1 for row in table):
        friedman = float(friedmanchisquare(*scores.values()).pvalue)
    return {"rows": rows, "blocks": len(whole), "friedman_p": friedman, "least_p": min(1.0, 2.0 ** (1 - len(whole)))}


def _wilcoxon(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the signed-rank test; 1 where all pairs are equal."""
    from scipy.stats import wilcoxon

    differences = [x - y for x, y in zip(a, b, strict=True)]
    return float(wilcoxon(differences).pvalue) if any(differences) else 1.0


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number (Holm 1979).

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    result, largest = {}, 0.0
    for index, (name, value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, value * (len(values) - index)))
        result[name] = largest
    return result
