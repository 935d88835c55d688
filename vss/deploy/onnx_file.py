"""One way to read an ONNX file that came from outside: whole, its external data beside it, or one sentence."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from vss.core.errors import VssError, need, one_line, shown
from vss.core.files import parse_json, require_file

LARGEST = 2 << 30
"""Bytes of a protobuf message; more is external data."""


def load(path: Path | str, *, external: bool = True) -> Any:
    """The ModelProto of a file, with its external data unless `external` is off."""
    onnx = need("onnx", "reading ONNX files")
    path = require_file(path, kind="ONNX", limit=LARGEST)
    decode_error = need("google.protobuf.message", "reading ONNX files").DecodeError
    try:
        model = onnx.load(str(path), load_external_data=False)
        if external:
            _check_external(path, model)
            onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except VssError:
        raise
    except (decode_error, onnx.checker.ValidationError, ValueError, OSError, RuntimeError) as error:
        raise VssError(f"{path} is no whole ONNX file ({one_line(str(error))}); export it again.") from error
    if not model.graph.node:
        raise VssError(f"{path} holds no ONNX graph; expected a file written by an exporter.")
    odd = next((each for each in model.opset_import if not 1 <= each.version < 1 << 16), None)
    if odd is not None:
        raise VssError(f"{path} asks for version {odd.version} of the operators {shown(odd.domain)}; export it again.")
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        if not all(isinstance(name, str) for name in (node.op_type, node.domain, node.name, *node.input, *node.output)):
            raise VssError(f"{path} has a node with a name that is no text; export it again.")
    _check_functions(path, model)
    return model


def metadata(path: Path | str) -> dict[str, str]:
    """What a file says of itself; its external data is left alone."""
    return {each.key: each.value for each in load(path, external=False).metadata_props}


def require_one_file(path: Path | str) -> Path:
    """The path, when all of it is in one file: external data is refused, since what is built, hashed and shipped is one
    file."""
    tensor = next((each for each in _tensors(load(path, external=False)) if each.external_data), None)
    if tensor is not None:
        place = shown("".join(entry.value for entry in tensor.external_data if entry.key == "location"))
        raise VssError(
            f"{path} keeps {shown(tensor.name)} in another file, {place}, and an artefact is one file; "
            "write it as one (less than 2 GiB): onnx.save(onnx.load(OLD), NEW)."
        )
    return Path(path)


def _check_external(path: Path, model: Any) -> None:
    """Every piece lies within a regular file beside the ONNX file."""
    for tensor in (tensor for tensor in _tensors(model) if tensor.external_data):
        about = {entry.key: entry.value for entry in tensor.external_data}
        name = about.get("location", "")
        beside = path.parent / name
        if not name or not beside.resolve().is_relative_to(path.parent.resolve()):
            raise VssError(f"{path} keeps a tensor in {name!r}, which does not lie beside it; export it again.")
        if not os.path.exists(beside):
            raise VssError(
                f"{beside}, which {path} refers to, does not exist; expected an ONNX file with all of its data."
            )
        start, length = (int(about.get(key) or 0) for key in ("offset", "length"))
        if min(start, length) < 0 or start + length > require_file(beside, kind="ONNX data").stat().st_size:
            raise VssError(f"{path} keeps a tensor beyond the end of {beside}; copy both files again.")


def _tensors(model: Any) -> Iterator[Any]:
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            nodes += graph.node
        else:
            for attribute in nodes.pop().attribute:
                yield from (attribute.t, *attribute.tensors)
                graphs += [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs


def _check_functions(path: Path, model: Any) -> None:
    """No function calls itself, not by way of others either."""
    calls = {(f.domain, f.name): {(node.domain, node.op_type) for node in f.node} for f in model.functions}
    calls = {name: called & calls.keys() for name, called in calls.items()}
    while calls:
        leaves = {name for name, called in calls.items() if not called}
        if not leaves:
            raise VssError(f"{path} has functions that call themselves ({min(calls)[1]}); export it again.")
        calls = {name: called - leaves for name, called in calls.items() if name not in leaves}


# What an exported file says of the images it takes: size, mean, std and channel order travel in its metadata.


KEY = "vss.preprocess"
ORDER = "RGB"
FIELDS = ("size", "mean", "std", "order")


class Images(Protocol):
    """What is used of `vss.data.transforms.Preprocess`."""

    @property
    def mean(self) -> tuple[float, float, float]: ...
    @property
    def std(self) -> tuple[float, float, float]: ...


def text_of(images: Images, size: tuple[int, int]) -> str:
    """The value of `KEY` in a file that takes images of `size`, (H, W)."""
    values = {"size": list(size), "mean": list(images.mean), "std": list(images.std), "order": ORDER}
    return json.dumps(values)


def stated(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """{"size", "mean", "std"} of a file's metadata, as `vss.data.transforms.Preprocess` takes them; None where the file
    says nothing.

    Raises:
        VssError: a value that is damaged, or another channel order than RGB.
    """
    if KEY not in metadata:
        return None
    values = parse_json(metadata[KEY], source=f"the file's metadata {KEY}", kind="vss export")
    numbers = {"size": (2, int), "mean": (3, float), "std": (3, float)}
    if (
        not isinstance(values, dict)
        or set(values) != set(FIELDS)
        or not all(
            isinstance(values[key], list)
            and len(values[key]) == count
            and all(type(each) in (int, kind) and math.isfinite(each) for each in values[key])
            for key, (count, kind) in numbers.items()
        )
    ):
        raise VssError(f"the file's metadata {KEY} is {shown(values)}; expected {', '.join(FIELDS)}: export it again.")
    if values.pop("order") != ORDER:
        raise VssError(
            f"the file takes channels in another order than {ORDER}, which vss does not feed; export it again."
        )
    return values
