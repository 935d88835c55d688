"""Damage, drawn from a seeded generator: bytes, texts, and values of JSON and YAML."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 10**12, -(10**12), 2**64, 2**70, 1.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"),
    "", "x" * 5000, "../../etc/passwd", "\x00", "a\nb", "\\frac{1", "5", "nan", [], {}, [1, 2, 3], [[[[]]]], {"a": 1},
    {"a": {"b": [None]}},
)  # fmt: skip
TEXTS: dict[str, bytes] = {
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "big integer": b'{"a": ' + b"9" * 6000 + b"}",
    "empty": b"",
    "not unicode": b"\xff\xfe\x00",
    "a list": b"[]",
    "alias bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(
        f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n".encode()
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + b"data: *i\n",
    "own alias": b"data: &a {name: *a}\n",
    "date": b"name: 2020-13-45\n",
}
Mutation = tuple[str, bytes]


def of_bytes(data: bytes, draw: random.Random) -> Mutation:
    """Flipped, cut, zeroed, doubled or inserted bytes."""
    changed, place = bytearray(data), draw.randrange(max(len(data), 1))
    kind = draw.choice(("flip", "flip", "flip", "head flip", "cut", "zeros", "insert", "double", "text"))
    if kind == "text":
        name = draw.choice(sorted(TEXTS))
        return name, TEXTS[name]
    if kind == "cut":
        del changed[place:]
    elif kind == "zeros":
        changed[place : place + 16] = bytes(min(16, len(data) - place))
    elif kind == "insert":
        changed[place:place] = draw.randbytes(8)
    elif kind == "double":
        changed += data[place:]
    elif data:
        place = draw.randrange(min(len(data), 256)) if kind == "head flip" else place
        changed[place] ^= 1 << draw.randrange(8)
    return f"{kind} at {place}", bytes(changed)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path in nested JSON, the whole left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [step for key, item in items for step in ((*path, key), *places(item, (*path, key)))]


def of_value(data: Any, draw: random.Random) -> tuple[str, Any]:
    """One value replaced by an extreme one, nudged, dropped, doubled, or a key added."""
    data = copy.deepcopy(data)
    *above, last = draw.choice(places(data))
    owner = data
    for key in above:
        owner = owner[key]
    name, kind = (
        ".".join(str(key) for key in (*above, last)),
        draw.choice(("set", "set", "set", "nudge", "drop", "add")),
    )
    if kind == "drop":
        del owner[last]
        return f"without {name}", data
    if kind == "add":
        value = owner[last]
        if isinstance(value, dict):
            value["frog"] = draw.choice(EXTREMES)
        elif isinstance(value, list):
            value += value[:1] or [draw.choice(EXTREMES)]
        return f"added to {name}", data
    value = draw.choice(EXTREMES)
    if kind == "nudge" and type(owner[last]) in (int, float):
        value = owner[last] + draw.choice((-1, 1, 1000, -1000))
    owner[last] = value
    return f"{name} = {str(value)[:40]!r}", data


def of_json(data: bytes, draw: random.Random) -> Mutation:
    """A value of it, or its bytes."""
    if draw.random() < 0.2:
        return of_bytes(data, draw)
    name, value = of_value(json.loads(data), draw)
    return name, json.dumps(value).encode()  # NaN and Infinity as Python writes them


MUTATIONS: dict[str, Callable[[bytes, random.Random], Mutation]] = {"bytes": of_bytes, "json": of_json}
