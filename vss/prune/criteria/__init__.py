"""Pruning criteria by name. A new one stands beside its relatives, or in a file that is imported below.

These files import torch where they score, so that names, options and sources are known without it.
"""

from vss.prune.criteria import gradients, similarity, weights  # noqa: F401  (registers)
from vss.prune.criteria.base import (
    CRITERIA,
    Criterion,
    data_needs,
    make_criterion,
    method_rows,
    parse_methods,
    score_groups,
)

__all__ = [
    "CRITERIA",
    "Criterion",
    "data_needs",
    "make_criterion",
    "method_rows",
    "parse_methods",
    "score_groups",
]
