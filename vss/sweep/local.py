"""The `local` executor: worker processes on this machine, each with its share of cores and one device."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vss.core.environment import cuda_devices
from vss.sweep.study import Json

GRACE_S = 10.0


class Executor(Protocol):
    """Where tasks (see `vss.sweep.tasks`) are done."""

    @property
    def slots(self) -> int:
        """How many tasks may be under way."""
        ...

    @property
    def threads(self) -> int:
        """CPU threads of one task."""
        ...

    def submit(self, task: Json) -> None:
        """Begin a task; never more than `slots` at a time."""
        ...

    def wait(self, timeout: float) -> list[Json]:
        """Outcomes that have come, after at most `timeout` seconds; "lost" where the worker died."""
        ...

    def close(self) -> None:
        """End all workers; what they were doing is lost."""
        ...


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    answers: int
    task: str = ""
    buffer: bytearray = field(default_factory=bytearray)


class LocalExecutor:
    """`workers` processes. One that dies loses its task and is replaced."""

    def __init__(self, workers: int, *, threads: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0))
        self.slots = workers
        self.threads = threads or max(1, cores // workers)
        self._devices = len(cuda_devices())
        self._workers: dict[int, _Worker] = {}
        self._selector = selectors.DefaultSelector()

    def submit(self, task: Json) -> None:
        """Give the task to an idle worker, started where there is none."""
        place = next((n for n, worker in self._workers.items() if not worker.task), None)
        if place is None:
            place = next(n for n in range(self.slots) if n not in self._workers)
            self._start(place)
        worker = self._workers[place]
        worker.task = task["id"]
        with contextlib.suppress(BrokenPipeError):  # it has died: `wait` sees the end of its answers
            assert worker.process.stdin is not None
            worker.process.stdin.write(json.dumps(task).encode() + b"\n")
            worker.process.stdin.flush()

    def wait(self, timeout: float) -> list[Json]:
        """Outcomes that have come."""
        found = []
        for key, _ in self._selector.select(timeout):
            outcome = self._hear(key.data)
            if outcome is not None:
                found.append(outcome)
        return found

    def close(self) -> None:
        """SIGTERM, and SIGKILL for what is still there after a while."""
        for worker in self._workers.values():
            worker.process.terminate()
        for place in list(self._workers):
            try:
                self._workers[place].process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                self._workers[place].process.kill()
            self._remove(place)
        self._selector.close()

    def _start(self, place: int) -> None:
        read, write = os.pipe()
        home = str(Path(__file__).resolve().parents[2])
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": os.pathsep.join(paths)}
        if self._devices:
            visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self._devices)))).split(",")
            settings["CUDA_VISIBLE_DEVICES"] = visible[place % len(visible)]
        process = subprocess.Popen(
            [sys.executable, "-m", "vss.sweep.worker", str(write)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[write], env=os.environ | settings,
            start_new_session=True,
        )  # fmt: skip
        os.close(write)
        self._workers[place] = _Worker(process, read)
        self._selector.register(read, selectors.EVENT_READ, place)

    def _hear(self, place: int) -> Json | None:
        worker = self._workers[place]
        part = os.read(worker.answers, 1 << 16)
        if not part:
            code = worker.process.wait()
            self._remove(place)
            return {"id": worker.task, "status": "lost", "error": _death(code)} if worker.task else None
        worker.buffer += part
        if not worker.buffer.endswith(b"\n"):
            return None
        outcome: Json = json.loads(worker.buffer)
        worker.buffer.clear()
        worker.task = ""
        return outcome

    def _remove(self, place: int) -> None:
        worker = self._workers.pop(place)
        self._selector.unregister(worker.answers)
        os.close(worker.answers)
        if worker.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                worker.process.stdin.close()
        worker.process.wait()


def _death(code: int) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the worker process {how}"
