"""Sweeps with the dry experiment: failures, deaths, resuming, two sweeps in one folder, interrupts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command import cli, full_disk, refused
from vss.cli.sweep import print_summary
from vss.core.errors import GateFailed, VssError
from vss.core.files import at_work
from vss.sweep import Grid, Settings, Store, sweep
from vss.sweep.run import Summary

from .conftest import HERE, dry_grid

LOCAL = Settings(workers=2, threads=1, retries=1)


def go(grid: dict[str, Any], out: Path, settings: Settings = LOCAL, **more: Any) -> tuple[Any, list[tuple[str, ...]]]:
    told: list[tuple[str, ...]] = []
    return sweep(Grid.model_validate(grid), out, settings=settings, tell=lambda *a: told.append(a), **more), told


def test_all_cells_once_and_again_nothing(tmp_path: Path) -> None:
    grid = dry_grid({"a": {}, "b": {}, "c": {}}, seeds=2)
    summary, told = go(grid, tmp_path / "s")
    assert told[0] == ("plan", "", "6 trials that share 2 trained networks or the like")
    store = Store.read(tmp_path / "s")
    assert (summary.total, summary.ok, summary.failed) == (6, 6, {})
    assert sorted(line["step"] for line in store.computed()) == ["cell"] * 6 + ["share"] * 2
    record = store.record("1--b")
    assert record is not None and record["row"]["score"] == 6.0 and record["coords"] == {"seed": "1", "variant": "b"}
    assert record["row"]["threads"] == 1.0
    again, _ = go(grid, tmp_path / "s")
    assert (again.ok, again.skipped) == (0, 6)
    known = store.record("1--b") or {}
    assert known["seconds"] in summary.took["trial"] and sorted(summary.took["trial"]) == sorted(again.took["trial"])
    assert summary.waiting == again.waiting == {"stage": 0, "trial": 0}
    assert len(store.computed()) == 8 and store.repeated() == []


def test_a_latency_that_could_not_be_measured_is_named_and_no_success(tmp_path: Path) -> None:
    grid = dry_grid({"a": {}, "b": {"untimed": 1}}) | {"study": "dry_timed", "panels": 0}
    summary, _ = go(grid, tmp_path)
    assert (summary.ok, summary.failed) == (2, {})
    assert summary.unmeasured == {"0--b": "its latency could not be measured: this machine has no clock."}
    rows = {cell.id: (Store.read(tmp_path).record(cell.id) or {})["row"] for cell in Store.read(tmp_path).trials()}
    assert rows["0--a"]["latency_ms_p50"] == 1.5 and "latency_ms_p50" not in rows["0--b"]
    with pytest.raises(GateFailed, match="all trials are done, and 1 figures"):
        print_summary(summary, tmp_path)


def test_unpruned_networks_have_their_time_and_cells_their_gain_per_mac(tmp_path: Path) -> None:
    grid = dry_grid({"a": {"baseline_ms": 6.0}, "b": {"baseline_ms": 9.0}, "c": {"baseline_ms": 6.4}})
    go(grid | {"study": "dry_timed", "panels": 0}, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    [base] = results["baselines"]
    assert base["values"]["latency_ms_p50"]["mean"] == 6.4 and base["values"]["score"]["mean"] == 10.0
    assert [row["values"]["speedup_per_mac_reduction"] for row in results["rows"]] == [pytest.approx(0.8)] * 3
    assert "speedup_per_mac_reduction" in results["columns"]


def test_a_failed_a_dying_and_an_impossible_cell_are_theirs_alone(tmp_path: Path) -> None:
    grid = dry_grid(
        {"good": {}, "bad": {"fails": 9}, "once": {"fails": 1}, "dies": {"dies": 1}, "no": {"impossible": 1}}
    )
    summary, told = go(grid, tmp_path)
    assert (summary.ok, set(summary.failed)) == (3, {"0--bad", "0--no"})
    assert summary.failed["0--bad"] == "RuntimeError: broken on try 2"
    assert summary.failed["0--no"] == "this trial is impossible."
    assert ("retry", "0--once") in [entry[:2] for entry in told]
    lost = [entry[2] for entry in told if entry[:2] == ("lost", "0--dies")]
    assert lost == ["the worker process was killed by signal 9"]
    store = Store.read(tmp_path)
    attempts = {cell.id: (store.record(cell.id) or {})["attempts"] for cell in store.trials()}
    assert attempts == {"0--good": 1, "0--bad": 2, "0--once": 2, "0--dies": 2, "0--no": 0}
    log = store.log("0--bad").read_text()
    assert "try 2 of 0--bad" in log and "Traceback" in log and "try" not in store.log("0--good").read_text()[20:]


def test_a_failed_cell_is_tried_again_by_the_next_sweep(tmp_path: Path) -> None:
    grid = dry_grid({"good": {}, "bad": {"fails": 2}})
    first, _ = go(grid, tmp_path)
    second, _ = go(grid, tmp_path)
    assert (first.ok, list(first.failed)) == (1, ["0--bad"])
    assert (second.ok, second.skipped, second.failed) == (1, 1, {})


def test_a_failed_shared_part_fails_its_cells_by_name(tmp_path: Path) -> None:
    summary, _ = go(dry_grid({"a": {}, "b": {}}, set={"data.root": "no-data"}), tmp_path)
    assert summary.ok == 0 and all("there is no data." in reason for reason in summary.failed.values())
    assert sorted(summary.failed) == ["0--a", "0--b"]


def test_two_sweeps_in_one_folder(tmp_path: Path) -> None:
    go(dry_grid({"a": {}}), tmp_path / "s")
    with pytest.raises(VssError, match="differs in variants; choose another folder"):
        go(dry_grid({"a": {}, "b": {}}), tmp_path / "s")
    summary, _ = go(dry_grid({"a": {}, "b": {}}), tmp_path / "s", extend=True)
    assert (summary.ok, summary.skipped) == (1, 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("")
    with pytest.raises(VssError, match="holds other files"):
        go(dry_grid({"a": {}}), tmp_path / "other")
    with at_work(tmp_path / "s"), pytest.raises(VssError, match="another vss command is at work in"):
        go(dry_grid({"a": {}, "b": {}}), tmp_path / "s")


def test_time_left_is_the_mean_of_what_was_measured_and_else_unknown() -> None:
    summary = Summary(workers=2, took={"stage": [], "trial": [30.0, 50.0]}, waiting={"stage": 1, "trial": 3})
    assert summary.left() == "unknown time"
    summary.took["stage"] = [10.0]
    assert summary.left() == "65 s"  # (10 + 3 * 40) / 2
    summary.waiting.update(stage=0, trial=0)
    assert summary.left() == "0 s"


def test_a_damaged_record_of_a_cell_or_a_part_is_made_again(tmp_path: Path) -> None:
    grid = dry_grid({"a": {}}, seeds=5)
    go(grid, tmp_path / "s")
    store = Store.read(tmp_path / "s")
    before = {cell.id: store.record(cell.id) for cell in store.trials()}
    damages = ["", "{", '{"kind": "vss.step", "schema": 2}', None]  # None: a figure is another one
    for folder in ("cells", "shared"):
        for file, damage in zip(sorted((tmp_path / "s" / folder).glob("*.json"))[:4], damages, strict=True):
            other = file.read_text().replace("10.0", "99.0")
            file.write_text(re.sub(r'"score": \d', '"score": 3', other) if damage is None else damage)
    (tmp_path / "s" / "computed" / "killed.jsonl").write_text('{"part": "0--a", "st')
    assert [store.record(cell.id) is None for cell in store.trials()] == [True] * 4 + [False]
    again, _ = go(grid, tmp_path / "s")
    assert (again.ok, again.skipped) == (4, 1)
    for cell in store.trials():
        then, now = before[cell.id], store.record(cell.id)
        assert then and now and now["row"] == then["row"] and now["key"] == then["key"]
    (tmp_path / "s" / "sweep.json").write_text("{")
    assert go(grid, tmp_path / "s")[0].skipped == 5


def words_of(grid: dict[str, Any], folder: Path) -> list[str]:
    """The words of a command that does a grid."""
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(grid))
    return ["sweep", str(file), "--out", str(folder / "s"), "--workers", "2"]


def start(grid: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vss.cli", *words_of(grid, folder)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": HERE}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c)  # fmt: skip


def heed_ctrl_c() -> None:
    """A shell starts its background jobs deaf to SIGINT, and what they start inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def until(found: Any, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not found() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found()


def test_ctrl_c_is_clean_and_the_rest_is_done_later(tmp_path: Path) -> None:
    grid = dry_grid({name: {"seconds": 0.0 if name in "ab" else 30.0} for name in "abcd"})
    process = start(grid, tmp_path)
    until(lambda: len(list((tmp_path / "s" / "runs").glob("0--[cd]/tries"))) == 2)  # so a and b are counted
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in error
    assert "2 of 4 trials done, 2 left" in " ".join(error.split()) and "the same command goes on" in error
    assert not [path for path in tmp_path.rglob(".*") if path.is_file() and path.name != ".lock"]
    quick = dry_grid({name: {"seconds": 0.0} for name in "abcd"})
    summary, _ = go(quick, tmp_path / "s", extend=True)
    assert (summary.ok, summary.skipped) == (2, 2)


def test_kill_9_of_the_driver_takes_its_workers_along(tmp_path: Path) -> None:
    process = start(dry_grid({"a": {"seconds": 60.0}, "b": {"seconds": 60.0}}), tmp_path)
    until(lambda: len(list((tmp_path / "s" / "runs").glob("*/tries"))) == 2)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) >= 2
    process.kill()
    process.communicate()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


def test_the_command_shows_the_log_of_a_failed_cell_and_exits_1(tmp_path: Path) -> None:
    done = cli(*words_of(dry_grid({"good": {}, "bad": {"fails": 9}}), tmp_path))
    assert done.returncode == 1
    assert "1 of 2 trials done, 1 failed" in done.stdout and "RuntimeError: broken on try 2" in done.stdout
    assert "try 2 of 0--bad" in done.stdout and "failed:" in done.stderr
    assert json.loads((tmp_path / "s" / "cells" / "0--good.json").read_text())["status"] == "ok"


def test_a_full_disk_stops_the_sweep_with_a_sentence(tmp_path: Path) -> None:
    words = words_of(dry_grid({str(number): {"pad": "x" * 6000} for number in range(3)}), tmp_path)
    with full_disk(8):
        done = cli(*words)
    refused(done, "free some space")
