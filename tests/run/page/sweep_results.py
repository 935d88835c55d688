"""A results.json of a sweep as large as the ones that people look at, from a seeded generator."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vss.data.readers import CAMVID_NAMES
from vss.sweep.compare import ranking, summary

NETWORKS = {"unet": (1.94, 0.83, 43.1), "resnet18_seg": (11.7, 1.46, 47.9), "lraspp": (3.2, 0.21, 44.6)}
LOSS = {"taylor": 1.0, "sirfp": 1.3, "fpgm": 2.4, "l1": 2.9, "random": 5.5}


def results(root: Path, *, seeds: int = 3) -> dict[str, Any]:
    """Content of results.json; pictures are written below `root`."""
    draw = random.Random(0)
    rows = [
        _row(draw, network, criterion, keep, seed)
        for network in NETWORKS for criterion in LOSS for keep in (0.5, 0.3) for seed in range(seeds)
    ]  # fmt: skip
    rows[7] |= {"status": "failed", "error": "the budget asks for 0.300 of the macs and the floor allows 0.41."}
    rows[7]["values"] = {}
    good = [row for row in rows if row["status"] == "ok"]
    blocks: dict[str, dict[str, float]] = {}
    for row in good:
        coords = row["coords"]
        blocks.setdefault(f"{coords['network']} {coords['budget']} {coords['seed']}", {})[coords["criterion"]] = row[
            "values"
        ]["miou_pct"]
    return {
        "kind": "vss.sweep_results", "schema": 1, "name": "camvid small", "created": "2026-03-01T12:00:00+0000",
        "command": "vss sweep grid.yaml --workers 2", "protocol": "One confusion matrix over the test split.",
        "environment": {"machine": "xeon-2c", "cpu": {"model": "Xeon"}, "python": "3.12"}, "metric": "miou_pct",
        "title": "mIoU", "axes": ["network", "criterion", "budget", "seed"], "rows": rows, "groups": _groups(good),
        "columns": ["miou_pct", "miou_pct_change", "pixel_acc_pct", "macs_g", "params_m", "latency_ms_p50", "speedup"],
        "baselines": [
            {"name": name, "iou_pct": [miou + 9 * (i % 3 - 1) for i in range(11)], "values": {
                "miou_pct": summary([miou, miou + 0.4, miou - 0.3]), "macs_g": summary([macs]),
                "params_m": summary([params]), "latency_ms_p50": summary([12 * macs])}}
            for name, (params, macs, miou) in NETWORKS.items()
        ],
        "classes": list(CAMVID_NAMES), "ranking": ranking(blocks), "unequal": [], "computed_steps": 312,
        "repeated_steps": 0, "panels": _panels(root), "palette": [[20 * i, 255 - 20 * i, 120] for i in range(11)],
    }  # fmt: skip


def _row(draw: random.Random, network: str, criterion: str, keep: float, seed: int) -> dict[str, Any]:
    params, macs, miou = NETWORKS[network]
    change = -LOSS[criterion] * (0.7 / keep - 0.9) + draw.gauss(0, 0.35)
    coords = {"network": network, "criterion": criterion, "budget": f"macs {keep}", "seed": str(seed)}
    share = keep * draw.uniform(0.98, 1.0)
    widths = [16, 16, 32, 32, 64, 64, 128, 128, 256, 256, 128, 64, 64, 32, 16]
    values = {
        "miou_pct": miou + change, "miou_pct_change": change, "pixel_acc_pct": 80 + change, "macs_g": macs * share,
        "params_m": params * share * draw.uniform(0.6, 0.9), "latency_ms_p50": 12 * macs * (share + 0.15),
        "speedup": 1 / (share + 0.15),
    }  # fmt: skip
    iou = [miou + 9 * (i % 3 - 1) + change * draw.uniform(-0.5, 2.0) for i in range(11)]
    groups = [{"id": f"encoder.{i}.conv", "before": w, "after": max(1, int(w * draw.uniform(0.2, 1)))}
              for i, w in enumerate(widths)]  # fmt: skip
    name = f"{network}--{criterion}--macs_{keep}--{seed}"
    return {"id": name, "coords": coords, "status": "ok", "seconds": 20 + 10 * draw.random(), "attempts": 1,
            "values": values, "iou_pct": iou, "groups": groups, "labels": [],
            "command": f"vss run camvid_unet --out runs/{name} --set seed={seed}"}  # fmt: skip


def _groups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    table: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        table.setdefault(" · ".join(v for k, v in row["coords"].items() if k != "seed"), []).append(row)
    return [
        {
            "name": name, "coords": {k: v for k, v in members[0]["coords"].items() if k != "seed"},
            "cells": [row["id"] for row in members], "widths": members[0]["groups"], "labels": [],
            "values": {k: summary([row["values"][k] for row in members]) for k in members[0]["values"]},
            "iou_pct": [sum(c) / len(c) for c in zip(*(row["iou_pct"] for row in members), strict=True)],
        }
        for name, members in table.items()
    ]  # fmt: skip


def _panels(root: Path) -> list[dict[str, Any]]:
    rng, files = np.random.default_rng(0), {}
    (root / "pictures").mkdir(parents=True, exist_ok=True)
    for name in ("image", "truth", "baseline", "taylor · macs 0.3", "l1 · macs 0.3"):
        files[name] = f"pictures/{len(files)}.png"
        small = rng.integers(0, 255, (6, 8, 3)).astype(np.uint8)
        Image.fromarray(small).resize((160, 112), Image.Resampling.NEAREST).save(root / files[name])
    return [{"id": "unet: 0001", "files": files}]
