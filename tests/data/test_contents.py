"""Contents count: a changed file of the same size and mtime is noticed, and the memory of digests is safe to lose."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vss.data import Preprocess, SegSplit, count_classes, images, open_data
from vss.data.images import BadSampleError, Memory, count_values, sha256_files


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files made by a test are old enough to be remembered."""
    monkeypatch.setattr(images, "SETTLED", -1.0)


def exchange(path: Path) -> None:
    """Other bytes, the same size, the same mtime."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("folder", ["train", "trainannot"])
def test_a_split_is_hashed_by_contents_of_images_and_masks(camvid_root: Path, folder: str) -> None:
    split = SegSplit(open_data("camvid", camvid_root), "train", Preprocess(size=(8, 10)))
    before = split.sha256()
    path = camvid_root / folder / "a1.png"
    os.utime(path, (1, 1))  # the time alone is no change
    assert split.sha256() == before
    exchange(path)
    assert split.sha256() != before


def test_a_split_is_hashed_with_the_meaning_of_its_masks(camvid_root: Path) -> None:
    hashes = []
    for last in ("k", "renamed"):
        (camvid_root / "classes.txt").write_text("\n".join([*"abcdefghij", last]))
        hashes.append(SegSplit(open_data("camvid", camvid_root), "train", Preprocess(size=(8, 10))).sha256())
    assert len(set(hashes)) == 2
    names, ignored, owners = open_data("camvid", camvid_root).meaning
    assert names[-1] == "renamed" and ignored == 255
    assert owners == [*range(11), 255, *[None] * 243, 255]


@pytest.mark.usefixtures("settled")
def test_digests_are_remembered_and_follow_the_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{number}.bin" for number in range(3)]
    for number, path in enumerate(files):
        path.write_bytes(bytes([number]) * 100)
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    place = tmp_path / "cache" / "c.sqlite"
    assert Memory(place).digests([*files, files[0]]) == [*expected, expected[0]]
    read: list[Path] = []
    plain = images._digest
    monkeypatch.setattr(images, "_digest", lambda path: (read.append(path), plain(path))[1])
    again = Memory(place)
    assert again.digests(files) == expected and read == []
    exchange(files[1])
    changed = hashlib.sha256(files[1].read_bytes()).hexdigest()
    assert Memory(place).digests(files) == again.digests(files) == [expected[0], changed, expected[2]]
    assert set(read) == {files[1]}
    files[2].rename(tmp_path / "other.bin")
    (tmp_path / "other.bin").replace(files[2])  # the same file again
    os.replace(files[0], files[2])
    assert Memory(place).digests([files[2]]) == [expected[0]]


def test_a_file_that_changed_just_now_is_never_remembered(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    memory = Memory(tmp_path / "c.sqlite")
    memory.digests([tmp_path / "a"])
    assert memory.known == {}


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("damage", [b"no database at all, long enough to be read as one", b""])
def test_a_damaged_memory_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "a").write_bytes(b"1")
    place, expected = tmp_path / "c.sqlite", [hashlib.sha256(b"1").hexdigest()]
    assert Memory(place).digests([tmp_path / "a"]) == expected
    place.write_bytes(damage)
    assert Memory(place).digests([tmp_path / "a"]) == expected
    assert sqlite3.connect(place).execute("SELECT sha256 FROM digests").fetchall() == [(expected[0],)]


@pytest.mark.usefixtures("settled")
def test_where_nothing_can_be_remembered_everything_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").write_bytes(b"1")
    memory = Memory(tmp_path / "a" / "below-a-file" / "c.sqlite")
    for _ in range(2):
        assert memory.digests([tmp_path / "a"]) == [hashlib.sha256(b"1").hexdigest()]
    assert caplog.text.count("set VSS_CACHE") == 1


@pytest.mark.usefixtures("settled")
def test_values_of_masks_are_counted_once_by_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 5, (6, 7), dtype=np.uint8), rng.integers(0, 5, (6, 7)).astype(np.uint16) * 300]
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{number}.png")
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    place = tmp_path / "c.sqlite"
    for memory in (Memory(place), Memory(place)):
        for (dtype, counts), array in zip(memory.counts(files), arrays, strict=True):
            assert dtype == array.dtype.name
            assert counts == {int(value): int((array == value).sum()) for value in np.unique(array)}
        monkeypatch.setattr(images, "read_stored_mask", lambda path: pytest.fail(f"{path} is read again"))
    with sqlite3.connect(place) as file:
        file.execute("UPDATE counts SET counts = '[[1'")
    monkeypatch.undo()
    assert [counts for _, counts in Memory(place).counts(files)] == [counts for _, counts in count_values(files)]


def test_classes_of_masks_are_those_of_reading_them(camvid_root: Path) -> None:
    data = open_data("camvid", camvid_root)
    counts = count_classes(data, data.pairs("train"))
    plain = [np.bincount(data.read_mask(pair.mask).ravel(), minlength=256) for pair in data.pairs("train")]
    assert counts.rows.tolist() == [row[:11].tolist() for row in plain]
    assert counts.ignored == sum(row[255] for row in plain) > 0


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match=r"gone cannot be read \(No such file or directory\); put it back"):
        sha256_files([tmp_path / "gone"])
