"""Where statistics come from: a calibration batch, the layers of a group, and the places where its maps are seen.

A batch is `(images, labels, ...)`, a mapping with `image` and `mask`, or the images alone; images are what the network
takes: (N, C, H, W) float, normalised, or a tuple or mapping of several inputs. Labels are (N, H, W) integers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vss.core.errors import VssError, unknown
from vss.core.example import Example, inputs_of, named_tensors, on
from vss.core.networks import hooked
from vss.prune.apply import BatchNorm, Conv
from vss.prune.plan import Group, Slot

Batch = Any
SITES = ("stream", "bn_out", "conv", "mixed")
Side = Literal["input", "output"]


def images_of(batch: Batch, model: nn.Module) -> Example:
    """The images of a batch, on the network's device."""
    value: Any = batch
    if isinstance(batch, Mapping):
        value = batch.get("image", batch.get("images"))
    elif isinstance(batch, Sequence) and len(batch):
        value = batch[0]
    if not inputs_of(value):
        raise VssError(
            f"a calibration batch must be images, (images, labels) or a mapping with 'image' and 'mask', got "
            f"{type(batch).__name__}."
        )
    device = next((p.device for p in model.parameters()), None)
    return value if device is None else on(value, device)


def labels_of(batch: Batch) -> Tensor | None:
    """(N, H, W) labels of a batch, or None where it has none."""
    value: Any = None
    if isinstance(batch, Mapping):
        value = batch.get("mask", batch.get("labels"))
    elif isinstance(batch, Sequence) and len(batch) > 1:
        value = batch[1]
    if not isinstance(value, Tensor):
        return None
    return value[:, 0] if value.ndim == 4 and value.shape[1] == 1 else value


def require_labels(batch: Batch, what: str) -> Tensor:
    """The labels of a batch, or one sentence that names who asks."""
    labels = labels_of(batch)
    if labels is None:
        raise VssError(f"{what} needs labels, and the calibration batches have none; give (images, labels).")
    return labels


def heads_of(outputs: object) -> list[Tensor]:
    """The heads of a network as (N, K, h, w), the main one first: `out` or `logits`, else the first with positions."""
    named = [(name, value) for name, value in named_tensors(outputs) if value.is_floating_point()]
    named.sort(key=lambda pair: (pair[0] not in ("out", "logits"), pair[1].ndim != 4))
    heads = [value for _, value in named]
    heads = [head[:, :, None, None] if head.ndim == 2 else head for head in heads]
    classes = {head.shape[1] for head in heads if head.ndim == 4}
    if not heads or len(classes) != 1 or any(head.ndim != 4 for head in heads):
        shapes = [tuple(head.shape) for head in heads]
        raise VssError(
            f"a criterion that looks at classes needs heads of (N, K, h, w) with one K, got {shapes}; give "
            "forward=lambda net, x: ..., which returns the class maps alone."
        )
    return heads


def owner(model: nn.Module, tensor: str) -> nn.Module:
    return model.get_submodule(tensor.rpartition(".")[0])


def affine_slots(model: nn.Module, group: Group) -> list[Slot]:
    """Affine parameters of the group's norm layers; where it has none, the producers' weights and biases."""
    return norm_slots(model, group) or group.by_role("producer")


def norm_slots(model: nn.Module, group: Group) -> list[Slot]:
    """Affine parameters of the group's norm layers; depthwise convolutions, which cut like them, are left out."""
    parameters = {name for name, _ in model.named_parameters()}
    return [
        slot
        for slot in group.by_role("norm")
        if slot.tensor in parameters and not isinstance(owner(model, slot.tensor), Conv)
    ]


def norm_modules(model: nn.Module, group: Group) -> list[str]:
    """Names of the group's norm layers, in model order, affine or not."""
    return [name for name in group.module_names("norm") if not isinstance(model.get_submodule(name), Conv)]


def slot_values(value: Tensor, slot: Slot, channels: int) -> Tensor:
    """(channels, D) view of what a slot holds of a tensor: one row a channel."""
    index = slot.indices(torch.arange(channels)).to(value.device)
    return value.index_select(slot.dim, index).movedim(slot.dim, 0).reshape(channels, -1)


def gather_channels(value: Tensor, slot: Slot, channels: int) -> Tensor:
    """(channels, block) entries of a group in a vector along the slot's dimension."""
    return slot_values(value, dataclasses.replace(slot, dim=0), channels)


def following_norm(model: nn.Module, group: Group, producer: str) -> str | None:
    """The group's norm layer that normalises what `producer` makes: the one defined next after it, of equal width.

    Layers without parameters or buffers may lie between. None where another layer with weights comes first.
    """
    norms = set(norm_modules(model, group))
    names = [
        name
        for name, module in model.named_modules()
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)] or name == producer
    ]
    after = names[names.index(producer) + 1 :]
    return after[0] if after and after[0] in norms else None


def folding(model: nn.Module, group: Group, slot: Slot) -> Tensor | None:
    """(C, block) float64 factors gamma / sqrt(var + eps) of the batch norm behind a producer, None where there is none.

    The batch norm's own slots say where the group's channels lie in it.
    """
    name = following_norm(model, group, slot.layer)
    norm = model.get_submodule(name) if name else None
    if not isinstance(norm, BatchNorm) or norm.running_var is None:
        return None
    place = next(s for s in group.by_role("norm") if s.layer == name)
    if place.block != slot.block:
        return None
    factor = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    return gather_channels(factor, place, group.channels)


@dataclasses.dataclass(frozen=True)
class Tap:
    """Positions offset .. offset + channels * block of the channel dim of one layer's input or output."""

    module: str
    side: Side
    channels: int
    offset: int = 0
    block: int = 1
    features_last: bool = False

    def maps(self, x: Tensor) -> Tensor:
        """The group's maps as (N, C, H, W), a view where strides allow; a flattened map has H = block, W = 1."""
        if self.features_last and x.ndim > 2:
            x = x.movedim(-1, 1)
        x = x[:, self.offset : self.offset + self.channels * self.block]
        rest = tuple(x.shape[2:]) or (1,)
        height, width = (rest[0], int(torch.Size(rest[1:]).numel())) if len(rest) > 1 else (rest[0], 1)
        return x.reshape(x.shape[0], self.channels, self.block * height, width)

    def hook(self, model: nn.Module, call: Callable[[nn.Module, Tensor], None]) -> RemovableHandle:
        """Call `call(module, tensor)` at every forward."""
        module = model.get_submodule(self.module)
        if self.side == "input":
            return module.register_forward_pre_hook(lambda m, inputs: call(m, inputs[0]))
        return module.register_forward_hook(lambda m, inputs, output: call(m, output))


@dataclasses.dataclass(frozen=True)
class Call:
    """One layer in one forward: when it ran last, and its shapes."""

    order: int
    input: tuple[int, ...]
    output: tuple[int, ...]


class Layout:
    """Call order and shapes of a network's layers."""

    def __init__(self, model: nn.Module, calls: dict[str, Call]) -> None:
        self.model, self.calls = model, calls

    @classmethod
    def measure(cls, model: nn.Module, run: Callable[[], object]) -> Layout:
        """Watch one forward, made by `run`, which must not keep a graph."""
        calls: dict[str, Call] = {}
        clock = itertools.count()

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
                if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                    calls[name] = Call(next(clock), tuple(inputs[0].shape), tuple(output.shape))

            return hook

        handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
        with hooked(handles), torch.no_grad():
            run()
        return cls(model, calls)

    def taps(self, group: Group, site: str) -> list[Tap]:
        """Where to look at a group: one tap for a stream, one per member otherwise."""
        if site not in SITES:
            raise unknown("site", site, SITES)
        if site == "mixed":
            site = "stream" if len(group.module_names("producer")) > 1 else "bn_out"
        if site == "stream":
            readers = [slot for slot in group.by_role("consumer") if slot.layer in self.calls]
            if readers:
                best = max(readers, key=lambda slot: (self._positions(slot), self.calls[slot.layer].order))
                first = next(slot for slot in readers if slot.layer == best.layer)
                return [self._tap(group, first, "input")]
        taps = [self._tap(group, slot, "output") for slot in self._members(group, norms=site != "conv")]
        if not taps:
            raise VssError(f"no layer of the group {group.id!r} ran on the calibration images; keep it out of pruning.")
        return taps

    def positions(self, group: Group, site: str) -> int:
        """The minimum number of positions of a map of this group, at its taps and at its producers' outputs."""
        shapes = [(tap, self._shape(tap)) for tap in (*self.taps(group, site), *self.taps(group, "conv"))]
        return min(_count(shape) * tap.block for tap, shape in shapes)

    def _shape(self, tap: Tap) -> tuple[int, ...]:
        call = self.calls[tap.module]
        return call.input if tap.side == "input" else call.output

    def _positions(self, slot: Slot) -> int:
        return _count(self.calls[slot.layer].input) * slot.block

    def _members(self, group: Group, *, norms: bool) -> list[Slot]:
        """One slot for every norm layer that ran; where there is none, or none is wanted, for every producer."""
        names = norm_modules(self.model, group) if norms else []
        names = names or group.module_names("producer")
        slots = {slot.layer: slot for slot in reversed((*group.by_role("producer"), *group.by_role("norm")))}
        return [slots[name] for name in names if name in self.calls]

    def _tap(self, group: Group, slot: Slot, side: Side) -> Tap:
        linear = isinstance(self.model.get_submodule(slot.layer), nn.Linear)
        return Tap(slot.layer, side, group.channels, slot.offset, slot.block, linear)


def _count(shape: tuple[int, ...]) -> int:
    """Positions of a map in a tensor of (N, C, ...)."""
    return int(torch.Size(shape[2:]).numel())
