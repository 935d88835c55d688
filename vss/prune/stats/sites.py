"""Where the channels of a group can be looked at.

* `stream`: the input of the layer that reads them, after normalisation, residual addition and activation. Of several
  readers the one with the most positions counts, and of equal ones the last: for a residual stage that is what the next
  stage reads. Where nothing with weights reads the group, its norm layers' outputs.
* `bn_out`: the output of every norm layer of the group, before the activation; a producer without one gives its own.
* `conv`: the output of every producer.
* `mixed`: `stream` for coupled groups (their members only add up there), `bn_out` for all others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vss.core.errors import VssError, unknown
from vss.prune.groups import Group, Slot
from vss.prune.stats.members import norm_modules

SITES = ("stream", "bn_out", "conv", "mixed")
Side = Literal["input", "output"]


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
    def measure(cls, model: nn.Module, run: Callable[[], Any]) -> Layout:
        """Watch one forward, made by `run`, which must not keep a graph."""
        calls: dict[str, Call] = {}
        clock = itertools.count()

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                    calls[name] = Call(next(clock), tuple(inputs[0].shape), tuple(output.shape))

            return hook

        handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
        try:
            with torch.no_grad():
                run()
        finally:
            for handle in handles:
                handle.remove()
        return cls(model, calls)

    def taps(self, group: Group, site: str) -> list[Tap]:
        """Where to look at a group: one tap for a stream, one per member otherwise."""
        if site not in SITES:
            raise unknown("site", site, SITES)
        if site == "mixed":
            site = "stream" if len(group.module_names("producer")) > 1 else "bn_out"
        if site == "stream":
            readers = [slot for slot in group.by_role("consumer") if _layer(slot) in self.calls]
            if readers:
                best = max(readers, key=lambda slot: (self._positions(slot), self.calls[_layer(slot)].order))
                first = next(slot for slot in readers if _layer(slot) == _layer(best))
                return [self._tap(group, first, "input")]
        taps = [self._tap(group, slot, "output") for slot in self._members(group, norms=site != "conv")]
        if not taps:
            raise VssError(f"no layer of the group {group.id!r} ran on the calibration images; keep it out of pruning.")
        return taps

    def positions(self, group: Group, site: str) -> int:
        """The least number of positions of a map of this group, at its taps and at its producers' outputs."""
        shapes = [(tap, self._shape(tap)) for tap in (*self.taps(group, site), *self.taps(group, "conv"))]
        return min(_count(shape) * tap.block for tap, shape in shapes)

    def _shape(self, tap: Tap) -> tuple[int, ...]:
        call = self.calls[tap.module]
        return call.input if tap.side == "input" else call.output

    def _positions(self, slot: Slot) -> int:
        return _count(self.calls[_layer(slot)].input) * slot.block

    def _members(self, group: Group, *, norms: bool) -> list[Slot]:
        """One slot for every norm layer that ran; where there is none, or none is wanted, for every producer."""
        names = norm_modules(self.model, group) if norms else []
        names = names or group.module_names("producer")
        slots = {_layer(slot): slot for slot in reversed((*group.by_role("producer"), *group.by_role("norm")))}
        return [slots[name] for name in names if name in self.calls]

    def _tap(self, group: Group, slot: Slot, side: Side) -> Tap:
        linear = isinstance(self.model.get_submodule(_layer(slot)), nn.Linear)
        return Tap(_layer(slot), side, group.channels, slot.offset, slot.block, linear)


def _layer(slot: Slot) -> str:
    return slot.tensor.rpartition(".")[0]


def _count(shape: tuple[int, ...]) -> int:
    """Positions of a map in a tensor of (N, C, ...)."""
    return int(torch.Size(shape[2:]).numel())
