"""The last step: a bundle that an inference team takes, runs, serves and checks without the training code."""

from vss.ship.bundle import ship
from vss.ship.check import verify
from vss.ship.manifest import Manifest, read
from vss.ship.rebuild import rebuild

__all__ = ["Manifest", "read", "rebuild", "ship", "verify"]
