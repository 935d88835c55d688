"""Statistics from one pass over calibration data, for every criterion that was asked for.

A criterion names the collectors it needs; `collect` runs each batch once (one forward, one backward where any collector
needs gradients) and hands every collector its turn. Collectors that look at classes share one more forward a batch and
run one backward to the images per class. Sums are float64, on the network's device, and added up over the processes of
a distributed run. The network is in evaluation mode (batch norms use their running statistics), so that scores do not
depend on how images are batched; weights, buffers, `.grad`, the training flags and the hooks are put back.

A new collector stands in `maps` (what layers put out) or `gradients`.
"""

from typing import TYPE_CHECKING

from vss.core.registry import lazy_names
from vss.prune.stats.needs import BatchNormMode, Need

if TYPE_CHECKING:
    from vss.prune.stats.base import COLLECTORS, Collector, Stats, sum_over_processes
    from vss.prune.stats.run import Loss, Statistics, collect
    from vss.prune.stats.taps import Batch

__getattr__ = lazy_names(
    __name__,
    {
        "base": ["Collector", "Stats", "sum_over_processes"],
        "run": ["COLLECTORS", "Loss", "Statistics", "collect"],
        "taps": ["Batch"],
    },
)

__all__ = [
    "COLLECTORS",
    "Batch",
    "BatchNormMode",
    "Collector",
    "Loss",
    "Need",
    "Statistics",
    "Stats",
    "collect",
    "sum_over_processes",
]
