"""The loop of a sweep: shared parts first, then their cells, with retries; records as they come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from vss.errors import VssError
from vss.files import sha256_json
from vss.progress import duration
from vss.sweep.grid import Cell
from vss.sweep.local import Executor
from vss.sweep.store import Store
from vss.sweep.study import Json

What = Literal["page", "cost", "start", "ok", "failed", "retry", "lost", "skipped"]
Tell = Callable[[What, str, str], None]
"""(what happened, id of the cell or shared part, detail)."""


@dataclass
class Summary:
    """What a sweep came to: numbers of cells, and the failed ones with their reasons.

    `unmeasured` names what went wrong after the cells were done: a latency, a set of pictures. `planned_s` is the
    estimate for all that is to be computed, `done_s` for what has been; `seconds` is real time.
    """

    total: int = 0
    ok: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    planned_s: float = 0.0
    done_s: float = 0.0

    @property
    def missing(self) -> int:
        """Cells that were not reached."""
        return self.total - self.ok - self.skipped - len(self.failed)

    def left(self) -> str:
        """Time left, at the pace so far."""
        return duration(self.seconds * (self.planned_s - self.done_s) / self.done_s) if self.done_s else "unknown"

    def sentence(self) -> str:
        """In words."""
        parts = [f"{self.ok} of {self.total} cells done"]
        parts += [f"{self.skipped} were done before"] if self.skipped else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"{self.missing} left"] if self.missing else []
        return ", ".join(parts) + f" in {self.seconds:.0f} s"


@dataclass
class _Part:
    """Cells that share."""

    name: str
    cells: list[Cell] = field(default_factory=list)
    shared: Json = field(default_factory=dict)
    cost: Json = field(default_factory=dict)


def drive(
    store: Store,
    cells: Iterable[Cell],
    executor: Executor,
    *,
    retries: int = 1,
    tell: Tell = lambda *_: None,
    summary: Summary | None = None,
) -> Summary:
    """Do all cells that have no record yet.

    Args:
        store: where.
        cells: which.
        executor: by whom; not closed here.
        retries: how often a cell is tried again when it failed or its worker died.
        tell: called for everything that happens.
        summary: filled while the sweep goes on, for who interrupts it.

    Raises:
        VssError: the disk is full; what is done stays.
    """
    return _Drive(store, executor, retries, tell, summary or Summary()).run(cells)


class _Drive:
    def __init__(self, store: Store, executor: Executor, retries: int, tell: Tell, summary: Summary) -> None:
        self.store, self.executor, self.retries, self.tell, self.summary = store, executor, retries, tell, summary
        self.study = store.study()
        self.parts: dict[str, _Part] = {}
        self.queue: deque[tuple[_Part, Cell | None]] = deque()
        self.running: dict[str, tuple[_Part, Cell | None]] = {}
        self.attempts: dict[str, int] = {}
        self.costs: dict[str, float] = {}

    def run(self, cells: Iterable[Cell]) -> Summary:
        start = time.monotonic()
        try:
            for cell in cells:
                self.summary.total += 1
                self.admit(cell)
            self.price()
            start = time.monotonic()
            self.queue.extend((part, None) for part in self.parts.values())
            while self.queue or self.running:
                while self.queue and len(self.running) < self.executor.slots:
                    self.submit(*self.queue.popleft())
                for outcome in self.executor.wait(0.5):
                    self.receive(outcome)
                self.summary.seconds = time.monotonic() - start
        finally:
            self.summary.seconds = time.monotonic() - start
        return self.summary

    def price(self) -> None:
        """Estimate every part by workers, one of those that differ in the seed alone; say what all of it will take."""
        alike: dict[str, list[_Part]] = {}
        for part in self.parts.values():
            share = self.study.share_of(part.cells[0].recipe())
            alike.setdefault(sha256_json([{**share, "seed": 0}, len(part.cells)]), []).append(part)
        waiting, asked = deque(parts[0] for parts in alike.values()), set[str]()
        costs: dict[str, Json] = {}
        while waiting or asked:
            while waiting and len(asked) < self.executor.slots:
                part = waiting.popleft()
                asked.add(f"cost-{part.name}")
                self.executor.submit(self.task("cost", f"cost-{part.name}", part))
            for outcome in self.executor.wait(0.5):
                asked.discard(outcome["id"])
                costs[outcome["id"].removeprefix("cost-")] = outcome.get("result", {})
        for parts in alike.values():
            for part in parts:
                self.plan(part, costs[parts[0].name])
        self.tell("cost", "", self.cost_sentence(all(costs.values())))

    def plan(self, part: _Part, cost: Json) -> None:
        """Expected seconds; cells that have an ok record are taken to be done."""
        self.costs[part.name] = cost.get("shared", 0.0)
        for cell, seconds in zip(part.cells, cost.get("cells", [0.0] * len(part.cells)), strict=True):
            record = self.store.record(cell.id)
            self.costs[cell.id] = 0.0 if record and record["status"] == "ok" else seconds
        if self.store.has_share(part.name):
            self.costs[part.name] = 0.0
        self.summary.planned_s += self.costs[part.name] + sum(self.costs[cell.id] for cell in part.cells)

    def cost_sentence(self, known: bool) -> str:
        cells = sum(len(part.cells) for part in self.parts.values())
        head = f"{cells} cells that share {len(self.parts)} trained networks or the like"
        if not known:
            return f"{head}; what they cost is not known: a first step could not be timed, see logs/cost-*.log"
        total = self.summary.planned_s
        each = duration(total / min(self.executor.slots, max(1, cells)))
        return f"{head}: about {duration(total)} of computing, {each} with {self.executor.slots} workers"

    def admit(self, cell: Cell) -> None:
        """Into its part, or out with its fault."""
        fault = cell.fault
        try:
            if not fault:
                self.study.check(cell.recipe())
        except VssError as error:
            fault = str(error)
        if fault:
            self.fail(cell, "", fault, {})
            return
        part = self.parts.setdefault(self.store.share(cell), _Part(self.store.share(cell)))
        part.cells.append(cell)

    def submit(self, part: _Part, cell: Cell | None) -> None:
        name = cell.id if cell else part.name
        self.attempts[name] = self.attempts.get(name, 0) + 1
        self.running[name] = (part, cell)
        self.tell("start", name, "")
        self.executor.submit(self.task("cell" if cell else "share", name, part, cell))

    def task(self, kind: str, name: str, part: _Part, cell: Cell | None = None) -> Json:
        return {
            "kind": kind,
            "id": name,
            "share": part.name,
            "root": str(self.store.root.resolve()),
            "study": self.store.grid.study,
            "plugins": list(self.store.grid.plugins),
            "recipe": cell.recipe().model_dump(mode="json") if cell else None,
            "shared": part.shared if cell else {},
            "threads": self.executor.threads,
        }

    def receive(self, outcome: Json) -> None:
        name = outcome["id"]
        part, cell = self.running.pop(name)
        final = outcome["status"] == "ok" or self.attempts[name] > self.retries
        self.summary.done_s += self.costs.pop(name, 0.0) if final else 0.0
        if outcome["status"] == "ok":
            self.finish(part, cell, outcome)
            return
        if outcome.get("full"):
            raise VssError(
                f"{self.store.root} cannot take more ({outcome['error']}); free some space and start again: "
                "what is done stays."
            )
        if not final:
            self.tell("lost" if outcome["status"] == "lost" else "retry", name, outcome["error"])
            self.queue.appendleft((part, cell))
            return
        for each in [cell] if cell else part.cells:
            reason = outcome["error"] if cell else f"the part that it shares failed ({name}): {outcome['error']}"
            self.fail(each, self.key(part, each), reason, outcome, log=name)
        part.cells = part.cells if cell else []

    def finish(self, part: _Part, cell: Cell | None, outcome: Json) -> None:
        if cell is None:
            part.shared = outcome["result"]
            self.store.keep_share(part.name, outcome["result"])
            for each in part.cells:
                if self.store.done(each, self.key(part, each)):
                    self.summary.skipped += 1
                    self.tell("skipped", each.id, "done before")
                else:
                    self.queue.append((part, each))
            part.cells = []
            self.tell("ok", part.name, "")
            return
        facts = {"attempts": self.attempts.pop(cell.id), "seconds": outcome["seconds"], "share": part.name}
        self.store.keep(cell, self.key(part, cell), {"status": "ok", **facts, **outcome["result"]})
        self.summary.ok += 1
        row = outcome["result"].get("row", {})
        metric = self.store.grid.metric or part.shared.get("metric") or self.study.metric
        self.tell("ok", cell.id, f"{metric} {row[metric]:.2f}" if row.get(metric) is not None else "")

    def fail(self, cell: Cell, key: str, reason: str, outcome: Json, log: str = "") -> None:
        facts = {"attempts": self.attempts.get(log, 0), "seconds": outcome.get("seconds"), "log": log or None}
        self.store.keep(cell, key, {"status": "failed", "error": reason, **facts})
        self.summary.failed[cell.id] = reason
        self.tell("failed", cell.id, reason)

    def key(self, part: _Part, cell: Cell) -> str:
        """Hash of all that a cell's result comes from."""
        return sha256_json([cell.recipe().model_dump(mode="json"), part.shared.get("key")])
