"""Bundles in a Triton Inference Server: found or installed, started, asked once, watched and stopped.

A server without root and without a container is the one inside the nvidia-pytriton wheel: for the CPU, with the python
backend alone. It needs numpy below 2, so it lives in an environment of its own: `make` writes it, `server.json` in it
says how to start it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vss.core.errors import SHOWN, GateFailed, VssError, one_line
from vss.core.files import read_json, write_json
from vss.ship.check import refuse_foreign, whole
from vss.ship.load import Client, check_answers
from vss.ship.manifest import Manifest, inside, read
from vss.ship.triton import INSTEAD, runtime_of

log = logging.getLogger(__name__)

KIND, SCHEMA = "vss.triton", 1
PINS = ("nvidia-pytriton==0.7.0", "numpy==1.26.4", "onnxruntime==1.31.1", "openvino==2026.4.1")
FACTS = """
import json, os, pytriton, sysconfig
print(json.dumps({
    "packages": os.path.dirname(os.path.dirname(pytriton.__file__)),
    "libdir": sysconfig.get_config_var("LIBDIR"),
    "library": sysconfig.get_config_var("INSTSONAME"),
    "python": sysconfig.get_python_version(),
}))
"""


def home() -> Path:
    """Where the environment is: VSS_TRITON, or a folder of the user's cache named by its versions."""
    given = os.environ.get("VSS_TRITON")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Path(given) if given else cache / "vss" / f"{PINS[0].replace('==', '-')}-py{python}"


def make(folder: Path | None = None) -> Path:
    """Install the server (about 620 MB with its Python packages) unless it is there; returns its folder."""
    folder = folder or home()
    python, said = folder / "bin" / "python", folder / "server.json"
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *PINS]
    if said.is_file():
        known = read_json(said, kind=KIND, schema=SCHEMA)
        if known["pins"] != list(PINS):  # of another version of vss
            log.info("installing %s into %s", ", ".join(each for each in PINS if each not in known["pins"]), folder)
            _run(install)
            write_json(said, {**known, "pins": list(PINS)})
        return folder
    log.info("installing %s into %s", PINS[0], folder)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    _run(install)
    facts = json.loads(_run([str(python), "-c", FACTS]))
    if not (Path(facts["libdir"]) / facts["library"]).is_file():
        raise VssError(
            f"{sys.executable} has no shared library {facts['library']} in {facts['libdir']}, which Triton's python "
            "backend needs; use a Python that was built with --enable-shared (on Debian: libpython3)."
        )
    server = Path(facts["packages"]) / "pytriton" / "tritonserver"
    backend = folder / "backends" / "python"
    shutil.copytree(server / "backends" / "python", backend)
    stub = server / "python_backend_stubs" / facts["python"] / "triton_python_backend_stub"
    shutil.copy2(stub, backend / stub.name)
    write_json(
        said,
        {
            "kind": KIND,
            "schema": SCHEMA,
            "pins": list(PINS),
            "binary": str(server / "bin" / "tritonserver"),
            "backends": str(folder / "backends"),
            "library_path": [facts["libdir"], str(Path(facts["packages"]) / "nvidia_pytriton.libs")],
            "site_packages": facts["packages"],
        },
    )
    return folder


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise VssError(f"the Triton environment cannot be made ({' '.join(command[-3:])}: {last[0]}).")
    return done.stdout


HOST = "127.0.0.1"
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
TAIL, GOODBYE, TOLD = 2**16, 30.0, 10.0
"""Bytes of the log that are looked at for a reason; seconds that a server has for its end."""
GET_IT = (
    "run `vss serve --get-server` (nvidia-pytriton in an environment of its own, CPU), or install Triton and put "
    "tritonserver on the PATH"
)


@dataclass(frozen=True)
class Installation:
    """A server program: its file, its folder of backends, what its environment needs, and the packages of its Python,
    where they are known."""

    binary: Path
    backends: Path
    environment: dict[str, str] = field(default_factory=dict)
    packages: frozenset[str] = frozenset()

    def has(self, backend: str) -> bool:
        """Whether a backend is there; ensembles need none."""
        return (self.backends / backend).is_dir()

    def variant(self, manifest: Manifest) -> str:
        """The first repository of a bundle that this server can run."""
        needed = runtime_of(manifest.engine.backend).packages[0]
        for variant in manifest.triton:
            if self.has(variant):
                if variant == "python" and self.packages and needed not in self.packages:
                    raise VssError(
                        f"the server {self.binary} has no {needed}, which {manifest.name} runs in; run: vss serve "
                        "--get-server"
                    )
                return variant
        if not manifest.triton:
            raise VssError(
                f"Triton loads no engines of {manifest.engine.backend}, as {manifest.name} has one; {INSTEAD}."
            )
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
    path = home() / "server.json"
    if not path.is_file():
        raise VssError(f"there is no Triton server here: {GET_IT}.")
    facts = read_json(path, kind=KIND, schema=SCHEMA)
    known = os.environ.get("LD_LIBRARY_PATH")
    libraries = [*facts["library_path"], *([known] if known else [])]
    environment = {"LD_LIBRARY_PATH": ":".join(libraries), "VSS_SITE_PACKAGES": facts["site_packages"]}
    packages = frozenset(pin.partition("==")[0] for pin in facts["pins"])
    return Installation(Path(facts["binary"]), Path(facts["backends"]), environment, packages)


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
    used: dict[int, str] = {}
    for name, port in (("http", ports.http), ("grpc", ports.grpc), ("metrics", ports.metrics)):
        if port is None:
            continue
        if port in used:
            raise VssError(f"--{used[port]}-port and --{name}-port are both {port}; give each one of its own.")
        used[port] = name
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


def _end_with(parent: int) -> None:
    """In the server, before its program starts: SIGTERM when the thread that started it is gone, however it went."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # gone already
        os._exit(1)


class Server:
    """A running server, which ends with the thread that started it.

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
        self._said = self._log.tell()  # what stands before is of another server, or known to do no harm
        self.process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=functools.partial(_end_with, os.getpid()),
        )

    def wait_ready(self, seconds: float = 600.0, *, path: str = "/v2/health/ready") -> None:
        """Return when every model is loaded; raises `VssError` with the server's own words when it ends before, or is
        not ready in time. What it is at is logged every `TOLD` seconds."""
        start, told = time.monotonic(), 0.0
        while (waited := time.monotonic() - start) < seconds:
            if self.process.poll() is not None:
                raise self.ended()
            if self.ask("GET", path)[0] == 200:
                self._said = self.log.stat().st_size  # its complaints about the start did no harm
                return
            if waited - told >= TOLD:
                told = waited
                log.info("waiting for the server, %.0f s of at most %.0f: %s", waited, seconds, self.complaint())
            time.sleep(0.1)
        raise VssError(f"the server is not ready after {seconds:g} s: {self.complaint()} (log: {self.log})")

    def ended(self) -> VssError:
        """Why the server ended: the signal by its name, or the exit code, and its last words."""
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return VssError(f"the server {how}; its last words: {self.complaint()} (log: {self.log})")

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

    def complaint(self) -> str:
        """The last error line that this server wrote since it was ready, or since its start; else its last line."""
        with open(self.log, "rb") as file:
            file.seek(max(self._said, os.fstat(file.fileno()).st_size - TAIL))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        bad = [line for line in lines if line.startswith("E") or "error" in line.lower()]
        return one_line((bad or lines or ["it said nothing"])[-1], 3 * SHOWN)

    def stop(self, *, kill: bool = False) -> None:
        """End the server: SIGTERM and, after half a minute or with `kill`, SIGKILL; then whatever it left behind."""
        try:
            if self.process.poll() is None and not kill:
                self.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(GOODBYE)
        finally:  # also when the wait was interrupted
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
            self._log.close()
            _end_session(self.process.pid)


def session_of(pid: int) -> list[int]:
    """The living processes of the session that a process began, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == pid and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def _end_session(leader: int) -> None:
    """SIGKILL to what lives on of the session of a process that is gone (its models' stubs), until nothing does."""
    end = time.monotonic() + GOODBYE
    while left := session_of(leader):
        if leader in left:  # the number is another process's by now, which began a session of its own
            return
        if time.monotonic() > end:
            raise VssError(f"processes {', '.join(map(str, left))} of the server do not end; end them by hand.")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


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


@contextlib.contextmanager
def serve(bundles: Sequence[Path], *, ports: Ports, log: Path) -> Iterator[tuple[Server, dict[str, float]]]:
    """Bundles in one server: checked, started, ready, and asked once; gives the server and a distance per model."""
    manifests = [read(bundle) for bundle in bundles]
    names = [manifest.name for manifest in manifests]
    if len(set(names)) != len(names):
        raise VssError(f"two bundles have one name ({', '.join(names)}); ship one of them with --name.")
    installation = find()
    for bundle, manifest in zip(bundles, manifests, strict=True):
        whole(bundle, manifest)
        refuse_foreign(manifest, bundle)
    pairs = list(zip(bundles, manifests, strict=True))
    with tempfile.TemporaryDirectory(prefix="vss-serve-") as folder:
        places = [deploy(bundle, manifest, installation, Path(folder)) for bundle, manifest in pairs]
        loading = [pair for pair in pairs if "tensorrt" in pair[1].triton]
        plugins = [inside(bundle, name) for bundle, manifest in loading for name in manifest.plugins()]
        with running(places, log=log, ports=ports, plugins=plugins) as server:
            server.wait_ready()
            try:
                with contextlib.closing(Client("grpc", f"{HOST}:{ports.grpc}")) as client:
                    distances = {manifest.name: check_answers(bundle, manifest, client) for bundle, manifest in pairs}
            except VssError as error:
                if server.process.poll() is not None and not isinstance(error, GateFailed):  # the true reason
                    raise server.ended() from error
                raise
            yield server, distances
