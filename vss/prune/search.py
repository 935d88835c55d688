"""From classes of labels to groups, under the choices that boxes leave, tried until they hold.

The slices of a group are runs of equal length in every tensor, one per channel.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from vss.prune.labels import Book, Classes
from vss.prune.plan import Group, Role, Slot
from vss.prune.probe import TIME, Probe, counts_of, half_of, most_of

Key = tuple[str, int]
Runs = tuple[tuple[Key, tuple[tuple[int, int], ...]], ...]
"""For every (tensor, dim) of a class: (start, length) of its runs of positions."""
MOST_PARTS = 8
ALONE = "its channels only leave all together, so that none can"
UNREAD = "nothing reads its channels: an output that the call leaves out"
SHUFFLED = "its channels are shuffled on the way to a layer"
Pairs = list[tuple[Tensor, Tensor]]
UNKNOWN = "its channels are rearranged in a way that no cut survives"


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
    alike: dict[tuple[tuple[Key, tuple[int, ...]], ...], list[tuple[int, Runs]]] = defaultdict(list)
    for number, runs in table.classes(of).items():
        if number not in locked and any(table.roles.get(key) == "producer" for key, _ in runs):
            alike[tuple((key, tuple(length for _, length in parts)) for key, parts in runs)].append((number, runs))
    found = Found()
    parts: list[tuple[str, list[tuple[int, Runs]]]] = []
    for signature, members in alike.items():
        keys = [key for key, _ in signature]
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


class Search:
    """What a book says, with the dim along which every box shrinks chosen by trying."""

    def __init__(self, book: Book, roles: Mapping[Key, Role], order: Mapping[str, int], probe: Probe) -> None:
        self.book, self.probe = book, probe
        self.base, self.components = book.settle()
        self.ways = [component.choices() for component in self.components]
        self.at = [0] * len(self.ways)
        self.tried: list[set[int]] = [set() for _ in self.ways]
        self.faults: dict[int, str] = {}
        self.counts: dict[Group, tuple[str, ...]] = {}
        self.leaves: set[str] = set()
        self.idle: set[frozenset[str]] = set()
        spans = book.spans
        lengths = torch.tensor([span.length for span in spans])
        self.rows = torch.cat([torch.arange(span.start, span.start + span.length) for span in spans])
        self.table = Table(
            [(span.tensor, span.dim) for span in spans],
            torch.repeat_interleave(torch.arange(len(spans)), lengths),
            torch.cat([torch.arange(span.length) for span in spans]),
            roles,
            order,
        )

    def run(self) -> tuple[list[Group], dict[str, str]]:
        """Groups that hold, in model order, and for layers whose channels stay the reason."""
        passed: set[Group] = set()
        failed: dict[Group, str] = {}
        self._lead()
        while True:
            found, top = self._group()
            boxes = {group: self._boxes(found.classes[group.id], top) for group in found.groups}
            todo = [group for group in found.groups if group not in passed and group not in failed]
            faults = self.probe.faults([half_of(group) for group in todo])
            faults |= self.probe.faults([most_of(group) for group in todo if group.id not in faults and boxes[group]])
            passed |= {group for group in todo if group.id not in faults}
            helped = [group for group in todo if group.id in faults and boxes[group] and self._counted(group)]
            failed |= {group: faults[group.id] for group in todo if group.id in faults and group not in helped}
            wrong = {box: failed[group] for group in todo if group in failed for box in boxes[group]}
            touched = {box for each in boxes.values() for box in each}
            wrong |= {box: ALONE for box in range(len(self.components)) if box not in touched}
            if not self._next(wrong) and not helped:
                break
        good = [group for group in found.groups if group in passed]
        late = self.probe.faults([half_of(group) for group in good]) if failed else {}
        why = self._locked(top) | found.refused
        for group in found.groups:
            if group in failed or group.id in late:
                why |= dict.fromkeys(found.classes[group.id], failed.get(group) or late[group.id])
        return [group for group in good if group.id not in late], self._reasons(top, why)

    def _lead(self) -> None:
        """Of boxes that vary along the same dims one is tried alone, and the others begin with the dim where it holds.

        In a network of equal blocks it saves finding each of them among all groups; what does not hold is found later.
        """
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for box, component in enumerate(self.components):
            alike[component.joints[0].axes].append(box)
        for boxes in (boxes for boxes in alike.values() if len(boxes) > 1):
            first = boxes[0]
            for place, (dim, _) in enumerate(self.ways[first]):
                self.at[first] = place
                found, top = self._group()
                mine = [group for group in found.groups if first in self._boxes(found.classes[group.id], top)]
                if mine and self._holds(mine):
                    for box in boxes[1:]:
                        dims = [way for way, _ in self.ways[box]]
                        self.at[box] = dims.index(dim) if dim in dims else 0
                    break
            else:
                self.at[first] = 0

    def _holds(self, groups: list[Group]) -> bool:
        """Whether groups can be cut, with what else has to shrink."""
        if not any(self.probe.faults([some(group) for group in groups]) for some in (most_of, half_of)):
            return True
        return all(self._counted(group) for group in groups)

    def _counted(self, group: Group) -> bool:
        """Whether whole numbers of modules that shrink with a group make it hold.

        They have the same names in blocks of one kind, where none help twice if they did not help once.
        """
        leaves = frozenset(name.rpartition(".")[2] for name in counts_of(self.probe.model, group))
        if group.counts or leaves in self.idle:
            return False
        better = self.probe.counted(group)
        if better is None:
            self.idle.add(leaves)
            return False
        self.counts[group] = better.counts
        self.leaves |= {name.rpartition(".")[2] for name in better.counts}
        return True

    def _with_counts(self, group: Group) -> Group:
        """The group with the whole numbers that are known to shrink with it, or with one of its kind."""
        known = self.counts.get(group)
        if known is None and self.leaves:
            found = {name.rpartition(".")[2]: name for name in counts_of(self.probe.model, group)}
            known = tuple(found[leaf] for leaf in sorted(self.leaves)) if self.leaves <= found.keys() else ()
        return dataclasses.replace(group, counts=known or ())

    @property
    def taken(self) -> list[Pairs | None]:
        """The choice of every box; None where none is left."""
        pairs = zip(self.ways, self.at, strict=True)
        return [ways[place][1] if place < len(ways) else None for ways, place in pairs]

    def _reasons(self, top: Classes, why: Mapping[int, str]) -> dict[str, str]:
        """Layer -> why channels of it stay; those that it makes speak before those that it takes."""
        found: dict[str, str] = {}
        of = top.of[self.base.of[self.rows]]
        for row, key in sorted(enumerate(self.table.keys), key=lambda each: self.table.roles[each[1]] != "producer"):
            layer = key[0].rpartition(".")[0]
            if layer not in found:
                numbers = of[self.table.key == row].tolist()
                reason = why.get(numbers[0])
                found |= {layer: reason} if reason else {}
        return found

    def _next(self, faults: Mapping[int, str]) -> bool:
        """Take the next choice of every box in a group that failed; False where there is none to take."""
        moved = False
        for box, fault in faults.items():
            if fault != ALONE:
                self.faults[box] = fault
            if self.at[box] < len(self.ways[box]) and fault != TIME:
                self.at[box], moved = self._after(box), True
        return moved

    def _after(self, box: int) -> int:
        """The place of the next choice of a box: those before where it began come last."""
        self.tried[box].add(self.at[box])
        return next(
            (place for place in range(len(self.ways[box])) if place not in self.tried[box]), len(self.ways[box])
        )

    def _boxes(self, classes: list[int], top: Classes) -> list[int]:
        mine = torch.isin(top.of, torch.tensor(classes)).nonzero().flatten()
        return [number for number, component in enumerate(self.components) if component.touches(mine)]

    def _group(self) -> tuple[Found, Classes]:
        taken = self.taken
        top = Classes(self.base.count, [pair for pairs in taken for pair in pairs or []])
        locked = self._locked(top)
        summed = [top.of[self.base.of[labels]] for labels in self.book.summed]
        read = set(torch.cat(summed).unique().tolist()) if summed else set()
        found = group_classes(self.table, top.of[self.base.of[self.rows]], set(locked), read)
        found.groups = [self._with_counts(group) for group in found.groups]
        return found, top

    def _locked(self, top: Classes) -> dict[int, str]:
        """Class -> why it stays."""
        why: dict[int, str] = {}
        for labels, reason in self.book.locks:
            for number in top.of[self.base.of[labels]].unique().tolist():
                why.setdefault(number, reason)
        for number, component in enumerate(self.components):
            if self.at[number] >= len(self.ways[number]):
                for each in top.of[component.names].unique().tolist():
                    why.setdefault(each, self.faults.get(number, ALONE))
        why.setdefault(int(top.of[self.base.of[0]]), UNKNOWN)
        return why
