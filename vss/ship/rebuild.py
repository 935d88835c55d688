"""`vss rebuild`: the engine made anew on this machine from the ONNX file of a bundle, gated, and written in."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from vss.deploy import BuildSpec
from vss.environment import environment, package_version
from vss.errors import VssError
from vss.files import atomic, sha256_file
from vss.run import available
from vss.ship import card
from vss.ship.bundle import RUNTIME, bound_to
from vss.ship.check import whole
from vss.ship.manifest import Engine, Link, Manifest, inside, read, seal
from vss.ship.samples import check_samples
from vss.ship.triton import VARIANTS


def rebuild(bundle: Path, *, max_drop: float = 0.1, options: dict[str, Any] | None = None) -> Manifest:
    """Build, compare with the shipped samples, write the engine into the bundle and into its repositories.

    Args:
        bundle: folder of a bundle; only its engine, its repositories and its manifest change.
        max_drop: points that a metric of the samples may lose.
        options: changes to the `BuildSpec` that the bundle was shipped with.

    Raises:
        GateFailed: the new engine's answers differ; the bundle stays as it was.
        VssError: a damaged bundle, no samples to judge by, or a backend that cannot build here.
    """
    manifest = read(bundle)
    whole(bundle, manifest)
    if not manifest.samples.images:
        raise VssError(f"{bundle} holds no samples, so nothing can judge a new engine; ship it with --samples 4.")
    backend = available(manifest.engine.backend)
    spec = {**manifest.engine.spec, **(options or {})}
    suffix = Path(manifest.engine.file).suffix
    with tempfile.TemporaryDirectory(prefix=".rebuild-", dir=bundle.parent) as folder:
        copy = Path(folder) / "bundle"
        shutil.copytree(bundle, copy)
        target = f"engine/rebuilt{suffix}"
        backend.build(inside(copy, manifest.onnx), copy / target, _spec(spec))
        session = backend.open(copy / target)
        try:
            verdict = check_samples(copy, manifest, session, max_drop=max_drop)
        finally:
            session.close()
        fresh = _written(copy, manifest, target, spec, verdict)
        old = Path(folder) / "old"
        bundle.rename(old)
        copy.rename(bundle)
    return fresh


def _spec(values: dict[str, Any]) -> BuildSpec:
    try:
        return BuildSpec(**values)
    except TypeError as error:
        raise VssError(
            f"the bundle was built with settings that this version of vss does not know ({error})."
        ) from error


def _written(copy: Path, manifest: Manifest, target: str, spec: dict[str, Any], verdict: dict[str, Any]) -> Manifest:
    """Put the new engine everywhere, and note where and how well it was built."""
    backend = manifest.engine.backend
    if manifest.engine.file not in (manifest.onnx, target):
        (copy / manifest.engine.file).unlink()
    for variant, place in manifest.triton.items():
        for old in (copy / place).glob(f"*/1/{VARIANTS[variant].file}"):
            shutil.copyfile(copy / target, old)
    digest = sha256_file(copy / target)
    versions = {name: version for name in RUNTIME[backend] if (version := package_version(name))}
    engine = Engine(backend=backend, file=target, spec=spec, device=bound_to(backend), versions=versions)
    chain = [Link(what="engine", sha256=digest, file=target) if x.what == "engine" else x for x in manifest.chain]
    note = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": environment()["machine"],
        "engine_sha256": digest,
        "samples": verdict,
    }
    changes = {"engine": engine, "chain": chain, "rebuilds": [*manifest.rebuilds, note]}
    fresh = manifest.model_copy(update=changes)
    with atomic(copy / "requirements.txt") as temporary:
        temporary.write_text(card.requirements(fresh))
    return seal(copy, fresh)
