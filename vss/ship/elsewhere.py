"""Engines of a bundle for GPUs that need not be here: built from its ONNX file, checked against it, and not run.

Two builds of one file differ in their bytes, so nothing compares the hash of an engine with that of another build: what
ties an engine to the bundle is the hash of the ONNX file that it states.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vss.core.environment import environment
from vss.core.errors import GateFailed, VssError
from vss.core.files import atomic, sha256_file
from vss.deploy import BuildPlan, BuildSpec
from vss.deploy.backends import of_tensorrt
from vss.deploy.backends.trt import TensorRTBackend, failed_checks
from vss.deploy.backends.trt_flavour import FLAVOURS, gpus
from vss.deploy.backends.trt_runner import read_about
from vss.ship.manifest import Elsewhere, Manifest, damage, inside, read, seal
from vss.ship.runtimes import runtime_of
from vss.ship.source import Source, copy_about, readme

REQUIREMENTS = "requirements-elsewhere.txt"


def copy_engines(folder: Path, source: Source) -> list[Elsewhere]:
    """Copy the engines that the run has built beside the shipped one, with their plugins, into `engine/`.

    One in INT8 may be of an ONNX file of its own: what its runtime does not run in INT8 is in floating point there.
    """
    found = []
    for path in source.built:
        about = _about(path)
        onnx, own = "engine/model.onnx", path.with_name(about["onnx"])
        if not own.is_file() or sha256_file(own) != about["onnx_sha256"]:
            raise VssError(f"{path} was built of another file than {own.name}; run the recipe again.")
        if sha256_file(own) != sha256_file(source.files["onnx"]):
            onnx = f"engine/model.{about['flavour']}.onnx"
            shutil.copyfile(own, folder / onnx)
        for name in about["plan"]["plugins"]:
            if not path.with_name(name).is_file():
                raise VssError(
                    f"{path} needs the plugins in {name}, which the run does not hold; run the recipe again."
                )
            shutil.copyfile(path.with_name(name), folder / "engine" / name)
        found.append(_put(path, folder, about, onnx))
    return found


def _about(engine: Path) -> dict[str, Any]:
    about = read_about(engine)
    if about is None or not about.get("onnx_sha256"):
        raise VssError(f"{engine} has no {engine.name}.json that says what it is; build it with vss.")
    return about


def _put(engine: Path, folder: Path, about: dict[str, Any], onnx: str) -> Elsewhere:
    """Copy an engine under the name of what it is for."""
    flavour, version = FLAVOURS[about["flavour"]], about["tensorrt"]
    where = re.sub(r"\W+", "-", gpus(about["targets"]))
    target = f"engine/{where}-{flavour.tag}{version}{engine.suffix}"
    shutil.copyfile(engine, folder / target)
    copy_about(engine, folder / target)
    return Elsewhere(backend=flavour.name, version=version, file=target, onnx=onnx, targets=about["targets"])


def requirements(engines: Sequence[Elsewhere]) -> str:
    """What runs them on a GPU; device memory comes from pycuda as well."""
    packages = {FLAVOURS[each.backend].packages[0]: each.version for each in engines}
    return "".join(["numpy\npillow\ncuda-python\n", *(f"{name}=={version}\n" for name, version in packages.items())])


def write_runner(folder: Path, manifest: Manifest) -> None:
    """run.py, and what its engines need beside it."""
    shutil.copyfile(Path(__file__).with_name("standalone.py"), folder / "run.py")
    for backend in (manifest.engine.backend, *(each.backend for each in manifest.elsewhere)):
        for path in runtime_of(backend).runner:
            shutil.copyfile(path, folder / path.name)
    if manifest.elsewhere:
        with atomic(folder / REQUIREMENTS) as temporary:
            temporary.write_text(requirements(manifest.elsewhere))


def check_engines(bundle: Path, manifest: Manifest) -> str:
    """Each is what the file beside it says, and of its ONNX file in the bundle."""
    told = []
    for each in manifest.elsewhere:
        path = inside(bundle, each.file)
        about = _about(path)
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


def rebuild_elsewhere(bundle: Path, name: str, targets: Sequence[str] = ()) -> Manifest:
    """Build the bundle's engine of a runtime that needs no GPU to build, anew or for the first time, and write it in.

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
    problems = damage(bundle, manifest)
    if problems:
        raise VssError(f"{bundle} is damaged: {problems[0]}; copy the bundle again.")
    reason = backend.unavailable()
    if reason:
        raise VssError(reason)
    old = [each for each in manifest.elsewhere if each.backend == backend.name]
    onnx = old[0].onnx if old else manifest.onnx
    wanted = tuple(targets) or tuple(old[0].targets if old else ())
    with tempfile.TemporaryDirectory(prefix=".rebuild-", dir=bundle.resolve().parent) as scratch:
        copy = Path(scratch) / "bundle"
        shutil.copytree(bundle, copy)
        built = _built(copy, manifest, onnx, backend, wanted, Path(scratch))
        for each in old:
            for path in (inside(copy, each.file), inside(copy, f"{each.file}.json")):
                path.unlink()
        fresh = _put(built, copy, _about(built), onnx)
        note = {
            "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "machine": environment()["machine"],
            "engine_sha256": sha256_file(built), "file": fresh.file, "samples": None,
        }  # fmt: skip
        rest = [each for each in manifest.elsewhere if each.backend != backend.name]
        changes = {"elsewhere": [*rest, fresh], "rebuilds": [*manifest.rebuilds, note]}
        changed = manifest.model_copy(update=changes)
        write_runner(copy, changed)
        with atomic(copy / "README.md") as temporary:
            temporary.write_text(readme(changed, changed.plugins()))
        sealed = seal(copy, changed)
        bundle.resolve().rename(Path(scratch) / "old")
        copy.rename(bundle.resolve())
    return sealed


def _built(
    copy: Path, manifest: Manifest, onnx: str, backend: TensorRTBackend, targets: tuple[str, ...], scratch: Path
) -> Path:
    libraries = tuple(inside(copy, name) for name in manifest.plugins())
    spec = BuildSpec(plan=BuildPlan(targets=targets, plugins=libraries))
    built = backend.build(inside(copy, onnx), scratch / "built.engine", spec)
    if failed := failed_checks(built):
        raise GateFailed(f"the new engine is not what {onnx} asks for: {failed[0]}")
    return built
