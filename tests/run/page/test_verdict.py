"""The sentences follow the numbers."""

from __future__ import annotations

from typing import Any

import pytest

from vss.run.page.verdict import facts, verdict


def of(macs: float, miou: float, speedup: float | None = None, **report: Any) -> str:
    rows = [
        {"name": "baseline", "macs_g": 10.0, "miou_pct": 60.0},
        {"name": "finetuned", "macs_g": macs, "miou_pct": miou, "speedup": speedup},
    ]
    return verdict({"name": "r", "status": "ok", "rows": rows, **report}).headline.replace("\u202f", " ")


@pytest.mark.parametrize(
    ("macs", "miou", "speedup", "text"),
    [
        (5.0, 59.7, 1.62, "Half the MACs, 1.62\u00d7 faster, \u22120.3 mIoU after fine-tuning"),
        (3.33, 60.4, 0.8, "A third of the MACs, 1.25\u00d7 slower, +0.4 mIoU after fine-tuning"),
        (2.5, 60.0, 1.0, "A quarter of the MACs, no faster (1.00\u00d7), 0.00 mIoU after fine-tuning"),
        (6.3, 55.0, None, "37 % fewer MACs, \u22125.0 mIoU after fine-tuning"),
        (10.0, 59.98, None, "The same MACs, \u22120.02 mIoU after fine-tuning"),
        (12.0, 60.0, None, "20 % more MACs, 0.00 mIoU after fine-tuning"),
    ],
)
def test_headline(macs: float, miou: float, speedup: float | None, text: str) -> None:
    assert of(macs, miou, speedup) == text


def test_gate_and_failures_set_the_tone() -> None:
    assert of(5, 59, gate={"passed": False}).endswith("; gate failed")
    failed = verdict({"name": "r", "status": "ok", "rows": [], "gate": {"passed": False}})
    assert (failed.headline, failed.tone) == ("The gate failed", "bad")
    named = [
        {"what": "engine equals its network", "passed": True},
        {"what": "pruned against baseline", "passed": False},
    ]
    failed = verdict({"name": "r", "status": "ok", "rows": [], "gate": {"passed": False, "checks": named}})
    assert (failed.headline, failed.tone) == ("The gate failed: pruned against baseline", "bad")
    named[1]["passed"] = None
    open_ = verdict({"name": "r", "status": "ok", "rows": [], "gate": {"passed": True, "checks": named}})
    assert (open_.headline, open_.tone) == ("The gate passed; not judged: pruned against baseline", "warn")
    assert open_.reasons[0] == "The gate pruned against baseline is not judged: the recipe sets no limit."
    steps = [{"name": "export", "status": "failed", "detail": "disk full"}]
    broken = verdict({"name": "r", "status": "failed", "rows": [], "steps": steps})
    assert broken.tone == "bad" and broken.reasons[0] == "Step export failed: disk full."
    assert broken.headline == "r: failed"


def test_full_report(report: dict[str, Any]) -> None:
    found = facts(report)
    assert (found.mac_ratio, found.speedup, found.timed_on) == (0.5, 1.62, "engine")
    assert found.param_ratio == pytest.approx(2.91 / 7.76)
    text = verdict(report)
    assert (text.tone, text.answer, text.reasons) == ("good", "May ship", [])
    assert text.sentences[0] == "Pruning cost 20.3 points of mIoU and fine-tuning brought back 20.0."
    assert text.sentences[1] == "The engine scores the same as torch."
    assert "2.00\u00d7 cut in MACs gave a 1.62\u00d7 speed-up (engine), 0.81 of" in text.sentences[2]
    assert [figure for figure, _ in text.tiles] == ["\u221250 %", "\u221262 %", "1.62\u00d7", "\u22120.32"]


def test_control_and_each_gate_comparison_are_named(report: dict[str, Any]) -> None:
    report["rows"].append({"name": "control", "miou_pct": 62.0})
    checks = [{"what": "engine against torch", "sentence": "passed: a drop of 0.0."}, {"sentence": "failed: 3.0."}]
    found = verdict(report)
    assert "\u22121.0\u202fmIoU against the unpruned network trained as long" in found.headline
    assert found.tiles[-1] == ("\u22120.98", "points of mIoU, trained as long")
    report["gate"] = {"passed": False, "sentence": "failed: 3.0.", "checks": checks}
    text = verdict(report)
    assert text.sentences[:2] == ["Gate, engine against torch: passed: a drop of 0.0.", "Gate failed: 3.0."]
    wanted = "The unpruned control, fine-tuned as long, reaches 62.00 %: \u22120.98 points for the pruned network."
    assert wanted in text.sentences


def test_speedup_from_medians_when_no_row_states_it(report: dict[str, Any]) -> None:
    del report["rows"][4]["speedup"]
    assert facts(report).speedup == pytest.approx(42.0 / 26.0)
    report["rows"] = report["rows"][:3]
    assert facts(report).speedup == pytest.approx(58.2 / 36.9)
    assert facts(report).timed_on == "torch"


def test_engine_that_differs_from_torch_says_by_how_much(report: dict[str, Any]) -> None:
    report["rows"][4]["miou_pct"] = 60.0
    assert "The engine differs from torch by \u22121.02 points." in verdict(report).sentences
    assert facts(report).score_after == 60.0


CHECK = {"what": "pruned against control", "metric": "miou_pct", "baseline": 60.0, "candidate": 59.5, "drop": 0.5}
OPEN: list[tuple[dict[str, Any], str]] = [
    ({"max_drop": 1.0, "drop_interval": [0.2, 1.3]}, "may reach 1.30 points (end of the 95 % interval) and 1.00 may"),
    ({"speedup": 0.97}, "The pruned network is not clearly faster: 0.97\u00d7."),
    ({"noise": "the machine is too noisy"}, "The speed is not known: the machine is too noisy"),
    ({"control": None}, "There is no unpruned control"),
    ({"worth": "so pruning does not pay here."}, "so pruning does not pay here."),
]


@pytest.mark.parametrize(("changes", "reason"), OPEN)
def test_amber_says_what_is_open(report: dict[str, Any], changes: dict[str, Any], reason: str) -> None:
    changes = {"control": {"name": "control", "miou_pct": 60.0}, "worth": "", **changes}
    check = CHECK | {"max_drop": 1.0, "passed": True} | {k: v for k, v in changes.items() if "drop" in k}
    report["rows"] += [changes["control"]] if changes["control"] else []
    report["rows"][4]["speedup"] = changes.get("speedup", 1.62)
    report["bench"]["noise"] = changes.get("noise")
    report["gate"] = {"passed": True, "checks": [check]}
    found = verdict(report, changes["worth"])
    assert (found.tone, found.answer, len(found.reasons)) == ("warn", "Not settled", 1)
    assert reason in found.reasons[0]


def test_a_network_no_better_than_a_constant_answer_is_not_settled(report: dict[str, Any]) -> None:
    """300 of 400 pixels are road and three classes occur: to call all of them road has IoU 0.75, 0, 0, so 25 %."""
    report["classes"] = ["void", "road", "car", "tree"]
    report["confusion"] = {"baseline": [[0] * 4, [0, 300, 0, 0], [0, 60, 0, 0], [0, 40, 0, 0]]}
    (reason,) = verdict(report).reasons
    assert verdict(report).tone == "warn" and "scores no more than a constant answer: mIoU 25.0 % over" in reason
    assert reason.endswith("and to call every pixel road gives 25.0 %. Train it longer.")
    report["confusion"]["baseline"][3] = [0, 39, 0, 1]  # one pixel of a tree is found
    assert verdict(report).tone == "good"
    report["confusion"]["baseline"] = [[0] * 4, [9, 291, 0, 0], [1, 29, 30, 0], [1, 19, 0, 20]]
    report["rows"][0]["miou_pct"] = 24.0  # void is predicted and counts as 0 in it: not an answer by chance
    assert verdict(report).tone == "good"


@pytest.mark.parametrize(("low", "tone"), [(25.0, "warn"), (25.1, "good")])
def test_defects_found_by_chance_are_not_settled(report: dict[str, Any], low: float, tone: str) -> None:
    counts = {"tp": 3, "fn": 2, "fp": 4, "tn": 11}
    report["rows"][0] |= {"ap_pct": 40.0, "ap_low_pct": low, **counts}
    found = verdict(report)
    assert found.tone == tone
    assert found.reasons == [] or "from 25.0), and chance gives 25.0 %. Train it longer, or score" in found.reasons[0]


def test_the_head_answers_what_was_lost_within_noise_and_on_what(report: dict[str, Any]) -> None:
    report["rows"].append({"name": "control", "miou_pct": 60.0})
    report["gate"] = {
        "passed": True,
        "checks": [CHECK | {"max_drop": 1.0, "passed": True, "drop_interval": [-0.1, 0.9]}],
    }
    about = {"backend": "openvino", "version": "2026.4", "device": "cpu", "threads": 1}
    report["bench"]["engine"]["sessions"]["engine pruned"] = {"batch": 1, "describe": about}
    found = verdict(report)
    told = "mIoU points against the unpruned control, trained as long; 95\u00a0%: \u22120.90 to +0.10, within noise"
    assert (found.tone, found.tiles[0]) == ("good", ("\u22120.50", told))
    assert "Timed on Xeon 8370C, OpenVINO 2026.4, 1 thread, 1 image at a time." in found.sentences
