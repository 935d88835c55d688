"""vss: from a segmentation checkpoint to a smaller network that kept its accuracy, and to a faster engine.

`import vss` needs torch alone and starts no CUDA; everything else is imported where it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vss.core import __version__

if TYPE_CHECKING:
    from vss import data, deploy, models, ops, prune
    from vss.core.errors import VssError
    from vss.train.checkpoint import load, save

_SUBMODULES = ("data", "deploy", "models", "ops", "prune", "train")
_NAMES = {"load": "vss.train.checkpoint", "save": "vss.train.checkpoint", "VssError": "vss.core.errors"}

__all__ = ["VssError", "__version__", "data", "deploy", "load", "models", "ops", "prune", "save"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"vss.{name}")
    raise AttributeError(f"module 'vss' has no attribute {name!r}")
