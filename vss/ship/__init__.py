"""The last step: a bundle that an inference team takes, runs, serves and checks without the training code."""

from typing import TYPE_CHECKING

from vss.core.registry import lazy_names
from vss.ship.manifest import Manifest, read

if TYPE_CHECKING:
    from vss.ship.bundle import ship
    from vss.ship.check import rebuild, verify

__getattr__ = lazy_names(__name__, {"bundle": ["ship"], "check": ["rebuild", "verify"]})

__all__ = ["Manifest", "read", "rebuild", "ship", "verify"]
