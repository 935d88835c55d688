"""Latency tables, targets and explanations on TensorRT: real bindings, simulated engines that follow a known law."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt as trt
import torch
from simulated import BLOCK, Simulated, conv_ms, pixels

from tests.run.test_explain import Line
from vss.core.config import LatencyConfig, PruneConfig
from vss.core.errors import VssError
from vss.data.preprocess import Preprocess
from vss.deploy import BuildPlan, export
from vss.deploy.profile.build import Effort, build
from vss.deploy.profile.setting import Setting, cut_to, groups_and_key
from vss.deploy.profile.subject import open_subject
from vss.deploy.profile.table import LatencyTable
from vss.prune import Plan, find_groups
from vss.run import explain
from vss.run.latency import LatencyGoal, Measured

SIZE = (32, 48)
EFFORT = Effort(vectors=1, coarse=16, batch=8, limit=16, tests=4, cliffs=1)
WIDTHS = [64, 96, 64]


@pytest.fixture
def simulated(in_process: None, driver: None, host_torch: None, monkeypatch: pytest.MonkeyPatch) -> Simulated:
    return Simulated(monkeypatch, SIZE)


def law(widths: list[int]) -> dict[str, float]:
    sides = [3, *widths]
    area = SIZE[0] * SIZE[1]
    convs = {f"convs.{i}": conv_ms(sides[i], sides[i + 1], 9, area) for i in range(len(widths))}
    return convs | {"head": conv_ms(widths[-1], 4, 1, area)}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_layers_are_timed_under_their_own_names(precision: str, simulated: Simulated, tmp_path: Path) -> None:
    setting = Setting("tensorrt", precision=precision, options={"labels": False})
    assert setting.device == "cuda" and setting.on_gpu
    subject = open_subject(Line(WIDTHS).eval(), tmp_path, Preprocess(size=SIZE), setting, seconds=0.01)
    widths = [64, 51, 64]
    reading = subject.read(widths)
    wanted = law(widths)
    assert {name: reading.units[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    assert {name.partition(":")[0] for name in reading.units.keys() - wanted.keys()} <= {"Reformat", "Cast", "kgen"}
    assert sum(reading.units.values()) == pytest.approx(sum(simulated.times.values()), rel=1e-6)
    assert reading.total >= sum(reading.units.values())
    casts = {node.op_type for node in onnx.load_from_string(simulated.parsed[-1]).graph.node}
    assert ("QuantizeLinear" in casts) == (precision == "int8")
    halves = {each.data_type for each in onnx.load_from_string(simulated.parsed[-1]).graph.initializer}
    assert (onnx.TensorProto.FLOAT16 in halves) == (precision != "fp32")
    assert simulated.log.asked_by_us() == []


def test_a_profile_leaves_the_session_as_it_was(simulated: Simulated, tmp_path: Path) -> None:
    onnx_path = tmp_path / "line.onnx"
    export(
        Line(WIDTHS).eval(), onnx_path, size=SIZE, preprocess=Preprocess(size=SIZE), labels=False, parity_batches=(1,)
    )
    session: Any = Setting("tensorrt").engine(onnx_path, tmp_path / "line")
    before = session.run(pixels(SIZE))
    times = session.profile(pixels(SIZE), 5)
    assert times == {name: [pytest.approx(ms)] * 5 for name, ms in simulated.times.items()}
    asked = len(simulated.log.of("IExecutionContext", "profiler"))
    after = session.run(pixels(SIZE))
    assert {name: value.shape for name, value in after.items()} == {name: v.shape for name, v in before.items()}
    assert (asked, len(simulated.log.of("IExecutionContext", "profiler"))) == (1, 1)
    (profiler,) = simulated.log.of("IExecutionContext", "profiler")[0]
    assert isinstance(profiler, trt.IProfiler)
    session.close()


def test_a_table_finds_the_blocks_of_the_engine_and_predicts_it(simulated: Simulated, tmp_path: Path) -> None:
    setting = Setting("tensorrt", precision="fp16", options={"labels": False}, plan=BuildPlan(optimisation_level=2))
    net, preprocess = Line(WIDTHS).eval(), Preprocess(size=SIZE)
    subject = open_subject(net, tmp_path, preprocess, setting, seconds=0.01)
    path = tmp_path / "table.json"
    table = build(subject, path, effort=replace(EFFORT, passes=1))  # layers, read below, take what the law says at once
    assert table.step == BLOCK
    assert {"convs.0", "convs.1", "convs.2", "head"} <= set(table.channels)
    assert table.error["units_median"] < 0.02
    assert simulated.log.of("IBuilderConfig", "builder_optimization_level")[0] == (2,)
    key = LatencyTable.load(path).key
    assert (key["backend"], key["precision"], key["threads"]) == ("tensorrt", "fp16", None)
    assert key["build"]["optimisation_level"] == 2
    assert setting.command("T") == (
        "vss lut build --ckpt CKPT --save T --backend tensorrt --precision fp16 --no-labels --level 2"
    )
    whole = BuildPlan(workspace_mib=64, hardware="AMPERE_PLUS", version_compatible=True, tf32=False, flags=("REFIT",))
    assert (
        Setting("tensorrt", plan=whole)
        .command("T")
        .endswith("--flag REFIT --workspace-mib 64 --hardware ampere_plus --version-compatible --no-tf32")
    )
    other = groups_and_key(net, SIZE, Setting("tensorrt", precision="fp16", options={"labels": False}))[1]
    with pytest.raises(VssError, match=r"holds for build .* build one here: vss lut build"):
        table.check(other, path=path, command=setting.command("T"))


def test_a_target_is_reached_by_the_engines_themselves(
    simulated: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop on engines that are really built; only the clock is the law's, so that a busy machine does not count."""

    def measured(uncut: Any, cut: Any, feed: Any, seconds: float, allowed: float) -> Measured:
        marks = [simulated.spent]
        for session in (uncut, cut):
            assert session.describe()["backend"] == "tensorrt"
            session.run(feed)
            marks.append(simulated.spent)
        ms = np.diff(marks)
        return Measured(ms[0], ms[1], ms[1] / ms[0], ms[1] / ms[0], ms[1] / ms[0])

    monkeypatch.setattr("vss.run.latency.measure", measured)
    setting = Setting("tensorrt", precision="fp16", options={"labels": False})
    net, preprocess = Line([128, 128, 128]).eval(), Preprocess(size=SIZE)
    table = build(open_subject(net, tmp_path, preprocess, setting, seconds=0.01), tmp_path / "t.json", effort=EFFORT)
    task = SimpleNamespace(export_options=lambda: {"labels": False}, classes=tuple("abcd"))
    export_config = SimpleNamespace(opset=20, preprocess=True, plugins=False)
    project: Any = SimpleNamespace(preprocess=preprocess, task=task, recipe=SimpleNamespace(export=export_config))
    config = PruneConfig(criterion="l1", latency=LatencyConfig(target="0.5x", precision="fp16"))
    goal = LatencyGoal(project, net, config, table, setting)
    groups = list(find_groups(net, torch.zeros(1, 3, *SIZE)))
    generator = torch.Generator().manual_seed(0)
    kept = goal(groups, {group.id: torch.rand(group.channels, generator=generator) for group in groups}, None)
    widths = [len(kept[group.id]) for group in groups]
    assert goal.record["met"] and (goal.record["backend"], goal.record["precision"]) == ("tensorrt", "fp16")
    assert sum(law(widths).values()) / sum(law([128, 128, 128]).values()) == pytest.approx(0.5, rel=0.06)
    assert all(width % BLOCK == 0 for width in widths) and len(set(widths)) > 1
    parsed = [onnx.load_from_string(each) for each in simulated.parsed[-2:]]
    assert all(10 in {each.data_type for each in model.graph.initializer} for model in parsed)


def test_a_width_of_51_is_explained(simulated: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vss.run.explain.bandwidth", lambda device: 1e12)
    net, kept = Line(WIDTHS).eval(), [48, 51, 64]
    groups = list(find_groups(net, torch.zeros(1, 3, *SIZE)))
    options: dict[str, Any] = {"size": SIZE, "preprocess": Preprocess(size=SIZE), "labels": False}
    for name, each in (("before", net), ("after", cut_to(net, groups, kept))):
        export(each, tmp_path / f"{name}.onnx", parity_batches=(1,), **options)
    kept_groups = tuple(group.keep(torch.arange(count)) for group, count in zip(groups, kept, strict=True))
    plan = Plan(model="Line", weights_sha256="", criterion="none", budget={}, groups=kept_groups)
    setting = Setting("tensorrt", precision="fp16")
    facts = explain.measure(tmp_path / "before.onnx", tmp_path / "after.onnx", plan, setting, seconds=0.01, rounds=2)
    assert facts.threads == facts.cores == 1 and facts.all_threads is facts.one_thread is None
    found = {row.unit: row for row in explain.rows(facts)}
    assert found["convs.1"].ms_after == pytest.approx(conv_ms(48, 51, 9, SIZE[0] * SIZE[1]), rel=1e-6)
    assert found["convs.1"].reason == "misaligned width"
    assert found["convs.1"].better.startswith("48 -> 64 in") and found["convs.1"].better.endswith("no slower")
    half = np.float16(0).itemsize
    area, weights = SIZE[0] * SIZE[1], 48 * 51 * 9 + 51
    assert facts.shapes_after["convs.1"].bytes == half * (area * (48 + 51) + weights)
    assert found["convs.0"].reason == ""


def test_several_layers_in_one_share_its_time_by_macs(simulated: Simulated, tmp_path: Path) -> None:
    setting = Setting("tensorrt", options={"labels": False})
    subject: Any = open_subject(Line(WIDTHS).eval(), tmp_path, Preprocess(size=SIZE), setting, seconds=0.01)
    graph, full = subject._graph, [64, 96, 64]
    convs = [node.name for node in graph.nodes.values() if node.op_type == "Conv"]
    layer = {"Name": "{ForeignNode[" + convs[1] + "..." + convs[2] + "]}", "LayerType": "Myelin"}
    shares = graph.engine_layer(layer, lambda: subject.shapes(full))
    assert shares == pytest.approx({"convs.1": 0.5, "convs.2": 0.5})  # 64 x 96 and 96 x 64
    both = {"Name": "x", "Metadata": f"[ONNX Layer: {convs[0]}]\x1f[ONNX Layer: {convs[1]}]"}
    shares = graph.engine_layer(both, lambda: subject.shapes(full))
    assert shares == pytest.approx({"convs.0": 3 / 99, "convs.1": 96 / 99})


def test_without_a_driver_the_sentence_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ctypes.CDLL

    def missing(name: str, **options: Any) -> Any:
        if name == "libcuda.so.1":
            raise OSError(name)
        return real(name, **options)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(VssError, match="no libcuda"):
        open_subject(Line(WIDTHS).eval(), tmp_path, Preprocess(size=SIZE), Setting("tensorrt"))
