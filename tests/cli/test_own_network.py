"""A network of the reader's own, by a factory, through the commands: nothing is registered, no plug-in is loaded."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import vss
from tests.command import cli, refused
from vss.core.yaml12 import dump
from vss.models import MODELS
from vss.train.header import header

SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F

class Mine(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        block = lambda i, o, s: nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
        self.a, self.b, self.up = block(3, width, 2), block(width, 2 * width, 2), block(3 * width, width, 1)
        self.head, self.aux = nn.Conv2d(width, classes, 1), nn.Conv2d(2 * width, classes, 1)
        self.stages = nn.ModuleList([self.a, self.b])
    def forward(self, x):
        a = self.stages[0](x)
        b = self.stages[1](a)
        y = self.head(self.up(torch.cat([a, F.interpolate(b, a.shape[2:])], 1)))
        return {"logits": y, "aux": self.aux(b)} if self.training else {"logits": y}

def build(classes, width=4):
    return Mine(classes, width)

class Pair(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.inside = net
    def forward(self, left, right):
        return self.inside((left + right) / 2)

def pair(classes=11):
    return Pair(Mine(classes, 4))
"""
FIT = {"epochs": 1, "batch_size": 4, "lr": 0.05, "precision": "32-true", "accelerator": "cpu"}
NETWORK = {"factory": "reader_nets:build", "options": {"width": 8}}
OWN = ["--model-from", "reader_nets:build", "--model-option", "width=8"]
LAYERS = {"net.a.0", "net.b.0", "net.up.0"}


def settings(root: Path) -> dict[str, Any]:
    return {
        "data": {"dataset": "camvid", "root": str(root), "size": [48, 64], "augment": {"scale": [1, 1]}},
        "model": NETWORK,
        "train": FIT,
        "prune": {"criterion": "taylor", "batches": 2, "batch_size": 4, "recalibrate": 1},
        "finetune": FIT,
    }


@pytest.fixture(scope="module")
def run(street_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a whole run with INT8 engines, in the reader's working folder, where their module lies."""
    place = tmp_path_factory.mktemp("reader")
    (place / "reader_nets.py").write_text(SOURCE)
    MODELS.names()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(MODELS, "_items", dict(MODELS._items))
        more = {
            "name": "reader", "control": False, "panels": 1,
            "gate": {"max_drop": 50.0, "max_drop_from_baseline": 100},
            "precision": {"kinds": ["int8"], "images": 4, "max_drop": 50.0},
            "bench": {"min_seconds": 0.05, "max_seconds": 1.0, "images": 2, "spread": 50},
        }  # fmt: skip
        (place / "own.yaml").write_text(dump(settings(street_root) | more))
        done = cli("run", "own.yaml", "--out", "out")
        assert done.returncode == 0, done.stderr[-2000:]
        yield place / "out"
    sys.modules.pop("reader_nets", None)


@pytest.fixture
def nets(run: Path) -> Any:
    """The reader's module."""
    return importlib.import_module("reader_nets")


def test_a_run_ends_in_a_report_of_the_cut_network(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert {"baseline", "pruned", "finetuned", "engine pruned", "engine pruned int8"} <= set(rows)
    assert 0.4 < rows["pruned"]["macs_g"] / rows["baseline"]["macs_g"] <= 0.5
    assert abs(rows["engine pruned"]["miou_pct"] - rows["finetuned"]["miou_pct"]) < 0.1
    saved = header(run / "finetuned.safetensors")
    assert (saved.model, saved.options, saved.network) == ("reader_nets:build", {"width": 8}, "Mine")
    assert {group["id"] for group in saved.plans[0]["groups"]} == LAYERS


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--ckpt", "out/finetuned.safetensors", "--baseline", "out/baseline.safetensors", "DATA"],
        ["quality", "--ckpt", "out/baseline.safetensors", "--criteria", "l1,taylor", "--batches", 1, "DATA"],
        ["finetune", "--ckpt", "out/pruned.safetensors", "--freeze", "stages.0", "--epochs", 1, "DATA"],
        ["calibrate", "--ckpt", "out/finetuned.safetensors", "--images", 2, "DATA"],
        ["sensitivity", "--ckpt", "out/finetuned.safetensors", "--images", 2, "--groups", 2, "DATA"],
        ["bench", "--ckpt", "out/finetuned.safetensors", "--baseline", "out/baseline.safetensors", "--threads", 1,
         "--max-seconds", 0.5, "--allow-unstable"],
        ["benchmark", "--ckpt", "out/baseline.safetensors", "--criteria", "l1", "--dry-run", "DATA"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_every_command_takes_the_factory(run: Path, street_root: Path, words: list[Any]) -> None:
    data = ["--data-root", street_root] if words[-1] == "DATA" else []
    words = [word for word in words if word != "DATA"] + data
    done = cli(*words, *OWN)
    assert done.returncode == 0, done.stderr[-2000:]
    refused(cli(*words, "--model-from", "reader_nets:no"), "function of module 'reader_nets' 'no'")


@pytest.mark.parametrize(
    "command",
    ["prune --macs 0.5 --dry-run", "finetune --epochs 1", "evaluate", "export", "bench", "quality --criteria l1"],
)
def test_a_checkpoint_says_that_somebody_has_to_name_its_function(
    run: Path, street_root: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODELS, "_items", {name: each for name, each in MODELS._items.items() if ":" not in name})
    data = [] if command in ("export", "bench") else ["--data-root", street_root]
    done = cli(*command.split(), "--ckpt", "out/finetuned.safetensors", *data)
    refused(done, "holds a 'reader_nets:build', which is not registered", "--model-from MODULE:NAME")


def test_a_network_of_two_images_is_for_python(run: Path, nets: Any) -> None:
    vss.save(nets.pair(), run.parent / "pair.safetensors")
    words = ["export", "--ckpt", "pair.safetensors", "--model-from", "reader_nets:pair", "--save", "pair.onnx"]
    done = cli(*words, "--input-size", "48,64")
    refused(done, "does not take images of 48 x 64 in 3 channels", "argument: 'right'", "in Python example=")
    assert not (run.parent / "pair.onnx").exists()


def test_weights_of_another_number_of_classes_are_pruned_with_a_new_head(
    run: Path, nets: Any, street_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(nets.build(7, 8).state_dict(), run.parent / "seven.pth")
    data = ["--data-root", street_root, "--dataset", "camvid", "--input-size", "48,64"]
    words = ["prune", "--weights", "seven.pth", *data, "--criterion", "l1", "--macs", 0.5, *OWN]
    refused(cli(*words, "--dry-run"), "is of 7 classes and the network of 11", "--replace-head")
    for save in ("one", "two"):
        done = cli(*words, "--replace-head", "--save", save)
        assert done.returncode == 0 and "the head starts anew" in caplog.text, done.stderr[-2000:]
        caplog.clear()
    one, two = (header(run.parent / save / "pruned.safetensors") for save in ("one", "two"))
    assert one.num_classes == 11 and one.weights_sha256 == two.weights_sha256


def test_a_file_names_its_layers_as_the_plan_does(run: Path) -> None:
    done = cli("export", "--ckpt", "out/finetuned.safetensors", "--labels", "--save", "net.onnx", *OWN)
    assert done.returncode == 0, done.stderr[-2000:]
    named = {each.name for each in onnx.load(run.parent / "net.onnx").graph.initializer}
    assert {f"model.{layer}.weight" for layer in LAYERS} <= named


def test_a_bundle_is_shipped_and_verified(run: Path) -> None:
    assert cli("ship", run, "--save", "bundle", "--samples", 1, "--force").returncode == 0
    assert cli("verify", "bundle").returncode == 0


def test_a_sweep_with_workers(run: Path, street_root: Path) -> None:
    base = settings(street_root) | {"bench": {"spread": 50}}
    grid = {"base": base, "criteria": ["l1"], "budgets": [0.5], "seeds": [0], "latency_seconds": 0.1}
    (run.parent / "grid.yaml").write_text(dump(grid))
    done = cli("sweep", "grid.yaml", "--workers", 1, "--threads", 1, "--retries", 0, "--save", "sweep")
    assert done.returncode == 0 and "1 of 1 trials done" in done.stdout, done.stdout[-1000:]


def test_what_is_cut_again_is_loaded_in_python(run: Path, nets: Any, street_root: Path) -> None:
    words = ["--macs", 0.8, "--criterion", "l1", "--data-root", street_root, "--save", "again"]
    done = cli("prune", "--ckpt", "out/finetuned.safetensors", *words, *OWN)
    assert done.returncode == 0, done.stderr[-2000:]
    fresh = vss.models.wrap(nets.build(11, 8), num_classes=11, name="reader_nets:build")
    net: Any = vss.load(run.parent / "again" / "pruned.safetensors", model=fresh)
    assert len(net.plans) == 2 and net(torch.zeros(1, 3, 48, 64)).shape == (1, 11, 48, 64)


def test_time_by_layer_is_in_the_names_of_the_plan(run: Path) -> None:
    done = cli("explain", run, "--allow-unstable", "--seconds", 0.02, "--report", "explain.json")
    assert done.returncode in (0, 3), done.stderr[-2000:]  # 3: too noisy to time
    rows = json.loads((run.parent / "explain.json").read_text())["rows"]
    assert LAYERS | {"net.head"} <= {row["unit"] for row in rows}
