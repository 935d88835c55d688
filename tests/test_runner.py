"""vss.runner: a step is done once, unless its result asks for another time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vss.runner import Runner


def test_a_result_that_asks_for_it_is_done_again(tmp_path: Path) -> None:
    results: list[dict[str, Any]] = [{"again": True, "n": 1}, {"again": False, "n": 2}, {"n": 3}]
    found = [
        Runner(tmp_path, lambda *_: None)("bench", {}, [], [], lambda: results.pop(0))["n"] for _ in range(4)
    ]  # the second is stable and stays
    assert found == [1, 2, 2, 2]
