"""`sweep`: from a grid to a finished folder: shared stages, their trials, then latencies, pictures and the page.

Records are written as outcomes come; a trial that fails or loses its worker is tried again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from vss.core.config import Recipe
from vss.core.environment import environment
from vss.core.errors import VssError, duration
from vss.core.files import at_work, remove_leftovers, sha256_json, write_json
from vss.run import runner
from vss.run.page.sweep import write_chart, write_page
from vss.sweep import results
from vss.sweep.compare import read_results
from vss.sweep.executors import Executor, Settings
from vss.sweep.experiment import Experiment, Json, experiment
from vss.sweep.grid import REPEATS, Grid, Trial
from vss.sweep.store import Outcome, Store, Task

What = Literal["page", "plan", "start", "ok", "failed", "retry", "lost", "skipped"]
Kind = Literal["stage", "trial"]
Print = Callable[[What, str, str], None]
"""(what happened, id of the trial or shared stage, detail)."""
PICTURED = 6
"""Criteria (or variants) of one network that the pictures show."""


@dataclass
class Summary:
    """What a sweep came to: numbers of trials, and the failed ones with their reasons.

    `unmeasured` names what went wrong after the trials were done: a latency, a set of pictures. `took` has the seconds
    of every trial and shared stage that is done, measured; `waiting` counts those that are not; `seconds` is real time.
    """

    total: int = 0
    ok: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    workers: int = 1
    took: dict[Kind, list[float]] = field(default_factory=lambda: {"stage": [], "trial": []})
    waiting: dict[Kind, int] = field(default_factory=lambda: {"stage": 0, "trial": 0})

    def left(self) -> str:
        """Time left, from the mean of what is done; unknown as long as nothing of a kind that is left was done."""
        kinds = [kind for kind, count in self.waiting.items() if count]
        if not all(self.took[kind] for kind in kinds):
            return "unknown time"
        return duration(sum(mean(self.took[kind]) * self.waiting[kind] for kind in kinds) / self.workers)

    def sentence(self) -> str:
        missing = self.total - self.ok - self.skipped - len(self.failed)
        parts = [f"{self.ok} of {self.total} trials done"]
        parts += [f"{self.skipped} were done before"] if self.skipped else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"{missing} left"] if missing else []
        return ", ".join(parts) + f" in {self.seconds:.0f} s"


def sweep(
    grid: Grid,
    out: Path | str,
    *,
    settings: Settings | None = None,
    tell: Print = lambda *_: None,
    summary: Summary | None = None,
    extend: bool = False,
    command: str = "",
    mlflow: bool = False,
) -> Summary:
    """Do every trial of a grid that is not done yet; see `vss.sweep.store` for what is in `out` afterwards.

    Args:
        grid: what.
        out: folder; holds this sweep or nothing.
        settings: by whom.
        tell: called for everything that happens.
        summary: filled while the sweep goes on, for who interrupts it.
        extend: go on in a folder that holds another sweep; trials that both have are not repeated.
        command: how the sweep was started, for the report.
        mlflow: also write every trial as a run into `out/mlruns`.

    Raises:
        VssError: nothing can be run, or the disk is full; what is done stays.
    """
    work = experiment(grid.study, grid.plugins)
    settings, out = settings or Settings(), Path(out)
    trials = checked(grid.trials(), work, here=settings.executor == "local")
    about = {"command": command, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "environment": environment()}
    executor = settings.open()
    try:
        with at_work(out, deep=False):
            store = Store.make(out, grid, about=about, replace=extend)
            for part in ("cells", "shared"):
                remove_leftovers(out / part, deep=False)
            driver = Driver(store, executor, retries=settings.retries, tell=tell, summary=summary or Summary())
            driver.run(trials)
            tell("page", str(driver.finish(mlflow=mlflow)), "")
            return driver.summary
    finally:
        executor.close()


def checked(trials: list[Trial], work: Experiment, *, here: bool) -> list[Trial]:
    """The trials, those that can be known to be impossible with their `fault`; a `VssError` where all of them are."""
    known: dict[str, str] = {}
    found = []
    for trial in named(trials, work):
        fault = trial.fault
        if not fault:
            recipe = trial.recipe()
            key = sha256_json(work.preflight_inputs(recipe))
            if key not in known:
                known[key] = _fault(work.preflight, recipe, here=here)
            fault = known[key]
        found.append(replace(trial, fault=fault))
    require_some(found)
    return found


def require_some(trials: Sequence[Trial]) -> None:
    """Refuse trials that all have a fault."""
    if all(trial.fault for trial in trials):
        alike = len({trial.fault for trial in trials}) == 1
        more = "" if alike else f" ({trials[0].id}; the others have faults as well)"
        raise VssError(f"no trial of the sweep can be run: {trials[0].fault}{more}")


def named(trials: Iterable[Trial], work: Experiment) -> list[Trial]:
    """The trials, those that name what there is not, or what does not go together, with their `fault`."""
    return [replace(trial, fault=trial.fault or _fault(work.check, trial.recipe())) for trial in trials]


def _fault(check: Callable[..., None], recipe: Recipe, **options: object) -> str:
    try:
        check(recipe, **options)
    except VssError as error:
        return str(error)
    return ""


@dataclass
class _Stage:
    """A shared stage: the trials that wait for it, and what it returned."""

    name: str
    trials: list[Trial] = field(default_factory=list)
    shared: Json = field(default_factory=dict)


class Driver:
    """Hands the work of a sweep to an executor and keeps what comes back.

    Args:
        executor: not closed here.
        retries: how often a trial is tried again when it failed or its worker died.
    """

    def __init__(
        self,
        store: Store,
        executor: Executor,
        *,
        retries: int = 1,
        tell: Print = lambda *_: None,
        summary: Summary | None = None,
    ) -> None:
        self.store, self.executor, self.retries, self.tell = store, executor, retries, tell
        self.summary = summary or Summary()
        self.summary.workers = executor.slots
        self.experiment = store.experiment()
        self.stages: dict[str, _Stage] = {}
        self.queue: deque[tuple[_Stage, Trial | None]] = deque()
        self.running: dict[str, tuple[_Stage, Trial | None]] = {}
        self.attempts: dict[str, int] = {}
        self.contents: dict[str, str] = {}

    def run(self, trials: Iterable[Trial]) -> Summary:
        """Do all trials that have no record yet."""
        start = time.monotonic()
        try:
            for trial in trials:
                self.summary.total += 1
                self._admit(trial)
            count = sum(len(stage.trials) for stage in self.stages.values())
            self.summary.waiting.update({"stage": len(self.stages), "trial": count})
            self.tell("plan", "", f"{count} trials that share {len(self.stages)} trained networks or the like")
            self.queue.extend((stage, None) for stage in self.stages.values())
            while self.queue or self.running:
                while self.queue and len(self.running) < self.executor.slots:
                    self._submit(*self.queue.popleft())
                for outcome in self.executor.wait(0.5):
                    self._receive(outcome)
                self.summary.seconds = time.monotonic() - start
        finally:
            self.summary.seconds = time.monotonic() - start
        return self.summary

    def _admit(self, trial: Trial) -> None:
        """Into its stage, or out with its fault."""
        if trial.fault:
            self._fail(trial, "", trial.fault)
            return
        self.contents[trial.id] = sha256_json(runner.depends(trial.recipe(), "cell"))
        name = self.store.stage_of(trial)
        self.stages.setdefault(name, _Stage(name)).trials.append(trial)

    def _submit(self, stage: _Stage, trial: Trial | None) -> None:
        name = trial.id if trial else stage.name
        self.attempts[name] = self.attempts.get(name, 0) + 1
        self.running[name] = (stage, trial)
        self.tell("start", name, "")
        self.executor.submit(self._task("trial" if trial else "stage", name, stage.name, trial, shared=stage.shared))

    def _task(self, kind: Any, name: str, stage: str, trial: Trial | None, **more: Json) -> Task:
        grid = self.store.grid
        return Task(
            kind=kind,
            id=name,
            root=self.store.root.resolve(),
            experiment=grid.study,
            plugins=grid.plugins,
            threads=self.executor.threads,
            stage=stage,
            trial=trial.id if trial else "",
            recipe=trial.recipe().model_dump(mode="json") if trial else None,
            **more,
        )

    def _receive(self, outcome: Outcome) -> None:
        name = outcome.id
        stage, trial = self.running.pop(name)
        ok = outcome.status == "ok"
        final = ok or self.attempts[name] > self.retries
        if final:
            self._settle("trial" if trial else "stage", outcome.seconds if ok else None)
        if ok:
            self._keep(stage, trial, outcome) if trial else self._share(stage, outcome)
            return
        if outcome.full:
            raise VssError(
                f"{self.store.root} cannot take more ({outcome.error}); free some space and start again: "
                "what is done stays."
            )
        if not final:
            self.tell("lost" if outcome.status == "lost" else "retry", name, outcome.error)
            self.queue.appendleft((stage, trial))
            return
        for each in [trial] if trial else stage.trials:
            reason = outcome.error if trial else f"the stage that it shares failed ({name}): {outcome.error}"
            self._fail(each, self._key(stage, each), reason, outcome)
        if trial is None:
            self.summary.waiting["trial"] -= len(stage.trials)

    def _settle(self, kind: Kind, seconds: float | None) -> None:
        """One less to do; `seconds` that it took are a measure for the others."""
        self.summary.waiting[kind] -= 1
        if seconds is not None:
            self.summary.took[kind].append(seconds)

    def _share(self, stage: _Stage, outcome: Outcome) -> None:
        """A stage is done: its trials are next, less those that were done from the same before."""
        stage.shared = outcome.result
        self.store.keep_stage(stage.name, outcome.result)
        for trial in stage.trials:
            record = self.store.record(trial.id)
            if record and record["status"] == "ok" and record["key"] == self._key(stage, trial):
                self.summary.skipped += 1
                self._settle("trial", record["seconds"])
                self.tell("skipped", trial.id, "done before")
            else:
                self.queue.append((stage, trial))
        self.tell("ok", stage.name, "")

    def _keep(self, stage: _Stage, trial: Trial, outcome: Outcome) -> None:
        facts = {"attempts": self.attempts.pop(trial.id), "seconds": outcome.seconds, "share": stage.name}
        self.store.keep(trial, self._key(stage, trial), {"status": "ok", **facts, **outcome.result})
        self.summary.ok += 1
        row = outcome.result.get("row", {})
        metric = self.store.grid.metric or stage.shared.get("metric") or self.experiment.metric
        left = [f"about {self.summary.left()} left"] if self.summary.waiting["trial"] else []
        score = [f"{metric} {row[metric]:.2f}"] if row.get(metric) is not None else []
        self.tell("ok", trial.id, ", ".join(score + left))

    def _fail(self, trial: Trial, key: str, reason: str, outcome: Outcome | None = None) -> None:
        facts: Json = {"attempts": 0, "seconds": None, "log": None}
        if outcome:
            facts = {"attempts": self.attempts[outcome.id], "seconds": outcome.seconds, "log": outcome.id}
        self.store.keep(trial, key, {"status": "failed", "error": reason, **facts})
        self.summary.failed[trial.id] = reason
        self.tell("failed", trial.id, reason)

    def _key(self, stage: _Stage, trial: Trial) -> str:
        """Hash of all that a trial's result comes from."""
        return sha256_json([self.contents[trial.id], stage.shared.get("key"), stage.shared.get("score_key")])

    def finish(self, *, mlflow: bool = False) -> Path:
        """What follows when all trials are done; returns the page. `summary.unmeasured` has what could not be done."""
        store = self.store
        if self.experiment.times and store.grid.latency_seconds:
            self._measure()
        if self.experiment.times and store.grid.panels:
            self._picture()
        table = results.write(store)
        found = read_results(store.root)
        results.write_csv(found, store.root / "table.csv")
        write_chart(found, results.table(found), store.root / "chart.png")
        if mlflow:
            results.to_mlflow(store, found)
        return write_page(table, store.root / "report.html")

    def _measure(self) -> None:
        """Latency of every trial's network against its baseline, one trial after another; known ones are kept."""
        for trial in self._done():
            record = self.store.record(trial.id)
            if record is None or "latency_ms_p50" in record["row"]:
                continue
            outcome = self._alone("time", trial, {"seconds": self.store.grid.latency_seconds})
            if outcome.status != "ok":
                self._unmeasured(trial.id, f"its latency could not be measured: {outcome.error}")
                continue
            record["row"].pop("latency_spread_pct", None)
            record["row"] |= outcome.result
            self.store.keep(trial, record["key"], {k: v for k, v in record.items() if k not in ("id", "coords", "key")})
            self.tell("ok", trial.id, _latency(outcome.result))

    def _picture(self) -> None:
        """The same images through the first networks of every baseline; written to panels.json."""
        panels: list[Json] = []
        palette: list[Any] = []
        networks: dict[str, list[Trial]] = {}
        for trial in self._done():
            networks.setdefault(trial.coords.get("network", self.store.grid.name), []).append(trial)
        for network, trials in networks.items():
            repeat, budget = _repeat(trials[0]), trials[-1].coords.get("budget")
            same = [t for t in trials if (_repeat(t), t.coords.get("budget")) == (repeat, budget)]
            chosen = [{"id": trial.id, "title": _title(trial)} for trial in same[:PICTURED] or trials[:1]]
            extra = {"trials": chosen, "name": network, "panels": self.store.grid.panels}
            outcome = self._alone("pictures", trials[0], extra)
            if outcome.status != "ok":
                self._unmeasured(f"pictures of {network}", outcome.error)
                continue
            panels += outcome.result["panels"]
            palette = outcome.result.get("palette", palette)
        content = {"kind": "vss.sweep_panels", "schema": 1, "panels": panels, "palette": palette}
        write_json(self.store.root / "panels.json", content)

    def _unmeasured(self, name: str, reason: str) -> None:
        self.summary.unmeasured[name] = reason
        self.tell("failed", name, reason)

    def _done(self) -> Iterator[Trial]:
        for trial in self.store.trials():
            record = self.store.record(trial.id)
            if record is not None and record["status"] == "ok":
                yield trial

    def _alone(self, kind: str, trial: Trial, extra: Json) -> Outcome:
        """One task while nothing else runs."""
        self.executor.submit(self._task(kind, f"{kind}-{trial.id}", self.store.stage_of(trial), trial, extra=extra))
        while True:
            for outcome in self.executor.wait(0.5):
                if outcome.full:
                    raise VssError(f"the disk is full ({outcome.error}); free some space and start again.")
                return outcome


def _latency(result: Json) -> str:
    if "latency_ms_p50" in result:
        return f"{result['latency_ms_p50']:.2f} ms"
    spread = f"spread {result['latency_spread_pct']:.1f} %, " if "latency_spread_pct" in result else ""
    return f"latency left out: {spread}the machine is too noisy; the same command measures it again"


def _repeat(trial: Trial) -> list[str | None]:
    return [trial.coords.get(axis) for axis in REPEATS]


def _title(trial: Trial) -> str:
    named = [trial.coords[axis] for axis in ("criterion", "variant", "budget") if axis in trial.coords]
    return " · ".join(named) or trial.id
