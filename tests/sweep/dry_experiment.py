"""An experiment for tests: computes nothing, and fails, dies or waits where a trial's options say so."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.core.files import write_json
from vss.sweep import EXPERIMENTS, Experiment, TrialDirs


class DryExperiment(Experiment):
    """Trials say what happens to them in `model.options`."""

    metric = "score"

    def stage_inputs(self, recipe: Recipe) -> dict[str, Any]:
        return {"seed": recipe.seed}

    def check(self, recipe: Recipe) -> None:
        if recipe.model.options.get("impossible"):
            raise VssError("this trial is impossible.")

    def stage(self, recipes: list[Recipe], dirs: TrialDirs) -> dict[str, Any]:
        if recipes[0].data.root == "no-data":
            raise VssError("there is no data.")
        if not (dirs.folder / "done.json").is_file():
            write_json(dirs.folder / "done.json", {})
            dirs.computed("share", f"share {recipes[0].seed}")
        return {"key": str(recipes[0].seed), "row": {"score": 10.0}}

    def trial(self, recipe: Recipe, dirs: TrialDirs, shared: dict[str, Any]) -> dict[str, Any]:
        options = recipe.model.options
        tries = dirs.folder / "tries"
        dirs.folder.mkdir(parents=True, exist_ok=True)
        count = int(tries.read_text()) + 1 if tries.is_file() else 1
        tries.write_text(str(count))
        print(f"try {count} of {recipe.name}", flush=True)
        if count <= options.get("fails", 0):
            raise RuntimeError(f"broken on try {count}")
        if count <= options.get("dies", 0):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(options.get("seconds", 0.0))
        dirs.computed("cell", recipe.name)
        return {"row": {"score": 5.0 + recipe.seed, "threads": float(os.environ.get("OMP_NUM_THREADS", 0))}}


class TimedDryExperiment(DryExperiment):
    """The same with latencies, of which one cannot be measured."""

    times = True

    def time(self, recipe: Recipe, dirs: TrialDirs, seconds: float) -> dict[str, Any]:
        if recipe.model.options.get("untimed"):
            raise VssError("this machine has no clock.")
        ms = {"latency_ms_p50": 1.5, "baseline_latency_ms_p50": recipe.model.options.get("baseline_ms", 6.0)}
        return ms | {"speedup": 4.0, "macs_kept": 0.2}


if "dry" not in EXPERIMENTS:
    EXPERIMENTS.add("dry", DryExperiment())
    EXPERIMENTS.add("dry_timed", TimedDryExperiment())
