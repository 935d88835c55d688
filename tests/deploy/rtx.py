"""What the tests of TensorRT for RTX share: it must be installed, and its builds leave nothing but whole engines."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vss.cli.main import app

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason='needs TensorRT for RTX: pip install "vss[rtx]"'
)


def vss_cli(*words: object, code: int = 0) -> str:
    """What a command prints, on one line; it must end with that code, and with one sentence where it is not 0."""
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "300"})
    assert done.exit_code == code, (done.output, done.exception)
    if code:
        said = [line for line in done.output.splitlines() if re.match(r"\S*(error|failed|fault|interrupted):", line)]
        assert len(said) == 1 and "Traceback" not in done.output, done.output
    return " ".join(done.output.split())


def children(parent: int) -> list[int]:
    """Processes that the threads of a process have started and that are still there."""
    found: list[int] = []
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended
            found += map(int, path.read_text().split())
    return [child for child in found if alive(child)]


def alive(process: int) -> bool:
    """Whether a process is there and no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def builder_of(parent: int, seconds: float = 60) -> int:
    """The process that builds an engine for `parent`, once it is there; one that asks for a version is none, nor is one
    that keeps nothing."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for child in children(parent):
            try:
                words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
                if len(words) < 3 or not words[1].endswith("trt_child.py"):
                    continue  # another, or one that is about to become a builder
                if '"out": "' in Path(words[2], "request.json").read_text():
                    return child
            except OSError:  # gone meanwhile
                continue
        time.sleep(0.01)
    raise TimeoutError(f"process {parent} started no builder")


@contextmanager
def sent_to_the_builder(number: signal.Signals) -> Iterator[list[int]]:
    """Send a signal to the first builder that this process starts; gives its id, once it was sent."""
    sent: list[int] = []

    def send() -> None:
        builder = builder_of(os.getpid())
        os.kill(builder, number)
        sent.append(builder)

    thread = threading.Thread(target=send)
    thread.start()
    yield sent
    thread.join()
    assert len(sent) == 1


def stop_at_work(builder: int) -> None:
    """Stop a builder once it holds TensorRT, so that whoever started it waits for it."""
    wait_for(lambda: "libtensorrt_rtx" in Path(f"/proc/{builder}/maps").read_text())
    os.kill(builder, signal.SIGSTOP)


def wait_for(met: Callable[[], object], seconds: float = 60) -> None:
    """Until something is so; fails where it is not after so long."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[Path]:
    """A folder in which a build has put nothing at all, with no process of it alive."""
    folder = tmp_path / "out"
    folder.mkdir()
    before = set(children(os.getpid()))
    yield folder
    assert sorted(each.name for each in folder.iterdir()) == []
    assert not set(children(os.getpid())) - before
