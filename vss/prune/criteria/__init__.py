"""Pruning criteria by name. A new one is one file here, imported below."""

from vss.prune.criteria import activation, dmcp, sirfp, taylor, weights  # noqa: F401  (registers)
from vss.prune.criteria.base import CRITERIA, Criterion, data_needs, make_criterion, score_groups

__all__ = ["CRITERIA", "Criterion", "data_needs", "make_criterion", "score_groups"]
