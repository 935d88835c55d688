"""Steps that remember: each is skipped when its inputs have not changed and its files are whole.

A step is up to date when the hash of everything it depends on (its part of the recipe, the data's fingerprint, the
steps before it) is the one in its record and the files it wrote still have their hashes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vss.files import read_json, sha256_file, sha256_json, write_json
from vss.version import __version__

KIND, SCHEMA = "vss.step", 1
Result = dict[str, Any]


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
        """Do `work` unless its record is up to date; a result with a true `again` never is.

        Args:
            name: of the step.
            depends: JSON-able data that the result depends on.
            after: names of steps whose results it reads.
            outputs: files it writes, relative to `out`.
            work: returns JSON-able figures; more files that it wrote are under `files`.
        """
        key = sha256_json([name, __version__, depends, [self.keys[step] for step in after]])
        self.keys[name] = key
        record = self.out / "steps" / f"{name}.json"
        if record.is_file():
            old = read_json(record, kind=KIND, schema=SCHEMA)
            if (
                old["key"] == key
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
        seconds = time.monotonic() - start
        hashes = {path: sha256_file(self.out / path) for path in [*outputs, *result.get("files", [])]}
        saved = {"kind": KIND, "schema": SCHEMA, "key": key, "seconds": seconds, "outputs": hashes, "result": result}
        write_json(record, saved)
        return self._done(name, "ok", seconds, result.get("detail", ""), result)

    def result(self, name: str) -> Result:
        """What a finished step returned."""
        return read_json(self.out / "steps" / f"{name}.json", kind=KIND, schema=SCHEMA)["result"]

    def _same(self, path: str, digest: str) -> bool:
        file = self.out / path
        return file.is_file() and sha256_file(file) == digest

    def _done(self, name: str, status: str, seconds: float, detail: str, result: Result) -> Result:
        name = f"{self.title}{name}"
        self.records.append({"name": name, "status": status, "seconds": seconds, "detail": detail})
        self.say(name, status, seconds, detail)
        return result
