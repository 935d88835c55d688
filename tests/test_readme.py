"""What the README promises: its code runs, and its commands and folders exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import typer.main

import vss
from vss.cli.main import app
from vss.core.config import load_recipe, recipes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(2, 3, 64, 64, generator=generator), torch.randint(0, 11, (2, 64, 64), generator=generator))]
    names: dict[str, object] = {"batches": batches}
    exec(compile(code, "README.md", "exec"), names)
    small, again = names["small"], names["again"]
    x = torch.randn(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        assert torch.equal(small.eval()(x), again(x))  # type: ignore[operator,attr-defined]
    kept = vss.prune.count(again, (256, 320))["macs_g"] / vss.prune.count(names["model"], (256, 320))["macs_g"]
    assert 0.4 < kept <= 0.5
    assert (tmp_path / "small.onnx").stat().st_size > 10_000


def test_commands_exist() -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"`vss ([a-z][a-z-]*)", README))
    assert named <= known, named - known
    assert known <= named | {"benchmark"}, known - named


def test_make_targets_and_folders_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z]+)", README, re.M)) <= targets
    table = README.split("## Where things live")[1].split("Your own networks")[0]
    for path in re.findall(r"`((?:vss|csrc|benchmarks)[a-z_/.]*)`", table):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", recipes())
def test_recipes_are_valid(name: str) -> None:
    assert load_recipe(name).name == name
