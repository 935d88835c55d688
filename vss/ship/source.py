"""Where a bundle comes from: the folder of a finished `vss run`, read from its report and checked against it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vss.data.transforms import Preprocess
from vss.errors import VssError, unknown
from vss.files import sha256_file
from vss.report import read_report

DEFAULT_ROW = "engine pruned"


@dataclass(frozen=True)
class Source:
    """One engine of a run.

    Attributes:
        run: folder of the run.
        row: the row of the report that is shipped.
        report: the checked report.
        backend: name of the runtime.
        spec: `BuildSpec` as a dictionary.
        files: role -> existing file: "onnx", "engine", "scores", and where there are any "calibration", "plugins".
        gate: the verdicts on this engine; empty when nothing judged it.
        preprocess: the run's preprocessing.
    """

    run: Path
    row: str
    report: dict[str, Any]
    backend: str
    spec: dict[str, Any]
    files: dict[str, Path]
    gate: list[dict[str, Any]]
    preprocess: Preprocess

    @property
    def metrics(self) -> dict[str, Any]:
        """The row's figures."""
        rows = [row for row in self.report["rows"] if row["name"] == self.row]
        return {key: value for key, value in rows[0].items() if key != "name"} if rows else {}


def open_run(run: Path, row: str | None = None) -> Source:
    """Read the report of a run and check the files it names.

    Raises:
        VssError: no finished report, no such engine, or files that changed since the report was written.
    """
    report = read_report(run / "report.json")
    if report["status"] != "ok":
        raise VssError(f"the run in {run} did not finish; run it again to its end, then ship it.")
    artefacts = report.get("artefacts", {})
    if not artefacts:
        raise VssError(f"{run}/report.json names no engines; run the recipe again (finished steps are kept).")
    row = row or DEFAULT_ROW
    if row not in artefacts:
        raise unknown("engine of this run", row, artefacts)
    built = artefacts[row]
    files = {role: run / name for role, name in built["files"].items()}
    for role, path in files.items():
        if not path.is_file():
            raise VssError(f"{path} ({role} of {row!r}) does not exist; run the recipe again to make it.")
        if sha256_file(path) != built["sha256"].get(role):
            raise VssError(f"{path} is not the file that the report was made with; run the recipe again.")
    # The gate of a run judges its pruned engine; a check that judges another one names it.
    gates = [check for check in report.get("gate", {}).get("checks", []) if check.get("engine", DEFAULT_ROW) == row]
    return Source(run, row, report, built["backend"], built["spec"], files, gates, _preprocess(run, report))


def _preprocess(run: Path, report: dict[str, Any]) -> Preprocess:
    made = Preprocess(size=tuple(report["recipe"]["data"]["size"]))
    if made.sha256 != report["inputs"].get("preprocess"):
        raise VssError(
            f"{run}/report.json was made with another preprocessing than this version of vss has; run again."
        )
    return made
