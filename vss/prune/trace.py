"""Find the groups of a network with torch-pruning's dependency graph, then forget the graph.

The graph is read once: every entry of a torch-pruning group becomes slots with an offset (concatenation) and a block
(flatten). What the graph cannot express as such slices is locked by name and the rest is still prunable.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vss.core.closeness import duplicate
from vss.core.errors import VssError
from vss.core.layers import layers_named
from vss.prune.apply import BatchNorm, Forward, default_forward, flatten, tensors_of, unsound
from vss.prune.plan import Group, Groups, Locked, Role, Slot
from vss.prune.ties import Graph, GraphGroup, find_components, is_depthwise

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


class _Lock(Exception):
    """A group cannot be expressed as slots: the reason."""


def find_groups(
    model: nn.Module,
    example: Tensor,
    *,
    forward: Forward | None = None,
    keep: Iterable[str] = (),
) -> Groups:
    """Find every set of channels that can be removed together.

    A network may help where its graph is silent. `ties` (see `vss.prune.ties`) names pairs of layers whose channels
    live together. A layer that scales channels by tensors of its own, such as a norm layer that torch does not know,
    declares `channel_params = {"scale": 1, "bias": 1}`: names of its parameters and buffers, and the dim of their
    channels; they count as a norm layer's, and a channel whose parameters are all zero must come out zero.

    Args:
        model: any `nn.Module`; it is copied, never changed.
        example: an input, (N, 3, H, W).
        forward: how to call the model so that *all* heads are reached; default `forward_train` where there is one.
        keep: names of layers whose output channels stay; a container stands for the layers in it, * for any part.

    Returns:
        Groups in model order. The channels of the network's outputs are always locked, and so is a group whose removal
        differs from zeroing it on a random image.

    Raises:
        VssError: `keep` or `ties` name no layer; torch-pruning is missing; the network gives NaN.
    """
    tp = _torch_pruning()
    model = duplicate(model).cpu().eval().requires_grad_(True)
    layers = _Layers(model, keep)
    graph = tp.DependencyGraph()
    link = graph._build_dependency
    graph._build_dependency = lambda nodes: link(without_gates(nodes))
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph.build_dependency(
            model,
            example.cpu(),
            forward_fn=_to_outputs(forward or default_forward),
            unwrapped_parameters=layers.declared_parameters(),
            verbose=False,
        )
        tp_groups = list(graph.get_all_groups())
    groups, locked, reasons = _convert_all(tp_groups, graph, model, layers)
    groups, clashes = _without_clashes(groups)
    tried = groups
    faults = unsound(model, example.cpu(), groups, lambda net, x: flatten((forward or default_forward)(net, x)))
    locked += [Locked(group.id, group.channels, faults[group.id]) for group in groups if group.id in faults]
    groups = [group for group in groups if group.id not in faults]
    reasons |= {name: faults[group.id] for group in tried if group.id in faults for name in _written(group)}
    groups.sort(key=lambda group: layers.order[group.id])
    locked += clashes
    known = {name for group in groups for name in _written(group)} | {lock.layer for lock in locked}
    locked += layers.left_over(known, reasons)
    return Groups(tuple(groups), tuple(sorted(locked, key=lambda lock: layers.order.get(lock.layer, -1))))


def _convert_all(
    tp_groups: list[GraphGroup], graph: Graph, model: nn.Module, layers: _Layers
) -> tuple[list[Group], list[Locked], dict[str, str]]:
    """Groups, what is locked under the name of its first layer, and the reason for every layer that is."""
    groups: list[Group] = []
    locked: list[Locked] = []
    reasons: dict[str, str] = {}
    for component in find_components(tp_groups, graph, model):
        members = [(tp_groups[index], block) for index, block in component.members]
        try:
            groups.append(_convert(members, component.problem, graph, layers))
        except _Lock as reason:
            locked += [
                Locked(layers.root(group), 1 + max(max(item.root_idxs) for item in group), str(reason))
                for group, _ in members
            ]
            reasons |= {name: str(reason) for group, _ in members for name in layers.written(group, graph)}
    return groups, locked, reasons


def _written(group: Group) -> list[str]:
    return group.module_names("producer") + group.module_names("norm")


def without_gates(nodes: dict[Any, Any]) -> dict[Any, Any]:
    """Take out of a graph's nodes the edges by which a map of one channel meets maps of more by broadcasting.

    Such a map (the gate of an attention U-Net) is no partner of what it scales: its channel stays whatever goes.
    """
    for node in nodes.values():
        if type(node.module).__name__ not in ("_ElementWiseOp", "_ExpandOp"):
            continue
        for source in [other for other in node.inputs if _broadcast(_shape(other), _shape(node))]:
            node.inputs.remove(source)
            source.outputs.remove(node)
    return nodes


def _broadcast(part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return len(part) == len(whole) in (2, 4, 5) and part[1] == 1 < whole[1]


def _shape(node: Any) -> tuple[int, ...]:
    facts = getattr(node.grad_fn, "_input_metadata", ())
    return tuple(facts[0].shape) if facts else ()


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise VssError("pruning needs torch-pruning; install it with: pip install torch-pruning") from error
    return torch_pruning


def _to_outputs(forward: Forward) -> Callable[[nn.Module, Tensor], list[Tensor]]:
    """Clone every output tensor, so that the graph ends in an output node even behind a bare convolution."""

    def call(model: nn.Module, x: Tensor) -> list[Tensor]:
        return [tensor.clone() for tensor in flatten(forward(model, x)) if tensor.requires_grad]

    return call


class _Layers:
    """Names of a network's modules and tensors, and what was asked of them."""

    def __init__(self, model: nn.Module, keep: Iterable[str]) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.order = {name: position for position, name in enumerate(self.names.values())}
        self.modules = dict(model.named_modules())
        self.tensors = tensors_of(model)
        self.parameter_names = {id(value): name for name, value in model.named_parameters()}
        self.keep = layers_named(model, keep, "layer to keep")

    def why_unnamed(self, tensor: str) -> str:
        """Why a layer's tensor is none of the network's parameters and buffers."""
        owner, _, leaf = tensor.rpartition(".")
        if leaf in self.modules[owner]._parameters:  # a tied parameter has one name, that of its first owner
            return f"{tensor} is shared with another layer"
        return f"{tensor} is parametrised (weight norm, spectral norm, a mask); remove the parametrisation first"

    def kept(self, name: str) -> bool:
        """Whether a layer, or a part of the network that it belongs to, was asked to stay."""
        return any(name == stays or name.startswith(f"{stays}.") for stays in self.keep)

    def root(self, tp_group: GraphGroup) -> str:
        named = [self.names[m] for item in tp_group if (m := item.dep.target.module) in self.names]
        return min(named, key=self.order.__getitem__) if named else str(tp_group[0].dep.target.name)

    def written(self, tp_group: GraphGroup, graph: Graph) -> list[str]:
        items = [item.dep for item in tp_group if graph.is_out_channel_pruning_fn(item.dep.handler)]
        return [self.names[dep.target.module] for dep in items if dep.target.module in self.names]

    def left_over(self, known: set[str], reasons: dict[str, str]) -> list[Locked]:
        """Layers with channels that are in no group and not locked by name yet."""
        unseen = "the network does not use it, or by an operation that cannot be followed"
        return [
            Locked(
                name,
                module.out_features if isinstance(module, nn.Linear) else module.out_channels,
                reasons.get(name, unseen),
            )
            for name, module in self.modules.items()
            if isinstance(module, Conv | ConvTranspose | nn.Linear) and name not in known
        ]

    def declared_parameters(self) -> list[tuple[nn.Parameter, int]]:
        """Parameters of modules that declare `channel_params`, each with the dim of its channels."""
        pairs = [
            (value, dim)
            for module in self.names
            for key, dim in declared_channels(module).items()
            if isinstance(value := getattr(module, key), nn.Parameter)
        ]
        return list({id(value): (value, dim) for value, dim in pairs}.values())

    def parameter(self, value: nn.Parameter, dim: int) -> tuple[Role, list[tuple[str, int]]]:
        """Role and (tensor, dim) pairs of a parameter that no standard layer owns."""
        name = self.parameter_names[id(value)]
        owner, _, leaf = name.rpartition(".")
        declared = declared_channels(self.modules[owner])
        if leaf not in declared:
            return "param", [(name, dim)]
        prefix = f"{owner}." if owner else ""
        return "norm", [(prefix + key, dim) for key, dim in declared.items() if prefix + key in self.tensors]


def declared_channels(module: Any) -> dict[str, int]:
    """A module's own tensors that hold one value per channel, by name -> dim of the channels."""
    return dict(getattr(module, "channel_params", {}))


def _convert(members: list[tuple[GraphGroup, int]], problem: str, graph: Graph, layers: _Layers) -> Group:
    """One group of slots from graph groups that belong together, each with its block of channels."""
    if problem:
        raise _Lock(problem)
    channels = min((1 + max(group[0].root_idxs)) // block for group, block in members)
    slots: dict[tuple[str, int, int], Slot] = {}
    producers, unit = [], 1
    for item, factor in ((item, block) for group, block in members for item in group):
        module = item.dep.target.module
        if type(module).__name__ == "_OutputOp":
            raise _Lock("its channels are an output of the network")
        if isinstance(module, nn.Parameter):
            role, pairs = layers.parameter(module, item.dep.target.pruning_dim)
        elif module in layers.names:
            name, is_output = layers.names[module], graph.is_out_channel_pruning_fn(item.dep.handler)
            role, pairs = layer_tensors(module, name, is_output=is_output)
            if is_output and pairs and layers.kept(name):
                raise _Lock("it was asked to stay")
            producers += [name] if role == "producer" else []
            unit = math.lcm(unit, _unit(module, name, channels * factor, is_output=is_output, block=factor))
        else:
            continue
        for offset, block in _affine(item.idxs, item.root_idxs, channels * factor):
            for tensor, dim in pairs:
                if tensor not in layers.tensors:
                    raise _Lock(layers.why_unnamed(tensor))
                slot = Slot(tensor, dim, offset, block * factor, role)
                _check_fits(slot, channels, layers.tensors[tensor])
                slots.setdefault((tensor, dim, offset), slot)
    if not producers:
        raise _Lock("no layer with weights produces these channels")
    in_model_order = sorted(slots.values(), key=lambda slot: layers.order.get(slot.layer, -1))
    return Group(min(producers, key=layers.order.__getitem__), channels, tuple(in_model_order), unit)


def _check_fits(slot: Slot, channels: int, value: Tensor) -> None:
    """Refuse slots beyond a tensor's end (a broadcast over channels) and several filters that answer to one channel."""
    if slot.offset + channels * slot.block > value.shape[slot.dim]:
        raise _Lock(f"its channels meet the {value.shape[slot.dim]} of {slot.tensor} by broadcasting")
    if slot.role == "producer" and slot.block > 1:
        raise _Lock(f"{slot.block} filters of {slot.tensor} answer to each of its channels")


def layer_tensors(module: nn.Module, name: str, *, is_output: bool) -> tuple[Role, list[tuple[str, int]]]:
    """The (tensor, dim) pairs of a layer that carry its output or input channels, and the layer's role."""

    def pairs(dims: dict[str, int]) -> list[tuple[str, int]]:
        return [(f"{name}.{key}", dim) for key, dim in dims.items() if getattr(module, key, None) is not None]

    if isinstance(module, BatchNorm | nn.GroupNorm | nn.modules.instancenorm._InstanceNorm):
        return "norm", pairs(dict.fromkeys(_NORM_TENSORS, 0))
    if isinstance(module, Conv | ConvTranspose) and module.groups > 1:
        return _grouped(module, name, is_output=is_output), pairs({"weight": 0, "bias": 0} if is_output else {})
    if isinstance(module, Conv | nn.Linear):
        return ("producer", pairs({"weight": 0, "bias": 0})) if is_output else ("consumer", pairs({"weight": 1}))
    if isinstance(module, ConvTranspose):
        return ("producer", pairs({"weight": 1, "bias": 0})) if is_output else ("consumer", pairs({"weight": 0}))
    if isinstance(module, nn.PReLU):
        return "param", pairs({"weight": 0}) if module.num_parameters > 1 else []
    if not list(module.parameters(recurse=False)):
        return "param", []
    raise _Lock(f"{name} is a {type(module).__name__}, which is not cut")


def _grouped(module: Any, name: str, *, is_output: bool) -> Role:
    """A grouped convolution whose channels have filters of their own alone is like a scale."""
    if is_depthwise(module):
        return "norm"
    if module.transposed or module.groups == module.out_channels < module.in_channels:
        raise _Lock(f"{name} is a grouped convolution ({module.groups} groups), which is not cut")
    if not is_output:
        return "consumer"
    return "producer" if module.in_channels == module.out_channels else "norm"


def _unit(module: nn.Module, name: str, channels: int, *, is_output: bool, block: int) -> int:
    """Channels of the group that only go together.

    A group norm keeps its statistics when whole norm groups leave; a grouped convolution loses whole groups. `channels`
    are those of the layer, `block` of them for each channel of the group.
    """
    if isinstance(module, nn.GroupNorm):
        if module.num_channels != channels:
            raise _Lock(f"{name} normalises across a concatenation")
        if not module.affine:
            raise _Lock(f"{name} is a GroupNorm without weights, whose size nothing records")
        size = channels // module.num_groups
    elif isinstance(module, Conv) and module.groups > 1:
        size = (module.out_channels if is_output else module.in_channels) // module.groups
    else:
        return 1
    return math.lcm(size, block) // block


def _affine(local: list[int], root: list[int], channels: int) -> list[tuple[int, int]]:
    """Express local positions as (offset, block) slots: local = offset + root * block + j.

    A tensor that reads the same channels twice (mean and max pooled side by side) gives two slots.
    """
    positions: dict[int, list[int]] = defaultdict(list)
    for position, channel in zip(local, root, strict=True):
        positions[channel].append(position)
    table = [sorted(positions[channel]) for channel in range(channels)]
    block = len(table[0])
    if any(len(row) != block for row in table):
        raise _Lock("its channels reach a layer in different numbers")
    if block > 1 and all(
        row == list(range(table[0][0] + k * block, table[0][0] + (k + 1) * block)) for k, row in enumerate(table)
    ):
        return [(table[0][0], block)]
    offsets = table[0]
    if any(row != [offset + k for offset in offsets] for k, row in enumerate(table)):
        raise _Lock("its channels are shuffled on the way to a layer")
    return [(offset, 1) for offset in offsets]


def _without_clashes(groups: list[Group]) -> tuple[list[Group], list[Locked]]:
    """Two groups must never own the same slice; the later one is locked."""
    owned: dict[tuple[str, int, int], str] = {}
    good, locked = [], []
    for group in groups:
        places = {
            (slot.tensor, slot.dim, position)
            for slot in group.slots
            for position in slot.indices(torch.arange(group.channels)).tolist()
        }
        owners = {owned[place] for place in places if place in owned}
        if owners:
            locked.append(Locked(group.id, group.channels, f"it shares slices with {', '.join(sorted(owners))}"))
            continue
        owned.update(dict.fromkeys(places, group.id))
        good.append(group)
    return good, locked
