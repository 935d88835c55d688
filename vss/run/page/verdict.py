"""Words of the page: metric keys as labels, values as text, facts as tables; and what the run came to, in sentences
and tiles computed from the rows and the gate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vss.core.errors import VssError
from vss.core.files import atomic

MINUS, TIMES, THIN = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{NARROW NO-BREAK SPACE}"
_UNITS = {
    "pct": "%", "mib": "MiB", "gib": "GiB", "ms": "ms", "us": "us", "mhz": "MHz", "m": "M", "g": "G", "w": "W",
    "s": "s", "seconds": "s", "bytes": "bytes",
}  # fmt: skip
_WORDS = {
    "miou": "mIoU", "iou": "IoU", "fwiou": "frequency-weighted IoU", "acc": "accuracy", "mac": "MAC", "macs": "MACs",
    "fps": "images/s", "params": "parameters", "cpu": "CPU", "ram": "RAM", "os": "OS", "cuda": "CUDA", "onnx": "ONNX",
    "sha256": "SHA-256", "lr": "learning rate", "val": "validation", "id": "id", "bn": "BatchNorm",
    "speedup": "speed-up",
}  # fmt: skip


def label(key: str) -> str:
    """A metric key as a reader's label with its unit.

    >>> label("latency_ms_p50"), label("miou_pct"), label("speedup_per_mac_reduction")
    ('latency p50 (ms)', 'mIoU (%)', 'speed-up per MAC reduction')
    """
    parts = key.split("_")
    unit = next((part for part in parts[1:] if part in _UNITS), None)
    words = [_WORDS.get(part, part) for part in parts if part != unit]
    return " ".join(words) + (f" ({_UNITS[unit]})" if unit else "")


def number(value: float, digits: int | None = None) -> str:
    """A number for reading: four significant digits, or `digits` decimals; a true minus, thousands set apart."""
    if isinstance(value, int) and digits is None:
        text = f"{value:,}".replace(",", THIN)
    elif digits is not None:
        text = f"{value:,.{digits}f}".replace(",", THIN)
    elif value == 0:
        text = "0"
    elif abs(value) < 1e-3 or abs(value) >= 1e7:
        text = f"{value:.2e}"
    else:
        decimals = max(0, 3 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{decimals}f}".replace(",", THIN)
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", MINUS)


def signed(value: float, digits: int = 1) -> str:
    """A difference: always with its sign, except for what rounds to zero."""
    if round(value, digits) == 0:
        return number(0.0, digits)
    return ("+" if value > 0 else "") + number(value, digits)


def show(value: Any) -> str:
    if value is None:
        return "\N{EM DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {show(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        deep = any(isinstance(item, Mapping | list | tuple) for item in value)
        return ("; " if deep else ", ").join(show(item) for item in value)
    return str(value)


def block(data: Mapping[str, Any], title: str = "", *, judge: bool = False) -> dict[str, Any]:
    """Nested facts as {title, pairs, table, blocks}: scalars are pairs, alike dictionaries one table, others blocks.

    A list of dictionaries is a table too. `pairs` is [(label, text, state)]; where `judge`, the state of
    true is "good" and of false "bad".
    """
    pairs = [(label(key), show(value), _state(value, judge)) for key, value in data.items() if not _nested(value)]
    inner = {key: value for key, value in data.items() if _nested(value) and isinstance(value, Mapping)}
    lists = {key: value for key, value in data.items() if _nested(value) and not isinstance(value, Mapping)}
    table, blocks = None, []
    if len(inner) > 1 and _alike(list(inner.values())):
        table = _table(list(inner.items()))
        deeper = dict.fromkeys(key for row in inner.values() for key, item in row.items() if _nested(item))
        inner = {key: {name: row[key] for name, row in inner.items() if key in row} for key in deeper}
    blocks += [block(value, label(key), judge=judge) for key, value in inner.items()]
    for key, rows in lists.items():
        body = _table([_named(index, row) for index, row in enumerate(rows)])
        blocks.append({"title": label(key), "pairs": [], "table": body, "blocks": []})
    return {"title": title, "pairs": pairs, "table": table, "blocks": blocks}


def _named(index: int, row: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """A row of a list is headed by its `name` or `what`, else by its place from 1."""
    key = next((key for key in ("name", "what") if isinstance(row.get(key), str)), None)
    return (row[key], {k: v for k, v in row.items() if k != key}) if key else (str(index + 1), row)


def _state(value: Any, judge: bool) -> str:
    return ("good" if value else "bad") if judge and isinstance(value, bool) else ""


def _nested(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, Mapping) for item in value)
    return isinstance(value, Mapping) and bool(value)


def _alike(rows: list[Mapping[str, Any]]) -> bool:
    """Dictionaries that share most of their scalar keys belong in one table."""
    keys = [{key for key, item in row.items() if not _nested(item)} for row in rows]
    shared = set.intersection(*keys)
    return bool(shared) and len(shared) * 2 >= len(set.union(*keys))


def _table(rows: list[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Scalars only; what is nested in a row is shown below the table."""
    keys = list(dict.fromkeys(key for _, row in rows for key, item in row.items() if not _nested(item)))
    body = [(name.replace("_", " "), [show(row.get(key)) for key in keys]) for name, row in rows]
    return {"head": [label(key) for key in keys], "body": body}


def template(name: str) -> Any:
    """A template of the pages."""
    try:
        import jinja2
    except ImportError as error:
        raise VssError("the page needs jinja2: pip install jinja2.") from error
    loader = jinja2.FileSystemLoader(Path(__file__).resolve().parent.parent / "templates")
    jinja = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    jinja.undefined = jinja2.StrictUndefined
    jinja.filters.update(show=show, label=label, number=number, signed=signed)
    return jinja.get_template(name)


def write_html(path: Path | str, html: str) -> Path:
    with atomic(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return Path(path)


Row = Mapping[str, Any]
_FRACTIONS = ((1 / 2, "Half the MACs"), (1 / 3, "A third of the MACs"), (1 / 4, "A quarter of the MACs"))


class Verdict(NamedTuple):
    """`headline` is one sentence, `sentences` the rest.

    `tone` is "good", "bad" or "neutral"; `tiles` are (figure, caption).
    """

    headline: str
    sentences: list[str]
    tone: str
    tiles: list[tuple[str, str]]


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


def verdict(report: Mapping[str, Any]) -> Verdict:
    found, gate = facts(report), report.get("gate", {})
    parts = [_macs_phrase(found.mac_ratio), _speed_phrase(found.speedup), _score_phrase(found)]
    headline = ", ".join(part for part in parts if part)
    headline = headline[:1].upper() + headline[1:]
    if "passed" in gate:
        headline += f"{'; ' if headline else 'The '}{_gate_phrase(gate)}"
    broken = [step for step in report.get("steps", []) if step.get("status") == "failed"]
    failed = report.get("status") == "failed" or bool(broken)
    sentences = [f"Step {step['name']} failed: {step.get('detail') or 'no detail was recorded'}." for step in broken]
    if report.get("status") == "failed" and not broken:
        sentences.append("The run is marked as failed.")
    sentences += _gate_sentences(gate)
    judged = gate.get("passed") and not any(check.get("passed", True) is None for check in gate.get("checks", []))
    tone = "bad" if failed or gate.get("passed") is False else "good" if judged else "neutral"
    fallback = f"{report['name']}: {report.get('status', '')}"
    return Verdict(headline or fallback, sentences + _more(found), tone, _tiles(found))


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


def _tiles(found: Facts) -> list[tuple[str, str]]:
    tiles = []
    if found.mac_ratio:
        tiles.append((f"{signed((found.mac_ratio - 1) * 100, 0)} %", "MACs"))
    if found.param_ratio:
        tiles.append((f"{signed((found.param_ratio - 1) * 100, 0)} %", "parameters"))
    if found.speedup:
        tiles.append((f"{number(found.speedup, 2)}{TIMES}", f"speed-up, {found.timed_on}"))
    score, as_long = found.against
    if score is not None and found.score_after is not None:
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


def gates(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows of `report["gate"]["checks"]`; None for a report whose gate is one comparison without a name."""
    checks = [check for check in report.get("gate", {}).get("checks", []) if "drop" in check and "baseline" in check]
    rows = []
    for check in checks:
        rows.append(_gate_row(check["what"], label(check["metric"]), check))
        if "all_classes" in check:
            title = f"{label(check['metric'])}, classes that are only predicted counted as 0"
            rows.append(_gate_row("", title, check["all_classes"]))
    return {"rows": rows} if rows else None


def _gate_row(name: str, figure: str, found: Mapping[str, Any]) -> dict[str, Any]:
    span = found.get("drop_interval")
    limit = found.get("max_drop")
    word, tone = WORDS[found["passed"]] if "passed" in found else ("", "")
    return {
        "name": name,
        "figure": figure,
        "before": number(found["baseline"], 2),
        "after": number(found["candidate"], 2),
        "change": signed(found["candidate"] - found["baseline"], 2),
        "span": f"{signed(-span[1], 2)} to {signed(-span[0], 2)}" if span else "",
        "limit": number(limit, 2) if limit is not None else "none" if "passed" in found else "",
        "word": word,
        "tone": tone,
    }
