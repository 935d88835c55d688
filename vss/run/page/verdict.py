"""What the run came to: may the network ship, why, and the figures behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vss.run.page.words import THIN, TIMES, label, number, plain, signed

Row = Mapping[str, Any]
_FRACTIONS = ((1 / 2, "Half the MACs"), (1 / 3, "A third of the MACs"), (1 / 4, "A quarter of the MACs"))


class Verdict(NamedTuple):
    """`answer` says whether the network may ship, `reasons` why not; `headline` is one sentence, `sentences` the rest.

    `tone` is "good" (green), "warn" (amber) or "bad" (red); `tiles` are (figure, caption).
    """

    headline: str
    sentences: list[str]
    tone: str
    tiles: list[tuple[str, str]]
    answer: str
    reasons: list[str]


class Facts(NamedTuple):
    """The comparison behind the verdict; every figure is None when the report lacks what it needs.

    `mac_ratio` and `param_ratio` are after / before, `speedup` is before / after time, the scores are
    percentages of `title`.
    """

    mac_ratio: float | None
    param_ratio: float | None
    speedup: float | None
    timed_on: str
    title: str
    score_before: float | None
    score_pruned: float | None
    score_tuned: float | None
    score_engine: float | None
    score_control: float | None

    @property
    def score_after(self) -> float | None:
        """The figure furthest down the chain: engine, else fine-tuned, else pruned."""
        chain = (self.score_engine, self.score_tuned, self.score_pruned)
        return next((value for value in chain if value is not None), None)

    @property
    def against(self) -> tuple[float | None, bool]:
        """The unpruned network's figure, and whether it was trained as long: that of the control, else as trained."""
        as_long = self.score_control is not None and self.score_tuned is not None
        return (self.score_control if as_long else self.score_before), as_long


SCORES = (("miou_pct", "mIoU"), ("ap_pct", "AP"))


def score_of(report: Mapping[str, Any]) -> tuple[str, str]:
    """Key and title of the score that the rows of a report have; mean IoU where they have none."""
    rows = report.get("rows", [])
    return next((pair for pair in SCORES if any(row.get(pair[0]) is not None for row in rows)), SCORES[0])


def facts(report: Mapping[str, Any]) -> Facts:
    rows = {row["name"]: row for row in report.get("rows", [])}
    before, engine = rows.get("baseline", {}), rows.get("engine pruned", {})
    small = rows.get("finetuned") or rows.get("pruned") or {}
    key, title = score_of(report)
    timed = engine if _speedup(rows, "engine pruned", "engine baseline") else small
    return Facts(
        mac_ratio=_ratio(small.get("macs_g"), before.get("macs_g")),
        param_ratio=_ratio(small.get("params_m"), before.get("params_m")),
        speedup=_speedup(rows, "engine pruned", "engine baseline") or _speedup(rows, small.get("name", ""), "baseline"),
        timed_on="engine" if timed is engine and engine else "torch",
        title=title,
        score_before=before.get(key),
        score_pruned=rows.get("pruned", {}).get(key),
        score_tuned=rows.get("finetuned", {}).get(key),
        score_engine=engine.get(key),
        score_control=rows.get("control", {}).get(key),
    )


ANSWERS = {"good": "May ship", "warn": "Not settled", "bad": "Do not ship"}


def verdict(report: Mapping[str, Any], worth: str = "") -> Verdict:
    """`worth`: the sentence on what pruning is worth at equal latency, where there is one."""
    found, gate = facts(report), report.get("gate", {})
    parts = [_macs_phrase(found.mac_ratio), _speed_phrase(found.speedup), _score_phrase(found)]
    headline = ", ".join(part for part in parts if part)
    headline = headline[:1].upper() + headline[1:]
    if "passed" in gate:
        headline += f"{'; ' if headline else 'The '}{_gate_phrase(gate)}"
    sentences = [] if gates(report) else _gate_sentences(gate)
    failed, open_ = _failures(report), _open_points(report, worth)
    tone = "bad" if failed else "warn" if open_ else "good"
    fallback = f"{report['name']}: {report.get('status', '')}"
    more = [sentence for sentence in (_timed_on(report), worth) if sentence and sentence not in open_]
    return Verdict(
        headline or fallback, sentences + _more(found) + more, tone, _tiles(report, found), ANSWERS[tone],
        failed + open_,
    )  # fmt: skip


def _failures(report: Mapping[str, Any]) -> list[str]:
    """Why the network must not ship."""
    broken = [step for step in report.get("steps", []) if step.get("status") == "failed"]
    found = [f"Step {step['name']} failed: {step.get('detail') or 'no detail was recorded'}." for step in broken]
    if report.get("status") == "failed" and not broken:
        found.append("The run is marked as failed.")
    gate = report.get("gate", {})
    failed = [check for check in gate.get("checks", []) if check.get("passed") is False]
    found += [f"The gate {check['what']} failed." for check in failed if check.get("what")]
    if gate.get("passed") is False and not any(check.get("what") for check in failed):
        found.append("The gate failed.")
    return found + [
        f"Building {row['name']} {row['precision']} for {row['runtime']} failed." for row in report.get("built", [])
        if not row["passed"]
    ]  # fmt: skip


def _open_points(report: Mapping[str, Any], worth: str) -> list[str]:
    """What is not known or not sure, so that somebody has to decide."""
    gate, found = report.get("gate", {}), []
    if "passed" not in gate:
        found.append("No gate has judged the accuracy.")
    for check in gate.get("checks", []):
        what, span, limit = check.get("what"), check.get("drop_interval"), check.get("max_drop")
        if what and check.get("passed", True) is None:
            found.append(f"The gate {what} is not judged: the recipe sets no limit.")
        elif what and check.get("passed") and span and limit is not None and span[1] > limit + 1e-9:
            found.append(
                f"The gate {what} passed, but the loss may reach {number(span[1], 2)} points (end of the 95 % "
                f"interval) and {number(limit, 2)} may be lost: score more images, or decide."
            )
    if gate.get("checks") and not any(row["name"] == "control" for row in report.get("rows", [])):
        found.append("There is no unpruned control that was trained as long, which may be better than the baseline.")
    return [*_by_chance(report), *found, *_open_times(report, worth)]


def _by_chance(report: Mapping[str, Any]) -> list[str]:
    """That the unpruned network is no better than a constant answer; gates judge losses, and it has nothing to lose."""
    matrix = report.get("confusion", {}).get("baseline", [])
    truth = {index: sum(counts) for index, counts in enumerate(matrix) if sum(counts)}
    if truth:  # a class that is only predicted, which other figures count as 0, has no part in either
        found = [matrix[k][k] / (count + sum(row[k] for row in matrix) - matrix[k][k]) for k, count in truth.items()]
        most = max(truth, key=truth.__getitem__)
        reached, constant = (100 * part / len(truth) for part in (sum(found), truth[most] / sum(truth.values())))
        if reached <= constant + 1e-9:
            return [
                f"The network before pruning scores no more than a constant answer: mIoU {number(reached, 1)} % over "
                f"the classes of the truth, and to call every pixel {report['classes'][most]} gives "
                f"{number(constant, 1)} %. Train it longer."
            ]
    row: Row = next((row for row in report.get("rows", []) if row["name"] == "baseline"), {})
    if row.get("ap_low_pct") is not None:
        share = 100 * (row["tp"] + row["fn"]) / sum(row[key] for key in ("tp", "fp", "fn", "tn"))
        if row["ap_low_pct"] <= share:
            low = f"95 % interval from {number(row['ap_low_pct'], 1)}"
            what = f"AP {number(row['ap_pct'], 1)} % ({low}), and chance gives {number(share, 1)} %"
            more = "Train it longer, or score more images."
            return [f"The network before pruning may be no better than chance: {what}. {more}"]
    return []


def _open_times(report: Mapping[str, Any], worth: str) -> list[str]:
    if not report.get("rows") or report.get("status") == "failed":
        return []
    bench, speedup = report.get("bench", {}), facts(report).speedup
    if bench.get("noise"):
        return [f"The speed is not known: {bench['noise']}"]
    if speedup is None:
        return ["The speed is not known: no engine was timed."]
    low = bench.get("engine", {}).get("speedup", {}).get("engine pruned", {}).get("low")
    if (low if low is not None else speedup) <= 1:
        span = f" (95 % interval from {number(low, 2)})" if low is not None else ""
        return [f"The pruned network is not clearly faster: {number(speedup, 2)}{TIMES}{span}."]
    return [worth] if worth.endswith("pruning does not pay here.") else []


def _timed_on(report: Mapping[str, Any]) -> str:
    """Where the times of the engines come from."""
    session = report.get("bench", {}).get("engine", {}).get("sessions", {}).get("engine pruned", {})
    about = session.get("describe", {})
    if report.get("bench", {}).get("noise") or not about.get("backend"):
        return ""
    environment = report.get("environment", {})
    chip = (environment.get("cpu") or {}).get("model")
    if about.get("device", "cpu") != "cpu":
        chip = next((device.get("name") for device in environment.get("devices") or []), None)
    threads = about.get("threads")
    parts = [
        chip or about.get("device"),
        f"{plain(about['backend'])} {about.get('version', '')}".strip(),
        f"{threads} thread{'' if threads == 1 else 's'}" if threads else "",
        f"{session['batch']} image{'' if session['batch'] == 1 else 's'} at a time" if session.get("batch") else "",
    ]
    return f"Timed on {', '.join(str(part) for part in parts if part)}."


def _gate_phrase(gate: Mapping[str, Any]) -> str:
    named = [check for check in gate.get("checks", []) if check.get("what")]
    failed = [check["what"] for check in named if check.get("passed") is False]
    open_ = [check["what"] for check in named if check.get("passed", True) is None]
    if not gate["passed"]:
        return f"gate failed{': ' if failed else ''}{', '.join(failed)}"
    return f"gate passed{'; not judged: ' if open_ else ''}{', '.join(open_)}"


def _gate_sentences(gate: Mapping[str, Any]) -> list[str]:
    """What the gate says, one sentence per comparison it made."""
    checks = gate.get("checks") or [gate]
    return [
        f"Gate, {c['what']}: {c['sentence']}" if c.get("what") else f"Gate {c['sentence']}"
        for c in checks
        if c.get("sentence")
    ]


def _more(found: Facts) -> list[str]:
    sentences = []
    before, pruned, tuned, engine = found.score_before, found.score_pruned, found.score_tuned, found.score_engine
    if before is not None and pruned is not None and tuned is not None:
        cost, back = before - pruned, tuned - pruned
        if cost > 0.05:
            sentences.append(
                f"Pruning cost {number(cost, 1)} points of {found.title} and fine-tuning brought back "
                f"{number(back, 1)}."
            )
    if found.score_control is not None and tuned is not None:
        control, ahead = number(found.score_control, 2), signed(tuned - found.score_control, 2)
        sentences.append(
            f"The unpruned control, fine-tuned as long, reaches {control} %: {ahead} points for the pruned network."
        )
    if engine is not None and tuned is not None:
        gap = engine - tuned
        same = "scores the same as torch" if abs(gap) < 0.005 else f"differs from torch by {signed(gap, 2)} points"
        sentences.append(f"The engine {same}.")
    if found.speedup and found.mac_ratio and found.mac_ratio < 0.995:
        sentences.append(
            f"A {number(1 / found.mac_ratio, 2)}{TIMES} cut in MACs gave a {number(found.speedup, 2)}{TIMES} speed-up "
            f"({found.timed_on}), {number(found.speedup * found.mac_ratio, 2)} of what the count promised."
        )
    return sentences


def _tiles(report: Mapping[str, Any], found: Facts) -> list[tuple[str, str]]:
    """The loss against each unpruned network with its interval, the speed-up, and what was cut."""
    checks = [check for check in report.get("gate", {}).get("checks", []) if check.get("what") in CHECKS]
    tiles = []
    for check in [check for check in checks if check["what"] != EQUAL and "candidate" in check]:
        told = f"{label(check['metric']).removesuffix(' (%)')} points against the {CHECKS[check['what']][1]}"
        span = f"; 95\u00a0%: {_span(check)}, {within(check)}" if check.get("drop_interval") else ""
        tiles.append((signed(check["candidate"] - check["baseline"], 2), told + span))
    if found.mac_ratio:
        tiles.append((f"{signed((found.mac_ratio - 1) * 100, 0)} %", "MACs"))
    if found.param_ratio:
        tiles.append((f"{signed((found.param_ratio - 1) * 100, 0)} %", "parameters"))
    if found.speedup:
        tiles.append((f"{number(found.speedup, 2)}{TIMES}", f"speed-up, {found.timed_on}"))
    score, as_long = found.against
    if not checks and score is not None and found.score_after is not None:
        told = f"points of {found.title}{', trained as long' if as_long else ''}"
        tiles.append((signed(found.score_after - score, 2), told))
    return tiles


def _macs_phrase(ratio: float | None) -> str:
    if ratio is None:
        return ""
    named = next((text for value, text in _FRACTIONS if abs(ratio - value) <= 0.01), None)
    if named:
        return named
    if abs(ratio - 1) < 0.005:
        return "the same MACs"
    return f"{number(abs(1 - ratio) * 100, 0)} % {'fewer' if ratio < 1 else 'more'} MACs"


def _speed_phrase(speedup: float | None) -> str:
    if speedup is None:
        return ""
    if 0.98 < speedup < 1.02:
        return f"no faster ({number(speedup, 2)}{TIMES})"
    faster = speedup > 1
    return f"{number(speedup if faster else 1 / speedup, 2)}{TIMES} {'faster' if faster else 'slower'}"


def _score_phrase(found: Facts) -> str:
    if found.score_after is None:
        return ""
    score, as_long = found.against
    if score is None:
        return f"{number(found.score_after, 1)} % {found.title}"
    change = found.score_after - score
    tuned = "against the unpruned network trained as long" if as_long else "after fine-tuning"
    where = tuned if found.score_tuned is not None else "without fine-tuning"
    return f"{signed(change, 1 if abs(change) >= 0.05 else 2)}{THIN}{found.title} {where}"


def _ratio(after: float | None, before: float | None) -> float | None:
    return after / before if after is not None and before else None


def _speedup(rows: Mapping[str, Row], name: str, reference: str) -> float | None:
    """The speed-up that the row states (one interleaved run), else the ratio of the two medians."""
    row, base = rows.get(name, {}), rows.get(reference, {})
    if row.get("speedup"):
        return float(row["speedup"])
    return _ratio(base.get("latency_ms_p50"), row.get("latency_ms_p50"))


WORDS = {True: ("passed", "good"), False: ("failed", "bad"), None: ("not judged", "")}


EQUAL = "engine equals its network"
CHECKS = {
    EQUAL: ("Engine against its own network in torch", "network in torch"),
    "pruned against baseline": ("Engine of the pruned network against the unpruned network", "unpruned network"),
    "pruned against control": (
        "Engine of the pruned network against the unpruned control, trained as long",
        "unpruned control, trained as long",
    ),
}
"""`what` of a check -> how its row is headed, and what the engine is compared with."""


def gates(report: Mapping[str, Any]) -> dict[str, object] | None:
    """Rows of `report["gate"]["checks"]`; None for a report whose gate is one comparison without a name."""
    checks = [check for check in report.get("gate", {}).get("checks", []) if "drop" in check and "baseline" in check]
    rows = []
    for check in checks:
        rows.append(_gate_row(check["what"], label(check["metric"]), check))
        if "all_classes" in check:
            what = f"{label(check['metric'])}, classes that are only predicted counted as 0"
            rows.append(_gate_row("", what, check["all_classes"]))
    ends = [0.0] + [abs(end) for row in rows for end in row["marks"].values()]
    reach = 1.08 * max(ends) or 1.0
    for row in rows:
        row["marks"] = {name: 50 + 50 * end / reach for name, end in row["marks"].items()}
    return {"rows": rows, "named": any(row["name"] in CHECKS for row in rows)} if rows else None


def _gate_row(name: str, figure: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """`marks` are changes in points, later places from 0 to 100: of the figure, its interval and its limit; a change to
    the worse is on the left, so that of a rate of misses is turned round."""
    limit = found.get("max_drop")
    word, tone = WORDS[found["passed"]] if "passed" in found else ("", "")
    span = found.get("drop_interval")
    marks = {"change": -found["drop"]} | ({"low": -span[1], "high": -span[0]} if span else {})
    return {
        "name": name,
        "title": CHECKS.get(name, (name,))[0],
        "figure": figure,
        "before": number(found["baseline"], 2),
        "after": number(found["candidate"], 2),
        "change": signed(found["candidate"] - found["baseline"], 2),
        "span": _span(found),
        "noise": within(found),
        "limit": number(limit, 2) if limit is not None else "none" if "passed" in found else "",
        "marks": marks | ({"limit": -limit} if limit is not None else {}),
        "word": word,
        "tone": tone,
    }


def _span(found: Mapping[str, Any]) -> str:
    """The interval as one of the change, for which more is better."""
    span = found.get("drop_interval")
    return f"{signed(-span[1], 2)} to {signed(-span[0], 2)}" if span else ""


def within(found: Mapping[str, Any]) -> str:
    """Whether a drop with its `drop_interval` can be told from chance.

    >>> within({"drop_interval": [-0.1, 0.3]}), within({"drop_interval": [0.1, 0.3]})
    ('within noise', 'a loss beyond noise')
    """
    span = found.get("drop_interval")
    if not span:
        return ""
    if span[0] == span[1] == 0:
        return "no difference"
    return "a loss beyond noise" if span[0] > 0 else "a gain beyond noise" if span[1] < 0 else "within noise"
