"""PyTorch -> ONNX by the dynamo exporter, cleaned up, checked and proven equal to the network on CPU."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vss.core import __version__
from vss.core.errors import VssError, need, one_line, quiet
from vss.core.example import Forward
from vss.core.files import atomic, sha256_file, sha256_tensors
from vss.core.networks import WRAPPED, settled
from vss.deploy import onnx_file

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor, nn

    from vss.data.preprocess import Preprocess
    from vss.deploy.graph import Declared, SegGraph
    from vss.deploy.parity import Tolerance

LOG = logging.getLogger(__name__)
EXAMPLE_BATCH = 2  # the exporter can specialise a dimension of 1 without a word
MAX_BYTES = 2**31 - 1  # one protobuf message
OPSETS = range(18, 26)  # what the exporter writes without changing the number that was asked for
NOISY = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch._export")


def export(
    model: nn.Module,
    path: Path | str,
    *,
    size: tuple[int, int] | None = None,
    example: Any = None,
    forward: Forward | None = None,
    batch: int | None = None,
    preprocess: Preprocess | None = None,
    expects: Preprocess | None = None,
    labels: bool = False,
    labels_dtype: str = "int32",
    opset: int = 20,
    dynamic_size: bool = False,
    parity_sizes: Sequence[tuple[int, int]] | None = None,
    parity_batches: Sequence[int] = (1, 2, 3),
    tolerance: Tolerance | None = None,
    class_names: Sequence[str] | None = None,
    plan_sha256: str | None = None,
    plugins: bool = False,
) -> dict[str, Any]:
    """Write `path` (whole or not at all) and return what was written and measured.

    With `size` the graph takes `image`: float32 (N, C, H, W) normalised, or with `preprocess` uint8 (N, H, W, 3) RGB.
    It gives `logits` float32 (N, K, H, W), or with `labels` `labels` int32 or uint8 (N, H, W); of a defect network it
    gives `decision` float32 (N, 1) and `seg` float32 (N, 1, H/8, W/8), logits. A plain module is wrapped for it.
    With `example` the graph takes and gives what the module does, several inputs and outputs too, by their own names.
    N is dynamic. A copy in eval mode is exported.

    Args:
        size: (H, W); multiples of `model.size_multiple`.
        example: in place of `size`: a tensor, a tuple of arguments or a dict of keyword arguments for any module. Of a
            `SegModel`, and with `labels` or `preprocess`, it is one image. `forward`: (model, example) -> outputs.
        batch: number of images, where it is to be fixed.
        opset: 18 to 25; 20 is the newest that TensorRT 10 reads and the oldest with float16 Q/DQ.
        dynamic_size: H and W are dynamic too (multiples of `size_multiple`); costs shape arithmetic in the graph.
        parity_sizes: (H, W) of the comparison with torch, one per batch size in `parity_batches`; default: `size`.
        expects: where it is not in the graph: what images went through before; in the metadata either way.
        plugins: labels and pooling indices become nodes of TensorRT plugins, with bodies of standard ops for others.

    Returns:
        JSON: onnx, sha256, bytes, opset, inputs, outputs, nodes_before, nodes_after, passes, plugins, parity, metadata.

    Raises:
        VssError: size, option or missing package; a network that cannot be exported; a result that differs.
    """
    parity_batches = _batches(batch, parity_batches)
    one_image = getattr(example, "ndim", 0) == 4 and (labels or preprocess or hasattr(model, "forward_logits"))
    if example is not None and (forward is not None or not one_image):
        _refuse_for_any(size, labels=labels, preprocess=preprocess, dynamic_size=dynamic_size, plugins=plugins)
        return _export_any(model, path, example, forward, batch, opset, parity_batches, tolerance)
    if (size is None) == (example is None) or forward is not None:
        raise VssError("give size=(H, W) for images, or example= (and forward=) for a module with inputs of its own.")
    size = size or (int(example.shape[2]), int(example.shape[3]))
    model, names = _seg_model(model, size)
    _check_request(model, size, dynamic_size, class_names, opset)
    ends = {"preprocess": preprocess, "labels": labels, "labels_dtype": labels_dtype}
    shapes = _parity_shapes(model, size, dynamic_size, parity_sizes, parity_batches)
    about = _metadata(model, size, preprocess or expects, class_names, plan_sha256)
    return _export_images(model, ends, path, size, opset, dynamic_size, batch, plugins, shapes, tolerance, about, names)


def _export_images(
    model: nn.Module,
    ends: dict[str, Any],
    path: Path | str,
    size: tuple[int, int],
    opset: int,
    dynamic_size: bool,
    batch: int | None,
    plugins: bool,
    shapes: list[tuple[int, tuple[int, int]]],
    tolerance: Tolerance | None,
    metadata: dict[str, str],
    names: dict[str, str],
) -> dict[str, Any]:
    """See `export`, with `size`; `ends` are options of `SegGraph`, `shapes` batches and sizes of the comparison."""
    from vss.deploy import parity, surgeon
    from vss.deploy.graph import SegGraph
    from vss.ops.onnx_nodes import plugin_nodes

    onnx, _ = need("onnx", "export"), need("onnxscript", "export by torch.onnx")
    wrapped = SegGraph(settled(model), **ends).eval()
    with atomic(path) as temporary:
        with plugin_nodes(plugins):
            _trace(wrapped, temporary, size, opset, dynamic_size, batch)
        cleaned, report = surgeon.clean(onnx.load(str(temporary)), metadata, names)
        report["plugins"] = surgeon.add_bodies(cleaned) if plugins else []
        inputs, outputs = _declare(wrapped, size, dynamic_size, batch)
        _check_opset(cleaned, opset)
        surgeon.check(cleaned, inputs, outputs)
        onnx.save(cleaned, str(temporary))
        report["parity"] = parity.parity(wrapped, temporary, shapes, tolerance)
        report |= {"sha256": sha256_file(temporary), "bytes": temporary.stat().st_size}
    return {"onnx": Path(path).name, "opset": opset, **_shapes(inputs, outputs), **report, "metadata": metadata}


def _seg_model(model: nn.Module, size: tuple[int, int]) -> tuple[nn.Module, dict[str, str]]:
    """The network with the methods of a `SegModel`, and the names of its weights."""
    from vss.deploy import surgeon
    from vss.models.adapter import as_seg_model

    own = all(hasattr(model, name) for name in ("name", "num_classes", "size_multiple", "task"))  # as SegModel says it
    if own or hasattr(model, "forward_logits"):
        return model, surgeon.weight_names(model)
    wrapped = as_seg_model(model, size)
    return wrapped, surgeon.weight_names(settled(wrapped), WRAPPED)


def _batches(batch: int | None, asked: Sequence[int]) -> Sequence[int]:
    """Images of each comparison."""
    if batch is not None and batch < 1:
        raise VssError(f"batch is {batch}; expected 1 or more, or None for any number of images.")
    return asked if batch is None else (batch,) * len(asked)


def _refuse_for_any(size: tuple[int, int] | None, **flags: object) -> None:
    """Options that mean nothing where inputs and outputs are the module's own."""
    given = [name for name, value in {"size": size, **flags}.items() if value]
    if given:
        raise VssError(
            f"{given[0]} is for images of a size, and example= takes and gives what the module does; give one."
        )


def _export_any(
    model: nn.Module,
    path: Path | str,
    example: object,
    forward: Forward | None,
    batch: int | None,
    opset: int,
    parity_batches: Sequence[int],
    tolerance: Tolerance | None,
) -> dict[str, Any]:
    """See `export`, with `example`."""
    import torch

    from vss.deploy import export_any, surgeon

    if opset not in OPSETS:
        raise VssError(f"opset {opset} cannot be written; expected {OPSETS[0]} to {OPSETS[-1]}: change --opset.")
    onnx, _ = need("onnx", "export"), need("onnxscript", "export by torch.onnx")
    graph = export_any.open_graph(model, example, forward)
    tensors, has = export_any.batched(graph, batch)
    metadata = {
        "vss.version": __version__,
        "vss.model": type(model).__name__,
        "vss.weights_sha256": sha256_tensors(model.state_dict()),
    }
    free = batch is None and any(has)
    dims = tuple({0: torch.export.Dim("batch")} if first and free else {} for first in has)
    with atomic(path) as temporary:
        _write(graph, tuple(tensors), temporary, opset, list(graph.inputs), graph.names, (dims,), type(model).__name__)
        cleaned, report = surgeon.clean(onnx.load(str(temporary)), metadata, surgeon.weight_names(model))
        _check_opset(cleaned, opset)
        outputs = surgeon.outputs_of(cleaned)
        inputs = export_any.declared(graph, tensors, has, batch)
        used = surgeon.inputs_of(cleaned)
        surgeon.check(cleaned, {name: each for name, each in inputs.items() if name in used}, outputs)
        onnx.save(cleaned, str(temporary))
        report["parity"] = export_any.parity(graph, temporary, tensors, has, parity_batches, tolerance)
        report |= {"sha256": sha256_file(temporary), "bytes": temporary.stat().st_size, "plugins": []}
    return {"onnx": Path(path).name, "opset": opset, **_shapes(inputs, outputs), **report, "metadata": metadata}


def writes_plugins(model: Any, size: tuple[int, int]) -> bool:
    """Whether a network has something that a plugin does beside its labels, from a trace and without a file."""
    import torch

    from vss.deploy.graph import SegGraph
    from vss.ops.onnx_nodes import plugin_nodes

    with plugin_nodes(), _quiet():
        graph = SegGraph(settled(model)).eval()
        traced = torch.export.export(graph, (torch.zeros(EXAMPLE_BATCH, graph.channels, *size),))
    return any("onnx_symbolic" in str(node.target) for node in traced.graph.nodes)


def _shapes(inputs: dict[str, Declared], outputs: dict[str, Declared]) -> dict[str, Any]:
    return {
        kind: {name: {"dtype": dtype, "shape": list(dims)} for name, (dtype, dims) in values.items()}
        for kind, values in (("inputs", inputs), ("outputs", outputs))
    }


def _check_request(
    model: Any,
    size: tuple[int, int],
    dynamic_size: bool,
    class_names: Sequence[str] | None,
    opset: int,
) -> None:
    if opset not in OPSETS:
        raise VssError(f"opset {opset} cannot be written; expected {OPSETS[0]} to {OPSETS[-1]}: change --opset.")
    multiple, (height, width) = model.size_multiple, size
    if height < 1 or width < 1 or height % multiple or width % multiple:
        up = " x ".join(str(max(1, -(-side // multiple)) * multiple) for side in size)
        raise VssError(f"{model.name} takes sizes that are multiples of {multiple}, got {height} x {width}; use {up}.")
    if dynamic_size and getattr(model, "task", "segmentation") == "defect":
        raise VssError(f"{model.name} is exported at one size; export another file for another size.")
    needed = getattr(model, "dynamic_multiple", 1)
    if dynamic_size and multiple % needed:
        raise VssError(
            f"{model.name} with size multiple {multiple} has no single graph for many sizes; export one size, or build "
            f"it for multiples of {needed}."
        )
    if class_names is not None and len(class_names) != model.num_classes:
        raise VssError(f"{model.name} has {model.num_classes} classes, got {len(class_names)} class names.")
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if weights >= MAX_BYTES:
        raise VssError(f"the weights take {weights} bytes; one ONNX file holds less than {MAX_BYTES}.")


def _check_opset(written: ModelProto, opset: int) -> None:
    found = next((each.version for each in written.opset_import if each.domain in ("", "ai.onnx")), None)
    if found != opset:
        raise VssError(f"opset {opset} was asked for and this network is written in {found}; ask for that.")


def _metadata(
    model: Any,
    size: tuple[int, int],
    images: Preprocess | None,
    class_names: Sequence[str] | None,
    plan_sha256: str | None,
) -> dict[str, str]:
    data = {
        "vss.version": __version__,
        "vss.model": model.name,
        "vss.options": json.dumps(model.options, sort_keys=True),
        "vss.size": json.dumps(list(size)),
        "vss.weights_sha256": sha256_tensors(model.state_dict()),
        onnx_file.KEY: onnx_file.text_of(images, size) if images is not None else None,
        "vss.preprocess_sha256": images.sha256 if images is not None else None,
        "vss.classes": json.dumps(list(class_names)) if class_names is not None else None,
        "vss.plan_sha256": plan_sha256,
    }
    return {key: value for key, value in data.items() if value is not None}


def _declare(
    graph: SegGraph, size: tuple[int, int], dynamic_size: bool, batch: int | None
) -> tuple[dict[str, Declared], dict[str, Declared]]:
    """What the file must declare: name -> (dtype, dims)."""
    sides: tuple[int | str, ...] = _symbols(graph.model.size_multiple) if dynamic_size else size
    lead: int | str = batch or "batch"
    image: Declared = ("uint8", (lead, *sides, 3)) if graph.nhwc else ("float32", (lead, graph.channels, *sides))
    outputs = graph.outputs((sides[0], sides[1]))
    return {"image": image}, {name: (dtype, (lead, *shape)) for name, (dtype, shape) in outputs.items()}


def _symbols(multiple: int) -> tuple[str, str]:
    return ("height", "width") if multiple == 1 else (f"{multiple}*height", f"{multiple}*width")


def _trace(
    graph: SegGraph, path: Path, size: tuple[int, int], opset: int, dynamic_size: bool, batch: int | None
) -> None:
    """The graph of images to a file."""
    import torch

    height, width = size
    shape, dtype = ((height, width, 3), torch.uint8) if graph.nhwc else ((graph.channels, height, width), torch.float32)
    dims: dict[int, Any] = {} if batch else {0: torch.export.Dim("batch")}
    if dynamic_size:
        multiple, first = graph.model.size_multiple, 1 if graph.nhwc else 2
        dims |= {first + axis: multiple * torch.export.Dim(name) for axis, name in enumerate(("height", "width"))}
    image = torch.zeros(batch or EXAMPLE_BATCH, *shape, dtype=dtype)
    try:
        with torch.no_grad():
            graph(image)
    except VssError:
        raise
    except Exception as error:  # whatever a network of a user's raises
        raise VssError(
            f"{graph.model.name} does not take images of {height} x {width} in {graph.channels} channels "
            f"({type(error).__name__}: {one_line(str(error)).rstrip('.')}); give another size (--input-size), or in "
            "Python example= for a module with inputs of its own."
        ) from error
    _write(graph, (image,), path, opset, ["image"], list(graph.outputs(size)), {"image": dims}, graph.model.name)


def _write(
    graph: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    opset: int,
    input_names: list[str],
    output_names: list[str],
    dims: Any,
    name: str,
) -> None:
    """`torch.onnx.export` without its progress output.

    What it makes of fused attention has other strides in its trace than in the network, so that a view behind it can
    fail; then attention is traced as the operations that it consists of.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def trace() -> Exception | None:
        """What ended it, if anything: the exporter passes on whatever code of another library raises."""
        try:
            torch.onnx.export(
                graph,
                inputs,
                str(path),
                dynamo=True,
                opset_version=opset,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=dims,
                external_data=False,
                verbose=False,
            )
        except OSError:  # a full disk says so itself
            raise
        except Exception as error:
            return error
        return None

    with _quiet():
        if (error := trace()) is None:
            return
        cause = error.__cause__ or error
        LOG.info("%s: traced again with attention in parts (%s)", name, str(cause)[:200])
        with sdpa_kernel(SDPBackend.MATH):
            again = trace()
        if again is not None:
            why = (str(cause).strip().splitlines() or [""])[0] or type(cause).__name__
            raise VssError(f"{name} cannot be exported to ONNX opset {opset} ({why}).") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter deprecates and announces things that are no concern of a user: errors alone come through."""
    with quiet(*NOISY), warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield


def _parity_shapes(
    model: Any,
    size: tuple[int, int],
    dynamic_size: bool,
    asked: Sequence[tuple[int, int]] | None,
    batches: Sequence[int],
) -> list[tuple[int, tuple[int, int]]]:
    """(N, (H, W)) of each comparison."""
    if asked is None:
        step = 2 * model.size_multiple if dynamic_size else 0
        asked = [(size[0] + index * step, size[1] + index // 2 * step) for index in range(len(batches))]
    if len(asked) != len(batches):
        raise VssError(f"{len(asked)} parity sizes for {len(batches)} batch sizes; give one size per batch.")
    if not dynamic_size and any(tuple(each) != tuple(size) for each in asked):
        raise VssError(f"the graph is fixed to {size[0]} x {size[1]}; other parity sizes need dynamic_size=True.")
    return [(batch, (height, width)) for batch, (height, width) in zip(batches, asked, strict=True)]
