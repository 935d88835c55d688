"""Groups under the choices that boxes leave, tried until they hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vss.prune.grouping import ALONE, Found, Key, Table, group_classes
from vss.prune.labels import Book, Classes
from vss.prune.plan import Group, Role
from vss.prune.probe import TIME, Probe, half_of, most_of

Pairs = list[tuple[Tensor, Tensor]]
UNKNOWN = "its channels are rearranged in a way that no cut survives"


class Search:
    """What a book says, with the dim along which every box shrinks chosen by trying."""

    def __init__(self, book: Book, roles: Mapping[Key, Role], order: Mapping[str, int]) -> None:
        self.book = book
        self.base, self.components = book.settle()
        self.ways = [component.choices() for component in self.components]
        self.taken: list[Pairs | None] = [next(ways, None) for ways in self.ways]
        self.faults: dict[int, str] = {}
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

    def run(self, probe: Probe) -> tuple[list[Group], dict[str, str]]:
        """Groups that hold, in model order, and for layers whose channels stay the reason."""
        passed: set[Group] = set()
        failed: dict[Group, str] = {}
        while True:
            found, top = self._group()
            boxes = {group: self._boxes(found.classes[group.id], top) for group in found.groups}
            todo = [group for group in found.groups if group not in passed and group not in failed]
            faults = probe.faults([half_of(group) for group in todo])
            faults |= probe.faults([most_of(group) for group in todo if group.id not in faults and boxes[group]])
            passed |= {group for group in todo if group.id not in faults}
            failed |= {group: faults[group.id] for group in todo if group.id in faults}
            wrong = {box: failed[group] for group in todo if group in failed for box in boxes[group]}
            touched = {box for each in boxes.values() for box in each}
            wrong |= {box: ALONE for box in range(len(self.components)) if box not in touched}
            if not self._next(wrong):
                break
        good = [group for group in found.groups if group in passed]
        late = probe.faults([half_of(group) for group in good]) if failed else {}
        why = self._locked(top) | found.refused
        for group in found.groups:
            if group in failed or group.id in late:
                why |= dict.fromkeys(found.classes[group.id], failed.get(group) or late[group.id])
        return [group for group in good if group.id not in late], self._reasons(top, why)

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
            if self.taken[box] is not None and fault != TIME:
                self.taken[box], moved = next(self.ways[box], None), True
        return moved

    def _boxes(self, classes: list[int], top: Classes) -> list[int]:
        mine = torch.isin(top.of, torch.tensor(classes)).nonzero().flatten()
        return [number for number, component in enumerate(self.components) if component.touches(mine)]

    def _group(self) -> tuple[Found, Classes]:
        top = Classes(self.base.count, [pair for pairs in self.taken for pair in pairs or []])
        locked = self._locked(top)
        summed = [top.of[self.base.of[labels]] for labels in self.book.summed]
        read = set(torch.cat(summed).unique().tolist()) if summed else set()
        return group_classes(self.table, top.of[self.base.of[self.rows]], set(locked), read), top

    def _locked(self, top: Classes) -> dict[int, str]:
        """Class -> why it stays."""
        why: dict[int, str] = {}
        for labels, reason in self.book.locks:
            for number in top.of[self.base.of[labels]].unique().tolist():
                why.setdefault(number, reason)
        for number, component in enumerate(self.components):
            if self.taken[number] is None:
                for each in top.of[component.names].unique().tolist():
                    why.setdefault(each, self.faults.get(number, ALONE))
        why.setdefault(int(top.of[self.base.of[0]]), UNKNOWN)
        return why
