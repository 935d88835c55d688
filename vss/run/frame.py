"""The head of a run's report: what was asked, where, with which files; and the report of a run that failed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

from vss import ops
from vss.core.config import Recipe
from vss.core.environment import environment
from vss.core.errors import GateFailed, VssError
from vss.core.files import sha256_file
from vss.core.report import read_report, write_report
from vss.run.page import write_page
from vss.run.project import Project
from vss.run.runner import Result, Runner


class Job(Protocol):
    """What is used of a run."""

    project: Project
    out: Path
    step: Runner
    command: str

    @property
    def recipe(self) -> Recipe: ...


def frame(job: Job, status: str) -> Result:
    """Everything of a report but its results; `status` is "ok" or "failed"."""
    preprocess = job.project.preprocess
    files = ("baseline.safetensors", "plan.json", "finetuned.safetensors", "engine/finetuned.onnx")
    hashes = {name: sha256_file(job.out / name) for name in files if (job.out / name).is_file()}
    hashes["preprocess"] = preprocess.sha256
    protocol, size = job.project.task.protocol.rstrip("."), "x".join(map(str, preprocess.size))
    notes = "".join(f" {note}." for note in (*_limited(job), *job.project.task.notes))
    return {
        "kind": "vss.report",
        "schema": 1,
        "name": job.recipe.name,
        "status": status,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": sum(record["seconds"] for record in job.step.records),
        "command": job.command or None,
        "protocol": f"{protocol}. Reported split: {job.recipe.split}; resolution {size}.{notes}",
        "environment": environment() | {"ops": ops.status()},
        "recipe": job.recipe.model_dump(mode="json"),
        "inputs": hashes,
        "steps": job.step.records,
    }


def _limited(job: Job) -> list[str]:
    """What `data.limit` left out, for whoever reads how many images a split has."""
    limit, project = job.recipe.data.limit, job.project
    if limit is None:
        return []
    used = ", ".join(f"{min(limit, len(pairs))} of {len(pairs)} {name}" for name, pairs in project.data.splits.items())
    return [f"data.limit {limit}: {used} images were used, evenly spread"]


def write_failed(job: Job, error: BaseException) -> None:
    """A report of what was done before the failure, so that the page says where it stopped.

    That of a finished run stays: it is replaced by a finished one alone.
    """
    stopped = isinstance(error, BrokenPipeError | GateFailed) or not isinstance(error, Exception)  # nothing failed
    if job.step.records and not stopped and not _finished(job.out / "report.json"):
        write_report(job.out / "report.json", frame(job, "failed"))
        write_page(job.out / "report.json", job.out / "report.html")


def _finished(report: Path) -> bool:
    try:
        return bool(read_report(report)["status"] == "ok")
    except VssError:
        return False
