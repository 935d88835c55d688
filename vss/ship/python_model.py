"""Model of Triton's python backend: an ONNX file in ONNX Runtime or OpenVINO, or the step before or after an engine.

For servers without a backend of that runtime. `role` in config.pbtxt says what it is: "engine" (runs model.onnx in
`runtime`, by way of onnx_runner.py beside it), "pre" (uint8 (N, H, W, 3) -> normalised float32 (N, 3, H, W)) or "post"
(logits (N, K, H, W) -> uint8 labels (N, H, W)). The server's own Python imports numpy and the runtime; where they live
in another folder, the environment variable VSS_SITE_PACKAGES of the server names it (Triton's stub does not read
PYTHONPATH).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if os.environ.get("VSS_SITE_PACKAGES"):
    sys.path.insert(0, os.environ["VSS_SITE_PACKAGES"])

import numpy as np


class TritonPythonModel:
    """What Triton's python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the configuration; open the engine."""
        config = json.loads(args["model_config"])
        values = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.inputs = [each["name"] for each in config["input"]]
        self.outputs = [each["name"] for each in config["output"]]
        self.role = values["role"]
        if self.role == "engine":
            folder = os.path.join(args["model_repository"], args["model_version"])
            sys.path.insert(0, folder)
            import onnx_runner

            self.engine = onnx_runner.open_engine(
                values["runtime"], Path(folder) / "model.onnx", as_written=values["as_written"] == "1",
                threads=int(values["threads"]) or None, most=1,
            )  # fmt: skip
            if config["max_batch_size"] > 1:  # so that no request waits for it
                self.engine.reserve(2)
        if self.role == "pre":
            self.mean, self.std = (np.array(values[key].split(), np.float32) for key in ("mean", "std"))

    def execute(self, requests: list[object]) -> list[object]:
        """One run for all requests of the batch that the server formed; what it raises is the clients' answer."""
        import triton_python_backend_utils as pb_utils

        parts = [[pb_utils.get_input_tensor_by_name(r, name).as_numpy() for name in self.inputs] for r in requests]
        found = self.compute([np.concatenate(each) for each in zip(*parts, strict=True)])
        ends = np.cumsum([len(part[0]) for part in parts])[:-1]
        split = [np.split(value, ends) for value in found]
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, values[i]) for name, values in zip(self.outputs, split, strict=True)]
            )
            for i in range(len(requests))
        ]

    def compute(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Inputs and outputs in the order of config.pbtxt."""
        if self.role == "engine":
            found = self.engine(dict(zip(self.inputs, arrays, strict=True)), self.outputs)
            return [found[name] for name in self.outputs]
        if self.role == "pre":
            pixels = (arrays[0].astype(np.float32) / 255 - self.mean) / self.std
            return [np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))]
        return [arrays[0].argmax(1).astype(np.uint8)]
