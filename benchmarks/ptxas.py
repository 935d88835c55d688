"""Registers, spills and shared memory of every CUDA kernel, as ptxas reports them; needs nvcc and no GPU.

    python benchmarks/ptxas.py [--architectures 80 90 120] [--nvcc nvcc] [--write]

`--write` keeps results/ptxas.json with a hash of the kernels' sources; a test refuses a table that is older than they.
A kernel that spills fails the call.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "kernels"
TABLE = ROOT / "benchmarks" / "results" / "ptxas.json"
ARCHITECTURES = (80, 90, 120)
LOG = logging.getLogger("ptxas")

ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def sources_hash() -> str:
    """SHA-256 of everything that a CUDA kernel is compiled from."""
    files = sorted(path for path in KERNELS.iterdir() if path.suffix in (".cu", ".cuh", ".h"))
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def readable(names: list[str]) -> list[str]:
    """Demangled names without what is the same for all: `column_lanes<float>`."""
    plain = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout.splitlines()
    plain = [re.sub(r"\(anonymous namespace\)::|vss::|\bvoid ", "", name).replace("__nv_", "") for name in plain]
    return [re.sub(r"\(.*", "", name).replace("__half", "half") for name in plain]


def rows_of(source: Path, nvcc: str, architectures: list[int]) -> list[dict[str, Any]]:
    said = ""
    for architecture in architectures:  # device code alone
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", str(source)]
            done = subprocess.run([*command, "-o", f"{folder}/kernel.cubin"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{source.name} does not compile: {done.stderr.strip().splitlines()[-1]}")
        said += done.stderr
    rows: list[dict[str, Any]] = []
    for line in said.splitlines():
        if found := ENTRY.search(line):
            rows.append({"source": source.name, "kernel": found["name"], "architecture": int(found["arch"])})
        elif found := STACK.search(line):
            rows[-1] |= dict(zip(("stack_bytes", "spill_store_bytes", "spill_load_bytes"), map(int, found.groups()),
                                 strict=True))  # fmt: skip
        elif found := USED.search(line):
            shared = SHARED.search(line)
            rows[-1] |= {"registers": int(found[1]), "shared_bytes": int(shared[1]) if shared else 0}
    for row, name in zip(rows, readable([row["kernel"] for row in rows]), strict=True):
        row["kernel"] = name
    return sorted(rows, key=lambda row: (row["kernel"], row["architecture"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--write", action="store_true", help="write results/ptxas.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.path.insert(0, str(ROOT))
    from vss.core.files import write_json

    version = subprocess.run([arguments.nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    rows: list[dict[str, Any]] = []
    for source in sorted(KERNELS.glob("*.cu")):
        found = rows_of(source, arguments.nvcc, arguments.architectures)
        rows += found
        for row in found:
            LOG.info("sm_%-3d %-20s %-32s %3d registers, %5d bytes shared, %d bytes spilled", row["architecture"],
                     row["source"], row["kernel"], row["registers"], row["shared_bytes"],
                     row["spill_store_bytes"])  # fmt: skip
    if arguments.write:
        release = re.search(r"V([\d.]+)", version)
        body = {"kind": "vss.ptxas", "schema": 1, "nvcc": release[1] if release else "", "sources": sources_hash()}
        write_json(TABLE, body | {"rows": rows})
    if spilled := {row["kernel"] for row in rows if row["spill_store_bytes"] or row["spill_load_bytes"]}:
        raise SystemExit(f"registers are spilled by {', '.join(sorted(spilled))}")


if __name__ == "__main__":
    main()
