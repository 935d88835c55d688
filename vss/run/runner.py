"""Steps that remember: each is skipped when its inputs have not changed and its files are whole.

A step is up to date when the hash of everything it depends on (its part of the recipe, the data's fingerprint, the
steps before it) is the one in its record and the files it wrote still have their hashes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vss.core.errors import VssError
from vss.core.files import read_json, sha256_file, sha256_json, write_json

log = logging.getLogger(__name__)

KIND, SCHEMA = "vss.step", 2
Result = dict[str, Any]
WANTED: dict[str, type] = {"key": str, "seconds": float, "outputs": dict, "result": dict}


@dataclass
class Runner:
    """Runs steps, remembers them in `out/steps/`; `title` stands before every name that is told."""

    out: Path
    say: Callable[[str, str, float, str], None]
    records: list[Result] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    title: str = ""

    def __call__(
        self, name: str, depends: Any, after: list[str], outputs: list[str], work: Callable[[], Result]
    ) -> Result:
        """Do `work` unless its record is up to date; a result with a true `again` never is. A result with a `status`
        is called that in place of "ok".

        Args:
            name: of the step.
            depends: JSON-able data that the result depends on.
            after: names of steps whose results it reads.
            outputs: files it writes, relative to `out`.
            work: returns JSON-able figures; more files that it wrote are under `files`.
        """
        key = sha256_json([name, depends, [self.keys[step] for step in after]])
        self.keys[name] = key
        old = self._record(name)
        if (
            old
            and old["key"] == key
            and not old["result"].get("again")
            and all(self._same(path, digest) for path, digest in old["outputs"].items())
        ):
            return self._done(name, "skipped", old["seconds"], "up to date", old["result"])
        start = time.monotonic()
        try:
            result = work()
        except BaseException as error:
            stopped = isinstance(error, BrokenPipeError) or not isinstance(error, Exception)
            text = "" if stopped else str(error) or type(error).__name__
            self._done(name, "interrupted" if stopped else "failed", time.monotonic() - start, text, {})
            raise
        seconds, status = time.monotonic() - start, str(result.pop("status", "ok"))
        hashes = {path: sha256_file(self.out / path) for path in [*outputs, *result.get("files", [])]}
        write_record(self._path(name), KIND, {"key": key, "seconds": seconds, "outputs": hashes, "result": result})
        return self._done(name, status, seconds, result.get("detail", ""), result)

    def result(self, name: str) -> Result:
        """What a finished step returned."""
        record = self._record(name)
        if record is None:
            raise VssError(f"{self._path(name)} is no whole record of a step; repeat the command that writes it.")
        return dict(record["result"])

    def _path(self, name: str) -> Path:
        return self.out / "steps" / f"{name}.json"

    def _record(self, name: str) -> Result | None:
        return read_record(self._path(name), KIND, WANTED)

    def _same(self, path: str, digest: str) -> bool:
        file = self.out / path
        return file.is_file() and sha256_file(file) == digest

    def _done(self, name: str, status: str, seconds: float, detail: str, result: Result) -> Result:
        name = f"{self.title}{name}"
        self.records.append({"name": name, "status": status, "seconds": seconds, "detail": detail})
        self.say(name, status, seconds, detail)
        return result


def write_record(path: Path, kind: str, body: Result) -> None:
    """Write what was found out, with the hash of it."""
    body = json.loads(json.dumps(body, allow_nan=False))  # keys of dictionaries are text, as they are when it is read
    write_json(path, {"kind": kind, "schema": SCHEMA, "sha256": sha256_json(body), **body})


def read_record(path: Path, kind: str, wanted: Mapping[str, type]) -> Result | None:
    """A record that is whole; None where there is none. A damaged or foreign one is as none: its work is done again.

    `wanted` are keys that it must have, and what their values are.
    """
    if not path.exists():
        return None
    try:
        data = read_json(path, kind=kind, schema=SCHEMA)
    except VssError as error:
        log.warning("%s It is made again.", error)
        return None
    body = {key: value for key, value in data.items() if key not in ("kind", "schema", "sha256")}
    changed = data["schema"] > 1 and data.get("sha256") != sha256_json(body)  # the first schema had no hash
    if changed or not all(isinstance(body.get(name), each) for name, each in wanted.items()):
        log.warning("%s is not as it was written; it is made again.", path)
        return None
    return body
