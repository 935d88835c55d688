"""Statistics from one pass over calibration data. A new one is one file here, imported below."""

from vss.prune.stats import gradients, maps, similarity  # noqa: F401  (registers)
from vss.prune.stats.base import COLLECTORS, Collector, Need, Stats, sum_over_processes
from vss.prune.stats.gradients import GateGradient
from vss.prune.stats.run import Loss, Recorder, Statistics, collect
from vss.prune.stats.taps import Batch, gate_slots

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
