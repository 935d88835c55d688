"""What commands print: tables, steps, gates, sentences, and figures as JSON."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from rich import box
from rich.console import Console
from rich.control import Control
from rich.table import Table
from rich.text import Text

log = logging.getLogger("vss")
WIDE = 160
"""Columns of a file or pipe, which has no width of its own: no table is squeezed there."""
COLUMNS = {
    "name": "network",
    "params_m": "params M",
    "macs_g": "MACs G",
    "miou_pct": "mIoU %",
    "ap_pct": "AP %",
    "fnr_pct": "FNR %",
    "f1_pct": "F1 %",
    "latency_ms_p50": "p50 ms",
    "speedup": "speed-up",
    "speedup_per_mac_reduction": "per MAC cut",
    "size_mib": "MiB",
    "labels": "note",
}
GATE_WORDS = {True: ("passed", "green"), False: ("failed", "red"), None: ("not judged", "yellow")}
STEP_COLOURS = {"ok": "green", "failed": "red", "not passed": "red", "skipped": "cyan"}


class Screen(Console):
    """A console whose lines also go to the file of `--log`."""

    copy: ClassVar[Console | None] = None

    def print(self, *objects: Any, **settings: Any) -> None:
        super().print(*objects, **settings)
        if self.copy and not all(isinstance(thing, Control) for thing in objects):  # a control moves a bar's cursor
            self.copy.print(*objects, **settings)
            self.copy.file.flush()

    def on_broken_pipe(self) -> None:
        """Nobody reads the output any more: an end like that by SIGPIPE."""
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise SystemExit(128 + signal.SIGPIPE) from None


out, err = (
    Screen(stderr=stderr, markup=False, width=None if stream.isatty() else WIDE)
    for stderr, stream in ((False, sys.stdout), (True, sys.stderr))
)


def set_output(*, verbose: bool = False, quiet: bool = False, file: Path | None = None) -> None:
    """How much is printed, and whether to a file too."""
    logging.getLogger().setLevel(logging.WARNING if quiet else logging.INFO)
    log.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    Screen.copy = None
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        Screen.copy = Console(file=file.open("a"), markup=False, width=WIDE)
        Screen.copy.print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {command_line()}", soft_wrap=True)


def command_line() -> str:
    return "vss " + shlex.join(sys.argv[1:])


def bars() -> bool:
    return out.is_terminal and log.isEnabledFor(logging.INFO)


def print_table(rows: list[dict[str, Any]], columns: dict[str, str], title: str = "") -> None:
    """Rows under the heads of those columns that any row has."""
    table = Table(title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1))
    used = {key: head for key, head in columns.items() if any(row.get(key) is not None for row in rows)}
    for key, head in used.items():
        right = any(isinstance(row.get(key), int | float) for row in rows)
        table.add_column(head, justify="right" if right else "left", no_wrap=key == "name")
    for row in rows:
        values = (row.get(key) for key in used)
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else "" if v is None else str(v) for v in values))
    out.print(table)


def print_tagged(console: Console, tag: str, colour: str, text: object) -> None:
    """A coloured word and a text, whose own brackets are only brackets."""
    console.print(Text.assemble((tag, colour), " ", str(text)), soft_wrap=True)


def print_gates(gate: Mapping[str, Any]) -> None:
    """Every gate by its name, with figures, interval and limit, also where nothing judged it."""
    for check in gate.get("checks") or [gate]:
        word, colour = GATE_WORDS[check["passed"]]
        sentence = check["sentence"].removeprefix(f"{word}: ")
        text = f"gate {check['what']}: {sentence}" if check.get("what") else sentence
        print_tagged(out, f"{word:>10}", colour, text)


def print_open(report: Mapping[str, Any]) -> None:
    """What the page of a run whose gates passed calls not settled, and somebody has to decide."""
    from vss.run.page import judged

    found = judged(report)
    for reason in found.reasons if found.tone == "warn" else []:
        print_tagged(out, "not settled:", "yellow", reason)


def print_step(name: str, status: str, seconds: float, detail: str) -> None:
    """One step of a run; those that went well are left out under `--quiet`."""
    if status in ("ok", "skipped") and not log.isEnabledFor(logging.INFO):
        return
    text = f"{name:<20} {seconds:7.1f} s  {detail}"
    print_tagged(out, f"{status:>12}", STEP_COLOURS.get(status, "yellow"), text)
    out.file.flush()  # a log file has every step when it ends


def write_figures(report: Path | None, kind: str, figures: dict[str, Any]) -> None:
    """Write the figures of a command, with its environment, where `--report` asks for it."""
    if report:
        from vss import ops
        from vss.core.environment import environment
        from vss.core.files import write_json

        about = environment() | {"ops": ops.status()}
        write_json(report, {"kind": kind, "schema": 1, "environment": about, **figures})
        out.print(f"wrote {report}")
