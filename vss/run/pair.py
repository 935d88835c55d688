"""What `vss evaluate` adds for a pair of networks: speed, how far the outputs moved, agreement with an oracle."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.deploy.bench import noise
from vss.prune import find_groups, quality
from vss.prune.budget import top_channels
from vss.run import candidates
from vss.run.project import Project, project_of
from vss.train import checkpoint
from vss.train.checkpoint import Checkpoint

BATCHES, BATCH = 2, 8


def speed(rows: list[dict[str, Any]], baseline: Path, candidate: Path, *, seconds: float) -> str | None:
    """Add latency, images and pixels a second and the speed-up to both rows, timed in turns in one run.

    Returns:
        None, or the sentence that says why the machine is too noisy; the rows have no times then.
    """
    found = candidates.bench_engines(candidate, baseline, backend=None, threads=None, batch=1, max_seconds=seconds)
    if noisy := noise(found):
        for row in rows:
            row["stable"] = False
        return noisy
    for row in rows:
        timed = found["sessions"][row["name"]]
        height, width = row["resolution"]
        row |= {key: timed[key] for key in ("latency_ms_p50", "latency_ms_p99")}
        row |= {"fps": timed["throughput_fps"], "pixels_per_s": timed["throughput_fps"] * height * width}
        row |= {"speedup": found["speedup"].get(row["name"], {"ratio": 1.0})["ratio"], "stable": True}
    return None


def agreement(
    baseline: Path, candidate: Path, *, dataset: str | None, data_root: str | None, channels: int
) -> dict[str, Any]:
    """Two checkpoints on calibration images of the training split.

    Args:
        baseline, candidate: checkpoints; the second may be a cut and trained version of the first.
        dataset, data_root: where the checkpoint does not say.
        channels: how many channels the oracle leaves out, one at a time; 0: no oracle.

    Returns:
        `reconstruction_mse` of the outputs, `reconstruction_relative` (divided by their mean square), and
        `oracle_overlap`: of the sampled channels, as many as the candidate kept, those whose absence changes the
        baseline's loss most; how many of them are among the kept. `oracle_chance` is what a random choice reaches.
        `oracle_note` says why there is no overlap.
    """
    first, second = checkpoint.read(baseline), checkpoint.read(candidate)
    for key in ("mean", "std"):
        if (first.preprocess or {}).get(key) != (second.preprocess or {}).get(key):
            raise VssError(f"{baseline} and {candidate} take images with another {key}; one input cannot feed both.")
    project = project_of(baseline, data_root=data_root, dataset=dataset, recipe=Recipe())
    batches = list(project.calibration(BATCHES, BATCH))
    return _moved(first, second, batches) | _oracle(project, first, second, batches, channels)


def _moved(first: Checkpoint, second: Checkpoint, batches: list[Any]) -> dict[str, float]:
    error = power = count = 0.0
    with torch.no_grad():
        for images, _ in batches:
            outputs = [net(images) for net in (first.model.eval(), second.model.eval())]
            a, b = (torch.cat([t.flatten() for t in (o if isinstance(o, tuple) else (o,))]).double() for o in outputs)
            if a.shape != b.shape:
                raise VssError("baseline and candidate have outputs of different sizes; they are no pair.")
            error += float((a - b).square().sum())
            power += float(a.square().sum())
            count += a.numel()
    return {"reconstruction_mse": error / count, "reconstruction_relative": error / power if power else 0.0}


def _oracle(
    project: Project, first: Checkpoint, second: Checkpoint, batches: list[Any], channels: int
) -> dict[str, Any]:
    if not channels:
        return {}
    if not second.plans or second.plans[0].weights_sha256 != first.weights_sha256:
        return {"oracle_overlap": None, "oracle_note": "the candidate was not cut from this baseline"}
    plan = functools.reduce(lambda a, b: a.then(b), second.plans)
    kept = {group.id: set(group.kept) for group in plan.groups}
    groups = [g for g in find_groups(first.model, torch.zeros(1, 3, *project.preprocess.size)) if g.id in kept]
    sample = quality.sample_channels(groups, channels)
    stay = torch.tensor([channel in kept[group] for group, channel in sample])
    count = int(stay.sum())
    if not 0 < count < len(sample):
        return {"oracle_overlap": None, "oracle_note": f"{count} of {len(sample)} sampled channels stay; sample more"}
    truth = quality.oracle(first.model, groups, sample, batches, project.task.calibration_loss()).change.abs()
    overlap = float(stay[top_channels(truth, count)].double().mean())
    return {"oracle_overlap": overlap, "oracle_chance": count / len(sample), "oracle_channels": len(sample)}
