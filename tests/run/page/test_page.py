"""The page as a whole: what it shows, what it leaves out, that it loads nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vss.core.report import write_report
from vss.run.page import context, render, write_page
from vss.train.gate import gate

SECTIONS = ["results", "pictures", "classes", "training", "widths", "latency", "checks", "locked", "steps", "reproduce"]
VOID_TAGS = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """Sections with their text, attributes that load something, and tags that do not balance."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.loads: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.scripts = 0
        self._section = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = dict(attrs)
        self.scripts += tag == "script"
        self.ids += [facts["id"]] if facts.get("id") else []
        self.loads += [
            facts[key] or "" for key in ("src", "href", "data", "poster", "action", "srcset") if key in facts
        ]
        if tag == "section":
            self._section = facts["id"] or ""
            self.sections[self._section] = ""
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID_TAGS:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self._section:
            self.sections[self._section] += f" {data.strip()}"


@pytest.fixture
def page(report: dict[str, Any], tmp_path: Path) -> Page:
    return Page(render(report, tmp_path))


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_sections_all_there_in_order_and_balanced(page: Page) -> None:
    assert list(page.sections) == SECTIONS
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))


def test_loads_nothing_from_outside(report: dict[str, Any], tmp_path: Path) -> None:
    html = render(report, tmp_path)
    page = Page(html)
    assert page.scripts == 0
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert sum(load.startswith("data:image/png") for load in page.loads) == 5
    assert "http" not in html
    assert not re.search(r"@import|url\((?!#)", html)


def test_results_table_has_every_figure(page: Page) -> None:
    text = squeezed(page.sections["results"])
    for figure in ("7.76", "8.00", "61.34", "58.20", "1.62\u00d7", "0.81", "11.30", "37.65", "three classes"):
        assert figure in text
    assert "finetuned after fine-tuning 2.91 \u221262 % 4.00 \u221250 % 61.02 \u22120.32" in text


def test_classes_bars_and_change(page: Page, report: dict[str, Any], tmp_path: Path) -> None:
    text = squeezed(page.sections["classes"])
    assert "<kerb> 40.0 41.5 41.5 +1.5" in text
    assert "car 54.0 51.5 absent" in text
    html = render(report, tmp_path)
    assert "&lt;kerb&gt;" in html and "<kerb>" not in html
    assert html.count('style="width:41.50%"') == 2


def test_widths_locked_steps_reproduce(page: Page) -> None:
    assert "64 of 128 channels stay (50.0 %) in 2 groups" in squeezed(page.sections["widths"])
    assert "enc.0: 64 to 16" in page.sections["widths"]
    assert "head.out its channels are the classes" in squeezed(page.sections["locked"])
    assert "train ok \u00b7 12.5 s export skipped" in squeezed(page.sections["steps"])
    text = squeezed(page.sections["reproduce"])
    assert "vss run 'street unet'" in text and "ab12" * 16 in text and "kind macs" in text


def test_checks_and_latency(page: Page) -> None:
    text = squeezed(page.sections["checks"])
    assert "masked equals sliced yes" in text and "3.10e\u221206" in text and "42.8" in text
    text = squeezed(page.sections["latency"])
    assert "engine baseline 42.00 ms \u00b7 p99 44.00" in text
    assert "25.00 ms \u00b7 decode 5.0, engine 20.0" in text


def test_gates_have_a_section_with_both_figures_where_they_differ(report: dict[str, Any], tmp_path: Path) -> None:
    first, second = {"miou_pct": 60.0}, {"miou_pct": 30.0}
    named = {"what": "engine equals its network", **gate(second, second)}
    lost = {"what": "pruned against baseline", **gate(first, second, max_drop=1, interval=[27.5, 33.25])}
    lost["all_classes"] = {"baseline": 59.0, "candidate": 28.0, "drop": 31.0}
    report["gate"] = {**lost, "checks": [named, lost, {**gate(first, second, max_drop=None), "what": "open"}]}
    page = Page(render(report, tmp_path))
    text = squeezed(page.sections["gates"])
    assert "engine equals its network mIoU (%) 30.00 30.00 0.00 0.10 passed" in text
    assert "pruned against baseline mIoU (%) 60.00 30.00 \u221230.00 \u221233.25 to \u221227.50 1.00 failed" in text
    assert "classes that are only predicted counted as 0 59.00 28.00 \u221231.00" in text
    assert "open mIoU (%) 60.00 30.00 \u221230.00 none not judged" in text
    assert "Accuracy gate" not in page.sections["checks"]


def test_a_gate_of_several_comparisons_is_one_table(report: dict[str, Any], tmp_path: Path) -> None:
    check = {"what": "engine against torch", "passed": False, "drop": 0.25, "sentence": "failed: too much."}
    report["gate"] = {
        **check,
        "detail": "failed: too much.",
        "checks": [check, {**check, "what": "other", "drop": 2.5}],
    }
    html = render(report, tmp_path)
    text = squeezed(Page(html).sections["checks"])
    assert "passed no checks passed drop engine against torch no 0.25 other no 2.5" in text
    assert html.count("failed: too much.") == 2  # once per comparison, in the head


def test_true_is_praised_only_where_it_is_a_check(report: dict[str, Any], tmp_path: Path) -> None:
    html = render(report, tmp_path)
    assert re.search(r'masked equals sliced</dt><dd class="good">yes', html)
    assert re.search(r"modified</dt><dd>yes", html)


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    report = {"name": "r", "status": "ok", "rows": [{"name": "baseline", "miou_pct": 50.0}]}
    page = Page(render(report, tmp_path))
    assert list(page.sections) == ["results"]
    assert "MACs" not in page.sections["results"].split("Every figure")[0]


def test_latency_bars_share_one_scale(report: dict[str, Any], tmp_path: Path) -> None:
    _, latency = context(report, tmp_path)["sections"]["latency"]
    bars = {bar["name"]: bar for bar in latency["bars"]}
    assert bars["baseline"]["to_p50"] == pytest.approx(100)
    assert bars["engine baseline"]["to_p50"] == pytest.approx(100 * 42 / 58.2)
    assert bars["engine baseline"]["to_p99"] == pytest.approx(100 * 44 / 58.2)


def test_a_noisy_machine_is_said_in_place_of_times(report: dict[str, Any], tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if "latency" not in key} for row in report["rows"]]
    html = render(report | {"rows": rows, "bench": {"noise": "the machine is too noisy: 9.0%."}}, tmp_path)
    assert "No latencies: the machine is too noisy: 9.0%." in squeezed(html) and " ms · p99" not in html


def test_write_page_from_file(report: dict[str, Any], tmp_path: Path) -> None:
    source = write_report(tmp_path / "report.json", report)
    html = write_page(source, tmp_path / "out" / "report.html").read_text()
    assert html.startswith("<!doctype html>") and "Half the MACs" in html
    assert html == render(report, tmp_path)


def test_a_method_without_the_phase_it_needs_is_marked_in_the_results(report: dict[str, Any], tmp_path: Path) -> None:
    row = next(row for row in report["rows"] if row["name"] == "finetuned")
    row["labels"] = "slimming without its sparse phase"
    text = squeezed(Page(render(report, tmp_path)).sections["results"])
    assert "finetuned after fine-tuning; slimming without its sparse phase" in text
