"""How a command ends: one sentence for everything that can stop it, and its exit code.

0 done, 1 a gate failed, 2 bad input, 3 it could not be measured, 70 a fault of vss itself (with its traceback),
130 Ctrl-C, 141 nobody reads the output any more, 143 SIGTERM.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from vss.cli.console import err, tell
from vss.core.errors import GateFailed, VssError, one_line, shown

BUG, INTERRUPTED, UNREAD, TERMINATED = 70, 130, 141, 143  # 70: EX_SOFTWARE of sysexits.h
RESUMES = {"run", "train", "finetune", "sweep", "benchmark", "finetune-batch", "lut"}
"""Commands that go on where they stopped."""
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")

log = logging.getLogger("vss")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: files that are being written are removed on the way out."""


class Commands(TyperGroup):
    """The commands, whose every end is one of those above."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, word in zip(["vss", *args], args, strict=False):
            if not word or re.fullmatch(r"--[\w-]+=", word):
                raise typer.BadParameter(
                    f"{word[:-1] or before} is followed by nothing; give a value, or leave it off."
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with terminable():
                return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, typer.Abort) or type(error).__module__.startswith(("typer.", "click.")):
                raise  # usage, which has a text and code of its own
            raise SystemExit(say_end(error, str(ctx.invoked_subcommand or ""))) from None


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` in here."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def terminate(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a forked child has nothing to tidy up
            os._exit(TERMINATED)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say_end(error: BaseException, command: str) -> int:
    """Say why a command ended; its exit code."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more
        return UNREAD
    log.debug("the whole story:", exc_info=error)
    if isinstance(error, KeyboardInterrupt):
        kept = [*getattr(error, "__notes__", ()), *["the same command goes on from here"] * (command in RESUMES)]
        tell(err, "interrupted:" if kept else "interrupted", "yellow", "; ".join(kept))
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    if isinstance(error, VssError):
        tell(err, "failed:" if isinstance(error, GateFailed) else "error:", "red", error)
        return error.exit_code
    sentence = _sentence(error)
    if sentence:
        tell(err, "error:", "red", sentence)
        return VssError.exit_code
    tell(err, "fault:", "red", "".join(traceback.format_exception(error)).rstrip())
    tell(
        err, "fault:", "red", "this is a fault of vss, not of what you gave it; please report it with the lines above."
    )
    return BUG


def _sentence(error: BaseException) -> str:
    """What the machine or the input could not give, in words; empty for a fault of our own."""
    text = one_line(str(error))
    if isinstance(error, OSError):
        where = f"{shown(str(error.filename))}: " if error.filename else ""
        return f"{where}{error.strerror or text}; name another file or folder, free space, or change its permissions."
    if isinstance(error, MemoryError) or any(part in text.lower() for part in NO_MEMORY):
        return f"there is not enough memory ({text or 'MemoryError'}); choose a smaller batch or image size."
    if isinstance(error, RecursionError):
        return "what was read is nested too deeply, or the network is; make it flatter."
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("vss"):
        return f"this needs the package {error.name}, which is not installed; `vss doctor` says how to get it."
    if isinstance(error, UnicodeError):
        return f"a name or text is no UTF-8 ({text}); rename the file, or write it again as UTF-8."
    return ""
