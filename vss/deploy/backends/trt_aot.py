"""Experimental: VssSegArgmax as a Python plugin whose kernel is PTX inside the engine; no library travels with it.

TensorRT calls this API experimental too. Its limits: Python while building, integer arguments only, no scratch memory,
and labels of a fixed size. The kernel is `plugins_trt/seg_argmax_aot.cu`, compiled to PTX, which runs on its
architecture and every newer one.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Set
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vss.core.errors import VssError

if TYPE_CHECKING:
    from onnx import ModelProto

NAME = "VssSegArgmax"
SEGMENT, THREADS = 512, 128  # output columns and threads of a block, as csrc/kernels/seg_argmax_tile.h has them
ENTRIES = {"FLOAT": "vss_seg_argmax_f32", "HALF": "vss_seg_argmax_f16"}
ATTRIBUTES = ("out_h", "out_w", "align_corners")
_registered: dict[str, Path] = {}


def read_ptx(path: Path) -> str:
    """PTX that holds both kernels; anything else is one sentence."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise VssError(f"{path} cannot be read as PTX ({error}); compile plugins_trt/seg_argmax_aot.cu.") from error
    missing = [name for name in ENTRIES.values() if not re.search(rf"\.entry {name}\(", text)]
    if missing:
        raise VssError(f"{path} has no kernel {missing[0]}; compile plugins_trt/seg_argmax_aot.cu to PTX.")
    return text


def register(trt: ModuleType, ptx: Path) -> set[str]:
    """Put the plugin into TensorRT's registry, once a process; returns the op types it brings."""
    from vss.ops.onnx_nodes import DOMAIN

    text = read_ptx(ptx)
    if NAME in _registered:
        if _registered[NAME] != ptx:
            raise VssError(f"{NAME} is registered from {_registered[NAME]}; build with {ptx} in another process.")
        return {NAME}
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise VssError(f"TensorRT {trt.__version__} has no ahead-of-time Python plugins; use --plugin-library.")
    plugin = importlib.import_module("tensorrt.plugin")

    def describe(logits: Any, out_h: int, out_w: int, align_corners: int) -> Any:
        return plugin.from_shape_expr((logits.shape_expr[0], out_h, out_w), dtype=trt.int32)

    def kernel(logits: Any, out_h: int, out_w: int, align_corners: int, outputs: object, tactic: int) -> Any:
        count, classes, height, width = logits.shape_expr
        launch = plugin.KernelLaunchParams()
        launch.grid_x = count * (out_h * -(-out_w // SEGMENT))
        launch.block_x = THREADS
        numbers = plugin.SymIntExprs(7)
        for index, value in enumerate((count, classes, height, width, out_h, out_w, align_corners)):
            numbers[index] = plugin.SymInt32(value)
        entry = ENTRIES.get(logits.dtype.name)
        if entry is None:
            raise VssError(f"{NAME} takes float32 or float16 logits, got {logits.dtype.name}.")
        return entry, text, launch, numbers

    # TensorRT reads types from annotations, which are text in this file
    integers: dict[str, Any] = dict.fromkeys(ATTRIBUTES, int)
    describe.__annotations__ = {"logits": plugin.TensorDesc, **integers, "return": plugin.TensorDesc}
    parts = (str | bytes, str | bytes, plugin.KernelLaunchParams, plugin.SymExprs)
    kernel.__annotations__ = {"return": tuple.__class_getitem__(parts)}
    plugin.register(f"{DOMAIN}::{NAME}")(describe)
    plugin.aot_impl(f"{DOMAIN}::{NAME}")(kernel)
    _registered[NAME] = ptx
    return {NAME}


def mark_nodes(model: ModelProto, names: Set[str]) -> None:
    """Say on every node of these plugins, in place, in which namespace it is and that it is made ahead of time."""
    from vss.ops.onnx_nodes import DOMAIN

    helper = importlib.import_module("onnx").helper
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type not in names:
            continue
        if len(node.input) != 1:
            raise VssError(
                f"{node.name or node.op_type} has labels of a free size; ahead-of-time plugins need a fixed one: "
                "export without --dynamic-size, or use --plugin-library."
            )
        node.attribute.extend([helper.make_attribute("plugin_namespace", DOMAIN), helper.make_attribute("aot", 1)])
