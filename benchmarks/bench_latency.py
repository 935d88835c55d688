"""Latency as a target: is it hit, what is alignment worth, how good is the table, and are planted causes named.

    python benchmarks/bench_latency.py --part targets --data-root CAMVID --out DIR --cores 0 --write

Parts, one or all: `targets` (0.75x, 0.5x and 0.33x of three networks, each timed again in new processes, and the same
criterion under MAC budgets at the same measured time, plain and in the table's width steps, with the same fine-tuning),
`alignment` (a plain L1 cut of `fcn_resnet50` with and without the discovered step), `error` (the tables on random
widths that they have not seen), `explain` (planted cases). One image, uint8 pixels to labels, in ONNX Runtime on the
cores that are given, one thread a core, or elsewhere: `--backend torch --device cuda --engine-precision fp16` (channels
last, CUDA graphs), `--backend tensorrt`, `--backend openvino --engine-precision int8` (then a target is a share of the
unpruned INT8 network's time); `--full` takes the networks at full size. What is known is kept in `--out`, so
that a killed run goes on. `--quick` is for trying out: one small network, small tables, generated images where there is
no `--data-root`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from latency_parts import LOG, Bench, alignment, explain, iso_latency_baseline, told
from scipy import stats
from torch import nn

import vss
from vss.core.config import PruneConfig, Recipe
from vss.core.environment import environment
from vss.core.errors import VssError
from vss.core.files import read_json, sha256_json, write_json
from vss.deploy import export
from vss.deploy.profile.build import build
from vss.deploy.profile.setting import Setting
from vss.deploy.profile.subject import open_subject
from vss.deploy.profile.table import LatencyTable
from vss.prune import Budget, Plan, apply_plan, collect, count, find_groups, make_criterion
from vss.run import pruning
from vss.run.latency import LatencyGoal
from vss.run.project import Project, export_options
from vss.train import checkpoint

ROOT = Path(__file__).resolve().parent.parent
KIND, SCHEMA = "vss.bench_latency", 1
PARTS = ("targets", "alignment", "error", "explain")
FRESH = 0.06  # largest width of the 95 % interval of a fresh ratio, as a share of it
PROCESSES = 8  # that time both networks anew: each has its own ratio
TARGETS = "0.75x,0.5x,0.33x"


@dataclass(frozen=True)
class Net:
    """One network of `targets`: image size (H, W), epochs of training and of fine-tuning; sizes fit one CPU core."""

    name: str
    size: tuple[int, int]
    train: int
    finetune: int
    options: dict[str, Any] = field(default_factory=dict)


NETS = (
    Net("unet", (112, 160), 10, 2, {"width": 16}),
    Net("resnet18_seg", (112, 160), 10, 3),
    Net("deeplabv3_resnet50", (64, 96), 3, 1),
)
FULL = (
    Net("unet", (352, 480), 30, 6, {"width": 64}),
    Net("resnet18_seg", (352, 480), 30, 6),
    Net("deeplabv3_resnet50", (352, 480), 20, 4),
)
QUICK = (Net("unet", (64, 96), 1, 1, {"width": 16}),)


# -- targets --------------------------------------------------------------------------------------------------------


def project_of(run: Bench, net: Net) -> Project:
    """Data and recipe of one network."""
    fit = {"lr": 0.03, "ema": 0.98, "class_weights": "log", "batch_size": 8, "precision": run.arguments.precision}
    recipe = {
        "data": {"root": str(run.arguments.data_root), "size": net.size, "augment": {"scale": [0.75, 1.5]}},
        "model": {"name": net.name, "options": net.options, "checkpoint": run.arguments.checkpoint.get(net.name)},
        "train": fit | {"epochs": net.train, "val_every": max(1, net.train)},
        "finetune": fit | {"epochs": net.finetune, "val_every": net.finetune},
        "build": {"backend": run.arguments.backend, "threads": run.threads},
    }
    return Project.open(Recipe.model_validate(recipe))


def trained(run: Bench, net: Net, project: Project, folder: Path) -> nn.Module:
    """The given checkpoint, or the network trained here."""
    path = folder / "baseline.safetensors"
    if not path.is_file():
        model = project.build_model()
        if net.name not in run.arguments.checkpoint:
            project.train(model, project.recipe.train, folder / "train", progress=False)
        project.save(model, path)
    return checkpoint.load(path)


def table_of(run: Bench, net: Net, project: Project, model: nn.Module) -> LatencyTable:
    """The latency table of a network; its weights do not matter."""
    setting = run.setting(project.task.export_options())
    with tempfile.TemporaryDirectory() as folder:
        subject = open_subject(model, Path(folder), project.preprocess, setting, seconds=0.25)
        return build(subject, table_path(run, net), effort=run.effort, progress=told)


def table_path(run: Bench, net: Net) -> Path:
    return run.arguments.out / net.name / "table.json"


def targets(run: Bench) -> None:
    """All targets of all networks, and the comparison with MAC budgets at `--compare`."""
    for net in run.arguments.nets:
        project, folder = project_of(run, net), run.arguments.out / net.name
        model = trained(run, net, project, folder)
        table_of(run, net, project, model)
        run.once(f"baseline {net.name}", partial(describe, net, project, model))
        known = statistics_of(project, model, prune_config(run, net, "1x"))
        for target in run.arguments.targets:
            hit(run, net, project, model, target, known)
        for target in run.arguments.compare:
            compare(run, net, project, model, target, known)


def prune_config(run: Bench, net: Net, target: str) -> PruneConfig:
    """Taylor under a time."""
    place = {"device": run.arguments.device, "precision": run.arguments.engine_precision}
    latency = {"target": target, "lut": str(table_path(run, net)), **place, **run.limits}
    return PruneConfig.model_validate({"criterion": "taylor", "batches": 10, "recalibrate": 20, "latency": latency})


def statistics_of(project: Project, model: nn.Module, config: PruneConfig) -> Any:
    """One calibration pass for all plans of a network."""
    criterion = make_criterion(config.criterion)
    groups = list(find_groups(model, torch.zeros(1, 3, *project.preprocess.size)))
    batches = project.calibration(config.batches, config.batch_size)
    mode = criterion.batch_norm_mode()
    return collect(model, groups, criterion.needs, batches, project.task.calibration_loss(), batch_norm=mode)


def describe(net: Net, project: Project, model: nn.Module) -> dict[str, Any]:
    """Size and test accuracy of the uncut network, and how it came about; epochs None: a checkpoint was given."""
    rows = {"size": list(net.size), "options": dict(getattr(model, "options", {})), "epochs": net.train or None}
    rows |= {"finetune_epochs": net.finetune}
    return rows | count(model, net.size) | {"miou_pct": project.score_net(model)["miou_pct"]}


def hit(run: Bench, net: Net, project: Project, model: nn.Module, target: str, known: Any) -> None:
    """Prune to a target, then time the engines anew in another process: asked, reached, off by."""
    folder, asked = run.arguments.out / net.name / target, float(target.removesuffix("x"))

    def prune() -> dict[str, Any]:
        config = prune_config(run, net, target)
        _, facts = pruning.prune(project, model, config, folder, progress=False, statistics=known)
        record = facts.phase["latency"]
        row = {"met": record["met"], "ratio": record["iterations"][record["chosen"]]["ratio"], "step": record["step"]}
        row |= {"iterations": len(record["iterations"]), "predicted_floor": record["predicted_floor"]}
        return row | {"macs_kept": facts.kept["macs"], "params_kept": facts.kept["params"]}

    def again() -> dict[str, Any]:
        fresh = fresh_time(run, project, model, checkpoint.load(folder / "pruned.safetensors"), folder)
        off = 100 * (fresh["ratio"] / asked - 1)
        return {"asked": asked, "reached": fresh["ratio"], "off_pct": off, "fresh": fresh}

    if run.once(f"prune {net.name} {target}", prune):
        run.once(f"target {net.name} {target}", again)


def fresh_time(run: Bench, project: Project, model: nn.Module, small: nn.Module, folder: Path) -> dict[str, Any]:
    """Both engines in turns by `vss bench` in new processes on the same cores: the mean ratio and its 95 % interval."""
    report = folder / "bench.json"
    setting = run.setting(project.task.export_options())
    files = {name: artefact(project, setting, each, folder / name) for name, each in (("uncut", model), ("cut", small))}
    command = [sys.executable, "-m", "vss.cli", "bench", "--candidate", files["cut"], "--baseline", files["uncut"]]
    command += ["--max-seconds", run.limits["max_seconds"], "--report", report]
    command += ["--allow-unstable"] if run.arguments.quick else []
    command += [] if setting.on_gpu else ["--threads", run.threads]
    where = ["--device", setting.device, "--precision", setting.precision]
    command += where if setting.backend == "torch" else ["--backend", setting.backend]
    rows = [_in_a_process(command, report, run) for _ in range(2 if run.arguments.quick else PROCESSES)]
    ratios = [row["ratio"] for row in rows]
    mean = statistics.fmean(ratios)
    half = float(stats.t.ppf(0.975, len(rows) - 1)) * statistics.stdev(ratios) / len(rows) ** 0.5
    found = {"ratio": mean, "low": mean - half, "high": mean + half, "processes": ratios}
    if not run.arguments.quick and 2 * half > FRESH * mean:
        raise VssError(f"the fresh ratio is known too roughly ({found}); run this again when it is quiet.")
    return found | {name: {"latency_ms_p50": [row[name] for row in rows]} for name in ("uncut", "cut")}


def _in_a_process(command: list[Any], report: Path, run: Bench) -> dict[str, float]:
    """The ratio and both medians (ms) of one new process."""
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise VssError(f"vss bench failed: {done.stderr.strip()[-400:]}")
    figures = json.loads(report.read_text())
    if not figures["stable"] and not run.arguments.quick:
        raise VssError(f"the fresh measurement is not stable ({_spreads(figures)}); run this again when it is quiet.")
    names = {"uncut": "baseline", "cut": "candidate"}
    times = {name: figures["sessions"][row]["latency_ms_p50"] for name, row in names.items()}
    return {"ratio": 1 / figures["speedup"]["candidate"]["ratio"], **times}


def artefact(project: Project, setting: Setting, model: nn.Module, stem: Path) -> Path:
    """The file of a network that `vss bench` times: a checkpoint for torch, else what the runtime loads."""
    if setting.backend == "torch":
        project.save(model, stem.with_suffix(".safetensors"))
        return stem.with_suffix(".safetensors")
    onnx = stem.with_suffix(".onnx")
    export(model, onnx, parity_batches=(1,), **export_options(project, model))
    with setting.engine(onnx, stem):  # leaves what it has built
        pass
    return stem.with_name(stem.name + (".engine" if setting.backend == "tensorrt" else ".engine.onnx"))


def _spreads(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {row['spread']:.1%}" for name, row in figures["sessions"].items())


def compare(run: Bench, net: Net, project: Project, model: nn.Module, target: str, known: Any) -> None:
    """Test mIoU at equal measured time: latency as the target, a plain MAC budget, and one in the table's steps."""
    folder = run.arguments.out / net.name / target
    done = run.result["done"].get(f"target {net.name} {target}")
    if done is None:
        return
    first = folder / "pruned.safetensors"

    def latency() -> dict[str, Any]:
        return finetuned(project, checkpoint.load(first), folder / "fit-latency") | {"ratio": done["reached"]}

    run.once(f"compare {net.name} {target} latency", latency)
    table = LatencyTable.load(table_path(run, net))
    for name, align in {"macs": 1, "macs aligned": table.step}.items():

        def budget(align: int = align, name: str = name) -> dict[str, Any]:
            goal = LatencyGoal.open(project, model, prune_config(run, net, target), folder)
            plan, rows = iso_latency_baseline(
                goal, done["reached"], lambda keep: mac_plan(project, model, keep, align, known)
            )
            small = apply_plan(model, plan, check_weights=False)
            pruning.recalibrate(project, small, goal.config)
            last, kept = rows[-1], plan.cost_after["macs"] / plan.cost_before["macs"]
            facts = {"ratio": last["ratio"], "off": last["off"], "align": align, "macs_kept": kept, "tried": len(rows)}
            return finetuned(project, small, folder / f"fit-{name.replace(' ', '-')}") | facts

        run.once(f"compare {net.name} {target} {name}", budget)


def mac_plan(project: Project, model: nn.Module, keep: float, align: int, known: Any) -> Plan:
    """The same criterion under a MAC budget."""
    config = PruneConfig(criterion="taylor", batches=10)
    budget = Budget(kind="macs", keep=keep, align=align)
    return pruning.plan_once(project, model, config, budget, statistics=known)


def finetuned(project: Project, small: nn.Module, folder: Path) -> dict[str, Any]:
    """Test mIoU before and after the fine-tuning, the same for all."""
    before = project.score_net(small)["miou_pct"]
    project.train(small, project.recipe.finetune, folder, progress=False)
    return {"miou_pruned_pct": before, "miou_pct": project.score_net(small)["miou_pct"]}


# -- error ----------------------------------------------------------------------------------------------------------


def error(run: Bench) -> None:
    """Predicted against measured time of every table on random widths that it has not seen."""
    for net in run.arguments.nets:
        project = project_of(run, net)
        table = table_of(run, net, project, project.build_model())
        _, widths, _, totals = table.arrays(table.of_role("test"))
        predicted = table.model()(widths)
        pairs = [{"predicted_ms": float(p), "ms": float(t)} for p, t in zip(predicted, totals, strict=True)]
        fitted = {"fitted_on": len(table.of_role("full", "fit")), "drift": table.drift, "uncut_ms": table.full_ms()}
        run.once(f"error {net.name}", partial(dict, table.error | fitted | {"vectors": pairs}))


# -- the whole ------------------------------------------------------------------------------------------------------


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for tables, networks and what is known")
    parser.add_argument("--net", action="append", help="of targets and error; default: all three")
    parser.add_argument("--checkpoint", action="append", default=[], help="NAME=FILE, in place of training")
    parser.add_argument("--targets", default=TARGETS, help="with commas")
    parser.add_argument("--compare", default="0.5x", help="targets to compare with MAC budgets; '' for none")
    parser.add_argument("--precision", default="auto", help="of training, as in recipes")
    parser.add_argument("--backend", default="onnxruntime", help="as vss lut build, and the next two")
    parser.add_argument("--device", default="", help="of torch: cpu or cuda")
    parser.add_argument("--engine-precision", default="fp32", help="fp32, fp16 or int8")
    parser.add_argument("--full", action="store_true", help="networks at full size, for a GPU")
    parser.add_argument("--cores", default="0", help="numbers, with commas; one thread on each")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results/<machine>/")
    parser.add_argument("--tag", help="end of the name of that file, for checkpoints of another width")
    found = parser.parse_args()
    found.cores = [int(core) for core in found.cores.split(",")]
    found.checkpoint = dict(each.split("=", 1) for each in found.checkpoint)
    found.targets = found.targets.split(",")
    found.compare = [each for each in found.compare.split(",") if each]
    rows = QUICK if found.quick else FULL if found.full else NETS
    if unknown := set(found.net or []) - {net.name for net in rows}:
        parser.error(f"--net {sorted(unknown)} came; there are {[net.name for net in rows]}")
    nets = [net for net in rows if not found.net or net.name in found.net]
    found.nets = [sized(net, found.checkpoint.get(net.name)) for net in nets]
    found.out = found.out.resolve()
    found.part = found.part or [part for part in PARTS if part != "explain" or found.backend != "torch"]
    return found


def sized(net: Net, path: str | None) -> Net:
    """A network with the image size and the options of its checkpoint."""
    if path is None:
        return net
    known = checkpoint.read(path)
    if known.preprocess is None:
        raise VssError(f"{path} does not say its input size; save it with vss.save(..., preprocess=...).")
    options = dict(getattr(known.model, "options", {}))
    return replace(net, size=tuple(known.preprocess["size"]), options=options, train=0)


def main() -> None:
    """Parse, run, write."""
    arguments = options_of()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    about = environment()
    os.sched_setaffinity(0, arguments.cores)
    torch.set_num_threads(len(arguments.cores))
    if arguments.data_root is None and set(arguments.part) & {"targets", "error"}:
        arguments.data_root = generated(arguments)
    place = {"backend": arguments.backend, "device": arguments.device, "precision": arguments.engine_precision}
    place = {key: value for key, value in place.items() if value and (key, value) != ("precision", "fp32")}
    setting = {"quick": arguments.quick, **place, "criterion": "taylor", "batch": 1}
    setting |= {key: value for key, value in Bench(arguments, {}, Path()).limits.items() if key != "max_seconds"}
    path = arguments.out / "latency.json"
    result: dict[str, Any] = {"kind": KIND, "schema": SCHEMA, "key": sha256_json(setting), "done": {}}
    if path.is_file():
        old = read_json(path, kind=KIND, schema=SCHEMA)
        result = old if old["key"] == result["key"] else result
    run = Bench(arguments, result | {"environment": about, "setting": setting}, path)
    for part in arguments.part:
        {"targets": targets, "alignment": alignment, "error": error, "explain": explain}[part](run)
    if arguments.write:
        name = "-".join(["latency", *(v for v in place.values() if v != "onnxruntime"), *filter(None, [arguments.tag])])
        target = ROOT / "benchmarks" / "results" / about["machine"] / f"{vss.__version__}--{name}.json"
        done = read_json(target, kind=KIND, schema=SCHEMA) if target.is_file() else {"key": None}
        if done["key"] == run.result["key"]:  # networks that other runs measured stay
            run.result["done"] = done["done"] | run.result["done"]
        LOG.info("wrote %s", write_json(target, run.result))


def generated(arguments: argparse.Namespace) -> Path:
    """Street images for a quick run."""
    if not arguments.quick:
        raise VssError("give --data-root, the folder of CamVid, or --quick.")
    from vss.data.synthetic import write_street

    root = arguments.out / "street"
    if not root.is_dir():
        write_street(root, seed=1, counts={"train": 24, "val": 6, "test": 8}, size=((68, 76), (92, 100)))
    return root.resolve()


if __name__ == "__main__":
    main()
