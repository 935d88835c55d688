"""A few images in a bundle with their truth and the shipped engine's answers, and the comparison with new answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel

from vss.core.closeness import relative_difference
from vss.core.errors import GateFailed, VssError, shown
from vss.core.files import atomic, read_array
from vss.data.images import open_rgb, read_stored_mask
from vss.deploy import Session
from vss.ship.manifest import Manifest, Samples, inside
from vss.ship.standalone import prepare, readable
from vss.train.metrics import confusion_per_image, scores

LABELS_AGREE = 0.999  # share of equal labels: another processor may round a near-tie the other way
LOGITS_CLOSE = 1e-3  # of the spread of the values, see `vss.core.closeness`: the same for numbers


class SamplesVerdict(BaseModel):
    """What an engine gave on the samples; `distance`: see `compare`."""

    images: int
    distance: float
    metrics: dict[str, float]


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


def check_samples(bundle: Path, manifest: Manifest, session: Session, *, max_drop: float = 0.1) -> SamplesVerdict:
    """Run the samples and compare answers and metrics with those that were shipped.

    Raises:
        GateFailed: answers out of tolerance, or a metric more than `max_drop` points lower.
    """
    paths = [inside(bundle, path) for path in manifest.samples.images]
    answers = [session.run({"image": load_image(path, manifest)[None]}) for path in paths]
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
    return SamplesVerdict(images=len(answers), distance=distance, metrics=now)
