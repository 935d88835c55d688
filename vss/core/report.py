"""report.json: everything one run found out, as data; `vss.run.page` shows it.

Metric keys carry their unit (`latency_ms_p50`, `miou_pct`, `params_m`, `macs_g`, `size_mib`). The structure is checked
on writing and on reading. JSON has no NaN: such a value becomes null, and `nulls` says which one and what it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from vss.core.environment import environment
from vss.core.errors import VssError, fault
from vss.core.files import read_json, write_json

__all__ = ["KIND", "SCHEMA", "Report", "environment", "read_report", "write_report"]

KIND = "vss.report"
SCHEMA = 1
Value = float | int | str | bool | None
Percent = Annotated[float, Field(ge=-1e-6, le=100 + 1e-6)]
Byte = Annotated[int, Field(ge=0, le=255)]


def _relative(path: str) -> str:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise ValueError(f"{path!r} must be a path below the report's own folder")
    return path


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Step(_Part):
    """One step of the run; `seconds` is wall time, `detail` a sentence."""

    name: str
    status: Literal["ok", "failed", "skipped", "not passed", "not measured"]
    seconds: float | None = None
    detail: str | None = None


class Row(BaseModel):
    """The figures of one network; further keys are welcome when their values are scalars."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Value] = Field(init=False)
    name: str
    params_m: float | None = None
    macs_g: float | None = None
    miou_pct: Percent | None = None
    pixel_acc_pct: Percent | None = None
    ap_pct: Percent | None = None
    fnr_pct: Percent | None = None
    latency_ms_p50: float | None = None
    latency_ms_p99: float | None = None
    fps: float | None = None
    speedup: float | None = None
    speedup_per_mac_reduction: float | None = None
    size_mib: float | None = None


class CurvePoint(BaseModel):
    """One logged moment of a training: `epoch` or `step`, and what was known then."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Value] = Field(init=False)
    epoch: float | None = None
    step: int | None = None
    loss: float | None = None
    val_miou_pct: Percent | None = None
    val_ap_pct: Percent | None = None
    lr: float | None = None


class Width(_Part):
    """Channels of one group before and after pruning."""

    id: str
    before: int = Field(gt=0)
    after: int = Field(ge=0)

    @model_validator(mode="after")
    def _shrinks(self) -> Self:
        if self.after > self.before:
            raise ValueError(f"group {self.id!r} grows from {self.before} to {self.after} channels")
        return self


class Locked(_Part):
    """A layer that pruning left alone, and why."""

    layer: str
    reason: str


class Panel(_Part):
    """Pictures of one image, as PNG paths relative to the report: `image`, `truth`, `baseline`, `pruned`, ..."""

    id: str
    files: dict[str, Annotated[str, AfterValidator(_relative)]]
    note: str | None = None


class Worst(_Part):
    """An image among the worst, and `why`: its mean IoU by row, over the classes in its truth, and what is confused
    most: true class, predicted class (indices) and percent of the image."""

    id: str
    why: str
    scores: dict[str, Percent | None]
    confused: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], Percent] | None = None


class Decisions(_Part):
    """Decisions of one network on the reported split: from each `score` (log-odds, falling) on, precision, recall,
    misses and false alarms; `defective` and `sound` count images between `edges`."""

    threshold: float
    score: list[float]
    precision_pct: list[Percent]
    recall_pct: list[Percent]
    misses: list[Annotated[int, Field(ge=0)]]
    false_alarms: list[Annotated[int, Field(ge=0)]]
    edges: list[float]
    defective: list[Annotated[int, Field(ge=0)]]
    sound: list[Annotated[int, Field(ge=0)]]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        points = {len(values) for values in (self.precision_pct, self.recall_pct, self.misses, self.false_alarms)}
        if points != {len(self.score)}:
            raise ValueError(f"{len(self.score)} scores, and curves of {points} points")
        if {len(self.defective), len(self.sound)} != {len(self.edges) - 1}:
            raise ValueError(f"{len(self.edges)} edges, and {len(self.defective)} and {len(self.sound)} bins")
        return self


class Artefact(_Part):
    """What was built for one row: runtime, `BuildSpec` as a dictionary, role -> file below the report, and its hash."""

    backend: str
    spec: dict[str, object] = {}
    files: dict[str, Annotated[str, AfterValidator(_relative)]]
    sha256: dict[str, str]


class Built(_Part):
    """An engine that was built for a GPU which need not be here, and so was not run; without `file` it could not be
    built, and `sentence` says why. `layers` counts engine layers by the type that they compute in."""

    name: str
    runtime: str
    version: str | None = None
    targets: list[str] = []
    precision: str
    file: Annotated[str, AfterValidator(_relative)] | None = None
    sha256: str | None = None
    size_mib: float | None = None
    build_seconds: float | None = None
    layers: dict[str, int] | None = None
    passed: bool
    sentence: str


class Defect(Panel):
    """Pictures of one image that is defective or was called so: `image`, `mask`, `heat`; what the engine thinks of it,
    whether it misses, and whether there is a defect: without one, it is a false alarm."""

    score: float = Field(ge=0, le=1)
    missed: bool
    defective: bool = True


class Session(BaseModel):
    """What the page reads of one session of a benchmark, which says more."""

    latency_ms_p50: float | None = None
    stages_ms_p50: dict[str, Annotated[float, Field(ge=0)]] | None = None


class Judged(BaseModel):
    """What the page reads of one check of the gate, which says more."""

    what: str = ""
    metric: str = ""
    baseline: float = 0
    candidate: float = 0
    drop_interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    max_drop: float | None = None
    passed: bool | None = None
    sentence: str = ""
    all_classes: Judged | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if "baseline" in self.model_fields_set and "candidate" not in self.model_fields_set:
            raise ValueError("a baseline without a candidate")
        return self


def _checks_are_whole(gate: dict[str, object]) -> dict[str, object]:
    for check in TypeAdapter(list[Judged]).validate_python(gate.get("checks", []), strict=True):
        if "baseline" in check.model_fields_set and not (check.what and check.metric):
            raise ValueError("a check without a name or figure")
    return gate


def _sessions_are_whole(bench: dict[str, object]) -> dict[str, object]:
    for part in (bench, *(value for value in bench.values() if isinstance(value, Mapping))):
        TypeAdapter(dict[str, Session] | None).validate_python(part.get("sessions"), strict=True)
    return bench


class Report(_Part):
    """The schema of report.json."""

    kind: Literal["vss.report"] = "vss.report"
    schema_: int = Field(default=SCHEMA, alias="schema", ge=1, le=SCHEMA)
    name: str
    status: Literal["ok", "failed"]
    created: str | None = None
    seconds: float | None = None
    command: str | list[str] | None = None
    protocol: str | None = None
    environment: dict[str, object] = {}
    recipe: dict[str, object] = {}
    inputs: dict[str, str] = {}
    steps: list[Step] = []
    rows: list[Row] = []
    curves: dict[str, list[CurvePoint]] = {}
    groups: list[Width] = []
    locked: list[Locked] = []
    classes: list[str] = []
    palette: list[Annotated[list[Byte], Field(min_length=3, max_length=3)]] = []
    iou_pct: dict[str, list[Percent | None]] = {}
    confusion: dict[str, list[list[Annotated[int, Field(ge=0)]]]] = {}
    class_drops: dict[str, list[Annotated[list[float], Field(min_length=2, max_length=2)] | None]] = {}
    worst: list[Worst] = []
    decisions: dict[str, Decisions] = {}
    panels: list[Panel] = []
    defects: list[Defect] = []
    checks: dict[str, object] = {}
    bench: Annotated[dict[str, object], AfterValidator(_sessions_are_whole)] = {}
    gate: Annotated[dict[str, object], AfterValidator(_checks_are_whole)] = {}
    precision: dict[str, object] = {}
    plan: dict[str, object] = {}
    export: dict[str, object] = {}
    inspector: dict[str, object] = {}
    artefacts: dict[str, Artefact] = {}
    built: list[Built] = []
    nulls: dict[str, str] = {}

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names):
            raise ValueError(f"two rows share a name: {', '.join(names)}")
        for name, values in self.iou_pct.items():
            if len(values) != len(self.classes):
                raise ValueError(f"iou_pct of {name!r} has {len(values)} values for {len(self.classes)} classes")
        count = len(self.classes)
        for name, matrix in self.confusion.items():
            if {len(matrix), *map(len, matrix)} != {count}:
                raise ValueError(f"the confusion of {name!r} is not {count} x {count}, for {count} classes")
        for name, spans in self.class_drops.items():
            if len(spans) != count:
                raise ValueError(f"class_drops of {name!r} has {len(spans)} intervals for {count} classes")
        for each in self.worst:
            if each.confused and max(each.confused[:2]) >= count:
                raise ValueError(f"{each.id!r} confuses class {max(each.confused[:2])} of {count} classes")
        if self.palette and self.classes and len(self.palette) < len(self.classes):
            raise ValueError(f"the palette has {len(self.palette)} colours for {len(self.classes)} classes")
        return self


def write_report(path: Path | str, data: Mapping[str, object] | Report) -> Path:
    """Check the structure and write it whole or not at all; raises `VssError` naming the key that is wrong.

    Paths become text, numpy scalars and arrays become numbers and lists, NaN and infinities become null and are listed
    under `nulls` with what they were.
    """
    raw: dict[str, Any] = data.model_dump(by_alias=True, exclude_unset=True) if isinstance(data, Report) else dict(data)
    nulls: dict[str, str] = dict(raw.pop("nulls", {}))
    clean = _plain(raw, "", nulls)
    if nulls:
        clean["nulls"] = nulls
    return write_json(path, _check(clean, "the report to be written"))


def read_report(path: Path | str) -> dict[str, Any]:
    """The checked content of a report.json; absent keys stay absent. Raises `VssError` for any other file."""
    return _check(read_json(path, kind=KIND, schema=SCHEMA), str(path))


def _check(data: Mapping[str, object], what: str) -> dict[str, Any]:
    try:
        report = Report.model_validate(data)
    except ValidationError as error:
        raise VssError(f"{what} does not follow the report schema at {fault(error)}.") from error
    head = {"kind": KIND, "schema": report.schema_}
    return head | report.model_dump(by_alias=True, exclude_unset=True)


def _plain(value: object, place: str, nulls: dict[str, str]) -> Any:
    """JSON types only; every non-finite number is recorded in `nulls` under its place."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{place}.{key}".lstrip("."), nulls) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [_plain(item, f"{place}.{index}".lstrip("."), nulls) for index, item in enumerate(items)]
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), place, nulls)
    if isinstance(value, float) and not math.isfinite(value):
        nulls[place] = f"was {value}"
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise VssError(f"the report holds a {type(value).__name__} at {place}; it can hold JSON values only.")
