"""The page as a whole: what it shows, what it leaves out, that it loads nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vss.core.files import write_json
from vss.core.report import write_report
from vss.run.page import context, render, write_page
from vss.run.page.evidence import confusion
from vss.train.gate import gate

SECTIONS = [
    "tradeoff", "results", "classes", "confusion", "worst", "pictures", "missing", "latency", "training", "widths",
    "checks", "locked", "steps", "reproduce",
]  # fmt: skip
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
    assert page.scripts == 1 and "fetch" not in html.split("<script>")[1]
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert sum(load.startswith("data:image/png") for load in page.loads) == 5
    assert "http" not in html and ".svg" not in html
    assert not re.search(r"@import|url\((?!#)", html)


def test_results_table_has_every_figure(page: Page) -> None:
    text = squeezed(page.sections["results"])
    for figure in ("7.76", "8.00", "61.34", "58.20", "1.62\u00d7", "0.81", "11.30", "37.65", "three classes"):
        assert figure in text
    assert "pruned and fine-tuned finetuned 2.91 \u221262 % 4.00 \u221250 % 61.02 \u22120.32" in text
    assert "pruned, before fine-tuning pruned 2.91" in text and "engine of the pruned network engine pruned" in text


def test_classes_with_the_greatest_loss_come_first(report: dict[str, Any], tmp_path: Path) -> None:
    report["iou_pct"]["engine pruned"] = [88.0, 41.5, None]
    html = render(report, tmp_path)
    text = squeezed(Page(html).sections["classes"])
    first, second, last = (
        text.index(name) for name in ("road 90.0 88.0 \u22122.0", "<kerb> 40.0 41.5 +1.5", "car 54.0 absent")
    )
    assert first < second < last
    assert "+0.5 to +2.5 a gain beyond noise" in text and "\u22120.5 to +0.5 within noise" in text
    assert "No class lost beyond noise against the unpruned network." in text
    assert "58.8 <kerb>, 20 %" not in text and "<kerb>, 20 %" in text  # of 100 pixels of road, 20
    assert "&lt;kerb&gt;" in html and "<kerb>" not in html
    assert html.count('style="width:41.50%"') == 1
    report["class_drops"]["baseline"][0] = [1.5, 2.5]
    assert "Lost beyond noise against the unpruned network: road (\u22122.0)." in render(report, tmp_path)


def test_confusion_is_in_percent_of_the_true_class(report: dict[str, Any], tmp_path: Path) -> None:
    _, data = context(report, tmp_path)["sections"]["confusion"]
    assert data["heads"] == ["car", "<kerb>", "road"]  # IoU after: 0, 44 / 70, 80 / 113
    before, after = (
        {head: [value for value, _, _ in cells] for head, cells in each["body"]} for each in data["tables"]
    )
    assert before == {"car": [75, 0, 25], "<kerb>": [10, 80, 10], "road": [0, 10, 90]}
    assert after == {"car": [0, 0, 100], "<kerb>": [2, 88, 10], "road": [0, 20, 80]}


def test_many_classes_become_others_in_the_confusion() -> None:
    draw = np.random.default_rng(0)
    matrix = draw.integers(0, 20, (40, 40)) + np.diag(np.arange(40) * 50)
    names = [str(index) for index in range(40)]
    found = confusion({"confusion": {"baseline": matrix.tolist()}, "classes": names})
    assert found is not None and found["others"] == 17 and found["heads"][-1] == "others" and len(found["heads"]) == 24
    rest = [index for index in range(40) if str(index) not in found["heads"]]
    cells = [value for value, _, _ in found["tables"][0]["body"][-1][1]]
    assert cells[-1] == pytest.approx(100 * matrix[np.ix_(rest, rest)].sum() / matrix[rest].sum())
    assert sum(cells) == pytest.approx(100)


def test_worst_images_are_listed_and_pictured(page: Page) -> None:
    text = squeezed(page.sections["worst"])
    assert "0001 40.0 31.5 \u22128.5 lowest score car taken for road, 12.5 % of the image" in text
    assert "0002 80.0 70.0 \u221210.0 lost most" in text
    text = squeezed(page.sections["pictures"])
    assert "0001 lowest score: 31.5 %" in text and "engine of the pruned network" in text


def test_what_is_missing_is_named_with_its_reason(report: dict[str, Any], tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if "latency" not in key} for row in report["rows"]]
    without = {key: value for key, value in report.items() if key not in ("worst", "confusion")}
    text = squeezed(
        Page(render(without | {"rows": rows, "nulls": {"rows.0.x": "was nan"}}, tmp_path)).sections["missing"]
    )
    for words in (
        "Latency and speed-up the report has none",
        "Unpruned control, trained as long the recipe has control: false",
        "Confusion, intervals by class, worst images an earlier version wrote this report",
        "IoU of car, engine of the pruned network in neither truth nor prediction",
        "rows.0.x was nan",
    ):
        assert words in text


def test_what_explain_and_lut_left_is_linked(report: dict[str, Any], tmp_path: Path) -> None:
    figures = {"ms_before": 4.0, "ms_after": 2.5, "speedup": 1.6, "mac_reduction": 2.0}
    cause = {"cause": "misaligned width", "lost_ms": 0.25, "share": 0.1, "units": ["a"]}
    write_json(tmp_path / "explain.json", {"kind": "vss.explain", "schema": 1, **figures, "causes": [cause]})
    (tmp_path / "cliffs.svg").write_text("<svg/>")
    (tmp_path / "plan.json").write_text('{"kind": "vss.plan"}')
    html = render(report, tmp_path)
    text = squeezed(Page(html).sections["layers"])
    assert "4.00 ms before and 2.50 ms after, 1.60\u00d7 for 2.00\u00d7 fewer MACs" in text
    assert "misaligned width (0.25 ms)" in text and 'href="cliffs.svg"' in html and "plan.json" not in html
    assert 'href="cliffs.svg"' not in render(report, tmp_path, linked=False)


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
    assert "engine of the unpruned network 42.00 ms \u00b7 p99 44.00" in text
    assert "25.00 ms \u00b7 decode 5.0, engine 20.0" in text


def test_gates_have_a_section_with_both_figures_where_they_differ(report: dict[str, Any], tmp_path: Path) -> None:
    first, second = {"miou_pct": 60.0}, {"miou_pct": 30.0}
    named = {"what": "engine equals its network", **gate(second, second)}
    lost = {"what": "pruned against baseline", **gate(first, second, max_drop=1, interval=[27.5, 33.25])}
    lost["all_classes"] = {"baseline": 59.0, "candidate": 28.0, "drop": 31.0}
    report["gate"] = {**lost, "checks": [named, lost, {**gate(first, second, max_drop=None), "what": "open"}]}
    page = Page(render(report, tmp_path))
    text = squeezed(page.sections["gates"])
    assert "Engine against its own network in torch mIoU (%) 30.00 30.00 0.00 0.10 passed" in text
    row = "mIoU (%) 60.00 30.00 \u221230.00 \u221233.25 to \u221227.50 a loss beyond noise 1.00 failed"
    assert f"Engine of the pruned network against the unpruned network {row}" in text
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
    assert list(page.sections) == ["results", "missing"]
    assert "MACs" not in page.sections["results"].split("Every figure")[0]


def test_latency_bars_share_one_scale(report: dict[str, Any], tmp_path: Path) -> None:
    _, latency = context(report, tmp_path)["sections"]["latency"]
    bars = {bar["name"]: bar for bar in latency["bars"]}
    assert bars["unpruned"]["to_p50"] == pytest.approx(100)
    assert bars["engine of the unpruned network"]["to_p50"] == pytest.approx(100 * 42 / 58.2)
    assert bars["engine of the unpruned network"]["to_p99"] == pytest.approx(100 * 44 / 58.2)


def test_a_noisy_machine_is_said_in_place_of_times(report: dict[str, Any], tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if "latency" not in key} for row in report["rows"]]
    html = render(report | {"rows": rows, "bench": {"noise": "the machine is too noisy: 9.0%."}}, tmp_path)
    page = Page(html)
    assert "the machine is too noisy: 9.0%." in page.sections["missing"] and "latency" not in page.sections
    assert "The speed is not known: the machine is too noisy: 9.0%." in html


def test_write_page_from_file(report: dict[str, Any], tmp_path: Path) -> None:
    source = write_report(tmp_path / "report.json", report)
    html = write_page(source, tmp_path / "out" / "report.html").read_text()
    assert html.startswith("<!doctype html>") and "Half the MACs" in html
    assert html == render(report, tmp_path)


def test_a_method_without_the_phase_it_needs_is_marked_in_the_results(report: dict[str, Any], tmp_path: Path) -> None:
    row = next(row for row in report["rows"] if row["name"] == "finetuned")
    row["labels"] = "slimming without its sparse phase"
    text = squeezed(Page(render(report, tmp_path)).sections["results"])
    assert "pruned and fine-tuned finetuned slimming without its sparse phase" in text
