"""`vss run`: all steps in order, each skipped when its inputs have not changed (vss.run.runner), each resumable."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vss import models
from vss.core.config import ModelConfig, Recipe
from vss.core.errors import GateFailed, VssError, listed, need, shown, unknown
from vss.core.files import at_work, safe_name
from vss.core.networks import layers_named
from vss.data.counts import choose_calibration
from vss.deploy.backends import AUTO, BACKENDS, available, build_spec, main_of, of_tensorrt, others_of
from vss.deploy.bench import pinned
from vss.deploy.export import writes_plugins
from vss.prune import Plan, Statistics, find_groups
from vss.prune.budget import require_lender
from vss.run import pruning, runner
from vss.run.engines import built_beside, make_engine, opened, time_engines, typed_engines, unpruned
from vss.run.inputs import read_list
from vss.run.latency import LatencyGoal
from vss.run.project import Project, Workspace
from vss.run.pruning import Pruned
from vss.run.report import Engine, Fit, Found, Pictures, Score, make_report, write_both, write_failed
from vss.run.runner import Json, Runner
from vss.run.tracking import MLFLOW, track
from vss.train.evaluate import engine_predictor

log = logging.getLogger(__name__)
REFERENCES = "references"


def run(
    recipe: Recipe,
    out: Path | str,
    *,
    say: Callable[[str, str, float, str], None] | None = None,
    progress: bool = True,
    command: str = "",
) -> Json:
    """Do a whole recipe; returns the report, which is also `out/report.json` beside `out/report.html`.

    Raises:
        GateFailed: after everything is written, when a gate did not pass.
    """
    out, project = Path(out), Project.open(recipe)
    check_run(project)
    with at_work(out):
        job = Job(project, out, Runner(out, say or _log), progress, command)
        try:
            report = job.everything()
        except BaseException as error:
            write_failed(job, error)
            raise
    failed = [check for check in report["gate"]["checks"] if check["passed"] is False]
    if failed:
        verdicts = " ".join(f"Gate {check['what']} {check['sentence']}" for check in failed)
        raise GateFailed(f"{verdicts} See {out / 'report.html'}.")
    for row in report.get("built", []):
        if not row["passed"]:
            named = f"{row['name']} {row['precision']} for {row['runtime']}"
            raise GateFailed(f"{named}: {row['sentence'].rstrip('.')}. See {out / 'report.html'}.")
    return report


def _log(name: str, status: str, seconds: float, detail: str) -> None:
    log.info("%s: %s (%.1f s) %s", name, status, seconds, detail)


@dataclass
class Job(Workspace):
    """The steps of one recipe in one folder; `vss.sweep` calls some of them."""

    def everything(self) -> Json:
        references = references_of(self)
        train, pruned = self.train(), self.prune()
        finetuned = self.finetune("finetune", "pruned.safetensors", "prune")
        control = self.finetune("control", "baseline.safetensors", "train") if self.recipe.control else None
        nets = {"baseline": "train", "pruned": "prune", "finetuned": "finetune"}
        nets |= {"control": "control"} if control else {}
        scores = {name: self.score(name, after) for name, after in nets.items()}
        engines = {name: make_engine(self, name, nets[name]) for name in ("baseline", "finetuned")}
        gates = self.gates()
        extra = {title: self.reference(title, job) for title, job in references.items()}
        timing = time_engines(self, {title: engine.artefact["files"]["engine"] for title, (_, engine) in extra.items()})
        pictures, typed = self.panels(), typed_engines(self)
        beside = built_beside(self)
        found = Found(
            train=train, pruned=pruned, finetuned=finetuned, control=control, scores=scores, engines=engines,
            gates=gates, timing=timing, pictures=pictures, references=extra, typed=typed,
            beside=beside,
        )  # fmt: skip
        report = make_report(self, found)
        write_both(self, report)
        track(report, self.out, self.recipe.track)
        return report

    def train(self) -> Fit:
        recipe, project = self.recipe, self.project

        def work() -> Fit:
            model = project.build_model()
            if recipe.model.checkpoint:
                project.save(model, self.out / "baseline.safetensors")
                return Fit(curves=[], detail=f"taken from {recipe.model.checkpoint}")
            result = project.train(model, recipe.train, self.folder("train", model), progress=self.progress)
            project.save(model, self.out / "baseline.safetensors", _best(result))
            return self._fit(result)

        return self.do(Fit, "train", "train", [], ["baseline.safetensors"], work, project.fingerprint("train", "val"))

    def prune(self, statistics: Statistics | None = None) -> Pruned:
        """Plan, cut, proof; `statistics` of the baseline save the calibration pass and change nothing."""
        config = self.recipe.prune
        also = runner.machine() if config.latency else None

        def work() -> Pruned:
            model = self.project.load(self.out / "baseline.safetensors")
            options: dict[str, Any] = {"progress": self.progress, "statistics": statistics}
            _, facts = pruning.prune(self.project, model, config, self.out, **options)
            kept = ", ".join(f"{share:.1%} of {kind}" for kind, share in facts.kept.items())
            return replace(facts, detail="; ".join([f"{facts.criterion}: kept {kept}", *facts.labels]))

        return self.do(Pruned, "prune", "prune", ["train"], ["plan.json", "pruned.safetensors"], work, also)

    def finetune(self, name: str, source: str, after: str) -> Fit:
        """Train the network in `source` by `finetune`, as the step `name` ("finetune" or "control")."""
        config = self.recipe.finetune
        target = "finetuned.safetensors" if name == "finetune" else f"{name}.safetensors"

        def work() -> Fit:
            model = self.project.load(self.out / source)
            teacher = self.project.load(self.out / "baseline.safetensors") if config.distill else None
            folder = self.folder(name, *filter(None, (model, teacher)))
            result = self.project.train(model, config, folder, teacher=teacher, progress=self.progress)
            self.project.save(model, self.out / target, _best(result))
            return self._fit(result)

        return self.do(Fit, name, "finetune", [after], [target], work)

    def _fit(self, result: Json) -> Fit:
        score = result[f"best_{result['metric']}"]
        kept = {key: result[key] for key in ("best_epoch", "metric", "steps", "epochs", "precision", "curves")}
        detail = f"best val {self.project.task.title} {score:.2f} in epoch {result['best_epoch'] + 1}"
        return Fit(**kept, best_score=score, detail=detail)

    def score(self, name: str, after: str) -> Score:
        """Metrics of a network in torch; the figures by image go beside, for intervals."""
        path, images = self.out / f"{name}.safetensors", f"scores/{name}.npy"

        def work() -> Score:
            model = self.project.load(path)
            result = self.project.score_net(model)
            self.write_images(images, result)
            return Score(row=self.project.size_row(name, model, path), metrics=result, detail=self.summary(result))

        also = self.project.fingerprint(self.recipe.split, "val")
        return self.do(Score, f"evaluate-{name}", "evaluate", [after], [images], work, also)

    def gates(self) -> Json:
        """The verdicts of the task on the pruned engine; the head of the result is the first that failed."""
        task = self.project.task
        sources = {name: f"evaluate-{name}" for name in ("finetuned", *unpruned(self.recipe))}

        def work() -> Json:
            results = {name: self.scores_of(step) for name, step in sources.items()}
            verdicts = task.verdicts(results | {"engine": self.scores_of("engine-finetuned")})
            checks = [{"engine": "engine pruned", **verdict} for verdict in verdicts]
            failed = [check for check in checks if check["passed"] is False]
            detail = "; ".join(f"{check['what']}: {check['sentence'].rstrip('.')}" for check in failed or checks)
            status = {"status": "not passed"} if failed else {}
            return {**(failed or checks)[0], "passed": not failed, "checks": checks, "detail": detail, **status}

        return self.step("gate", runner.depends(self.recipe, "gate"), [*sources.values(), "engine-finetuned"], [], work)

    def panels(self) -> Pictures:
        project = self.project

        def work() -> Pictures:
            nets = {name: self.project.load(self.out / f"{name}.safetensors") for name in ("baseline", "pruned")}
            predictors = {name: project.task.predictor(net) for name, net in nets.items()}
            scores = {"baseline": self.scores_of("evaluate-baseline"), "engine": self.scores_of("engine-finetuned")}
            with opened(self, {"engine": "engine/finetuned.engine.onnx"}) as sessions:
                predictors["engine"] = engine_predictor(sessions["engine"], project.preprocess)
                pictures = project.task.pictures(self.out, predictors, scores)
            return Pictures(**pictures, detail=f"{len(pictures['files'])} pictures")

        after = ["evaluate-baseline", "evaluate-pruned", "engine-finetuned"]
        return self.do(Pictures, "panels", "panels", after, [], work)

    def reference(self, title: str, job: Job) -> tuple[Score, Engine]:
        """Train an unpruned network for as many steps as the pruned one has had; its scores, and its engine."""
        job.train()
        job.finetune("control", "baseline.safetensors", "train")
        score, engine = job.score("control", "control"), make_engine(job, "control", "control")
        self.step.keys[title] = job.step.keys["engine-control"]
        files = {role: f"{REFERENCES}/{job.out.name}/{path}" for role, path in engine.artefact["files"].items()}
        return score, replace(engine, artefact=engine.artefact | {"files": files})


def references_of(job: Job) -> dict[str, Job]:
    """Title -> the run of each unpruned network of `references`, in its own folder; timed beside the pruned one, it
    shows whether to prune. What can be refused is refused now, before anything is trained."""
    found: dict[str, Job] = {}
    for config in job.recipe.references:
        title, recipe = title_of(config), job.recipe.model_copy(update={"model": config, "references": ()})
        folder = job.out / REFERENCES / safe_name(re.sub(r"[^\w.=-]+", "-", title.removeprefix("reference ")))
        if folder in [each.out for each in found.values()]:
            raise VssError(f"two references are called {title!r}; give one, or other options.")
        project = Project(recipe, job.project.data, job.project.preprocess)
        if type(project.task) is not type(job.project.task):
            raise VssError(f"{title} is not for the task of {job.recipe.model.name}; their scores do not compare.")
        project.build_model()
        steps = Runner(folder, job.step.say, job.step.records, title=f"{title}: ")
        found[title] = replace(job, project=project, out=folder, step=steps)
    return found


def title_of(config: ModelConfig) -> str:
    """The row of a reference: its name and options, or its checkpoint.

    >>> title_of(ModelConfig(name="unet", options={"width": 8}))
    'reference unet width=8'
    """
    parts = [config.name, *(f"{key}={value}" for key, value in config.options.items())]
    return " ".join(["reference", *([Path(config.checkpoint).stem] if config.checkpoint else parts)])


def _best(result: Json) -> dict[str, float]:
    return {f"val_{result['metric']}": result[f"best_{result['metric']}"]}


# -- what is refused before anything is trained, made or written -------------------------------------------------------


def check_fits(project: Project, *, tuned: bool = True) -> None:
    """Refuse what a fit of a run could not start with, before the first of them does; `tuned`: it is fine-tuned."""
    from vss.train.fit import check_norms, check_settings

    recipe = project.recipe
    configs = [recipe.train] * (not recipe.model.checkpoint) + [recipe.finetune] * tuned
    for config in configs:
        check_settings(config)
    if recipe.train.distill:
        raise VssError(f"train.distill is {recipe.train.distill} and a first training has no teacher; set it to 0.")
    single = next((config for config in configs if config.batch_size == 1), None)
    if single:
        image = project.split("train", augment=True)[0]["image"]
        check_norms(project.build_model(), project.preprocess.normalise(image[None]), single)


def check_run(project: Project, *, engines: bool = True, here: bool = True) -> None:
    """Refuse what would stop a whole run, or a cell of a sweep, after its training; builds the untrained network.

    Args:
        project: the recipe with its data.
        engines: whether it ends in engines; a cell that does not may leave the fine-tuning out.
        here: whether this machine does the work, so that it must have the devices, the backend and the cores.
    """
    recipe = project.recipe
    if here:
        check_fits(project, tuned=engines or recipe.finetune.epochs > 0)
    if engines:
        check_build(recipe, here=here)
    if engines and here:
        with pinned(recipe.bench.cores):
            pass
    check_metric(project)
    if MLFLOW in recipe.track:
        need("mlflow", "track: [mlflow]")
    if recipe.precision.kinds:
        check_calibration(project)
    elif recipe.precision.keep:
        raise VssError("precision.keep is given and precision.kinds names no precision to make; add fp16 or int8.")
    check_network(project, project.build_model())
    project.task.check_labels("train", "val", recipe.split)


def check_build(recipe: Recipe, *, here: bool) -> None:
    """The runtimes take what the recipe says, and are on this machine where they must be."""
    build, backend = recipe.build, main_of(recipe.build)
    runs = [name for name in BACKENDS.names() if getattr(BACKENDS[name], "runs_here", False)]
    if backend == "torch":
        raise VssError(f"build.backend is torch, and a run builds engines; choose {listed(runs)} or tensorrt.")
    if build.backend == AUTO and recipe.prune.latency:
        raise VssError(
            "build.backend is auto and prune.latency needs the runtime that it is timed in; set build.backend to one "
            f"of {listed(runs)} and build.also to the others."
        )
    if of_tensorrt(backend) and build.threads is not None:
        raise VssError(f"build.threads is {build.threads} and means nothing to a TensorRT engine; leave it away.")
    names = [*([] if build.backend == AUTO else [backend]), *map(BACKENDS.canonical, build.also)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise VssError(f"build.backend and build.also name {twice} twice; give it once.")
    if "torch" in names:
        raise VssError("build.also names torch, which builds no engines; expected another runtime.")
    names = [backend, *others_of(build), *others_of(build, here=False)]
    makers = [of_tensorrt(name) for name in names]
    if build.targets and not any(maker and maker.flavour.targets for maker in makers):
        raise VssError(
            f"build.targets is {', '.join(build.targets)}, and {backend} builds for this machine; add tensorrt_rtx to "
            "build.also, or leave the targets out."
        )
    for name in names:
        plan, runtime = build_spec(build, name).plan, of_tensorrt(name)
        check: Any = getattr(available(name), "check_here", None) if here else None
        if check:
            check(build)
        if here and runtime and plan:
            runtime.check_flags(plan)
            if name == backend:
                runtime.check_device(plan)


def check_calibration(project: Project) -> None:
    """The images that `precision.image_list` names are training images."""
    if project.recipe.precision.image_list:
        choose_calibration(project.data, ids=read_list(Path(project.recipe.precision.image_list)))


def check_metric(project: Project) -> None:
    """`gate.metric` is a score of the task, higher is better."""
    metric, task = project.recipe.gate.metric, project.task
    ends = ("_low_pct", "_high_pct")
    known = [key for key in task.row_keys if key.endswith("_pct") and not key.endswith(ends) and "fnr" not in key]
    if metric is not None and metric not in known:
        raise VssError(f"gate.metric is {shown(metric)}; expected one of {', '.join(known)}.")


def check_network(project: Project, model: torch.nn.Module) -> None:
    """What depends on the layers: the size of images and crops, names of layers, latency tables."""
    config, multiple = project.recipe.prune, int(getattr(model, "size_multiple", 1))
    name, labels = project.recipe.model.name, project.task.export_options().get("labels")
    models.check_multiple(name, project.preprocess.size, multiple)
    if project.recipe.export.plugins and not labels and not writes_plugins(model, project.preprocess.size):
        raise VssError(
            f"export.plugins is true and nothing that {name} is exported with has a plugin; set it to false."
        )
    if project.augment.crop:
        models.check_multiple(f"{name} (data.augment.crop)", project.augment.crop, multiple)
    layers = dict(model.named_modules())
    for layer in project.recipe.precision.keep:
        if layer not in layers:
            raise unknown("layer of precision.keep", layer, layers.keys() - {""})
    for section in ("train", "finetune"):
        layers_named(model, getattr(project.recipe, section).freeze, f"layer of {section}.freeze")
    if config.keep or config.lender:
        groups = find_groups(model, torch.zeros(1, 3, *project.preprocess.size), keep=config.keep)
        if config.lender:
            require_lender(Plan.load(config.lender), config.lender, groups)
    if config.latency:
        LatencyGoal.check(project, model, config)
