"""vss.deploy.quantize.precision: every way to be refused, and the sentence."""

from __future__ import annotations

from typing import Any

import pytest

from vss.deploy.quantize.precision import decide


def row(precision: str, ms: float, *, passed: bool = True, low: float | None = None) -> dict[str, Any]:
    speedup = {"ratio": 10 / ms, "low": low, "high": 10 / ms + 0.1} if low is not None else None
    return {
        "precision": precision,
        "latency_ms_p50": ms,
        "passed": passed,
        "sentence": "failed: drop",
        "speedup": speedup,
    }


@pytest.mark.parametrize(
    ("fp16", "int8", "chosen"),
    [
        (row("fp16", 6), row("int8", 4), "int8"),
        (row("fp16", 6), row("int8", 7), "fp16"),
        (row("fp16", 12), row("int8", 8), "int8"),
        (row("fp16", 12), row("int8", 11), "fp32"),
        (row("fp16", 6), row("int8", 4, passed=False), "fp16"),
        (row("fp16", 6, passed=False), row("int8", 7), "int8"),
        (row("fp16", 6, passed=False), row("int8", 4, passed=False), "fp32"),
        (row("fp16", 9.9, low=0.97), row("int8", 9.8, low=0.99), "fp32"),
        (row("fp16", 9, low=1.05), row("int8", 8, low=1.2), "int8"),
    ],
)
def test_the_choice(fp16: dict[str, Any], int8: dict[str, Any], chosen: str) -> None:
    result = decide([row("fp32", 10), fp16, int8])
    assert result["chosen"] == chosen
    assert set(result["why"]) == {"fp32", "fp16", "int8"} - {chosen}
    assert result["sentence"].startswith(f"{chosen} is kept")


def test_the_report_says_why() -> None:
    result = decide([row("fp32", 10), row("fp16", 9.9, low=0.97), row("int8", 14)])
    assert result["why"]["fp16"] == "1.010x over fp32 is inside the noise of this machine (0.970 to 1.110)"
    assert result["why"]["int8"] == "14.00 ms is not faster than the 10.00 ms of fp32 on this machine"
    failed = decide([row("fp32", 10), row("int8", 4, passed=False)])
    assert failed["why"] == {"int8": "failed: drop"} and "int8 not: failed: drop" in failed["sentence"]


def test_times_that_do_not_stand_still_choose_nothing() -> None:
    result = decide([row("fp32", 10), row("int8", 4), row("fp32 openvino", 3, passed=False)], stable=False)
    assert result["chosen"] == "fp32"
    assert result["why"]["int8"] == "the machine is too noisy to time it; the same command times again"
    assert "noisy" not in result["why"]["fp32 openvino"]
    assert result["sentence"].startswith("fp32 is kept (not timed)")


def test_the_fastest_of_all_runtimes_is_kept() -> None:
    rows = [row("fp32", 10), row("int8", 12), row("fp32 openvino", 8), row("int8 openvino", 5), row("int8 other", 6)]
    result = decide(rows)
    assert result["chosen"] == "int8 openvino"
    assert result["why"]["int8 other"].startswith("6.00 ms is not faster than the 5.00 ms of int8 openvino")
    assert decide([*rows[:3], row("int8 openvino", 5, passed=False)])["chosen"] == "fp32 openvino"
