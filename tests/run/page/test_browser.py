"""The report in a headless Chromium: nothing sticks out or is cut on a desk, a phone or paper; tables sort."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vss.core.report import write_report
from vss.run.page import write_page
from vss.train.gate import gate

from .browser import Browser

CUT = "[...document.querySelectorAll('%s')].filter(e => e.scrollWidth > e.clientWidth + 1).length"


@pytest.fixture
def page(report: dict[str, Any], tmp_path: Path) -> Path:
    """With gates, all ten columns of figures, and a long command."""
    report["command"] += ["--set", "train.epochs=8"] * 6
    first, second = {"miou_pct": 61.34}, {"miou_pct": 61.02}
    check = {"what": "pruned against control", **gate(first, second, max_drop=1, interval=[-0.25, 0.9])}
    report["gate"] = {**check, "checks": [{**check, "what": "engine equals its network"}, check]}
    report["rows"][4] |= {"ap_pct": 90.0, "fnr_pct": 1.0, "f1_pct": 80.0}
    return write_page(write_report(tmp_path / "report.json", report), tmp_path / "report.html")


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_sticks_out_or_is_cut(chromium: Browser, page: Path, width: int) -> None:
    chromium.events.clear()
    chromium.open(page, width=width, height=900, phone=width < 1000)
    assert chromium.said("Runtime.exceptionThrown") == []
    assert chromium.run("document.documentElement.scrollWidth") == width
    assert chromium.run(CUT % "section > .scroll, .matrices .scroll, pre") == 0
    tops = chromium.run("[...document.querySelectorAll('.panel figure')].map(f => f.getBoundingClientRect().top)")
    assert len(tops) == 5 and (len(set(tops)) == 1) is (width == 1400)
    assert chromium.run("Math.min(...[...document.querySelectorAll('.panel img')].map(i => i.clientWidth))") >= 150
    assert chromium.run("getComputedStyle(document.querySelector('.cards td'), '::before').content") == (
        '"before"' if width < 1000 else "none"
    )


def test_tables_sort_by_a_click_on_their_heads(chromium: Browser, page: Path) -> None:
    chromium.open(page, width=1400, height=900)
    column = "[...document.querySelectorAll('#results .main tbody tr')].map(r => r.cells[%d].dataset.v ?? '')"
    chromium.run("document.querySelectorAll('#results th button')[1].click()")
    assert chromium.run(column % 1) == ["7.76", "7.76", "2.91", "2.91", "2.91"]
    chromium.run("document.querySelectorAll('#results th button')[8].click()")
    assert chromium.run(column % 8) == ["1.62", "", "", "", ""]
    chromium.run("document.querySelectorAll('#results th button')[0].click()")
    names = "[...document.querySelectorAll('#results .main tbody th code')].map(c => c.textContent)"
    assert chromium.run(names) == ["engine pruned", "engine baseline", "finetuned", "pruned", "baseline"]
    assert chromium.run("document.querySelectorAll('#results [aria-sort]').length") == 1


def test_paper_shows_the_figures_and_no_links(chromium: Browser, page: Path) -> None:
    chromium.open(page, width=700, height=900)
    chromium.send("Emulation.setEmulatedMedia", media="print")
    try:
        assert chromium.run("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert chromium.run(CUT % "body") == 0
        assert len(chromium.send("Page.printToPDF")["data"]) > 10_000
    finally:
        chromium.send("Emulation.setEmulatedMedia", media="")
