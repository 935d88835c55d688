"""Groups under the choices that boxes leave, tried until they hold."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from vss.prune.grouping import ALONE, Found, Key, Table, group_classes
from vss.prune.labels import Book, Classes
from vss.prune.plan import Group, Role
from vss.prune.probe import TIME, Probe, counts_of, half_of, most_of

Pairs = list[tuple[Tensor, Tensor]]
UNKNOWN = "its channels are rearranged in a way that no cut survives"


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
