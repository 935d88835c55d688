"""Class names: how they are read, and that those of a network and of the data must agree."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest

from vss.core.errors import VssError
from vss.data.base import read_class_names, require_classes


@pytest.mark.parametrize(
    ("theirs", "ours", "count"),
    [
        (("Sky", "Road"), ("Sky", "Road"), 0),
        (("sky", "traffic  light"), ("SKY", "Traffic light"), 2),
        ((unicodedata.normalize("NFD", "Straße é"),), (unicodedata.normalize("NFC", "strasse é"),), 0),
        ((), ("a", "b"), 2),
        ((), ("a", "b"), 0),
    ],
)
def test_classes_that_agree(theirs: Sequence[str], ours: Sequence[str], count: int) -> None:
    require_classes("net", theirs, "data", ours, count=count)


@pytest.mark.parametrize(
    ("theirs", "ours", "count", "text"),
    [
        (("a", "b"), ("a", "b", "c"), 2, r"^net has 2 classes \(\['a', 'b'\]\) and data has 3 "),
        ((), ("a", "b", "c"), 2, "^net has 2 classes and data has 3 "),
        (("a", "b", "c"), ("c", "b", "a"), 3, "same names in another order.*class 0 is 'a' there and 'c' here"),
        (("a", "b", "c"), ("a", "x", "y"), 3, "2 other names.*class 1 is 'b' there and 'x' here"),
    ],
)
def test_classes_that_do_not_agree(theirs: Sequence[str], ours: Sequence[str], count: int, text: str) -> None:
    with pytest.raises(VssError, match=text) as caught:
        require_classes("net", theirs, "data", ours, count=count)
    assert caught.value.exit_code == 2 and str(caught.value).endswith(".")


@pytest.mark.parametrize("text", ["a\nb\n", "\ufeffa\r\nb\r\n", "a\rb", "  a \nb\n\n\n"])
def test_names_are_lines_whatever_ends_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.txt").write_bytes(text.encode())
    assert read_class_names(tmp_path / "classes.txt") == ("a", "b")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\n\nb\n", "line 2 of .* is blank, and mask values are line numbers from 0"),
        (b"car\nCar\n", "holds 2 names, 1 different"),
        (b"", "holds 0 names"),
        (b"a\xff\n", "cannot be read"),
    ],
)
def test_lists_of_names_that_are_refused(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "classes.txt").write_bytes(data)
    with pytest.raises(VssError, match=text):
        read_class_names(tmp_path / "classes.txt")


def test_composed_and_decomposed_names_are_one(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(unicodedata.normalize("NFD", "é\n"))
    assert read_class_names(tmp_path / "classes.txt") == (unicodedata.normalize("NFC", "é"),)
