"""`vss verify` and `vss rebuild`: is a bundle whole, does its engine give its answers, and is it built anew here?"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from vss.core.environment import cuda_devices, environment, package_version
from vss.core.errors import GateFailed, VssError, fault
from vss.core.files import sha256_file, write_text
from vss.core.report import read_report
from vss.deploy import BuildSpec, Session
from vss.deploy.backends import available, of_tensorrt
from vss.deploy.backends.trt import failed_checks
from vss.deploy.backends.trt_flavour import FLAVOURS
from vss.deploy.backends.trt_plan import BuildPlan
from vss.deploy.onnx_file import metadata, stated
from vss.ship.bundle import bound_to
from vss.ship.manifest import Engine, Link, Manifest, damage, inside, read, seal
from vss.ship.samples import SamplesVerdict, check_samples
from vss.ship.source import about_of, beside, copy_about, hash_of, put_engine, readme, requirements, write_runner
from vss.ship.triton import CONFIG, VARIANTS, parse, runtime_of

Row = dict[str, str]
STATED = {"weights": "vss.weights_sha256", "calibration": "vss.ranges_sha256"}
"""Links that the ONNX file states in its metadata (of a plan in several rounds it states the last round alone)."""
MAX_NAMED = 5


def verify(bundle: Path, *, run: bool = True) -> list[Row]:
    """Check a bundle folder; one row {"name", "status", "detail"} per check, all of them "ok" or "skipped"; that
    of a gate that failed or was never judged, and was accepted in words, is "accepted".

    Args:
        run: also run the engine (smoke inference, samples). Without it nothing but files is looked at.

    Raises:
        GateFailed: the engine's answers or metrics differ from those that were shipped.
        VssError: everything else that is wrong, by the names of the files.
    """
    manifest = read(bundle)
    rows: list[Row] = []

    def check(name: str, work: Callable[[], str]) -> None:
        rows.append({"name": name, "status": "ok", "detail": work()})

    check("files", lambda: whole(bundle, manifest))
    check("hash chain", lambda: _chain(bundle, manifest))
    check("gate", lambda: _gate(manifest))
    if manifest.forced:
        rows[-1]["status"] = "accepted"
    check("server repositories", lambda: _repositories(bundle, manifest))
    if manifest.elsewhere:
        check("engines for GPUs elsewhere", lambda: _elsewhere(bundle, manifest))
    if not run:
        return [*rows, {"name": "engine", "status": "skipped", "detail": "asked not to run it"}]
    with open_engine(bundle, manifest) as session:
        check("engine", lambda: _smoke(session, manifest))
        check("samples", lambda: _samples(bundle, manifest, session))
    return rows


def whole(bundle: Path, manifest: Manifest) -> str:
    """Raise `VssError` with the names of files that are missing, changed or not listed."""
    problems = damage(bundle, manifest)
    if problems:
        more = f" and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise VssError(f"{bundle} is damaged: {'; '.join(problems[:MAX_NAMED])}{more}; copy the bundle again.")
    return f"{len(manifest.files)} files as shipped"


def _chain(bundle: Path, manifest: Manifest) -> str:
    """Every link's file has its hash, and the ONNX file states the links that the chain begins with."""
    known = metadata(inside(bundle, manifest.onnx))
    for link in manifest.chain:
        if link.what in STATED and known.get(STATED[link.what]) != link.sha256:
            raise VssError(f"{manifest.onnx} was made from other {link.what} than the manifest's chain says.")
        if link.file is not None and hash_of(link.what, inside(bundle, link.file)) != link.sha256:
            raise VssError(f"{link.file} is not the {link.what} of the manifest's chain; copy the bundle again.")
    if manifest.link("weights") is None or manifest.link("onnx") is None or manifest.link("engine") is None:
        raise VssError("the manifest's chain lacks its weights, its ONNX file or its engine; ship the run again.")
    image = stated(known)
    if image is not None and image != manifest.image.model_dump(mode="json"):
        raise VssError(
            f"{manifest.onnx} takes images of {image} and the manifest says {manifest.image}; ship it again."
        )
    report = manifest.link("report")
    if report is not None and report.file is not None:
        read_report(inside(bundle, report.file))
    return " -> ".join(link.what for link in manifest.chain)


def _gate(manifest: Manifest) -> str:
    """Every gate in a line of its own; what failed must have been accepted in words."""
    checks = (manifest.gate or {}).get("checks", [])
    if not manifest.forced and (not checks or any(check["passed"] is False for check in checks)):
        raise VssError(f"the bundle of {manifest.name} has no passed gate and does not say that it was forced.")
    told = [f"{check.get('what', 'gate')} {check['sentence']}" for check in checks]
    return "\n".join([*([manifest.forced] if manifest.forced else []), *told])


def _repositories(bundle: Path, manifest: Manifest) -> str:
    count = 0
    for place in manifest.triton.values():
        for config in sorted(inside(bundle, place).glob(f"*/{CONFIG}")):
            if parse(config).name != config.parent.name:
                raise VssError(f"{config} names another model than its folder.")
            count += 1
    return f"{count} models in {', '.join(manifest.triton)}" if manifest.triton else "none for this runtime"


def _elsewhere(bundle: Path, manifest: Manifest) -> str:
    """Each is what the file beside it says, and of its ONNX file in the bundle."""
    told = []
    for each in manifest.elsewhere:
        path = inside(bundle, each.file)
        about = about_of(path)
        if about["sha256"] != sha256_file(path) or about["onnx_sha256"] != sha256_file(inside(bundle, each.onnx)):
            raise VssError(
                f"{each.file} was not built of {each.onnx}; run: vss rebuild {bundle} --backend {each.backend}"
            )
        if [about["flavour"], about["tensorrt"], about["targets"]] != [each.backend, each.version, each.targets]:
            raise VssError(
                f"{each.file} is for other GPUs or of another version than the manifest says; ship it again."
            )
        told.append(f"{FLAVOURS[each.backend].title} {each.version} for {each.where}: of {each.onnx}, not run")
    return "\n".join(told)


def open_engine(bundle: Path, manifest: Manifest) -> Session:
    """The bundle's engine; one that was built for another device is refused before it is opened."""
    refuse_foreign(manifest, bundle)
    session: Session = available(manifest.engine.backend).open(inside(bundle, manifest.engine.file))
    return session


def refuse_foreign(manifest: Manifest, bundle: Path) -> None:
    """Raise `VssError` when the engine belongs to another GPU, or another version of its runtime."""
    wanted = manifest.engine.device
    if wanted is None or "targets" in wanted:  # such an engine is refused when it is opened
        return
    devices = cuda_devices()
    here = {key: devices[0][key] if devices else "no GPU" for key in ("name", "capability")}
    version = package_version("tensorrt")
    level = wanted.get("hardware", "NONE")
    keys = {"SAME_COMPUTE_CAPABILITY": ["capability"], "AMPERE_PLUS": []}.get(level, ["name", "capability"])
    wrong = [f"{key} {wanted.get(key)} (here: {here[key]})" for key in keys if wanted.get(key) != here[key]]
    if level == "AMPERE_PLUS" and not (devices and float(here["capability"] or 0) >= 8):
        wrong.append(f"a GPU of capability 8.0 or more (here: {here['capability']})")
    if version and version != wanted.get("tensorrt") and not wanted.get("version_compatible"):
        wrong.append(f"TensorRT {wanted.get('tensorrt')} (here: {version})")
    if wrong:
        raise VssError(f"the engine was built for {', '.join(wrong)}; run: vss rebuild {bundle}")


def _smoke(session: Session, manifest: Manifest) -> str:
    """Bindings as stated, and an answer for one image and for two."""
    for shipped, found in ((manifest.inputs, session.inputs), (manifest.outputs, session.outputs)):
        told = {name: (each.dtype, tuple(each.shape)) for name, each in shipped.items()}
        real = {name: (each.dtype, each.shape) for name, each in found.items()}
        if told != real:
            raise VssError(f"the engine has the bindings {real}; the manifest states {told}.")
    shapes: dict[str, object] = {}
    binding = session.inputs["image"]
    for batch in (1, 2) if binding.shape[0] is None else (binding.shape[0],):
        zeros = np.zeros((batch, *(side or 1 for side in binding.shape[1:])), binding.dtype)
        shapes = {name: value.shape for name, value in session.run({"image": zeros}).items()}
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _samples(bundle: Path, manifest: Manifest, session: Session) -> str:
    if not manifest.samples.images:
        return "none were shipped"
    found = check_samples(bundle, manifest, session)
    scores = ", ".join(f"{key} {value:.2f}" for key, value in found.metrics.items())
    return f"{found.images} images, {scores}; distance {found.distance:.2g} of 1"


def rebuild(bundle: Path, *, max_drop: float = 0.1, options: dict[str, object] | None = None) -> Manifest:
    """Build, compare with the shipped samples where it can run, write the engine into the bundle and its repositories.

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
    with _anew(bundle) as (copy, scratch):
        built = backend.build(inside(copy, manifest.onnx), scratch / f"built{suffix}", build_spec(spec, copy))
        runtime, verdict = of_tensorrt(manifest.engine.backend), None
        if runtime is None or not runtime.flavour.targets or cuda_devices():  # else it cannot run here
            with backend.open(built) as session:
                verdict = check_samples(copy, manifest, session, max_drop=max_drop)
        if runtime:
            _require_asked(built, manifest.onnx)
        return _written(copy, manifest, built, spec, verdict)


@contextlib.contextmanager
def _anew(bundle: Path) -> Iterator[tuple[Path, Path]]:
    """A copy of a bundle, which takes its place when all went well, and the folder to build in."""
    with tempfile.TemporaryDirectory(prefix=".rebuild-", dir=bundle.resolve().parent) as folder:
        copy = Path(folder) / "bundle"
        shutil.copytree(bundle, copy)
        yield copy, Path(folder)
        bundle.resolve().rename(Path(folder) / "old")
        copy.rename(bundle.resolve())


def _require_asked(built: Path, onnx: str) -> None:
    if failed := failed_checks(built):
        raise GateFailed(f"the new engine is not what {onnx} asks for: {failed[0]}")


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


def _written(
    copy: Path, manifest: Manifest, built: Path, spec: dict[str, object], verdict: SamplesVerdict | None
) -> Manifest:
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
    engine = Engine(
        backend=backend,
        file=target,
        as_written=manifest.engine.as_written,
        spec=spec,
        device=bound_to(backend, copy / target),
        versions=runtime_of(backend).versions,
    )
    chain = [Link(what="engine", sha256=digest, file=target) if x.what == "engine" else x for x in manifest.chain]
    note = _note(built, samples=verdict.model_dump() if verdict else None)
    changes = {"engine": engine, "chain": chain, "rebuilds": [*manifest.rebuilds, note]}
    fresh = manifest.model_copy(update=changes)
    write_text(copy / "requirements.txt", requirements(fresh))
    return seal(copy, fresh)


def _note(engine: Path, **facts: object) -> dict[str, object]:
    """Where and when an engine was built, for the manifest."""
    when, machine = time.strftime("%Y-%m-%dT%H:%M:%S%z"), environment()["machine"]
    return {"when": when, "machine": machine, "engine_sha256": sha256_file(engine), **facts}


def rebuild_elsewhere(bundle: Path, name: str, targets: Sequence[str] = ()) -> Manifest:
    """Build the bundle's engine of a runtime that needs no GPU to build, anew or for the first time, and write it in.

    Two builds of one file differ in their bytes: what ties an engine to the bundle is the hash of the ONNX file that it
    states.

    Args:
        name: of the runtime.
        targets: GPUs; none: those of the engine that it replaces.

    Raises:
        GateFailed: the new engine is not what the file asked for; the bundle stays as it was.
        VssError: a damaged bundle, or a runtime that cannot build this file here.
    """
    manifest, backend = read(bundle), of_tensorrt(name)
    if backend is None or not backend.flavour.targets:
        able = [each.name for each in FLAVOURS.values() if each.targets]
        raise VssError(f"--backend {name} builds no engines for GPUs elsewhere; expected {' or '.join(able)}.")
    whole(bundle, manifest)
    available(backend.name)
    old = [each for each in manifest.elsewhere if each.backend == backend.name]
    onnx = old[0].onnx if old else manifest.onnx
    wanted = tuple(targets) or tuple(old[0].targets if old else ())
    with _anew(bundle) as (copy, scratch):
        libraries = tuple(inside(copy, library) for library in manifest.plugins())
        spec = BuildSpec(plan=BuildPlan(targets=wanted, plugins=libraries))
        built = backend.build(inside(copy, onnx), scratch / "built.engine", spec)
        _require_asked(built, onnx)
        for each in old:
            for path in (inside(copy, each.file), inside(copy, f"{each.file}.json")):
                path.unlink()
        fresh = put_engine(built, copy, about_of(built), onnx)
        rest = [each for each in manifest.elsewhere if each.backend != backend.name]
        rebuilds = [*manifest.rebuilds, _note(built, file=fresh.file, samples=None)]
        changed = manifest.model_copy(update={"elsewhere": [*rest, fresh], "rebuilds": rebuilds})
        write_runner(copy, changed)
        write_text(copy / "README.md", readme(changed, changed.plugins()))
        return seal(copy, changed)
