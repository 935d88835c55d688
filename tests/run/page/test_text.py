"""Labels, numbers and nested facts."""

from __future__ import annotations

from typing import Any

import pytest

from vss.run.page.words import block, label, number, show, signed


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("latency_ms_p50", "latency p50 (ms)"),
        ("miou_pct", "mIoU (%)"),
        ("params_m", "parameters (M)"),
        ("engine_mib", "engine (MiB)"),
        ("speedup", "speed-up"),
        ("m", "m"),
    ],
)
def test_label(key: str, text: str) -> None:
    assert label(key) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.14159, "3.142"),
        (25.9, "25.9"),
        (-0.5, "\u22120.5"),
        (12345, "12\u202f345"),
        (3.1e-6, "3.10e\u221206"),
        (0.0, "0"),
        (100.0, "100"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_signed_never_shows_a_signed_zero() -> None:
    assert (signed(0.32), signed(-0.32), signed(-0.04)) == ("+0.3", "\u22120.3", "0.0")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "\u2014"), (True, "yes"), ([1, 2], "1, 2"), ([[1, 2], [3, 4]], "1, 2; 3, 4"), ({}, ""), ("a", "a")],
)
def test_show(value: Any, text: str) -> None:
    assert show(value) == text


def test_alike_dictionaries_become_one_table_and_what_is_nested_follows() -> None:
    made = block({"ok": True, "a": {"x": 1, "s": {"t": 5}}, "b": {"x": 2, "y": 3, "s": {"t": 6}}}, "T", judge=True)
    assert made["pairs"] == [("ok", "yes", "good")]
    assert made["table"] == {"head": ["x", "y"], "body": [("a", ["1", "\u2014"]), ("b", ["2", "3"])]}
    assert made["blocks"][0]["table"] == {"head": ["t"], "body": [("a", ["5"]), ("b", ["6"])]}


def test_unlike_dictionaries_and_lists_of_rows_become_blocks() -> None:
    made = block({"a": {"x": 1}, "b": {"y": 2}, "rows": [{"n": 1}, {"what": "w", "n": 2}]})
    assert made["table"] is None and [part["title"] for part in made["blocks"]] == ["a", "b", "rows"]
    assert made["blocks"][2]["table"]["body"] == [("1", ["1"]), ("w", ["2"])]
    assert made["blocks"][0]["pairs"] == [("x", "1", "")]
