"""The Ray executor: same results as local, a killed worker loses its cell alone, an address where nobody answers."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from vss.core.errors import VssError
from vss.sweep import Grid, Settings, Store, sweep

from .conftest import dry_grid

pytest.importorskip("ray", reason="needs Ray: pip install 'vss[ray]'")


def kill_when_it_runs(folder: Path) -> None:
    deadline = time.monotonic() + 90
    while not (folder / "tries").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(int((folder / ".lock").read_text()), signal.SIGKILL)


def test_a_killed_worker_loses_its_cell_alone_and_rows_are_those_of_local(tmp_path: Path) -> None:
    grid = Grid.model_validate(dry_grid({"a": {}, "slow": {"seconds": 2.0}, "bad": {"fails": 9}}, seeds=2))
    told: list[tuple[str, ...]] = []
    killer = threading.Thread(target=kill_when_it_runs, args=(tmp_path / "ray" / "runs" / "1--slow",))
    killer.start()
    settings = Settings(executor="ray", workers=2, threads=1, retries=1)
    summary = sweep(grid, tmp_path / "ray", settings=settings, tell=lambda *a: told.append(a))
    killer.join()
    assert [entry[1] for entry in told if entry[0] == "lost"] == ["1--slow"]
    assert (summary.ok, sorted(summary.failed)) == (4, ["0--bad", "1--bad"])
    sweep(grid, tmp_path / "local", settings=Settings(workers=1, threads=1, retries=0))
    stores = [Store.read(tmp_path / name) for name in ("ray", "local")]
    rows = [{cell.id: (store.record(cell.id) or {}).get("row") for cell in store.trials()} for store in stores]
    assert rows[0] == rows[1] and sum(row is not None for row in rows[0].values()) == 4
    assert stores[0].repeated() == [] and len(stores[0].computed()) == 6


def test_an_address_where_nobody_answers(tmp_path: Path) -> None:
    settings = Settings(executor="ray", address="127.0.0.1:9")
    with pytest.raises(VssError, match=r"no Ray cluster answers at 127\.0\.0\.1:9 .*; start one with"):
        sweep(Grid.model_validate(dry_grid({"a": {}})), tmp_path / "s", settings=settings)
    assert not (tmp_path / "s").exists()
