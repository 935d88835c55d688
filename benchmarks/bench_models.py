"""Latency of networks in torch and in onnxruntime, from uint8 pixels to labels, interleaved in one run per network.

    python benchmarks/bench_models.py [--models unet,resnet18_seg] [--ckpt FILE ...] [--input-size 256,512]
                                      [--batch 1] [--classes 11] [--threads 2] [--max-seconds 60] [--write]

Networks by name have random weights: latency does not depend on them. `speedup` is that of onnxruntime over torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import vss  # noqa: E402
from vss import deploy, models  # noqa: E402
from vss.core.environment import environment  # noqa: E402
from vss.core.files import write_json  # noqa: E402
from vss.data.preprocess import Preprocess  # noqa: E402

LOG = logging.getLogger("bench_models")


def compare(network: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Export one network, then time torch and onnxruntime in turns."""
    preprocess = Preprocess(size=arguments.input_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        exported = deploy.export(network, path, size=preprocess.size, preprocess=preprocess, labels=True)
        sessions: dict[str, deploy.Session] = {
            "torch": deploy.TorchSession(
                network, preprocess.size, preprocess=preprocess, labels=True, threads=arguments.threads
            ),
            "onnxruntime": deploy.BACKENDS["onnxruntime"].open(path, threads=arguments.threads),
        }
        shape = (arguments.batch, *preprocess.size, 3)
        feed = {"image": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)}
        timed = deploy.bench(sessions, dict.fromkeys(sessions, feed), max_seconds=arguments.max_seconds)
    timed.pop("environment")
    keep = ("nodes_before", "nodes_after", "bytes", "parity", "inputs", "outputs")
    return {"network": network.name, "options": network.options, "export": {key: exported[key] for key in keep}} | timed


def networks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Name -> network, from --models and --ckpt."""
    torch.manual_seed(0)
    named = {name: models.build(name, arguments.classes) for name in arguments.models if name}
    return named | {path.stem: vss.load(path) for path in arguments.ckpt}


def numbers(text: str) -> tuple[int, int]:
    height, width = map(int, text.split(","))
    return height, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["unet", "resnet18_seg"])
    parser.add_argument("--ckpt", type=Path, nargs="*", default=[])
    parser.add_argument("--input-size", type=numbers, default=(256, 512), help="H,W")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--classes", type=int, default=11)
    parser.add_argument("--threads", type=int, default=environment()["cpu"]["usable_cores"])
    parser.add_argument("--max-seconds", type=float, default=60.0, help="per network")
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results/<machine>/")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    about = environment()
    rows = []
    for name, network in networks(arguments).items():
        row = {"name": name} | compare(network, arguments)
        rows.append(row)
        ratio = row["speedup"]["onnxruntime"]
        times = {key: f"{each['latency_ms_p50']:.1f} ms" for key, each in row["sessions"].items()}
        interval = "" if ratio["low"] is None else f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        LOG.info("%s %s speed-up %.2f%s", name, times, ratio["ratio"], interval)
        LOG.info("  %s after %d rounds", "stable" if row["stable"] else "not stable", row["rounds"])
    result = {"kind": "vss.bench.models", "schema": 1, "environment": about, "rows": rows}
    if arguments.write:
        path = ROOT / "benchmarks" / "results" / about["machine"] / f"{vss.__version__}--models.json"
        LOG.info("%s", write_json(path, result).relative_to(ROOT))
    else:
        LOG.info("%s", json.dumps(result))


if __name__ == "__main__":
    main()
