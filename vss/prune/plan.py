"""Slots, groups and plans: which slices of which tensors live or die together, and which stay; plain data.

A `Group` has C channels. Removing channel k removes, from every slot of the group, the slice

    tensor.select(dim, offset + k * block + j)   for j in 0 .. block - 1

`block` is 1 except where a flatten lies between producer and consumer. `unit` is the number of neighbouring channels
that can only go together (a whole group of a group norm); it is 1 everywhere else.

A `Plan` is the decision as JSON: complete, replayable without data, tracing or criterion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictInt,
    ValidationError,
    model_serializer,
    model_validator,
)  # fmt: skip
from pydantic.dataclasses import dataclass

from vss.core.errors import VssError, fault
from vss.core.files import read_json, sha256_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

KIND, SCHEMA = "vss.plan", 1
MAX_CHANNELS = 1 << 24
Role = Literal["producer", "consumer", "norm", "param"]
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class Slot:
    """A slice of a parameter or buffer that carries one group's channels along `dim`, beginning at `offset`."""

    tensor: str
    dim: Annotated[int, Field(ge=0, le=7, strict=True)]
    offset: Annotated[int, Field(ge=0, strict=True)] = 0
    block: Annotated[int, Field(ge=1, strict=True)] = 1
    role: Role = "producer"

    @property
    def layer(self) -> str:
        """The module that owns the tensor."""
        return self.tensor.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """The tensor's name in its module, such as "weight"."""
        return self.tensor.rpartition(".")[2]

    def indices(self, channels: Tensor) -> Tensor:
        """Positions along `dim` of the given channel numbers (int64), in order."""
        import torch

        return (self.offset + channels[:, None] * self.block + torch.arange(self.block)[None, :]).reshape(-1)


@dataclass(frozen=True, config=STRICT)
class Group:
    """Channels that live or die together: `channels` of them, present in every slot.

    `counts` names whole numbers that modules keep (`blocks.0.attn.num_heads`) and that shrink in the same proportion.
    """

    id: str
    channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS, strict=True)]
    slots: tuple[Slot, ...]
    unit: Annotated[int, Field(ge=1, strict=True)] = 1
    counts: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _lean(self, write: SerializerFunctionWrapHandler) -> dict[str, object]:
        data: dict[str, object] = write(self)
        return data if self.counts else {key: value for key, value in data.items() if key != "counts"}

    def by_role(self, role: Role) -> list[Slot]:
        """The slots of one role, in model order."""
        return [slot for slot in self.slots if slot.role == role]

    def module_names(self, role: Role) -> list[str]:
        """The modules that own slots of one role, without repeats, in model order."""
        return list(dict.fromkeys(slot.layer for slot in self.by_role(role)))

    def others(self, kept: Tensor) -> Tensor:
        """The channel numbers that are not among `kept`, int64, ascending."""
        import torch

        gone = torch.ones(self.channels, dtype=torch.bool)
        gone[kept] = False
        return gone.nonzero().flatten()

    def keep(self, kept: Tensor) -> PlanGroup:
        """The group with the channel numbers (ascending int64) that stay."""
        return PlanGroup(self.id, self.channels, self.slots, self.unit, self.counts, kept=tuple(kept.tolist()))


@dataclass(frozen=True, config=STRICT)
class PlanGroup(Group):
    """A group and the channel numbers (ascending) that stay."""

    kept: tuple[StrictInt, ...] = dataclasses.field(kw_only=True)

    @model_validator(mode="after")
    def _kept_is_a_proper_subset(self) -> Self:
        kept = self.kept
        if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.channels:
            raise ValueError(f"group {self.id}: kept must be ascending channel numbers in 0..{self.channels - 1}")
        if not self.slots:
            raise ValueError(f"group {self.id} has no slots")
        return self

    def removed(self) -> Tensor:
        """The channel numbers that go, int64, ascending."""
        import torch

        return self.others(torch.tensor(self.kept))

    def renamed(self, rename: Callable[[str], str]) -> PlanGroup:
        """The same decision in other names of layers."""
        slots = tuple(dataclasses.replace(slot, tensor=rename(slot.tensor)) for slot in self.slots)
        counts = tuple(rename(name) for name in self.counts)
        return dataclasses.replace(self, id=rename(self.id), slots=slots, counts=counts)


@dataclasses.dataclass(frozen=True)
class Locked:
    """A layer whose channels stay, and why."""

    layer: str
    channels: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Groups:
    """All prunable groups of a network in model order, and what is locked."""

    groups: tuple[Group, ...]
    locked: tuple[Locked, ...] = ()

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, group_id: str) -> Group:
        return next(group for group in self.groups if group.id == group_id)


class Plan(BaseModel):
    """What to keep, of which network, and how that was decided.

    `weights_sha256` is the hash of the state dict that the plan was made for; `apply_plan` refuses another one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

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

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with `kind` and `schema`."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_dict(cls, data: object, *, source: str = "plan") -> Plan:
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

    def renamed(self, rename: Callable[[str], str], model: str) -> Plan:
        """The same decision for the network `model`, in other names of layers."""
        groups = tuple(group.renamed(rename) for group in self.groups)
        return self.model_copy(update={"model": model, "groups": groups})

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
            groups.append(dataclasses.replace(group, kept=kept))
        made_for = {"weights_sha256": self.weights_sha256, "cost_before": self.cost_before}
        return second.model_copy(update={**made_for, "groups": tuple(groups)})
