"""What a command was given, looked at before anything heavy is imported: names, files and folders; none needs torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from vss.core.config import DataOptions, ModelConfig, PruneConfig, Recipe
from vss.core.errors import VssError, shown
from vss.core.files import require_checkpoint, require_file
from vss.core.yaml12 import parse
from vss.data.base import read_lines
from vss.data.preprocess import Preprocess
from vss.data.readers import require_root
from vss.deploy.backends import AUTO, BACKENDS, of_tensorrt
from vss.deploy.onnx_file import runtime_of
from vss.models import MODELS, factory
from vss.prune.criteria import CRITERIA, Criterion, make_criterion
from vss.prune.latency import Target
from vss.prune.plan import Plan
from vss.train.header import Header, header, not_registered

CHECKPOINT = ".safetensors"
ONNX_FIRST = b"\x08"
"""How an ONNX file begins (protobuf, field 1, the IR version)."""
PLAN_MAGIC = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}
"""How the engines of each begin."""
TENSORRT = (".engine", ".plan", ".trt")  # how TensorRT engines are called


def require_criterion(config: PruneConfig) -> None:
    """Refuse a criterion that there is not, options and a scope that it lacks, widths and a time that are none."""
    criterion = make_criterion(config.criterion, **config.options)
    if config.widths:
        require_widths(config, config.widths, criterion)
    elif not config.latency:
        criterion.scope_of(config.budget.scope)
    searches = "dmcp searches" if CRITERIA.canonical(config.criterion) == "dmcp" else "a latency target chooses"
    if config.budget.ratios and (config.latency or searches[0] == "d"):
        raise VssError(f"--ratio (prune.budget.ratios) fixes widths, and {searches} all of them; leave it off.")
    if config.latency:
        Target.parse(config.latency.target)


def require_widths(config: PruneConfig, source: str, criterion: Criterion) -> None:
    """Refuse widths of no plan and of no criterion that can say them, and a criterion that has widths of its own."""
    if criterion.native_ranking == "widths":
        raise VssError(f"prune.widths is {source}, and {criterion.name} searches widths of its own; leave it off.")
    if config.lender:
        Plan.load(config.lender)
        return
    if source not in CRITERIA:
        raise VssError(
            f"prune.widths is {shown(source)}; expected a plan.json of `vss prune`, or one of "
            f"{', '.join(CRITERIA.names())}."
        )
    if CRITERIA[source].sparse_phase:
        raise VssError(
            f"prune.widths is {source}, whose widths follow from a phase of training; prune by it first, and name the "
            "plan.json of that."
        )
    make_criterion(source).scope_of(config.budget.scope)


def require_job(recipe: Recipe) -> None:
    """Refuse what the recipe alone shows to be impossible, a network that there is not, and a folder without data."""
    config = recipe.prune
    require_criterion(config)
    if CRITERIA.canonical(config.criterion) == "dmcp" and config.steps > 1:
        raise VssError(f"prune.steps is {config.steps} and dmcp searches all widths at once; set it to 1.")
    CRITERIA.canonical(recipe.dmcp.order)
    if config.latency and config.steps > 1:
        raise VssError(f"prune.steps is {config.steps} and a latency target is met in one round; set it to 1.")
    require_network(recipe.model)
    require_root(recipe.data.dataset, recipe.data.root)


def require_network(config: ModelConfig) -> None:
    """Refuse a network, or a file of weights, that there is not; a factory of the user's is imported."""
    if config.factory:
        factory.use(config.factory, config.options)
    if config.replace_head and not (config.weights or config.checkpoint):
        raise VssError(
            "--replace-head (model.replace_head) is for weights or a checkpoint of other classes, and none was given; "
            "leave it off, or give --weights (model.weights, model.checkpoint)."
        )
    for key in ("weights", "backbone_weights"):
        if getattr(config, key):
            require_file(Path(getattr(config, key)), kind="weights")
    if config.checkpoint:
        require_checkpoint(Path(config.checkpoint))
    else:
        MODELS.canonical(config.name)


def require_foreign(config: ModelConfig, paths: Iterable[Path]) -> None:
    """Import the factory that was given for checkpoints; refuse one that none of them needs, and a lack of one."""
    names = {path: header(path).model for path in paths if path.suffix == CHECKPOINT}
    if not config.factory:
        for path, name in names.items():
            if name not in MODELS:
                raise not_registered(path, name)
        return
    factory.use(config.factory, config.options)
    if all(name in MODELS and name != config.factory for name in names.values()):
        held = "; ".join(f"{path} holds a {name!r}" for path, name in names.items()) or "there is no checkpoint"
        raise VssError(f"--model-from is for networks that are not registered, and {held}; leave it off.")


def require_engines(recipe: Recipe) -> None:
    """Refuse a runtime that there is not, and a list of calibration images that cannot be read."""
    for name in (recipe.build.backend, *recipe.build.also):
        if name != AUTO:
            BACKENDS.canonical(name)
    if recipe.precision.kinds and recipe.precision.image_list:
        read_list(Path(recipe.precision.image_list))


def read_list(path: Path) -> list[str]:
    """Ids of images, one a line; blank lines do not count."""
    return [line for line in read_lines(path, "ids of training images, one a line") if line]


def recipe_around(
    path: Path | str, *, data_root: str | None, dataset: str | None, recipe: Recipe
) -> tuple[Recipe, Preprocess]:
    """The recipe for a checkpoint, with its own data set name and image size unless others are given, and its
    preprocessing; the folder of the data is there."""
    saved = header(path)
    preprocess = preprocess_of(path, saved, recipe)
    data = {"dataset": dataset or saved.info.get("dataset", recipe.data.dataset), "size": list(preprocess.size)}
    if data_root:
        data["root"] = data_root
    recipe = with_options(recipe, path)
    model = {key: getattr(recipe.model, key) for key in ("factory", "options", "replace_head")}
    if not recipe.model.factory:
        model = {"replace_head": recipe.model.replace_head}
    recipe = Recipe.model_validate(
        recipe.model_dump() | {"data": recipe.data.model_dump() | data, "model": model | {"checkpoint": str(path)}}
    )
    require_network(recipe.model)
    require_foreign(recipe.model, [Path(path)])
    require_root(recipe.data.dataset, recipe.data.root)
    return recipe, preprocess


def with_options(recipe: Recipe, checkpoint: Path | str | None) -> Recipe:
    """The recipe, its data read as that of the checkpoint was, unless it says otherwise."""
    kept = (header(checkpoint).info.get("data") if checkpoint else None) or {}
    if not isinstance(kept, dict):
        raise VssError(
            f"checkpoint {checkpoint} is damaged: its header says nothing of how data is read; copy it again."
        )
    fold = recipe.data.fold
    if checkpoint and fold and fold != kept.get("fold") and not recipe.model.replace_head:
        raise VssError(
            f"data.fold is {fold} and {checkpoint} was trained on {kept.get('fold') or 'no'} fold, so images of that "
            "part are among those it learnt from; leave data.fold away, or train a network by it."
        )
    if not kept:
        return recipe
    options = parse(DataOptions, kept | recipe.data.said(), source=f"the header of {checkpoint}")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=dict(options))})


def preprocess_of(path: Path | str, saved: Header, recipe: Recipe) -> Preprocess:
    """The preprocessing of a checkpoint: its own; mean and std of the recipe come first, and its size where the
    checkpoint says nothing."""
    data = recipe.data
    given = {key: getattr(data, key) for key in ("mean", "std") if getattr(data, key) is not None}
    if saved.preprocess is not None:
        return parse(Preprocess, saved.preprocess | given, source="data")
    if data.size is None or len(given) < 2:
        raise VssError(
            f"{path} does not say its preprocessing; give data.size, data.mean and data.std, or save it with "
            "vss.save(..., preprocess=...)."
        )
    return parse(Preprocess, {"size": data.size, **given}, source="data")


def recipe_to_prune(
    recipe: Recipe,
    ckpt: Path | None,
    model: str | None,
    weights: Path | None,
    *,
    dataset: str | None,
    data_root: str | None,
    size: list[int] | None,
) -> tuple[Recipe, Path]:
    """The recipe for a checkpoint, or for the network `model` with images of `size`, and the file of its weights."""
    own = recipe.model.factory
    if ckpt is not None and model is None and weights is None and (size is None or header(ckpt).preprocess is None):
        return recipe_around(ckpt, data_root=data_root, dataset=dataset, recipe=recipe)[0], ckpt
    if ckpt is not None or (model is None) == (own is None) or weights is None:
        raise VssError(
            "give --ckpt alone, or --model and --weights (and --input-size), to say what is to be pruned; --model-from "
            "stands for --model, or goes with a --ckpt that is not of a registered network."
        )
    data = {"dataset": dataset, "root": data_root, "size": size}
    named = {"model": recipe.model.model_dump() | ({"name": model} if model else {}) | {"weights": str(weights)}}
    given = {key: value for key, value in data.items() if value is not None}
    recipe = Recipe.model_validate(recipe.model_dump() | named | {"data": recipe.data.model_dump() | given})
    require_job(recipe)
    return recipe, require_file(weights, kind="weights")


def backend_of(path: Path) -> str:
    """The runtime that an artefact is for, by its first bytes, and by its name where these say nothing."""
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(4)
        if head in PLAN_MAGIC:
            return PLAN_MAGIC[head]
        if head[:1] == ONNX_FIRST:
            return runtime_of(path)
    return "tensorrt" if path.suffix in TENSORRT else "onnxruntime"


def require_candidate(path: Path, backend: str | None = None) -> None:
    """Refuse a file to score or to time that is not there, and a runtime that there is not."""
    if path.suffix == CHECKPOINT:
        require_checkpoint(path)
    elif not of_tensorrt(backend or backend_of(path)):
        require_file(path, kind="ONNX")


def require_timed(
    candidate: Path, baseline: Path | None, *, backend: str | None, threads: int | None, place: tuple[str, str]
) -> None:
    """Refuse files to time that are not there, and what means nothing to them; `place` is device and precision."""
    paths = [path for path in (candidate, baseline) if path is not None]
    engines = [path for path in paths if path.suffix != CHECKPOINT]
    if backend is not None and not engines:
        raise VssError(f"--backend {backend} is for engines, and a checkpoint runs in torch; leave it off.")
    if threads is not None and any(of_tensorrt(backend or backend_of(path)) for path in engines):
        raise VssError("--threads means nothing to a TensorRT engine; leave it off.")
    if place != ("cpu", "fp32") and len(engines) == len(paths):
        raise VssError(
            f"{candidate} has its precision and its place in it; --device and --precision are of checkpoints."
        )
    for path in paths:
        require_candidate(path, backend)


def require_limits(limits: Mapping[str, float | None], baseline: Path | None) -> None:
    """A limit is on the difference between two networks: without one of them nothing would be judged."""
    for name, limit in limits.items():
        flag = f"--{name.replace('_', '-')}"
        if limit is not None and not math.isfinite(limit):
            raise VssError(f"{flag} is {limit}; expected a number of points.")
        if limit is not None and baseline is None:
            raise VssError(f"{flag} {limit:g} is a limit against a baseline, and none was given; add --baseline FILE.")


def run_files(run: Path) -> dict[str, Path]:
    """The ONNX files of a finished run, "baseline" and "finetuned"; refuses a folder without what is explained."""
    paths = {name: run / "engine" / f"{name}.onnx" for name in ("baseline", "finetuned")}
    missing = [path for path in (*paths.values(), run / "plan.json", run / "report.json") if not path.is_file()]
    if missing:
        raise VssError(f"{missing[0]} does not exist; vss explain takes the folder of a finished `vss run`.")
    return paths
