"""Statistics collected while a network trains, for methods that watch the training itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

from torch import Tensor, nn

from vss.core.errors import VssError
from vss.prune.groups import Group
from vss.prune.stats.base import COLLECTORS, Need, TapCollector
from vss.prune.stats.sites import Layout
from vss.prune.trace import default_forward


class Recorder:
    """Keep collectors attached to a network in training.

    >>> with Recorder(model, groups, criterion.requests(), example) as recorder:   # doctest: +SKIP
    ...     for batch in batches:
    ...         loss(model, batch).backward()      # hooks look at forwards in training mode only
    ...         recorder.step()                    # after gradients were unscaled, before the optimiser clears them
    ...     stats = Stats(model, recorder.finish())

    Args:
        model: the network; every forward in training mode counts.
        groups: its groups.
        needs: collectors of maps and gradients; those that read labels or outputs need `collect`.
        example: (N, 3, H, W), to find call order and shapes.
    """

    def __init__(self, model: nn.Module, groups: list[Group], needs: Iterable[Need | str], example: Tensor) -> None:
        wanted = {str(need): need if isinstance(need, Need) else Need(need) for need in needs}
        self.collectors = {
            key: COLLECTORS[wanted[key].name](model, groups, **dict(wanted[key].options)) for key in sorted(wanted)
        }
        for key, collector in self.collectors.items():
            if collector.outputs or (collector.labels and isinstance(collector, TapCollector)):
                raise VssError(f"the statistic {key!r} cannot be recorded during training; use a calibration set.")
        flags = {module: module.training for module in model.modules()}
        layout = Layout.measure(model.eval(), lambda: default_forward(model, example))
        for module, flag in flags.items():
            module.training = flag
        for collector in self.collectors.values():
            collector.prepare(layout)
            if isinstance(collector, TapCollector):
                collector.only_training = True
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [handle for collector in self.collectors.values() for handle in collector.attach()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def step(self) -> None:
        """After a backward pass: gradients are in `.grad`, unscaled."""
        for collector in self.collectors.values():
            collector.step()

    def finish(self) -> dict[str, dict[str, Tensor]]:
        """What `Stats` takes."""
        return {key: collector.finish() for key, collector in self.collectors.items()}
