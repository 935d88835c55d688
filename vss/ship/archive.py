"""Bundles as .tar.gz: packed so that the same files give the same bytes, unpacked so that nothing lands elsewhere."""

from __future__ import annotations

import contextlib
import gzip
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from vss.core.errors import VssError
from vss.core.files import atomic
from vss.ship.manifest import relative, walk

SUFFIXES = (".tar.gz", ".tgz")
MAX_BYTES, MAX_FILES = 16 * 2**30, 10_000


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive."""
    return path.name.endswith(SUFFIXES)


def pack(bundle: Path, to: Path) -> Path:
    """Write every file of a folder, sorted, without owner and times; `to` is whole or absent."""
    with (
        atomic(to) as temporary,
        open(temporary, "wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in walk(bundle):
            info = tar.gettarinfo(bundle / name, arcname=name)
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mtime, info.mode = 0, 0o644
            with open(bundle / name, "rb") as file:
                tar.addfile(info, file)
    return to


def unpack(path: Path, to: Path) -> Path:
    """Unpack into the empty folder `to`.

    Plain files below `to` are all that is accepted: an absolute path, `..`, a link, a device, a name that comes twice,
    more than `MAX_FILES` files or `MAX_BYTES` in all are a `VssError` before anything is written.
    """
    try:
        with tarfile.open(path, "r:gz") as tar:
            members = _checked(path, tar)
            for member in members:
                target = to / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                with open(target, "xb") as file:
                    while chunk := source.read(2**20):
                        file.write(chunk)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise VssError(f"{path} cannot be unpacked ({error}); copy it again.") from error
    return to


def _checked(path: Path, tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    members, total, names = [], 0, set()
    for member in tar:
        if member.isdir():
            continue
        try:
            relative(member.name)
        except ValueError as error:
            raise VssError(f"{path} is refused: {error}.") from error
        if not member.isreg():
            raise VssError(f"{path} is refused: {member.name} is a link or a device; a bundle holds plain files.")
        if member.name in names:
            raise VssError(f"{path} is refused: it holds {member.name} twice.")
        names.add(member.name)
        total += member.size
        members.append(member)
        if total > MAX_BYTES or len(members) > MAX_FILES:
            raise VssError(f"{path} is refused: more than {MAX_FILES} files or {MAX_BYTES} bytes.")
    return members


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The folder of a bundle, or of an archive, unpacked for as long as it is open."""
    if not is_archive(path):
        yield path
        return
    if not path.is_file():
        raise VssError(f"{path} does not exist; expected a bundle.")
    with tempfile.TemporaryDirectory(prefix="vss-bundle-") as folder:
        yield unpack(path, Path(folder))
