"""What the README promises: its code runs, and its commands and folders exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import vss
from vss.cli.main import app
from vss.core.config import load_recipe, recipes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TOP = ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = (ROOT / "docs/reference/commands.md").read_text()


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


def test_the_example_runs_with_a_network_of_the_readers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(torch.nn.Sequential):
        def __init__(self) -> None:
            conv, relu = torch.nn.Conv2d, torch.nn.ReLU
            super().__init__(conv(3, 16, 3, 2, 1), relu(), conv(16, 16, 3, 1, 1), relu(), conv(16, 11, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.interpolate(super().forward(x), size=x.shape[-2:])

    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    changes = {'vss.models.build("resnet18_seg", num_classes=11)': "Mine()"}
    changes['vss.load("small.safetensors")'] = 'vss.load("small.safetensors", model=Mine())'  # as its comment says
    for before, after in changes.items():
        assert code.count(before) == 1
        code = code.replace(before, after)
    monkeypatch.chdir(tmp_path)
    batches = [(torch.randn(2, 3, 64, 64), torch.randint(0, 11, (2, 64, 64)))]
    names: dict[str, Any] = {"batches": batches, "Mine": Mine}
    exec(compile(code, "README.md", "exec"), names)
    small, again = names["small"], names["again"]
    assert torch.equal(small(names["example"]), again(names["example"])) and type(again) is Mine
    assert (tmp_path / "small.onnx").stat().st_size > 1_000


def test_commands_exist() -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    listed = set(re.findall(r"`vss ([a-z][a-z-]*)", COMMANDS))
    assert known <= listed, known - listed
    for page in PAGES:
        named = set(re.findall(r"`vss ([a-z][a-z-]*)", page.read_text()))
        assert named <= known, (page.name, named - known)


def test_links_lead_somewhere_and_the_first_page_is_one_screen() -> None:
    assert README.count("\n") < 150 and (ROOT / "README.zh.md").read_text().count("\n") < 150
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)]+)\)", text):
            path, _, anchor = link.partition("#")
            if "://" in link:
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), (page.name, link)
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in heads]


def test_make_targets_and_folders_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things live")[1].split("| You add")[0]
    for page in PAGES:
        assert set(re.findall(r"^make ([a-z-]+)", page.read_text(), re.M)) <= targets, page
    paths = re.findall(r"`((?:vss|csrc|plugins_trt|tests|docs|benchmarks)[a-z_/.]*)`", table)
    assert len(paths) > 15
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", recipes())
def test_recipes_are_valid(name: str) -> None:
    assert load_recipe(name).name == name
