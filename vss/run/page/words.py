"""Words of the pages: metric keys as labels, rows as titles, values as text, facts as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vss.core.errors import need

MINUS, TIMES, THIN = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{NARROW NO-BREAK SPACE}"
_UNITS = {
    "pct": "%", "mib": "MiB", "gib": "GiB", "ms": "ms", "us": "us", "mhz": "MHz", "m": "M", "g": "G", "w": "W",
    "s": "s", "seconds": "s", "bytes": "bytes",
}  # fmt: skip
_WORDS = {
    "miou": "mIoU", "iou": "IoU", "fwiou": "frequency-weighted IoU", "acc": "accuracy", "mac": "MAC", "macs": "MACs",
    "fps": "images/s", "params": "parameters", "cpu": "CPU", "ram": "RAM", "os": "OS", "cuda": "CUDA", "onnx": "ONNX",
    "sha256": "SHA-256", "lr": "learning rate", "val": "validation", "id": "id", "bn": "BatchNorm",
    "speedup": "speed-up", "ap": "AP", "auroc": "AUROC", "f1": "F1", "fnr": "missed defects",
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


_TITLES = {
    "baseline": "unpruned",
    "pruned": "pruned, before fine-tuning",
    "finetuned": "pruned and fine-tuned",
    "control": "unpruned control, trained as long",
    "engine": "engine of the pruned network",
    "engine baseline": "engine of the unpruned network",
    "engine pruned": "engine of the pruned network",
}
_NAMES = {
    "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX",
    "torch": "PyTorch", "fp32": "FP32", "fp16": "FP16", "int8": "INT8",
}  # fmt: skip


def title(name: str) -> str:
    """A row of a report as a reader calls it.

    >>> title("pruned"), title("engine pruned int8 openvino"), title("reference unet width=8")
    ('pruned, before fine-tuning', 'engine of the pruned network, INT8, OpenVINO', 'unet width=8, never pruned')
    """
    if name in _TITLES:
        return _TITLES[name]
    for start in ("engine baseline", "engine pruned"):
        if name.startswith(f"{start} "):
            return ", ".join([_TITLES[start], *(plain(word) for word in name[len(start) :].split())])
    return f"{name.removeprefix('reference ')}, never pruned" if name.startswith("reference ") else name


def plain(word: str) -> str:
    """A runtime or a precision as its makers write it."""
    return _NAMES.get(word, word)


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


def show(value: object) -> str:
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


def block(data: Mapping[str, Any], title: str = "", *, judge: bool = False) -> dict[str, object]:
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


def _named(index: int, row: Mapping[str, Any]) -> tuple[str, Mapping[str, object]]:
    """A row of a list is headed by its `name` or `what`, else by its place from 1."""
    key = next((key for key in ("name", "what") if isinstance(row.get(key), str)), None)
    return (row[key], {k: v for k, v in row.items() if k != key}) if key else (str(index + 1), row)


def _state(value: object, judge: bool) -> str:
    return ("good" if value else "bad") if judge and isinstance(value, bool) else ""


def _nested(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, Mapping) for item in value)
    return isinstance(value, Mapping) and bool(value)


def _alike(rows: list[Mapping[str, object]]) -> bool:
    """Dictionaries that share most of their scalar keys belong in one table."""
    keys = [{key for key, item in row.items() if not _nested(item)} for row in rows]
    shared = set.intersection(*keys)
    return bool(shared) and len(shared) * 2 >= len(set.union(*keys))


def _table(rows: list[tuple[str, Mapping[str, object]]]) -> dict[str, object]:
    """Scalars only; what is nested in a row is shown below the table."""
    keys = list(dict.fromkeys(key for _, row in rows for key, item in row.items() if not _nested(item)))
    body = [(name.replace("_", " "), [show(row.get(key)) for key in keys]) for name, row in rows]
    return {"head": [label(key) for key in keys], "body": body}


def css(colour: Sequence[int]) -> str:
    return "rgb({},{},{})".format(*colour)


def template(name: str) -> Any:
    jinja2 = need("jinja2", "the page")
    loader = jinja2.FileSystemLoader(Path(__file__).resolve().parent.parent / "templates")
    jinja = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    jinja.undefined = jinja2.StrictUndefined
    jinja.filters.update(show=show, label=label, number=number, signed=signed, title=title)
    return jinja.get_template(name)
