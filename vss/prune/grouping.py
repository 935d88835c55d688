"""From classes of labels to groups: the slices of a group are runs of equal length in every tensor, one per channel."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from vss.prune.plan import Group, Role, Slot

Key = tuple[str, int]
Runs = tuple[tuple[Key, tuple[tuple[int, int], ...]], ...]
"""For every (tensor, dim) of a class: (start, length) of its runs of positions."""
MOST_PARTS = 8
ALONE = "its channels only leave all together, so that none can"
UNREAD = "nothing reads its channels: an output that the call leaves out"
SHUFFLED = "its channels are shuffled on the way to a layer"


@dataclass
class Table:
    """All (tensor, dim, position) of the network with their class, and what the tensors are."""

    keys: list[Key]
    key: Tensor
    position: Tensor
    roles: Mapping[Key, Role]
    order: Mapping[str, int]

    def classes(self, of: Tensor) -> dict[int, Runs]:
        """The runs of every class; `of`: the class of each row."""
        rows = torch.stack([of, self.key, self.position])
        rows = rows[:, torch.argsort(of, stable=True)]  # the table itself is in order of key and position
        found: dict[int, dict[Key, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for number, key, position in rows.T.tolist():
            runs = found[number][self.keys[key]]
            if runs and runs[-1][0] + runs[-1][1] == position:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((position, 1))
        return {number: tuple((key, tuple(runs)) for key, runs in keys.items()) for number, keys in found.items()}


@dataclass
class Found:
    """Groups, each with its classes, and classes that are none, with the reason."""

    groups: list[Group] = field(default_factory=list)
    classes: dict[str, list[int]] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)


def group_classes(table: Table, of: Tensor, locked: set[int], summed: set[int]) -> Found:
    """Classes whose slices lie side by side in the same tensors are the channels of one group.

    Args:
        table, of: all slices of the network, and the class of each.
        locked, summed: classes that stay, and those that something sums over beside the layers that read them.
    """
    alike: dict[tuple[object, ...], list[tuple[int, Runs]]] = defaultdict(list)
    for number, runs in table.classes(of).items():
        if number not in locked and any(table.roles.get(key) == "producer" for key, _ in runs):
            alike[tuple((key, tuple(length for _, length in parts)) for key, parts in runs)].append((number, runs))
    found = Found()
    parts: list[tuple[str, list[tuple[int, Runs]]]] = []
    for signature, members in alike.items():
        keys: list[Key] = [entry[0] for entry in signature]  # type: ignore[index]
        if all(table.roles.get(key) in ("producer", "norm") for key in keys):
            found.refused |= dict.fromkeys((number for number, _ in members if number not in summed), UNREAD)
            members = [member for member in members if member[0] in summed]
            if not members:
                continue
        producers = [key for key in keys if table.roles.get(key) == "producer"]
        root = min(producers, key=lambda key: (table.order.get(_layer(key), -1), key))
        members.sort(key=lambda member: dict(member[1])[root])
        pieces = _pieces(members)
        if len(pieces) > MOST_PARTS:
            found.refused |= {number: SHUFFLED for number, _ in members}
            continue
        for piece in pieces:
            if len(piece) > 1:
                parts.append((_layer(root), piece))
            else:
                found.refused[piece[0][0]] = ALONE if len(pieces) == 1 else SHUFFLED
    for name, piece in parts:
        group = _group(name, piece, table)
        alone = sum(other == name for other, _ in parts) == 1
        start = dict(piece[0][1])[next(key for key in dict(piece[0][1]) if _layer(key) == name)][0][0]
        group_id = name if alone or name not in found.classes else f"{name}[{start}]"
        found.groups.append(Group(group_id, group.channels, group.slots, group.unit))
        found.classes[group_id] = [number for number, _ in piece]
    found.groups.sort(key=lambda group: table.order.get(group.id.partition("[")[0], -1))
    return found


def _layer(key: Key) -> str:
    return key[0].rpartition(".")[0]


def _pieces(members: list[tuple[int, Runs]]) -> list[list[tuple[int, Runs]]]:
    """Split where the next class does not lie right behind the last one in every tensor."""
    pieces = [[members[0]]]
    for last, this in pairwise(members):
        before, after = dict(last[1]), dict(this[1])
        follows = all(
            start + length == there for key in before
            for (start, length), (there, _) in zip(before[key], after[key], strict=True)
        )  # fmt: skip
        if follows:
            pieces[-1].append(this)
        else:
            pieces.append([this])
    return pieces


def _group(name: str, piece: list[tuple[int, Runs]], table: Table) -> Group:
    runs = piece[0][1]
    unit = math.gcd(*(length for _, parts in runs for _, length in parts))
    slots = [
        Slot(tensor, dim, start, length // unit, table.roles.get((tensor, dim), "param"))
        for (tensor, dim), parts in runs
        for start, length in parts
    ]
    slots.sort(key=lambda slot: table.order.get(slot.layer, -1))
    return Group(name, len(piece) * unit, tuple(slots), unit)
