"""The loop from a target to widths, against engines that obey another law than the prediction, and its refusals."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.deploy.profile.clockwork import Clockwork
from vss.core.config import LatencyConfig, PruneConfig, Recipe
from vss.core.errors import VssError
from vss.deploy.profile.build import Effort, build
from vss.deploy.profile.setting import Setting
from vss.prune.latency import Target
from vss.prune.plan import Plan
from vss.run import latency as target
from vss.run.latency import LatencyGoal, Measured, check_noise, correct


@pytest.mark.parametrize(
    ("text", "value", "relative"), [("0.5x", 0.5, True), (" 12 ms", 12.0, False), (".33X", 0.33, True), ("1x", 1, True)]
)
def test_targets_are_read(text: str, value: float, relative: bool) -> None:
    assert Target.parse(text) == Target(value, relative)


@pytest.mark.parametrize("text", ["0.5", "0x", "2x", "-1ms", "fast", "0ms", "1e3ms"])
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(VssError, match=r"expected 0\.5x \(at most 1x\)"):
        Target.parse(text)


def test_milliseconds_become_a_share() -> None:
    assert Target.parse("12ms").ratio(48.0) == 0.25
    assert Target.parse("0.5x").ratio(48.0) == 0.5


class World:
    """Engines that take `a * predicted + b`, behind the functions by which the loop builds and measures."""

    def __init__(
        self, a: float, b: float, monkeypatch: pytest.MonkeyPatch, noise: float = 0.001, busy: float = 1.0
    ) -> None:
        """`busy`: the first run gives a ratio that is off by this factor."""
        self.clock, self.a, self.b, self.noise, self.built = Clockwork((128, 128, 128)), a, b, noise, 0
        self.busy = [busy]
        monkeypatch.setattr(LatencyGoal, "engine", self.engine)
        monkeypatch.setattr(LatencyGoal, "feed", staticmethod(lambda session: {}))
        monkeypatch.setattr(target, "cut", lambda model, groups, kept: [len(kept[g.id]) for g in groups])
        monkeypatch.setattr(target, "measure", self.measure)

    def engine(self, model: Any, stem: Path) -> Any:
        kept = model if isinstance(model, list) else [128, 128, 128]
        self.built += 1
        return nullcontext(SimpleNamespace(ms=self.a * self.clock.read(kept).total + self.b))

    def measure(self, uncut: Any, cut: Any, feed: Any, seconds: float, allowed: float) -> Measured:
        ratio = cut.ms / uncut.ms * (self.busy.pop() if self.busy else 1.0)
        found = Measured(uncut.ms, cut.ms, ratio, ratio * (1 - self.noise), ratio * (1 + self.noise))
        return check_noise(found, allowed)


def goal_of(world: World, path: Path, text: str, **changes: Any) -> LatencyGoal:
    table = build(world.clock, path, effort=Effort(vectors=1, coarse=20, limit=20, tests=2, cliffs=0))
    settings = {"floor": changes.pop("floor", 0.1), "align": changes.pop("align", 1)}
    config = PruneConfig(criterion="l1", budget=settings, latency=LatencyConfig(target=text, **changes))
    project: Any = SimpleNamespace(recipe=SimpleNamespace(build=SimpleNamespace(threads=1)))
    return LatencyGoal(project, nn.Identity(), config, table, Setting(threads=1))


def scores(world: World) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {group.id: torch.rand(group.channels, generator=generator) for group in world.clock.groups}


@pytest.mark.parametrize("law", [(1.0, 0.0), (1.2, 0.6), (0.7, 1.5)])
@pytest.mark.parametrize("text", ["0.75x", "0.5x"])
def test_the_target_is_reached_whatever_the_engines_do(law: tuple[float, float], text: str, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    world = World(*law, monkeypatch)
    goal = goal_of(world, tmp_path / "t.json", text, tolerance=0.05)
    kept = goal(world.clock.groups, scores(world), None)
    rows = goal.record["iterations"]
    assert goal.record["met"]
    assert abs(rows[goal.record["chosen"]]["ratio"] / float(text[:-1]) - 1) <= 0.05
    runs = [row["runs"] for row in rows]
    assert runs[-1] == target.RUNS and all(
        (count > 1) == (row["off"] <= 0.1) for count, row in zip(runs, rows, strict=True)
    )
    assert world.built == 1 + sum(2 * count - 1 for count in runs) and len(rows) <= 6
    widths = rows[goal.record["chosen"]]["widths"]
    assert [len(kept[group.id]) for group in world.clock.groups] == widths
    assert all(width % 16 == 0 for width in widths)
    best = scores(world)["g0"].topk(widths[0]).indices.sort().values
    assert kept["g0"].tolist() == best.tolist()


def test_a_target_that_one_run_alone_meets_is_looked_for_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(1.0, 0.0, monkeypatch, busy=0.85)
    goal = goal_of(world, tmp_path / "t.json", "0.5x", tolerance=0.05)
    search = target.search  # by a table that promises too much
    monkeypatch.setattr(target, "search", lambda options, predict, asked: search(options, predict, asked / 0.85))
    goal(world.clock.groups, scores(world), None)
    first, *others = goal.record["iterations"]
    assert (first["runs"], first["low"]) == (3, pytest.approx(0.5, rel=0.05))
    assert first["off"] > 0.1 and others
    assert goal.record["met"] and goal.record["chosen"] == len(others)
    assert others[-1]["runs"] == 3 and abs(others[-1]["ratio"] / 0.5 - 1) <= 0.05


def test_milliseconds_are_reached_and_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1.3, 0.2, monkeypatch)
    ms = 0.6 * (1.3 * world.clock.read([128, 128, 128]).total + 0.2)
    goal = goal_of(world, tmp_path / "t.json", f"{ms:.4f}ms", tolerance=0.05)
    goal(world.clock.groups, scores(world), None)
    reached = goal.record["iterations"][goal.record["chosen"]]["ms"]
    assert reached == pytest.approx(ms, rel=0.05)
    plan = Plan(model="x", weights_sha256="0" * 64, criterion="l1", budget={}, groups=())
    assert goal.sign(plan).budget["ms"] == reached
    assert goal.sign(plan).labels == ()


def test_auto_takes_the_step_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1.0, 0.0, monkeypatch)
    goal = goal_of(world, tmp_path / "t.json", "0.6x", tolerance=0.1, align="auto")
    goal(world.clock.groups, scores(world), None)
    widths = goal.record["iterations"][goal.record["chosen"]]["widths"]
    assert goal.table.step == 16 and all(width % 16 == 0 for width in widths)
    plan = Plan(model="x", weights_sha256="0" * 64, criterion="l1", budget={}, groups=())
    found = goal.sign(plan).budget
    assert (found["align"], found["align_why"]) == (16, "auto: the latency table found that steps of 16 pay")


def test_a_target_that_was_missed_is_a_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1.0, 2.0, monkeypatch)
    goal = goal_of(world, tmp_path / "t.json", "0.7x", tolerance=0.0001, iterations=2)
    goal(world.clock.groups, scores(world), None)
    plan = Plan(model="x", weights_sha256="0" * 64, criterion="l1", budget={}, groups=())
    assert not goal.record["met"]
    assert goal.sign(plan).labels[0].startswith("latency target 0.7x missed: 0.")


def test_a_target_below_the_floor_is_refused_with_the_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1.0, 0.0, monkeypatch)
    goal = goal_of(world, tmp_path / "t.json", "0.2x", floor=0.5)
    least = world.clock.read([64, 64, 64]).total / world.clock.read([128, 128, 128]).total
    with pytest.raises(VssError, match=rf"target 0.2x is below the floor: with 50% .* takes {least:.1f}\d+x"):
        goal(world.clock.groups, scores(world), None)
    assert world.built == 1  # nothing but the uncut engine


def test_a_floor_that_only_engines_show_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1.0, 40.0, monkeypatch)
    goal = goal_of(world, tmp_path / "t.json", "0.45x", floor=0.5)
    with pytest.raises(VssError, match="is below the floor"):
        goal(world.clock.groups, scores(world), None)


def test_a_noisy_machine_is_refused_with_its_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1.0, 0.0, monkeypatch, noise=0.2)
    goal = goal_of(world, tmp_path / "t.json", "0.5x")
    with pytest.raises(VssError, match=r"too noisy: the time ratio 0\.\d+ is known to 20.0% .* and 2.0% is needed"):
        goal(world.clock.groups, scores(world), None)
    fine = Measured(10, 5, 0.5, 0.49, 0.51)
    assert check_noise(fine, 0.021) is fine
    assert fine.noise == pytest.approx(0.02)


def test_correction_stays_inside_of_the_bracket() -> None:
    assert correct(10, 0.6, 0.5, [(10, 0.6)]) == pytest.approx(10 * 0.5 / 0.6)
    tried = [(10, 0.6), (8, 0.45)]
    assert 8 < correct(8, 0.45, 0.5, tried) < 10
    assert correct(8, 0.30, 0.5, [(10, 0.6), (8, 0.30)]) == 9


def test_bench_figures_become_a_ratio_of_times() -> None:
    figures = {
        "rounds": 8,
        "speedup": {"cut": {"ratio": 2.0, "low": 1.9, "high": 2.1}},
        "sessions": {"uncut": {"latency_ms_p50": 10.0}, "cut": {"latency_ms_p50": 5.0}},
    }
    found = Measured.of(figures)
    assert (found.uncut_ms, found.ms, found.ratio) == (10.0, 5.0, 0.5)
    assert (found.low, found.high) == (pytest.approx(1 / 2.1), pytest.approx(1 / 1.9))
    figures["speedup"]["cut"] |= {"low": None, "high": None}  # type: ignore[index]
    with pytest.raises(VssError, match="only 8 rounds"):
        Measured.of(figures)


def test_rounds_and_tables_of_other_settings_are_refused(tmp_path: Path) -> None:
    latency = LatencyConfig(target="0.5x")
    project: Any = SimpleNamespace(recipe=Recipe())
    with pytest.raises(VssError, match="met in one round"):
        LatencyGoal.open(project, nn.Identity(), PruneConfig(steps=2, latency=latency), tmp_path)
    assert np.isfinite(latency.tolerance)
    asked = {"backend": "openvino", "openvino": {"device": "GPU", "precision": "f16"}}
    project.recipe = Recipe.model_validate({"build": asked})
    project.task = SimpleNamespace(export_options=dict)
    with pytest.raises(VssError, match=r"time openvino on the CPU in f32, and build\.openvino asks for f16 on GPU"):
        LatencyGoal.check(project, nn.Identity(), PruneConfig(latency=latency))


def iso_latency_baseline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """That of the benchmark, which holds a plan of another budget against the goal."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    parts: Any = importlib.import_module("latency_parts")
    monkeypatch.setattr(parts, "apply_plan", lambda model, plan, check_weights: [len(g.kept) for g in plan.groups])
    monkeypatch.setattr(parts, "measure", target.measure)
    return parts.iso_latency_baseline


def test_another_budget_is_brought_to_the_same_measured_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, baseline = World(1.1, 0.3, monkeypatch), iso_latency_baseline(monkeypatch)
    goal = goal_of(world, tmp_path / "t.json", "0.6x", tolerance=0.03)

    def plan_of(keep: float) -> Plan:
        groups = tuple(g.keep(torch.arange(max(1, round(g.channels * keep)))) for g in world.clock.groups)
        return Plan(model="x", weights_sha256="0" * 64, criterion="l1", budget={"keep": keep}, groups=groups)

    plan, rows = baseline(goal, 0.6, plan_of)
    widths = [len(group.kept) for group in plan.groups]
    uncut, cut = (1.1 * world.clock.read(w).total + 0.3 for w in ([128] * 3, widths))
    assert rows[-1]["ratio"] == pytest.approx(cut / uncut)
    assert rows[-1]["off"] == min(row["off"] for row in rows) == pytest.approx(abs(cut / uncut / 0.6 - 1))
    assert rows[-1]["off"] <= 0.03 < rows[0]["off"]
    assert plan.budget["keep"] == rows[-1]["keep"]
    assert world.built == 1 + len(rows)


def test_a_budget_that_repeats_itself_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, baseline = World(1.0, 0.0, monkeypatch), iso_latency_baseline(monkeypatch)
    goal = goal_of(world, tmp_path / "t.json", "0.6x")
    groups = tuple(g.keep(torch.arange(64)) for g in world.clock.groups)
    same = Plan(model="x", weights_sha256="0" * 64, criterion="l1", budget={}, groups=groups)
    plan, rows = baseline(goal, 0.6, lambda keep: same)
    assert (plan, len(rows), world.built) == (same, 2, 3)
    assert rows[0]["ratio"] == rows[1]["ratio"]


def test_the_command_makes_a_table_for_the_same_setting() -> None:
    options = {"labels": False, "labels_dtype": "uint8"}
    setting = Setting(threads=2, options=options, keep=("head", "stem.0"))
    assert setting.command("my table.json") == (
        "vss lut build --ckpt CKPT --save 'my table.json' --backend onnxruntime --threads 2 --no-labels "
        "--labels-dtype uint8 --keep head --keep stem.0"
    )
    assert Setting("torch").command("T") == "vss lut build --ckpt CKPT --save T --backend torch"


def test_a_ratio_is_measured_for_longer_until_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def bench(sessions: Any, feeds: Any, *, window_seconds: float, min_seconds: float, max_seconds: float) -> Any:
        asked.append(min_seconds)
        half = 0.2 / min_seconds  # of the speed-up, 2
        times = {"uncut": {"latency_ms_p50": 4.0}, "cut": {"latency_ms_p50": 2.0}}
        speedup = {"cut": {"ratio": 2.0, "low": 2.0 - half, "high": 2.0 + half}}
        return {"sessions": times, "speedup": speedup, "rounds": 9}

    monkeypatch.setattr(target, "bench", bench)
    session: Any = None
    found = target.measure(session, session, {}, 60.0, 0.02)
    assert asked == [2.0, 8.0] and found.ratio == 0.5 and found.noise == pytest.approx(0.0125, rel=0.01)
    asked.clear()
    with pytest.raises(VssError, match="the machine is too noisy"):
        target.measure(session, session, {}, 5.0, 0.001)
    assert asked == [2.0, 5.0]
