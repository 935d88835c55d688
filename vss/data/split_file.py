"""The published split files of mixed supervision (`split_weakly_N.pyb`), read without running what is in them.

A file is a pickled pair (train, test) of lists of (image number, has a pixel annotation). A pickle can run any code
when it is loaded, so this reader first looks at the instructions: those that make numbers, booleans, lists and tuples
pass, any other one refuses the file before anything is loaded.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

from vss.core.errors import VssError
from vss.core.files import require_file

MAX_BYTES = 4 << 20
HARMLESS = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET",
    "BINGET", "LONG_BINGET", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "NEWTRUE", "NEWFALSE", "TUPLE",
    "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "EMPTY_LIST", "APPEND", "APPENDS",
})  # fmt: skip
"""Instructions of the pickle format that only make or place numbers, booleans, lists and tuples."""

PLACES = frozenset({"PUT", "LONG_BINPUT"})
"""Those with a number that the standard reader makes room for: a large one would take all memory."""


class _Plain(pickle.Unpickler):
    """A second lock behind the first: no name is ever looked up."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it asks for an object outside the file")


def read_split_file(path: Path | str) -> dict[str, dict[str, bool]]:
    """{"train": {id: has a pixel annotation}, "test": ...}; ids are the numbers as text.

    Raises:
        VssError: a missing, large or damaged file, one that holds more than numbers, or one of another structure.
    """
    path = Path(path)
    try:
        data = require_file(path, kind="split (split_*.pyb)", limit=MAX_BYTES).read_bytes()
    except OSError as error:
        raise VssError(f"split file {path} cannot be read ({error.strerror or error}); give a split_*.pyb.") from error
    value = _load(path, data)
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _structure(path)
    return {name: _part(path, part) for name, part in zip(("train", "test"), value, strict=True)}


def _load(path: Path, data: bytes) -> Any:
    try:
        for code, value, _ in pickletools.genops(data):
            if code.name in PLACES and int(str(value)) > MAX_BYTES:
                raise VssError(f"split file {path} is damaged (place {value} in its table); get it again.")
            if code.name not in HARMLESS:
                raise VssError(
                    f"split file {path} holds more than lists of numbers (instruction {code.name}) and was not "
                    "loaded; get the published file, or give defect.annotated in its place."
                )
        return _Plain(io.BytesIO(data)).load()
    except VssError:
        raise
    except (pickle.UnpicklingError, ValueError, IndexError, EOFError, KeyError, TypeError, AttributeError,
            OverflowError, MemoryError, RecursionError) as error:  # fmt: skip
        # what the standard reader raises for damaged files; it has no common class for them
        raise VssError(f"split file {path} is damaged ({error}); get the published file again.") from error


def _part(path: Path, part: Any) -> dict[str, bool]:
    if not isinstance(part, list | tuple):
        raise _structure(path)
    found: dict[str, bool] = {}
    for row in part:
        if not isinstance(row, list | tuple) or len(row) != 2:
            raise _structure(path)
        number, annotated = row
        if type(number) is not int or number < 0 or type(annotated) is not bool or str(number) in found:
            raise _structure(path)
        found[str(number)] = annotated
    return found


def _structure(path: Path) -> VssError:
    return VssError(
        f"split file {path} has another structure; expected two lists, train and test, of (image number, true or "
        "false), each number once."
    )
