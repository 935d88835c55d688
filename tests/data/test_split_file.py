"""Split files: every protocol reads alike; nothing that runs, grows or breaks gets further than one sentence."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from vss.core.errors import VssError
from vss.data import read_split_file

PUBLISHED = ([(10000, True), (10001, False), (12330, True)], [(20000, True), (21003, True)])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_published_structure(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "split_weakly_1.pyb"
    path.write_bytes(pickle.dumps(PUBLISHED, protocol=protocol))
    found = read_split_file(path)
    assert found == {"train": {"10000": True, "10001": False, "12330": True}, "test": {"20000": True, "21003": True}}


class Runs:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_code_does_not_run(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path, mark = tmp_path / f"{protocol}.pyb", tmp_path / "ran"
        path.write_bytes(pickle.dumps((PUBLISHED[0], [Runs(mark)]), protocol=protocol))
        with pytest.raises(VssError, match=r"more than lists of numbers .* was not loaded"):
            read_split_file(path)
        assert not mark.exists()


HOSTILE = {
    "global": b"cos\nsystem\n(S'true'\ntR.",
    "extension code": b"\x80\x02\x82\x01.",
    "persistent id": b"Pfile\n.",
    "instance": b"(S'true'\nios\nsystem\n.",
    "text": b"\x80\x02X\x03\x00\x00\x00abc.",
    "dictionary": b"}.",
    "large place": b"\x80\x02]r\xff\xff\xff\x7f.",
    "truncated": pickle.dumps(PUBLISHED)[:-4],
    "empty": b"",
    "picture": b"\x89PNG\r\n\x1a\n" * 4,
    "get from nowhere": b"\x80\x02h\x05.",
    "append to a number": b"\x80\x02K\x01K\x02a.",
    "huge number": b"I" + b"9" * 5000 + b"\n.",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_and_damaged_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "split.pyb"
    path.write_bytes(data)
    with pytest.raises(VssError, match=r"was not loaded|is damaged") as caught:
        read_split_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        [], ([],), ([], [], []), (1, 2), ([1], []), ([(1, 2, 3)], []), ([(1, 1)], []), ([(True, True)], []),
        ([(-1, True)], []), ([(1, True), (1, False)], []), 7,
    ],
)  # fmt: skip
def test_another_structure(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "split.pyb"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(VssError, match="another structure"):
        read_split_file(path)


def test_large_and_missing_files(tmp_path: Path) -> None:
    with open(tmp_path / "large.pyb", "wb") as file:
        file.truncate((4 << 20) + 1)
    with pytest.raises(VssError, match="has 4194305 bytes"):
        read_split_file(tmp_path / "large.pyb")
    with pytest.raises(VssError, match="does not exist"):
        read_split_file(tmp_path / "nowhere.pyb")
