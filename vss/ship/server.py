"""Start, watch and stop a Triton Inference Server over the repositories of bundles."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vss.errors import VssError
from vss.files import read_json
from vss.ship import server_env
from vss.ship.manifest import Manifest, inside

HOST = "127.0.0.1"
GET_IT = (
    "run `vss serve --get-server` (nvidia-pytriton in an environment of its own, CPU), or install Triton and put "
    "tritonserver on the PATH"
)


@dataclass(frozen=True)
class Installation:
    """A server program: its file, its folder of backends, and what its environment needs."""

    binary: Path
    backends: Path
    environment: dict[str, str] = field(default_factory=dict)

    def has(self, backend: str) -> bool:
        """Whether a backend is there; ensembles need none."""
        return (self.backends / backend).is_dir()

    def variant(self, manifest: Manifest) -> str:
        """The first repository of a bundle that this server can run."""
        for variant in manifest.triton:
            if self.has(variant):
                return variant
        raise VssError(
            f"{self.binary} has no backend for {manifest.name} (the bundle is for {', '.join(manifest.triton)}; the "
            f"server's backends are in {self.backends})."
        )


def find() -> Installation:
    """The server on the PATH, or the one that `vss serve --get-server` made. Raises `VssError` with how to get one."""
    on_path = shutil.which("tritonserver")
    if on_path and not os.environ.get("VSS_TRITON"):
        binary = Path(on_path).resolve()
        return Installation(binary, binary.parent.parent / "backends")
    path = server_env.home() / "server.json"
    if not path.is_file():
        raise VssError(f"there is no Triton server here: {GET_IT}.")
    facts = read_json(path, kind=server_env.KIND, schema=server_env.SCHEMA)
    known = os.environ.get("LD_LIBRARY_PATH")
    libraries = [*facts["library_path"], *([known] if known else [])]
    environment = {"LD_LIBRARY_PATH": ":".join(libraries), "VSS_SITE_PACKAGES": facts["site_packages"]}
    return Installation(Path(facts["binary"]), Path(facts["backends"]), environment)


@dataclass(frozen=True)
class Ports:
    """Where a server listens; `metrics` of None switches them off."""

    http: int = 8000
    grpc: int = 8001
    metrics: int | None = None


def free_ports() -> Ports:
    """Two ports that nothing listens on now."""
    with socket.socket() as one, socket.socket() as two:
        one.bind((HOST, 0))
        two.bind((HOST, 0))
        return Ports(one.getsockname()[1], two.getsockname()[1])


def refuse_taken(ports: Ports) -> None:
    """Raise `VssError` naming a port that something else listens on."""
    for name, port in (("http", ports.http), ("grpc", ports.grpc), ("metrics", ports.metrics)):
        if port is None:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise VssError(
                    f"port {port} ({name}) cannot be used ({error.strerror}); stop what listens there, or give "
                    f"--{name}-port."
                ) from error


def deploy(bundle: Path, manifest: Manifest, installation: Installation, to: Path) -> Path:
    """Copy the repository of a bundle that fits a server into a folder, and return the copy.

    A server works on a copy, since its Python writes a cache beside model.py and a bundle stays as it was shipped.
    """
    source = inside(bundle, manifest.triton[installation.variant(manifest)])
    return Path(shutil.copytree(source, to / manifest.name))


class Server:
    """A running server.

    Args:
        repositories: folders of models.
        log: file that takes everything the server says.
        strict: stop when a model cannot be loaded; otherwise go on with the others.
        plugins: libraries that the TensorRT backend loads before any engine.
    """

    def __init__(
        self,
        installation: Installation,
        repositories: Sequence[Path],
        ports: Ports,
        log: Path,
        *,
        strict: bool = True,
        plugins: Sequence[Path] = (),
    ) -> None:
        refuse_taken(ports)
        self.ports, self.log = ports, log
        command = [
            str(installation.binary),
            *(f"--model-repository={path}" for path in repositories),
            f"--backend-directory={installation.backends}",
            f"--http-address={HOST}",
            f"--grpc-address={HOST}",
            f"--http-port={ports.http}",
            f"--grpc-port={ports.grpc}",
            "--allow-gpu-metrics=false",
            f"--exit-on-error={'true' if strict else 'false'}",
        ]
        command += [f"--metrics-port={ports.metrics}"] if ports.metrics else ["--allow-metrics=false"]
        if plugins:
            command.append(f"--backend-config=tensorrt,plugins={';'.join(str(path.resolve()) for path in plugins)}")
        environment = os.environ | installation.environment
        self._log = open(log, "ab")  # noqa: SIM115  (closed in `stop`)
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def wait_ready(self, seconds: float = 60.0) -> None:
        """Return when every model is loaded; raises `VssError` with the server's own words when it ends before."""
        self._wait("/v2/health/ready", seconds)

    def wait_live(self, seconds: float = 60.0) -> None:
        """Return when the server answers, which it does after its first look at every model, loaded or not."""
        self._wait("/v2/health/live", seconds)

    def _wait(self, path: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise VssError(f"the server ended with {self.process.returncode}: {self.complaint()} (log: {self.log})")
            if self.ask("GET", path)[0] == 200:
                return
            time.sleep(0.1)
        raise VssError(f"the server is not ready after {seconds:g} s: {self.complaint()} (log: {self.log})")

    def ask(self, method: str, path: str) -> tuple[int, bytes]:
        """Status and body of one HTTP request; (0, b"") while nothing listens."""
        connection = http.client.HTTPConnection(HOST, self.ports.http, timeout=5)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def index(self) -> list[dict[str, Any]]:
        """One row per model: name, version, state, reason."""
        body = self.ask("POST", "/v2/repository/index")[1]
        rows: list[dict[str, Any]] = json.loads(body) if body else []
        return rows

    def complaint(self) -> str:
        """The last error lines of the log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        bad = [line for line in lines if line.startswith("E") or "error" in line.lower()]
        return (bad or lines or ["it said nothing"])[-1].strip()

    def rss_mib(self) -> float:
        """Resident memory of the server and the processes of its models, MiB."""
        return sum(_rss(pid) for pid in _family(self.process.pid))

    def stop(self, *, kill: bool = False) -> None:
        """End the server: SIGTERM and, after half a minute or with `kill`, SIGKILL to it and its models' processes."""
        if self.process.returncode is not None:  # ended and seen to: its number may be another process's by now
            self._log.close()
            return
        family = _family(self.process.pid)
        if self.process.poll() is None and not kill:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        for pid in family if kill or self.process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


def _family(pid: int) -> list[int]:
    """A process and all its descendants, from /proc."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found, queue = [], [pid]
    while queue:
        found.append(queue.pop())
        queue += parents.get(found[-1], [])
    return found


def _rss(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    return 0.0


@contextlib.contextmanager
def running(
    repositories: Sequence[Path],
    *,
    log: Path,
    ports: Ports | None = None,
    strict: bool = True,
    plugins: Sequence[Path] = (),
) -> Iterator[Server]:
    """A server over some repositories for as long as the block runs."""
    server = Server(find(), repositories, ports or free_ports(), log, strict=strict, plugins=plugins)
    try:
        yield server
    finally:
        server.stop()
