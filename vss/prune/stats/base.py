"""What a collector is, the table of them, and what a criterion reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vss.core.errors import VssError
from vss.core.registry import Registry
from vss.prune.plan import Group
from vss.prune.stats.taps import Batch, FilterNorms, Layout, Tap, folding, norm_slots, slot_values


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
        """A need by keyword options."""
        return cls(name, tuple(sorted(options.items())))

    def __str__(self) -> str:
        return f"{self.name}({','.join(f'{k}={v}' for k, v in self.options)})" if self.options else self.name


class Collector:
    """Running statistics of one kind, never feature maps.

    The life of a collector: `prepare` once, then for every batch `begin`, `attach` (hooks for this one forward and
    backward), the pass, `step`; at the end `finish`. Hooks reduce inside the pass, because in-place activations and
    residual additions overwrite the tensors later.

    Attributes:
        gradients: a loss and its backward pass are needed.
        labels: the batches must carry labels.
        outputs: it runs backward passes of its own from the network's outputs, see `examine`.
        layout: `prepare` needs shapes and call order, found by one forward of the first batch.
    """

    gradients: bool = False
    labels: bool = False
    outputs: bool = False
    layout: ClassVar[bool] = False

    def __init__(self, model: nn.Module, groups: list[Group]) -> None:
        self.model, self.groups = model, groups
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def prepare(self, layout: Layout) -> None:
        """Choose where to look."""

    def begin(self, batch: Batch) -> None:
        """Before the forward of one batch."""

    def attach(self) -> list[RemovableHandle]:
        """Hooks for one forward and backward."""
        return []

    def examine(self, images: Tensor, outputs: Any, batch: Batch) -> None:
        """With `outputs`: run backward passes from the outputs to `images`, which require a gradient."""

    def step(self) -> None:
        """After the forward (and backward) of one batch."""

    def finish(self) -> dict[str, Tensor]:
        """Group id -> statistic, after sums over all processes."""
        raise TypeError(f"{type(self).__name__} must define finish")

    def zeros(self, *shape: int) -> Tensor:
        """A float64 accumulator on the network's device."""
        return torch.zeros(shape, dtype=torch.float64, device=self.device)


class TapCollector(Collector):
    """A collector that looks at feature maps at the taps of one site (see `vss.prune.stats.taps`)."""

    layout = True

    def __init__(self, model: nn.Module, groups: list[Group], *, site: str) -> None:
        super().__init__(model, groups)
        self.site = site
        self.taps: dict[str, list[Tap]] = {}
        self.only_training = False

    def prepare(self, layout: Layout) -> None:
        """Find the taps of every group."""
        self.taps = {group.id: layout.taps(group, self.site) for group in self.groups}

    def attach(self) -> list[RemovableHandle]:
        """One hook per tap."""
        return [
            tap.hook(self.model, self._caller(group, number, tap))
            for group in self.groups
            for number, tap in enumerate(self.taps[group.id])
        ]

    def _caller(self, group: Group, number: int, tap: Tap) -> Callable[[nn.Module, Tensor], None]:
        def call(module: nn.Module, x: Tensor) -> None:
            if module.training or not self.only_training:
                self.see(group, number, tap, x)

        return call

    def see(self, group: Group, number: int, tap: Tap, x: Tensor) -> None:
        """Reduce the tensor `x` at the group's tap of this number; it may be overwritten right after."""
        raise TypeError(f"{type(self).__name__} must define see")

    def no_gradient(self, tap: Tap) -> VssError:
        """The error for a tap that no gradient reached."""
        return VssError(
            f"layer {tap.module!r} got no gradient: its head is outside the loss; "
            "include every head in the loss or keep that layer out of pruning."
        )


COLLECTORS: Registry[type[Collector]] = Registry("statistic")


class Stats:
    """What a criterion may read: the tensors of the network and what collectors found."""

    def __init__(
        self, model: nn.Module, collected: Mapping[str, Mapping[str, Tensor]] | None = None, *, seed: int = 0
    ) -> None:
        self.model = model
        self.seed = seed
        self._tensors = {k: v.detach() for k, v in (*model.named_parameters(), *model.named_buffers())}
        self._collected = collected or {}
        self._norms = FilterNorms(model)

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by its full name."""
        return self._tensors[name]

    def rows(self, group: Group, *, fold_bn: bool = False) -> list[Tensor]:
        """For each producer of a group its filters, (C, D) float64: one row per channel, biases left out.

        Args:
            group: whose producers.
            fold_bn: multiply each filter by gamma / sqrt(var + eps) of the batch norm behind it, where there is one.
        """
        rows = []
        for slot in group.by_role("producer"):
            value = self.tensor(slot.tensor)
            if value.ndim < 2:
                continue
            row = slot_values(value, slot, group.channels).double()
            factor = folding(self.model, group, slot) if fold_bn else None
            if factor is not None:
                row = (row.view(group.channels, slot.block, -1) * factor[:, :, None]).flatten(1)
            rows.append(row)
        return rows

    def filter_sums(
        self, group: Group, power: Literal[1, 2], *, fold_bn: bool = False, member_rms: bool = False
    ) -> Tensor:
        """(C,) float64 sums of |w|^power over the filters of all producers of a group; see `FilterNorms.sums`."""
        return torch.stack(self._norms.sums(group, power, fold_bn=fold_bn, member_rms=member_rms)).sum(dim=0)

    def norm_rows(self, group: Group, leaf: str) -> list[Tensor]:
        """For each norm layer of a group its parameter `leaf` ("weight", "scale"), (C, block) float64."""
        slots = [slot for slot in norm_slots(self.model, group) if slot.tensor.rpartition(".")[2] == leaf]
        return [slot_values(self.tensor(slot.tensor), slot, group.channels).double() for slot in slots]

    def collected(self, need: Need | str, group: Group) -> Tensor:
        """The statistic that a collector found for a group."""
        return self._collected[str(need)][group.id]


# Sums over the processes of a distributed run; every process must ask in the same order.


def sum_over_processes(value: Tensor) -> Tensor:
    """Sum over processes where a process group runs.

    NCCL only moves device memory, so a value on the CPU travels by way of the current CUDA device.
    """
    return _reduce(value, "SUM")


def max_over_processes(value: Tensor) -> Tensor:
    """Largest value over processes, as `sum_over_processes`."""
    return _reduce(value, "MAX")


def _reduce(value: Tensor, operation: str) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    home = value.device
    if home.type == "cpu" and torch.distributed.get_backend() == "nccl":
        value = value.cuda()
    torch.distributed.all_reduce(value, op=getattr(torch.distributed.ReduceOp, operation))
    return value.to(home)


# Means over images, or moving averages over batches, that add up over processes.


class Average:
    """A mean of what is added; with `ema` a moving average over the calls, from zero and without bias correction.

    Args:
        total: a zero tensor to sum into.
        ema: decay in [0, 1) or None.
    """

    def __init__(self, total: Tensor, ema: float | None = None) -> None:
        self.total, self.ema = total, ema
        self.count = total.new_zeros(())

    def add(self, values: Tensor, count: float) -> None:
        """Add a sum of `count` values."""
        if self.ema is None:
            self.total += values
            self.count += count
        else:
            self.total.mul_(self.ema).add_(values / count, alpha=1 - self.ema)
            self.count.fill_(1)

    def result(self) -> Tensor:
        """The mean over all processes; zeros where nothing was added."""
        return sum_over_processes(self.total) / sum_over_processes(self.count).clamp(min=1e-300)
