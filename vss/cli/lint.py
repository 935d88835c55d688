"""`vss lint`: what TensorRT would refuse or run badly in an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vss.cli.console import ReportFile, out, show_table, write_figures
from vss.core.errors import GateFailed

lint_app = typer.Typer()


@lint_app.command()
def lint(
    onnx: Annotated[Path, typer.Argument(help="an ONNX file, from here or from elsewhere")],
    plugin_op: Annotated[list[str] | None, typer.Option(help="a further op that a TensorRT plugin implements")] = None,
    report: ReportFile = None,
) -> None:
    """Check an ONNX file against TensorRT's rules, quantisation too; an error among the findings is exit code 1."""
    from vss.deploy import lint as judge

    found = judge.lint(onnx, plugins=(*judge.PLUGINS, *(plugin_op or [])))
    rows = judge.rows(found)
    errors = sum(finding.severity == "error" for finding in found)
    if rows:
        heads = {"rule": "rule", "severity": "severity", "node": "node", "detail": "what is there", "reason": "why",
                 "fix": "fix"}  # fmt: skip
        show_table([{"name": row["rule"], **row} for row in rows], heads)
    out.print(f"{onnx}: {errors} errors, {len(found) - errors} warnings")
    write_figures(report, "vss.lint", {"onnx": str(onnx), "errors": errors, "findings": rows})
    if errors:
        raise GateFailed(f"TensorRT would not build {onnx}: {found[0]}")
