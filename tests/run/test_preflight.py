"""vss.run.job: what the recipe alone shows to be impossible is refused before a folder is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vss import models
from vss.core.config import Recipe, load_recipe, recipes
from vss.core.errors import VssError
from vss.prune import make_plan
from vss.run.job import check_run, run
from vss.run.project import Project, with_size
from vss.sweep.prune import PruneExperiment
from vss.train import checkpoint

TINY: dict[str, Any] = {
    "data": {"dataset": "camvid", "size": [48, 64]},
    "model": {"name": "unet", "options": {"width": 4, "depth": 2}},
    "train": {"epochs": 1, "accelerator": "cpu"},
    "finetune": {"epochs": 1, "accelerator": "cpu"},
}
CASES = [
    ("gate.metric", "nope", r"gate\.metric is 'nope'; expected one of miou_pct, pixel_acc_pct"),
    ("gate.metric", "fnr_pct", r"gate\.metric is 'fnr_pct'; expected one of"),
    ("build.backend", "frog", "unknown backend 'frog'"),
    ("build.backend", "torch", r"build\.backend is torch, and a run builds engines"),
    ("build.threads", 10**9, r"build\.threads is 1000000000"),
    ("build", {"backend": "tensorrt", "threads": 2}, r"build\.threads is 2 and means nothing to a TensorRT engine"),
    ("build", {"backend": "trt", "tensorrt": {"flags": ["FP16"]}}, "FP16 is no build option here"),
    ("bench.cores", [999], r"cores \[999\] came, and this process may use"),
    ("bench.min_seconds", 99, r"min_seconds 99\.0 is above max_seconds 30\.0"),
    ("finetune.epochs", 0, r"finetune\.epochs is 0"),
    ("train.epochs", 0, r"train\.epochs is 0"),
    ("prune.keep", ["nope"], "unknown layer to keep 'nope'"),
    ("prune.budget.keep", 1e-300, r"prune\.budget\.keep is 1e-300"),
    ("prune.budget", {"kind": "channels", "keep": 0.1, "floor": 0.5}, "floor 0.5 is above keep 0.1"),
    ("prune.steps", 50, r"prune\.steps is 50"),
    ("prune.criterion", "nope", "unknown criterion 'nope'"),
    ("prune.latency", {"target": "2x"}, r"prune\.latency\.target \(--latency\) is '2x'"),
    ("prune.latency", {"target": "0.5x", "lut": "gone.json"}, r"gone\.json does not exist"),
    ("prune.latency", {"target": "0.5x", "precision": "fp16"}, "fp16"),
    ("dmcp.order", "nope", "unknown criterion 'nope'"),
    ("model.backbone_weights", "/etc/passwd", r"model\.backbone_weights came and unet has no backbone"),
    ("model.options", {"width": 4, "frog": 1}, "frog"),
    ("data.size", [0, 64], r"data\.size\.0 is 0"),
    ("data.size", [-8, 64], r"data\.size\.0 is -8"),
    ("data.size", [10**12, 64], r"data\.size\.0 is 1000000000000"),
    ("data.size", [50, 64], r"multiples of 4, got 50x64; give --input-size 52,64 \(data\.size of a recipe\)"),
    ("data.augment", {"crop": [10**6, 10**6]}, r"data\.augment\.crop is 1000000x1000000 and images have 48x64"),
    ("data.augment", {"crop": [30, 64]}, "multiples of 4, got 30x64"),
    ("data.workers", 10**9, r"data\.workers is 1000000000"),
    ("seed", -1, "seed is -1"),
    ("seed", 2**32, "seed is 4294967296"),
    ("train.lr", 1e300, r"train\.lr is 1e\+300"),
    ("train.devices", "frog", r"train\.devices 'frog'"),
    ("train.accelerator", "frog", r"train\.accelerator 'frog'"),
    ("train.distill", 1.0, "has no teacher"),
    ("precision.split", "val", r"precision\.split is 'val'"),
    ("precision", {"kinds": ["int8"], "keep": ["nope"]}, r"unknown layer of precision\.keep 'nope'"),
    ("precision.keep", ["classifier"], r"precision\.kinds names no precision to make"),
    ("precision", {"kinds": ["int8"], "image_list": "gone.txt"}, r"gone\.txt"),
    ("export", {"plugins": True, "labels": False}, "nothing that unet is exported with has a plugin"),
    (
        "build",
        {"backend": "tensorrt_rtx"},
        r"a run scores and times its engines: .*set build.also to \[tensorrt_rtx\]",
    ),
    ("build", {"also": ["torch"]}, r"build.also names torch, which builds no engines; expected another runtime"),
    (
        "build",
        {"targets": ["sm86"]},
        r"build.targets is sm86, and onnxruntime builds for this machine; add tensorrt_rtx",
    ),
    ("build", {"also": ["tensorrt_rtx"], "targets": ["sm90"]}, r"--targets sm90 \(H100, H200\) is served by TensorRT"),
    (
        "build",
        {"also": ["rtx"], "tensorrt": {"hardware": "AMPERE_PLUS"}},
        r"build.tensorrt.hardware\) is not for TensorRT",
    ),
]


@pytest.mark.parametrize(("key", "value", "sentence"), CASES, ids=[f"{key}={value}"[:60] for key, value, _ in CASES])
def test_refused_before_the_folder_is_made(
    key: str, value: Any, sentence: str, street_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "job.yaml"
    base.write_text(Recipe.model_validate(TINY | {"data": TINY["data"] | {"root": str(street_root)}}).model_dump_json())
    with pytest.raises(VssError, match=sentence):
        run(load_recipe(str(base), [(key, value)]), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_widths_of_another_network_are_refused_before_the_training(street_root: Path, tmp_path: Path) -> None:
    plan = make_plan(models.build("unet", 11, width=8, depth=2), torch.zeros(1, 3, 48, 64))
    plan.save(tmp_path / "plan.json")
    data, prune = TINY["data"] | {"root": str(street_root)}, {"widths": str(tmp_path / "plan.json")}
    recipe = Recipe.model_validate(TINY | {"data": data, "prune": prune})
    with pytest.raises(VssError, match=r"prune\.widths is .*plan\.json, a plan of another network: .* has 8 channels"):
        run(recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    sweep = PruneExperiment()
    with pytest.raises(VssError, match="a plan of another network"):
        sweep.preflight(recipe, here=True)
    fitting = recipe.model_copy(update={"model": recipe.model.model_copy(update={"options": {"width": 8, "depth": 2}})})
    check_run(Project.open(fitting))
    own = fitting.model_copy(update={"prune": fitting.prune.model_copy(update={"widths": "taylor"})})
    assert sweep.preflight_inputs(own) != sweep.preflight_inputs(fitting)


def test_a_size_that_is_left_open_fits_the_network(tmp_path: Path) -> None:
    sizes = {}
    for name, options in (("unet", {}), ("unet", {"depth": 2}), ("segnet", {})):
        recipe = with_size(Recipe.model_validate({"model": {"name": name, "options": options}}))
        assert recipe.data.size is not None
        sizes[name, len(options)] = recipe.data.size
        multiple = models.build(name, 1, **options).size_multiple
        assert all(side % multiple == 0 for side in recipe.data.size)
    assert sizes["unet", 0] == (368, 480) and sizes["unet", 1] == (360, 480)
    path = tmp_path / "net.safetensors"
    checkpoint.save(models.build("unet", 2, width=4, depth=2), path, preprocess={"size": [32, 48]}, classes=("a", "b"))
    assert with_size(Recipe.model_validate({"model": {"checkpoint": str(path)}})).data.size == (32, 48)
    explicit = Recipe.model_validate({"data": {"size": [360, 480]}})
    assert with_size(explicit) is explicit


def test_packaged_recipes_have_sizes_that_fit() -> None:
    for name in recipes():
        recipe = with_size(load_recipe(name))
        model = models.build(recipe.model.name, 1, **recipe.model.options)
        models.check_multiple(name, recipe.data.size, model.size_multiple)


def test_a_project_says_the_size_that_it_took(street_root: Path) -> None:
    data = {"dataset": "camvid", "root": str(street_root)}
    project = Project.open(Recipe.model_validate({"data": data, "model": {"name": "unet", "options": {"width": 4}}}))
    assert project.recipe.data.size == project.preprocess.size == (368, 480)
