"""vss.deploy.quantize.sensitivity against made-up networks whose losses are known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from vss.core.errors import VssError
from vss.deploy.quantize.sensitivity import Choice, first_to_free, greedy_fallback, scan

GROUPS = {"a": ["a.0", "a.1"], "b": ["b.0"], "c": ["c.0"], "d": ["d.0", "d.1"], "e": ["e.0"]}
LOSS = {"a": 0.1, "b": 20.0, "c": 0.0, "d": 1.5, "e": 4.0}


def metric(keep: Sequence[str]) -> float:
    """80 less what every group loses that is not wholly kept."""
    return 80.0 - sum(LOSS[name] for name, layers in GROUPS.items() if not set(layers) <= set(keep))


def test_scan_gives_the_loss_of_each_group_alone() -> None:
    ticks: list[int] = []
    rows = scan(GROUPS, metric, 80.0, tick=lambda: ticks.append(1))
    assert {row["group"]: round(row["drop"], 9) for row in rows} == LOSS
    assert rows[0]["layers"] == ["a.0", "a.1"] and len(ticks) == 5


def test_order_is_by_points_and_with_times_by_points_per_millisecond() -> None:
    rows = scan(GROUPS, metric, 80.0)
    assert first_to_free(rows) == ["b", "e", "d", "a", "c"]
    gains = {"a": 0.001, "b": 10.0, "c": -0.2, "d": 1.0, "e": 0.0}
    timed = [row | {"gain_ms": gains[row["group"]]} for row in rows]
    assert first_to_free(timed) == ["e", "c", "a", "b", "d"]


@pytest.mark.parametrize(("allowed", "freed"), [(30.0, 0), (5.7, 1), (5.0, 2), (0.5, 3), (0.05, 4)])
def test_retreat_frees_no_more_than_it_must(allowed: float, freed: int) -> None:
    result = greedy_fallback(scan(GROUPS, metric, 80.0), metric, 80.0, allowed)
    assert result["freed"] == ["b", "e", "d", "a", "c"][:freed] and result["within"]
    assert result["drop"] == pytest.approx(80.0 - metric(result["keep"])) and result["drop"] <= allowed
    best = min(
        len(names)
        for count in range(6)
        for names in itertools.combinations(GROUPS, count)
        if 80.0 - metric([layer for name in names for layer in GROUPS[name]]) <= allowed
    )
    assert len(result["freed"]) == best
    assert len(result["tried"]) <= 4


def test_what_is_returned_was_measured_even_where_losses_do_not_add_up() -> None:
    def jointly(keep: Sequence[str]) -> float:  # harmless alone, ruinous together
        return 80.0 if len(keep) >= 5 else 10.0

    rows = [{"group": name, "layers": layers, "metric": 80.0, "drop": 0.0} for name, layers in GROUPS.items()]
    result = greedy_fallback(rows, jointly, 80.0, 0.5)
    assert result["within"] and result["metric"] == 80.0 and len(result["keep"]) >= 5
    assert {row["freed"] for row in result["tried"]} >= {0, len(result["freed"])}


def test_a_network_that_stands_no_int8_at_all_says_so() -> None:
    result = greedy_fallback(scan(GROUPS, lambda keep: 10.0, 80.0), lambda keep: 10.0, 80.0, 0.5)
    assert not result["within"] and result["metric"] is None and result["freed"] == list(GROUPS)


def test_a_choice_is_a_file_for_one_network(tmp_path: Path) -> None:
    choice = Choice("a" * 64, ("b.0", "e.0"), {"max_drop": 0.5})
    assert Choice.load(choice.save(tmp_path / "c.json"), "a" * 64) == choice
    with pytest.raises(VssError, match="chosen for other weights"):
        Choice.load(tmp_path / "c.json", "b" * 64)
    (tmp_path / "d.json").write_text('{"kind": "vss.precision_choice", "schema": 1, "keep": []}')
    with pytest.raises(VssError, match="has no whole weights_sha256 and facts; search again"):
        Choice.load(tmp_path / "d.json", "a" * 64)
