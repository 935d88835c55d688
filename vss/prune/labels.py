"""Which slices of which tensors live together: labels, the pairs that must be equal, and the classes that follow.

Every position along every dim of every parameter and buffer has a number, its label. A *mark* of a tensor is an
integer tensor that broadcasts to it and says which label each of its values would vanish with; 0 is none. Operations
carry marks on and unite labels (`vss.prune.follow`). A mark that varies along one dim names removable slices. One that
varies along several (channels viewed as heads x channels of a head) must stay a box: its slices along one of its dims
go together, and along which is a choice, made later by trying (`Component.choices`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

MANY = 4096


@dataclass(eq=False)
class Joint:
    """A mark that varies along several dims, the labels that stand for its slices, and dims that cannot shrink."""

    mark: Tensor
    axes: tuple[int, ...]
    slices: dict[int, Tensor] = field(default_factory=dict)
    frozen: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """The labels `start` .. `start + length - 1` of one tensor along one dim."""

    tensor: str
    dim: int
    start: int
    length: int


def axes_of(mark: Tensor) -> tuple[int, ...]:
    """The dims along which a mark varies."""
    return tuple(dim for dim, size in enumerate(mark.shape) if size > 1)


def compressed(mark: Tensor) -> Tensor:
    """The mark with every dim along which it is constant narrowed to 1."""
    for dim, size in enumerate(mark.shape):
        if size > 1 and bool((mark == mark.narrow(dim, 0, 1)).all()):
            mark = mark.narrow(dim, 0, 1)
    return mark


class Book:
    """All labels of one network."""

    def __init__(self) -> None:
        self.size = 1
        self.spans: list[Span] = []
        self.joints: list[Joint] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.locks: list[tuple[Tensor, str]] = []
        self.summed: list[Tensor] = []
        self._joint_of: dict[int, Joint] = {}

    def fresh(self, count: int) -> Tensor:
        """(count,) new labels."""
        self.size += count
        return torch.arange(self.size - count, self.size)

    def span(self, tensor: str, dim: int, length: int) -> Tensor:
        """(length,) labels of a tensor's positions along `dim`."""
        self.spans.append(Span(tensor, dim, self.size, length))
        return self.fresh(length)

    def spans_of(self, labels: Tensor) -> list[Span]:
        """The spans in which these labels lie."""
        labels = labels.reshape(-1).unique()
        starts = torch.tensor([span.start for span in self.spans])
        ends = starts + torch.tensor([span.length for span in self.spans])
        places = torch.searchsorted(starts, labels, right=True) - 1
        inside = (places >= 0) & (labels < ends[places.clamp(min=0)])
        return [self.spans[place] for place in places[inside].unique().tolist()]

    def unite(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Labels at equal places live together; one that meets none stays, for `reason`."""
        first, second = torch.broadcast_tensors(first, second)
        both = torch.stack([first.reshape(-1), second.reshape(-1)])
        if both.shape[1] > MANY:
            both = both.unique(dim=1)
        known = (both > 0).all(0)
        lone = both[:, ~known].flatten()
        if (lone > 0).any():
            self.lock(lone, reason)
        if known.any():
            self.pairs.append((both[0, known], both[1, known]))

    def lock(self, labels: Tensor, reason: str) -> None:
        """These labels stay."""
        self.locks.append((labels.reshape(-1).unique(), reason))

    def read(self, labels: Tensor | None) -> None:
        """Something sums over these labels, which is what a layer that reads channels does."""
        if labels is not None:
            self.summed.append(labels.reshape(-1))

    def joint(self, mark: Tensor) -> Joint:
        """The record of a mark that varies along several dims."""
        if id(mark) not in self._joint_of:
            self.joints.append(Joint(mark, axes_of(mark)))
            self._joint_of[id(mark)] = self.joints[-1]
        return self._joint_of[id(mark)]

    def axis(self, mark: Tensor, dim: int) -> Tensor:
        """(n,) labels of the slices of a mark along a dim on which it varies."""
        if axes_of(mark) == (dim,):
            return mark.reshape(-1)
        slices = self.joint(mark).slices
        if dim not in slices:
            slices[dim] = self.fresh(mark.shape[dim])
        return slices[dim]

    def freeze(self, mark: Tensor, dim: int, reason: str) -> None:
        """The slices of a mark along a dim on which it varies stay."""
        if axes_of(mark) == (dim,):
            self.lock(mark, reason)
        else:
            self.joint(mark).frozen.setdefault(dim, reason)

    def settle(self) -> tuple[Classes, list[Component]]:
        """The classes as far as they are certain, and the boxes that leave a choice."""
        for joint in self.joints:
            if set(joint.axes) <= set(joint.frozen):
                self.lock(joint.mark, joint.frozen[joint.axes[0]])
        base = Classes(self.size, self.pairs)
        every = [(joint, torch.cat([joint.mark.reshape(-1), *joint.slices.values()])) for joint in self.joints]
        links = [(base.of[labels[:1]].expand(len(labels)), base.of[labels]) for _, labels in every]
        wide = Classes(base.count, links)
        members: dict[int, list[Joint]] = defaultdict(list)
        for joint, labels in every:
            members[int(wide.of[base.of[labels[0]]])].append(joint)
        return base, [Component(base, joints) for joints in members.values()]


class Classes:
    """The classes that pairs of labels make."""

    def __init__(self, size: int, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        pairs = list(pairs)
        none = torch.zeros(0, dtype=torch.long)
        first = torch.cat([none, *(a for a, _ in pairs)]).numpy()
        second = torch.cat([none, *(b for _, b in pairs)]).numpy()
        graph = coo_matrix(([1] * len(first), (first, second)), shape=(size, size))
        self.count, of = connected_components(graph, directed=False)
        self.of = torch.from_numpy(of).long()


class Component:
    """Boxes whose choices depend on each other."""

    def __init__(self, base: Classes, joints: list[Joint]) -> None:
        self.joints = joints
        seen = torch.cat(
            [base.of[part] for joint in joints for part in (joint.mark.reshape(-1), *joint.slices.values())]
        )
        self.names, places = seen.unique(return_inverse=True)
        self.local: dict[int, Tensor] = {}
        self.local_slices: dict[tuple[int, int], Tensor] = {}
        start = 0
        for number, joint in enumerate(joints):
            self.local[number] = places[start : start + joint.mark.numel()].view(joint.mark.shape)
            start += joint.mark.numel()
            for dim, labels in joint.slices.items():
                self.local_slices[number, dim] = places[start : start + len(labels)]
                start += len(labels)
        self.inside = torch.cat([part.reshape(-1) for part in self.local.values()]).unique()

    def choices(self) -> list[tuple[int, list[tuple[Tensor, Tensor]]]]:
        """(dim of the first box, pairs of base classes) for each way to shrink; first what leaves the most classes.

        Every box takes the dim that leaves it the most of them.
        """
        first = self.joints[0]
        ways = [dim for dim in first.axes if dim not in first.frozen]
        tried = [(*self._choose(dim), dim) for dim in ways]
        return [(dim, pairs) for _, pairs, dim in sorted(tried, key=lambda way: -way[0])]

    def touches(self, classes: Tensor) -> bool:
        """Whether one of these base classes is in it."""
        return bool(torch.isin(classes, self.names).any())

    def _choose(self, first: int) -> tuple[int, list[tuple[Tensor, Tensor]]]:
        """The number of classes that are left in boxes, and the pairs, when the first box shrinks along `first`."""
        local: list[tuple[Tensor, Tensor]] = []
        count, shrinks = len(self.inside), dict[int, bool]()
        order = sorted(range(len(self.joints)), key=lambda number: (number > 0, not self.joints[number].slices))
        for number in order:
            joint = self.joints[number]
            dims = [first] if not number else [dim for dim in joint.axes if dim not in joint.frozen] or [joint.axes[0]]
            said = {dim: shrinks.get(int(self.local_slices[number, dim][0])) for dim in joint.slices}
            ways = []
            for dim in dims:
                fits = said.get(dim) is not False and not any(said[other] for other in said if other != dim)
                links = self._links(number, dim)
                of = Classes(len(self.names), [*local, *links]).of
                own, left = (len(of[labels].unique()) for labels in (self.local[number].reshape(-1), self.inside))
                ways.append((fits, own, left, -dim, links))
            _, _, count, chosen, links = max(ways, key=lambda way: way[:4])
            shrinks |= {int(self.local_slices[number, dim][0]): dim == -chosen for dim in joint.slices}
            local += links
        return count, [(self.names[a], self.names[b]) for a, b in local]

    def _links(self, number: int, dim: int) -> list[tuple[Tensor, Tensor]]:
        """The slices of a box along `dim`, each in one class with the label that stands for it."""
        rows = self.local[number].movedim(dim, 0).reshape(self.local[number].shape[dim], -1)
        links = [(rows[:, :1].expand_as(rows).reshape(-1), rows.reshape(-1))]
        if (number, dim) in self.local_slices:
            links.append((rows[:, 0], self.local_slices[number, dim]))
        return links
