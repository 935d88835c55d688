"""Latency: tables of measured times, widths chosen under them, and why a cut is or is not faster."""

from vss.latency.build import QUICK, Effort, build
from vss.latency.knapsack import choices, search
from vss.latency.setting import Setting
from vss.latency.subject import open_subject
from vss.latency.table import LatencyTable
from vss.latency.target import LatencyGoal, Target

__all__ = [
    "QUICK",
    "Effort",
    "LatencyGoal",
    "LatencyTable",
    "Setting",
    "Target",
    "build",
    "choices",
    "open_subject",
    "search",
]
