"""`vss rebuild`: the engine made anew on this machine from the ONNX file of a bundle, gated, and written in."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vss.core.environment import environment, package_version
from vss.core.errors import VssError, fault
from vss.core.files import atomic, sha256_file
from vss.deploy import BuildSpec
from vss.deploy.backends import available
from vss.deploy.backends.trt_plan import BuildPlan
from vss.ship import card
from vss.ship.bundle import RUNTIME, beside, bound_to, copy_about
from vss.ship.check import check_samples, whole
from vss.ship.manifest import Engine, Link, Manifest, inside, read, seal
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
    with tempfile.TemporaryDirectory(prefix=".rebuild-", dir=bundle.resolve().parent) as folder:
        copy = Path(folder) / "bundle"
        shutil.copytree(bundle, copy)
        built = backend.build(inside(copy, manifest.onnx), Path(folder) / f"built{suffix}", build_spec(spec, copy))
        with backend.open(built) as session:
            verdict = check_samples(copy, manifest, session, max_drop=max_drop)
        fresh = _written(copy, manifest, built, spec, verdict)
        bundle.resolve().rename(Path(folder) / "old")
        copy.rename(bundle.resolve())
    return fresh


def build_spec(values: dict[str, Any], bundle: Path) -> BuildSpec:
    """The `BuildSpec` of a manifest; plugins of a TensorRT plan are those in the bundle."""
    try:
        plan = values.get("plan")
        return BuildSpec(**{**values, "plan": _build_plan(plan, bundle) if plan else None})
    except ValidationError as error:
        raise VssError(
            f"the bundle was built with settings that this version of vss does not know ({fault(error)})."
        ) from error


def _build_plan(values: dict[str, Any], bundle: Path) -> BuildPlan:
    if values.get("calibration"):  # plans of older versions
        raise VssError(
            "the engine was calibrated inside of TensorRT 10, which is not repeated; ship an ONNX with Q/DQ."
        )
    values = {key: value for key, value in values.items() if key != "calibration"}
    libraries = sorted((bundle / "engine").glob("*.so"))
    return BuildPlan(**{**values, "plugins": libraries, "timing_cache": None})


def _written(copy: Path, manifest: Manifest, built: Path, spec: dict[str, Any], verdict: dict[str, Any]) -> Manifest:
    """Put the new engine everywhere, and note where and how well it was built."""
    backend, target = manifest.engine.backend, f"engine/rebuilt{built.suffix}"
    if manifest.engine.file != manifest.onnx:
        (copy / manifest.engine.file).unlink()
        beside(copy / manifest.engine.file).unlink(missing_ok=True)
    shutil.copyfile(built, copy / target)
    copy_about(built, copy / target)
    for variant, place in manifest.triton.items():
        for old in (copy / place).glob(f"*/1/{VARIANTS[variant].file}"):
            shutil.copyfile(copy / target, old)
    digest = sha256_file(copy / target)
    versions = {name: version for name in RUNTIME[backend] if (version := package_version(name))}
    as_written = manifest.engine.as_written
    engine = Engine(
        backend=backend,
        file=target,
        as_written=as_written,
        spec=spec,
        device=bound_to(backend, copy / target),
        versions=versions,
    )
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
