"""The table of criteria as `vss methods` prints it, and criteria by name and preset; neither needs torch."""

from __future__ import annotations

from collections.abc import Sequence

from vss.prune.criteria.base import CRITERIA, Criterion, data_needs, make_criterion


def method_rows() -> list[dict[str, str]]:
    """One row a criterion, from what its class says of itself."""
    rows = []
    for name in CRITERIA.names():
        kind = CRITERIA[name]
        rows.append({
            "name": name,
            "aliases": ", ".join(CRITERIA.aliases(name)),
            "needs": data_needs(make_criterion(name)),
            "sparse_phase": "yes" if kind.sparse_phase else "",
            "ranking": kind.native_ranking,
            "presets": ", ".join(kind.PRESETS),
            "source": kind.source,
        })  # fmt: skip
    return rows


def parse_methods(names: Sequence[str]) -> dict[str, Criterion]:
    """NAME or NAME:PRESET -> criterion, in order."""
    chosen = {}
    for text in names:
        name, _, preset = text.strip().partition(":")
        chosen[text.strip()] = make_criterion(name, preset=preset or None)
    return chosen
