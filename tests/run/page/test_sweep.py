"""The page of a sweep in a headless Chromium: no network, no console error, sorts, filters, exports, fits a phone."""

from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from vss.core.files import write_json
from vss.run.page.sweep import headline, missing, render, two_way, write_page
from vss.sweep.compare import ranking, summary

from .browser import Browser
from .sweep_results import results


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("page")
    data = results(root)
    write_json(root / "results.json", data)
    return write_page(root / "results.json", root / "report.html"), data


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
        "ranking", "tradeoff", "table", "classes", "widths", "pictures", "missing", "reproduce",
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
    assert latex.startswith("\\begin{tabular}{lrrrrrrr}") and latex.count("\\\\") == 6 and "mIoU (\\%)" in latex
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


def blocks(count: int, gaps: dict[str, float]) -> dict[str, dict[str, float]]:
    """Scores that differ by `gaps`, but for a small change of turn in every block."""
    return {f"b{i}": {name: 50 - gap + 0.01 * ((i + k) % 3) for k, (name, gap) in enumerate(gaps.items())}
            for i in range(count)}  # fmt: skip


@pytest.mark.parametrize(
    ("count", "gaps", "text"),
    [
        (8, {"a": 0, "b": 1, "c": 2}, "a comes first (3 compared in 8 blocks)"),
        (3, {"a": 0, "b": 1, "c": 2}, "So few comparisons rank nothing (3 compared in 3 blocks)"),
        (9, {"a": 0, "b": 0, "c": 2}, "b leads, and a cannot be told from it (3 compared in 9 blocks)"),
        (9, {"a": 0, "b": 0, "c": 0}, "None is better in mIoU beyond chance (3 compared in 9 blocks)"),
    ],
)
def test_a_first_place_is_named_only_where_the_tests_say_so(
    page: tuple[Path, dict[str, Any]], count: int, gaps: dict[str, float], text: str
) -> None:
    found = headline(page[1] | {"ranking": ranking(blocks(count, gaps))})
    assert found["headline"] == text and "mean rank is that of" in found["sentences"][0]


def test_budgets_at_other_macs_are_named_and_a_gain_is_no_loss(page: tuple[Path, dict[str, Any]]) -> None:
    case = {"name": "", "low": "a", "low_kept": 0.488, "high": "b", "high_kept": 0.4996}
    group = {"name": "l1", "coords": {"criterion": "l1"}, "labels": [], "values": {"miou_pct_change": {"mean": 3.22}}}
    found = headline(page[1] | {"unequal": [case], "groups": [group]})
    assert "All runs: not at equal MACs, from 48.8 % (a) to 50.0 % (b) kept." in found["sentences"]
    assert ("+3.22", "points, best mean change: l1") in found["tiles"]


def test_times_of_another_load_are_named(page: tuple[Path, dict[str, Any]]) -> None:
    def said(*times: float) -> list[str]:
        row = {**page[1]["rows"][0], "status": "ok", "coords": {"criterion": "l1"}}
        rows = [row | {"values": {"baseline_latency_ms_p50": time}} for time in times]
        return [text for text in headline(page[1] | {"rows": rows})["sentences"] if "milliseconds" in text]

    assert said(12.9, 31.0, 13.5) == [
        "The uncut network took 12.90 to 31.00 ms beside its trials: compare speedups, not milliseconds."
    ]
    assert said(12.9, 13.5) == []


def test_missing_latencies_are_named(page: tuple[Path, dict[str, Any]]) -> None:
    rows = [{**row, "values": dict(row["values"])} for row in page[1]["rows"]]
    del rows[0]["values"]["latency_ms_p50"], rows[1]["values"]["latency_ms_p50"]
    rows[1]["values"]["latency_spread_pct"] = 12.3
    data = page[1] | {"rows": rows}
    (figure, why), (failed, error) = missing(data)
    assert figure == "Latency of 2 of 89 runs" and f"{rows[1]['id']} (too noisy: spread 12.3 %)" in why
    assert f"; {rows[0]['id']} (not timed). The same command" in why
    assert failed == f"Every figure of {rows[7]['id']}" and "the floor allows 0.41" in error
    assert "Latency of 2 of 89 runs is missing." in headline(data)["sentences"]
    assert [each for each, _ in missing(page[1])] == [failed]
    assert "Latency of 2 of 89 runs" in render(data, page[0].parent)


def test_a_table_of_criteria_by_variants_marks_what_is_not_at_equal_macs(tmp_path: Path) -> None:
    data = results(tmp_path, seeds=2)
    draw = {("l1", "own"): (40.0, 41.0), ("l1", "even"): (30.0, 32.0), ("fpgm", "own"): (20.0, 20.0)}
    data["rows"], data["groups"] = data["rows"][:2], [
        {"name": " · ".join(key), "coords": dict(zip(("criterion", "variant"), key, strict=True)), "cells": [],
         "values": {"miou_pct": summary(list(values))}, "iou_pct": [], "widths": [],
         "labels": ["not at equal MACs: +3.0 % from the median"] if key == ("l1", "even") else []}
        for key, values in draw.items()
    ]  # fmt: skip
    data["effects"] = {"axes": [{"name": "criterion", "share": 0.75, "friedman_p": 0.02}], "pairs": [], "rest": 0.25,
                       "cells": 6, "left_out": ["fpgm"]}  # fmt: skip
    found = two_way(data)
    assert found is not None and found["columns"] == ["own", "even"]
    assert found["rows"] == [["l1", "40.50 ± 6.35", "31.00 ± 12.71*"], ["fpgm", "20.00 ± 0.00", ""]]
    assert found["sentence"] == (
        "Of the spread of mIoU over 6 runs: criterion 75.0 % (p = 0.02), rest 25.0 %; left out, as some combinations "
        "are missing: fpgm. p: Friedman. *: holds runs that are not at equal MACs, see the table of runs."
    )
    page = render(data, tmp_path)
    assert "31.00 ± 12.71*" in page and "criterion 75.0 %" in page
    assert two_way(results(tmp_path)) is None
