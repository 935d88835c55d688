"""Pruning times INT8 on a CPU: networks in FP32 and INT8, in every runtime, uncut and cut, in one interleaved run each.

    python benchmarks/bench_cpu.py NETS.yaml --work DIR --cores 0 --write

NETS.yaml holds `name: {root: DATA, dataset: camvid, unpruned: A.safetensors, half: B.safetensors, ...}`: checkpoints of
one network, the first of which is what all times are compared with, in FP32 in the first of `--runtimes`. Every engine
is made as `vss run` makes it (a failed INT8 file is searched for layers to keep in floating point), scored on the whole
test split and judged against its own checkpoint in torch. Then all engines of a network are timed in one run on the
cores that are given, one image, and the guard says for every checkpoint and runtime whether INT8 is kept. A run that
was not stable is done again, `--tries` times, and is not kept. Files and what is known are kept in `--work`, so that a
killed run goes on. `--part scores` times nothing: times want a quiet machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import vss
from vss.core.config import Recipe
from vss.core.environment import environment
from vss.core.errors import VssError
from vss.core.files import read_json, sha256_file, write_json
from vss.core.yaml12 import read_yaml
from vss.deploy import Session, bench
from vss.deploy.backends import available, build_spec, open_options
from vss.deploy.bench import noise, pinned
from vss.deploy.quantize.precision import decide
from vss.prune import count
from vss.run.precision import PrecisionExporter, judge
from vss.run.project import Project, project_of
from vss.train import checkpoint
from vss.train.evaluate import engine_predictor

ROOT = Path(__file__).resolve().parent.parent
KIND, SCHEMA = "vss.bench_cpu", 1
KINDS = ("fp32", "int8")
LOG = logging.getLogger("bench_cpu")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Net:
    """Checkpoints of one network on one data set; the first is the uncut one."""

    name: str
    root: str
    dataset: str
    checkpoints: dict[str, Path]


def nets(path: Path) -> list[Net]:
    """What the YAML file names."""
    found = []
    for name, row in read_yaml(path, kind="list of networks").items():
        if not isinstance(row, dict) or not {"root", "dataset", "unpruned"} <= row.keys():
            raise VssError(f"{path}: {name} needs the keys root, dataset and unpruned (a checkpoint).")
        files = {key: Path(str(value)) for key, value in row.items() if key not in ("root", "dataset")}
        found.append(Net(name, str(row["root"]), str(row["dataset"]), {"unpruned": files.pop("unpruned"), **files}))
    return found


def project(net: Net, path: Path, arguments: argparse.Namespace) -> Project:
    """A checkpoint with its data and the settings of its engines; one thread a core."""
    limit = {"data": {"limit": arguments.limit}} if arguments.limit else {}
    precision = {"kinds": ["int8"]} | {key: getattr(arguments, key) for key in ("images", "max_drop", "search")}
    build = {"backend": arguments.runtimes[0], "threads": len(arguments.cores)}
    recipe = Recipe.model_validate({"split": "test", "precision": precision, "build": build} | limit)
    return project_of(path, data_root=net.root, dataset=net.dataset, recipe=recipe)


# -- scores -----------------------------------------------------------------------------------------------------------


def scores(net: Net, cut: str, arguments: argparse.Namespace) -> Row:
    """Every engine of one checkpoint: its file, its metric on the whole test split, and the gate's verdict."""
    path, folder = net.checkpoints[cut], arguments.work / net.name / cut
    folder.mkdir(parents=True, exist_ok=True)
    model, data = checkpoint.load(path), project(net, path, arguments)
    first = PrecisionExporter.export(data, model, data.recipe.precision, folder, folder / "ranges")
    torch, metric = data.score_net(model), data.task.metric
    row: Row = {"size": list(data.preprocess.size), "images": len(data.split("test")), "metric": metric}
    row |= {"torch": torch[metric], **count(model, data.preprocess.size), "engines": {}}
    for runtime in arguments.runtimes:
        exporter = dataclasses.replace(first, target=runtime)
        known = {"torch": torch}
        for kind in KINDS:
            made, result, verdict, facts = plain(exporter, known) if kind == "fp32" else int8(exporter, known)
            known.setdefault("onnxruntime", result)  # what `judge` calls the float32 file
            facts |= {key: verdict[key] for key in ("passed", "drop", "drop_interval", "sentence") if key in verdict}
            about = {"file": str(made.relative_to(arguments.work)), "sha256": sha256_file(made)}
            row["engines"][f"{runtime} {kind}"] = about | {metric: result[metric], **facts}
            LOG.info("%s %s %s %s: %s", net.name, cut, runtime, kind, verdict["sentence"])
    return row


Made = tuple[Path, Row, Row, Row]
"""Artefact, its scores, the gate's verdict, further facts."""


def plain(exporter: PrecisionExporter, known: dict[str, Row]) -> Made:
    made, result = engine(exporter, exporter.plain)
    results = {**known, "onnxruntime": result, "engine": result}
    return made, result, judge(exporter, exporter.plain, results, max_drop=exporter.project.recipe.gate.max_drop), {}


def int8(exporter: PrecisionExporter, known: dict[str, Row]) -> Made:
    """The INT8 file for the runtime; where it costs too much, with the layers in floating point that a search finds."""
    limit, facts = exporter.config.max_drop, Row(search=None)
    onnx = exporter.plain.with_name(f"int8.{exporter.runtime}.onnx")

    def attempt(keep: tuple[str, ...] | None) -> Made:
        report = exporter.write(onnx, "int8", keep)["precision"]
        made, result = engine(exporter, onnx)
        verdict = judge(exporter, onnx, known | {"engine": result}, max_drop=limit)
        return made, result, verdict, {"layers": report["layers"], "int8_layers": len(report["int8"])}

    found = attempt(None)
    if not found[2]["passed"] and exporter.config.search:
        choice = exporter.search()
        facts["search"] = {"before": found[2]["drop"], **{k: choice.facts[k] for k in ("within", "keep", "freed")}}
        found = attempt(choice.keep) if choice.facts["within"] else found
    return (*found[:3], found[3] | facts)


def engine(exporter: PrecisionExporter, onnx: Path) -> tuple[Path, Row]:
    """The artefact of a file in the exporter's runtime, and its scores on the whole test split."""
    data, runtime = exporter.project, exporter.runtime
    artefact = onnx.with_name(f"{onnx.stem}.{runtime}.engine.onnx")
    available(runtime).build(onnx, artefact, build_spec(data.recipe.build, runtime))
    with available(runtime).open(artefact, **open_options(data.recipe.build, runtime)) as session:
        return artefact, data.score(engine_predictor(session, data.preprocess))


# -- times ------------------------------------------------------------------------------------------------------------


def times(net: Net, known: dict[str, Row], arguments: argparse.Namespace) -> Row | None:
    """All engines of a network in one interleaved run, one image, and the guard; None where no try was stable."""
    config = {"spread": arguments.spread, "min_seconds": arguments.seconds / 4, "max_seconds": arguments.seconds}
    config["window_seconds"] = arguments.window
    data = project(net, net.checkpoints["unpruned"], arguments)
    pixels = data.split("test")[0]["image"][None]
    for _ in range(arguments.tries):
        with pinned(arguments.cores), ExitStack() as stack:
            sessions, against = dict[str, Session](), dict[str, str]()
            for cut, runtime, kind in itertools.product(net.checkpoints, arguments.runtimes, KINDS):
                row, title = known[cut]["engines"][f"{runtime} {kind}"], f"{cut} {runtime} {kind}"
                if sha256_file(file := arguments.work / row["file"]) != row["sha256"]:
                    raise VssError(f"{file} is not the file that was scored; delete {arguments.work} and run it again.")
                sessions[title] = stack.enter_context(
                    available(runtime).open(file, **open_options(data.recipe.build, runtime))
                )
                against |= {title: f"{cut} {runtime} fp32"} if kind != "fp32" else {}
            feeds = {name: engine_predictor(each, data.preprocess).feed(pixels) for name, each in sessions.items()}
            found = bench(sessions, feeds, against=against, **config)
        fault = noise(found)
        LOG.info("%s: %s", net.name, fault or f"stable after {found['seconds']:.0f} s")
        if not fault:
            return found | {"guard": guard(net, known, found, arguments.runtimes)}
    return None


def guard(net: Net, known: dict[str, Row], timing: Row, runtimes: list[str]) -> Row:
    """For every checkpoint and runtime: whether INT8 is kept there, and the sentence."""
    verdicts = {}
    for cut in net.checkpoints:
        for runtime in runtimes:
            rows = []
            for kind in KINDS:
                title, row = f"{cut} {runtime} {kind}", known[cut]["engines"][f"{runtime} {kind}"]
                rows.append({"precision": kind, **timing["sessions"][title], "sentence": row["sentence"]})
                rows[-1] |= {"passed": row["passed"], "speedup": timing["speedup_against"].get(title)}
            verdicts[f"{cut} {runtime}"] = decide(rows)
            LOG.info("%s %s in %s: %s", net.name, cut, runtime, verdicts[f"{cut} {runtime}"]["sentence"])
    return verdicts


# -- the record -------------------------------------------------------------------------------------------------------


def markdown(names: list[str], done: dict[str, Row]) -> str:
    """What is known as a table: times as fast as the uncut FP32 engine of the first runtime, and the metric."""
    lines = []
    for name in names:
        timing = done.get(f"{name} times", {})
        for key, row in done.items():
            if key.startswith(f"{name} scores "):
                cut, cells = key.removeprefix(f"{name} scores "), []
                for title, engine in row["engines"].items():
                    ratio = timing.get("speedup", {}).get(f"{cut} {title}")
                    span = f"{ratio['ratio']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f}), " if ratio else ""
                    cells.append(f"{span}{engine[row['metric']]:.2f}")
                lines.append(f"| {name} {cut} | {row['torch']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    arguments = parsed()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    about, found, record = environment(), nets(arguments.nets), arguments.work / "cpu.json"
    done = read_json(record, kind=KIND, schema=SCHEMA)["done"] if record.is_file() else dict[str, Row]()

    def keep(key: str, source: Any, work: Callable[[], Row | None]) -> Row | None:
        """What is known of a key from this source, else found now."""
        known = done.get(key)
        if known is None or known["source"] != source:
            done.pop(key, None)
            row = work()
            if row is not None:
                done[key] = {"source": source, **row}
                write_json(record, {"kind": KIND, "schema": SCHEMA, "environment": about, "done": done})
        return done.get(key)

    missing = [name for net in found for name in measured(net, keep, arguments)]
    print(markdown([net.name for net in found], done))
    if missing:
        sys.exit(f"not stable, so not kept: {', '.join(missing)}; run it again on a quiet machine.")
    if arguments.write:
        path = ROOT / "benchmarks" / "results" / about["machine"] / f"{vss.__version__}--cpu.json"
        write_json(path, read_json(record, kind=KIND, schema=SCHEMA))


def measured(net: Net, keep: Callable[..., Row | None], arguments: argparse.Namespace) -> Iterator[str]:
    """Do what a network lacks; yields its name where its times were not stable."""
    known = dict[str, Row]()
    for cut, path in net.checkpoints.items():
        source = {key: getattr(arguments, key) for key in ("images", "max_drop", "search", "limit", "runtimes")}
        source |= {"weights_sha256": checkpoint.read(path).weights_sha256}
        row = keep(f"{net.name} scores {cut}", source, functools.partial(scores, net, cut, arguments))
        assert row is not None
        known[cut] = row
    if arguments.part == "scores":
        return
    source = {key: getattr(arguments, key) for key in ("cores", "spread", "seconds")}
    source |= {f"{cut} {name}": each["sha256"] for cut, row in known.items() for name, each in row["engines"].items()}
    if keep(f"{net.name} times", source, functools.partial(times, net, known, arguments)) is None:
        yield net.name


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", type=Path, help="YAML file of networks and their checkpoints")
    parser.add_argument("--work", type=Path, required=True, help="folder for the ONNX files and engines")
    parser.add_argument("--runtimes", type=lambda text: text.split(","), default=["onnxruntime", "openvino"])
    parser.add_argument("--cores", type=lambda text: [int(each) for each in text.split(",")], default=[0])
    parser.add_argument("--images", type=int, default=64, help="calibration images")
    parser.add_argument("--max-drop", type=float, default=0.5, help="points that INT8 may cost")
    parser.add_argument("--search", action=argparse.BooleanOptionalAction, default=True, help="mend a failed INT8 file")
    parser.add_argument("--spread", type=float, default=0.03, help="of window medians, up to which a run is stable")
    parser.add_argument("--seconds", type=float, default=120.0, help="of one try of a network's times")
    parser.add_argument("--window", type=float, default=0.25, help="seconds of one engine at a time")
    parser.add_argument("--tries", type=int, default=3, help="runs of a network's times until one is stable")
    parser.add_argument("--limit", type=int, default=None, help="use only the first images of each split, for a look")
    parser.add_argument("--part", choices=("scores", "all"), default="all", help="scores: time nothing")
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results/<machine>/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
