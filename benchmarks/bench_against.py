"""Every op of this checkout against the same op of another one, each in a process of its own, in turns.

    python benchmarks/bench_against.py OTHER [--op NAME] [--rounds 9] [--threads 1] [--write]

OTHER is a checkout with its extension built, such as a work tree of an earlier commit. Rows are those of
tests/ops/cases.py marked `bench`, on the CPU, from the same seeds. In each round both sides make one call, in an order
that changes from round to round; a ratio is new over old, the median of those of the rounds, with its smallest and
largest. Given are wall time and CPU time: on a machine that does other work the second is the one to read. `same` says
whether the results are equal to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOG = logging.getLogger("bench_against")
SIDES = ("old", "new")
COPIES = 2  # of the inputs, so that no call finds those of the one before in the cache
WARM_UP = 2


def serve(source: Path, threads: int) -> None:
    """Answers lines: the name of a case makes its inputs, an empty line is one call. Runs until the input ends."""
    sys.path[:0] = [str(source), str(ROOT / "tests" / "ops")]
    import torch
    from cases import ALL

    from vss import ops

    torch.set_num_threads(threads)
    assert Path(ops.__file__).is_relative_to(source), f"vss comes from {ops.__file__}, not from {source}"
    call, pool, turn = None, [], 0
    for line in map(str.strip, sys.stdin):
        if line:
            case = next(each for each in ALL if each.id == line)
            call, pool = getattr(torch.ops.vss, case.op), [case.inputs() for _ in range(COPIES)]
            answer: dict[str, Any] = {"state": ops.status()[case.op]["CPU"]}
        else:
            assert call is not None
            turn = (turn + 1) % COPIES
            wall, used = time.perf_counter(), time.process_time()
            result = call(*pool[turn])
            used, wall = time.process_time() - used, time.perf_counter() - wall
            answer = {"wall_ms": wall * 1e3, "cpu_ms": used * 1e3, "digest": digest(result, pool[turn])}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def digest(result: Any, args: tuple[Any, ...]) -> str:
    """Of the results; of an op that returns none, of its first argument."""
    found = [args[0]] if result is None else result if isinstance(result, list | tuple) else [result]
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in found)).hexdigest()


class Side:
    def __init__(self, source: Path, threads: int) -> None:
        self.command = [sys.executable, __file__, str(source.resolve()), "--serve", "--threads", str(threads)]
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, line: str = "") -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(self.command)} ended; its message is above")
        return dict(json.loads(answer))


def measure(sides: dict[str, Side], case_id: str, rounds: int) -> dict[str, Any]:
    row: dict[str, Any] = {f"{name}_is": side(case_id)["state"] for name, side in sides.items()}
    kept: list[dict[str, dict[str, Any]]] = []
    for turn in range(rounds + WARM_UP):
        order = SIDES if turn % 2 else SIDES[::-1]
        kept.append({name: sides[name]() for name in order})
    row["same"] = all(each["old"]["digest"] == each["new"]["digest"] for each in kept)
    for key in ("wall", "cpu"):
        both = [(each["old"][f"{key}_ms"], each["new"][f"{key}_ms"]) for each in kept[WARM_UP:]]
        ratios = [new / old for old, new in both]
        row |= {
            f"{name}_{key}_ms_p50": statistics.median(x) for name, x in zip(SIDES, zip(*both, strict=True), strict=True)
        }
        row |= {f"{key}_ratio": statistics.median(ratios), f"{key}_ratio_range": [min(ratios), max(ratios)]}
    return row | {"rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--op")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep results/<machine>/<version>--against.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.other, arguments.threads)
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not list((arguments.other / "vss").glob("_C*.so")):
        parser.error(
            f"{arguments.other} has no built extension vss/_C*.so: build it there with setup.py build_ext --inplace"
        )
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ops")]
    from cases import ALL
    from measure import facts, write

    sides = {name: Side(source, arguments.threads) for name, source in zip(SIDES, (arguments.other, ROOT), strict=True)}
    commit = subprocess.run(["git", "-C", str(arguments.other), "rev-parse", "HEAD"], capture_output=True, text=True)
    known = facts("cpu", rounds=arguments.rounds, other=commit.stdout.strip() or None) | {"threads": arguments.threads}
    rows: dict[str, Any] = {}
    for case in ALL:
        if not case.bench or arguments.op not in (None, case.op):
            continue
        rows[case.id] = row = measure(sides, case.id, arguments.rounds)
        LOG.info("%-52s cpu %9.3f -> %9.3f ms, %.3f (%.3f to %.3f), wall %.3f%s", case.id, row["old_cpu_ms_p50"],
                 row["new_cpu_ms_p50"], row["cpu_ratio"], *row["cpu_ratio_range"], row["wall_ratio"],
                 "" if row["same"] else ", other bits")  # fmt: skip
        if arguments.write:
            write("against", "cpu", known, {"rows": rows})


if __name__ == "__main__":
    main()
