"""A few images in the bundle with their truth and the shipped engine's answers, and the comparison with new answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vss.core.closeness import relative_difference
from vss.core.environment import cuda_devices, package_version
from vss.core.errors import GateFailed, VssError, shown
from vss.core.files import atomic, read_array, sha256_file
from vss.core.report import read_report
from vss.data.images import open_rgb, read_stored_mask
from vss.deploy import Session
from vss.deploy.backends import available
from vss.deploy.onnx_file import metadata, stated
from vss.deploy.quantize.ranges import Ranges
from vss.prune import Plan
from vss.ship.manifest import Manifest, Samples, damage, inside, read
from vss.ship.standalone import prepare, readable
from vss.ship.triton import CONFIG, parse
from vss.train.metrics import confusion_per_image, scores

LABELS_AGREE = 0.999  # share of equal labels: another processor may round a near-tie the other way
LOGITS_CLOSE = 1e-3  # of the spread of the values, see `vss.core.closeness`: the same for numbers


def write_samples(
    bundle: Path, pairs: Iterable[tuple[str, Path, np.ndarray]], session: Session, manifest: Manifest, source: str
) -> Samples:
    """Write images and truth as PNG, and the engine's answers as .npy; returns what the manifest says of them.

    Of an image its upright 8-bit RGB pixels are written and nothing else: no place, time, camera or name from its EXIF.

    Args:
        pairs: (id, image file, (H, W) integer truth at the engine's size, 255 is void).
        session: the opened engine.
        manifest: with image, task and classes.
        source: where the images come from, one sentence.
    """
    images, truths, expected = [], [], []
    for folder in ("images", "truth", "expected"):
        (bundle / "samples" / folder).mkdir(parents=True, exist_ok=True)
    for number, (name, path, truth) in enumerate(pairs):
        stem = f"{number:02d}-{Path(name).name}"
        images.append(f"samples/images/{stem}.png")
        truths.append(f"samples/truth/{stem}.png")
        for file, pixels in ((images[-1], np.asarray(open_rgb(path))), (truths[-1], truth.astype(np.uint8))):
            with atomic(bundle / file) as temporary:
                Image.fromarray(pixels).save(temporary)
        found = session.run({"image": load_image(bundle / images[-1], manifest)[None]})
        files = {}
        for output, value in found.items():
            files[output] = f"samples/expected/{stem}-{output}.npy"
            with atomic(bundle / files[output]) as temporary:
                np.save(temporary, value, allow_pickle=False)
        expected.append(files)
    made = Samples(images=images, truth=truths, expected=expected, source=source)
    answers = [load_expected(bundle, files) for files in expected]
    return made.model_copy(update={"metrics": metrics(bundle, made, answers, manifest)})


def load_image(path: Path, manifest: Manifest) -> np.ndarray:
    """One image as the engine takes it, without the batch dimension."""
    return prepare(open_rgb(path), manifest.image.model_dump(), manifest.inputs["image"].dtype == "uint8")


def load_expected(bundle: Path, files: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Output name -> (1, ...) array, as it was shipped."""
    return {name: read_array(inside(bundle, path)) for name, path in files.items()}


def metrics(
    bundle: Path, samples: Samples, answers: list[dict[str, np.ndarray]], manifest: Manifest
) -> dict[str, float]:
    """What answers score on the samples, in percent: mIoU and pixel accuracy, or the share of right decisions."""
    if not answers:
        return {}
    truth = [read_stored_mask(inside(bundle, path)) for path in samples.truth]
    read = [readable(dict(answer)) for answer in answers]
    if manifest.task == "defect":
        limit = manifest.threshold
        if limit is None:
            return {}
        right = [(one["score"][0] >= limit) == bool((mask == 1).any()) for one, mask in zip(read, truth, strict=True)]
        return {"decision_acc_pct": 100 * float(np.mean(right))}
    classes = len(manifest.classes)
    for path, one, mask in zip(samples.truth, read, truth, strict=True):
        if one.get("labels", mask).shape[-2:] != mask.shape or one["labels"].max() >= classes:
            raise VssError(
                f"the answers to the samples do not fit {path} and {classes} classes; copy the bundle again."
            )
    labels = torch.from_numpy(np.concatenate([one["labels"] for one in read]).astype(np.int64))
    confusion = confusion_per_image(
        labels, torch.from_numpy(np.stack(truth).astype(np.int64)), len(manifest.classes)
    ).sum(0)
    found = scores(confusion)
    return {key: found[key] for key in ("miou_pct", "pixel_acc_pct") if found[key] is not None}


def run_samples(bundle: Path, manifest: Manifest, session: Session) -> list[dict[str, np.ndarray]]:
    """The session's answers to every sample."""
    paths = [inside(bundle, path) for path in manifest.samples.images]
    return [session.run({"image": load_image(path, manifest)[None]}) for path in paths]


def compare(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """How far answers lie apart: share of unequal labels over 1 - LABELS_AGREE, or relative error over LOGITS_CLOSE.

    At most 1 is equal within the stated tolerance. Raises `VssError` when names or shapes differ.
    """
    worst = 0.0
    for name, want in expected.items():
        if name not in found or found[name].shape != want.shape:
            got = found[name].shape if name in found else "nothing"
            raise VssError(f"{name!r} of the engine is {got}; the bundle was shipped with {want.shape}.")
        if np.issubdtype(want.dtype, np.integer):
            worst = max(worst, float((want != found[name]).mean()) / (1 - LABELS_AGREE))
            continue
        difference = relative_difference(torch.from_numpy(want), torch.from_numpy(found[name]))
        worst = max(worst, difference / LOGITS_CLOSE)
    return worst


def check_samples(bundle: Path, manifest: Manifest, session: Session, *, max_drop: float = 0.1) -> dict[str, Any]:
    """Run the samples and compare answers and metrics with those that were shipped.

    Returns:
        {"images", "distance" (see `compare`), "metrics"}.

    Raises:
        GateFailed: answers out of tolerance, or a metric more than `max_drop` points lower.
    """
    answers = run_samples(bundle, manifest, session)
    shipped = [load_expected(bundle, files) for files in manifest.samples.expected]
    distance = max((compare(a, b) for a, b in zip(shipped, answers, strict=True)), default=0.0)
    now = metrics(bundle, manifest.samples, answers, manifest)
    for key, before in manifest.samples.metrics.items():
        if key not in now:
            raise VssError(f"the manifest states {shown(key)} of the samples, which they do not give; ship it again.")
        if now[key] < before - max_drop:
            raise GateFailed(
                f"{key} of the samples is {now[key]:.3f} and was {before:.3f} when the bundle was shipped."
            )
    if distance > 1:
        raise GateFailed(f"the engine's answers to the samples are {distance:.2f} times the tolerance off.")
    return {"images": len(answers), "distance": distance, "metrics": now}


# `vss verify`: is the bundle whole, does it say one thing, does its engine still give its answers?


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
