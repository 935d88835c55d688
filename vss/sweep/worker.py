"""A worker process of the local executor: reads tasks as JSON lines, answers with outcomes as JSON lines.

    python -m vss.sweep.worker FD     tasks on standard input, outcomes on the file descriptor FD

It ends when standard input does, so that it never outlives the process that started it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from types import FrameType


def main() -> None:
    """The loop of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    signal.signal(signal.SIGTERM, _end)
    tasks: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_read, args=(tasks, busy), daemon=True).start()
    from vss.sweep.tasks import perform

    with os.fdopen(int(sys.argv[1]), "w") as answers:
        while (line := tasks.get()) is not None:
            busy.set()
            outcome = perform(json.loads(line))
            busy.clear()
            answers.write(json.dumps(outcome) + "\n")
            answers.flush()


def _read(tasks: queue.SimpleQueue[str | None], busy: threading.Event) -> None:
    for line in sys.stdin:
        tasks.put(line)
    tasks.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)  # files that are being written are removed on the way out


if __name__ == "__main__":
    main()
