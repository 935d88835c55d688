"""Which precision to ship: a lower one is kept only where it is faster on this machine and inside the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vss.deploy.precision import KINDS


def decide(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Choose among files of one network that were timed in one interleaved run.

    float16 is kept when it passes its gate and is faster than float32; INT8 when it passes and is faster than whatever
    else passes its gate. Where the run gave an interval, "faster" means that all of it lies above 1.

    Args:
        rows: {"precision", "latency_ms_p50", "passed"} of each; of all but "fp32" also "sentence" of the gate, and
            "speedup" {"ratio", "low", "high"} over "fp32" when it was measured. "fp32" must be there.

    Returns:
        {"chosen": precision, "why": {precision: sentence of each that was not chosen}, "sentence"}.
    """
    table = {row["precision"]: row for row in rows}
    chosen, why = "fp32", dict[str, str]()
    for kind in KINDS[1:]:
        if kind not in table:
            continue
        reason = _refusal(table[kind], table["fp32"], table[chosen])
        if reason:
            why[kind] = reason
        else:
            why[chosen] = f"{kind} is faster and inside the gate"
            chosen = kind
    others = "; ".join(f"{kind} not: {reason}" for kind, reason in why.items())
    times = f"{table[chosen]['latency_ms_p50']:.2f} ms"
    return {"chosen": chosen, "why": why, "sentence": f"{chosen} is kept ({times}){'; ' + others if others else ''}."}


def _refusal(row: Mapping[str, Any], plain: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    """Why a row is not taken over the best one so far; empty when it is."""
    if not row["passed"]:
        return str(row["sentence"])
    mine, theirs, speedup = row["latency_ms_p50"], best["latency_ms_p50"], row.get("speedup") or {}
    if mine >= theirs:
        return f"{mine:.2f} ms is not faster than the {theirs:.2f} ms of {best['precision']} on this machine"
    low = speedup.get("low")
    if best is plain and low is not None and low <= 1:
        return (
            f"{speedup['ratio']:.3f}x over {best['precision']} is inside the noise of this machine "
            f"({low:.3f} to {speedup['high']:.3f})"
        )
    return ""
