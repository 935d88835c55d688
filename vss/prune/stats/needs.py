"""What criteria read, and what each statistic takes from the calibration pass; known without torch."""

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
    def of(cls, name: str, **options: Any) -> Need:
        return cls(name, tuple(sorted(options.items())))

    def __str__(self) -> str:
        return f"{self.name}({','.join(f'{k}={v}' for k, v in self.options)})" if self.options else self.name


class Reads(NamedTuple):
    """What a collector takes from the calibration pass, as the attributes of `vss.prune.stats.Collector` say."""

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
