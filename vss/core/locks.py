"""Who is at work in a folder or on a file: locks that go with their process, and what killed writers left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TextIO

from vss.core.errors import VssError
from vss.core.files import TEMPORARY, target_of, write_error

LOCK = ".lock"
"""Name of the lock in a folder."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False, refusal: str = "", stays: bool = True) -> Iterator[None]:
    """Hold a file lock that names its holder and goes with the process, however that ends.

    Args:
        path: the lock's file.
        wait: until another holder lets go; without, a held lock is a `VssError`.
        refusal: its sentence; by default that `path.parent` is in use.
        stays: whether the file stays; where nobody waits it may go.
    """
    made = [each for each in (target_of(path).parent, *path.parent.parents) if not each.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _held(path, wait=wait)
    except BlockingIOError as error:
        raise VssError(refusal or f"another vss command is at work in {path.parent}; wait for it.") from error
    except OSError as error:
        raise write_error(path, error) from error
    with file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            if not stays:
                path.unlink(missing_ok=True)
            for folder in made:  # goes again where nothing was written into it
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _held(path: Path, *, wait: bool) -> TextIO:
    """The file, locked; one that its last holder took away while this one waited for it is opened anew."""
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BaseException:
            file.close()
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


@contextlib.contextmanager
def at_work(folder: Path, *, wait: bool = False, deep: bool = True) -> Iterator[None]:
    """Hold the lock of a folder that a command writes into; what a killed one left half-written goes first.

    Args:
        folder: made where it is not there; it goes again when nothing was written into it.
        wait: see `locked`.
        deep: the folders in it are this command's too.
    """
    made = not folder.exists()
    with locked(folder / LOCK, wait=wait):
        remove_leftovers(folder, deep=deep)
        try:
            yield
        finally:
            if made and [path.name for path in folder.iterdir()] == [LOCK]:  # refused before anything was written
                (folder / LOCK).unlink()


def file_at_work(path: Path) -> AbstractContextManager[None]:
    """The lock of one file that a command works at for long."""
    refusal = f"another vss command is at work on {path}; wait for it, or choose another name."
    return locked(path.parent / f".{path.name}{LOCK}", refusal=refusal, stays=False)


def at_rest(folder: Path) -> AbstractContextManager[None]:
    """The lock of a folder that is read as a whole, where there is one and it can be locked."""
    lockable = folder.is_dir() and os.access(folder, os.W_OK)
    return locked(folder / LOCK, stays=(folder / LOCK).exists()) if lockable else contextlib.nullcontext()


def is_leftover(path: Path) -> bool:
    """Whether a file is one that `atomic` had not finished."""
    return path.name.startswith(".") and TEMPORARY in path.name


def remove_leftovers(folder: Path, *, deep: bool) -> None:
    """Remove what killed writes have left in a folder whose lock is held."""
    pattern = f".*{TEMPORARY}*"
    for path in list(folder.rglob(pattern) if deep else folder.glob(pattern)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
