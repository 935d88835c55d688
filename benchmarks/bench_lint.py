"""The lint against parser and builder of TensorRT for RTX on ONNX's own tests of its operators; no speeds, no GPU.

    python benchmarks/bench_lint.py [--target sm86] [--write]

Every graph of one node is judged, all inputs but the first as constants, once by the rules and once for real. A false
alarm is a graph that the rules refuse and TensorRT builds; a miss is one that they pass and it refuses.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, numpy_helper
from onnx.backend.test.case.node import collect_testcases

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import facts, write  # noqa: E402

from tests.deploy.real_parser import judge, parser_ops  # noqa: E402
from vss.deploy.lint import REFUSED, lint  # noqa: E402

NO_SHAPES = "no optimization profile"
"""Of graphs that compute a shape from an input: nothing is said about the op."""


def graphs() -> dict[str, ModelProto]:
    made = {}
    for case in collect_testcases(None):
        model = case.model
        if len(model.graph.node) == 1 and model.graph.node[0].domain in ("", "ai.onnx") and case.data_sets:
            _freeze(model.graph, case.data_sets[0][0])
            made[case.name] = model
    return made


def _freeze(graph: Any, values: list[Any]) -> None:
    """All inputs but the first become constants."""
    inputs = list(graph.input)
    del graph.input[:]
    for index, declared in enumerate(inputs):
        value = values[index] if index < len(values) else None
        tensor = numpy_helper.from_array(value, declared.name) if index and isinstance(value, np.ndarray) else None
        if tensor is not None and tensor.data_type == declared.type.tensor_type.elem_type:
            graph.initializer.append(tensor)
        else:
            graph.input.append(declared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="sm86")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # numpy's, from the tests' own arithmetic
    models = graphs()
    with tempfile.TemporaryDirectory(prefix="vss-lint-") as folder:
        verdicts = judge(models, Path(folder), target=options.target)
    counts: Counter[str] = Counter()
    wrong: dict[str, Counter[str]] = {"false alarm": Counter(), "miss": Counter()}
    for name, model in models.items():
        verdict = verdicts[name]
        found = lint(model, flavours=["rtx"], targets=[options.target])
        refused = any(finding.flavours["rtx"] == REFUSED for finding in found)
        kind = "agree"
        if NO_SHAPES in verdict.reason:
            kind = "no verdict"
        elif refused is verdict.built:
            kind = "false alarm" if refused else "miss"
            wrong[kind][model.graph.node[0].op_type] += 1
        counts[kind] += 1
    by_op = {kind: dict(sorted(ops.items())) for kind, ops in wrong.items()}
    version = parser_ops([])[0]
    print(f"TensorRT for RTX {version}, {len(models)} graphs: {dict(counts)}\n{by_op}")
    if options.write:
        body = {"tensorrt_rtx": version, "target": options.target, "graphs": len(models), "counts": dict(counts)}
        print(write("lint", "cpu", facts("cpu"), body | {"by_op": by_op}))


if __name__ == "__main__":
    main()
