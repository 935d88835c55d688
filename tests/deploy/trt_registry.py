"""Run with NVIDIA's bindings on the path: loads a plugin library into TensorRT's registry, prints what it saw as JSON.

python trt_registry.py lean|full LIBRARY
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from typing import Any

import numpy as np

trt: Any = importlib.import_module({"lean": "tensorrt_lean_bindings", "full": "tensorrt"}[sys.argv[1]])
KINDS = ("CORE", "BUILD", "RUNTIME")


def fields(**values: int) -> Any:
    """A field collection of int32 values."""
    kind = trt.PluginFieldType.INT32
    return trt.PluginFieldCollection([trt.PluginField(k, np.array([v], np.int32), kind) for k, v in values.items()])


def look(registry: Any, name: str, **values: int) -> dict[str, Any]:
    """Create a plugin in both phases; what its creator and its capabilities say."""
    creator = registry.get_creator(name, "1", "")
    made = [
        creator.create_plugin("node", fields(**values), getattr(trt.TensorRTPhase, p)) for p in ("BUILD", "RUNTIME")
    ]
    core = made[0].get_capability_interface(trt.PluginCapabilityType.CORE)
    kept.extend(made)
    return {
        "fields": [field.name for field in creator.field_names],
        "created": [plugin is not None for plugin in made],
        "capabilities": [
            made[0].get_capability_interface(getattr(trt.PluginCapabilityType, kind)) is not None for kind in KINDS
        ],
        "core": [core.plugin_name, core.plugin_version, core.plugin_namespace],
        "refused": creator.create_plugin("node", fields(colour=1), trt.TensorRTPhase.BUILD) is None,
    }


kept: list[Any] = []  # a plugin that outlives its library would crash the process
registry = trt.get_plugin_registry()
before = {creator.name for creator in registry.all_creators}
handle = registry.load_library(sys.argv[2])
found = {
    "version": trt.__version__,
    "loaded": handle is not None,
    "creators": sorted({creator.name for creator in registry.all_creators} - before),
    "VssSegArgmax": look(registry, "VssSegArgmax", out_h=33, out_w=65),
    "VssMaxPool": look(registry, "VssMaxPool", kernel=2),
    "VssMaxUnpool": look(registry, "VssMaxUnpool", extra_h=1),
}
logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
logging.info(json.dumps(found))
