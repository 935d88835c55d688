"""Statistics from one pass over calibration data. A new one is one file here, imported below."""

from vss.prune.stats import (  # noqa: F401  (registers)
    defect,
    gate,
    gated,
    mean,
    positions,
    similarity,
    spread,
    support,
    texture,
    weight_gradient,
)
from vss.prune.stats.base import COLLECTORS, Collector, Need, Stats
from vss.prune.stats.batch import Batch
from vss.prune.stats.gate import GateGradient
from vss.prune.stats.members import gate_slots
from vss.prune.stats.processes import sum_over_processes
from vss.prune.stats.record import Recorder
from vss.prune.stats.run import Loss, Statistics, collect

__all__ = [
    "COLLECTORS",
    "Batch",
    "Collector",
    "GateGradient",
    "Loss",
    "Need",
    "Recorder",
    "Statistics",
    "Stats",
    "collect",
    "gate_slots",
    "sum_over_processes",
]
