"""The page of a sweep in a headless Chromium: no network, no console error, sorts, filters, exports, fits a phone."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vss.core.files import write_json
from vss.run.page.sweep import render, write_page

from .browser import Browser, browser, find
from .sweep_results import results


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("page")
    data = results(root)
    write_json(root / "results.json", data)
    return write_page(root / "results.json", root / "report.html"), data


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium, or name one in VSS_CHROMIUM")
    with browser(program, tmp_path_factory.mktemp("profile")) as opened:
        opened.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0,
                    uploadThroughput=0)  # fmt: skip
        yield opened


@pytest.fixture
def desktop(chromium: Browser, page: tuple[Path, dict[str, Any]]) -> Browser:
    chromium.events.clear()
    chromium.open(page[0], width=1280, height=900)
    return chromium


def column(where: Browser, number: int) -> list[str]:
    return list(where.run(f"[...document.querySelectorAll('.grid tr.row')].map(r => r.cells[{number}].textContent)"))


def test_it_opens_without_network_and_without_errors(desktop: Browser, page: tuple[Path, dict[str, Any]]) -> None:
    asked = {event["request"]["url"].partition(":")[0] for event in desktop.said("Network.requestWillBeSent")}
    assert asked <= {"file", "data"}
    errors = desktop.said("Runtime.exceptionThrown")
    errors += [e for e in desktop.said("Log.entryAdded") if e["entry"]["level"] == "error"]
    assert errors == []
    assert desktop.run("[...document.querySelectorAll('section')].map(s => s.id)") == [
        "ranking", "tradeoff", "table", "classes", "widths", "pictures", "reproduce",
    ]  # fmt: skip
    assert desktop.run("document.querySelectorAll('.plot .point').length") == 3 * (30 + 3)
    assert desktop.run("document.querySelectorAll('.heat tbody td').length") == 30 * 11
    assert desktop.run("document.querySelectorAll('.net .layer').length") == 15
    assert desktop.run("document.querySelectorAll('.panel img').length") == 5
    assert "http" not in page[0].read_text().replace("http://www.w3.org/2000/svg", "")


def test_rows_sort_both_ways_with_missing_ones_last(desktop: Browser, page: tuple[Path, dict[str, Any]]) -> None:
    values = sorted((row["values"]["miou_pct"] for row in page[1]["rows"] if row["values"]), reverse=True)
    desktop.run("document.querySelector('[data-sort=miou_pct]').click()")
    assert column(desktop, 4) == [f"{value:.2f}" for value in values] + [""]
    desktop.run("document.querySelector('[data-sort=miou_pct]').click()")
    assert column(desktop, 4) == [f"{value:.2f}" for value in values[::-1]] + [""]
    assert desktop.run("document.querySelector('th[aria-sort=ascending]').textContent") == "mIoU (%)"
    desktop.run("document.querySelector('[data-sort=network]').click()")
    assert column(desktop, 0)[0] == "lraspp"


def test_rows_filter_by_words_and_by_axis(desktop: Browser) -> None:
    search = "const i = document.querySelector('input[type=search]'); i.value = %s; i.dispatchEvent(new Event('input'))"
    desktop.run("(() => {" + search % json.dumps("taylor unet 0.3") + "})()")
    assert (len(column(desktop, 0)), set(column(desktop, 1)), set(column(desktop, 2))) == (3, {"taylor"}, {"macs 0.3"})
    desktop.run("(() => {" + search % json.dumps("failed") + "})()")
    assert column(desktop, 0) == ["unetfailed"]
    desktop.run("document.querySelector('.grid tr.row').click()")
    more = desktop.run("document.querySelector('.grid tr.more').textContent")
    assert "floor allows 0.41" in more and "vss run camvid_unet" in more
    desktop.run("(() => {" + search % '""' + "})()")
    desktop.run("(() => { const s = document.querySelector('[data-axis=network]'); s.value = 'lraspp';"
                "s.dispatchEvent(new Event('change')) })()")  # fmt: skip
    assert set(column(desktop, 0)) == {"lraspp"} and len(column(desktop, 0)) == 30
    assert desktop.run("document.querySelector('.count-rows').textContent") == "30 of 90"
    desktop.run("document.querySelector('[data-view=means]').click()")
    assert len(column(desktop, 0)) == 10


def test_means_are_those_of_the_seeds(desktop: Browser, page: tuple[Path, dict[str, Any]]) -> None:
    desktop.run("document.querySelector('[data-view=means]').click()")
    rows = [row for row in page[1]["rows"] if row["id"].startswith("unet--taylor--macs_0.5")]
    mean = sum(row["values"]["miou_pct"] for row in rows) / 3
    sd = math.sqrt(sum((row["values"]["miou_pct"] - mean) ** 2 for row in rows) / 2)
    half = 4.302652729911275 * sd / math.sqrt(3)  # t(0.975, 2)
    text = column(desktop, 3)[0]
    assert text == f"{mean:.2f}±{half:.{2 if half >= 1 else 3}f}"


def test_every_export_gives_a_file(desktop: Browser, page: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    desktop.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    names = desktop.run("[...document.querySelectorAll('[data-export]')].map(b => b.dataset.export)")
    stems = ["ranking", "pareto-macs_g", "pareto-params_m", "pareto-latency_ms_p50", "trials", "classes", "widths"]
    assert names == [f"{stem}.{kind}" for stem in stems for kind in ("csv", "tex", "png")]
    for name in names:
        desktop.click(f'[data-export="{name}"]')
        file, deadline = tmp_path / f"camvid_small-{name}", time.monotonic() + 30
        while not (file.is_file() and file.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert file.stat().st_size > 100, name
    with (tmp_path / "camvid_small-trials.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 90 and [row["status"] for row in table].count("failed") == 1
    assert [float(r["mIoU (%)"]) for r in table if r["mIoU (%)"]] == [
        row["values"]["miou_pct"] for row in page[1]["rows"] if row["values"]
    ]
    latex = (tmp_path / "camvid_small-ranking.tex").read_text()
    assert latex.startswith("\\begin{tabular}{lrrrrrr}") and latex.count("\\\\") == 6 and "mIoU (\\%)" in latex
    assert (tmp_path / "camvid_small-pareto-macs_g.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_hiding_a_criterion_takes_its_points_away(desktop: Browser) -> None:
    desktop.run("document.querySelector('#tradeoff .legend button').click()")
    assert desktop.run("document.querySelectorAll('.plot .point').length") == 3 * (24 + 3)


@pytest.mark.parametrize("width", [360, 390, 820])
def test_nothing_sticks_out_on_a_phone(chromium: Browser, page: tuple[Path, dict[str, Any]], width: int) -> None:
    chromium.open(page[0], width=width, height=800, phone=True)
    assert chromium.run("document.documentElement.scrollWidth") == width
    assert chromium.run("Math.min(...[...document.querySelectorAll('.plot svg text')].map(t => "
                        "t.getBoundingClientRect().height)) >= 10")  # fmt: skip
    assert chromium.run(
        "[...document.querySelectorAll('.plot svg')].every(s => s.getBoundingClientRect().right <= innerWidth)"
    )


def test_data_cannot_end_its_script(page: tuple[Path, dict[str, Any]]) -> None:
    data = page[1] | {"protocol": "</script><b>x</b>"}
    assert "</script><b>" not in render(data, page[0].parent)
