"""The command line in the process of the tests: its output, its exit codes, and a disk that fills up under it."""

from __future__ import annotations

import contextlib
import io
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from vss.cli.main import main


@dataclass
class Done:
    """What a command came to."""

    returncode: int
    stdout: str
    stderr: str


def cli(*words: object) -> Done:
    """`vss WORDS` through its real entry point, in this process; what it raises is not caught here."""
    streams, code = (io.StringIO(), io.StringIO()), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
    ):
        patch.setattr(sys, "argv", ["vss", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, streams[0].getvalue(), streams[1].getvalue())


def refused(done: Done, *parts: str) -> None:
    """Exit code 2 and one sentence that holds all the parts."""
    text = " ".join(done.stderr.split())
    assert done.returncode == 2, (done.returncode, done.stdout[-500:], done.stderr[-1500:])
    assert "Traceback" not in text and all(part in text for part in parts), text


@contextlib.contextmanager
def full_disk(kib: int) -> Iterator[None]:
    """Files of at most `kib` KiB, as on a disk that fills up, in here and in processes started here.

    Python ignores SIGXFSZ, so that a write beyond it is an OSError.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
