"""The frame of `bench_latency.py`, and its parts that need no data: alignment, planted causes."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vss import models
from vss.core.errors import VssError
from vss.core.files import write_json
from vss.data import Preprocess
from vss.deploy import Session, export
from vss.deploy.profile.build import Effort, build
from vss.deploy.profile.setting import Setting
from vss.deploy.profile.subject import open_subject
from vss.prune import Budget, Plan, apply_plan, make_plan
from vss.run.latency import LatencyGoal, correct, measure

ROOT = Path(__file__).resolve().parent.parent
NOISE, SECONDS = 0.02, 60.0  # most that a measurement takes to be that sure; on a quiet machine it takes less
TABLE = Effort(vectors=2, coarse=24, batch=12, limit=60, tests=30, cliffs=1)
SCAN = Effort(vectors=2, coarse=0, limit=0, tests=0, cliffs=0)
CUTS = [(scope, keep) for scope in ("local", "global") for keep in (0.5, 0.25)]
LOG = logging.getLogger("bench_latency")


@dataclass
class Bench:
    """The arguments, and what is known so far; `once` computes what is not."""

    arguments: argparse.Namespace
    result: dict[str, Any]
    path: Path

    @property
    def threads(self) -> int:
        return len(self.arguments.cores)

    def setting(self, options: dict[str, Any]) -> Setting:
        """Where everything runs."""
        asked = self.arguments
        return Setting(asked.backend, asked.device, asked.engine_precision, self.threads, options=options)

    @property
    def effort(self) -> Effort:
        small = Effort(vectors=1, coarse=10, batch=10, limit=20, error=0.05, tests=5, cliffs=0)
        return small if self.arguments.quick else TABLE

    @property
    def limits(self) -> dict[str, Any]:
        """Noise that is allowed, and seconds of one measurement."""
        return (
            {"noise": 0.9, "max_seconds": 3.0, "iterations": 2}
            if self.arguments.quick
            else {"noise": NOISE, "max_seconds": SECONDS}
        )

    def once(self, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What an earlier run found, or what `work` finds now; a refusal (too noisy) is told, and left to the next."""
        if key not in self.result["done"]:
            try:
                value = work()
            except VssError as error:
                LOG.info("%s: %s", key, error)
                return None
            self.result["done"][key] = value | {"cores": self.arguments.cores}
            write_json(self.path, self.result)
            LOG.info("%s", json.dumps({key: value})[:1500])
        found: dict[str, Any] = self.result["done"][key]
        return found


# -- alignment ------------------------------------------------------------------------------------------------------


def alignment(run: Bench) -> None:
    """Speed-up over MAC reduction of a plain L1 cut, at every width and in the discovered step; random weights."""
    quick = run.arguments.quick
    name, size = ("unet", (48, 64)) if quick else ("fcn_resnet50", (180, 240))
    torch.manual_seed(0)
    model, preprocess = models.build(name, 11, **({"width": 16} if quick else {})).eval(), Preprocess(size=size)
    path = run.arguments.out / f"scan-{name}.json"
    options = {"labels": True}
    setting = run.setting(options)
    effort = replace(SCAN, vectors=1) if quick else SCAN
    with tempfile.TemporaryDirectory() as folder:
        table = build(open_subject(model, Path(folder), preprocess, setting), path, effort=effort, progress=told)
    run.once("alignment", lambda: {"network": name, "size": list(size), "step": table.step, "costs": table.alignment})
    for scope, keep in CUTS[:1] if quick else CUTS:
        for align in dict.fromkeys((1, table.step)):
            budget = {"kind": "macs", "keep": keep, "scope": scope, "align": align}

            def work(budget: dict[str, Any] = budget) -> dict[str, Any]:
                return budget | efficiency(run, model, preprocess, Budget(**budget), options)

            run.once(f"alignment {scope} {keep} {align}", work)


def efficiency(
    run: Bench, model: nn.Module, preprocess: Preprocess, budget: Budget, options: dict[str, Any]
) -> dict[str, Any]:
    """One cut, in turns with the uncut network."""
    plan = make_plan(model, torch.zeros(1, 3, *preprocess.size), criterion="l1", budget=budget)
    setting = run.setting(options)
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, each in (("uncut", model), ("cut", apply_plan(model, plan))):
            sessions[name] = opened(setting, each, preprocess, Path(folder) / name)
        feed = {"image": torch.randint(0, 256, (1, *preprocess.size, 3), dtype=torch.uint8).numpy()}
        seconds = 3 * run.limits["max_seconds"]
        seen = measure(sessions["uncut"], sessions["cut"], feed, seconds, run.limits["noise"])
    reduction = plan.cost_before["macs"] / plan.cost_after["macs"]
    found = {"mac_reduction": reduction, "speedup": 1 / seen.ratio, "uncut_ms": seen.uncut_ms, "ms": seen.ms}
    return found | {"low": 1 / seen.high, "high": 1 / seen.low, "speedup_per_mac_reduction": 1 / seen.ratio / reduction}


def opened(setting: Setting, model: nn.Module, preprocess: Preprocess, stem: Path) -> Session:
    """A network as it runs in a setting."""
    if setting.backend == "torch":
        return setting.module(model, preprocess)
    path = stem.with_suffix(".onnx")
    export(model, path, size=preprocess.size, preprocess=preprocess, parity_batches=(1,), **setting.options)
    return setting.engine(path, stem)


# -- explain --------------------------------------------------------------------------------------------------------


def explain(run: Bench) -> None:
    """What `vss explain` says of a width of 51, a network that is mostly resize, and a run on one of several cores."""
    sys.path.insert(0, str(ROOT))
    from tests.run.test_explain import Line, engines
    from vss.run.explain import measure as facts_of
    from vss.run.explain import summary

    seconds = 0.2 if run.arguments.quick else 1.0
    cases: dict[str, tuple[nn.Module, list[int], tuple[int, int], bool, int]] = {
        "width 51": (Line([64, 64, 64, 64]).eval(), [48, 51, 56, 64], (64, 64), True, run.threads),
        "resize": (Line([32, 32, 32], classes=24, factor=8).eval(), [16, 16, 16], (128, 128), False, run.threads),
        "one thread": (Line([64, 64, 64, 64]).eval(), [32, 32, 32, 32], (128, 128), True, 1),
    }
    for name, (net, kept, size, labels, threads) in cases.items():

        def work(name: str = name) -> dict[str, Any]:
            net, kept, size, labels, threads = cases[name]
            if name == "one thread" and (run.threads < 2 or run.setting({}).on_gpu):
                raise VssError("a run on one of several cores needs two, of a CPU: give --cores 0,1.")
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "engine").mkdir()
                before, after, plan = engines(net, kept, size, Path(folder), labels)  # type: ignore[arg-type]
                setting = replace(run.setting({}), threads=threads)
                said = summary(facts_of(before, after, plan, setting, seconds=seconds))
            rows = [
                {k: row[k] for k in ("unit", "cin", "cout", "ms_after", "reason", "better")} for row in said["rows"]
            ]
            return {"threads": threads, "causes": said["causes"], "rows": rows[:6]}

        run.once(f"explain {name}", work)


def told(done: int, most: int, left: float) -> None:
    """Progress of a table."""
    if done % 20 == 0:
        LOG.info("table: %d readings of at most %d, at most %.0f s left", done, most, left)


def iso_latency_baseline(
    goal: LatencyGoal, ratio: float, plan_of: Callable[[float], Plan]
) -> tuple[Plan, list[dict[str, float]]]:
    """A plan of another budget (`plan_of`: fraction kept -> plan) whose engine takes `ratio` of the uncut time.

    Returns:
        The plan measured nearest to the ratio, and what was tried: `keep`, the figures of `Measured`, `off`
        (relative distance of the ratio from the wanted one), the nearest last.
    """
    settings = goal.config.latency
    assert settings is not None
    keep, rows, plans = ratio, list[dict[str, float]](), list[Plan]()
    with (
        tempfile.TemporaryDirectory() as name,
        goal.setting.held(),
        goal.engine(goal.model, Path(name) / "uncut") as uncut,
    ):
        while len(rows) < settings.iterations:
            plans.append(plan_of(min(keep, 1.0)))
            small = apply_plan(goal.model, plans[-1], check_weights=False)
            with goal.engine(small, Path(name) / f"{len(rows)}") as cut:
                seen = measure(uncut, cut, goal.feed(uncut), settings.max_seconds, settings.noise)
            rows.append({"keep": min(keep, 1.0), **asdict(seen), "off": abs(seen.ratio / ratio - 1)})
            LOG.info("kept %.3f: %.3fx of the uncut (wanted %.3fx)", keep, seen.ratio, ratio)
            if rows[-1]["off"] <= settings.tolerance or plans[-1].widths() in [p.widths() for p in plans[:-1]]:
                break
            keep = correct(keep, seen.ratio, ratio, [(row["keep"], row["ratio"]) for row in rows])
    order = sorted(range(len(rows)), key=lambda index: -rows[index]["off"])
    return plans[order[-1]], [rows[index] for index in order]
