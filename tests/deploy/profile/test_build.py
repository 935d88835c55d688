"""A table of a clock with a known law: alignment is found, the error is small, a killed build goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.deploy.profile.clockwork import Clockwork
from vss.core.errors import VssError
from vss.deploy.profile.build import Effort, build
from vss.deploy.profile.table import LatencyTable, cliffs, plot_cliffs
from vss.deploy.profile.units import Reading

EFFORT = Effort(vectors=2, coarse=12, batch=6, limit=24, tests=30, cliffs=1)


@pytest.mark.parametrize("block", [1, 8, 16])
def test_the_smallest_good_step_is_discovered(block: int, table_path: Path) -> None:
    table = build(Clockwork(block=block), table_path, effort=EFFORT)
    assert table.step == block
    assert min(table.alignment.values()) == 1
    if block == 16:
        assert table.alignment["1"] > 1.5
        assert table.alignment["8"] > 1.2


def test_unseen_widths_are_predicted(clockwork: Clockwork, table_path: Path) -> None:
    told: list[tuple[int, int, float]] = []
    table = build(clockwork, table_path, effort=EFFORT, progress=lambda *each: told.append(each))
    assert table.error["n"] == 30
    assert table.error["median"] < 0.01
    assert table.error["max"] < 0.05
    assert table.drift == pytest.approx(0)
    assert table.full_ms() == pytest.approx(clockwork.read([64, 96, 128]).total)
    predicted = table.model()(np.array([[48, 64, 80]], float))
    assert predicted[0] == pytest.approx(clockwork.read([48, 64, 80]).total, rel=0.02)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert all(done <= most == EFFORT.most and left >= 0 for done, most, left in told)


class Bursts(Clockwork):
    """A machine on which three of ten readings take 1.6 times as long; which ones goes by their number."""

    def read(self, widths: Sequence[int]) -> Reading:
        reading = super().read(widths)
        factor = 1 + 0.6 * (np.random.default_rng(self.calls).random() < 0.3)
        return Reading({name: ms * factor for name, ms in reading.units.items()}, reading.total * factor)


@pytest.mark.parametrize(("machine", "last"), [(Clockwork, 12), (Clockwork, 20), (Clockwork, 31), (Bursts, 130)])
def test_a_killed_build_goes_on_and_ends_alike(
    machine: type[Clockwork], last: int, table_path: Path, tmp_path: Path
) -> None:
    """Killed before a reading of the uncut network, on the coarse grid, in a batch, and while all is read again."""
    whole = build(machine(), tmp_path / "whole.json", effort=EFFORT)
    with pytest.raises(KeyboardInterrupt):
        build(machine(last=last), table_path, effort=EFFORT)
    assert sum(sample.reads for sample in LatencyTable.load(table_path).samples) == last
    second = machine()
    second.calls = last
    again = build(second, table_path, effort=EFFORT)
    assert second.calls == sum(sample.reads for sample in whole.samples)
    assert [sample.to_dict() for sample in again.samples] == [sample.to_dict() for sample in whole.samples]
    third = Clockwork()
    assert build(third, table_path, effort=EFFORT).done
    assert third.calls == 0


def test_more_is_measured_until_the_error_is_small(table_path: Path, tmp_path: Path) -> None:
    class Noisy(Clockwork):
        def read(self, widths: Sequence[int]) -> Reading:
            reading = super().read(widths)
            factor = 1 + 0.4 * np.random.default_rng(self.calls).random()
            return Reading({n: ms * factor for n, ms in reading.units.items()}, reading.total * factor)

    noisy = build(Noisy(), table_path, effort=EFFORT)
    exact = build(Clockwork(), tmp_path / "exact.json", effort=EFFORT)
    assert len(noisy.of_role("fit")) == EFFORT.limit
    assert len(exact.of_role("fit")) == EFFORT.coarse + EFFORT.batch
    assert noisy.drift > 0.05


def test_a_busy_machine_is_asked_again_and_the_least_counts(table_path: Path, tmp_path: Path) -> None:
    effort = replace(EFFORT, vectors=3)
    once = build(Bursts(), tmp_path / "once.json", effort=replace(effort, passes=1))
    told: list[tuple[int, int, float]] = []
    busy = Bursts()
    table = build(busy, table_path, effort=replace(effort, passes=4), progress=lambda *each: told.append(each))
    law = Clockwork()
    wrong = [len([s for s in each.samples if s.reading.total > 1.01 * law.read(s.widths).total])
             for each in (once, table)]  # fmt: skip
    assert wrong[0] > 0.15 * len(once.samples) and wrong[1] < 0.05 * len(table.samples)
    assert {sample.reads for sample in once.samples} == {1} and once.drift == pytest.approx(0.6)
    assert busy.calls == sum(sample.reads for sample in table.samples) == told[-1][0] == told[-1][1]
    assert all(done <= most for done, most, _ in told)
    assert table.step == 16 and table.error["median"] < 0.01 < once.error["median"]


def test_a_reading_is_the_least_of_two_unit_by_unit() -> None:
    first, second = Reading({"a": 2.0, "b": 1.0, "c": 5.0}, 9.0), Reading({"a": 1.5, "b": 3.0, "d": 4.0}, 8.0)
    assert first.least(second) == Reading({"a": 1.5, "b": 1.0, "c": 5.0, "d": 4.0}, 8.0)


def test_a_table_of_another_device_or_version_is_refused(clockwork: Clockwork, table_path: Path) -> None:
    table = build(clockwork, table_path, effort=EFFORT)
    for change, what in (({"device": "other"}, "device"), ({"versions": {"law": "2"}}, "versions")):
        with pytest.raises(VssError, match=rf"holds for {what} .* build one here: vss lut build --x"):
            table.check(clockwork.key | change, path=table_path, command="vss lut build --x")
    clockwork.key["device"] = "other"
    with pytest.raises(VssError, match=r"holds for device clockwork and this is other; .*run vss lut build again"):
        build(clockwork, table_path, effort=EFFORT)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            '"role"',
            '"rule"',
            r"no whole latency table \(samples.0.role is missing\); remove it and build it again",
        ),
        ('"role": "full"', '"role": "half"', "no whole latency table"),
        ('"role": "full"', '"role": "fit"', "the uncut network is not in it"),
        ('"total": ', '"total": "x", "was": ', "no whole latency table"),
        ('"widths": [', '"widths": [1, ', "a sample has not 3 widths"),
        ('"groups": [', '"groups": 3, "were": [', "no whole latency table"),
        ('"samples": [', '"samples": ["x", ', "no whole latency table"),
        ('"schema": 1', '"schema": 2', "upgrade vss to read it"),
        ("vss.latency_table", "vss.plan", "expected a file of kind 'vss.latency_table'"),
    ],
)
def test_a_corrupt_table_is_refused(clockwork: Clockwork, table_path: Path, old: str, new: str, sentence: str) -> None:
    build(clockwork, table_path, effort=EFFORT)
    assert old in table_path.read_text()
    data = json.loads(table_path.read_text().replace(old, new))
    del data["sha256"]  # a change on purpose; with it the hash alone would refuse
    table_path.write_text(json.dumps(data))
    with pytest.raises(VssError, match=sentence):
        LatencyTable.load(table_path)


def test_a_table_that_was_cut_off_is_refused(clockwork: Clockwork, table_path: Path) -> None:
    build(clockwork, table_path, effort=EFFORT)
    table_path.write_text(table_path.read_text()[:-100])
    with pytest.raises(VssError, match="is not JSON"):
        build(clockwork, table_path, effort=EFFORT)


def test_a_machine_that_was_noisy_during_a_build_is_told(table_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Slowing(Clockwork):
        def read(self, widths: Sequence[int]) -> Reading:
            reading = super().read(widths)
            factor = 1 + 0.5 * (self.calls > 30)
            return Reading({n: ms * factor for n, ms in reading.units.items()}, reading.total * factor)

    table = build(Slowing(), table_path, effort=EFFORT)
    assert table.drift == pytest.approx(0.5)
    full = Clockwork().read(table.full).total
    assert f"noisy: the uncut network took {full:.2f} to {1.5 * full:.2f} ms during the build (50 %)" in caplog.text


def test_cliffs_are_scanned_and_drawn(clockwork: Clockwork, table_path: Path, tmp_path: Path) -> None:
    table = build(clockwork, table_path, effort=EFFORT)
    [(group, points)] = cliffs(table).items()
    assert group == "g1"  # 64 x 96 and 96 x 128 together are the heaviest
    times = dict(points)
    assert times[96] < times[95]
    assert times[80] < times[84]
    svg = plot_cliffs(table, tmp_path / "cliffs.svg").read_text()
    assert "<svg" in svg
    assert svg.count("<path") > 5
