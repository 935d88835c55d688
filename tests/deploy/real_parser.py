"""What parser and builder of TensorRT for RTX say of many graphs, without a GPU.

`python real_parser.py TARGET FILE..` prints a line of JSON for each; `judge` starts it anew when a graph kills it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CRASH = "the builder dies"


@dataclass(frozen=True)
class Verdict:
    """Whether the file was parsed, whether an engine came of it, and TensorRT's own reason where none did."""

    parsed: bool
    built: bool
    reason: str


def judge(models: Mapping[str, Any], folder: Path, *, target: str = "sm86") -> dict[str, Verdict]:
    """The verdict on each ModelProto, by its name."""
    paths = {str(folder / f"{index}-{target}.onnx"): name for index, name in enumerate(models)}
    for path, name in paths.items():
        Path(path).write_bytes(models[name].SerializeToString())
    found: dict[str, Verdict] = {}
    left = list(paths)
    while left:
        command = [sys.executable, __file__, target, *left]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        for name, line in zip([paths[path] for path in left], lines, strict=False):
            found[name] = Verdict(*line)
        if done.returncode == 0:
            assert len(lines) == len(left), done.stderr
        else:
            assert done.returncode < 0, done.stderr  # a signal, not an exception
            found[paths[left[len(lines)]]] = Verdict(True, False, f"{CRASH} (signal {-done.returncode})")
        left = left[len(lines) + 1 :]
    return found


def parser_ops(names: list[str]) -> tuple[str, list[str]]:
    """TensorRT's version, and those of the ops that its parser says it has."""
    done = subprocess.run([sys.executable, __file__, "ops", *names], capture_output=True, text=True, check=True)
    version, ops = json.loads(done.stdout.splitlines()[-1])
    return version, ops


def _child(word: str, rest: list[str]) -> None:
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and "cudaError 35" not in text:
                self.lines.append(text)

    log = Log()
    builder = trt.Builder(log)
    if word == "ops":
        network = builder.create_network(0)  # a parser does not keep its network alive
        parser = trt.OnnxParser(network, log)
        print(json.dumps([trt.__version__, [name for name in rest if parser.supports_operator(name)]]))
        return
    for path in rest:
        log.lines.clear()
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log)
        parsed, built = parser.parse(Path(path).read_bytes()), False
        error = parser.get_error(0) if parser.num_errors else None
        reason = f"{error.node_operator() or 'file'}: {error.desc()}" if error else ""
        if parsed:
            built = _build(trt, builder, network, word)
            reason = "" if built else next(iter(log.lines), "")
        print(json.dumps([parsed, built, " ".join(reason.split())]), flush=True)


def _build(trt: Any, builder: Any, network: Any, target: str) -> bool:
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for tensor in inputs:
        if -1 in tensor.shape:
            profile.set_shape(
                tensor.name, *(tuple(n if side < 0 else side for side in tensor.shape) for n in (1, 2, 4))
            )
    if any(-1 in tensor.shape for tensor in inputs):
        config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    return builder.build_serialized_network(network, config) is not None


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2:])
