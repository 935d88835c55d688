"""A fit goes on only from its own files, whole ones; it stops where it diverges; what cannot work is refused first."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vss
from vss import models
from vss.cli.main import Terminated, terminable
from vss.core.config import FinetuneConfig, FitConfig, Recipe
from vss.core.errors import VssError
from vss.core.files import TEMPORARY, locked, read_json, sha256_tensors
from vss.run.job import check_fits
from vss.run.project import Project, teacher_of
from vss.train.fit import Phase, StepContext, check_settings
from vss.train.fit.folder import _damage, check_norms, fit_folder

CPU = {"precision": "32-true", "accelerator": "cpu", "devices": 1}


def project_of(root: Path, **train: Any) -> Project:
    settings = {"epochs": 2, "batch_size": 2, "lr": 0.05, **CPU, **train}
    data = {"dataset": "camvid", "root": str(root), "size": [16, 32], "limit": 4}
    network = {"name": "unet", "options": {"width": 4, "depth": 2}}
    return Project.open(Recipe.model_validate({"data": data, "model": network, "train": settings}))


def fit(root: Path, out: Path, phase: Phase | None = None, **train: Any) -> dict[str, Any]:
    project = project_of(root, **train)
    return project.train(project.build_model(), project.recipe.train, out, progress=False, phase=phase)


def weights(folder: Path) -> str:
    return sha256_tensors(load_file(folder / "best.safetensors"))


class At(Phase):
    """Does something after one step."""

    def __init__(self, step: int, act: Callable[[Any], None]) -> None:
        self.step, self.act = step, act

    def after_step(self, context: StepContext) -> None:
        if context.step == self.step:
            self.act(context.model)


def interrupt(model: nn.Module) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(street_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs, unbroken."""
    out = tmp_path_factory.mktemp("whole")
    fit(street_root, out, At(99, interrupt))
    return out


def broken(root: Path, out: Path) -> None:
    """The same, ended by SIGTERM in the second epoch."""
    before = signal.getsignal(signal.SIGTERM)
    with terminable(), pytest.raises(Terminated) as stop:
        fit(root, out, At(3, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    assert signal.getsignal(signal.SIGTERM) == before
    assert stop.value.__notes__ == [f"1 of 2 epochs of train are kept in {out}"]


def test_other_inputs_start_anew_and_the_old_result_is_kept_and_comes_back(
    street_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vss")
    fit(street_root, tmp_path / "a", epochs=1)
    first = weights(tmp_path / "a")
    fit(street_root, tmp_path / "a", epochs=1, lr=0.01, momentum=0.5)
    assert f"{tmp_path / 'a'} held another training (train.lr, train.momentum); it is kept in" in caplog.text
    fit(street_root, tmp_path / "fresh", epochs=1, lr=0.01, momentum=0.5)
    assert weights(tmp_path / "a") == weights(tmp_path / "fresh") != first
    (kept,) = (tmp_path / "a" / "earlier").iterdir()
    assert weights(kept) == first
    caplog.clear()
    again = fit(street_root, tmp_path / "a", epochs=1)
    assert weights(tmp_path / "a") == first and again["steps"] == 2 and "epoch 1/1" not in caplog.text
    assert not kept.exists() and len(list((tmp_path / "a" / "earlier").iterdir())) == 1


def test_the_record_names_every_input(street_root: Path, whole: Path) -> None:
    project = project_of(street_root)
    inputs = read_json(whole / "fit.json", kind="vss.fit", schema=1)["inputs"]
    assert inputs["train"] == project.recipe.train.model_dump(mode="json") and inputs["seed"] == 0
    assert inputs["start weights"] == sha256_tensors(project.build_model().state_dict())
    assert inputs["teacher"] is None and inputs["phase"] == ["At", {}]
    assert inputs["data"]["train"] == project.split("train").sha256() and inputs["data"]["size"] == [16, 32]
    assert inputs["preprocess"] == project.preprocess.sha256 and inputs["classes"] == list(project.task.classes)


def test_a_folder_without_record_is_kept_aside_and_one_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "best.safetensors").write_text("old")
    (tmp_path / f".best{TEMPORARY}abcd1234.safetensors").write_text("left by a kill")
    with fit_folder(tmp_path, {"a": 1}) as (_, resume), pytest.raises(VssError, match="another vss command is at work"):
        assert resume is None and (tmp_path / "earlier/unknown-1/best.safetensors").read_text() == "old"
        with fit_folder(tmp_path, {"a": 1}):
            pass
    assert not list(tmp_path.glob(".best*"))
    with pytest.raises(VssError, match="is a file; a training writes a folder"), fit_folder(tmp_path / "fit.json", {}):
        pass
    with locked(tmp_path / ".lock"):  # it was let go
        pass


def test_an_interrupted_fit_goes_on_to_the_weights_of_the_unbroken_one(
    street_root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # nothing goes through another file system
    broken(street_root, tmp_path)
    (tmp_path / "best.safetensors").unlink()
    result = fit(street_root, tmp_path, At(99, interrupt))
    assert weights(tmp_path) == weights(whole)
    assert result["curves"] == read_json(whole / "curves.json", kind="vss.curves", schema=1)["rows"]


def cut(data: bytes) -> bytes:
    return data[:5000]


def flip(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b""], ids=["cut", "flipped", "empty"])
def test_every_damage_of_a_resume_file_is_seen(whole: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    data = (whole / "lightning/resume.ckpt").read_bytes()
    key = read_json(whole / "fit.json", kind="vss.fit", schema=1)["key"]
    (tmp_path / "r.ckpt").write_bytes(data)
    assert (
        _damage(tmp_path / "r.ckpt", key) == "" and _damage(tmp_path / "r.ckpt", "other") == "it is of another training"
    )
    (tmp_path / "r.ckpt").write_bytes(damage(data))
    assert _damage(tmp_path / "r.ckpt", key)


def test_with_a_damaged_resume_file_the_training_starts_anew(
    street_root: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    resume = tmp_path / "lightning/resume.ckpt"
    resume.write_bytes(flip(resume.read_bytes()))
    (tmp_path / "best.safetensors").unlink()
    fit(street_root, tmp_path, At(99, interrupt))
    assert f"{resume} cannot be used" in caplog.text and "starts anew" in caplog.text
    assert weights(tmp_path) == weights(whole)


def test_a_training_that_diverges_keeps_the_last_good_weights(street_root: Path, tmp_path: Path) -> None:
    def spoil(model: Any) -> None:
        next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).running_var.fill_(torch.inf)

    sentence = (
        r"diverged in epoch 2, step 4: .*running_var is no longer finite; the best weights .* epoch 1 .*train\.lr"
    )
    with pytest.raises(VssError, match=sentence):
        fit(street_root, tmp_path, At(3, spoil))
    assert all(bool(value.isfinite().all()) for value in load_file(tmp_path / "best.safetensors").values())
    with pytest.raises(VssError, match="no epoch was finished before, so no weights are kept"):
        fit(street_root, tmp_path / "high", epochs=3, lr=1e30)
    assert not (tmp_path / "high/best.safetensors").exists()


def test_the_last_epoch_is_always_validated(street_root: Path, tmp_path: Path) -> None:
    rows = fit(street_root, tmp_path, epochs=3, val_every=2)["curves"]
    assert [row["epoch"] for row in rows if "val_miou_pct" in row] == [1, 2]
    rows = fit(street_root, tmp_path / "short", epochs=2, val_every=5)["curves"]
    assert [row["epoch"] for row in rows if "val_miou_pct" in row] == [1]


@pytest.mark.parametrize(
    ("key", "value"),
    [("accelerator", "frog"), ("devices", 0), ("devices", "two"), ("strategy", "frog"), ("epochs", 0)],
)
def test_settings_that_cannot_work_are_named(key: str, value: Any) -> None:
    with pytest.raises(VssError, match=rf"^train\.{key} .*{value}"):
        check_settings(FitConfig(**{**CPU, key: value}))
    with pytest.raises(VssError, match=rf"^finetune\.{key} "):
        check_settings(FinetuneConfig(**{**CPU, key: value}))


def test_the_fits_of_a_run_are_checked_before_it(street_root: Path) -> None:
    project = project_of(street_root)
    for wrong, sentence in (
        ({"finetune": {**CPU, "epochs": 0}}, r"finetune\.epochs is 0"),
        ({"train": {**CPU, "distill": 1.0}}, r"train\.distill is 1\.0"),
        (
            {"model": {"name": "deeplabv3_resnet50"}, "finetune": {**CPU, "batch_size": 1}},
            r"norm .* finetune\.batch_size",
        ),
    ):
        recipe = Recipe.model_validate({**project.recipe.model_dump(by_alias=True), **wrong})
        with pytest.raises(VssError, match=sentence):
            check_fits(Project(recipe, project.data, project.preprocess))


@pytest.mark.parametrize("lr", [1e300, 1e-50, 0.0])
def test_a_rate_that_float32_has_not_is_refused(lr: float) -> None:
    with pytest.raises(ValueError, match="lr"):
        FinetuneConfig(lr=lr)


class Pooled(nn.Module):
    """A norm over 1x1 maps, as DeepLabV3 has one."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.BatchNorm2d(3), norm

    def forward_train(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.norm(self.first(images).mean((2, 3), keepdim=True))}


def test_one_image_a_batch_under_a_norm_of_one_value_is_refused_by_layer() -> None:
    image, one, two = torch.rand(1, 3, 8, 8), FitConfig(batch_size=1), FitConfig(batch_size=2)
    pooled = Pooled(nn.BatchNorm2d(3)).train()
    with pytest.raises(VssError, match=r"the batch norm norm sees maps of 1x1.*train\.batch_size"):
        check_norms(pooled, image, one)
    check_norms(pooled, image, two)
    assert pooled.training and int(pooled.first.num_batches_tracked) == 0 and not pooled.norm._forward_pre_hooks
    with pytest.raises(VssError, match=r"norm normalises each map by itself and sees maps of 1x1 at 8x8"):
        check_norms(Pooled(nn.InstanceNorm2d(3)), image, two)
    check_norms(models.build("unet", 3, width=4, depth=2), torch.rand(1, 3, 16, 16), one)


def test_a_teacher_of_something_else_is_refused(street_root: Path, tmp_path: Path) -> None:
    project = project_of(street_root)
    student = project.build_model()
    preprocess = project.preprocess.model_dump(mode="json")

    def saved(net: nn.Module, classes: tuple[str, ...], **other: Any) -> Path:
        return vss.save(net, tmp_path / "t.safetensors", preprocess=preprocess | other, classes=classes)

    names = project.task.classes
    for same in (names, tuple(name.upper() for name in names), ()):
        assert teacher_of(saved(student, same), project, student).num_classes == 11
    six = models.build("unet", 6, width=4, depth=2)
    for path, part in (
        (lambda: saved(six, names[:6]), "has 6 classes"),
        (lambda: saved(six, ()), "has 6 classes"),
        (lambda: saved(student, names[::-1]), r"are not those of the network \(the same names in another order\)"),
        (lambda: saved(student, names, mean=[0.0, 0.0, 0.0]), "has mean"),
        (lambda: saved(student, names, std=[1.0, 1.0, 1.0]), "has std"),
        (lambda: saved(models.build("segdecnet", 1), ("defect",)), "has task"),
    ):
        with pytest.raises(VssError, match=rf"the teacher .* {part}"):
            teacher_of(path(), project, student)
    with pytest.raises(VssError, match=r"train\.distill is 1\.0 and there is no teacher"):
        fit(street_root, tmp_path / "alone", distill=1.0)


def test_every_epoch_is_a_line(street_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vss")
    rows = fit(street_root, tmp_path)["curves"]
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("vss.train")]
    assert lines[0] == "train: 2 epochs of 2 steps, on 1 x cpu, 32-true"
    for line, row in zip(lines[1:], rows, strict=True):
        figures = f"loss {row['loss']:.4f}, val miou_pct {row['val_miou_pct']:.2f}, lr {row['lr']:.3g}"
        assert line.startswith(f"train: epoch {row['epoch'] + 1}/2: {figures}, ") and line.endswith(" left")


def test_frozen_layers_and_norms_stay_as_they_are(street_root: Path, tmp_path: Path) -> None:
    project = project_of(street_root, epochs=1, freeze=("encoder.*",), freeze_norms=True)
    torch.manual_seed(0)
    net = project.build_model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    norms = [name for name, part in net.named_modules() if isinstance(part, torch.nn.BatchNorm2d)]
    project.train(net, project.recipe.train, tmp_path, progress=False)
    moved = {
        name.rpartition(".")[0] for name, value in net.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved and not [name for name in moved if name.startswith("encoder.") or name in norms]
    assert all(parameter.requires_grad for parameter in net.parameters())
    for layers, sentence in ((["encodr"], "unknown layer of train.freeze"), (["*"], "nothing is left to train")):
        config = project.recipe.train.model_copy(update={"freeze": tuple(layers)})
        with pytest.raises(VssError, match=sentence):
            project.train(net, config, tmp_path / "b", progress=False)
