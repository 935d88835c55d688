"""Recipes: strict keys, overrides, and sentences for every fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from vss import models
from vss.config import BudgetConfig, Recipe, load_recipe, override, recipes
from vss.errors import VssError
from vss.prune import Budget, make_criterion


@pytest.mark.parametrize("name", recipes())
def test_every_packaged_recipe_says_things_that_exist(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    make_criterion(recipe.prune.criterion, **recipe.prune.options)
    Budget.make(**recipe.prune.budget.model_dump())
    assert recipe.model.name in models.MODELS
    assert len(recipe.data.size) == 2 and min(recipe.data.size) > 0


def test_there_are_recipes() -> None:
    assert {"demo", "camvid_unet"} <= set(recipes())


def test_the_budget_of_a_recipe_is_that_of_pruning() -> None:
    assert BudgetConfig().model_dump() == Budget().model_dump()
    assert set(BudgetConfig.model_fields) == set(Budget.model_fields)


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_values_and_the_files_own_name(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "seed: 3\ntrain: {epochs: 2, lr: 1e-3}\nprune: {budget: {keep: 0.25}}\n"))
    assert (recipe.name, recipe.seed, recipe.train.epochs, recipe.train.lr) == ("mine", 3, 2, 1e-3)
    assert (recipe.prune.budget.keep, recipe.prune.budget.kind, recipe.finetune.epochs) == (0.25, "macs", 20)
    assert load_recipe(write(tmp_path, "")) == Recipe(name="mine")


def test_overrides_are_yaml_and_reach_any_depth(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {epochs: 2}\n")
    recipe = load_recipe(
        path,
        [
            "train.epochs=7",
            "prune.budget.keep=0.4",
            "model.options.width=8",
            "data.size=[64, 96]",
            "train.ema=null",
            "name=other",
            "train.lr=0.5",
            "train.lr=0.25",
        ],
    )
    assert (recipe.train.epochs, recipe.prune.budget.keep, recipe.data.size) == (7, 0.4, (64, 96))
    assert (recipe.model.options, recipe.train.ema, recipe.name, recipe.train.lr) == ({"width": 8}, None, "other", 0.25)
    assert load_recipe(path).train.epochs == 2


def test_override_changes_nested_dictionaries_in_place() -> None:
    data = {"a": {"b": 1}}
    override(data, "a.c.d=x=y")
    assert data == {"a": {"b": 1, "c": {"d": "x=y"}}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("trian: {epochs: 2}", r"unknown key in .*mine\.yaml 'trian'\. Did you mean 'train'\?"),
        ("train: {epoch: 2}", r"'train\.epoch'\. Did you mean 'train\.epochs'\?"),
        ("prune: {budget: {kep: 0.5}}", r"'prune\.budget\.kep'\. Did you mean 'prune\.budget\.keep'\?"),
        ("train: {epochs: many}", r"train\.epochs is 'many'; .*valid integer"),
        ("train: {epochs: -1}", r"train\.epochs is -1; .*greater than or equal to 0"),
        ("train: {lr: 0}", r"train\.lr is 0"),
        ("split: train", r"split is 'train'; Input should be 'val' or 'test'"),
        ("data: {size: [64]}", r"data\.size\.1 is"),
        ("train: 5", r"train is 5; .*valid dictionary"),
        ("prune: {budget: {keep: 2}}", r"prune\.budget\.keep is 2; .*less than or equal to 1"),
        ("export: {opset: 9}", r"export\.opset is 9"),
        ("- a\n- b", "holds a list; expected keys and values"),
        ("a: [1", "is no YAML"),
    ],
)
def test_faults_are_sentences(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(VssError, match=sentence):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("train.epochs", "--set takes key.path=value and got 'train.epochs'"),
        ("=3", "--set takes key.path=value"),
        ("seed.x=3", "--set seed.x=3: 'seed' is a value, not a section"),
        ("train.epochs=[1", r"--set train\.epochs=\[1 is no YAML: expected ',' or '\]'"),
        ("train.epohcs=3", r"'train\.epohcs'\. Did you mean 'train\.epochs'"),
        ("train.epochs=many", r"train\.epochs is 'many'"),
    ],
)
def test_bad_overrides_are_sentences(tmp_path: Path, setting: str, sentence: str) -> None:
    with pytest.raises(VssError, match=sentence):
        load_recipe(write(tmp_path, "seed: 1\n"), [setting])


def test_files_that_are_none_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(VssError, match=r"unknown recipe 'dem'\. Did you mean 'demo'"):
        load_recipe("dem")
    with pytest.raises(VssError, match=r"none\.yaml does not exist; packaged ones: .*demo"):
        load_recipe(str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(VssError, match="is a folder"):
        load_recipe(str(tmp_path / "folder.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(VssError, match="is no text"):
        load_recipe(str(tmp_path / "binary.yaml"))


def test_a_recipe_cannot_be_changed_by_accident() -> None:
    recipe = Recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 4  # type: ignore[misc]
