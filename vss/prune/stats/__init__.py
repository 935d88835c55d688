"""Statistics from one pass over calibration data, for every criterion that was asked for.

A criterion names the collectors it needs; `collect` runs each batch once (one forward, one backward where any collector
needs gradients) and hands every collector its turn. Collectors that look at classes share one more forward a batch and
run one backward to the images per class. Sums are float64, on the network's device, and added up over the processes of
a distributed run. The network is in evaluation mode (batch norms use their running statistics), so that scores do not
depend on how images are batched; weights, buffers, `.grad`, the training flags and the hooks are put back.

What criteria read, and what each statistic takes from the pass, stands here and is known without torch. A new collector
stands in `maps` (what layers put out) or `gradients`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

BatchNormMode = Literal["eval", "train"]


@dataclass(frozen=True)
class Need:
    """A collector and its options. Equal needs of several criteria are met by one collector.

    >>> str(Need.of("texture", site="stream")), str(Need.of("gate"))
    ('texture(site=stream)', 'gate')
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, name: str, **options: object) -> Need:
        return cls(name, tuple(sorted(options.items())))

    def __str__(self) -> str:
        return f"{self.name}({','.join(f'{k}={v}' for k, v in self.options)})" if self.options else self.name


class Reads(NamedTuple):
    """What a collector takes from the calibration pass, as the attributes of `vss.prune.stats.base.Collector` say."""

    gradients: bool = False
    labels: bool = False
    outputs: bool = False


LOSS = Reads(gradients=True, labels=True)
READS = {
    "mean": Reads(),
    "positions": Reads(),
    "feature_norm_std": Reads(),
    "texture": Reads(),
    "similarity": Reads(),
    "defect_activity": LOSS,
    "gate": LOSS,
    "gate_examples": LOSS,
    "gated_gradient": LOSS,
    "weight_gradient": LOSS,
    "fisher": LOSS,
    "class_support": Reads(labels=True, outputs=True),
}
"""Of the collectors here; those of other packages say it themselves."""
