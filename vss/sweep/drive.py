"""The loop of a sweep: shared parts first, then their cells, with retries; records as they come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import mean
from typing import Literal

from vss.core.errors import VssError
from vss.core.files import sha256_json
from vss.core.progress import duration
from vss.run import runner as keys
from vss.sweep.grid import Cell
from vss.sweep.local import Executor
from vss.sweep.store import Store
from vss.sweep.study import Json

What = Literal["page", "plan", "start", "ok", "failed", "retry", "lost", "skipped"]
Kind = Literal["share", "cell"]
Tell = Callable[[What, str, str], None]
"""(what happened, id of the cell or shared part, detail)."""


@dataclass
class Summary:
    """What a sweep came to: numbers of cells, and the failed ones with their reasons.

    `unmeasured` names what went wrong after the cells were done: a latency, a set of pictures. `took` has the seconds
    of every cell and shared part that is done, measured; `waiting` counts those that are not; `seconds` is real time.
    """

    total: int = 0
    ok: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    workers: int = 1
    took: dict[Kind, list[float]] = field(default_factory=lambda: {"share": [], "cell": []})
    waiting: dict[Kind, int] = field(default_factory=lambda: {"share": 0, "cell": 0})

    @property
    def missing(self) -> int:
        """Cells that were not reached."""
        return self.total - self.ok - self.skipped - len(self.failed)

    def left(self) -> str:
        """Time left, from the mean of what is done; unknown as long as nothing of a kind that is left was done."""
        kinds = [kind for kind, count in self.waiting.items() if count]
        if not all(self.took[kind] for kind in kinds):
            return "unknown time"
        return duration(sum(mean(self.took[kind]) * self.waiting[kind] for kind in kinds) / self.workers)

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
        self.contents: dict[str, str] = {}
        self.summary.workers = executor.slots

    def run(self, cells: Iterable[Cell]) -> Summary:
        start = time.monotonic()
        try:
            for cell in cells:
                self.summary.total += 1
                self.admit(cell)
            self.count()
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

    def count(self) -> None:
        """Say how much there is to do; how long it takes is known when some of it is done."""
        cells = sum(len(part.cells) for part in self.parts.values())
        self.summary.waiting.update({"share": len(self.parts), "cell": cells})
        self.tell("plan", "", f"{cells} cells that share {len(self.parts)} trained networks or the like")

    def admit(self, cell: Cell) -> None:
        """Into its part, or out with its fault."""
        if cell.fault:
            self.fail(cell, "", cell.fault, {})
            return
        self.contents[cell.id] = sha256_json(keys.depends(cell.recipe(), "cell"))
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
        if final:
            self.settle("cell" if cell else "share", outcome["seconds"] if outcome["status"] == "ok" else None)
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
        if cell is None:
            self.summary.waiting["cell"] -= len(part.cells)
            part.cells = []

    def settle(self, kind: Kind, seconds: float | None) -> None:
        """One less to do; `seconds` that it took are a measure for the others."""
        self.summary.waiting[kind] -= 1
        if seconds is not None:
            self.summary.took[kind].append(seconds)

    def finish(self, part: _Part, cell: Cell | None, outcome: Json) -> None:
        if cell is None:
            part.shared = outcome["result"]
            self.store.keep_share(part.name, outcome["result"])
            for each in part.cells:
                record = self.store.done(each, self.key(part, each))
                if record:
                    self.summary.skipped += 1
                    self.settle("cell", record["seconds"])
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
        left = [f"about {self.summary.left()} left"] if self.summary.waiting["cell"] else []
        score = [f"{metric} {row[metric]:.2f}"] if row.get(metric) is not None else []
        self.tell("ok", cell.id, ", ".join(score + left))

    def fail(self, cell: Cell, key: str, reason: str, outcome: Json, log: str = "") -> None:
        facts = {"attempts": self.attempts.get(log, 0), "seconds": outcome.get("seconds"), "log": log or None}
        self.store.keep(cell, key, {"status": "failed", "error": reason, **facts})
        self.summary.failed[cell.id] = reason
        self.tell("failed", cell.id, reason)

    def key(self, part: _Part, cell: Cell) -> str:
        """Hash of all that a cell's result comes from; of one that cannot be, of the little that is known."""
        return sha256_json([self.contents.get(cell.id), part.shared.get("key"), part.shared.get("score_key")])
