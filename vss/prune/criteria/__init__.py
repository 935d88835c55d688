"""Pruning criteria by name. A new one is one file here, imported below."""

from vss.prune.criteria import (  # noqa: F401  (registers)
    corr,
    defect,
    dmcp,
    fgp,
    fn,
    fpgm,
    hw_l1,
    norm,
    random,
    sirfp,
    slimming,
    taylor,
    taylor_fo,
)
from vss.prune.criteria.base import CRITERIA, Criterion, data_needs, make_criterion, score_groups

__all__ = ["CRITERIA", "Criterion", "data_needs", "make_criterion", "score_groups"]
