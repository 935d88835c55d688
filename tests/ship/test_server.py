"""A real Triton server over shipped bundles: equal answers, batching, refusals, restart; a TensorRT repository."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vss.cli.main import app
from vss.core.errors import VssError
from vss.deploy import Binding
from vss.ship import read, verify
from vss.ship import server as server_env
from vss.ship.check import open_engine
from vss.ship.load import PROTOCOLS, Client, check_answers, load_bundle
from vss.ship.manifest import Manifest
from vss.ship.server import (
    HOST,
    Installation,
    Ports,
    Server,
    deploy,
    find,
    free_ports,
    refuse_taken,
    running,
    session_of,
)
from vss.ship.standalone import prepare, readable
from vss.ship.triton import CONFIG, Serving, parse, write_repository


@pytest.fixture(scope="module")
def installed() -> None:
    try:
        find()
    except VssError as error:
        pytest.skip(f"needs a server: {error}")


@pytest.fixture(scope="module")
def served(
    installed: None,
    seg_bundle: Path,
    logits_bundle: Path,
    defect_bundle: Path,
    baseline_bundle: Path,
    openvino_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SimpleNamespace]:
    bundles = [seg_bundle, logits_bundle, defect_bundle, baseline_bundle, openvino_bundle]
    folder = tmp_path_factory.mktemp("server")
    places = [deploy(bundle, read(bundle), find(), folder) for bundle in bundles]
    with running(places, log=folder / "log") as server:
        server.wait_ready()
        yield SimpleNamespace(server=server, bundles=bundles)


def client_of(server: Server, protocol: str = "grpc") -> Client:
    return Client(protocol, f"{HOST}:{getattr(server.ports, protocol)}")


def noise(manifest: Manifest, count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *manifest.image.size, 3), dtype=np.uint8)


def local(bundle: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """The bundle's engine in this process, by another way into it than the server's."""
    manifest = read(bundle)
    session, facts = open_engine(bundle, manifest), manifest.image.model_dump()
    nhwc = manifest.inputs["image"].dtype == "uint8"
    found = readable(session.run({"image": np.stack([prepare(Image.fromarray(x), facts, nhwc) for x in images])}))
    session.close()
    return {name: found[name] for name in manifest.served()[1]}


@pytest.mark.server
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("which", range(5), ids=["pruned", "pruned ensemble", "segdecnet", "baseline", "openvino"])
def test_answers_equal_local_inference(served: SimpleNamespace, protocol: str, which: int) -> None:
    bundle = served.bundles[which]
    manifest, client = read(bundle), client_of(served.server, protocol)
    for count in (1, 3):
        images = noise(manifest, count)
        want = local(bundle, images)
        got = client.infer(manifest.name, {"image": images}, list(want))
        for name, value in want.items():
            assert got[name].shape == value.shape and got[name].dtype == value.dtype
            if np.issubdtype(value.dtype, np.integer):
                assert np.array_equal(got[name], value) and len(np.unique(value)) > 1
            else:
                np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5)
    assert check_answers(bundle, manifest, client) <= 1
    client.close()


@pytest.mark.server
def test_the_server_forms_batches(served: SimpleNamespace) -> None:
    manifest, client = read(served.bundles[0]), client_of(served.server)
    images = noise(manifest, 8)
    want = local(served.bundles[0], images)["labels"]
    before = client.statistics(manifest.name)
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda i: client.infer(manifest.name, {"image": images[i % 8][None]}, ["labels"]), range(64))
        )
    assert all(np.array_equal(answer["labels"][0], want[i % 8]) for i, answer in enumerate(answers))
    found = client.since(manifest.name, before, answered=64)
    assert found["requests"] == 64 > found["executions"]
    assert sum(size * count for size, count in found["batches"].items()) == 64 and max(found["batches"]) > 1
    client.close()


@pytest.mark.server
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_wrong_requests_are_refused_and_the_server_goes_on(served: SimpleNamespace, protocol: str) -> None:
    bundle = served.bundles[0]
    manifest, client = read(bundle), client_of(served.server, protocol)
    good = noise(manifest, 1)
    cases: list[tuple[str, np.ndarray, str]] = [
        (manifest.name, good[:, :-1], "unexpected shape for input 'image'"),
        (manifest.name, good.astype(np.float32), "data-type is 'FP32', but model 'street' expects 'UINT8'"),
        (manifest.name, noise(manifest, 9), "batch-size must be <= 8"),
        ("nothing", good, "unknown model"),
    ]
    for model, images, words in cases:
        with pytest.raises(VssError, match=words):
            client.infer(model, {"image": images}, ["labels"])
    assert served.server.process.poll() is None
    assert np.array_equal(
        client.infer(manifest.name, {"image": good}, ["labels"])["labels"], local(bundle, good)["labels"]
    )
    client.close()


@pytest.mark.server
def test_load_counts_every_request(served: SimpleNamespace) -> None:
    address = f"{HOST}:{served.server.ports.grpc}"
    found = load_bundle(served.bundles[0], address, seconds=1.0, concurrency=4, rate=40)
    assert found["answered"] == 40 and found["errors"] == {}
    assert sum(size * count for size, count in found["batches"].items()) == 40
    assert 0 < found["latency_ms_p50"] <= found["latency_ms_p90"] <= found["latency_ms_p99"]
    assert 0 < found["engine_share"] < 1 <= found["mean_batch"]
    ensemble = load_bundle(served.bundles[1], address, seconds=0.5, concurrency=2)
    assert ensemble["answered"] == sum(size * count for size, count in ensemble["batches"].items()) > 0


@pytest.mark.server
def test_kill_9_and_restart(served: SimpleNamespace, seg_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(seg_bundle, tmp_path / "bundle"))
    manifest, ports = read(copy), free_ports()
    place = deploy(copy, manifest, find(), tmp_path / "models")
    server = Server(find(), [place], ports, tmp_path / "log")
    server.wait_ready()
    os.kill(server.process.pid, signal.SIGKILL)
    server.stop(kill=True)
    assert server.process.returncode == -signal.SIGKILL
    verify(copy)
    with running([place], log=tmp_path / "log", ports=ports) as again:
        again.wait_ready()
        client = client_of(again)
        assert check_answers(copy, manifest, client) == 0
        client.close()
    verify(copy)


@pytest.mark.server
def test_the_only_complaint_about_the_tensorrt_repository_is_the_missing_backend(
    installed: None, tmp_path: Path
) -> None:
    plan = tmp_path / "plan"
    plan.write_bytes(b"stands for a plan, which the server never gets to read")
    inputs, outputs = {"image": Binding((None, 32, 48, 3), "uint8")}, {"labels": Binding((None, 32, 48), "int32")}
    for name in ("right", "wrong"):
        write_repository(tmp_path / "models", "tensorrt", Serving(name, inputs, outputs, labels=["a", "b"]), plan)
    config = parse(tmp_path / "models/wrong" / CONFIG)
    config.dynamic_batching.preferred_batch_size.append(99)
    (tmp_path / "models/wrong" / CONFIG).write_text(str(config))
    with running([tmp_path / "models"], log=tmp_path / "log", strict=False) as server:
        server.wait_ready(path="/v2/health/live")  # answers after its first look at every model, loaded or not
        rows = {row["name"]: row for row in json.loads(server.ask("POST", "/v2/repository/index")[1])}
        log = (tmp_path / "log").read_text()
    assert rows["right"]["state"] == "UNAVAILABLE"
    assert "unable to find backend library for backend 'tensorrt'" in rows["right"]["reason"]
    assert "dynamic batching preferred size must be <= max batch size for wrong" in log
    complaints = [line for line in log.splitlines() if "right" in line and line.startswith("E")]
    assert complaints and all("backend 'tensorrt'" in line for line in complaints)


@pytest.mark.server
def test_serve_says_when_it_is_ready(installed: None, defect_bundle: Path, tmp_path: Path) -> None:
    ports = free_ports()
    command = ["serve", str(defect_bundle), "--once", "--log", str(tmp_path / "log")]
    done = CliRunner().invoke(app, [*command, "--http-port", str(ports.http), "--grpc-port", str(ports.grpc)])
    assert done.exit_code == 0, done.output
    assert f"ready: http 127.0.0.1:{ports.http}" in done.output and "defects: answers 0" in done.output


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(VssError, match=rf"port {port} \(grpc\) cannot be used .* give --grpc-port"):
            refuse_taken(Ports(free_ports().http, port))


def test_a_missing_server_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VSS_TRITON", str(tmp_path))
    with pytest.raises(VssError, match=r"no Triton server here: run `vss serve --get-server`"):
        find()


def test_a_server_on_the_path_is_found_with_its_backends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seg_bundle: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "backends/onnxruntime").mkdir(parents=True)
    (tmp_path / "bin/tritonserver").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "bin/tritonserver").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("VSS_TRITON", raising=False)
    found = find()
    manifest = read(seg_bundle)
    assert found.binary == tmp_path / "bin/tritonserver" and found.variant(manifest) == "onnxruntime"
    only: Any = manifest.model_copy(update={"triton": {"tensorrt": "triton/tensorrt"}})
    with pytest.raises(VssError, match="has no backend for street"):
        found.variant(only)
    server = Server(found, [tmp_path], free_ports(), tmp_path / "log")
    with pytest.raises(VssError, match="the server ended with exit code 3; its last words: it said nothing"):
        server.wait_ready(5)
    server.stop()


def fake(folder: Path, body: str) -> Installation:
    """A server program that is a shell script; `$port` is the one for HTTP."""
    program = folder / "tritonserver"
    port = 'for word; do case $word in --http-port=*) port="${word#*=}";; esac; done'
    program.write_text(f"#!/bin/sh\n{port}\n{body}\n")
    program.chmod(0o755)
    return Installation(program, folder)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether a process ends within that time."""
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


READY = """python3 -c 'import http.server as h, sys
class Ok(h.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
h.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ok).serve_forever()' "$port" &
"""


def test_a_dead_server_is_named_by_its_signal_and_its_own_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("E1128 an error of an older server\n")
    silent = Server(fake(tmp_path, "kill -SEGV $$"), [tmp_path], free_ports(), log)
    with pytest.raises(VssError, match="the server was ended by SIGSEGV; its last words: it said nothing"):
        silent.wait_ready(30)
    silent.stop()
    start = f'echo "E1128 a harmless start-up error"\n{READY}'
    body = f'{start}read word < {tmp_path}/go\necho "$word"; kill -ABRT $$'
    os.mkfifo(tmp_path / "go")
    server = Server(fake(tmp_path, body), [tmp_path], free_ports(), log)
    server.wait_ready()
    (tmp_path / "go").write_text("Signal (6) received.\n")
    assert str(server.ended()) == (
        f"the server was ended by SIGABRT; its last words: Signal (6) received. (log: {log})"
    )
    server.stop()


@pytest.mark.parametrize("by_itself", [True, False])
def test_the_stubs_of_a_dead_server_end_with_it(tmp_path: Path, by_itself: bool) -> None:
    os.mkfifo(tmp_path / "pid")
    stub = f"(trap '' TERM; while :; do sleep 60; done) & echo $! > {tmp_path}/pid\n"
    server = Server(
        fake(tmp_path, stub + ("kill -9 $$" if by_itself else "wait")), [tmp_path], free_ports(), tmp_path / "log"
    )
    pid = int((tmp_path / "pid").read_text())
    if by_itself:
        server.process.wait()
    assert alive(pid) and pid in session_of(server.process.pid)
    server.stop()
    assert not alive(pid), "it is gone when `stop` returns"
    assert server.process.returncode == (-signal.SIGKILL if by_itself else -signal.SIGTERM)
    server.stop()


def test_a_server_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pid")
    installation, ports = fake(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 600"), free_ports()
    parent = os.fork()
    if not parent:
        try:
            Server(installation, [tmp_path], ports, tmp_path / "log")
            time.sleep(600)
        finally:
            os._exit(1)
    server = int((tmp_path / "pid").read_text())
    assert alive(server)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert gone(server)


def test_plugins_are_handed_to_the_tensorrt_backend(tmp_path: Path) -> None:
    said, libraries = tmp_path / "said", [tmp_path / "liba.so", tmp_path / "libb.so"]
    program = tmp_path / "tritonserver"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {said}\n')
    program.chmod(0o755)
    for plugins in ([], libraries):
        server = Server(Installation(program, tmp_path), [tmp_path], free_ports(), tmp_path / "log", plugins=plugins)
        server.process.wait()
        server.stop()
        words = [line for line in said.read_text().splitlines() if line.startswith("--backend-config=")]
        assert words == ([f"--backend-config=tensorrt,plugins={libraries[0]};{libraries[1]}"] if plugins else [])


def test_the_environment_is_named_by_its_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VSS_TRITON", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert server_env.home().parent == tmp_path / "vss" and server_env.home().name.startswith("nvidia-pytriton-0.7.0")
