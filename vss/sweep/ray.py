"""The `ray` executor: cells as Ray tasks, on a cluster by its address or on one started here.

The folder of the sweep must be the same path on every machine (a shared file system), and vss be installed there.
Retries are the driver's (`vss.sweep.drive`): the same rule for every executor.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from vss.core.errors import VssError
from vss.sweep.study import Json

GRACE_S = 10.0
PROBE_S = 5.0
STARTS = 3
"""On a busy machine Ray's own processes miss its fixed time limits; files are in memory at the next try."""
STORE_BYTES = 100 * 2**20
"""Object store of a Ray that is started here; only tasks and outcomes pass through it, a few kB each."""

log = logging.getLogger(__name__)


class RayExecutor:
    """Tasks on Ray. A worker that dies loses its task alone.

    Args:
        workers: tasks at a time; None: as many as the cluster has cores for.
        threads: CPU threads, and cores that Ray reserves, of a task; None: the machine's cores over `workers`.
        gpus: devices that Ray reserves for a task, may be a fraction.
        address: of a cluster, HOST:PORT or auto; None starts Ray here.
    """

    def __init__(
        self, workers: int | None, *, threads: int | None = None, gpus: float | None = None, address: str | None = None
    ) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise VssError("the ray executor needs Ray; install it with: pip install 'vss[ray]'") from error
        self._ray: Any = ray
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
        self._remote = ray.remote(_perform).options(**options | ({"num_gpus": gpus} if gpus else {}))
        self._running: dict[Any, str] = {}

    def submit(self, task: Json) -> None:
        """Hand a task to Ray."""
        self._running[self._remote.remote(json.dumps(task))] = task["id"]

    def wait(self, timeout: float) -> list[Json]:
        """Outcomes that have come."""
        if not self._running:
            time.sleep(timeout)
            return []
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

    def _outcome(self, reference: Any) -> Json:
        name = self._running.pop(reference)
        try:
            outcome: Json = json.loads(self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return {"id": name, "status": "lost", "error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
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
                f"a cell wants {self.threads} cores and {gpus:g} GPUs, and the cluster has {cores} and {devices:g}; "
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


def _perform(task: str) -> str:
    """In a Ray worker."""
    from vss.sweep.tasks import perform

    return json.dumps(perform(json.loads(task)))
