"""The last step: a bundle that an inference team takes, runs, serves and checks without the training code."""

from vss.ship.bundle import ship
from vss.ship.check import rebuild, verify
from vss.ship.manifest import Manifest, read

__all__ = ["Manifest", "read", "rebuild", "ship", "verify"]
