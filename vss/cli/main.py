"""The commands in the order of a user's work, and how each ends: one sentence and an exit code.

0 done, 1 a gate failed, 2 bad input, 3 it could not be measured, 70 a fault of vss itself (with its traceback),
130 Ctrl-C, 141 nobody reads the output any more, 143 SIGTERM.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from typer.core import TyperGroup

from vss.cli import data as folders
from vss.cli import deploy, doctor, measure, ship, sweep, train
from vss.cli.console import err, out, print_tagged, set_output
from vss.core import __version__
from vss.core.errors import GateFailed, VssError, one_line, shown
from vss.core.registry import load_plugin

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
        with sentences(ctx):
            return self._checked(ctx, args)

    def _checked(self, ctx: Any, args: list[str]) -> list[str]:
        for before, word in zip(["vss", *args], args, strict=False):
            if not ctx.resilient_parsing and (not word or re.fullmatch(r"--[\w-]+=", word)):
                raise typer.BadParameter(
                    f"{word[:-1] or before} is followed by nothing; give a value, or leave it off."
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with sentences(ctx), terminable():
            return super().invoke(ctx)


@contextlib.contextmanager
def sentences(ctx: Any) -> Iterator[None]:
    """Whatever ends a command in here is printed; help and an end on purpose pass."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        own = type(error).__module__.startswith(("typer.", "click."))
        if own and (not hasattr(error, "format_message") or type(error).__name__ == "NoArgsIsHelpError"):
            raise
        raise SystemExit(print_end(error, str(ctx.invoked_subcommand or ""))) from None


@contextlib.contextmanager
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


def print_end(error: Any, command: str) -> int:
    """Print why a command ended; its exit code."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more
        return UNREAD
    log.debug("the whole story:", exc_info=error)
    if isinstance(error, KeyboardInterrupt):
        kept = [*getattr(error, "__notes__", ()), *["the same command goes on from here"] * (command in RESUMES)]
        print_tagged(err, "interrupted:" if kept else "interrupted", "yellow", "; ".join(kept))
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    if hasattr(error, "format_message"):  # of typer: a flag that is missing, unknown, or has no such value
        where = f" See {error.ctx.command_path} --help." if error.ctx else ""
        print_tagged(err, "error:", "red", f"{one_line(error.format_message()).rstrip('.')}.{where}")
        return VssError.exit_code
    if isinstance(error, VssError):
        print_tagged(err, "failed:" if isinstance(error, GateFailed) else "error:", "red", error)
        return error.exit_code
    sentence = _sentence(error)
    if sentence:
        print_tagged(err, "error:", "red", sentence)
        return VssError.exit_code
    blame = "this is a fault of vss, not of what you gave it; please report it with the lines above."
    print_tagged(err, "fault:", "red", "".join(traceback.format_exception(error)).rstrip())
    print_tagged(err, "fault:", "red", blame)
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
        what = shown(getattr(error, "object", "a name or text"))
        return f"{what} is no UTF-8 ({text}); rename the file, or write it again as UTF-8."
    return ""


HELP = "Make segmentation and surface-defect networks smaller, measure that they are faster, and ship them."
app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, help=HELP)
lut = typer.Typer(no_args_is_help=True, help="Build and show latency tables: measured times at many widths.")
lut.command("build")(measure.lut_build)
lut.command("show")(measure.lut_show)
data = typer.Typer(no_args_is_help=True, help="Check a data set, rewrite it, or generate one; draw the layouts.")
data.command("check")(folders.check)
data.command("import")(folders.import_)
data.command("layouts")(folders.layouts)
data.command("make")(folders.make)
data.command("view")(folders.view)
PANELS: dict[str, list[Callable[..., None] | tuple[str, typer.Typer]]] = {
    "Train": [folders.init, train.run, train.train, train.finetune],
    "Prune": [train.prune, train.methods, train.quality, ("lut", lut)],
    "Deploy": [deploy.export, deploy.calibrate, deploy.sensitivity, deploy.build, deploy.lint],
    "Measure": [
        *(measure.evaluate, measure.bench, measure.explain, measure.report),
        *(sweep.sweep, sweep.benchmark, sweep.finetune_batch, sweep.compare),
    ],
    "Ship": [ship.ship, ship.verify, ship.rebuild, ship.serve, ship.load],
    "Data and machine": [("data", data), doctor.doctor],
}
for _panel, _commands in PANELS.items():
    for _command in _commands:
        if isinstance(_command, tuple):
            app.add_typer(_command[1], name=_command[0], rich_help_panel=_panel)
        else:
            app.command(rich_help_panel=_panel)(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"vss {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _globals(
    plugin: Annotated[
        list[str] | None, typer.Option(help="module to import first: it registers networks, data sets or criteria")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="print more, and where an error came from")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print results and errors alone, no progress")] = False,
    log: Annotated[Path | None, typer.Option(help="file to append everything that is printed to")] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    set_output(verbose=verbose, quiet=quiet, file=log)
    for module in plugin or []:
        load_plugin(module)


def main() -> None:
    gc.set_threshold(10_000)  # at 700 a quarter of what torch takes to import and to export once is spent on looking
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)])
    for noisy in ("torch", "onnxscript", "onnx_ir", "lightning", "matplotlib", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    app(prog_name="vss")


if __name__ == "__main__":
    main()
