"""The decision: which channels of which groups stay. JSON, complete, replayable without data, tracing or criterion."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vss.errors import VssError
from vss.files import read_json, sha256_json, write_json
from vss.prune.groups import Group, Role, Slot

KIND, SCHEMA = "vss.plan", 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlanSlot(_Strict):
    """A `Slot` in JSON."""

    tensor: str
    dim: int
    offset: int = 0
    block: int = 1
    role: Role

    def slot(self) -> Slot:
        """As the dataclass that the cutting code uses."""
        return Slot(self.tensor, self.dim, self.offset, self.block, self.role)


class PlanGroup(_Strict):
    """One group: its channel count before, the kept channel numbers (ascending), its slots."""

    id: str
    channels: int = Field(ge=1)
    kept: tuple[int, ...]
    slots: tuple[PlanSlot, ...]
    unit: int = 1

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
    num_classes: int | None = None
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
    def from_dict(cls, data: dict[str, Any], *, source: str = "plan") -> Plan:
        """Validate; a damaged plan is one sentence."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise VssError(f"{source} is no valid plan: {where}: {first['msg']}; make it again.") from error

    def save(self, path: Path | str) -> Path:
        """Write atomically."""
        return write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read a plan file."""
        return cls.from_dict(read_json(path, kind=KIND, schema=SCHEMA), source=str(path))

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
