"""What it costs to hash 10,000 files by contents: cold, remembered by another process, remembered by this one.

The files are 40 KiB of noise each, in the page cache; against them stands what was done before, asking for sizes alone,
and each is done `ROUNDS` times interleaved, every time with a memory of its own. Ratios are of one round.

    python benchmarks/bench_contents.py --write
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measure import facts, write

from vss.data import images
from vss.data.images import Memory

FILES, BYTES, ROUNDS = 10_000, 40 * 1024, 5


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def round_of(files: list[Path], memory: Path) -> dict[str, float]:
    """Seconds of each way, one after the other."""
    first = Memory(memory)
    found = {"sizes": seconds(lambda: [path.stat().st_size for path in files])}
    found["cold"] = seconds(lambda: first.digests(files))
    found["warm"] = seconds(lambda: Memory(memory).digests(files))
    found["again"] = seconds(lambda: first.digests(files))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the file")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="vss-contents-") as folder:
        files = [Path(folder) / f"{number:05d}.png" for number in range(FILES)]
        for path in files:
            path.write_bytes(rng.bytes(BYTES))
        time.sleep(images.SETTLED + 0.5)  # younger files are not remembered
        rounds = [round_of(files, Path(folder) / f"memory-{number}" / "c.sqlite") for number in range(ROUNDS + 1)][1:]
    rows = {}
    for name in rounds[0]:
        ratios = [each["cold"] / each[name] for each in rounds]
        rows[name] = {
            "seconds_p50": float(np.median([each[name] for each in rounds])),
            "faster_than_cold": float(np.median(ratios)),
            "faster_than_cold_range": [min(ratios), max(ratios)],
        }
        print(name, rows[name])
    if options.write:
        known = facts("cpu")
        print(
            "wrote",
            write("contents", "cpu", known, {"files": FILES, "bytes_each": BYTES, "rounds": rounds, "rows": rows}),
        )


if __name__ == "__main__":
    main()
