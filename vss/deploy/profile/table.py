"""The latency table of one network on one machine: measured width vectors, what they say of alignment, and a model.

JSON, written after every sample, so that a killed build goes on. A table of another device, driver, version, network,
resolution, batch or thread count is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from vss.core.errors import VssError, fault
from vss.core.files import atomic, read_json, write_json
from vss.deploy.profile.units import Reading
from vss.prune.latency import Affine, LatencyModel

KIND, SCHEMA = "vss.latency_table", 1
Role = Literal["full", "align", "fit", "test", "cliff"]
FITTED = ("full", "fit")


@dataclass(frozen=True)
class Sample:
    """One measured width vector; `name` tells for what it was taken and is unique, `reads` how often it was read."""

    name: str
    role: Role
    widths: tuple[int, ...]
    reading: Reading
    reads: int = 1

    def again(self, reading: Reading) -> Sample:
        """With the minimum over one more reading."""
        return replace(self, reading=self.reading.least(reading), reads=self.reads + 1)

    def to_dict(self) -> dict[str, Any]:
        what = {"name": self.name, "role": self.role, "widths": list(self.widths), "reads": self.reads}
        return what | self.reading.to_dict()


Count = Annotated[int, Field(ge=1, le=1 << 24, strict=True)]
Figure = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False)]
Time = Annotated[float, Field(ge=0, le=1e9)]


class _Sample(BaseModel):
    widths: list[Count]
    total: Annotated[float, Field(gt=0, le=1e9)]
    units: dict[str, Time]


class _File(BaseModel):
    """The schema of what the model is fitted on."""

    groups: list[tuple[str, Count, Count]]
    channels: dict[str, tuple[Figure, Figure, dict[str, tuple[Figure, Figure]]]]
    samples: list[_Sample]

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        for sample in self.samples:
            over = any(width > group[1] for width, group in zip(sample.widths, self.groups, strict=False))
            if len(sample.widths) != len(self.groups) or over:
                raise ValueError(f"a sample has not {len(self.groups)} widths of at most those of the uncut network")
        known = {str(index) for index in range(len(self.groups))}
        if any(members.keys() - known for _, _, members in self.channels.values()):
            raise ValueError("a unit depends on a group that is not there")
        return self


@dataclass
class LatencyTable:
    """Everything measured, in the order it was.

    Attributes:
        key: what it holds for; see `vss.deploy.profile.setting.table_key`.
        groups: [id, channels, unit] of every group.
        floor: least fraction of a group that was measured.
        step: widths are best multiples of this; 0 before the alignment scan.
        alignment: step -> time per MAC over the best step's.
        samples: what was measured.
        channels: unit -> [cin, cout, {group index: [slope in, slope out]}] of the uncut network.
        error: `median` and `max` relative error of the wall time on the `test` samples, `units_median` and `units_max`
            of the sum of their units, which a busy machine disturbs less, and their count `n`.
        drift: (largest - least) / least of the kept readings of the uncut network, taken from time to time.
    """

    key: dict[str, Any]
    groups: list[list[Any]]
    floor: float
    step: int = 0
    alignment: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    channels: dict[str, list[Any]] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    drift: float = 0.0
    done: bool = False

    # -- file ---------------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> Path:
        body = {name: value for name, value in vars(self).items() if name != "samples"}
        samples = [sample.to_dict() for sample in self.samples]
        return write_json(path, {"kind": KIND, "schema": SCHEMA, **body, "samples": samples}, sealed=True)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        data = read_json(path, kind=KIND, schema=SCHEMA, sealed=True)
        try:
            _File.model_validate(data)
            body = {name: data[name] for name in cls.__dataclass_fields__}
            body["samples"] = [{**each, "reading": each} for each in data["samples"]]
            table = TypeAdapter(cls).validate_python(body)
        except ValidationError as error:
            raise _broken(path, fault(error)) from error
        except (KeyError, TypeError) as error:
            raise _broken(path, str(error)) from error
        if table.done and not table.of_role("full"):
            raise _broken(path, "the uncut network is not in it")
        return table

    def check(self, key: dict[str, object], *, path: Path | str, command: str) -> None:
        """Refuse a table that holds for something else; `command` builds the right one."""
        for name, wanted in key.items():
            if self.key.get(name) != wanted:
                raise VssError(
                    f"the latency table {path} holds for {name} {_short(self.key.get(name))} and this is "
                    f"{_short(wanted)}; build one here: {command}"
                )

    # -- model --------------------------------------------------------------------------------------------------------

    def of_role(self, *roles: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.role in roles]

    @property
    def full(self) -> list[int]:
        """Widths of the uncut network."""
        return [channels for _, channels, _ in self.groups]

    def full_ms(self) -> float:
        """Minimum measured milliseconds of the uncut network."""
        return self.uncut_range()[0]

    def uncut_range(self) -> tuple[float, float]:
        """Least and largest of its readings."""
        totals = [sample.reading.total for sample in self.of_role("full")]
        return min(totals), max(totals)

    def arrays(self, chosen: Sequence[Sample]) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        """Units, and (samples, groups) widths, (samples, units) milliseconds, (samples,) totals."""
        units = list(self.channels)
        widths = np.array([sample.widths for sample in chosen], float).reshape(len(chosen), len(self.groups))
        times = np.array([[sample.reading.units.get(unit, 0.0) for unit in units] for sample in chosen])
        return units, widths, times, np.array([sample.reading.total for sample in chosen])

    def set_channels(self, units: Sequence[str], cin: Affine, cout: Affine) -> None:
        """Keep what `vss.deploy.profile.setting.channels` found."""
        self.channels = {
            unit: [
                cin.full[row],
                cout.full[row],
                {
                    str(g): [cin.slope[row, g], cout.slope[row, g]]
                    for g in range(len(self.groups))
                    if cin.slope[row, g] or cout.slope[row, g]
                },
            ]
            for row, unit in enumerate(units)
        }

    def affine(self) -> tuple[Affine, Affine]:
        """Channels of the units as functions of widths."""
        rows = list(self.channels.values())
        slopes = np.zeros((2, len(rows), len(self.groups)))
        for row, (_, _, members) in enumerate(rows):
            for index, both in members.items():
                slopes[:, row, int(index)] = both
        widths = np.array(self.full, float)
        full_in, full_out = (np.array([row[side] for row in rows], float) for side in (0, 1))
        return Affine(full_in, slopes[0], widths), Affine(full_out, slopes[1], widths)

    def model(self) -> LatencyModel:
        """Fitted on everything but the test samples and the scans off the grid."""
        units, widths, times, totals = self.arrays(self.of_role(*FITTED))
        return LatencyModel.fit(units, *self.affine(), widths, times, totals)

    def test(self) -> dict[str, float]:
        """Relative errors on the test samples: of the wall time, and of the sum of all units."""
        _, widths, times, totals = self.arrays(self.of_role("test"))
        model = self.model()
        wall = np.abs(model(widths) / totals - 1)
        units = np.abs(model.by_unit(widths).sum(axis=1) / times.sum(axis=1) - 1)
        found = {"median": np.median(wall), "max": wall.max()}
        found |= {"units_median": np.median(units), "units_max": units.max()}
        return {name: float(value) for name, value in found.items()} | {"n": float(len(wall))}


def _broken(path: Path | str, what: str) -> VssError:
    return VssError(f"{path} is no whole latency table ({what}); remove it and build it again: vss lut build.")


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def cliffs(table: LatencyTable) -> dict[str, list[tuple[int, float]]]:
    """Group id -> [(width, milliseconds of the units that it changes)], ascending, of every scanned group."""
    found: dict[str, list[tuple[int, float]]] = {}
    for sample in table.of_role("cliff"):
        index = int(sample.name.split("-")[1])
        units = [u for u, (_, _, slopes) in table.channels.items() if str(index) in slopes]
        near = sum(sample.reading.units.get(unit, 0.0) for unit in units)
        found.setdefault(table.groups[index][0], []).append((sample.widths[index], near))
    return {name: sorted(points) for name, points in found.items()}


def plot_cliffs(table: LatencyTable, path: Path, kept: Mapping[str, int] | None = None) -> Path:
    """Write the plot, with a line at the width that a plan has `kept` of a group; needs matplotlib."""
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise VssError("the width-cliff plot needs matplotlib: pip install matplotlib.") from error
    found = cliffs(table)
    if not found:
        raise VssError("the table has no scanned widths; build it with at least one cliff.")
    figure = Figure(figsize=(6, 3.2 * len(found)), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(len(found), squeeze=False)[:, 0], found.items(), strict=True):
        axes.plot(*zip(*points, strict=True), marker="o", color="#2b6cb0")
        axes.set(title=f"{name} on {table.key['backend']}", xlabel="width (channels)", ylabel="ms of its layers")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if kept and name in kept:
            axes.axvline(kept[name], color="#c05621", linestyle="--", label=f"kept: {kept[name]}")
            axes.legend(frameon=False)
    with atomic(path) as temporary:
        FigureCanvasSVG(figure).print_svg(str(temporary), metadata={"Date": None})
    return path
