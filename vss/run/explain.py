"""Why a cut network is, or is not, as much faster as its MACs fell: unit by unit, from measurements.

Both engines are profiled interleaved, and with them the uncut network cut to the same widths rounded up and down to
multiples of 4, 8 and 16, so nothing is guessed: a layer that does clearly more work per millisecond at one of those had
a bad width. The time that is lost is what a unit takes above its old time divided by the whole network's MAC reduction.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vss.core.config import BuildConfig
from vss.core.errors import VssError, need
from vss.core.files import sha256_file
from vss.core.report import read_report
from vss.deploy.backends import main_of, timed_plan
from vss.deploy.onnx_file import load
from vss.deploy.profile.setting import Setting, SlicedVariants
from vss.deploy.profile.subject import bandwidth, read_file
from vss.deploy.profile.table import LatencyTable, plot_cliffs
from vss.deploy.profile.units import Graph, Reading, Shape, lookup_shape, unit_shapes, usable_threads
from vss.prune.plan import Group, Plan
from vss.run.inputs import run_files

ROUNDED = {"up 4": (4, True), "up 8": (8, True), "up 16": (16, True), "down 8": (8, False), "down 16": (16, False)}
REFORMATS = ("Reorder", "Transpose", "Cast", "Reformat", "DequantizeLinear", "QuantizeLinear")
RESIZES = ("Resize", "Upsample")
SMALL_SHARE = 0.01
GAINED = 0.9  # of the MAC reduction
NO_LOSS = 1.02  # a wider layer that takes at most this much longer costs nothing
BETTER = 1.1  # work per millisecond at another width, over that at this one, which makes this one a bad one
LAUNCHES = 4
BUSY = 0.5  # share of the copy bandwidth at which a unit is bound by memory
BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
UNASKED = "the file quantises them, and the runtime computes them so"
SCALES = 1.25  # a unit that gains less than this from all threads does not use them


@dataclass(frozen=True)
class Facts:
    """Everything measured about a cut network.

    Attributes:
        before, after: times of the uncut and the cut engine, of the same units where both have them.
        shapes_before, shapes_after: sizes of their units.
        others: key of ROUNDED -> times of the cut engine at those widths.
        other_shapes: likewise, sizes.
        threads, cores: of the run, and what this process may use.
        all_threads: times of the cut engine on all cores; None where the run had them.
        one_thread: times of the cut engine on one core; None where the run had one.
        bandwidth: bytes per millisecond of a large copy.
        noise: (longest - shortest) / shortest of the least times of one engine in different rounds, the worst engine.
        kept: of INT8, layer that its file leaves in floating point -> why; None of other precisions.
    """

    before: Reading
    after: Reading
    shapes_before: Mapping[str, Shape]
    shapes_after: Mapping[str, Shape]
    others: Mapping[str, Reading]
    other_shapes: Mapping[str, Mapping[str, Shape]]
    threads: int
    cores: int
    all_threads: Reading | None
    one_thread: Reading | None
    bandwidth: float
    noise: float = 0.0
    kept: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Row:
    """One unit. `efficiency` is its MACs per second over the best of any layer; `better` widths to take instead: wider
    and no slower where there are any, else those with the most work per millisecond, and how much more. `precision` and
    `kernel` are what the cut engine says of it, "" where its runtime does not."""

    unit: str
    cin: int
    cout: int
    ms_before: float
    ms_after: float
    macs_before: int
    macs_after: int
    efficiency: float
    lost_ms: float
    reason: str
    better: str
    precision: str = ""
    kernel: str = ""


def rows(facts: Facts) -> list[Row]:
    """All units of the cut engine, most time first."""
    reduction = _macs(facts.shapes_before) / max(1, _macs(facts.shapes_after))
    peak = max(_rates(facts.before, facts.shapes_before) + _rates(facts.after, facts.shapes_after), default=1.0)
    found = []
    for unit, ms in sorted(facts.after.units.items(), key=lambda item: -item[1]):
        old = lookup_shape(unit, dict(facts.shapes_before)) or EMPTY
        new = lookup_shape(unit, dict(facts.shapes_after)) or EMPTY
        was = facts.before.units.get(unit, 0.0)
        lost = max(0.0, ms - was / reduction)
        reason, better = _reason(unit, was, ms, old, new, facts)
        rate = new.macs / ms / peak if ms else 0.0
        ran = facts.after.kernels.get(unit, ("", ""))
        found.append(Row(unit, new.cin, new.cout, was, ms, old.macs, new.macs, rate, lost, reason, better, *ran))
    return found


EMPTY = Shape(0, 0, 0, 0, 0)


def _macs(shapes: Mapping[str, Shape]) -> int:
    return sum(shape.macs for shape in shapes.values())


def _rates(reading: Reading, shapes: Mapping[str, Shape]) -> list[float]:
    return [shapes[unit].macs / ms for unit, ms in reading.units.items() if unit in shapes and ms and shapes[unit].macs]


def _reason(unit: str, was: float, ms: float, old: Shape, new: Shape, facts: Facts) -> tuple[str, str]:
    """Why a unit did not gain what it should have, empty where it did; and a width that would be better."""
    kind = unit.partition(":")[0]
    total = sum(facts.after.units.values())
    if ms < SMALL_SHARE * total:
        return f"off the critical path: {ms / total:.1%} of the time", ""
    better = _better(unit, ms, new, facts)
    if better:
        return "misaligned width", better
    if new.macs and was / ms >= GAINED * old.macs / new.macs > 0:
        return "", ""
    if kind.startswith(REFORMATS):
        return "reformat between layers", ""
    if kind.startswith(RESIZES):
        return "resize", ""
    if ms < LAUNCHES * min(facts.after.units.values()):
        return "launch-bound", ""
    if facts.one_thread is not None and facts.one_thread.units.get(unit, np.inf) < SCALES * ms:
        return f"single-threaded: no faster on {facts.threads} threads than on one", ""
    if not new.macs or new.bytes / ms > BUSY * facts.bandwidth:
        return "memory-bound", ""
    if new.macs == old.macs:
        return "its widths are as they were", ""
    return "narrower layers use the kernel less", ""


def _better(unit: str, ms: float, new: Shape, facts: Facts) -> str:
    """Widths at which a layer does more per millisecond: the widest that is no slower, else the most efficient."""
    found = []
    for name, reading in facts.others.items():
        shape, there = facts.other_shapes[name].get(unit, EMPTY), reading.units.get(unit)
        if there and new.macs and (shape.cin, shape.cout) != (new.cin, new.cout):
            found.append((there, shape, shape.macs / there / (new.macs / ms)))
    if not any(rate > BETTER for *_, rate in found):
        return ""
    free = [each for each in found if each[0] <= NO_LOSS * ms and each[1].macs >= new.macs]
    if free:
        there, shape, _ = max(free, key=lambda each: each[1].macs)
        return f"{shape.cin} -> {shape.cout} in {there:.3f} ms, no slower"
    there, shape, rate = max(found, key=lambda each: each[2])
    return f"{shape.cin} -> {shape.cout} in {there:.3f} ms, {rate:.2f}x the work per ms"


def causes(found: Sequence[Row], facts: Facts) -> list[dict[str, object]]:
    """Reasons of the whole, most lost milliseconds first: `cause`, `lost_ms`, `share` of the time, `units`."""
    lost: dict[str, float] = defaultdict(float)
    units: dict[str, list[str]] = defaultdict(list)
    for row in found:
        if row.reason and row.lost_ms > 0:
            cause = row.reason.partition(":")[0]
            lost[cause] += row.lost_ms
            units[cause].append(row.unit)
    total = facts.after.total
    if facts.threads == 1 and facts.cores > 1 and facts.all_threads is not None:
        cause = f"single-threaded: 1 of {facts.cores} cores"
        lost[cause] = max(0.0, total - facts.all_threads.total)
        units[cause] = ["the whole engine"]
    ranked = sorted(lost, key=lambda cause: -lost[cause])
    return [
        {"cause": name, "lost_ms": lost[name], "share": lost[name] / total, "units": units[name]} for name in ranked
    ]


def floating(found: Sequence[Row], kept: Mapping[str, str]) -> list[dict[str, Any]]:
    """Layers of an INT8 engine that ran in something else, by the reason, most time first: `why`, `precision`, `ms`,
    `units`."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in found:
        if row.macs_after and row.precision not in ("int8", ""):
            groups[kept.get(row.unit, UNASKED), row.precision].append(row)
    listed = [
        {"why": why, "precision": precision, "ms": sum(r.ms_after for r in each), "units": [r.unit for r in each]}
        for (why, precision), each in groups.items()
    ]
    return sorted(listed, key=lambda each: -float(str(each["ms"])))


# -- measuring ------------------------------------------------------------------------------------------------------


def explain(
    run: Path, *, backend: str | None = None, precision: str = "fp32", seconds: float = 1.0, rounds: int = 2
) -> dict[str, Any]:
    """Everything about the engines in the folder of a finished `vss run`, JSON-ready.

    `backend`, `precision`: in which both are timed, None for the runtime of the run; `seconds` of one reading; `rounds`
    of readings of every engine, interleaved, of which the minimum counts.
    """
    report, paths = finished(run)
    build = BuildConfig(**report.get("recipe", {}).get("build", {}))
    runtime = backend or main_of(build)
    setting = Setting(runtime, precision=precision, threads=build.threads, plan=timed_plan(build, runtime))
    setting.check()
    plan = Plan.load(run / "plan.json")
    facts = measure(paths["baseline"], paths["finetuned"], plan, setting, seconds=seconds, rounds=rounds)
    return summary(facts) | {"backend": setting.backend, "precision": precision, "request": request(report)}


def finished(run: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """The report of a run and its ONNX files, "baseline" and "finetuned"; refuses what is not finished or has changed
    since the report was written."""
    paths = run_files(run)
    report = read_report(run / "report.json")
    again = f"the same `vss run` with --out {run} finishes it"
    if report["status"] != "ok":
        step = next((step["name"] for step in report.get("steps", []) if step["status"] == "failed"), "a step")
        raise VssError(f"the run in {run} is not finished, {step} failed; {again}.")
    built = report.get("artefacts", {})
    titles = {"baseline": "engine baseline", "finetuned": "engine pruned"}
    hashes = {paths[name]: built[title]["sha256"]["onnx"] for name, title in titles.items() if title in built}
    if "plan.json" in report.get("inputs", {}):
        hashes[run / "plan.json"] = report["inputs"]["plan.json"]
    for path, digest in hashes.items():
        if sha256_file(path) != digest:
            raise VssError(f"{path} is not the file that {run / 'report.json'} tells of; {again}.")
    return report, paths


def cliff_plot(run: Path, lut: Path | None, path: Path) -> Path:
    """An SVG of a latency table (None: the one that `prune.latency` has left in the folder of the run) with the widths
    that the run kept."""
    source = lut or run / "latency_table.json"
    if lut is None and not source.is_file():
        command = f"vss lut build --ckpt {run / 'baseline.safetensors'} --save TABLE"
        raise VssError(f"{run} was not pruned to a latency and has no table; give --lut TABLE, made by: {command}")
    table, plan = LatencyTable.load(source), Plan.load(run / "plan.json")
    known = {name: channels for name, channels, _ in table.groups}
    if any(known.get(group.id) != group.channels for group in plan.groups):
        raise VssError(f"{source} is a table of {table.key.get('network')} with other channels than the run's network.")
    return plot_cliffs(table, path, {group.id: len(group.kept) for group in plan.groups})


def summary(facts: Facts) -> dict[str, object]:
    """Rows, causes and the whole, JSON-ready."""
    found = rows(facts)
    reduction = _macs(facts.shapes_before) / max(1, _macs(facts.shapes_after))
    speedup = facts.before.total / facts.after.total
    return {
        "ms_before": facts.before.total,
        "ms_after": facts.after.total,
        "mac_reduction": reduction,
        "speedup": speedup,
        "speedup_per_mac_reduction": speedup / reduction,
        "threads": facts.threads,
        "cores": facts.cores,
        "noise": facts.noise,
        "causes": causes(found, facts),
        "rows": [asdict(row) for row in found],
        "floating": [] if facts.kept is None else floating(found, facts.kept),
    }


def request(report: Mapping[str, Any]) -> dict[str, Any]:
    """Engine time against the time of a whole request, from the run's own bench; empty where it has none."""
    sessions = report.get("bench", {}).get("end_to_end", {}).get("sessions", {})
    found = {}
    for name, session in sessions.items():
        stages, whole = session.get("stages_ms_p50", {}), session["latency_ms_p50"]
        if "engine" in stages:
            found[name] = {"request_ms": whole, "engine_share": stages["engine"] / whole, "stages_ms": stages}
    return found


def measure(before: Path, after: Path, plan: Plan, setting: Setting, *, seconds: float = 1.0, rounds: int = 2) -> Facts:
    """Profile the uncut and the cut engine, and the cut one with filled widths and, on a CPU, other thread counts.

    `before` and `after` are the exported float32 files, `plan` how the one became the other; see `explain`.
    """
    variants, cut = SlicedVariants(before, plan.groups), load(after)
    count, cores = setting.on_threads or 1, 1 if setting.on_gpu else usable_threads(None)
    item = BYTES[setting.precision]
    widths = [len(group.kept) for group in plan.groups]
    others = {key: rounded_widths(plan.groups, widths, *rule) for key, rule in ROUNDED.items()}
    others = {key: each for key, each in others.items() if each != widths}
    models = {"before": variants.model, "after": cut}
    models |= {key: variants.graph(each, empty=True) for key, each in others.items()}
    feed = _feed(cut)
    shapes = {key: unit_shapes(model, len(next(iter(feed.values()))), item) for key, model in models.items()}
    graph = Graph.of(variants.model)
    with tempfile.TemporaryDirectory() as name:
        files = {key: (Path(name) / f"{key}.onnx", count, key) for key in models}
        shutil.copyfile(before, files["before"][0])
        shutil.copyfile(after, files["after"][0])
        for key, each in others.items():
            variants.write(each, files[key][0])
        if count == 1 < cores:
            files["all"] = files["after"][0], cores, "after"
        elif count > 1:
            files["one"] = files["after"][0], 1, "after"

        def read(path: Path, threads: int, key: str) -> Reading:
            at = dataclasses.replace(setting, threads=None if setting.on_gpu else threads)
            return read_file(path, feed, at, graph=graph, shapes=lambda: shapes[key], seconds=seconds)

        found, noise = _interleaved(files, read, rounds)
        kept = setting.kept(files["after"][0]) if setting.precision == "int8" else None
    return Facts(
        found["before"], found["after"], shapes["before"], shapes["after"],
        {key: found[key] for key in others}, {key: shapes[key] for key in others},
        count, cores, found.get("all"), found.get("one"), bandwidth(setting.device), noise, kept,
    )  # fmt: skip


def _interleaved(
    files: Mapping[Any, tuple[object, ...]], read: Callable[..., Reading], rounds: int
) -> tuple[dict[object, Reading], float]:
    """Least times of every file over some rounds, and how far its rounds lay apart at most."""
    found: dict[object, Reading] = {}
    longest: dict[object, float] = defaultdict(float)
    for _ in range(rounds):
        for name, arguments in files.items():
            now, old = read(*arguments), found.get(name)
            longest[name] = max(longest[name], now.total)
            found[name] = now.least(old) if old is not None else now
    return found, max(longest[name] / reading.total for name, reading in found.items()) - 1


def _feed(model: Any) -> dict[str, np.ndarray]:
    onnx, value = need("onnx", "vss explain"), model.graph.input[0]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
    pixels = np.random.default_rng(0).integers(0, 256, shape)
    return {value.name: pixels.astype(dtype)}


def rounded_widths(groups: Sequence[Group], widths: Sequence[int], block: int, up: bool) -> list[int]:
    """Every width to the next multiple of a block, where there is one between a block and the whole group."""
    found = []
    for group, width in zip(groups, widths, strict=True):
        step = int(np.lcm(block, group.unit))
        near = (-(-width // step) if up else width // step) * step
        found.append(near if step <= near <= group.channels else width)
    return found
