"""CPU seconds (user and system) that commands take to refuse, or to answer without data, beside `import torch`.

Every command is a process of its own; one round runs all of them in turn, with `import torch` among them, and ratios
are of one round. `--source DIR` is another checkout (or release) to compare with, timed in the same rounds.

    python benchmarks/bench_startup.py --write
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
from measure import facts, write

VSS = "from vss.cli.main import main; main()"
COMMANDS: dict[str, tuple[int, list[str]]] = {
    "methods": (0, ["methods"]),
    "--help": (0, ["--help"]),
    "export, no checkpoint": (2, ["export", "--ckpt", "missing.safetensors"]),
    "evaluate, no checkpoint": (2, ["evaluate", "--ckpt", "missing.safetensors"]),
    "lint, no file": (2, ["lint", "missing.onnx"]),
    "build, no file": (2, ["build", "--onnx", "missing.onnx"]),
    "run, no data": (2, ["run", "demo", "--set", "data.root=missing"]),
    "ship, no run": (2, ["ship", "missing", "--save", "bundle"]),
}
"""Command -> exit code, words."""


def cpu_seconds(code: str, words: list[str], *, source: Path | None, wanted: int = 0) -> float:
    """Of one process; raises where it ends with another code than `wanted`."""
    path = {"PYTHONPATH": str(source)} if source else {}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-P", "-c", code, *words], capture_output=True, env=os.environ | path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != wanted:
        raise SystemExit(f"{words} ended with {done.returncode}, not {wanted}: {done.stderr.decode()[-500:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--source", type=Path, help="folder of another vss, timed beside")
    parser.add_argument("--write", action="store_true", help="keep the file")
    options = parser.parse_args()
    sides = {"": None, **({"other: ": options.source.resolve()} if options.source else {})}
    rounds: list[dict[str, float]] = []
    for _ in range(options.rounds + 1):
        found = {"import torch": cpu_seconds("import torch", [], source=None)}
        for side, source in sides.items():
            for name, (code, words) in COMMANDS.items():
                found[side + name] = cpu_seconds(VSS, words, source=source, wanted=code)
        rounds.append(found)
    rounds = rounds[1:]  # the first reads files from the disk
    rows = {}
    for name in rounds[0]:
        ratios = [each[name] / each["import torch"] for each in rounds]
        rows[name] = {
            "cpu_seconds_p50": float(np.median([each[name] for each in rounds])),
            "of_import_torch": float(np.median(ratios)),
            "of_import_torch_range": [min(ratios), max(ratios)],
        }
        print(f"{name:36} {rows[name]['cpu_seconds_p50']:6.2f} s {rows[name]['of_import_torch']:6.2f} of import torch")
    if options.write:
        print(write("startup", "cpu", facts("cpu", rounds=options.rounds), {"rows": rows}))


if __name__ == "__main__":
    main()
