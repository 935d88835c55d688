"""A small report with every part, its pictures drawn on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .browser import Browser, browser, find


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Without a network."""
    program = find()
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium, or name one in VSS_CHROMIUM")
    with browser(program, tmp_path_factory.mktemp("profile")) as opened:
        opened.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0,
                    uploadThroughput=0)  # fmt: skip
        yield opened


CLASSES = ["road", "<kerb>", "car"]
BEFORE, AFTER = [[90, 10, 0], [5, 40, 5], [2, 0, 6]], [[80, 20, 0], [5, 44, 1], [8, 0, 0]]
PALETTE = [[128, 64, 128], [244, 35, 232], [0, 0, 142]]


def draw(folder: Path) -> dict[str, str]:
    """A 12 x 16 picture: truth has three bands and a void corner, each network gets something else wrong."""
    (folder / "panels").mkdir(parents=True)
    truth = np.repeat(np.array([0, 1, 2], np.uint8), 4)[:, None].repeat(16, axis=1)
    truth[0, :4] = 255
    baseline, engine = truth.copy(), truth.copy()
    baseline[truth == 255] = engine[truth == 255] = 0
    baseline[4, :8] = 0  # eight pixels wrong before
    engine[4, :2] = 0  # two of them still wrong: six became right
    engine[11, :3] = 1  # three became wrong
    photo = np.full((12, 16, 3), 100, np.uint8)
    files = {"image": photo, "truth": truth, "baseline": baseline, "engine": engine}
    for name, pixels in files.items():
        Image.fromarray(pixels).save(folder / "panels" / f"{name}.png")
    return {name: f"panels/{name}.png" for name in files}


def row(name: str, params: float, macs: float, miou: float, p50: float, **more: float) -> dict[str, Any]:
    return {"name": name, "params_m": params, "macs_g": macs, "miou_pct": miou, "latency_ms_p50": p50, **more}


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    """The dictionary of a complete report; its pictures lie in `tmp_path`."""
    points = [{"epoch": e, "loss": 2.0 / e, "val_miou_pct": 50.0 + e, "lr": 0.01 / e} for e in range(1, 6)]
    stages = {"decode": 5.0, "engine": 20.0}
    return {
        "kind": "vss.report",
        "schema": 1,
        "name": "street unet",
        "status": "ok",
        "protocol": "three classes, void ignored",
        "command": ["vss", "run", "street unet"],
        "environment": {"machine": "xeon-8370c-2c", "cpu": {"model": "Xeon 8370C"}, "git": {"modified": True}},
        "recipe": {"prune": {"criterion": "taylor", "budget": {"kind": "macs", "ratio": 0.5}}},
        "inputs": {"weights": "ab12" * 16},
        "steps": [{"name": "train", "status": "ok", "seconds": 12.5}, {"name": "export", "status": "skipped"}],
        "rows": [
            row("baseline", 7.76, 8.0, 61.34, 58.2),
            row("pruned", 2.91, 4.0, 41.02, 36.9),
            row("finetuned", 2.91, 4.0, 61.02, 36.9, boundary_iou_pct=37.654),
            row("engine baseline", 7.76, 8.0, 61.34, 42.0, latency_ms_p99=44.0),
            row("engine pruned", 2.91, 4.0, 61.02, 26.0, speedup=1.62, speedup_per_mac_reduction=0.81, size_mib=11.3),
        ],
        "curves": {"train": points, "finetune": points[:3]},
        "groups": [{"id": "enc.0", "before": 64, "after": 16}, {"id": "enc.1", "before": 64, "after": 48}],
        "locked": [{"layer": "head.out", "reason": "its channels are the classes"}],
        "classes": CLASSES,
        "palette": PALETTE,
        "iou_pct": {"baseline": [90.0, 40.0, 54.0], "finetuned": [90.0, 41.5, 51.5], "engine pruned": [90, 41.5, None]},
        "confusion": {"baseline": BEFORE, "engine pruned": AFTER},
        "class_drops": {"baseline": [[-0.5, 0.5], [-2.5, -0.5], None]},
        "worst": [
            {
                "id": "0001",
                "why": "lowest score",
                "scores": {"baseline": 40.0, "engine pruned": 31.5},
                "confused": [2, 0, 12.5],
            },
            {"id": "0002", "why": "lost most", "scores": {"baseline": 80.0, "engine pruned": 70.0}},
        ],
        "panels": [{"id": "0001", "files": draw(tmp_path), "note": "lowest score: 31.5 %"}],
        "checks": {"masked_equals_sliced": True, "max_abs": 3.1e-6},
        "gate": {"passed": True, "drop": 0.32, "max_drop": 0.5},
        "bench": {
            "engine": {"stable": True, "sessions": {"a": {"latency_ms_p90": 42.8}, "b": {"latency_ms_p90": 26.2}}},
            "end_to_end": {"sessions": {"a": {"stages_ms_p50": stages}}},
        },
        "plan": {"criterion": "taylor"},
    }
