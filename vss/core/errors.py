"""Sentences for the person at the keyboard: errors, values inside them, and lines for work that takes long.

Everything that a user can cause (a wrong path, a wrong name, a damaged file) raises `VssError` with one sentence that
says what came, what was expected and what to do. The command line prints the sentence and exits with `exit_code`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import reprlib
import time
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pydantic import ValidationError

log = logging.getLogger(__name__)

T = TypeVar("T")
SHOWN, LONGEST = 120, 4000  # characters of a value in a sentence, and of a sentence
EVERY_S = 30.0

_limited = reprlib.Repr()
_limited.maxlevel, _limited.maxdict, _limited.maxlist, _limited.maxtuple = 3, 4, 4, 4
_limited.maxstring, _limited.maxlong, _limited.maxother = SHOWN, 40, SHOWN


class VssError(ValueError):
    """Bad input: one clear sentence, exit code 2."""

    exit_code = 2

    def __init__(self, sentence: str) -> None:
        super().__init__(one_line(sentence, LONGEST))


class GateFailed(VssError):
    """The input was fine and the result is not good enough: exit code 1."""

    exit_code = 1


class NotFinite(VssError):
    """A network or an engine gave NaN or infinity: its results mean nothing."""


class NotMeasured(VssError):
    """The input was fine and the machine too noisy to measure it: exit code 3."""

    exit_code = 3


def shown(value: object) -> str:
    """`repr` of a value that came from outside, cut so that a sentence stays one; never longer than `SHOWN` and some.

    Containers are cut before they are printed: a YAML alias bomb has a small file and a `repr` of gigabytes.
    """
    text = _limited.repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def counted(count: int, one: str, many: str = "") -> str:
    """`1 mask`, `2 masks`; `many` where it is not `one` and an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def listed(names: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def one_line(text: str, limit: int = 3 * SHOWN) -> str:
    """`text` on one line, cut in the middle where it is longer than `limit`."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    return " ".join(text.split()) if "\n" in text or "\r" in text else text


def fault(error: ValidationError) -> str:
    """The first fault of a pydantic check as half a sentence: which key, what it is, what is wrong with it."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = one_line(".".join(str(part) for part in first["loc"]), SHOWN)
    what = one_line(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where} is no key of it"
    return f"{where} is {shown(first['input'])}; {what}" if where else what


def unknown(kind: str, name: str, known: Iterable[str], *, hints: Iterable[str] = ()) -> VssError:
    """The error for a name that does not exist: names the closest match (among `hints` too) and lists what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(name, {*known, *hints}, n=1, cutoff=0.5) if len(name) < SHOWN else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return VssError(f"unknown {kind} {shown(name)}.{hint} Known: {', '.join(known) or 'none'}.")


INSTALL = {
    "jinja2": "pip install jinja2",
    "matplotlib": "pip install matplotlib",
    "ray": "pip install 'vss[ray]'",
    "google.protobuf.message": "pip install protobuf",
    "mlflow": "pip install 'vss[mlflow]'",
    "mlflow.tracking": "pip install 'vss[mlflow]'",
    "onnx": "pip install onnx",
    "onnxscript": "pip install onnxscript",
    "onnx_graphsurgeon": "pip install onnx-graphsurgeon",
    "onnxruntime": "pip install onnxruntime",
    "openvino": 'pip install "vss[openvino]"',
    "pycocotools.mask": 'pip install "vss[coco]"',
    "tritonclient.grpc": 'pip install "vss[triton]"',
    "tritonclient.http": 'pip install "vss[triton]"',
    "polygraphy": "pip install polygraphy",
}


def need(module: str, purpose: str) -> ModuleType:
    """Import an optional module; a missing one is a sentence with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise VssError(f"{purpose} needs {module} ({error}); run: {INSTALL[module]}") from error


def steadily(items: Iterable[T], what: str, total: int, *, every: float = EVERY_S) -> Iterator[T]:
    """The items; every half minute the log says how many of `total` are done and how long the rest will take."""
    start = told = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - told >= every:
            told = now
            log.info("%s: %d of %d, %s left", what, done, total, duration((now - start) * (total - done) / done))
        yield item


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Errors alone come through the loggers of these names."""
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(9.6), duration(150), duration(7200)
    ('10 s', '2.5 min', '2.0 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
