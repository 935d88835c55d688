"""The defect task: thresholds from validation alone, the ship rule, bad input, and a whole run to the page."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.data import labels_of, write_defects
from vss.run import candidates
from vss.run.engines import _shipped
from vss.run.job import run
from vss.run.project import Project, project_of
from vss.train import checkpoint
from vss.train.metrics import at_threshold, average_precision, choose_threshold
from vss.train.tasks.defect import DefectTask

SIZE = (128, 64)
FIT = {"batch_size": 4, "lr": 0.02, "precision": "32-true", "accelerator": "cpu"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training images, 16 defective, and 20 test images, 7 defective, of varying size."""
    folder = tmp_path_factory.mktemp("data") / "defects"
    size = ((120, 136), (60, 68))
    return write_defects(folder, seed=4, counts={"train": 48, "test": 20}, size=size, positives=1 / 3)


def recipe(root: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "name": "tiny",
        "data": {"dataset": "ksdd2", "root": str(root), "size": list(SIZE), "augment": {"hflip": 0.5}},
        "model": {"name": "segdecnet", "options": {"widths": [4, 6, 6, 6, 12]}},
        "train": {"epochs": 2, **FIT},
        "defect": {"dilate": 3},
        "prune": {"criterion": "taylor_fo", "batches": 3, "batch_size": 4, "keep": ["seg_mask", "extractor", "fc"]},
        "finetune": {"epochs": 1, **FIT},
        "gate": {"max_fnr_increase": 100, "max_ap_drop": 100, "max_drop_from_baseline": 100},
        "bench": {"min_seconds": 0.1, "max_seconds": 2.0, "images": 2, "spread": 50},
        "panels": 3,
    }
    return Recipe.model_validate(settings | changes)


def opened(root: Path, **changes: Any) -> Project:
    return Project.open(recipe(root, **changes))


class Told:
    """A predictor with given decisions; the map is hot on the left half of images that are called defective."""

    def __init__(self, project: Project, logits: dict[str, np.ndarray]) -> None:
        self.order = [name for name in ("val", "test") for _ in range(len(project.split(name)))]
        self.values = {name: list(values) for name, values in logits.items()}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        found = [self.values[self.order.pop(0)].pop(0) for _ in range(len(images))]
        seg = torch.full((len(images), 1, SIZE[0] // 8, SIZE[1] // 8), -6.0)
        for row, value in zip(seg, found, strict=True):
            row[..., :4] = 6.0 if value > 0 else -6.0
        return {"decision": torch.tensor(found, dtype=torch.float64)[:, None], "seg": seg}


def test_the_threshold_is_chosen_on_validation_and_used_on_test(root: Path) -> None:
    project = opened(root)
    rng = np.random.default_rng(0)
    labels = {name: labels_of(project.data, project.data.pairs(name)) for name in ("val", "test")}
    logits = {
        "val": labels["val"] * 2 - 1.0,
        "test": np.float32(rng.normal(size=len(labels["test"])) + labels["test"]).astype(float),
    }
    result = project.score(Told(project, logits))
    assert result["threshold_logit"] == choose_threshold(labels["val"], logits["val"]) == 0.0
    expected = at_threshold(labels["test"], logits["test"], 0.0)
    assert all(result[key] == value for key, value in expected.items())
    assert result["ap_pct"] == average_precision(labels["test"], logits["test"])
    assert result["val"]["ap_pct"] == 100 == result["val_ap_pct"] and result["val_fnr_pct"] == 0
    low = sorted(score for score, label in zip(logits["test"], labels["test"], strict=True) if label and score < 0)
    assert [row["logit"] for row in result["missed"]] == low and len(low) == result["fn"]
    rows = result["decisions_per_image"]
    assert np.array_equal(rows[rows[:, 0] == 1][:, 2], logits["test"]) and (rows[:, 0] == 0).sum() == len(labels["val"])
    stated = {"images": 20, "resolution": list(SIZE), "positives": 7, "negatives": 13}
    assert {key: result[key] for key in stated} == stated


def test_pixel_figures_of_a_known_map(root: Path) -> None:
    project = opened(root)
    logits = {name: np.ones(len(project.split(name))) for name in ("val", "test")}
    result = project.score(Told(project, logits))
    split = project.split("test")
    truth = np.stack([split[i]["mask"].numpy() == 1 for i in range(len(split))])
    said = np.zeros_like(truth)
    said[:, :, :32] = True
    assert result["pixel_iou_pct"] == pytest.approx(100 * (truth & said).sum() / (truth | said).sum())
    coarse = torch.full((1, 1, SIZE[0] // 8, SIZE[1] // 8), -6.0)
    coarse[..., :4] = 6.0
    steps = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")[0, 0].double().mul(100).round()
    expected = average_precision(truth.ravel(), np.broadcast_to(steps.numpy(), truth.shape).ravel())
    assert result["pixel_ap_pct"] == pytest.approx(expected, abs=1e-9) and expected < 100


def test_another_threshold_on_validation_changes_nothing_that_ranks(root: Path) -> None:
    project = opened(root, defect={"threshold": "fnr", "max_fnr_pct": 50, "dilate": 3})
    labels = {name: labels_of(project.data, project.data.pairs(name)) for name in ("val", "test")}
    rng = np.random.default_rng(1)
    logits = {name: np.float32(rng.normal(size=len(value))).astype(float) for name, value in labels.items()}
    result = project.score(Told(project, logits))
    assert result["val_fnr_pct"] == 50 and result["ap_pct"] == average_precision(labels["test"], logits["test"])


def results(ap: float, missed: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    labels = np.arange(20) < 10
    rows = np.stack([np.zeros(20), labels, rng.normal(size=20) + labels], 1)
    rows = np.concatenate([rows, rows + np.array([1, 0, 0])])  # validation and the split alike
    return {"ap_pct": ap, "val": {"ap_pct": ap, "fnr_pct": 10.0 * missed}, DefectTask.per_image: rows}


@pytest.mark.parametrize(("missed", "limit", "passed"), [(3, 0, False), (3, 9.9, False), (3, 10, True), (1, 0, True)])
def test_ship_rule_on_missed_defects(root: Path, missed: int, limit: float, passed: bool) -> None:
    before, after = results(90, 2, 0), results(80, missed, 1)
    (check,) = opened(root).task.limits(before, after, {"max_fnr_increase": limit, "max_ap_drop": None})
    assert (check["what"], check["passed"]) == ("missed defects on validation, against baseline", passed)
    assert check["drop"] == pytest.approx(10 * (missed - 2)) and "increase" in check["sentence"]


def test_ship_rule_on_average_precision_has_a_paired_interval(root: Path) -> None:
    same, task = results(90, 0, 0), opened(root).task
    (verdict,) = task.limits(same, same | {"val": {"ap_pct": 88.0}}, {"max_fnr_increase": None, "max_ap_drop": 1.5})
    assert not verdict["passed"] and verdict["drop"] == 2 and verdict["drop_interval"] == [0.0, 0.0]
    (other,) = task.limits(same, results(90, 0, 1), {"max_ap_drop": 0})
    assert other["passed"] and other["drop_interval"][0] < other["drop_interval"][1]


def test_the_gates_of_a_recipe_in_order(root: Path) -> None:
    project = opened(root, gate={"max_drop": 0.5, "max_drop_from_baseline": 2, "max_fnr_increase": 1, "max_ap_drop": 1})
    start, same = results(90, 0, 0) | {"ap_pct": 80.0}, results(90, 0, 0) | {"ap_pct": 79.0}
    worse = results(88, 1, 0) | {"ap_pct": 78.5}
    found = project.task.verdicts({"baseline": start, "control": start, "finetuned": same, "engine": worse})
    assert [(check["what"], check["passed"]) for check in found] == [
        ("engine equals its network", True),
        ("pruned against baseline", True),
        ("missed defects on validation, against baseline", False),
        ("average precision on validation, against baseline", False),
        ("pruned against control", True),
        ("missed defects on validation, against control", False),
        ("average precision on validation, against control", False),
    ]
    assert all("drop_interval" in check for check in found if check["metric"] == "ap_pct")


def test_the_multiplier_holds_in_training_alone(root: Path) -> None:
    project = opened(root, defect={"gradient_multiplier": 0.25, "dilate": 3})
    model = project.build_model()
    with project.task.training(model):
        assert model.gradient_multiplier == 0.25
    assert model.gradient_multiplier == 1.0
    with pytest.raises(RuntimeError), project.task.training(model):
        raise RuntimeError
    assert model.gradient_multiplier == 1.0


def test_calibration_is_balanced_and_its_loss_reaches_every_layer(root: Path) -> None:
    project = opened(root)
    batches = list(project.calibration(2, 6))
    assert [[bool((mask == 1).any()) for mask in masks] for _, masks in batches] == [[True, False] * 3] * 2
    model = project.build_model()
    loss = project.task.calibration_loss()(model, batches[0])
    loss.backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.volume.parameters())
    images, masks = batches[0]
    with torch.no_grad():
        heads = model.forward_train(images)
    seg = torch.nn.functional.interpolate(heads["seg"], size=SIZE, mode="bilinear")[:, 0].double()
    defect = (masks == 1).double()
    pixels = torch.nn.functional.softplus(seg) - seg * defect
    decision = heads["decision"][:, 0].double()
    own = torch.nn.functional.softplus(decision) - decision * torch.tensor([1.0, 0] * 3)
    assert loss.item() == pytest.approx(float((pixels * (1 + 2 * defect)).mean() + own.mean()), rel=1e-5)


# -- bad input ---------------------------------------------------------------------------------------------------------


def stored(folder: Path, kinds: dict[str, list[bool]]) -> Path:
    for split, labels in kinds.items():
        (folder / split).mkdir(parents=True)
        for number, defective in enumerate(labels):
            mask = np.zeros((128, 64), np.uint8)
            mask[40:60, 20:40] = 255 * defective
            Image.fromarray(np.full((128, 64, 3), 120, np.uint8)).save(folder / split / f"{10 + number}.png")
            Image.fromarray(mask).save(folder / split / f"{10 + number}_GT.png")
    return folder


def test_a_split_of_one_kind(tmp_path: Path) -> None:
    both = [True, True, False, False]
    for split, labels, words in (
        ("test", [False, False], "split 'test' .* has no defective images"),
        ("test", [True, True], "split 'test' .* has only defective images"),
        ("train", [False] * 4, "split 'train' .* has no defective images"),
        ("train", [True] * 4, "split 'train' .* has only defective images"),
    ):
        folder = stored(tmp_path / f"{split}{labels[0]}", {"train": both, "test": both[1:3]} | {split: labels})
        with pytest.raises(VssError, match=words):
            opened(folder)


def test_a_mask_of_another_size_and_a_stray_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    both = [True, True, False, False]
    folder = stored(tmp_path / "set", {"train": both, "test": both})
    shutil.copy(folder / "train" / "10.png", folder / "train" / "10 (copy).png")
    project = opened(folder)
    assert "10 (copy).png" in caplog.text and len(project.split("train")) + len(project.split("val")) == 4
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(folder / "test" / "11_GT.png")
    with pytest.raises(VssError, match=r"11_GT.png is 64x64 and its image 11.png is 128x64"):
        opened(folder)


def test_settings_that_make_no_sense(root: Path, street_root: Path, tmp_path: Path) -> None:
    data = recipe(root).data.model_dump()
    for changes, words in (
        ({"data": data | {"augment": {"scale": [0.5, 1]}}}, "can lose a defect"),
        ({"data": data | {"augment": {"crop": [64, 64]}}}, "can lose a defect"),
        ({"data": data | {"dataset": "camvid", "root": str(street_root)}}, "11 classes"),
        ({"defect": {"dilate": 4}}, "odd number"),
        ({"defect": {"annotated": 1000}}, "annotated is 1000"),
        ({"data": data | {"size": [64, 64]}}, "at least 64x128"),
    ):
        with pytest.raises(VssError, match=words):
            project = opened(root, **changes)
            project.build_model()(torch.zeros(1, 3, *project.preprocess.size))
    with pytest.raises(ValueError, match="give one"):
        recipe(root, defect={"annotated": 1, "split_file": "x.pyb"})


def test_split_files_choose_the_annotated_images(root: Path, tmp_path: Path) -> None:
    project = opened(root)
    ids = [int(pair.id) for name in ("train", "val") for pair in project.data.pairs(name)]
    path = tmp_path / "split_weakly_5.pyb"
    path.write_bytes(pickle.dumps(([(number, number % 3 == 0) for number in ids], [])))
    targets = opened(root, defect={"split_file": str(path), "dilate": 3}).task.targets
    assert targets.annotated == {pair.id for pair in project.data.pairs("train") if int(pair.id) % 3 == 0}
    path.write_bytes(pickle.dumps(([(number, True) for number in ids[1:]], [])))
    with pytest.raises(VssError, match=f"does not name the training image {ids[0]}"):
        opened(root, defect={"split_file": str(path), "dilate": 3})


# -- a whole run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run")
    return out, run(recipe(root), out, progress=False)


def test_a_run_to_the_report(finished: tuple[Path, dict[str, Any]], root: Path) -> None:
    _, report = finished
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["baseline", "pruned", "finetuned", "control", "engine baseline", "engine pruned"]
    engine, small = rows["engine pruned"], rows["finetuned"]
    assert engine["ap_pct"] == pytest.approx(small["ap_pct"], abs=1e-6) and small["macs_g"] < rows["baseline"]["macs_g"]
    assert all(row["ap_low_pct"] <= row["ap_pct"] <= row["ap_high_pct"] for row in rows.values())
    assert all(row["fnr_pct"] == pytest.approx(100 - row["recall_pct"]) for row in rows.values())
    assert [check["what"] for check in report["gate"]["checks"]] == [
        "engine equals its network",
        "pruned against baseline",
        "missed defects on validation, against baseline",
        "average precision on validation, against baseline",
        "pruned against control",
        "missed defects on validation, against control",
        "average precision on validation, against control",
    ]  # fmt: skip
    assert "threshold is chosen on val" in report["protocol"] and "resized to one size" in report["protocol"]
    curve = report["curves"]["train"]
    assert all(0 <= row["val_ap_pct"] <= 100 for row in curve)


def test_missed_defects_are_shown_worst_first(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    missed = [row for row in report["defects"] if row["missed"]]
    alarms = [row for row in report["defects"] if not row["defective"]]
    engine = next(row for row in report["rows"] if row["name"] == "engine pruned")
    assert len(missed) == engine["fn"] and len(report["defects"]) == max(3, engine["fn"]) + len(alarms)
    assert len(alarms) == min(6, engine["fp"]) and all(row["score"] >= engine["threshold"] for row in alarms)
    assert [row["score"] for row in alarms] == sorted((row["score"] for row in alarms), reverse=True)
    for name, curves in report["decisions"].items():
        row = next(each for each in report["rows"] if each["name"] == name)
        at = sum(score >= curves["threshold"] for score in curves["score"]) - 1
        assert (curves["misses"][at], curves["false_alarms"][at]) == (row["fn"], row["fp"]), name
    assert list(report["decisions"]) == ["baseline", "control", "engine pruned"]
    assert [row["score"] for row in missed] == sorted(row["score"] for row in missed)
    assert all(row["score"] < engine["threshold"] for row in missed)
    page = (out / "report.html").read_text()
    assert "Missed defects" in page
    for row in report["defects"]:
        assert row["id"] in page and set(row["files"]) == {"image", "mask", "heat"}
        sizes = {Image.open(out / path).size for path in row["files"].values()}
        assert sizes == {(SIZE[1], SIZE[0])}


def test_again_does_nothing(finished: tuple[Path, dict[str, Any]], root: Path) -> None:
    report = run(recipe(root), finished[0], progress=False)
    assert {step["status"] for step in report["steps"]} == {"skipped"}
    assert report["rows"] == finished[1]["rows"]


def test_the_checkpoint_knows_its_task(finished: tuple[Path, dict[str, Any]], root: Path) -> None:
    project = project_of(finished[0] / "finetuned.safetensors", data_root=str(root), dataset=None, recipe=Recipe())
    model = checkpoint.load(finished[0] / "finetuned.safetensors")
    result = project.score(project.task.predictor(model), split="test")
    row = next(row for row in finished[1]["rows"] if row["name"] == "finetuned")
    assert result["ap_pct"] == row["ap_pct"] and result["missed"] == sorted(result["missed"], key=lambda m: m["score"])


def test_files_are_compared_by_the_ship_rule(finished: tuple[Path, dict[str, Any]], root: Path) -> None:
    out, report = finished
    rows = {row["name"]: row for row in report["rows"]}
    options: dict[str, Any] = {"split": "test", "dataset": "ksdd2", "data_root": str(root), "size": None}
    found = candidates.evaluate(
        out / "engine" / "finetuned.onnx", out / "control.safetensors", **options,
        limits=dict.fromkeys(("max_drop", "max_fnr_increase", "max_ap_drop"), 100.0),
    )  # fmt: skip
    assert found["gate"]["passed"] and len(found["gate"]["checks"]) == 3
    table = {row["name"]: row for row in found["rows"]}
    assert table["candidate"]["ap_pct"] == pytest.approx(rows["engine pruned"]["ap_pct"], abs=1e-9)
    assert table["baseline"]["fnr_pct"] == rows["control"]["fnr_pct"]
    files = out / "finetuned.safetensors", out / "baseline.safetensors"
    timed = candidates.bench_engines(*files, backend=None, threads=1, batch=1, max_seconds=0.4)
    assert set(timed["sessions"]) == {"baseline", "candidate"}


def test_an_engine_in_another_precision_is_held_to_the_ship_rule(root: Path) -> None:
    class Job:
        recipe = recipe(root, gate={"max_fnr_increase": 5, "max_ap_drop": 5, "max_drop_from_baseline": 5})
        project = Project.open(recipe)

        def scores_of(self, step: str) -> dict[str, Any]:
            assert step in ("evaluate-baseline", "evaluate-control")
            return results(90, 1, 0)

    verdict = {"passed": True, "sentence": "good."}
    good: Any = _shipped(Job(), verdict, results(86, 1, 0))  # type: ignore[arg-type]
    bad: Any = _shipped(Job(), verdict, results(84, 2, 0))  # type: ignore[arg-type]
    assert good["passed"] and good["sentence"] == "good." and len(good["ship"]) == 6  # three of each start
    assert not bad["passed"] and bad["sentence"].count("failed:") == 6
