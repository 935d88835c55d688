"""Where the work of a sweep is done: processes of this machine, or Ray."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from vss.core.environment import cuda_devices
from vss.core.errors import VssError, need, unknown
from vss.sweep.store import Outcome, Task, perform

GRACE_S = 10.0
EXECUTORS = ("local", "ray")

log = logging.getLogger(__name__)


class Executor(Protocol):
    """Where tasks are done: at most `slots` at a time, each with `threads` CPU threads."""

    @property
    def slots(self) -> int: ...

    @property
    def threads(self) -> int: ...

    def submit(self, task: Task) -> None:
        """Begin a task; never more than `slots` at a time."""
        ...

    def wait(self, timeout: float) -> list[Outcome]:
        """Outcomes that have come, after at most `timeout` seconds."""
        ...

    def close(self) -> None:
        """End all workers; what they were doing is lost."""
        ...


@dataclass(frozen=True)
class _Worker:
    pool: futures.ProcessPoolExecutor
    process: BaseProcess


class LocalExecutor:
    """`workers` spawned processes, each with its share of the cores and one device.

    Each is a pool of its own: a pool breaks as a whole when a process of it dies, and one dead worker loses its task
    alone. A script that sweeps does it under `if __name__ == "__main__"`, since spawned processes import it.
    """

    def __init__(self, workers: int, *, threads: int | None = None) -> None:
        self.slots = workers
        self.threads = threads or max(1, len(os.sched_getaffinity(0)) // workers)
        self._devices = len(cuda_devices())
        self._workers: dict[int, _Worker] = {}
        self._running: dict[futures.Future[Outcome], tuple[int, str]] = {}

    def submit(self, task: Task) -> None:
        """Give the task to an idle worker, started where there is none."""
        idle = set(range(self.slots)) - {slot for slot, _ in self._running.values()}
        slot = min(idle, key=lambda number: (number not in self._workers, number))
        if slot not in self._workers:
            self._workers[slot] = self._start(slot)
        try:
            future = self._workers[slot].pool.submit(_work, task)
        except BrokenProcessPool as error:  # it has died since its last task
            future = futures.Future()
            future.set_exception(error)
        self._running[future] = slot, task.id

    def wait(self, timeout: float) -> list[Outcome]:
        done, _ = futures.wait(self._running, timeout, futures.FIRST_COMPLETED)
        return [self._outcome(future) for future in done]

    def close(self) -> None:
        """SIGTERM, and SIGKILL for what is still there after a while."""
        for worker in self._workers.values():
            worker.process.terminate()
        for worker in self._workers.values():
            worker.process.join(GRACE_S)
            worker.process.kill()  # nothing where it has ended
            worker.pool.shutdown(cancel_futures=True)

    def _start(self, slot: int) -> _Worker:
        settings = {"OMP_NUM_THREADS": str(self.threads)}
        if self._devices:
            visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self._devices)))).split(",")
            settings["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
        pool = futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)
        known = set(multiprocessing.active_children())
        with _inherited(settings):
            pool.submit(os.getpid)  # a pool starts its process with its first task
        (process,) = set(multiprocessing.active_children()) - known
        return _Worker(pool, process)

    def _outcome(self, future: futures.Future[Outcome]) -> Outcome:
        slot, name = self._running.pop(future)
        try:
            return future.result()
        except BrokenProcessPool:
            worker = self._workers.pop(slot)
            worker.pool.shutdown()  # waits for the process
            code = worker.process.exitcode or 0
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return Outcome(name, "lost", error=f"the worker process {how}")


@contextlib.contextmanager
def _inherited(settings: dict[str, str]) -> Iterator[None]:
    """A process that is started here has these variables, and lets Ctrl-C wait until it is ready to ignore it."""
    before = {name: os.environ.get(name) for name in settings}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _begin() -> None:
    """In a new worker: Ctrl-C is the driver's affair; SIGTERM, and the driver's end, end this process."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, _end)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    threading.Thread(target=_end_with_driver, daemon=True).start()


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)  # files that are being written are removed on the way out


def _end_with_driver() -> None:
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _work(task: Task) -> Outcome:
    try:
        return perform(task)
    except SystemExit:  # the pool would take it for an answer
        os._exit(128 + signal.SIGTERM)


PROBE_S = 5.0
STARTS = 3
"""On a busy machine Ray's own processes miss its fixed time limits; files are in memory at the next try."""
STORE_BYTES = 100 * 2**20
"""Object store of a Ray that is started here; only tasks and outcomes pass through it, a few kB each."""


class RayExecutor:
    """Tasks on Ray; a worker that dies loses its task alone.

    The folder of the sweep must be the same path on every machine (a shared file system), and vss be installed there.

    Args:
        workers: tasks at a time; None: as many as the cluster has cores for.
        threads: CPU threads, and cores that Ray reserves, of a task; None: the machine's cores over `workers`.
        gpus: devices that Ray reserves for a task, may be a fraction.
        address: of a cluster, HOST:PORT or auto; None starts Ray here.
    """

    def __init__(
        self, workers: int | None, *, threads: int | None = None, gpus: float | None = None, address: str | None = None
    ) -> None:
        self._ray: Any = need("ray", "the ray executor")
        ray = self._ray
        cores = len(os.sched_getaffinity(0))
        self.threads = threads or (max(1, cores // workers) if workers else 1)
        self._connect(address, (workers or cores) * self.threads)
        free = int(ray.cluster_resources().get("CPU", 0))
        self.slots = workers or max(1, free // self.threads)
        self._check(free, gpus or 0)
        home = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
        settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(self.threads)}
        options: dict[str, Any] = {"num_cpus": self.threads, "max_retries": 0, "runtime_env": {"env_vars": settings}}
        self._remote = ray.remote(perform).options(**options | ({"num_gpus": gpus} if gpus else {}))
        self._running: dict[object, str] = {}

    def submit(self, task: Task) -> None:
        self._running[self._remote.remote(task)] = task.id

    def wait(self, timeout: float) -> list[Outcome]:
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout)
        if ready:
            ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [self._outcome(reference) for reference in ready]

    def close(self) -> None:
        """Interrupt what is running, then leave the cluster (and end it, where it was started here)."""
        for reference in self._running:
            self._ray.cancel(reference, force=False)
        if self._running:
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=GRACE_S)
        self._ray.shutdown()

    def _outcome(self, reference: object) -> Outcome:
        name = self._running.pop(reference)
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return Outcome(name, "lost", error=f"{type(error).__name__}: {lines[0] if lines else ''}")
        return outcome

    def _connect(self, address: str | None, cores: int) -> None:
        _probe(address)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        own = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        settings = {"address": address, **quiet} if address else {"address": "local", **own, **quiet}
        os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")
        for attempt in range(1, STARTS + 1):
            try:
                self._ray.init(**settings)
                return
            except Exception as error:  # Ray raises bare Exception where its processes start too slowly
                self._ray.shutdown()
                if address or attempt == STARTS:
                    raise _nobody(address, error) from error
                log.warning("Ray did not start (%s); trying again", str(error).partition(chr(10))[0])

    def _check(self, cores: int, gpus: float) -> None:
        devices = self._ray.cluster_resources().get("GPU", 0)
        if self.threads > cores or gpus > devices:
            self._ray.shutdown()
            raise VssError(
                f"a trial wants {self.threads} cores and {gpus:g} GPUs, and the cluster has {cores} and {devices:g}; "
                "lower --threads or --gpus."
            )


def _probe(address: str | None) -> None:
    """Refuse HOST:PORT where nothing listens at once; Ray itself tries for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()
    except OSError as error:
        raise _nobody(address, error) from error


def _nobody(address: str | None, error: Exception) -> VssError:
    where = f"at {address}" if address else "on this machine"
    first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return VssError(
        f"no Ray cluster answers {where} ({first}); start one with `ray start --head`, or leave --address off."
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """By whom a sweep is done.

    Attributes:
        executor: "local" or "ray".
        workers: trials at a time; None: one a device, or one for every two cores.
        threads: CPU threads of a trial; None: its share of the cores.
        retries: how often a failed or lost trial is tried again.
        address: of a Ray cluster; None starts one here.
        gpus: of a trial on Ray, may be a fraction.
    """

    executor: str = "local"
    workers: int | None = None
    threads: int | None = None
    retries: int = 1
    address: str | None = None
    gpus: float | None = None

    def open(self) -> Executor:
        """The executor, its workers not started yet."""
        if self.executor not in EXECUTORS:
            raise unknown("executor", self.executor, EXECUTORS)
        if self.workers is not None and self.workers < 1:
            raise VssError(f"{self.workers} workers do nothing; give at least 1.")
        if self.executor == "ray":
            return RayExecutor(self.workers, threads=self.threads, gpus=self.gpus, address=self.address)
        default = len(cuda_devices()) or max(1, len(os.sched_getaffinity(0)) // 2)
        return LocalExecutor(self.workers or default, threads=self.threads)
