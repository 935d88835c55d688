"""Structured channel pruning: groups -> scores -> budget -> plan -> cut.

>>> plan = make_plan(model, example, criterion="l1", budget={"kind": "macs", "keep": 0.5})   # doctest: +SKIP
>>> small = apply_plan(model, plan)                                                          # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from vss.core.config import Budget
from vss.core.registry import lazy_names
from vss.prune.criteria import CRITERIA, Criterion, make_criterion
from vss.prune.plan import Group, Groups, Locked, Plan, Slot

if TYPE_CHECKING:
    from vss.prune.apply import apply_plan, cut, masked
    from vss.prune.budget import CostModel, count
    from vss.prune.make import make_plan, recalibrate_bn
    from vss.prune.probe import verify
    from vss.prune.stats.run import COLLECTORS, Statistics, collect
    from vss.prune.trace import find_groups

__getattr__ = lazy_names(
    __name__,
    {
        "apply": ["apply_plan", "cut", "masked"],
        "budget": ["CostModel", "count"],
        "make": ["make_plan", "recalibrate_bn"],
        "stats.run": ["COLLECTORS", "Statistics", "collect"],
        "trace": ["find_groups"],
        "probe": ["verify"],
    },
)

__all__ = [
    "COLLECTORS",
    "CRITERIA",
    "Budget",
    "CostModel",
    "Criterion",
    "Group",
    "Groups",
    "Locked",
    "Plan",
    "Slot",
    "Statistics",
    "apply_plan",
    "collect",
    "count",
    "cut",
    "find_groups",
    "make_criterion",
    "make_plan",
    "masked",
    "recalibrate_bn",
    "verify",
]
