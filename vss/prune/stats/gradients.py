"""Statistics of gradients: of the loss by a factor on each channel or by filters, and of classes by feature maps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from vss import ops
from vss.core.errors import VssError, unknown
from vss.prune.plan import Group, Slot
from vss.prune.stats import READS
from vss.prune.stats.base import (
    COLLECTORS,
    DTYPES,
    Average,
    Collector,
    TapCollector,
    max_over_processes,
    no_gradient,
    on_gradient,
    reduce_slots,
    sum_over_processes,
)
from vss.prune.stats.taps import (
    Batch,
    Tap,
    affine_slots,
    gather_channels,
    heads_of,
    norm_slots,
    require_labels,
    slot_values,
)

_log = logging.getLogger(__name__)
Part = Literal["all", "norm", "gamma"]
Reduce = Literal["abs_of_sum", "sum_of_abs", "square_of_sum", "sum_of_squares"]
Masks = Literal["truth", "predicted"]


def gradient(parameters: dict[str, nn.Parameter], name: str) -> Tensor:
    """The gradient of a parameter; a missing one is an error that names the layer, never a zero."""
    value = parameters[name].grad
    if value is None:
        raise no_gradient(name.rpartition(".")[0])
    return value


def _products(parameters: dict[str, nn.Parameter], slot: Slot, channels: int) -> Tensor:
    """(C, D) float64 values of a slot times their gradients."""
    product = parameters[slot.tensor].detach().double() * gradient(parameters, slot.tensor).double()
    return slot_values(product, slot, channels)


@COLLECTORS.register("gate")
class GateGradient(Collector):
    """Mean over batches of (sum over members of dL/dgate)^2, the gate being a factor 1 on a channel.

    For a member that ends in a norm layer, dL/dgate = gamma * g_gamma + beta * g_beta (the sum over positions of
    output times gradient, methods: NVlabs Taylor, gate variant). For a producer without a norm it is the sum over its
    filter of w * g plus b * g_b. Signed contributions of coupled members add before squaring: they leave together.

    Args:
        part: "all" as above; "norm" gives groups without norm layers zeros; "gamma" takes gamma * g_gamma alone.
        joint: False adds the squares of the members instead.
    """

    gradients, labels, outputs = READS["gate"]

    def __init__(self, model: nn.Module, groups: list[Group], *, part: Part = "all", joint: bool = True) -> None:
        super().__init__(model, groups)
        self.joint = joint
        self.parameters = dict(model.named_parameters())
        self.slots = {group.id: _members(model, group, part) for group in groups}

    def step(self) -> None:
        for group in self.groups:
            gates = [self._gate(slots, group) for slots in self.slots[group.id]] or [self.zeros(group.channels)]
            stacked = torch.stack(gates)
            self.average[group.id].add(stacked.sum(dim=0).square() if self.joint else stacked.square().sum(dim=0))

    def _gate(self, slots: list[Slot], group: Group) -> Tensor:
        """(C,) gate gradient of one member."""
        gate = self.zeros(group.channels)
        for slot in slots:
            gate += _products(self.parameters, slot, group.channels).sum(dim=1)
        return gate


def _members(model: nn.Module, group: Group, part: Part) -> list[list[Slot]]:
    """The affine slots of each member layer."""
    members: dict[str, list[Slot]] = {}
    for slot in affine_slots(model, group) if part == "all" else norm_slots(model, group):
        if part != "gamma" or slot.leaf != "bias":
            members.setdefault(slot.layer, []).append(slot)
    return list(members.values())


@COLLECTORS.register("gate_examples")
class GateExamples(TapCollector):
    """Mean over batches of sum over images of (sum over members and positions of y * dL/dy)^2, L the batch's loss.

    The per-example form of the gate gradient. y is the output of a norm layer, or of a producer in a group without
    one; it is formed anew from the layer's input when its gradient arrives, since the network may overwrite it.
    """

    gradients, labels, outputs = READS["gate_examples"]

    def __init__(self, model: nn.Module, groups: list[Group]) -> None:
        super().__init__(model, groups, site="bn_out")
        self.batch: dict[tuple[str, int], Tensor | None] = {}

    def attach(self) -> list[RemovableHandle]:
        self.batch = {}
        return [
            self.model.get_submodule(tap.module).register_forward_hook(self._watch((group.id, number), tap))
            for group in self.groups
            for number, tap in enumerate(self.taps[group.id])
        ]

    def _watch(self, key: tuple[str, int], tap: Tap) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            before = inputs[0].detach()
            self.batch.setdefault(key, None)

            def arrive(grad: Tensor) -> None:
                with torch.no_grad():
                    y = type(module).forward(module, before)
                found = tap.maps(y * grad).sum(dim=(2, 3), dtype=torch.float64)
                earlier = self.batch[key]
                self.batch[key] = found if earlier is None else earlier + found

            if output.requires_grad:
                on_gradient(output, arrive)

        return hook

    def step(self) -> None:
        for group in self.groups:
            gate: Tensor | None = None
            for number, tap in enumerate(self.taps[group.id]):
                found = self.batch.get((group.id, number))
                if found is None:
                    raise no_gradient(tap.module)
                gate = found if gate is None else gate + found
            if gate is not None:
                self.average[group.id].add(gate.square().sum(dim=0))
        self.batch = {}


@COLLECTORS.register("gated_gradient")
class GatedGradient(Collector):
    """|g_gamma| averaged over the batches in which g_gamma * gamma > 0; members of a group are averaged.

    The V2 term of SIRFP, which keeps one sign of the gradient so that frequent classes do not dominate. Groups without
    norm layers get zeros.

    Args:
        ema: decay of a moving average from zero, without bias correction, that waits where the sign is wrong; None
            takes the plain mean over the batches that count.
    """

    gradients, labels, outputs = READS["gated_gradient"]

    def __init__(self, model: nn.Module, groups: list[Group], *, ema: float | None = None) -> None:
        super().__init__(model, groups)
        self.ema = ema
        self.parameters = dict(model.named_parameters())
        self.slots = {group.id: [s for s in norm_slots(model, group) if s.leaf != "bias"] for group in groups}
        self.total = {group.id: self.zeros(len(self.slots[group.id]), group.channels) for group in groups}
        self.seen = {name: torch.zeros_like(total) for name, total in self.total.items()}

    def step(self) -> None:
        for group in self.groups:
            for slot, total, seen in zip(self.slots[group.id], self.total[group.id], self.seen[group.id], strict=True):
                grad = slot_values(gradient(self.parameters, slot.tensor), slot, group.channels).double()
                gamma = slot_values(self.parameters[slot.tensor].detach(), slot, group.channels).double()
                value, right = grad.abs().mean(dim=1), (grad * gamma).sum(dim=1) > 0
                if self.ema is None:
                    total += value * right
                    seen += right
                else:
                    total.copy_(torch.where(right, self.ema * total + (1 - self.ema) * value, total))
                    seen.fill_(1)

    def finish(self) -> dict[str, Tensor]:
        found = {}
        for group in self.groups:
            total, seen = sum_over_processes(self.total[group.id]), sum_over_processes(self.seen[group.id])
            means = total / seen.clamp(min=1)
            found[group.id] = means.mean(dim=0) if len(means) else self.zeros(group.channels)
        return found


@COLLECTORS.register("weight_gradient")
class WeightGradient(Collector):
    """Per channel, over the filters w of its producers and their gradients g_t in batch t = 1..T.

    Args:
        reduce: "abs_of_sum": sum |w * mean_t g_t|; "sum_of_abs": mean_t sum |w * g_t|; "square_of_sum":
            mean_t (sum w * g_t)^2, which is about zero for a filter before a batch norm, whose output ignores the
            filter's scale; "sum_of_squares": mean_t sum (w * g_t)^2. Producers add before a square, too.
    """

    gradients, labels, outputs = READS["weight_gradient"]

    def __init__(self, model: nn.Module, groups: list[Group], *, reduce: Reduce = "abs_of_sum") -> None:
        super().__init__(model, groups)
        if reduce not in get_args(Reduce):
            raise unknown("reduction", reduce, get_args(Reduce))
        self.reduce = reduce
        self.parameters = dict(model.named_parameters())
        self.slots = {
            group.id: [s for s in group.by_role("producer") if self.parameters[s.tensor].ndim > 1] for group in groups
        }
        names = dict.fromkeys(slot.tensor for slots in self.slots.values() for slot in slots)
        self.grads = {
            name: Average(self.parameters[name].new_zeros(self.parameters[name].shape).double())
            for name in names
            if reduce == "abs_of_sum"
        }
        self.names = list(names)

    def step(self) -> None:
        grads = {name: gradient(self.parameters, name) for name in self.names}
        if self.reduce == "abs_of_sum":
            for name, average in self.grads.items():
                average.add(grads[name])
        elif self.reduce == "sum_of_squares":
            for group in self.groups:
                total = self.zeros(group.channels)
                for slot in self.slots[group.id]:
                    total += _products(self.parameters, slot, group.channels).square().sum(dim=1)
                self.average[group.id].add(total)
        else:
            for name, value in self._reduced("abs_product" if self.reduce == "sum_of_abs" else "product", grads):
                self.average[name].add(value.square() if self.reduce == "square_of_sum" else value)

    def _reduced(self, mode: Literal["product", "abs_product"], grads: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Group id and (C,) sums over its producers: one call of the op for all layers."""
        slots = [slot for group in self.groups for slot in self.slots[group.id]]
        whole = iter(reduce_slots(self.parameters, slots, mode, grads))
        found = []
        for group in self.groups:
            total = self.zeros(group.channels)
            for slot in self.slots[group.id]:
                total += gather_channels(next(whole), slot, group.channels).sum(dim=1)
            found.append((group.id, total))
        return found

    def finish(self) -> dict[str, Tensor]:
        if self.reduce != "abs_of_sum":
            return super().finish()
        means = {name: average.result().float() for name, average in self.grads.items()}
        return dict(self._reduced("abs_product", means))


@COLLECTORS.register("fisher")
class Fisher(WeightGradient):
    """(C,) mean over batches of the sum of (w * g)^2 over all weights that leave with a channel: filters, norm layers,
    biases, and what reads it. g is the batch's gradient: a diagonal of Fisher's matrix wants batches of one image."""

    def __init__(self, model: nn.Module, groups: list[Group]) -> None:
        super().__init__(model, groups, reduce="sum_of_squares")
        self.slots = {group.id: [s for s in group.slots if s.tensor in self.parameters] for group in groups}


@dataclass
class _Seen:
    """One look at a tap in the forward at hand: sums over positions of max(A, 0), max(-A, 0) and of dy/dA."""

    tap: Tap
    positive: Tensor
    negative: Tensor
    positions: int
    gradient: Tensor | None = None


@COLLECTORS.register("class_support")
class ClassSupport(TapCollector):
    """(K, C): for each class c and channel k the sum over images and positions of ReLU(alpha * A).

    y_c is the sum of class c's logits over the pixels of class c; alpha (image, channel) is the mean over positions of
    dy_c/dA. Since alpha is constant over a map, the sum is alpha+ * sum max(A, 0) + alpha- * sum max(-A, 0), and no map
    per class exists. Every head counts, auxiliary ones with `aux_weight`. Members of a group add.

    Costs one forward a batch and one backward (to the images, no weight gradients) for each class in it.

    Args:
        masks: pixels of a class, by "truth" or as "predicted" by the network.
        aux_weight: factor of heads other than the main one.
        ignore_index: label of void pixels.
    """

    gradients, labels, outputs = READS["class_support"]

    def __init__(
        self,
        model: nn.Module,
        groups: list[Group],
        *,
        site: str,
        masks: Masks = "truth",
        aux_weight: float = 0.4,
        ignore_index: int = 255,
    ) -> None:
        super().__init__(model, groups, site=site)
        self.labels = masks == "truth"
        self.aux_weight, self.ignore_index = aux_weight, ignore_index
        self.seen: list[tuple[Group, _Seen]] = []
        self.total: dict[str, Tensor] = {}
        self.pixels = self.zeros(0)

    def begin(self, batch: Batch) -> None:
        self.seen = []
        if self.labels:
            require_labels(batch, "a criterion with class masks from the truth")

    def see(self, group: Group, number: int, tap: Tap, x: Tensor) -> None:
        """Reduce the maps now and their gradient when it comes."""
        maps = tap.maps(x.detach())
        sums = ops.map_stats(maps if maps.dtype in DTYPES else maps.float()).double()
        positive, negative = (sums[..., ops.STATS.index(name)] for name in ("positive_sum", "negative_sum"))
        seen = _Seen(tap, positive, negative, maps.shape[2] * maps.shape[3])
        self.seen.append((group, seen))

        def arrive(grad: Tensor) -> None:
            seen.gradient = tap.maps(grad).sum(dim=(2, 3), dtype=torch.float64)

        if x.requires_grad:
            on_gradient(x, arrive)

    def examine(self, images: Tensor, outputs: object, batch: Batch) -> None:
        heads = heads_of(outputs)
        classes = heads[0].shape[1]
        if not self.total:
            self.total = {group.id: self.zeros(classes, group.channels) for group in self.groups}
            self.pixels = self.zeros(classes)
        labels = self._labels(heads[0], batch)
        for c in range(classes):
            mask = (labels == c)[:, None]
            pixels = int(mask.sum())
            if pixels:
                self.pixels[c] += pixels
                torch.autograd.grad(self._target(heads, mask, c), images, retain_graph=True)
                self._take(c)

    def _labels(self, main: Tensor, batch: Batch) -> Tensor:
        """(N, H, W) classes, those of one logit being 0 for "there is something"."""
        if not self.labels:
            logits = main.detach()
            return (logits[:, 0] <= 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)
        labels = require_labels(batch, "a criterion with class masks from the truth").to(main.device).long()
        labels = labels.masked_fill(labels == self.ignore_index, -1)
        return torch.where(labels > 0, 0, 1) if main.shape[1] == 1 else labels

    def _target(self, heads: list[Tensor], mask: Tensor, c: int) -> Tensor:
        """y_c; a head of another size takes the pixels whose cell holds one of the class."""
        total = heads[0].new_zeros((), dtype=torch.float32)
        for number, head in enumerate(heads):
            size = tuple(head.shape[-2:])
            own = mask.float()
            own = own if tuple(mask.shape[-2:]) == size else F.adaptive_max_pool2d(own, size)
            total = total + (self.aux_weight if number else 1.0) * (head[:, c : c + 1].float() * own).sum()
        return total

    def _take(self, c: int) -> None:
        for group, seen in self.seen:
            if seen.gradient is None:
                raise no_gradient(seen.tap.module)
            alpha = seen.gradient / seen.positions
            support = alpha.clamp(min=0) * seen.positive + (-alpha).clamp(min=0) * seen.negative
            self.total[group.id][c] += support.sum(dim=0)
            seen.gradient = None

    def step(self) -> None:
        self.seen = []

    def finish(self) -> dict[str, Tensor]:
        """A class without pixels is a row of zeros and named in a warning."""
        classes = int(max_over_processes(torch.tensor(float(len(self.pixels)))))
        if len(self.pixels) != classes:
            raise VssError(f"processes saw networks of {len(self.pixels)} and {classes} classes.")
        pixels = sum_over_processes(self.pixels)
        absent = [str(c) for c in range(classes) if not pixels[c]]
        if len(absent) == classes:
            raise VssError("no pixel of any class was found in the calibration set; check its labels.")
        if absent:
            _log.warning("classes absent from the calibration set do not count: %s", ", ".join(absent))
        return {group.id: sum_over_processes(self.total[group.id]) for group in self.groups}
