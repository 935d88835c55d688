"""Grids that several tests of sweeps use."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

HERE = str(Path(__file__).resolve().parent)


@pytest.fixture(autouse=True)
def dry_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry study can be imported, here and in worker processes."""
    monkeypatch.setenv("PYTHONPATH", HERE)
    monkeypatch.syspath_prepend(HERE)
    __import__("dry_study")
    assert "dry_study" in sys.modules


def dry_grid(variants: dict[str, dict[str, Any]], seeds: int = 1, **more: Any) -> dict[str, Any]:
    """Content of a grid whose cells do what their options say."""
    choices = [{"name": name, "set": {"model.options": options}} for name, options in variants.items()]
    grid = {"name": "dry", "study": "dry", "plugins": ["dry_study"], "variants": choices, "seeds": list(range(seeds))}
    return grid | more
