"""Requests to a Triton server, by HTTP or gRPC, with one face; and what the server's statistics say of its batches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vss.core.errors import SHOWN, VssError, need, one_line

PROTOCOLS = ("grpc", "http")
TRITON_TYPES = {"uint8": "UINT8", "int32": "INT32", "float32": "FP32", "float16": "FP16", "int64": "INT64"}


class Client:
    """One connection. A gRPC client may be shared by threads, an HTTP client may not.

    Args:
        protocol: "grpc" or "http".
        address: HOST:PORT of that protocol.
        timeout: of one request, seconds.
    """

    def __init__(self, protocol: str, address: str, *, timeout: float = 60.0) -> None:
        if protocol not in PROTOCOLS:
            raise VssError(f"protocol is {protocol!r}; expected grpc or http.")
        self.lib: Any = need(f"tritonclient.{protocol}", "talking to a server")
        self.protocol, self.address, self.timeout = protocol, address, timeout
        extra = {"network_timeout": timeout, "connection_timeout": timeout} if protocol == "http" else {}
        self.client = self.lib.InferenceServerClient(address, **extra)

    def infer(self, model: str, inputs: Mapping[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        """One request. Raises `VssError` with the server's own words for everything that it refuses."""
        fields = []
        for name, value in inputs.items():
            dtype = TRITON_TYPES.get(value.dtype.name, value.dtype.name.upper())
            fields.append(self.lib.InferInput(name, list(value.shape), dtype))
        extra = {"client_timeout": self.timeout} if self.protocol == "grpc" else {}
        with self._asking(f"the server refused the request to {model}"):
            for field, value in zip(fields, inputs.values(), strict=True):
                field.set_data_from_numpy(value)
            wanted = [self.lib.InferRequestedOutput(name) for name in outputs]
            answer = self.client.infer(model, fields, outputs=wanted, **extra)
            found = {name: answer.as_numpy(name) for name in outputs}
        if missing := [name for name, value in found.items() if value is None]:
            raise VssError(f"the server's answer of {model} lacks {', '.join(missing)}; expected {', '.join(outputs)}.")
        return found

    def statistics(self, model: str) -> dict[str, Any]:
        """Counters of one model since it was loaded: requests, executions, batches {size: executions}, ns by stage."""
        extra = {"as_json": True} if self.protocol == "grpc" else {}
        with self._asking(f"the server at {self.address} gives no statistics of {model}"):
            return _counters(self.client.get_inference_statistics(model, **extra)["model_stats"][0])

    def since(self, model: str, before: Mapping[str, Any], *, answered: int, seconds: float = 10.0) -> dict[str, Any]:
        """What a model did since `before` (see `difference`), once the server has counted `answered` requests.

        A server counts a request a moment after its answer. Raises `VssError` when it does not within `seconds`.
        """
        end = time.monotonic() + seconds
        while True:
            found = difference(self.statistics(model), before)
            if found["count"]["success"] >= answered:
                return found
            if time.monotonic() > end:
                raise VssError(f"the server counts {found['count']['success']} of {answered} requests to {model}.")
            time.sleep(0.02)

    def models(self) -> list[str]:
        """Names of the models in the server's repositories."""
        with self._asking(f"the server at {self.address} does not list its models"):
            index = self.client.get_model_repository_index()
        rows = index if self.protocol == "http" else index.models
        return [row["name"] if self.protocol == "http" else row.name for row in rows]

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Errors of the server and of the connection, and answers that are none of Triton's, as one sentence."""
        from tritonclient.utils import InferenceServerException

        try:
            yield
        except (InferenceServerException, OSError) as error:
            raise VssError(f"{what}: {one_line(str(error))}") from error
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise VssError(
                f"{what}: its answer cannot be read ({type(error).__name__}: {one_line(str(error), SHOWN)}); is a "
                f"Triton server at {self.address}?"
            ) from error

    def close(self) -> None:
        """Close the connection."""
        self.client.close()


def _counters(row: Mapping[str, Any]) -> dict[str, Any]:
    """`Client.statistics` from Triton's own words."""
    stats = row.get("inference_stats", {})
    stages = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    return {
        "requests": int(row.get("inference_count", 0)),
        "executions": int(row.get("execution_count", 0)),
        "batches": {
            int(each["batch_size"]): int(each["compute_infer"].get("count", 0)) for each in row.get("batch_stats", [])
        },
        "ns": {name: int(stats.get(name, {}).get("ns", 0)) for name in stages},
        "count": {name: int(stats.get(name, {}).get("count", 0)) for name in stages},
    }


def difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What happened between two `Client.statistics`; batch sizes that did not occur are left out."""
    batches = {size: count - before["batches"].get(size, 0) for size, count in after["batches"].items()}
    return {
        "requests": after["requests"] - before["requests"],
        "executions": after["executions"] - before["executions"],
        "batches": {size: count for size, count in sorted(batches.items()) if count},
        "ns": {name: value - before["ns"][name] for name, value in after["ns"].items()},
        "count": {name: value - before["count"][name] for name, value in after["count"].items()},
    }
