"""How commands end: every kind of error has its sentence and exit code, in every command."""

from __future__ import annotations

import builtins
import errno
import io
import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import vss.cli.__main__
from vss.cli.console import Screen, out, print_step, set_output
from vss.cli.main import Commands
from vss.core.errors import GateFailed, NotMeasured, VssError
from vss.run.report import write_failed
from vss.run.runner import Runner


def end(capsys: pytest.CaptureFixture[str], error: BaseException | None, command: str = "other") -> tuple[int, str]:
    """Exit code and standard error of a command that raises."""
    app = typer.Typer(cls=Commands)

    def work() -> None:
        if error is None:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise error

    app.command(command)(work)
    app.command("second")(lambda: None)
    with pytest.raises(SystemExit) as stop:
        app([command])
    return int(stop.value.code or 0), " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (VssError("the sentence."), 2, "error: the sentence."),
        (GateFailed("gate"), 1, "failed: gate"),
        (NotMeasured("noisy"), 3, "error: noisy"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), 2, "error: '/x': Is a directory; name another"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), 2, "File name too long"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device; "),
        (MemoryError(), 2, "error: there is not enough memory (MemoryError); choose a smaller batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 byte"), 2, "error: there is not enough memory"),
        (RecursionError("maximum"), 2, "nested too deeply"),
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"), 2, "needs the package onnx"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "no UTF-8"),
        (UnicodeEncodeError("utf-8", "d/\udcff.png", 2, 3, "surrogates not allowed"), 2, r"'d/\udcff.png' is no UTF-8"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (None, 143, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException | None) else "",
)
def test_an_error_is_a_sentence_and_a_code(
    capsys: pytest.CaptureFixture[str], error: BaseException | None, code: int, text: str
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    found, said = end(capsys, error)
    assert found == code and text in said and "Traceback" not in said and len(said) < 400
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_fault_of_our_own_shows_where_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = end(capsys, ZeroDivisionError("ours"))
    assert code == 70 and "Traceback" in said and "this is a fault of vss" in said


def test_an_interrupted_command_says_what_is_kept_and_whether_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    stop = KeyboardInterrupt()
    stop.add_note("3 of 5 epochs are kept in x")
    code, said = end(capsys, stop, "train")
    assert (code, said) == (130, "interrupted: 3 of 5 epochs are kept in x; the same command goes on from here")


def test_an_interrupted_step_is_no_failed_one_and_leaves_no_report(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    step = Runner(tmp_path, lambda name, status, seconds, detail: told.append((name, status)))

    def work(error: BaseException) -> Any:
        raise error

    for error in (KeyboardInterrupt(), BrokenPipeError(), VssError("bad")):
        with pytest.raises(type(error)):
            step("train", [], [], [], lambda error=error: work(error))
    assert told == [("train", "interrupted"), ("train", "interrupted"), ("train", "failed")]

    class Stopped:
        out, command = tmp_path, ""

    Stopped.step = step  # type: ignore[attr-defined]
    for error in (KeyboardInterrupt(), SystemExit(143), BrokenPipeError()):
        write_failed(Stopped, error)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_quiet_and_log(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Screen, "copy", None)
    level = logging.getLogger().level
    try:
        set_output(file=tmp_path / "deep/all.log")
        print_step("train", "ok", 1.0, "fine [sic]")
        set_output(quiet=True, file=tmp_path / "deep/all.log")
        print_step("prune", "ok", 1.0, "")
        print_step("bench", "failed", 1.0, "no")
        out.print("a result")
    finally:
        set_output()
        logging.getLogger().setLevel(level)
    shown = capsys.readouterr().out
    copy = (tmp_path / "deep/all.log").read_text()
    assert "fine [sic]" in shown and "bench" in shown and "a result" in shown and "prune" not in shown
    lines = [line for line in copy.splitlines() if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d vss ", line)]
    assert lines == shown.splitlines() and len(copy.splitlines()) == len(lines) + 2 and "\x1b" not in copy


def test_output_that_nobody_reads_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(os, "dup2", lambda *_: 0)  # standard output of the tests stays
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    with pytest.raises(SystemExit) as stop:
        Screen(file=Closed()).print("a line")
    assert stop.value.code == 141


def test_ctrl_c_during_the_import_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    real = builtins.__import__

    def interrupted(name: str, *rest: Any, **more: Any) -> Any:
        if name == "vss.cli.main":
            raise KeyboardInterrupt
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as end:
        vss.cli.__main__.main()
    assert end.value.code == 130 and capsys.readouterr().err.startswith("interrupted before anything was begun")
