"""Find the groups of a network with torch-pruning's dependency graph, then forget the graph.

The graph is read once: every entry of a torch-pruning group becomes slots with an offset (concatenation) and a block
(flatten). What the graph cannot express as such slices is locked by name and the rest is still prunable.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vss.errors import VssError
from vss.prune.groups import Group, Groups, Locked, Role, Slot

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
BatchNorm = nn.modules.batchnorm._BatchNorm
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


class _Lock(Exception):
    """A group cannot be expressed as slots: the reason."""


def find_groups(
    model: nn.Module,
    example: Tensor,
    *,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
    keep: Iterable[str] = (),
) -> Groups:
    """Find every set of channels that can be removed together.

    Args:
        model: any `nn.Module`; it is copied, never changed.
        example: an input, (N, 3, H, W).
        forward: how to call the model so that *all* heads are reached; default `forward_train` where there is one.
        keep: names of layers whose output channels stay.

    Returns:
        Groups in model order. The channels of the network's outputs are always locked.
    """
    tp = _torch_pruning()
    model = copy.deepcopy(model).cpu().eval().requires_grad_(True)
    names = {module: name for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    graph = tp.DependencyGraph()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph.build_dependency(model, example.cpu(), forward_fn=_to_outputs(forward or default_forward), verbose=False)
    keep = set(keep)
    groups, locked = [], []
    for tp_group in graph.get_all_groups():
        name, channels = _root(tp_group, names), 1 + max(max(item.root_idxs) for item in tp_group)
        try:
            groups.append(_convert(tp_group, graph, names, parameters, keep))
        except _Lock as reason:
            locked.append(Locked(name, channels, str(reason)))
    groups, clashes = _without_clashes(groups)
    order = {name: position for position, name in enumerate(names.values())}
    groups.sort(key=lambda group: order[group.id])
    return Groups(tuple(groups), tuple(sorted(locked + clashes, key=lambda lock: order.get(lock.layer, -1))))


def default_forward(model: nn.Module, x: Tensor) -> Any:
    """Call `forward_train` where the network has one (auxiliary heads included), else the network."""
    return model.forward_train(x) if hasattr(model, "forward_train") else model(x)


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise VssError("pruning needs torch-pruning; install it with: pip install torch-pruning") from error
    return torch_pruning


def _to_outputs(forward: Callable[[nn.Module, Tensor], Any]) -> Callable[[nn.Module, Tensor], list[Tensor]]:
    """Clone every output tensor, so that the graph ends in an output node even behind a bare convolution."""

    def call(model: nn.Module, x: Tensor) -> list[Tensor]:
        return [tensor.clone() for tensor in flatten(forward(model, x)) if tensor.requires_grad]

    return call


def flatten(output: Any) -> list[Tensor]:
    """All tensors in a nested structure of dicts, lists and tuples, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _root(tp_group: Any, names: dict[nn.Module, str]) -> str:
    """The first named layer of a group, in model order."""
    order = {module: position for position, module in enumerate(names)}
    members = [item.dep.target.module for item in tp_group if isinstance(item.dep.target.module, nn.Module)]
    named = sorted((order[module], names[module]) for module in members if module in names)
    return named[0][1] if named else str(tp_group[0].dep.target.name)


def _convert(
    tp_group: Any, graph: Any, names: dict[nn.Module, str], parameters: dict[str, nn.Parameter], keep: set[str]
) -> Group:
    parameter_names = {id(value): name for name, value in parameters.items()}
    channels = 1 + max(tp_group[0].root_idxs)
    slots: dict[tuple[str, int, int], Slot] = {}
    producers, unit = [], 1
    for item in tp_group:
        target = item.dep.target
        kind = type(target.module).__name__
        if kind == "_OutputOp":
            raise _Lock("its channels are an output of the network")
        if isinstance(target.module, nn.Parameter):
            pairs = [(parameter_names[id(target.module)], target.pruning_dim)]
            role: Role = "param"
        elif target.module in names:
            name = names[target.module]
            is_output = graph.is_out_channel_pruning_fn(item.dep.handler)
            role, pairs = layer_tensors(target.module, name, is_output=is_output)
            if role == "producer":
                producers.append(name)
                if name in keep:
                    raise _Lock("it was asked to stay")
            unit = max(unit, _unit(target.module, name, channels))
        else:
            continue
        for offset, block in _affine(item.idxs, item.root_idxs, channels):
            for tensor, dim in pairs:
                slots.setdefault((tensor, dim, offset), Slot(tensor, dim, offset, block, role))
    if not producers:
        raise _Lock("no layer with weights produces these channels")
    order = {name: position for position, name in enumerate(names.values())}
    in_model_order = sorted(slots.values(), key=lambda slot: order.get(slot.tensor.rpartition(".")[0], -1))
    return Group(min(producers, key=order.__getitem__), channels, tuple(in_model_order), unit)


def layer_tensors(module: nn.Module, name: str, *, is_output: bool) -> tuple[Role, list[tuple[str, int]]]:
    """The (tensor, dim) pairs of a layer that carry its output or input channels, and the layer's role."""

    def pairs(dims: dict[str, int]) -> list[tuple[str, int]]:
        return [(f"{name}.{key}", dim) for key, dim in dims.items() if getattr(module, key, None) is not None]

    if isinstance(module, BatchNorm | nn.GroupNorm | nn.modules.instancenorm._InstanceNorm):
        return "norm", pairs(dict.fromkeys(_NORM_TENSORS, 0))
    if isinstance(module, Conv | ConvTranspose) and module.groups > 1:
        if module.groups == module.in_channels == module.out_channels:
            return "norm", pairs({"weight": 0, "bias": 0})  # depthwise: one filter a channel, like a scale
        raise _Lock(f"{name} is a grouped convolution ({module.groups} groups), which is not cut")
    if isinstance(module, Conv | nn.Linear):
        return ("producer", pairs({"weight": 0, "bias": 0})) if is_output else ("consumer", pairs({"weight": 1}))
    if isinstance(module, ConvTranspose):
        return ("producer", pairs({"weight": 1, "bias": 0})) if is_output else ("consumer", pairs({"weight": 0}))
    if isinstance(module, nn.PReLU):
        return "param", pairs({"weight": 0}) if module.num_parameters > 1 else []
    if not list(module.parameters(recurse=False)):
        return "param", []
    raise _Lock(f"{name} is a {type(module).__name__}, which is not cut")


def _unit(module: nn.Module, name: str, channels: int) -> int:
    """Channels that only go together: a group norm keeps its statistics when whole norm groups leave."""
    if not isinstance(module, nn.GroupNorm):
        return 1
    if module.num_channels != channels:
        raise _Lock(f"{name} normalises across a concatenation")
    return channels // module.num_groups


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
