"""Channels that must leave together although no tensor operation couples them.

torch-pruning's graph follows values. Three couplings are not values, and are added here as links between its groups:

* max unpooling writes where the indices of a max pooling say, channel by channel: what was pooled and what is unpooled
  keep the same channels. The pair is recognised by the index tensor that both operations saved.
* a grouped convolution ties its inputs to its outputs: whole convolution groups leave. With m outputs for each input
  (depthwise with expansion is the usual case) channel k of the input goes with channels k*m .. k*m + m - 1.
* a network, or any module in it, may say so: `ties = [("encoder.3", "decoder.2")]` names pairs of its layers whose
  output channels live together, for instance where a custom function hides the coupling.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import nn

from vss.core.errors import VssError, unknown
from vss.prune.apply import Conv

Graph = Any  # of torch-pruning, which has no types
GraphGroup = Any


@dataclass(frozen=True)
class Link:
    """Channel k of graph group `first` goes with channels k*factor .. k*factor + factor - 1 of group `second`."""

    first: int
    second: int
    factor: int = 1
    problem: str = ""


@dataclass
class Component:
    """Graph groups that are one group: their positions in the graph's list, each with its block of channels."""

    members: list[tuple[int, int]] = field(default_factory=list)
    problem: str = ""


def is_depthwise(module: nn.Module) -> bool:
    """One filter per channel and one channel per filter."""
    return isinstance(module, Conv) and 1 < module.groups == module.in_channels == module.out_channels


def find_components(tp_groups: list[GraphGroup], graph: Graph, model: nn.Module) -> list[Component]:
    """Unite linked groups; every group of the graph is a member of exactly one component."""
    links = [
        *_pooling_links(tp_groups),
        *_convolution_links(tp_groups, graph),
        *_declared_links(tp_groups, graph, model),
    ]
    table: dict[int, list[tuple[int, Fraction, str]]] = defaultdict(list)
    for link in links:
        table[link.first].append((link.second, Fraction(link.factor), link.problem))
        table[link.second].append((link.first, Fraction(1, link.factor), link.problem))
    channels = [1 + max(group[0].root_idxs) for group in tp_groups]
    seen: set[int] = set()
    components = []
    for start in range(len(tp_groups)):
        if start not in seen:
            components.append(_walk(start, table, channels))
            seen |= {index for index, _ in components[-1].members}
    return components


def _walk(start: int, table: dict[int, list[tuple[int, Fraction, str]]], channels: list[int]) -> Component:
    """All groups reachable from `start`, with consistent blocks, or the reason why there are none."""
    factors, stack, problem = {start: Fraction(1)}, [start], ""
    while stack:
        here = stack.pop()
        for there, factor, why in table[here]:
            problem = problem or why
            if there not in factors:
                factors[there] = factors[here] * factor
                stack.append(there)
            elif factors[there] != factors[here] * factor:
                problem = problem or "it is tied to itself with different channel numbers"
    least = min(factors.values())
    base = channels[min(factors, key=factors.__getitem__)]
    members = []
    for index in sorted(factors):
        block = factors[index] / least
        if block.denominator != 1 or channels[index] != base * block:
            problem = problem or "the channels that it is tied to are of another number"
        members.append((index, int(block)))
    return Component(members, problem)


def _pooling_links(tp_groups: list[GraphGroup]) -> Iterator[Link]:
    """Pairs of groups whose tensors are pooled and unpooled with the same index tensor."""
    pooled: dict[int, dict[int, dict[int, int]]] = defaultdict(dict)
    unpooled: dict[int, dict[int, dict[int, int]]] = defaultdict(dict)
    for number, group in enumerate(tp_groups):
        for item in group:
            side, pointer = _pooling(item.dep.target.grad_fn)
            if side:
                root_at = dict(zip(item.idxs, item.root_idxs, strict=True))  # position in the tensor -> channel
                (pooled if side == "pool" else unpooled)[pointer][number] = root_at
    for pointer, seconds in unpooled.items():
        firsts = pooled.get(pointer)
        for second, there in seconds.items():
            if firsts is None:
                yield Link(second, second, problem="it is unpooled with indices of unknown origin")
                continue
            for first, here in firsts.items():
                if here == there:
                    yield Link(first, second)
                elif here.keys() & there.keys():
                    yield Link(first, second, problem="pooled and unpooled channels are laid out differently")


def _pooling(grad_fn: Any) -> tuple[str, int]:
    """("pool" or "unpool", where its index tensor lies), of torch's operations and of `vss.ops`; ("", 0) of others."""
    name = grad_fn.name() if hasattr(grad_fn, "name") else ""
    if "vss_max_pool_indices" in name:
        return "pool", grad_fn.saved_tensors[0].data_ptr()
    if "vss_max_unpool" in name:
        return "unpool", grad_fn.saved_tensors[0].data_ptr()
    if "WithIndicesBackward" in name:
        return "pool", grad_fn._saved_result1.data_ptr()
    return ("unpool", grad_fn._saved_indices.data_ptr()) if "MaxUnpool" in name else ("", 0)


def _convolution_links(tp_groups: list[GraphGroup], graph: Graph) -> Iterator[Link]:
    """Input and output groups of every grouped convolution that is not plainly depthwise."""
    inputs: dict[Conv, list[int]] = defaultdict(list)
    outputs: dict[Conv, list[int]] = defaultdict(list)
    for number, group in enumerate(tp_groups):
        for item in group:
            module = item.dep.target.module
            if isinstance(module, Conv) and module.groups > 1 and not is_depthwise(module):
                side = outputs if graph.is_out_channel_pruning_fn(item.dep.handler) else inputs
                side[module].append(number)
    for module in inputs.keys() | outputs.keys():
        numbers = (*inputs[module], *outputs[module])
        problem = _unfit(module)
        if not inputs[module]:
            problem = problem or "a grouped convolution makes it from the image"
        elif len(inputs[module]) > 1:
            problem = problem or "a grouped convolution reads it beside other channels"
        for other in numbers[1:]:
            factor = 1 if problem else module.out_channels // module.in_channels
            yield Link(numbers[0], other, factor, problem)
        if len(numbers) == 1:
            yield Link(numbers[0], numbers[0], problem=problem)


def _unfit(module: Conv) -> str:
    if module.transposed:
        return "a transposed grouped convolution is not cut"
    if module.out_channels % module.in_channels:
        return f"a grouped convolution makes {module.out_channels} channels from {module.in_channels}, which is not cut"
    return ""


def _declared_links(tp_groups: list[GraphGroup], graph: Graph, model: nn.Module) -> Iterator[Link]:
    """`ties` of the network and of its parts."""
    modules = dict(model.named_modules())
    owner: dict[nn.Module, int] = {}
    for number, group in enumerate(tp_groups):
        for item in group:
            if isinstance(item.dep.target.module, nn.Module) and graph.is_out_channel_pruning_fn(item.dep.handler):
                owner.setdefault(item.dep.target.module, number)
    for prefix, module in modules.items():
        for pair in getattr(module, "ties", ()):
            numbers = [owner[modules[name]] for name in _full_names(pair, prefix, modules) if modules[name] in owner]
            if len(numbers) < 2:
                raise VssError(f"ties {tuple(pair)}: one of these layers has no channels that the network uses.")
            yield Link(numbers[0], numbers[1])


def _full_names(pair: Iterable[str], prefix: str, modules: dict[str, nn.Module]) -> list[str]:
    names = [f"{prefix}.{name}" if prefix else name for name in pair]
    if len(names) != 2:
        raise VssError(f"ties must be pairs of layer names, got {names}.")
    for name in names:
        if name not in modules:
            raise unknown("layer in ties", name, list(modules))
    return names
