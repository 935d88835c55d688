"""vss.run.runner: a step is done once, unless its result asks for another time or its record is not whole."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from vss.core.errors import VssError
from vss.run.runner import Runner


def test_a_result_that_asks_for_it_is_done_again(tmp_path: Path) -> None:
    results: list[dict[str, Any]] = [{"again": True, "n": 1}, {"again": False, "n": 2}, {"n": 3}]
    found = [
        Runner(tmp_path, lambda *_: None)("bench", {}, [], [], lambda: results.pop(0))["n"] for _ in range(4)
    ]  # the second is stable and stays
    assert found == [1, 2, 2, 2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:40],
        lambda text: "\x00" * 99,
        lambda text: "[]",
        lambda text: text.replace("vss.step", "vss.report"),
        lambda text: text.replace('"n": 12.5', '"n": 12.6'),
        lambda text: text.replace('"outputs"', '"output"'),
        lambda text: text.replace('"schema": 2', '"schema": 99'),
    ],
)
def test_a_damaged_or_foreign_record_is_made_again(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def step() -> dict[str, Any]:
        return Runner(tmp_path, lambda *_: None)("s", {"a": 1}, [], [], lambda: calls.append(1) or {"n": 12.5})

    assert step() == step() == {"n": 12.5} and len(calls) == 1
    record = tmp_path / "steps" / "s.json"
    whole = record.read_text()
    assert damage(whole) != whole
    record.write_text(damage(whole))
    with pytest.raises(VssError, match=r"s\.json is no whole record"):
        Runner(tmp_path, lambda *_: None).result("s")
    with caplog.at_level(logging.WARNING, logger="vss.run.runner"):
        assert step() == {"n": 12.5}
    assert len(calls) == 2 and "made again" in caplog.text
    assert Runner(tmp_path, lambda *_: None).result("s") == {"n": 12.5}
