"""Slots and groups: which slices of which tensors live or die together, as plain data.

A `Group` has C channels. Removing channel k removes, from every slot of the group, the slice

    tensor.select(dim, offset + k * block + j)   for j in 0 .. block - 1

`block` is 1 except where a flatten lies between producer and consumer. `unit` is the number of neighbouring channels
that can only go together (a whole group of a group norm); it is 1 everywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Role = Literal["producer", "consumer", "norm", "param"]


@dataclass(frozen=True)
class Slot:
    """A slice of a parameter or buffer that carries one group's channels along `dim`, beginning at `offset`."""

    tensor: str
    dim: int
    offset: int = 0
    block: int = 1
    role: Role = "producer"

    def indices(self, channels: Tensor) -> Tensor:
        """Positions along `dim` of the given channel numbers (int64), in order."""
        return (self.offset + channels[:, None] * self.block + torch.arange(self.block)[None, :]).reshape(-1)


@dataclass(frozen=True)
class Group:
    """Channels that live or die together: `channels` of them, present in every slot."""

    id: str
    channels: int
    slots: tuple[Slot, ...]
    unit: int = 1

    def by_role(self, role: Role) -> list[Slot]:
        """The slots of one role, in model order."""
        return [slot for slot in self.slots if slot.role == role]

    def module_names(self, role: Role) -> list[str]:
        """The modules that own slots of one role, without repeats, in model order."""
        return list(dict.fromkeys(slot.tensor.rpartition(".")[0] for slot in self.by_role(role)))


@dataclass(frozen=True)
class Locked:
    """A layer whose channels stay, and why."""

    layer: str
    channels: int
    reason: str


@dataclass(frozen=True)
class Groups:
    """All prunable groups of a network in model order, and what is locked."""

    groups: tuple[Group, ...]
    locked: tuple[Locked, ...] = field(default=())

    def __iter__(self) -> Any:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, group_id: str) -> Group:
        return next(group for group in self.groups if group.id == group_id)
