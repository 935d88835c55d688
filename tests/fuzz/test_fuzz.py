"""Mutated files of every kind: one sentence or harmless; no traceback, hang, code run, or damage under a hash."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.judge import ACCEPTED, EQUAL, REFUSED, HungError, Subject, limited, outcome, run
from tests.fuzz.subjects import subjects
from vss.core.errors import VssError
from vss.data import read_split_file
from vss.models.weights import read_state_dict

COUNT, SEED = 500, 0


def test_mutated_files_are_refused_in_one_sentence_or_harmless(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    made = subjects(tmp_path / "made")
    counts, faults = run(made, COUNT, SEED, tmp_path)
    assert faults == []
    assert sum(sum(each.values()) for each in counts.values()) >= 0.95 * COUNT
    for name, subject in made.items():
        assert counts[name][REFUSED] > 0, name
        assert not (subject.sealed and counts[name][ACCEPTED]), name


class Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize(
    ("name", "read"), [("w.pt", read_state_dict), ("w.pth", read_state_dict), ("s.pyb", read_split_file)]
)
def test_no_code_in_a_file_runs(tmp_path: Path, name: str, read: Callable[[Path], Any]) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / name).write_bytes(pickle.dumps({"a": Runs(tmp_path / "ran")}, protocol=protocol))
        with pytest.raises(VssError):
            read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_the_judge_sees_what_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x")

    def raises(error: BaseException) -> Callable[[Path], Any]:
        def read(_: Path) -> Any:
            raise error

        return read

    def of(read: Callable[[Path], Any], sealed: bool = False) -> str:
        return outcome(Subject(b"", "x", read, sealed=sealed), path, 1)

    assert of(lambda _: 1) == EQUAL and of(lambda _: 2) == ACCEPTED and of(raises(VssError("No."))) == REFUSED
    assert of(lambda _: 2, sealed=True) == "damage accepted where a hash stands"
    assert of(raises(KeyError("a"))).startswith("traceback: KeyError") and of(raises(HungError())).startswith("hang")
    assert of(raises(VssError("x" * 3000))).startswith("sentence of 3000")
    assert of(lambda _: bytearray(64 << 30)).startswith("traceback: MemoryError")
    with pytest.raises(HungError), limited(wall=0.05):
        time.sleep(5)
    with pytest.raises(HungError), limited(seconds=0.05):
        while True:
            pass
