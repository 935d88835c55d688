"""What commands of `vss` do with files: any mix of checkpoints, foreign weights and engines, from files alone.

A pair of networks is compared in speed, in how far the outputs moved, and in agreement with an oracle.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError

from vss import models
from vss.core.config import DataConfig, ModelConfig, Recipe
from vss.core.errors import VssError, fault, shown
from vss.core.files import parse_json
from vss.data import Preprocess, require_classes
from vss.deploy import BACKENDS, Binding, Session, bench
from vss.deploy.backends import available
from vss.deploy.backends.base import check_finite
from vss.deploy.bench import noise
from vss.deploy.quantize.precision import Precision, export_as
from vss.prune import count, find_groups, quality
from vss.prune.budget import top_channels
from vss.run import inputs
from vss.run.inputs import CHECKPOINT, backend_of, require_foreign, require_limits, require_timed
from vss.run.project import Project, project_of, read_network
from vss.train.checkpoint import Checkpoint
from vss.train.evaluate import Predictor, engine_predictor
from vss.train.gate import gate
from vss.train.header import header
from vss.train.tasks.base import SHIP

Statistics = dict[str, list[float]]
"""{"mean", "std"} of images, R, G, B in units of 0..1."""


def evaluate(
    candidate: Path,
    baseline: Path | None,
    *,
    split: str,
    dataset: str | None,
    data_root: str | None,
    size: list[int] | None,
    limits: Mapping[str, float | None],
    statistics: Statistics | None = None,
    network: ModelConfig | None = None,
    data: DataConfig | None = None,
) -> dict[str, Any]:
    """Score one or two files (checkpoints or ONNX); with two, also the drop and, with limits, a gate.

    `limits` are `max_drop` and, on validation, for networks that decide about defects, those of `SHIP`; `statistics`
    are mean and std of the images of an engine that does not say them itself; `network` names the factory of
    checkpoints that are not of a registered network; `data` holds options of reading that differ from theirs.
    """
    max_drop, ship = limits.get("max_drop"), {key: limits.get(key) for key in SHIP}
    require_limits(limits, baseline)
    rows, results = [], []
    named = {name: path for name, path in (("baseline", baseline), ("candidate", candidate)) if path is not None}
    scored: Literal["val", "test"] = "val" if split == "val" else "test"
    recipe = Recipe(split=scored, model=network or ModelConfig(), data=data or DataConfig())
    require_foreign(recipe.model, named.values())
    opened = {name: _opened(path, recipe, dataset, data_root, size, statistics) for name, path in named.items()}
    if len(opened) == 2:  # each fits its own data; the two must mean the same
        first, second = (project for project, *_ in opened.values())
        require_classes(str(candidate), second.task.classes, str(baseline), first.task.classes)
    if statistics and not any(needed for *_, needed in opened.values()):
        raise VssError(f"{candidate} says mean and std itself, or takes pixels; leave --mean and --std off.")
    for name, (project, predict, static, _) in opened.items():
        path = named[name]
        result = project.score(predict, split=split)
        results.append(result)
        scores = {key: value for key, value in result.items() if not key.endswith("_per_image")}
        rows.append({"name": name, "file": str(path), **static, **scores})
    figures: dict[str, object] = {"split": split, "rows": rows, "notes": project.task.notes}
    if len(results) == 2:
        span = project.task.drop_interval(results[0], results[1])
        verdict = gate(results[0], results[1], metric=project.task.metric, max_drop=max_drop, interval=span)
        keys = ("drop", "drop_interval", "all_classes")
        figures |= {"comparison": verdict["sentence"], **{key: verdict[key] for key in keys if key in verdict}}
        checks = [] if max_drop is None else [{"what": "candidate against baseline", **verdict}]
        checks += project.task.limits(results[0], results[1], ship)
        if checks:
            worst = next((check for check in checks if not check["passed"]), checks[0])
            figures["gate"] = worst if len(checks) == 1 else {**worst, "checks": checks}
    return figures


def _opened(
    path: Path,
    recipe: Recipe,
    dataset: str | None,
    data_root: str | None,
    size: list[int] | None,
    statistics: Statistics | None,
) -> tuple[Project, Predictor, dict[str, Any], bool]:
    """A file with its data, its predictor, its static figures, and whether `statistics` were needed to feed it."""
    static = {"size_mib": path.stat().st_size / 2**20 if path.is_file() else None}
    if path.suffix == CHECKPOINT:
        project = project_of(path, data_root=data_root, dataset=dataset, recipe=_for(path, recipe))
        if size:
            project = Project(project.recipe, project.data, project.preprocess.model_copy(update={"size": tuple(size)}))
        model = project.load(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        static |= count(model, project.preprocess.size)
        return project, project.task.predictor(model, device), static, False
    session = available(backend_of(path)).open(path)
    preprocess = preprocess_of(path, session, size, statistics)
    if dataset is None or data_root is None:
        raise VssError(f"{path} is an engine and does not know its data; give --dataset and --data-root.")
    settings = recipe.data.said() | {"dataset": dataset, "root": data_root, "size": list(preprocess.size)}
    metadata = session.describe().get("metadata", {})
    made_of = metadata.get("vss.model")
    made = {"name": made_of if made_of in models.MODELS else Recipe().model.name}
    recipe = Recipe.model_validate(recipe.model_dump() | {"data": settings, "model": made})
    project = Project.open(recipe)
    project = Project(project.recipe, project.data, preprocess)
    require_classes(str(path), classes_of(session), str(project.data.root), project.task.classes)
    given = statistics is not None and session.images is None and session.inputs["image"].dtype != "uint8"
    return project, engine_predictor(session, preprocess), static, given


def _for(path: Path, recipe: Recipe) -> Recipe:
    """The recipe without its factory, where a checkpoint is of a registered network and needs none."""
    name = header(path).model
    if recipe.model.factory and name in models.MODELS and name != recipe.model.factory:
        return recipe.model_copy(update={"model": ModelConfig()})
    return recipe


def classes_of(session: Session) -> list[str]:
    """The class names that an exported file carries in its metadata; none where it carries none."""
    stored = session.describe().get("metadata", {}).get("vss.classes")
    names = parse_json(stored, source="the file's metadata vss.classes", kind="vss export") if stored else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise VssError(f"the file's metadata vss.classes is {shown(stored)}; expected names: export it again.")
    return names


def preprocess_of(path: Path, session: Session, size: list[int] | None, statistics: Statistics | None) -> Preprocess:
    """The preprocessing that an engine was made for, by its own metadata; a file that does not give it needs
    `statistics`, unless it takes pixels. A file that contradicts itself is refused."""
    said, binding = session.images, session.inputs.get("image")
    if binding is None:
        raise VssError(f"{path} takes {shown(sorted(session.inputs))}; expected one input 'image': export it with vss.")
    pixels = binding.dtype == "uint8"
    sides = binding.shape[1:3] if pixels else binding.shape[2:4]
    fixed = [side for side in sides if side is not None] if len(sides) == 2 else []
    values: dict[str, Any] = dict(said or statistics or {})
    if not values and not pixels:
        raise VssError(
            f"{path} does not say mean and std of the images it takes, so any score of it would be a guess; export it "
            "again with vss, or give --mean and --std (three numbers each, R,G,B in units of 0..1)."
        )
    if said and len(fixed) == 2 and list(said["size"]) != fixed:
        raise VssError(f"{path} takes images of {fixed} and its metadata says {shown(said['size'])}; export it again.")
    if size or len(fixed) == 2:
        values["size"] = size or fixed
    if "size" not in values:
        raise VssError(f"{path} takes images of any size; give --input-size H,W.")
    try:
        return Preprocess(**values)
    except ValidationError as error:
        raise VssError(f"{path} says of its images that {fault(error)}; export it again.") from error


def export_checkpoint(
    ckpt: Path,
    path: Path,
    *,
    precision: Precision | None = None,
    size: list[int] | None,
    preprocess: bool,
    recipe: Recipe | None = None,
    **options: Any,
) -> dict[str, object]:
    """Export a checkpoint at its own size and with its own preprocessing, unless another size is given.

    `recipe` names the factory of a network that is not registered, and mean and std where the checkpoint does not.

    `precision` is fp32 or fp16, since INT8 needs data; with `preprocess` the graph takes uint8 images; `options` of
    `vss.deploy.export`.
    """
    recipe = recipe or Recipe()
    require_foreign(recipe.model, [ckpt])
    saved = read_network(ckpt, recipe.model)
    said = saved.preprocess is not None or bool(recipe.data.mean and recipe.data.std and size)
    if not said and (preprocess or not size):
        raise VssError(
            f"{ckpt} does not say its preprocessing; give --input-size, and leave --preprocess off or give data.mean "
            "and data.std."
        )
    if size:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"size": tuple(size)})})
    own = inputs.preprocess_of(ckpt, header(ckpt), recipe) if said else None
    if own and size:
        own = own.model_copy(update={"size": tuple(size)})
    height, width = size or (own.size if own else (0, 0))
    return export_as(
        saved.model,
        path,
        precision or Precision(),
        size=(height, width),
        preprocess=own if preprocess else None,
        expects=own,
        class_names=list(saved.classes) or None,
        plan_sha256=saved.plans[-1].sha256() if saved.plans else None,
        **options,
    )


def bench_engines(
    candidate: Path,
    baseline: Path | None,
    *,
    backend: str | None,
    threads: int | None,
    batch: int,
    max_seconds: float,
    device: str = "cpu",
    precision: str = "fp32",
    network: ModelConfig | None = None,
) -> dict[str, Any]:
    """Time one or two files; checkpoints run in torch on `device` in `precision`, artefacts in `backend` (None: the one
    that they are for). `network` is as in `evaluate`."""
    config = network or ModelConfig()
    paths = {"baseline": baseline, "candidate": candidate}
    require_timed(candidate, baseline, backend=backend, threads=threads, place=(device, precision))
    require_foreign(config, [path for path in paths.values() if path])
    in_torch = {"device": device, "precision": precision, "cuda_graph": device.startswith("cuda")}
    rng = np.random.default_rng(0)
    with ExitStack() as stack:
        sessions = {
            name: stack.enter_context(_session(path, backend, threads, in_torch, config))
            for name, path in paths.items()
            if path is not None
        }
        feeds = {name: {key: _noise(rng, b, batch) for key, b in s.inputs.items()} for name, s in sessions.items()}
        for name, session in sessions.items():
            check_finite(session, feeds[name], str(paths[name]))
        return bench(sessions, feeds, max_seconds=max_seconds, min_seconds=min(2.0, max_seconds))


def _session(
    path: Path, backend: str | None, threads: int | None, in_torch: dict[str, object], config: ModelConfig
) -> Session:
    if path.suffix == CHECKPOINT:
        saved = read_network(path, config)
        if saved.preprocess is None:
            raise VssError(f"{path} does not say its input size; save it with vss.save(..., preprocess=...).")
        preprocess, labels = Preprocess(**saved.preprocess), not isinstance(saved.model, models.DefectModel)
        options = {"size": preprocess.size, "preprocess": preprocess, "labels": labels, **in_torch}
        return BACKENDS["torch"].open(saved.model, threads=threads, **options)
    return available(backend or backend_of(path)).open(path, threads=threads)


def _noise(rng: np.random.Generator, binding: Binding, batch: int) -> np.ndarray:
    shape = [batch, *(side for side in binding.shape[1:] if side is not None)]
    if len(shape) < len(binding.shape):
        raise VssError(f"the engine's input is {binding}; benches need a fixed H and W: export without --dynamic-size.")
    if binding.dtype == "uint8":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.standard_normal(shape).astype(binding.dtype)


BATCHES, BATCH = 2, 8


def speed(
    rows: list[dict[str, Any]],
    baseline: Path,
    candidate: Path,
    *,
    seconds: float,
    network: ModelConfig | None = None,
) -> str | None:
    """Add latency, images and pixels a second and the speed-up to both rows, timed interleaved in one run.

    Returns:
        None, or the sentence that says why the machine is too noisy; the rows have no times then.
    """
    asked: dict[str, Any] = {"backend": None, "threads": None, "batch": 1, "max_seconds": seconds}
    found = bench_engines(candidate, baseline, **asked, network=network)
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
    baseline: Path,
    candidate: Path,
    *,
    dataset: str | None,
    data_root: str | None,
    channels: int,
    network: ModelConfig | None = None,
    data: DataConfig | None = None,
) -> dict[str, object]:
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
    recipe = _for(baseline, Recipe(model=network or ModelConfig(), data=data or DataConfig()))
    project = project_of(baseline, data_root=data_root, dataset=dataset, recipe=recipe)
    first, second = project.read(baseline), project.read(candidate)
    for key in ("mean", "std"):
        if (first.preprocess or {}).get(key) != (second.preprocess or {}).get(key):
            raise VssError(f"{baseline} and {candidate} take images with another {key}; one input cannot feed both.")
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
) -> dict[str, object]:
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
