"""Archives of bundles: there and back, the same bytes for the same files, and every way out of the folder refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from vss.core.errors import VssError
from vss.ship import manifest as archive
from vss.ship import ship, verify
from vss.ship.manifest import walk


def written(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b"data" if kind == tarfile.REGTYPE else b""


def test_there_and_back(seg_bundle: Path, tmp_path: Path) -> None:
    first = archive.pack(seg_bundle, tmp_path / "a.tar.gz")
    second = archive.pack(seg_bundle, tmp_path / "b.tar.gz")
    assert first.read_bytes() == second.read_bytes()
    (tmp_path / "out").mkdir()
    archive.unpack(first, tmp_path / "out")
    assert list(walk(tmp_path / "out")) == list(walk(seg_bundle))
    assert all((tmp_path / "out" / n).read_bytes() == (seg_bundle / n).read_bytes() for n in walk(seg_bundle))


def test_ship_writes_an_archive_that_verifies(seg_run: Path, tmp_path: Path) -> None:
    ship(seg_run, tmp_path / "bundle.tar.gz", samples=1)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.tar.gz"]
    with archive.opened(tmp_path / "bundle.tar.gz") as folder:
        assert verify(folder)[-1]["status"] == "ok"
    assert not folder.exists()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (member("../escaped"), "no plain path below"),
        (member("/absolute"), "no plain path below"),
        (member("a/../../escaped"), "no plain path below"),
        (member("link", tarfile.SYMTYPE, "/etc"), "link is a link or a device"),
        (member("hard", tarfile.LNKTYPE, "good"), "hard is a link or a device"),
        (member("pipe", tarfile.FIFOTYPE), "pipe is a link or a device"),
        (member("good"), "holds good twice"),
    ],
    ids=lambda value: value[0].name if isinstance(value, tuple) else "",
)
def test_bad_members_are_refused_before_anything_is_written(
    tmp_path: Path, bad: tuple[tarfile.TarInfo, bytes], words: str
) -> None:
    path = written(tmp_path / "bad.tar.gz", member("good"), bad)
    (tmp_path / "out").mkdir()
    with pytest.raises(VssError, match=words):
        archive.unpack(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == [] and not (tmp_path / "escaped").exists()


def test_too_much_and_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.tar.gz", member("one"), member("two"))
    monkeypatch.setattr(archive, "MAX_BYTES", 7)
    with pytest.raises(VssError, match="more than 10000 files or 7 bytes"):
        archive.unpack(path, tmp_path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(VssError, match=r"cannot be unpacked .* copy it again"):
        archive.unpack(path, tmp_path)
    with pytest.raises(VssError, match="does not exist"), archive.opened(tmp_path / "none.tar.gz"):
        pass
