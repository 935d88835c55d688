"""Does an ONNX file answer as the network that it came from? Every differing label is judged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vss.core.closeness import NETWORK, refuse_not_finite, spread
from vss.core.errors import VssError
from vss.deploy.backends import BACKENDS, Session
from vss.deploy.graph import SegGraph

DRAWS = 4
Images = Callable[[int, tuple[int, int], int], Tensor]
"""(N, (H, W), seed) -> what a graph takes."""
CLOSE = 3e-5  # relative difference from which float64 is asked who is right
WORST: tuple[str, ...] = ("max_abs", "max_rel", "max_lead")


@dataclass(frozen=True)
class Tolerance:
    """What may differ, relative to the spread of the torch network's logits (`vss.core.closeness`).

    Args:
        relative: largest difference of a logit; also the largest lead that torch's winning class may have over the
            class the engine chose, so that a differing label is allowed at a tie and nowhere else.
        agreement: smallest share of pixels with the same label, 0..1.
    """

    relative: float = 1e-4
    agreement: float = 0.999


def parity(
    graph: SegGraph,
    onnx: Path,
    shapes: Sequence[tuple[int, tuple[int, int]]],
    tolerance: Tolerance | None = None,
    *,
    images: Images | None = None,
) -> dict[str, Any]:
    """Run torch and onnxruntime (CPU) on the same seeded noise, or on given images; raises outside the tolerance.

    Args:
        graph: the wrapper that was exported.
        shapes: (N, (H, W)) per comparison.

    Returns:
        {"shapes": [{"input", "logit_scale", "max_abs", "max_rel", "max_lead", "argmax_agreement"}...], and the worst of
        each}. Where float32 itself is the larger part of a difference, float64 is the judge: a file may be twice as far
        from it (`exact_rel`) as torch's own float32 is (`own_rel`). `max_abs` and `max_rel` are absent for graphs that
        end in labels. The two heads of a defect network are each compared on their own scale; a pixel's label is its
        sign.

    A network that `jumps` moves whole values where two maxima are equal up to rounding, in its own two precisions as
    much as in a file. Of it 99 % of the logits are judged (`p99_rel`), and an image that fails is drawn again, up to
    `DRAWS` times (`draws`): such a tie is rare, and a wrong file fails on every image.
    """
    tolerance = tolerance or Tolerance()
    network = copy.copy(graph)
    network.labels = False
    draw = images or partial(noise, nhwc=graph.nhwc, channels=graph.channels)
    with BACKENDS["onnxruntime"].open(onnx) as session:
        rows = [_agreed(network, session, partial(draw, *shape), seed, tolerance) for seed, shape in enumerate(shapes)]
    worst: dict[str, float] = {key: max(row[key] for row in rows) for key in WORST if key in rows[0]}
    worst["argmax_agreement"] = min(row["argmax_agreement"] for row in rows)
    return {"shapes": rows, **worst}


def _agreed(
    network: SegGraph, session: Session, draw: Callable[[int], Tensor], seed: int, tolerance: Tolerance
) -> dict[str, Any]:
    """The figures of the first image that is inside the tolerance; raises what is wrong with the last one."""
    jumps = getattr(network.model, "jumps", False)
    fault = ""
    for count in range(DRAWS if jumps else 1):
        row = _compare(network, session, draw(seed + 1000 * count))
        fault = _fault(row, tolerance, jumps)
        if not fault:
            return row | ({"draws": count + 1} if jumps else {})
    raise VssError(fault)


def _compare(network: SegGraph, session: Session, image: Tensor) -> dict[str, Any]:
    with torch.inference_mode():
        expected = network(image)
    values = expected if isinstance(expected, tuple) else (expected,)
    refuse_not_finite(values, "the network", NETWORK)
    if network.defect:
        return _compare_heads(dict(zip(("decision", "seg"), expected, strict=True)), session, image)
    name, found = next(iter(session.run({"image": image.numpy()}).items()))
    got = torch.from_numpy(found)
    scale = max(spread(expected), 1e-12)
    row: dict[str, Any] = {"input": list(image.shape), "logit_scale": scale}
    labels = (got.argmax(1) if name == "logits" else got).long()
    row["max_lead"] = float((expected.amax(1) - expected.gather(1, labels.unsqueeze(1)).squeeze(1)).max()) / scale
    row["argmax_agreement"] = float((expected.argmax(1) == labels).double().mean())
    if name == "logits":
        row["max_abs"] = float((got - expected).abs().max())
        row["max_rel"] = row["max_abs"] / scale
        differences = (got - expected).abs().flatten()
        row["p99_rel"] = float(differences.kthvalue(math.ceil(0.99 * len(differences))).values) / scale
    if CLOSE < row.get("max_rel", row["max_lead"]) < 1e-2:
        row |= _against_float64(network, image, expected, got if name == "logits" else None)
    return row


def _against_float64(network: SegGraph, image: Tensor, expected: Tensor, got: Tensor | None) -> dict[str, float]:
    """How far torch's float32 logits and, where it has any, the file's are from those in float64, over their spread.

    Where a network magnifies rounding, two correct float32 programs differ by more than any fixed tolerance.
    """
    exact = copy.deepcopy(network).double()
    with torch.inference_mode():
        truth = exact(image if network.nhwc else image.double())
    scale = max(spread(truth), 1e-12)
    found = {"own_rel": float((expected - truth).abs().max()) / scale}
    return found if got is None else found | {"exact_rel": float((got - truth).abs().max()) / scale}


def _compare_heads(expected: dict[str, Tensor], session: Session, image: Tensor) -> dict[str, Any]:
    """The same figures for binary logits, the worst of them. The map is judged against its spread, a decision, which is
    one number an image, against its size.
    """
    found = {name: torch.from_numpy(value) for name, value in session.run({"image": image.numpy()}).items()}
    scales = {name: float(v.abs().max()) if v.ndim < 3 else spread(v) for name, v in expected.items()}
    row: dict[str, Any] = {"input": list(image.shape), "logit_scale": max(scales.values()), **dict.fromkeys(WORST, 0.0)}
    same = total = 0
    for name, value in expected.items():
        difference = float((found[name] - value).abs().max())
        flipped = (found[name] >= 0) != (value >= 0)
        lead = float(value[flipped].abs().max()) if flipped.any() else 0.0
        row["max_abs"] = max(row["max_abs"], difference)
        row["max_rel"] = max(row["max_rel"], difference / max(scales[name], 1e-12))
        row["max_lead"] = max(row["max_lead"], lead / max(scales[name], 1e-12))
        same, total = same + int((~flipped).sum()), total + flipped.numel()
    row["argmax_agreement"] = same / total
    return row


def noise(batch: int, size: tuple[int, int], seed: int, *, nhwc: bool, channels: int = 3) -> Tensor:
    """Seeded test images: uint8 (N, H, W, 3) over the full range, or float32 (N, C, H, W) of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    if nhwc:
        return torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, generator=generator)
    return torch.randn(batch, channels, *size, generator=generator)


def _fault(row: dict[str, Any], tolerance: Tolerance, jumps: bool) -> str:
    """What is outside the tolerance, in a sentence; empty where nothing is."""
    judged = ("p99_rel",) if jumps else ("exact_rel" if "exact_rel" in row else "max_rel", "max_lead")
    allowed = max(tolerance.relative, 2 * row.get("own_rel", 0.0))
    for key in judged:
        if key in row and not row[key] <= allowed:
            return f"the ONNX differs from torch at {row['input']}: {key} {row[key]:.3g}, allowed {allowed:.3g}."
    if not row["argmax_agreement"] >= tolerance.agreement:
        return (
            f"the ONNX differs from torch at {row['input']}: labels agree on {row['argmax_agreement']:.6f} of the "
            f"pixels, at least {tolerance.agreement} expected."
        )
    return ""
