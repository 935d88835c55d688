"""`vss serve` and `vss load`: bundles in a real server, one answer of each compared, requests by the second."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vss.core.errors import GateFailed, VssError, shown
from vss.data.images import open_rgb
from vss.ship.check import compare, load_expected, refuse_foreign, whole
from vss.ship.load import Client, load
from vss.ship.manifest import Manifest, inside, read
from vss.ship.server import HOST, Ports, Server, deploy, find, running
from vss.ship.standalone import prepare, readable


def pixels(path: Path, manifest: Manifest) -> np.ndarray:
    """One image as a client sends it: (1, H, W, 3) uint8."""
    return prepare(open_rgb(path), manifest.image.model_dump(), True)[None]


def feeds(bundle: Path, manifest: Manifest) -> list[dict[str, np.ndarray]]:
    """What a client sends for every sample; noise where the bundle has no samples."""
    if manifest.samples.images:
        return [{"image": pixels(inside(bundle, path), manifest)} for path in manifest.samples.images]
    noise = np.random.default_rng(0).integers(0, 256, (1, *manifest.image.size, 3), dtype=np.uint8)
    return [{"image": noise}]


def check_answers(bundle: Path, manifest: Manifest, client: Client) -> float:
    """Send every sample; the largest distance (see `vss.ship.check.compare`) from the shipped answers.

    Raises `GateFailed` when it is out of tolerance.
    """
    names, distance = list(manifest.served()[1]), 0.0
    for feed, files in zip(feeds(bundle, manifest), manifest.samples.expected, strict=False):
        shipped = readable(load_expected(bundle, files))
        found = client.infer(manifest.name, feed, names)
        distance = max(distance, compare({name: shipped[name] for name in names}, found))
    if distance > 1:
        raise GateFailed(f"answers of the server to the samples of {manifest.name} are {distance:.2f} tolerances off.")
    return distance


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
        plugins = [inside(bundle, name) for bundle, manifest in pairs for name in manifest.plugins()]
        with running(places, log=log, ports=ports, plugins=plugins) as server:
            server.wait_ready()
            client = Client("grpc", f"{HOST}:{ports.grpc}")
            try:
                distances = {manifest.name: check_answers(bundle, manifest, client) for bundle, manifest in pairs}
            except GateFailed:
                raise
            except VssError as error:
                if server.process.poll() is not None:  # the true reason
                    raise server.ended() from error
                raise
            finally:
                client.close()
            yield server, distances


def engine_name(manifest: Manifest) -> str:
    """The model that runs the engine: the bundle's own, or the inner one of its ensemble."""
    ensemble = manifest.inputs["image"].dtype == "float32" or "logits" in manifest.outputs
    return f"{manifest.name}_net" if ensemble else manifest.name


def load_bundle(
    bundle: Path, address: str, *, seconds: float, concurrency: int, rate: float | None = None
) -> dict[str, Any]:
    """Load the model of a bundle with its own samples; see `vss.ship.load.load`."""
    manifest = read(bundle)
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise VssError(f"--address is {shown(address)}; expected HOST:PORT, the port from 1 to 65535.")
    outputs = list(manifest.served()[1])
    return load(
        address,
        manifest.name,
        feeds(bundle, manifest),
        outputs,
        seconds=seconds,
        concurrency=concurrency,
        rate=rate,
        engine=engine_name(manifest),
    )
