"""Mutations of every kind of file that vss reads: what came of them, by kind; faults are listed, and fail the command.

    python benchmarks/bench_fuzz.py [--count 5000] [--seed 1] [--write]

The generators and limits are those of `tests/fuzz`, which CI runs with 500.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import facts, write  # noqa: E402

from tests.fuzz.judge import MEMORY, SECONDS, run  # noqa: E402
from tests.fuzz.subjects import subjects  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vss-fuzz-") as name:
        folder = Path(name)
        (folder / "made").mkdir()
        counts, faults = run(subjects(folder / "made"), options.count, options.seed, folder)
    seconds = time.monotonic() - started
    outcomes = sorted({outcome for each in counts.values() for outcome in each})
    total = {outcome: sum(each[outcome] for each in counts.values()) for outcome in outcomes}
    for kind, each in counts.items():
        print(f"{kind:<22} " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(each.items())))
    print(f"{sum(total.values())} mutations in {seconds:.0f} s: {total}")
    print("\n".join(faults))
    if options.write:
        body = {
            "seed": options.seed, "mutations": sum(total.values()), "seconds": round(seconds, 1),
            "limits": {"seconds": SECONDS, "memory_bytes": MEMORY}, "total": total,
            "kinds": {kind: dict(sorted(each.items())) for kind, each in counts.items()}, "faults": faults,
        }  # fmt: skip
        print(write("fuzz", "cpu", facts("cpu"), body))
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
