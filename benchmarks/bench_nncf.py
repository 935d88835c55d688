"""INT8 beside what others make of the same networks and images: NNCF for OpenVINO, what ONNX Runtime has.

    pip install nncf
    python benchmarks/bench_nncf.py --net unet=CKPT --data-root CAMVID --dataset camvid --write

Part "nncf": `nncf.quantize` on the exported float32 file with the calibration images of `vss export --precision int8`,
by presets, with both bias corrections and without, and with its fix against overflow in every layer; our file beside
them. Each is scored on the test split through one predictor in OpenVINO and timed in one interleaved run; seconds of
CPU time and peak extra memory are of calibration and quantisation together. Part "ort": what users of ONNX Runtime try,
one core and two: file forms by its own `quantize_static`, levels, options of the session. (Its dynamic quantisation has
no convolutions but ConvInteger, which has one scale for all weights and no bias; it is for MatMul and LSTM.) A ratio is
float32's time over the row's, above 1 is faster, by medians with an interval, and by the fastest calls. Stops and goes
on, network by network; other data by a second call.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import measure
import numpy as np

import vss
from vss.core.config import Recipe
from vss.core.environment import cpu_flags, environment, package_version
from vss.core.errors import VssError, need
from vss.core.files import read_json, write_json
from vss.deploy.backends.base import Int8, Session
from vss.deploy.backends.onnx_runner import OpenVINOEngine
from vss.deploy.backends.ort import OPTIMISATION, OnnxRuntimeSession
from vss.deploy.backends.ov import OpenVINOSession, int8_by
from vss.deploy.bench import Timing, interleave, speedup
from vss.deploy.quantize.layers import Net, read_onnx
from vss.deploy.quantize.precision import convert
from vss.deploy.quantize.qdq import insert, place
from vss.run.precision import PrecisionExporter
from vss.run.project import project_of
from vss.train import checkpoint
from vss.train.evaluate import engine_predictor

ROOT = Path(__file__).resolve().parent.parent
KIND, SCHEMA = "vss.bench_nncf", 1
LOG = logging.getLogger("bench_nncf")
NNCF = {
    "nncf": {},
    "nncf mixed": {"preset": "MIXED"},
    "nncf slow bias correction": {"fast_bias_correction": False},
    "nncf no bias correction": {"disable_bias_correction": True},
    "nncf 7 bits": {"overflow_fix": "ENABLE"},
}
"""Name -> what differs from its defaults: preset PERFORMANCE, fast bias correction, 7 bits in the first layer alone."""
FORMS = {
    "qdq s8s8": {},
    "qdq s8s8 per tensor": {"per_channel": False},
    "qdq u8s8": {"activation_type": "QUInt8"},
    "qdq u8s8 reduce_range": {"activation_type": "QUInt8", "reduce_range": True},
    "qdq u8u8 per tensor": {"activation_type": "QUInt8", "weight_type": "QUInt8", "per_channel": False},
    "qoperator s8s8": {"quant_format": "QOperator"},
    "qoperator u8s8": {"quant_format": "QOperator", "activation_type": "QUInt8"},
    "qoperator u8s8 reduce_range": {"quant_format": "QOperator", "activation_type": "QUInt8", "reduce_range": True},
    "qoperator u8u8 per tensor": {"quant_format": "QOperator", "activation_type": "QUInt8", "weight_type": "QUInt8",
                                  "per_channel": False},
}  # fmt: skip
"""Of `quantize_static` with its default operators, by name -> what differs from S8S8 by channel in Q/DQ."""
OPTIONS: dict[str, dict[str, Any]] = {
    "level disabled": {"level": "disabled"},
    "level basic": {"level": "basic"},
    "level extended": {"level": "extended"},
    "session.qdqisint8allowed 1": {"entries": {"session.qdqisint8allowed": "1"}},
    "session.disable_quant_qdq 1": {"entries": {"session.disable_quant_qdq": "1"}},
    "session.enable_quant_qdq_cleanup 1": {"entries": {"session.enable_quant_qdq_cleanup": "1"}},
    "session.x64quantprecision 1": {"entries": {"session.x64quantprecision": "1"}},
    "session.set_denormal_as_zero 1": {"entries": {"session.set_denormal_as_zero": "1"}},
    "session.intra_op.allow_spinning 0": {"entries": {"session.intra_op.allow_spinning": "0"}},
    "without NhwcTransformer": {"without": ["NhwcTransformer"]},
    "without NchwcTransformer": {"without": ["NchwcTransformer"]},
    "optimised file, saved": {"saved": True},
}


class IREngine(OpenVINOEngine):
    """A model in OpenVINO's own format, in place of the ONNX file that it was made from."""

    def __init__(self, onnx: Path, xml: Path, threads: int) -> None:
        self._xml = xml
        super().__init__(onnx, threads=threads)

    def read(self) -> Any:
        """The model of the other file."""
        return self.core.read_model(self._xml)


class IR(OpenVINOSession):
    """See `IREngine`; refuses a model in which nothing is computed in INT8."""

    def __init__(self, onnx: Path, xml: Path, threads: int, feed: Mapping[str, np.ndarray]) -> None:
        super().__init__(onnx, threads=threads)
        self._engine = IREngine(onnx, xml, threads)
        if not any(kind.endswith(("u8", "i8", "int8", "uint8")) for kind in computes(self, feed)):
            raise VssError(f"nothing in {xml.name} is computed in INT8: {computes(self, feed)}.")


class Tuned(OnnxRuntimeSession):
    """An ONNX file in ONNX Runtime with options that users set."""

    def __init__(
        self,
        path: Path,
        threads: int,
        *,
        level: str = "all",
        entries: Mapping[str, str] | None = None,
        without: list[str] | None = None,
        saved: bool = False,
    ) -> None:
        super().__init__(path, threads=threads)
        ort = need("onnxruntime", "the benchmark")
        if saved:
            self._start(ort, path, threads, "all", {}, [], written := path.with_suffix(".optimised.onnx"))
            path, level = written, "disabled"
        self._session = self._start(ort, path, threads, level, entries or {}, without or [], None)

    @staticmethod
    def _start(
        ort: Any,
        path: Path,
        threads: int,
        level: str,
        entries: Mapping[str, str],
        without: list[str],
        write: Path | None,
    ) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, threads
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, OPTIMISATION[level])
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        if write is not None:
            options.optimized_model_filepath = str(write)
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=without)


def exporter_of(path: Path, arguments: argparse.Namespace, folder: Path, backend: str) -> PrecisionExporter:
    """The float32 file of a checkpoint, and its calibration images; scored on the test split."""
    config = {"images": 16 if arguments.quick else arguments.images}
    limit = {"data": {"limit": 12}} if arguments.quick else {}
    build = {"backend": backend, "threads": 1}
    recipe = Recipe.model_validate({"split": "test", "precision": config, "build": build} | limit)
    project = project_of(path, data_root=arguments.data_root, dataset=arguments.dataset, recipe=recipe)
    folder.mkdir()
    model = checkpoint.load(path)
    return PrecisionExporter.export(project, model, recipe.precision, folder, folder / "ranges")


def score(exporter: PrecisionExporter, session: Session) -> float:
    """The task's metric on the test split."""
    project = exporter.project
    return float(project.score(engine_predictor(session, project.preprocess))[project.task.metric])


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of CPU time, which other work on the machine does not lengthen, and memory."""
    start = time.process_time()
    peak, _ = measure.peak_of(call, "cpu")
    return {"cpu_seconds": time.process_time() - start, "peak_extra_mib": peak / 2**20}


def times(
    exporter: PrecisionExporter, sessions: Mapping[str, Session], cores: list[int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One interleaved run on these cores; the first session is float32."""
    feed = {"image": exporter.images(1, exporter.project.preprocess.size, 0).numpy()}
    os.sched_setaffinity(0, cores)
    limit = 4.0 if arguments.quick else arguments.seconds
    timing = Timing(min_seconds=limit / 4, max_seconds=limit, window_seconds=0.1)
    trace = interleave({name: _call(session, feed) for name, session in sessions.items()}, timing)
    base, *_ = sessions
    fastest = {name: min(int(window.min()) for window in each) for name, each in trace.windows.items()}
    rows = {
        name: {
            "latency_ms_p50": statistics.median(np.concatenate(each).ravel().tolist()) / 1e6,
            "speedup": speedup(trace.windows[base], each) | {"minimum": fastest[base] / fastest[name]},
        }
        for name, each in trace.windows.items()
    }
    return {"rows": rows, "stable": trace.stable, "rounds": len(trace.windows[base]), "cores": len(cores)}


def _call(session: Session, feed: Mapping[str, np.ndarray]) -> Callable[[], tuple[int, ...]]:
    def call() -> tuple[int, ...]:
        start = time.perf_counter_ns()
        session.run(feed)
        return (time.perf_counter_ns() - start,)

    return call


def computes(session: OpenVINOSession, feed: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many convolutions and matrix products of the compiled model read which type."""
    counts: dict[str, int] = {}
    for layer in session.layers(feed)["Layers"]:
        if layer["LayerType"] in ("Convolution", "Deconvolution", "FullyConnected", "MatMul"):
            key = f"{layer['LayerType']} {layer['Precision']}"
            counts[key] = counts.get(key, 0) + 1
    return counts


def nncf_file(exporter: PrecisionExporter, xml: Path, changes: Mapping[str, Any]) -> None:
    """What NNCF makes of the float32 file with our calibration images, one at a time. Of the same file read by
    `read_model` it would correct no bias, without a word: there a bias is no constant yet."""
    nncf, ov = need("nncf", "the benchmark"), need("openvino", "the benchmark")
    settings, advanced = dict(changes), {}
    for key in [key for key in settings if key in ("disable_bias_correction", "overflow_fix")]:
        value = settings.pop(key)
        advanced[key] = nncf.OverflowFix[value] if key == "overflow_fix" else value
    if "preset" in settings:
        settings["preset"] = nncf.QuantizationPreset[settings["preset"]]
    feeds = list(exporter.feeds(1))
    made = nncf.quantize(
        ov.convert_model(exporter.plain), nncf.Dataset(feeds), subset_size=len(feeds),
        advanced_parameters=nncf.AdvancedQuantizationParameters(**advanced), **settings,
    )  # fmt: skip
    ov.save_model(made, xml, compress_to_fp16=False)


def part_nncf(exporter: PrecisionExporter, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Score, time, seconds and memory of our file and of NNCF's."""
    ours = folder / "vss.onnx"
    rows: dict[str, dict[str, Any]] = {"fp32": {}}
    rows["vss"] = timed(lambda: convert(exporter.plain, ours, exporter.precision("int8"), exporter.calibrate()))
    for name, changes in NNCF.items():
        xml = folder / f"{name}.xml"
        rows[name] = timed(lambda xml=xml, changes=changes: nncf_file(exporter, xml, changes))  # type: ignore[misc]
        LOG.info("%s: %s", name, rows[name])
    with ExitStack() as stack:
        sessions: dict[str, OpenVINOSession] = {
            "fp32": OpenVINOSession(exporter.plain, threads=1), "vss": OpenVINOSession(ours, threads=1)
        }  # fmt: skip
        feed = {"image": exporter.images(1, exporter.project.preprocess.size, 0).numpy()}
        sessions |= {name: IR(exporter.plain, folder / f"{name}.xml", 1, feed) for name in NNCF}
        for session in sessions.values():
            stack.enter_context(session)
        timing = times(exporter, sessions, [arguments.core], arguments)
        for name, session in sessions.items():
            rows[name] |= timing["rows"][name] | {"layers": computes(session, feed)}
            rows[name][exporter.project.task.metric] = score(exporter, session)
            LOG.info("%s: %s", name, rows[name])
    return timing | {"rows": rows}


class _Reader:
    """Calibration images as `quantize_static` takes them."""

    def __init__(self, feeds: Iterator[dict[str, np.ndarray]]) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def ort_files(exporter: PrecisionExporter, folder: Path) -> dict[str, Path]:
    """Our file, the same in uint8 and 7 bits with ranges of its own for each input of a Concat or without, and those of
    `quantize_static`; calibrated once."""
    quantization = need("onnxruntime.quantization", "the benchmark")
    files = {"fp32": exporter.plain}
    ranges = exporter.calibrate().values
    styles = {"vss s8s8": Int8(), "vss u8s8, one range a Concat": Int8(True, 7), "vss u8s8": Int8(True, 7, tied=False)}
    for name, style in styles.items():
        files[name], net = folder / f"{name}.onnx", Net(read_onnx(exporter.plain))
        model = insert(net, place(net, tied=style.tied), ranges, exporter.plain, style)
        files[name].write_bytes(model.SerializeToString())
    prepared = folder / "prepared.onnx"
    need("onnxruntime.quantization.shape_inference", "the benchmark").quant_pre_process(
        exporter.plain, prepared, skip_symbolic_shape=True
    )
    count = len(exporter.calibration.pairs)
    most = next(each for each in (16, 15, 13, 11) if count % each)  # it refuses to end with nothing left over
    for name, changes in FORMS.items():
        options = {"quant_format": "QDQ", "activation_type": "QInt8", "weight_type": "QInt8", **changes}
        options["quant_format"] = quantization.QuantFormat[str(options["quant_format"])]
        for key in ("activation_type", "weight_type"):
            options[key] = quantization.QuantType[str(options[key])]
        files[name] = folder / f"{name}.onnx"
        quantization.quantize_static(
            prepared, files[name], _Reader(exporter.feeds(1)), **({"per_channel": True} | options),
            calibration_cache_path=folder / "ranges.json", extra_options={"CalibMaxIntermediateOutputs": most},
        )  # fmt: skip
    return files


def part_ort(exporter: PrecisionExporter, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time and score of each form, and of each option with our file and the fastest form; one core and two. An option
    that changes no bit of the results of eight images has its form's score."""
    files, found = ort_files(exporter, folder), dict[str, Any]()
    sessions: dict[str, Session] = {name: Tuned(path, 1) for name, path in files.items()}
    found["forms"] = times(exporter, sessions, [arguments.core], arguments)
    rows = found["forms"]["rows"]
    for name, session in sessions.items():
        rows[name][exporter.project.task.metric] = score(exporter, session)
        LOG.info("%s: %s", name, rows[name])
    quick = max((name for name in rows if name != "fp32"), key=lambda name: rows[name]["speedup"]["ratio"])
    for threads, cores in ((1, [arguments.core]), (2, [0, 1])):
        opened: dict[str, Session] = {"fp32": Tuned(files["fp32"], threads)}
        for form in dict.fromkeys(("vss u8s8", quick)):
            opened[form] = Tuned(files[form], threads)
            opened |= {f"{form}, {name}": Tuned(files[form], threads, **option) for name, option in OPTIONS.items()}
        table = found[f"options, {threads} threads"] = times(exporter, opened, cores, arguments)
        feeds = list(exporter.feeds(1))[:8]
        for name in [name for name in opened if ", " in name]:
            form = name.partition(", ")[0]
            same = all(_equal(opened[form].run(feed), opened[name].run(feed)) for feed in feeds)
            metric = exporter.project.task.metric
            table["rows"][name][metric] = rows[form][metric] if same else score(exporter, opened[name])
        LOG.info("%s", json.dumps(table))
    return found


def _equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


PARTS: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {
    "nncf": ("openvino", part_nncf), "ort": ("onnxruntime", part_ort)
}  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", action="append", required=True, help="name=CHECKPOINT; repeat it")
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--dataset", default=None)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--images", type=int, default=64, help="calibration images")
    parser.add_argument("--core", type=int, default=0, help="the core that one thread is pinned to")
    parser.add_argument("--seconds", type=float, default=30.0, help="most that one interleaved run takes")
    parser.add_argument("--quick", action="store_true", help="a dozen images, short runs")
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results/<machine>/")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("nncf").setLevel(logging.WARNING)
    about = environment() | {"int8": int8_by(cpu_flags()), "nncf": package_version("nncf")}
    path = ROOT / "benchmarks" / "results" / about["machine"] / f"{vss.__version__}--nncf.json"
    known = path.is_file() and arguments.write
    result = read_json(path, kind=KIND, schema=SCHEMA) if known else {"kind": KIND, "schema": SCHEMA, "done": {}}
    for name, ckpt in (net.split("=", 1) for net in arguments.net):
        weights = checkpoint.read(ckpt).weights_sha256
        for part in arguments.part or PARTS:
            key, setting = f"{name} {part}", {"weights": weights, "images": arguments.images, "quick": arguments.quick}
            if result["done"].get(key, {}).get("setting") == setting:
                continue
            backend, run = PARTS[part]
            with tempfile.TemporaryDirectory() as folder:
                exporter = exporter_of(Path(ckpt), arguments, Path(folder) / "plain", backend)
                found = run(exporter, Path(folder), arguments)
            result["done"][key] = {"setting": setting, "size": exporter.project.preprocess.size, **found}
            result["environment"] = about
            LOG.info("%s", json.dumps({key: result["done"][key]}))
            if arguments.write:
                write_json(path, result)


if __name__ == "__main__":
    main()
