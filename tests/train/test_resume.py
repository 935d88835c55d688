"""`fit`: schedule, best weights, averaging, distillation, and resuming after kill -9 in the very same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.command import cli
from vss.core.config import FitConfig, Recipe
from vss.run.project import Project
from vss.train import checkpoint
from vss.train.fit import precision_of
from vss.train.fit.module import decay_groups

TINY = {"width": 4, "depth": 2}


def recipe(root: Path, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"dataset": "camvid", "root": str(root), "size": [48, 64]},
            "model": {"name": "unet", "options": TINY},
            "train": {"epochs": 3, "batch_size": 4, "lr": 0.05, "precision": "32-true", "accelerator": "cpu", **train},
        }
    )


def fit(root: Path, out: Path, **train: Any) -> tuple[nn.Module, dict[str, Any]]:
    job = recipe(root, **train)
    project = Project.open(job)
    model = project.build_model()
    return model, project.train(model, job.train, out, progress=False)


def test_loss_falls_and_the_model_ends_with_the_best_epoch(street_root: Path, tmp_path: Path) -> None:
    model, result = fit(street_root, tmp_path, epochs=4)
    rows = result["curves"]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]
    scores = [row["val_miou_pct"] for row in rows]
    assert result["best_miou_pct"] == max(scores) and result["best_epoch"] == scores.index(max(scores))
    saved = load_file(result["best"])
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    assert result["steps"] == 4 * (24 // 4)


def test_poly_schedule_is_the_formula(street_root: Path, tmp_path: Path) -> None:
    _, result = fit(street_root, tmp_path, epochs=3, lr=0.05, poly_power=0.9)
    total = 3 * 6
    for row in result["curves"]:
        assert row["lr"] == pytest.approx(0.05 * (1 - row["step"] / total) ** 0.9, rel=1e-9, abs=1e-12)


def test_same_seed_same_weights_other_seed_other_weights(street_root: Path, tmp_path: Path) -> None:
    first, _ = fit(street_root, tmp_path / "a", epochs=1)
    second, _ = fit(street_root, tmp_path / "b", epochs=1)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_averaged_weights_are_what_is_saved(street_root: Path, tmp_path: Path) -> None:
    plain, _ = fit(street_root, tmp_path / "plain", epochs=1)
    averaged, _ = fit(street_root, tmp_path / "ema", epochs=1, ema=0.9)
    torch.manual_seed(0)
    start = Project.open(recipe(street_root)).build_model()

    def distance(a: nn.Module, b: nn.Module) -> float:
        return sum(float((x - y).detach().square().sum()) for x, y in zip(a.parameters(), b.parameters(), strict=True))

    assert 0 < distance(averaged, start) < distance(plain, start)


def test_distillation_pulls_towards_the_teacher(street_root: Path, tmp_path: Path) -> None:
    job = recipe(street_root, epochs=2, distill=20.0, lr=0.02)
    project = Project.open(job)
    teacher = project.build_model()
    with torch.no_grad():
        teacher.classifier.bias.copy_(torch.eye(11)[3] * 8)  # a teacher that says class 3 everywhere
    model = project.build_model()
    project.train(model, job.train, tmp_path / "with", teacher=teacher, progress=False)
    alone, _ = fit(street_root, tmp_path / "without", epochs=2, lr=0.02)
    images = project.preprocess.normalise(torch.stack([project.split("val")[i]["image"] for i in range(4)]))

    def share(net: nn.Module) -> float:
        return float((net.eval().predict(images) == 3).float().mean())

    assert share(model) > 0.9 > share(alone)


def test_a_network_in_evaluation_mode_is_trained_in_training_mode(street_root: Path, tmp_path: Path) -> None:
    job = recipe(street_root, epochs=1)
    project = Project.open(job)
    model = project.build_model().eval()
    before = model.encoder[0][0][1].running_mean.clone()
    project.train(model, job.train, tmp_path, progress=False)
    assert not torch.equal(before, model.encoder[0][0][1].running_mean)


def test_norms_and_biases_do_not_decay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    decay, free = decay_groups(net, 0.1)
    assert [p.ndim for p in decay["params"]] == [4, 2] and decay["weight_decay"] == 0.1
    assert len(free["params"]) == 4 and free["weight_decay"] == 0.0


def test_auto_precision_follows_the_hardware() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    native = "avx512_bf16" in flags or "amx_tile" in flags
    expected = "bf16-mixed" if native else "32-true"
    assert precision_of(FitConfig(accelerator="cpu")) == expected
    assert precision_of(FitConfig(precision="16-mixed")) == "16-mixed"


COMMAND = [
    "train", "--dataset", "camvid", "--model", "unet", "--option", "width=4", "--option", "depth=2",
    "--input-size", "48,64", "--epochs", "6", "--batch-size", "4", "--set", "train.precision=32-true",
    "--set", "train.accelerator=cpu", "--set", "train.ema=0.9",
]  # fmt: skip


def command(root: Path, save: Path, *more: str) -> list[str]:
    return [*COMMAND, "--data-root", str(root), "--save", str(save), *more]


def test_kill_9_and_again_equals_an_unbroken_run(street_root: Path, tmp_path: Path) -> None:
    assert cli(*command(street_root, tmp_path / "whole")).returncode == 0
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, "-m", "vss.cli", *command(street_root, broken)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    resume = broken / "lightning" / "resume.ckpt"
    deadline = time.monotonic() + 300
    while not resume.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "the training ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cli(*command(street_root, broken)).returncode == 0
    whole, again = (load_file(tmp_path / name / "best.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    curves = [(tmp_path / name / "curves.json").read_text() for name in ("whole", "broken")]
    assert curves[0] == curves[1]


def test_two_processes_train_one_model(street_root: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vss.cli"]
    flags = command(street_root, tmp_path / "two", "--devices", "2", "--set", "train.strategy=ddp", "--epochs", "2")
    done = subprocess.run(
        [*run, *flags], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    saved = checkpoint.read(tmp_path / "two" / "best.safetensors")
    assert saved.info["metrics"]["val_miou_pct"] > 0
    rows = (tmp_path / "two" / "curves.json").read_text()
    assert rows.count('"step": 3') == 1  # 24 images, 2 processes, batches of 4: three steps an epoch
