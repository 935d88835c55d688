"""`vss verify`: is the bundle whole, does it say one thing, does its engine still give its answers?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vss.core.environment import cuda_devices, package_version
from vss.core.errors import VssError
from vss.core.files import sha256_file
from vss.core.report import read_report
from vss.deploy import Session
from vss.deploy.backends import available
from vss.deploy.onnx_file import metadata
from vss.deploy.ranges import Ranges
from vss.deploy.stated import stated
from vss.prune import Plan
from vss.ship.manifest import Manifest, damage, inside, read
from vss.ship.samples import check_samples
from vss.ship.triton import CONFIG, parse

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
    if not run:
        return [*rows, {"name": "engine", "status": "skipped", "detail": "asked not to run it"}]
    session = open_engine(bundle, manifest)
    try:
        check("engine", lambda: _smoke(session, manifest))
        check("samples", lambda: _samples(bundle, manifest, session))
    finally:
        session.close()
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


def hash_of(what: str, path: Path) -> str:
    """The hash by which a link of the chain names its file; see `vss.ship.manifest.Link`."""
    if what == "plan":
        return Plan.load(path).sha256()
    return Ranges.load(path).sha256() if what == "calibration" else sha256_file(path)


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
    return f"{count} models in {', '.join(manifest.triton)}"


def open_engine(bundle: Path, manifest: Manifest) -> Session:
    """The bundle's engine; one that was built for another device is refused before it is opened."""
    refuse_foreign(manifest, bundle)
    session: Session = available(manifest.engine.backend).open(inside(bundle, manifest.engine.file))
    return session


def refuse_foreign(manifest: Manifest, bundle: Path) -> None:
    """Raise `VssError` when the engine belongs to another GPU, or another version of its runtime."""
    wanted = manifest.engine.device
    if wanted is None:
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
    import numpy as np

    shapes: dict[str, Any] = {}
    binding = session.inputs["image"]
    for batch in (1, 2) if binding.shape[0] is None else (binding.shape[0],):
        zeros = np.zeros((batch, *(side or 1 for side in binding.shape[1:])), binding.dtype)
        shapes = {name: value.shape for name, value in session.run({"image": zeros}).items()}
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _samples(bundle: Path, manifest: Manifest, session: Session) -> str:
    if not manifest.samples.images:
        return "none were shipped"
    found = check_samples(bundle, manifest, session)
    scores = ", ".join(f"{key} {value:.2f}" for key, value in found["metrics"].items())
    return f"{found['images']} images, {scores}; distance {found['distance']:.2g} of 1"
