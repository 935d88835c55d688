"""What the commands share: flags, recipes from flags, tables, figures as JSON, progress lines."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich import box
from rich.console import Console
from rich.control import Control
from rich.table import Table
from rich.text import Text

from vss.core.config import load_recipe
from vss.core.errors import VssError, shown
from vss.core.files import target_of
from vss.core.yaml12 import Override, assignment

STREAMS = ((False, sys.stdout), (True, sys.stderr))

log = logging.getLogger("vss")


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


def listen(*, verbose: bool = False, quiet: bool = False, file: Path | None = None) -> None:
    """How much is said, and whether into a file too."""
    logging.getLogger().setLevel(logging.WARNING if quiet else logging.INFO)
    log.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    Screen.copy = None
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        Screen.copy = Console(file=file.open("a"), markup=False, width=WIDE)
        Screen.copy.print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} vss {shlex.join(sys.argv[1:])}", soft_wrap=True)


def bars() -> bool:
    """Whether progress bars are drawn."""
    return out.is_terminal and log.isEnabledFor(logging.INFO)


WIDE = 160
# A file or pipe has no width of its own: wide enough there that no table is squeezed.
out, err = (Screen(stderr=stderr, markup=False, width=None if stream.isatty() else WIDE) for stderr, stream in STREAMS)

Set = Annotated[list[str] | None, typer.Option("--set", help="a.b=value, any key of the recipe", metavar="KEY=VALUE")]
Data = Annotated[str | None, typer.Option("--dataset", help="camvid, cityscapes, ksdd2, masks")]
Root = Annotated[str | None, typer.Option("--data-root", help="folder of the data set")]
Mean = Annotated[str | None, typer.Option("--mean", help="of a foreign engine's images, 0..1", metavar="R,G,B")]
Std = Annotated[str | None, typer.Option("--std", help="of a foreign engine's images, 0..1", metavar="R,G,B")]
MAX_SIDE = 16384  # pixels
Save = Annotated[Path, typer.Option("--save", help="folder or file to write")]
Ckpt = Annotated[Path, typer.Option("--ckpt", help="a .safetensors checkpoint")]
Size = Annotated[str | None, typer.Option("--input-size", help="H,W", metavar="H,W")]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="start from this recipe")]
Epochs = Annotated[int | None, typer.Option("--epochs")]
Batch = Annotated[int | None, typer.Option("--batch-size")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=2**32 - 1)]
Level = Annotated[int | None, typer.Option(min=0, max=5, help="tensorrt: optimisation level, 0 to 5")]
Workspace = Annotated[int | None, typer.Option(min=1, max=1 << 20, help="tensorrt: scratch memory of a layer")]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", help="write the figures as JSON", callback=lambda path: path and target_of(path) and path),
]
Split = Annotated[str, typer.Option("--split", help="train, val or test")]

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


def recipe_of(name: str | None, overrides: Iterable[Override] | None, **flags: Any) -> Any:
    """A recipe from a name, flags (dotted with __) and --set overrides, in that order."""
    given = {key.replace("__", "."): value for key, value in flags.items() if value is not None}
    return load_recipe(name, [*given.items(), *(overrides or [])])


def refuse_given(ctx: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse a flag that stands on the command line and that nothing would read: `why` it is for something else."""
    for param in ctx.command.params:
        source = ctx.get_parameter_source(param.name or "")
        if param.name in names and source is not None and source.name == "COMMANDLINE":
            raise VssError(f"{param.opts[0]} {why}; leave it off.")


def size_of(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        height, width = (int(part) for part in text.lower().replace("x", ",").split(","))
    except ValueError as error:
        raise VssError(f"--input-size takes H,W (for example 360,480) and got {shown(text)}.") from error
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise VssError(f"--input-size is {shown(text)}; expected a height and a width from 1 to {MAX_SIDE}.")
    return [height, width]


def statistics_of(mean: str | None, std: str | None) -> dict[str, list[float]] | None:
    """{"mean", "std"} of --mean and --std, each R,G,B in units of 0..1."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise VssError("--mean and --std go together; give both.")
    values = {}
    for flag, text in (("mean", mean), ("std", std)):
        try:
            values[flag] = [float(part) for part in text.split(",")]
        except ValueError as error:
            raise VssError(f"--{flag} takes R,G,B (0.485,0.456,0.406) and got {shown(text)}.") from error
        low = 0 if flag == "mean" else 1e-6
        if len(values[flag]) != 3 or not all(low <= value <= 1 for value in values[flag]):
            raise VssError(f"--{flag} is {shown(text)}; expected three numbers from {low:g} to 1, in units of 0..1.")
    return values


def cores_of(text: str | None) -> list[int] | None:
    """Numbers of processor cores, 0,1."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise VssError(f"--cores takes numbers with commas between (0,1) and got {text!r}.") from error


def options_of(pairs: list[str] | None) -> dict[str, Any] | None:
    given = [assignment(pair, "--option") for pair in pairs or []]
    names = [name for name, _ in given]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise VssError(f"option {twice!r} is given twice; give it once.")
    return dict(given) or None


def write_figures(report: Path | None, kind: str, figures: dict[str, Any]) -> None:
    if report:
        from vss import ops
        from vss.core.environment import environment
        from vss.core.files import write_json

        about = environment() | {"ops": ops.status()}
        write_json(report, {"kind": kind, "schema": 1, "environment": about, **figures})
        out.print(f"wrote {report}")


def show_table(rows: list[dict[str, Any]], columns: dict[str, str], title: str = "") -> None:
    table = Table(title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1))
    used = {key: head for key, head in columns.items() if any(row.get(key) is not None for row in rows)}
    for key, head in used.items():
        table.add_column(
            head,
            justify="right" if any(isinstance(row.get(key), int | float) for row in rows) else "left",
            no_wrap=key == "name",
        )
    for row in rows:
        table.add_row(*(show(row.get(key)) for key in used))
    out.print(table)


def show(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


def budget_of(
    global_ratio: float | None,
    local_ratio: float | None,
    macs: float | None,
    params: float | None,
    latency: str | None = None,
) -> dict[str, Any]:
    given = [
        ("--global-ratio", global_ratio, "channels", "global"),
        ("--local-ratio", local_ratio, "channels", "local"),
        ("--macs", macs, "macs", "global"),
        ("--params", params, "params", "global"),
    ]
    chosen = [item for item in given if item[1] is not None]
    if len(chosen) + (latency is not None) != 1:
        raise VssError("give exactly one of --global-ratio, --local-ratio, --macs, --params and --latency.")
    if latency is not None:
        return {}
    flag, given_value, kind, scope = chosen[0]
    value = float(given_value or 0.0)
    if kind == "channels":
        if not 0 <= value < 1:
            raise VssError(f"{flag} is {value}; expected a fraction to remove, at least 0 and below 1.")
        value = 1 - value
    elif not 0 < value <= 1:
        raise VssError(f"{flag} is {value}; expected a fraction to keep, above 0 and at most 1.")
    return {"kind": kind, "scope": scope, "keep": value}


def latency_of(target: str | None, lut: Path | None, dry_run: bool) -> dict[str, Any]:
    """The section `prune.latency` of the flags."""
    if target is None:
        if lut:
            raise VssError("--lut is the table of --latency; give both.")
        return {}
    if dry_run:
        raise VssError("--latency builds and measures engines, which is no dry run; leave --dry-run off.")
    return {"latency": {"target": target, "lut": str(lut) if lut else None}}


def tell(console: Console, tag: str, colour: str, text: object) -> None:
    """A coloured word and a text, whose own brackets are only brackets."""
    console.print(Text.assemble((tag, colour), " ", str(text)), soft_wrap=True)


def show_gates(gate: Mapping[str, Any]) -> None:
    """Every gate by its name, with figures, interval and limit; what nothing judged is told as well."""
    words = {True: ("passed", "green"), False: ("failed", "red"), None: ("not judged", "yellow")}
    for check in gate.get("checks") or [gate]:
        word, colour = words[check["passed"]]
        sentence = check["sentence"].removeprefix(f"{word}: ")
        tell(out, f"{word:>10}", colour, f"gate {check['what']}: {sentence}" if check.get("what") else sentence)


def say(name: str, status: str, seconds: float, detail: str) -> None:
    if status in ("ok", "skipped") and not log.isEnabledFor(logging.INFO):
        return
    colours = {"ok": "green", "failed": "red", "not passed": "red", "skipped": "cyan"}
    tell(out, f"{status:>12}", colours.get(status, "yellow"), f"{name:<20} {seconds:7.1f} s  {detail}")
    out.file.flush()  # a log file shows every step when it ends
