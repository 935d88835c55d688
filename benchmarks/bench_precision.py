"""Networks in float32, float16 and INT8, before and after pruning: metric, size, latency; and INT8 saved by the search.

    python benchmarks/bench_precision.py --data-root CAMVID --pair unet=BASELINE.safetensors,PRUNED.safetensors --write

A row is (network, pruned or not, precision), scored on the test split and timed in one interleaved run with the other
rows of its network, all in onnxruntime on the CPU; these times say nothing about TensorRT. INT8 that costs more than
`--max-drop` is searched, and the row says what was kept. The last part blows one channel of a network up, exactly, so
that plain min-max ranges collapse, and shows the search at work. Rows are kept as soon as they are known, so that a
killed run goes on. `--quick` takes few images.
Networks of another data set are added by a second call with its `--data-root`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vss
from vss.core.config import Recipe
from vss.core.environment import environment
from vss.core.files import read_json, sha256_json, write_json
from vss.deploy import BACKENDS, bench
from vss.deploy.quantize.precision import decide
from vss.run.precision import PrecisionExporter, judge
from vss.run.project import Project, project_of
from vss.train import checkpoint

ROOT = Path(__file__).resolve().parent.parent
KIND, SCHEMA = "vss.bench_precision", 1
BLOW_UP = 4096.0
LOG = logging.getLogger("bench_precision")


def blown_up(model: nn.Module, size: tuple[int, int]) -> tuple[nn.Module, str]:
    """The same function with the largest channel between two convolutions times a power of two, and back.

    A norm's scale and shift grow, the next layer's weights shrink; ReLU lets a positive factor through, and a power of
    two changes no bit of a float32 mantissa.

    Returns:
        The network and the name of the layer that reads the blown-up channel.
    """
    twin = copy.deepcopy(model).eval()
    for norm, reader in _pairs(twin):
        channel = int((norm.bias.abs() + norm.weight.abs()).argmax())
        with torch.no_grad():
            norm.weight[channel] *= BLOW_UP
            norm.bias[channel] *= BLOW_UP
            reader[1].weight[:, channel] /= BLOW_UP
        x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected, found = model(x), twin(x)
        if torch.allclose(expected, found, rtol=1e-4, atol=1e-4):
            return twin, reader[0]
        twin = copy.deepcopy(model).eval()
    raise SystemExit("this network has no norm, ReLU and convolution in a row; take a U-Net or a ResNet")


def _pairs(model: nn.Module) -> list[tuple[nn.BatchNorm2d, tuple[str, nn.Conv2d]]]:
    """Batch norms with the convolution that is defined next and takes as many channels."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d | nn.Conv2d)]
    return [
        (norm, (name, after))
        for (_, norm), (name, after) in itertools.pairwise(layers)
        if isinstance(norm, nn.BatchNorm2d) and isinstance(after, nn.Conv2d) and after.groups == 1
        and after.in_channels == norm.num_features
    ]  # fmt: skip


def open_project(path: Path, arguments: argparse.Namespace) -> Project:
    """The checkpoint's data, split test, with few images when quick."""
    quick = {"data": {"limit": 12}} if arguments.quick else {}
    config = {"method": arguments.method, "images": 16 if arguments.quick else 128, "max_drop": arguments.max_drop}
    config |= {"search_images": 12 if arguments.quick else 101, "groups": 6 if arguments.quick else 16}
    config |= {"elsewhere": arguments.elsewhere}
    recipe = Recipe.model_validate(
        {"split": "test", "precision": config, "build": {"threads": arguments.threads}} | quick
    )
    return project_of(path, data_root=arguments.data_root, dataset=arguments.dataset, recipe=recipe)


def rows_of(name: str, path: Path, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every precision of one checkpoint: scores, size, gate, what is kept, and times of one run."""
    project, model = open_project(path, arguments), checkpoint.load(path)
    exporter = PrecisionExporter.export(project, model, project.recipe.precision, folder, folder / "ranges")
    results = {"torch": project.score_net(model), "onnxruntime": exporter.score(exporter.plain)}
    metric = project.task.metric
    files = {"fp32": exporter.plain}
    rows: dict[str, dict[str, Any]] = {"fp32": {"passed": True, **_scores(project, results["onnxruntime"])}}
    for kind in ("fp16", "int8"):
        files[kind] = folder / f"{kind}.onnx"
        report = exporter.write(files[kind], kind)
        verdict = judge(
            exporter, files[kind], results | {"engine": exporter.score(files[kind])}, max_drop=arguments.max_drop
        )
        extra: dict[str, Any] = {}
        if kind == "int8" and not verdict["passed"]:
            choice = exporter.search()
            extra = {"before_search": verdict["drop"], "freed": choice.facts["freed"], "within": choice.facts["within"]}
            if choice.facts["within"]:
                report = exporter.write(files[kind], kind, choice.keep)
                results["engine"] = exporter.score(files[kind])
                verdict = judge(exporter, files[kind], results, max_drop=arguments.max_drop)
        rows[kind] = {"passed": verdict["passed"], metric: verdict["candidate"], "drop": verdict["drop"]}
        rows[kind] |= {"interval": verdict.get("drop_interval"), "sentence": verdict["sentence"], **extra}
        rows[kind] |= {"layers": report["precision"]["layers"], "int8_layers": len(report["precision"]["int8"])}
        rows[kind] |= {"parity": report["parity"]["shapes"], "nodes": report["precision"]["nodes"]}
    timing = times(exporter, files, arguments)
    for kind, row in rows.items():
        row |= {"network": name, "precision": kind, "size_mib": files[kind].stat().st_size / 2**20}
        row |= {key: timing["sessions"][kind][key] for key in ("latency_ms_p50", "latency_ms_p99")}
        row |= {"speedup": timing["speedup"].get(kind), "stable": timing["stable"]}
    return [row | {"choice": decide(list(rows.values()))["sentence"]} for row in rows.values()]


def times(exporter: PrecisionExporter, files: dict[str, Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """One interleaved run over the files of a network, one image."""
    feed = {"image": exporter.images(1, exporter.project.preprocess.size, 0).numpy()}
    seconds = 3.0 if arguments.quick else 40.0
    with ExitStack() as stack:
        sessions = {
            kind: stack.enter_context(BACKENDS["onnxruntime"].open(path, threads=arguments.threads))
            for kind, path in files.items()
        }
        return bench(sessions, dict.fromkeys(sessions, feed), min_seconds=min(4.0, seconds), max_seconds=seconds)


def _scores(project: Project, result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in project.task.row_keys if key in result}


def collapse(name: str, path: Path, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A network with one channel blown up under min-max: float32, all of it in INT8, and what the search comes to."""
    project, model = open_project(path, arguments), checkpoint.load(path)
    twin, layer = blown_up(model, project.preprocess.size)
    config = project.recipe.precision.model_copy(update={"method": "minmax"})
    exporter = PrecisionExporter.export(project, twin, config, folder, folder / "ranges")
    metric = project.task.metric
    plain = exporter.score(exporter.plain)[metric]
    exporter.write(folder / "all.onnx", "int8")
    ruined = exporter.score(folder / "all.onnx")[metric]
    choice = exporter.search()
    row = {"network": name, "blown_up": layer, "factor": BLOW_UP, "fp32": plain, "int8_minmax": ruined}
    row |= {"search": choice.facts, "keep": list(choice.keep)}
    if choice.facts["within"]:
        exporter.write(folder / "saved.onnx", "int8", choice.keep)
        row["int8_searched"] = exporter.score(folder / "saved.onnx")[metric]
    return row


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", action="append", required=True, help="name=BASELINE[,PRUNED], checkpoints; repeat it")
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--dataset", default=None)
    parser.add_argument("--collapse", default=None, help="name of a pair whose baseline is blown up; default the first")
    parser.add_argument("--method", default="percentile")
    parser.add_argument("--elsewhere", default="fp32")
    parser.add_argument("--max-drop", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a dozen images, short runs")
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results/<machine>/")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pairs = dict(pair.split("=", 1) for pair in arguments.pair)
    jobs = {
        f"{name} {what}": Path(path)
        for name, paths in pairs.items()
        for what, path in zip(("baseline", "pruned"), paths.split(","), strict=False)
    }
    about = environment()
    setting = {key: getattr(arguments, key) for key in ("method", "elsewhere", "max_drop", "threads", "quick")}
    result_path = ROOT / "benchmarks" / "results" / about["machine"] / f"{vss.__version__}--precision.json"
    result = _resume(result_path, setting) if arguments.write else _fresh(setting)
    result |= {"environment": about, "setting": setting}

    def keep(key: str, value: Any) -> None:
        result["done"][key] = value
        LOG.info("%s", json.dumps({key: value}, default=str)[:2000])
        if arguments.write:
            write_json(result_path, result)

    for name, path in jobs.items():
        weights = checkpoint.read(path).weights_sha256
        if result["done"].get(name, {}).get("weights_sha256") != weights:
            with tempfile.TemporaryDirectory() as folder:
                keep(name, {"weights_sha256": weights, "rows": rows_of(name, path, arguments, Path(folder))})
    chosen = arguments.collapse or next(iter(pairs))
    known = f"collapse {chosen}" if arguments.collapse else "collapse "
    if not any(key.startswith(known) for key in result["done"]):
        with tempfile.TemporaryDirectory() as folder:
            keep(f"collapse {chosen}", collapse(chosen, jobs[f"{chosen} baseline"], arguments, Path(folder)))


def _fresh(setting: dict[str, Any]) -> dict[str, Any]:
    return {"kind": KIND, "schema": SCHEMA, "key": sha256_json(setting), "done": {}}


def _resume(path: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run of the same setting has done."""
    fresh = _fresh(setting)
    if not path.is_file():
        return fresh
    old = read_json(path, kind=KIND, schema=SCHEMA)
    return old if old["key"] == fresh["key"] else fresh


if __name__ == "__main__":
    main()
