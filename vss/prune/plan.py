"""Slots and groups: which slices of which tensors live or die together, as plain data.

A `Group` has C channels. Removing channel k removes, from every slot of the group, the slice

    tensor.select(dim, offset + k * block + j)   for j in 0 .. block - 1

`block` is 1 except where a flatten lies between producer and consumer. `unit` is the number of neighbouring channels
that can only go together (a whole group of a group norm); it is 1 everywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator
from torch import Tensor

from vss.core.errors import VssError, fault
from vss.core.files import read_json, sha256_json, write_json

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


# The decision: which channels of which groups stay. JSON, complete, replayable without data, tracing or criterion.


KIND, SCHEMA = "vss.plan", 1
MAX_CHANNELS = 1 << 24


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlanSlot(_Strict):
    """A `Slot` in JSON."""

    tensor: str
    dim: int = Field(ge=0, le=7, strict=True)
    offset: int = Field(default=0, ge=0, strict=True)
    block: int = Field(default=1, ge=1, strict=True)
    role: Role

    def slot(self) -> Slot:
        """As the dataclass that the cutting code uses."""
        return Slot(self.tensor, self.dim, self.offset, self.block, self.role)


class PlanGroup(_Strict):
    """One group: its channel count before, the kept channel numbers (ascending), its slots."""

    id: str
    channels: int = Field(ge=1, le=MAX_CHANNELS, strict=True)
    kept: tuple[StrictInt, ...]
    slots: tuple[PlanSlot, ...] = Field(min_length=1)
    unit: int = Field(default=1, ge=1, strict=True)

    @model_validator(mode="after")
    def _kept_is_a_proper_subset(self) -> Self:
        kept = self.kept
        if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.channels:
            raise ValueError(f"group {self.id}: kept must be ascending channel numbers in 0..{self.channels - 1}")
        return self

    def removed(self) -> torch.Tensor:
        """The channel numbers that go, int64, ascending."""
        gone = torch.ones(self.channels, dtype=torch.bool)
        gone[list(self.kept)] = False
        return gone.nonzero().flatten()


class Plan(_Strict):
    """What to keep, of which network, and how that was decided.

    `weights_sha256` is the hash of the state dict that the plan was made for; `apply_plan` refuses another one.
    """

    kind: Literal["vss.plan"] = "vss.plan"
    schema_: int = Field(default=SCHEMA, alias="schema", ge=1, le=SCHEMA)
    model: str
    options: dict[str, Any] = {}
    num_classes: int | None = Field(default=None, strict=True)
    weights_sha256: str
    criterion: str
    criterion_options: dict[str, Any] = {}
    budget: dict[str, Any]
    calibration: dict[str, Any] = {}
    labels: tuple[str, ...] = ()
    seed: int = 0
    cost_before: dict[str, float] = {}
    cost_after: dict[str, float] = {}
    groups: tuple[PlanGroup, ...]

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with `kind` and `schema`."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_dict(cls, data: Any, *, source: str = "plan") -> Plan:
        """Validate; a damaged plan is one sentence."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise VssError(f"{source} is no valid plan: {fault(error)}; make it again.") from error

    def save(self, path: Path | str) -> Path:
        """Write atomically, with the hash of the content."""
        return write_json(path, self.to_dict(), sealed=True)

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read a plan file; one that was changed after it was written is refused, one without a hash is taken."""
        return cls.from_dict(read_json(path, kind=KIND, schema=SCHEMA, sealed=True), source=str(path))

    def sha256(self) -> str:
        """Hash of the whole decision."""
        return sha256_json(self.to_dict())

    def widths(self) -> dict[str, tuple[int, int]]:
        """Group id -> (channels before, after)."""
        return {group.id: (group.channels, len(group.kept)) for group in self.groups}

    def then(self, second: Plan) -> Plan:
        """One plan equal to applying this one and then `second` (which was made for the cut network)."""
        later = {group.id: group for group in second.groups}
        if set(later) != {group.id for group in self.groups}:
            raise VssError("two plans compose only when they name the same groups; the second is of another network.")
        groups = []
        for group in self.groups:
            if later[group.id].channels != len(group.kept):
                raise VssError(
                    f"the second plan expects {later[group.id].channels} channels in group {group.id}, but the first "
                    f"leaves {len(group.kept)}; it was made for another cut."
                )
            kept = tuple(group.kept[position] for position in later[group.id].kept)
            groups.append(group.model_copy(update={"kept": kept}))
        return second.model_copy(
            update={
                "weights_sha256": self.weights_sha256,
                "cost_before": self.cost_before,
                "groups": tuple(groups),
            }
        )


def plan_group(group: Group, kept: torch.Tensor) -> PlanGroup:
    """A group and its kept channel numbers as plan data."""
    slots = tuple(PlanSlot(**vars(slot)) for slot in group.slots)
    return PlanGroup(id=group.id, channels=group.channels, kept=tuple(kept.tolist()), slots=slots, unit=group.unit)
