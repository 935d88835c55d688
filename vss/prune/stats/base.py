"""What a collector is, the table of them, and what a criterion reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vss import ops
from vss.core.errors import VssError
from vss.core.registry import Registry
from vss.prune.apply import Conv, tensors_of
from vss.prune.plan import Group, Slot
from vss.prune.stats import Need
from vss.prune.stats.taps import Batch, Layout, Tap, folding, gather_channels, norm_slots, slot_values

Mode = Literal["l1", "l2", "product", "abs_product"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that the ops take


class Average:
    """A mean of what is added to a zero tensor; with `ema` in [0, 1) a moving average, without bias correction."""

    def __init__(self, total: Tensor, ema: float | None = None) -> None:
        self.total, self.ema = total, ema
        self.count = total.new_zeros(())

    def add(self, values: Tensor, count: float = 1) -> None:
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
        average: group id -> (C,) float64 mean, the statistic unless `finish` gives another one.
    """

    gradients: bool = False
    labels: bool = False
    outputs: bool = False
    layout: ClassVar[bool] = False

    def __init__(self, model: nn.Module, groups: list[Group], *, ema: float | None = None) -> None:
        self.model, self.groups = model, groups
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.average = {group.id: Average(self.zeros(group.channels), ema) for group in groups}

    def prepare(self, layout: Layout) -> None:
        """Choose where to look."""

    def begin(self, batch: Batch) -> None:
        """Before the forward of one batch."""

    def attach(self) -> list[RemovableHandle]:
        """Hooks for one forward and backward."""
        return []

    def examine(self, images: Tensor, outputs: object, batch: Batch) -> None:
        """With `outputs`: run backward passes from the outputs to `images`, which require a gradient."""

    def step(self) -> None:
        """After the forward (and backward) of one batch."""

    def finish(self) -> dict[str, Tensor]:
        """Group id -> statistic, after sums over all processes."""
        return {group.id: self.average[group.id].result() for group in self.groups}

    def zeros(self, *shape: int) -> Tensor:
        """A float64 accumulator on the network's device."""
        return torch.zeros(shape, dtype=torch.float64, device=self.device)


class TapCollector(Collector):
    """A collector that looks at feature maps at the taps of one site (see `vss.prune.stats.taps`)."""

    layout = True

    def __init__(self, model: nn.Module, groups: list[Group], *, site: str, ema: float | None = None) -> None:
        super().__init__(model, groups, ema=ema)
        self.site = site
        self.taps: dict[str, list[Tap]] = {}

    def prepare(self, layout: Layout) -> None:
        self.taps = {group.id: layout.taps(group, self.site) for group in self.groups}

    def attach(self) -> list[RemovableHandle]:
        return [
            tap.hook(self.model, self._caller(group, number, tap))
            for group in self.groups
            for number, tap in enumerate(self.taps[group.id])
        ]

    def _caller(self, group: Group, number: int, tap: Tap) -> Callable[[nn.Module, Tensor], None]:
        return lambda _, x: self.see(group, number, tap, x)

    def see(self, group: Group, number: int, tap: Tap, x: Tensor) -> None:
        """Reduce the tensor `x` at the group's tap of this number; it may be overwritten right after."""
        raise TypeError(f"{type(self).__name__} must define see")


def no_gradient(layer: str) -> VssError:
    return VssError(
        f"layer {layer!r} got no gradient: its head is outside the loss; "
        "include every head in the loss or keep that layer out of pruning."
    )


def on_gradient(x: Tensor, call: Callable[[Tensor], None]) -> None:
    """Call `call(gradient)` when the gradient of `x` arrives."""
    hooked: Any = x
    hooked.register_hook(call)


COLLECTORS: Registry[type[Collector]] = Registry("statistic")


class Stats:
    """What a criterion may read: the tensors of the network and what collectors found."""

    def __init__(
        self, model: nn.Module, collected: Mapping[str, Mapping[str, Tensor]] | None = None, *, seed: int = 0
    ) -> None:
        self.model = model
        self.seed = seed
        self._tensors = {name: value.detach() for name, value in tensors_of(model).items()}
        self._collected = collected or {}
        self._norms: dict[tuple[str, int, Mode], Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by its full name."""
        return self._tensors[name]

    def collected(self, need: Need | str, group: Group) -> Tensor:
        """The statistic that a collector found for a group."""
        return self._collected[str(need)][group.id]

    def rows(self, group: Group, *, fold_bn: bool = False) -> list[Tensor]:
        """For each producer of a group its filters, (C, D) float64: one row per channel, biases left out.

        `fold_bn` multiplies each filter by gamma / sqrt(var + eps) of the batch norm behind it, where there is one.
        """
        rows = []
        for slot in self._filters(group):
            row = slot_values(self.tensor(slot.tensor), slot, group.channels).double()
            factor = folding(self.model, group, slot) if fold_bn else None
            if factor is not None:
                row = (row.view(group.channels, slot.block, -1) * factor[:, :, None]).flatten(1)
            rows.append(row)
        return rows

    def norm_rows(self, group: Group, leaf: str) -> list[Tensor]:
        """For each norm layer of a group its parameter `leaf` ("weight", "scale"), (C, block) float64."""
        slots = [slot for slot in norm_slots(self.model, group) if slot.leaf == leaf]
        return [slot_values(self.tensor(slot.tensor), slot, group.channels).double() for slot in slots]

    def filter_sums(
        self, group: Group, power: Literal[1, 2], *, fold_bn: bool = False, member_rms: bool = False
    ) -> Tensor:
        """(C,) float64 sums of |w|^power over a channel's filters in all producers of a group, biases left out.

        `fold_bn` as in `rows`; `member_rms` divides each producer by the RMS of its (folded) weights.
        """
        found = []
        for slot in self._filters(group):
            weight = self.tensor(slot.tensor)
            factor = folding(self.model, group, slot) if fold_bn else None
            value = self._power(slot, power, group.channels, factor)
            if member_rms:
                count = group.channels * slot.block * (weight.numel() // weight.shape[slot.dim])
                rms = (self._power(slot, 2, group.channels, factor).sum() / count).sqrt() + 1e-12
                value = value / rms**power
            found.append(value)
        return torch.stack(found).sum(dim=0)

    def _filters(self, group: Group) -> list[Slot]:
        return [slot for slot in group.by_role("producer") if self.tensor(slot.tensor).ndim > 1]

    def _power(self, slot: Slot, power: Literal[1, 2], channels: int, factor: Tensor | None) -> Tensor:
        value = gather_channels(self._whole(slot, "l1" if power == 1 else "l2"), slot, channels)
        value = value if factor is None else value * factor.abs()
        return (value if power == 1 else value.square()).sum(dim=1)

    def _whole(self, slot: Slot, mode: Mode) -> Tensor:
        """(size,) norms along a slot's dimension; the first call of a mode does all layers by one call of the op."""
        key = (slot.tensor, slot.dim, mode)
        if key not in self._norms:
            known = {(slot.tensor, slot.dim), *((tensor, dim) for tensor, dim, kind in self._norms if kind == mode)}
            others = (s for s in _outputs(self.model) if s.tensor in self._tensors)  # a parametrised one has none
            slots = [slot, *(s for s in others if (s.tensor, s.dim) not in known)]
            values = reduce_slots(self._tensors, slots, mode)
            self._norms |= {(s.tensor, s.dim, mode): value for s, value in zip(slots, values, strict=True)}
        return self._norms[key]


def _outputs(model: nn.Module) -> list[Slot]:
    """The output dimension of every convolution and linear layer."""
    return [
        Slot(f"{name}.weight" if name else "weight", 1 if isinstance(layer, Conv) and layer.transposed else 0)
        for name, layer in model.named_modules()
        if isinstance(layer, Conv | nn.Linear)
    ]


def reduce_slots(
    parameters: Mapping[str, Tensor], slots: Sequence[Slot], mode: Mode, grads: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """`vss.ops.channel_reduce` along the dimension of every slot, all in one call: (size,) float64 per slot.

    `parameters`, and `grads` for the modes that need them, by full name, with two dimensions or more.
    """
    weights = [parameters[slot.tensor].detach() for slot in slots]
    products = [grads[slot.tensor] for slot in slots] if grads is not None else []
    if len({tensor.dtype for tensor in (*weights, *products)}) > 1 or any(w.dtype not in DTYPES for w in weights):
        weights, products = [w.float() for w in weights], [g.float() for g in products]
    found = ops.channel_reduce(weights, products, mode=mode, dims=[slot.dim for slot in slots])
    return [value.double() for value in found]


def sum_over_processes(value: Tensor) -> Tensor:
    """Sum over the processes of a distributed run, all of which must ask in the same order.

    NCCL only moves device memory, so a value on the CPU travels by way of the current CUDA device.
    """
    return _reduce(value, "SUM")


def max_over_processes(value: Tensor) -> Tensor:
    return _reduce(value, "MAX")


def _reduce(value: Tensor, operation: str) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    home = value.device
    if home.type == "cpu" and torch.distributed.get_backend() == "nccl":
        value = value.cuda()
    torch.distributed.all_reduce(value, op=getattr(torch.distributed.ReduceOp, operation))
    return value.to(home)
