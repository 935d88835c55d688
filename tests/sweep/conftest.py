"""Grids that several tests of sweeps use."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vss.sweep import Settings
from vss.sweep.store import Outcome, Task, perform

HERE = str(Path(__file__).resolve().parent)


@pytest.fixture(autouse=True)
def dry_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry experiment can be imported, here and in worker processes."""
    monkeypatch.setenv("PYTHONPATH", HERE)
    monkeypatch.syspath_prepend(HERE)
    __import__("dry_experiment")
    assert "dry_experiment" in sys.modules


class InProcess:
    """An executor without workers: a task is done where it is submitted. For what an experiment computes."""

    slots = 1

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.outcomes: list[Outcome] = []

    def submit(self, task: Task) -> None:
        self.outcomes.append(perform(task))

    def wait(self, timeout: float) -> list[Outcome]:
        found, self.outcomes = self.outcomes, []
        return found

    def close(self) -> None:
        assert self.outcomes == []


class Here(Settings):
    """Settings of a sweep that is done in this process."""

    def open(self) -> InProcess:
        return InProcess()


def dry_grid(variants: dict[str, dict[str, Any]], seeds: int = 1, **more: Any) -> dict[str, Any]:
    """Content of a grid whose trials do what their options say."""
    choices = [{"name": name, "set": {"model.options": options}} for name, options in variants.items()]
    grid = {
        "name": "dry",
        "study": "dry",
        "plugins": ["dry_experiment"],
        "variants": choices,
        "seeds": list(range(seeds)),
    }
    return grid | more
