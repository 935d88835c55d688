"""Grids: short forms, names, impossible cells, bad files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from vss.cli.main import main
from vss.core.config import parse
from vss.core.errors import VssError
from vss.prune import make_criterion
from vss.sweep import Grid, load_grid
from vss.sweep.grid import grids, named_recipe


def grid(**content: Any) -> Grid:
    made: Grid = parse(Grid, {"name": "g", **content}, source="test")
    return made


def test_every_combination_is_a_recipe() -> None:
    found = grid(recipe="camvid_unet", networks=["unet", {"name": "wide", "set": {"model.options": {"width": 32}}}],
                 criteria=["l1", "sirfp:faithful"], budgets=[0.5, "params:0.3"], seeds=[0, 7]).trials()  # fmt: skip
    assert len(found) == len({cell.id for cell in found}) == 16
    cell = next(c for c in found if c.id == "wide--sirfp_faithful--params_0.3--7")
    assert cell.coords == {"network": "wide", "criterion": "sirfp:faithful", "budget": "params 0.3", "seed": "7"}
    recipe = cell.recipe()
    assert (recipe.model.options, recipe.seed, recipe.train.epochs) == ({"width": 32}, 7, 24)
    assert (recipe.prune.criterion, recipe.prune.options) == ("sirfp", {"preset": "faithful"})
    assert (recipe.prune.budget.kind, recipe.prune.budget.keep, recipe.prune.budget.align) == ("params", 0.3, 8)


def test_a_cell_that_cannot_be_is_named_and_the_rest_stay() -> None:
    found = grid(budgets=[0.5, 1.5], variants=[{"name": "v", "set": {"data.size": [32, 64]}}]).trials()
    assert [bool(cell.fault) for cell in found] == [False, True]
    assert "prune.budget.keep" in found[1].fault and "macs_1.5--v" in found[1].fault
    assert found[0].recipe().data.size == (32, 64)


def test_a_dry_run_of_trials_that_cannot_be_ends_as_the_sweep_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for keeps, code in (("[0.5, 1.5]", 0), ("[1.5, 1.6]", 2)):
        (tmp_path / "g.yaml").write_text(f"name: g\nrecipe: camvid_unet\nbudgets: {keeps}\n")
        monkeypatch.setattr(sys, "argv", ["vss", "sweep", str(tmp_path / "g.yaml"), "--dry-run"])
        with pytest.raises(SystemExit) as end:
            main()
        shown = capsys.readouterr()
        assert (end.value.code or 0) == code and "macs_1.5" in shown.out, shown
        assert ("no trial of the sweep can be run: " in shown.err) == bool(code)


def test_bad_grids_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(VssError, match="varies nothing"):
        grid().trials()
    with pytest.raises(VssError, match="seeds names '1' twice"):
        grid(seeds=[1, 1])
    with pytest.raises(VssError, match=r"unknown key in test 'seed'.*'seeds'"):
        grid(seed=[1])
    with pytest.raises(VssError, match="are called 'a_b'"):
        grid(variants=["a b", "a_b"]).trials()
    with pytest.raises(VssError, match="does not exist"):
        load_grid(tmp_path / "no.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(VssError, match="is no YAML"):
        load_grid(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(VssError, match="holds a list"):
        load_grid(tmp_path / "list.yaml")


def test_overrides_are_for_every_cell(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("seeds: [0]\nset: {train.epochs: 3, data.root: a}\n")
    found = load_grid(tmp_path / "s.yaml", {"data.root": "b"})
    assert found.name == "s" and found.set == {"train.epochs": 3, "data.root": "b"}


def test_packaged_grids_are_whole() -> None:
    assert {"camvid_methods", "ksdd_sweep", "ksdd_equal_macs"} <= set(grids())
    for name in grids():
        cells = load_grid(name).trials()
        assert [cell.fault for cell in cells if cell.fault] == []
        for cell in cells:
            recipe = cell.recipe()
            make_criterion(recipe.prune.criterion, **recipe.prune.options)
    ids = {cell.id for cell in load_grid("ksdd_sweep").trials()}
    assert len(ids) == 7 * 3 * 3 and "ours_c2--r60--2" in ids


def test_a_row_of_a_packaged_grid_is_a_recipe() -> None:
    recipe = named_recipe("ours_c1_r40", {"data.root": "somewhere", "train.epochs": 3})
    assert recipe is not None and recipe.name == "ours_c1_r40" and recipe.seed == 0
    assert (recipe.prune.criterion, recipe.prune.budget.keep, recipe.prune.budget.kind) == ("hw_l1", 0.6, "channels")
    assert (recipe.data.root, recipe.train.epochs) == ("somewhere", 3)
    same = [named_recipe(f"{method}_r60") for method in ("naive_l1", "naive_fn", "ours_c1", "ours_c2", "ours_c3")]
    assert len({recipe.finetune for recipe in same if recipe}) == 1 and None not in same
    assert named_recipe("ours_c9_r40") is None


def test_a_grid_takes_its_own_keys_as_overrides() -> None:
    grid = load_grid("ksdd_sweep", {"recipe": "ksdd_small", "seeds": [7], "name": "other", "data.root": "x"})
    assert grid.recipe == "ksdd_small" and [choice.name for choice in grid.seeds] == ["7"]
    assert grid.set == {"name": "other", "data.root": "x"} and grid.name == "ksdd_sweep"
    with pytest.raises(VssError, match=r"unknown grid 'ksdd_sweeep'\. Did you mean 'ksdd_sweep'"):
        load_grid("ksdd_sweeep")


def test_names_of_cells_are_folders_inside_of_the_sweep(tmp_path: Path) -> None:
    for name in ("..", ".", "a/../../b", "/etc", "n" * 400, "$a$", "\x00"):
        cell = Grid.model_validate({"base": {}, "variants": [{"name": name, "set": {"seed": 1}}]}).trials()[0]
        assert (tmp_path / cell.id).resolve().parent == tmp_path.resolve() and len(cell.id) <= 120
        (tmp_path / cell.id).mkdir(exist_ok=True)
    with pytest.raises(VssError, match="two trials of sweep 'sweep' are called '_'"):
        Grid.model_validate({"base": {}, "variants": ["..", "."]}).trials()
