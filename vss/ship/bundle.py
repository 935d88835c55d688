"""From the folder of a run to a bundle that an inference team takes and runs without this package."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vss.core import __version__
from vss.core.config import Recipe
from vss.core.environment import environment
from vss.core.errors import GateFailed, VssError, shown
from vss.core.files import at_rest, file_at_work, made_beside, sha256_file, write_text
from vss.core.report import write_report
from vss.data import pixels, require_classes
from vss.deploy import Session
from vss.deploy.backends import available, of_tensorrt
from vss.deploy.backends.base import check_finite
from vss.deploy.backends.trt_runner import read_about
from vss.deploy.onnx_file import metadata
from vss.deploy.quantize.ranges import Ranges
from vss.run.page import render
from vss.run.project import Project
from vss.ship.manifest import NAME, Engine, Image, Link, Manifest, Samples, Tensor, is_archive, pack, seal
from vss.ship.samples import write_samples
from vss.ship.source import (
    Source,
    beside,
    copy_about,
    copy_engines,
    hash_of,
    model_card,
    open_run,
    public,
    readme,
    requirements,
    write_runner,
)
from vss.ship.triton import RUNTIMES, Serving, runtime_of, write_repository
from vss.train.tasks.base import PRUNED

HERE = Path(__file__).parent
RANGES = "engine/ranges.json"


def ship(
    run: Path,
    to: Path,
    *,
    row: str | None = None,
    name: str | None = None,
    data_root: str | None = None,
    samples: int = 4,
    accept: str | None = None,
    force: bool = False,
    licences: dict[str, str] | None = None,
    **serving: object,
) -> Manifest:
    """Write the bundle of one engine; `to` is whole or absent.

    Args:
        run: folder of a finished `vss run`.
        to: a new folder, or a file that ends in .tar.gz.
        row: the engine, by its row in the report.
        name: of the model in the server; the recipe's name.
        data_root: where the images are now; the recipe's.
        samples: images of the reported split that go along.
        accept: why an engine whose gate failed is shipped all the same; the manifest and the card say so.
        force: ship an engine that no gate judged; the manifest and the card say so.
        licences: "weights" and "data" for the card.
        serving: max_batch, delay_us, instances, threads of `vss.ship.triton.Serving`.

    Raises:
        GateFailed: a gate of the engine failed, and no `accept`.
        VssError: no gate judged it and no `force`, `to` exists, data or packages missing.
    """
    to = to.resolve() if to.is_symlink() else to
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise VssError(f"{to} exists already; name a new folder, or remove it first.")
    with at_rest(run), file_at_work(to):
        source = open_run(run, row)
        name = name or source.report["name"]
        if not re.fullmatch(NAME, name):
            raise VssError(f"{name!r} is no name of a model; give --name with letters, digits, '_', '-' and '.' alone.")
        forced = _gate(source, accept, force)
        return _whole(
            to, lambda folder: _write(folder, source, name, data_root, samples, forced, licences or {}, serving)
        )


def _whole(to: Path, write: Callable[[Path], Manifest]) -> Manifest:
    """Write a bundle beside `to` and give it its name when it is whole; what a killed one left goes first."""
    with made_beside(to) as temporary:
        folder = temporary / "bundle"
        folder.mkdir()
        manifest = write(folder)
        if is_archive(to):
            pack(folder, to)
        else:
            if to.exists():
                to.rmdir()
            folder.rename(to)
    return manifest


def _gate(source: Source, accept: str | None, force: bool) -> str | None:
    """None when the gates passed, else what is written down when it is shipped all the same."""
    failed = [f"gate {each.get('what', '')} {each['sentence']}" for each in source.gate if each["passed"] is False]
    if accept is not None and not (failed and accept.strip()):
        wanted = "words that say why" if failed else "it is for a run whose gate failed, and none did: leave it away"
        raise VssError(f"--accept-failed-gate is {shown(accept)}; {wanted}.")
    if failed:
        told = " ".join(failed)
        if accept is None:
            raise GateFailed(
                f"{source.run} is not shipped: {told} "
                '--accept-failed-gate "REASON" ships it and writes the reason into the model card.'
            )
        return f"shipped although a gate failed: {told} Accepted because: {' '.join(accept.split())}"
    if any(check.get("what", "").startswith(PRUNED) for check in source.gate) or (source.gate and not source.pruned):
        return None
    reason = "nothing judged what pruning cost" if source.gate else f"no gate judged {source.row!r}"
    if not force:
        more = "; run the recipe again (finished steps are kept)" if source.gate else ""
        raise VssError(f"{source.run} is not shipped: {reason}{more}; --force ships it and writes that down.")
    return f"shipped with --force: {reason}"


def _write(
    folder: Path,
    source: Source,
    name: str,
    data_root: str | None,
    amount: int,
    forced: str | None,
    licences: dict[str, str],
    serving: dict[str, object],
) -> Manifest:
    files = _copy(folder, source)
    with available(source.backend).open(source.files["engine"]) as session:
        zeros = {n: np.zeros([side or 1 for side in b.shape], b.dtype) for n, b in session.inputs.items()}
        check_finite(session, zeros, str(source.files["engine"]))
        manifest = _manifest(folder, source, session, files, name, forced, licences)
        manifest.elsewhere = copy_engines(folder, source)
        setting = _serving(manifest, session, serving)
        for variant in runtime_of(source.backend).variants:
            place = f"triton/{variant}"
            write_repository(folder / place, variant, setting, folder / files["engine"])
            manifest.triton[variant] = place
        manifest.serving.update({key: getattr(setting, key) for key in SERVING_KEYS})
        manifest.samples = _samples(folder, source, session, manifest, data_root, amount)
    _texts(folder, manifest, source, [path for role, path in files.items() if role.startswith("plugins")])
    return seal(folder, manifest)


SERVING_KEYS = ("max_batch", "delay_us", "instances", "threads")


def _copy(folder: Path, source: Source) -> dict[str, str]:
    """Copy the run's files; role -> path in the bundle. An engine that is the ONNX file itself is one file."""
    files = {"onnx": "engine/model.onnx", "report": "reports/report.json"}
    engine = source.files["engine"]
    needed = (read_about(engine) or {}).get("plan", {}).get("plugins") if of_tensorrt(source.backend) else None
    libraries = [role for role in source.files if role.startswith("plugins")]
    if needed and not libraries:
        raise VssError(f"{engine} needs the plugins in {', '.join(needed)}, which the run does not hold; add the file.")
    same = read_about(engine) is None and sha256_file(source.files["onnx"]) == sha256_file(engine)
    files["engine"] = files["onnx"] if same else f"engine/built{engine.suffix}"
    sources = {**source.files}
    files |= {role: f"engine/{source.files[role].name}" for role in libraries}
    optional = {"plan": ("plan.json", _plan(source)), "calibration": (RANGES, _ranges(source))}
    for role, (target, path) in optional.items():
        if path is not None and path.is_file():
            files[role], sources[role] = target, path
    for role, target in files.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        if role in sources:
            shutil.copyfile(sources[role], folder / target)
    copy_about(engine, folder / files["engine"])
    _reports(folder, files, source)
    return files


def _reports(folder: Path, files: dict[str, str], source: Source) -> None:
    """The report and, where the run has one, its page: both from what may leave the house."""
    write_report(folder / files["report"], source.report)
    if (source.run / "report.html").is_file():
        files["page"] = "reports/report.html"
        write_text(folder / files["page"], render(source.report, source.run, linked=False))


def _plan(source: Source) -> Path | None:
    return source.run / "plan.json" if "vss.plan_sha256" in metadata(source.files["onnx"]) else None


def _ranges(source: Source) -> Path | None:
    """The run's ranges (with the list of calibration images) whose hash the ONNX file states."""
    stated = metadata(source.files["onnx"]).get("vss.ranges_sha256")
    if stated is None:
        return None
    for path in sorted((source.run / "ranges").glob("*.json")):
        if Ranges.load(path).sha256() == stated:
            return path
    raise VssError(f"{source.run}/ranges does not hold the ranges of {source.files['onnx']}; run the recipe again.")


def _manifest(
    folder: Path,
    source: Source,
    session: Session,
    files: dict[str, str],
    name: str,
    forced: str | None,
    licences: dict[str, str],
) -> Manifest:
    report, backend = source.report, source.backend
    sides = {key: {n: Tensor(dtype=b.dtype, shape=list(b.shape)) for n, b in values.items()} for key, values in (
        ("inputs", session.inputs), ("outputs", session.outputs))}  # fmt: skip
    return Manifest(
        name=name,
        row=source.row,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        vss=__version__,
        versions=environment()["packages"],
        task="defect" if "decision" in session.outputs else "segmentation",
        threshold=source.metrics.get("threshold"),
        image=Image(**source.preprocess.model_dump()),
        inputs=sides["inputs"],
        outputs=sides["outputs"],
        classes=report.get("classes", []),
        palette=report.get("palette", []),
        onnx=files["onnx"],
        engine=Engine(
            backend=backend,
            file=files["engine"],
            as_written=session.describe().get("optimisation") == "disabled",
            spec=_spec(source),
            device=bound_to(backend, source.files["engine"]),
            versions=runtime_of(backend).versions,
        ),
        chain=_chain(folder, source, files),
        gate={"checks": source.gate} if source.gate else None,
        forced=forced,
        metrics=source.metrics,
        samples=Samples(),
        triton={},
        serving={},
        licences={"code": "Apache-2.0", "weights": "not stated", "data": "not stated"} | licences,
    )


def _spec(source: Source) -> dict[str, object]:
    """As the run states it, without folders of its machine; what TensorRT was asked for stands beside its engine."""
    about = read_about(source.files["engine"]) if of_tensorrt(source.backend) else None
    if about:
        return {"plan": public(about["plan"])}
    asked = source.spec.get("openvino")
    return {**source.spec, **({"openvino": {**asked, "cache": None}} if asked else {})}


def bound_to(backend: str, engine: Path) -> dict[str, object] | None:
    """What an engine belongs to, by the file beside it; None for a runtime whose artefacts run anywhere."""
    runtime = of_tensorrt(backend)
    if runtime is None:
        return None
    about = read_about(engine)
    if about is None:
        raise VssError(f"{engine} has no {beside(engine).name} that says what it is; build it with vss.")
    if runtime.flavour.targets:
        return {"targets": about["targets"], backend: about["tensorrt"]}
    major, minor = about["device"]["capability"]
    plan = {key: about["plan"][key] for key in ("hardware", "version_compatible")}
    return {"name": about["device"]["name"], "capability": f"{major}.{minor}", "tensorrt": about["tensorrt"], **plan}


def _chain(folder: Path, source: Source, files: dict[str, str]) -> list[Link]:
    """weights -> plan -> calibration -> onnx -> engine -> report, checked where two of them state each other's hash."""
    facts = metadata(source.files["onnx"])
    chain = [Link(what="weights", sha256=facts["vss.weights_sha256"])]
    if "plan" in files:
        digest, rounds = hash_of("plan", source.run / "plan.json"), source.report["recipe"]["prune"]["steps"]
        if rounds == 1 and digest != facts["vss.plan_sha256"]:
            raise VssError(f"{source.run}/plan.json is not the plan of {source.files['onnx']}; run the recipe again.")
        chain.append(Link(what="plan", sha256=digest, file=files["plan"]))
    if "calibration" in files:
        chain.append(Link(what="calibration", sha256=facts["vss.ranges_sha256"], file=files["calibration"]))
    for what in ("onnx", "engine"):
        chain.append(Link(what=what, sha256=sha256_file(source.files[what]), file=files[what]))
    return [*chain, Link(what="report", sha256=sha256_file(folder / files["report"]), file=files["report"])]


def _serving(manifest: Manifest, session: Session, settings: dict[str, Any]) -> Serving:
    return Serving(
        name=manifest.name,
        inputs=session.inputs,
        outputs=session.outputs,
        mean=manifest.image.mean,
        std=manifest.image.std,
        labels=manifest.classes,
        as_written=manifest.engine.as_written,
        backend=manifest.engine.backend,
        **settings,
    )


def _samples(
    folder: Path, source: Source, session: Session, manifest: Manifest, data_root: str | None, amount: int
) -> Samples:
    if not amount:
        return Samples(source="none were shipped")
    recipe = Recipe.model_validate(source.recipe)
    if data_root:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": data_root})})
    project = Project.open(recipe)
    require_classes(f"the run in {source.run}", manifest.classes, str(project.data.root), project.data.class_names)
    about = f"{amount} images of the {recipe.split} split of {project.data.name}"
    return write_samples(folder, _chosen(project, recipe.split, amount, manifest.task), session, manifest, about)


def _chosen(project: Project, split: str, amount: int, task: str) -> Iterator[tuple[str, Path, np.ndarray]]:
    """Evenly over the split; of a defect set every second one is defective, as far as there are any."""
    data = project.split(split)
    order = [index * len(data) // amount for index in range(min(amount, len(data)))]
    if task == "defect":
        wanted = amount // 2
        defective = [i for i in range(len(data)) if bool((data[i]["mask"] == 1).any())][:wanted]
        sound = [i for i in order if i not in defective]
        order = sorted(defective + sound[: amount - len(defective)])
    for index in order:
        pair = data.pairs[index]
        yield pair.id, pair.image, data[index]["mask"].numpy()


def _texts(folder: Path, manifest: Manifest, source: Source, plugins: list[str]) -> None:
    """Runner, requirements, README, model card, labels, C++ example."""
    write_runner(folder, manifest)
    shutil.copyfile(str(pixels.__file__), folder / "pixels.py")
    if example := runtime_of(manifest.engine.backend).cpp:
        others = [row.cpp for row in RUNTIMES.values() if row.cpp != example]
        shutil.copytree(HERE / "cpp", folder / "cpp", ignore=lambda *_: others)
    texts = {
        "requirements.txt": requirements(manifest),
        "README.md": readme(manifest, plugins),
        "MODEL_CARD.md": model_card(manifest, source),
        "labels.txt": "".join(f"{name}\n" for name in manifest.classes),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
