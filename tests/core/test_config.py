"""Recipes: strict keys, overrides, and sentences for every fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vss import models
from vss.cli.options import options_of, recipe_of
from vss.core import yaml12
from vss.core.config import Recipe, load_recipe, recipes
from vss.core.errors import VssError
from vss.core.yaml12 import overridden, parse_yaml
from vss.prune import Budget, make_criterion


@pytest.mark.parametrize("name", recipes())
def test_every_packaged_recipe_says_things_that_exist(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    make_criterion(recipe.prune.criterion, **recipe.prune.options)
    assert isinstance(recipe.prune.budget, Budget)
    assert recipe.model.name in models.MODELS
    assert len(recipe.data.size) == 2 and min(recipe.data.size) > 0


def test_there_are_recipes() -> None:
    assert {"demo", "camvid_unet"} <= set(recipes())


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


def test_overrides_are_set_in_a_copy_in_their_order() -> None:
    data, value = {"a": {"b": 1}}, {"x": [1e-5]}
    found = overridden(data, ["a.c.d=x=y", ("e.f", value), "a.b=1e-5", "a.b=2e-5"])
    assert found == {"a": {"b": 2e-5, "c": {"d": "x=y"}}, "e": {"f": {"x": [1e-5]}}}
    found["e"]["f"]["x"].append(2)
    assert data == {"a": {"b": 1}} and value == {"x": [1e-5]}


def test_a_fault_of_a_flag_names_the_flag_and_no_other_key() -> None:
    flags = {"train.lr": "--lr", "data.size": "--input-size"}
    for setting, sentence in ((("train.lr", 0), "--lr is 0; "), (("data.size", [64, 0]), "--input-size is 0;")):
        with pytest.raises(VssError, match=f"^{sentence}"):
            load_recipe(None, [setting], flags=flags)
    with pytest.raises(VssError, match=r"^unknown key in the command line 'train\.lr_'"):
        load_recipe(None, ["train.lr_=0"], flags=flags)


def read(text: str) -> Any:
    return parse_yaml(text, source="the test")


SCALARS = [
    ("1e-5", 1e-5), ("1e-05", 1e-5), ("-2E3", -2000.0), ("0.5", 0.5), (".5", 0.5), ("5.", 5.0), ("3", 3), ("+3", 3),
    ("012", 12), ("0o17", 15), ("0x1F", 31), ("on", "on"), ("off", "off"), ("yes", "yes"), ("no", "no"), ("y", "y"),
    ("true", True), ("False", False), ("12:30", "12:30"), ("1_000", "1_000"), ("2024-01-01", "2024-01-01"),
    ("null", None), ("~", None), ("", None), ("0b11", "0b11"), ("'1e-5'", "1e-5"), ("1.2.3", "1.2.3"), ("e5", "e5"),
    ("[1e-3, {a: 012}]", [1e-3, {"a": 12}]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_every_way_to_give_a_value_gives_the_same_one(tmp_path: Path, text: str, value: object) -> None:
    from vss.sweep.grid import Grid, load_grid

    path = write(tmp_path, f"prune: {{options: {{x: {text}}}}}\n" if text else "prune: {options: {x: }}\n")
    (tmp_path / "grid.yaml").write_text(f"seeds: 0\nset: {{prune.options.x: {text}}}\n")
    cells = Grid.model_validate({"base": {}, "variants": [{"name": "a", "set": {"prune.options": {"x": value}}}]})
    found = [
        (options_of([f"x={text}"]) or {})["x"],
        load_recipe(path).prune.options["x"],
        load_recipe(path, [f"prune.options.x={text}"]).prune.options["x"],
        recipe_of({}, [f"prune.options.x={text}"]).prune.options["x"],
        recipe_of({"prune.options": {"x": value}}).prune.options["x"],
        cells.trials()[0].recipe().prune.options["x"],
        load_grid(tmp_path / "grid.yaml").trials()[0].recipe().prune.options["x"],
        read(yaml12.dump({"x": value}))["x"],
    ]
    assert found == [value] * len(found) and {type(one) for one in found} == {type(value)}


def test_what_is_written_reads_the_same_under_both_versions_of_yaml() -> None:
    texts = [text for text, _ in SCALARS if text != "[1e-3, {a: 012}]"]
    assert read(yaml12.dump(texts)) == texts == yaml.safe_load(yaml12.dump(texts))


def test_a_setting_that_is_true_or_false_takes_on_and_off_and_a_number_takes_neither() -> None:
    assert recipe_of({}, ["control=off", "export.labels=no", "precision.search=yes"]).control is False
    for setting in ("train.epochs=true", "train.lr=false", "seed=true", "train.ema=true", "prune.budget.keep=true"):
        with pytest.raises(VssError, match="Input should be no truth value"):
            recipe_of({}, [setting])


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400", "nan"])
@pytest.mark.parametrize("key", ["train.lr", "prune.budget.floor", "sparse.lambda", "gate.max_drop", "bench.spread"])
def test_numbers_are_finite(key: str, value: str) -> None:
    with pytest.raises(VssError, match=rf"{key}.*(finite number|valid number)"):
        recipe_of({}, [f"{key}={value}"])
    with pytest.raises(VssError, match=rf"{key} is inf; .*finite number"):
        recipe_of({}, [(key, float("inf"))])


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
        ("seed.x=3", "seed.x: 'seed' is a value, not a section"),
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
