"""Reads a mutated file as the commands do and says what came of it; limits of time and memory stand around it."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import MUTATIONS
from vss.core.errors import VssError
from vss.deploy.backends.trt_runner import EngineError

SECONDS, WALL, MEMORY, SENTENCE = 10.0, 120.0, 4 << 30, 1500
"""Seconds of the processor's time, so that a busy machine is no hang, and of the clock, for what waits for ever."""
REFUSED, EQUAL, ACCEPTED = "refused in one sentence", "accepted and equal", "accepted, of other content"
GOOD = (REFUSED, EQUAL, ACCEPTED)


class HungError(BaseException):
    """Time is up; no handler of the code under test may swallow it."""


@dataclass(frozen=True)
class Subject:
    """One kind of file.

    Attributes:
        data: a whole one.
        name: what the mutated file is called; readers look at suffixes.
        kind: of `MUTATIONS`.
        read: what a command does with the file; what it returns is compared by `==`.
        sealed: a hash stands, so that other content must be refused.
        wrap: how mutated `data` becomes the bytes of the file.
        weight: how many mutations it gets of those of a subject that reads fast.
    """

    data: bytes
    name: str
    read: Callable[[Path], Any]
    kind: str = "json"
    sealed: bool = False
    wrap: Callable[[bytes], bytes] = bytes
    weight: float = 1.0


@contextlib.contextmanager
def limited(seconds: float = SECONDS, wall: float = WALL, memory: int = MEMORY) -> Iterator[None]:
    """Stop what takes longer, and let no more memory than so much more be taken."""

    def stop(*_: object) -> None:
        raise HungError

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, wall)}
    handlers = {number: signal.signal(number, stop) for number in timers}
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, handlers[number])
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(subject: Subject, path: Path, expected: Any) -> str:
    """One of `GOOD`, or what went wrong."""
    try:
        with limited():
            found = subject.read(path)
    except (VssError, EngineError) as error:
        text = str(error)
        return (
            REFUSED if text and "\n" not in text and len(text) <= SENTENCE else f"sentence of {len(text)}: {text[:80]}"
        )
    except HungError:
        return f"hang: over {SECONDS:.0f} s"
    except Exception as error:
        where = error.__traceback__
        while where and where.tb_next:
            where = where.tb_next
        place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where else "?"
        return f"traceback: {type(error).__name__}: {str(error)[:80]} @ {place}"
    if found == expected:
        return EQUAL
    return "damage accepted where a hash stands" if subject.sealed else ACCEPTED


def run(subjects: dict[str, Subject], count: int, seed: int, folder: Path) -> tuple[dict[str, Counter[str]], list[str]]:
    """About `count` mutations over all subjects; returns counts by subject and outcome, and every fault."""
    counts, faults = {name: Counter[str]() for name in subjects}, []
    share = count / sum(subject.weight for subject in subjects.values())
    for name, subject in subjects.items():
        path = folder / subject.name
        path.write_bytes(subject.wrap(subject.data))
        expected = subject.read(path)
        for number in range(max(1, round(share * subject.weight))):
            draw = random.Random(f"{seed}:{name}:{number}")
            what, data = MUTATIONS[subject.kind](subject.data, draw)
            path.write_bytes(subject.wrap(data))
            started = time.monotonic()
            result = outcome(subject, path, expected)
            counts[name][result if result in GOOD else result.partition(":")[0]] += 1
            if result not in GOOD:
                faults.append(f"{name}, {number} ({what}), {time.monotonic() - started:.1f} s: {result}")
    return counts, faults
