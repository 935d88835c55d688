"""Planted causes are named: a width of 51 among 48, 56 and 64, a net that is all resize, a run on one thread."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss.core.errors import VssError
from vss.core.files import sha256_file, write_json
from vss.data.preprocess import Preprocess
from vss.deploy import BACKENDS, export
from vss.deploy.profile.setting import Setting, cut_to
from vss.deploy.profile.units import Reading, Shape
from vss.prune import Plan, find_groups
from vss.run.explain import Facts, _interleaved, causes, explain, finished, measure, request, rows, summary


class Line(nn.Module):
    """3x3 convolutions one after another, a 1x1 head, and a resize by `factor`."""

    name, size_multiple, task = "line", 1, "segmentation"

    def __init__(self, widths: list[int], classes: int = 4, factor: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        sides = [3, *widths]
        pairs = zip(sides, widths, strict=False)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, stride=factor if a == 3 else 1) for a, b in pairs)
        self.head, self.factor = nn.Conv2d(widths[-1], classes, 1), factor
        self.num_classes, self.options = classes, {"widths": widths}

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for conv in self.convs:
            x = F.relu(conv(x))
        x = self.head(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False) if self.factor > 1 else x


def engines(
    net: Line, kept: list[int], size: tuple[int, int], folder: Path, labels: bool = True
) -> tuple[Path, Path, Any]:
    """Exported files of a network and of its cut, and the plan."""
    groups = list(find_groups(net, torch.zeros(1, 3, *size)))
    kept_groups = tuple(group.keep(torch.arange(count)) for group, count in zip(groups, kept, strict=True))
    plan = Plan(model="Line", weights_sha256="", criterion="none", budget={}, groups=kept_groups)
    for name, each in (("baseline", net), ("finetuned", cut_to(net, groups, kept))):
        export(each, folder / "engine" / f"{name}.onnx", size=size, preprocess=Preprocess(size=size), labels=labels,
               parity_batches=(1,))  # fmt: skip
    return folder / "engine" / "baseline.onnx", folder / "engine" / "finetuned.onnx", plan


def by_law(facts: Facts) -> Facts:
    """The same engines and units, with times of a machine on which a width that is no multiple of 8 costs double."""

    def read(reading: Reading, shapes: Mapping[str, Shape]) -> Reading:
        odd = {unit: 2.0 if (shapes[unit].cin % 8 and shapes[unit].cin != 3) or shapes[unit].cout % 8 else 1.0
               for unit in reading.units if unit in shapes}  # fmt: skip
        units = {unit: 1e-7 * shapes[unit].macs * odd[unit] for unit in odd if shapes[unit].macs}
        return Reading(units, sum(units.values()))

    return dataclasses.replace(
        facts,
        before=read(facts.before, facts.shapes_before),
        after=read(facts.after, facts.shapes_after),
        others={name: read(reading, facts.other_shapes[name]) for name, reading in facts.others.items()},
        all_threads=None,
        one_thread=None,
    )


def test_a_width_of_51_is_named_with_one_that_does_more(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    before, after, plan = engines(Line([64, 64, 64, 64]).eval(), [48, 51, 56, 64], (64, 64), tmp_path)
    facts = by_law(measure(before, after, plan, Setting(threads=1), seconds=0.05, rounds=1))
    found = {row.unit: row for row in rows(facts)}
    odd = {row.unit: row.better for row in found.values() if row.reason == "misaligned width"}
    assert set(odd) == {"convs.1", "convs.2"}  # 48 -> 51 -> 56 -> 64
    cin, cout = (int(part.split()[0]) for part in odd["convs.1"].split(" -> "))
    assert (cin, cout % 8) == (48, 0)
    cin, cout = (int(part.split()[0]) for part in odd["convs.2"].split(" -> "))
    assert (cin % 8, cout % 8) == (0, 0)
    assert "misaligned width" in [each["cause"] for each in causes(rows(facts), facts)]
    assert found["convs.2"].macs_before == 64 * 64 * 9 * 64 * 64
    assert found["convs.2"].macs_after == 51 * 56 * 9 * 64 * 64
    assert found["convs.2"].ms_after == pytest.approx(2e-7 * found["convs.2"].macs_after)


def test_a_network_that_is_all_resize_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    net = Line([32, 32, 32], classes=24, factor=8).eval()
    before, after, plan = engines(net, [16, 16, 16], (128, 128), tmp_path, labels=False)
    facts = measure(before, after, plan, Setting(threads=1), seconds=0.3, rounds=2)
    found = rows(facts)
    resize = next(row for row in found if row.unit.startswith("Resize"))
    assert resize.reason == "resize"
    assert resize.ms_after > 0.3 * sum(facts.after.units.values())
    assert "resize" in [each["cause"] for each in causes(found, facts)]
    assert resize.lost_ms == pytest.approx(
        resize.ms_after - resize.ms_before / summary(facts)["mac_reduction"], rel=1e-6
    )


def planted(**changes: Any) -> Facts:
    """Two layers of equal work, halved in MACs; the whole takes what its units take."""
    wide, half = Shape(64, 64, 100, 400_000, 1000), Shape(45, 45, 100, 200_000, 700)
    before, after = {"a": 4.0, "b": 4.0, "ArgMax:x": 0.1}, {"a": 2.0, "b": 2.0, "ArgMax:x": 0.1}
    own = {"ArgMax:x": Shape(4, 1, 100, 0, 1000)}
    facts = Facts(
        Reading(before, 8.1), Reading(after, 4.1), {"a": wide, "b": wide, **own}, {"a": half, "b": half, **own}, {}, {},
        threads=1, cores=1, all_threads=None, one_thread=None, bandwidth=1e9,
    )  # fmt: skip
    return dataclasses.replace(facts, **changes)


def slow(unit: str, ms: float, **changes: Any) -> Facts:
    facts = planted()
    units = facts.after.units | {unit: ms}
    return planted(after=Reading(units, sum(units.values())), **changes)


def reason_of(facts: Facts, unit: str) -> str:
    return next(row.reason for row in rows(facts) if row.unit == unit)


def test_a_layer_that_gained_has_no_reason() -> None:
    assert [row.reason for row in rows(planted()) if row.unit in "ab"] == ["", ""]
    assert all(row.efficiency == pytest.approx(1) for row in rows(planted()) if row.unit in "ab")


def test_every_cause_is_told_from_the_others() -> None:
    assert reason_of(slow("b", 3.9), "b") == "narrower layers use the kernel less"
    assert reason_of(slow("b", 3.9, bandwidth=300.0), "b") == "memory-bound"
    assert reason_of(slow("b", 0.02), "b").startswith("off the critical path")
    many = {f"n{i}": 0.1 for i in range(30)}
    tiny = slow("b", 0.3)
    tiny = dataclasses.replace(tiny, after=Reading(many | {"b": 0.3}, 3.3), before=Reading(many | {"b": 0.4}, 3.4))
    assert reason_of(tiny, "b") == "launch-bound"
    facts = slow("b", 3.9, threads=4, cores=4, one_thread=Reading({"a": 8.0, "b": 4.2}, 12.0))
    assert reason_of(facts, "b") == "single-threaded: no faster on 4 threads than on one"
    shapes = {"up 16": {"b": Shape(48, 48, 100, 230_000, 800)}}
    facts = slow("b", 3.9, others={"up 16": Reading({"b": 2.2}, 4.3)}, other_shapes=shapes)
    assert reason_of(facts, "b") == "misaligned width"
    assert next(row.better for row in rows(facts) if row.unit == "b") == "48 -> 48 in 2.200 ms, no slower"
    facts = slow("b", 3.9, others={"up 16": Reading({"b": 4.0}, 6.1)}, other_shapes=shapes)  # more MACs, but slower
    shapes["up 16"]["b"] = Shape(48, 64, 100, 300_000, 800)
    assert next(row.better for row in rows(facts) if row.unit == "b") == "48 -> 64 in 4.000 ms, 1.46x the work per ms"
    same = slow("ReorderInput:x", 1.0)
    assert reason_of(same, "ReorderInput:x") == "reformat between layers"
    assert reason_of(slow("Resize:x", 1.0), "Resize:x") == "resize"


def test_a_run_on_one_thread_is_named_with_what_it_costs() -> None:
    facts = planted(cores=4, all_threads=Reading({}, 1.2))
    [first, *_] = causes(rows(facts), facts)
    assert first["cause"] == "single-threaded: 1 of 4 cores"
    assert first["lost_ms"] == pytest.approx(2.9)
    assert first["share"] == pytest.approx(2.9 / 4.1)
    assert not any("single" in each["cause"] for each in causes(rows(planted()), planted()))


def test_requests_are_compared_with_the_engine() -> None:
    session = {"latency_ms_p50": 20.0, "stages_ms_p50": {"decode": 12.0, "engine": 5.0}}
    report = {"bench": {"end_to_end": {"sessions": {"engine pruned": session}}}}
    assert request(report)["engine pruned"]["engine_share"] == pytest.approx(0.25)
    assert request({}) == {}


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VssError, match=r"engine/baseline.onnx does not exist; vss explain takes the folder"):
        explain(tmp_path)


def test_rounds_that_differ_are_noise() -> None:
    times = {"a": iter([2.0, 3.0, 2.5]), "b": iter([1.0, 1.1, 1.0])}
    found, noise = _interleaved(
        {name: (Path(name), 1) for name in times}, lambda path, _: Reading({"u": 1.0}, next(times[path.name])), 3
    )
    assert noise == pytest.approx(0.5)
    assert (found["a"].total, found["b"].total) == (2.0, 1.0)
    assert summary(planted(noise=noise))["noise"] == noise


def write_run(folder: Path, **changes: Any) -> None:
    """The report of a run whose engines and plan lie in the folder."""
    names = {"engine baseline": "engine/baseline.onnx", "engine pruned": "engine/finetuned.onnx"}
    built = {
        title: {"backend": "onnxruntime", "files": {"onnx": name}, "sha256": {"onnx": sha256_file(folder / name)}}
        for title, name in names.items()
    }
    report = {"kind": "vss.report", "schema": 1, "name": "x", "status": "ok", "artefacts": built,
              "recipe": {"build": {"backend": "onnxruntime", "threads": 1}},
              "inputs": {"plan.json": sha256_file(folder / "plan.json")}}  # fmt: skip
    write_json(folder / "report.json", report | changes)


def test_a_run_that_is_not_finished_or_has_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    for name in ("engine/baseline.onnx", "engine/finetuned.onnx", "plan.json"):
        (tmp_path / name).write_bytes(name.encode())
    with pytest.raises(VssError, match=r"report.json does not exist; vss explain takes the folder of a finished"):
        finished(tmp_path)
    write_run(
        tmp_path, status="failed", steps=[{"name": "gate", "status": "ok"}, {"name": "bench", "status": "failed"}]
    )
    with pytest.raises(VssError, match=r"is not finished, bench failed; the same `vss run` with --out .* finishes it"):
        finished(tmp_path)
    write_run(tmp_path)
    assert finished(tmp_path)[1]["finetuned"] == tmp_path / "engine" / "finetuned.onnx"
    for name in ("plan.json", "engine/baseline.onnx", "engine/finetuned.onnx"):
        write_run(tmp_path)
        (tmp_path / name).write_bytes(b"other " + name.encode())
        with pytest.raises(VssError, match=rf"{name} is not the file that .*report.json tells of"):
            finished(tmp_path)
    missing = BACKENDS["tensorrt"].unavailable()
    if missing:
        with pytest.raises(VssError, match=re.escape(missing)):
            write_run(tmp_path, recipe={"build": {"backend": "tensorrt"}})
            explain(tmp_path)
    with pytest.raises(VssError, match="onnxruntime is timed in fp32 or int8 on cpu; got fp16 on cpu"):
        write_run(tmp_path)
        explain(tmp_path, precision="fp16")


def test_a_run_is_explained_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    _, _, plan = engines(Line([16, 16]).eval(), [8, 8], (16, 16), tmp_path)
    plan.save(tmp_path / "plan.json")
    write_run(tmp_path)
    figures = explain(tmp_path, seconds=0.05, rounds=1)
    assert figures["mac_reduction"] == pytest.approx((3 * 16 * 9 + 256 * 9 + 64) / (3 * 8 * 9 + 64 * 9 + 32))
    assert figures["speedup_per_mac_reduction"] == pytest.approx(figures["speedup"] / figures["mac_reduction"])
    assert {row["unit"] for row in figures["rows"]} >= {"convs.0", "convs.1", "head"}


def test_what_did_not_run_in_int8_is_named_with_its_reason() -> None:
    kernels = {"a": ("int8", "jit_avx2_I8"), "b": ("fp32", "brgconv"), "ArgMax:x": ("fp32", "jit")}
    after = dataclasses.replace(planted().after, kernels=kernels)
    assert summary(planted(after=after))["floating"] == []
    [left] = summary(planted(after=after, kept={"b": "last layer"}))["floating"]
    assert left == {"why": "last layer", "precision": "fp32", "ms": 2.0, "units": ["b"]}
    assert summary(planted(after=after, kept={}))["floating"][0]["why"].startswith("the file quantises them")
    assert next((r.precision, r.kernel) for r in rows(planted(after=after)) if r.unit == "a") == kernels["a"]


@pytest.mark.parametrize("backend", ["openvino", None])
def test_layers_of_a_run_are_timed_in_its_runtime_or_another_one(backend: str | None, tmp_path: Path) -> None:
    missing = BACKENDS["openvino"].unavailable()
    if missing:
        pytest.skip(missing)
    (tmp_path / "engine").mkdir()
    _, _, plan = engines(Line([16, 16]).eval(), [8, 8], (16, 16), tmp_path)
    plan.save(tmp_path / "plan.json")
    write_run(tmp_path, recipe={"build": {"backend": "onnxruntime" if backend else "openvino", "threads": 1}})
    figures = explain(tmp_path, backend=backend, precision="int8", seconds=0.02, rounds=1)
    assert (figures["backend"], figures["precision"]) == ("openvino", "int8")
    ran = {row["unit"]: row["precision"] for row in figures["rows"] if row["macs_after"]}
    assert ran == {"convs.0": "int8", "convs.1": "int8", "head": "fp32"}
    assert [(each["why"], each["units"]) for each in figures["floating"]] == [("last layer", ["head"])]
