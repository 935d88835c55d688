"""The pages of docs/: their examples run, their flags exist, and the reference has every key and flag of the code."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
import yaml
from PIL import Image
from torch import Tensor

import vss
from vss.cli.main import app
from vss.core.config import Recipe, load_recipe
from vss.core.registry import Registry
from vss.core.yaml12 import parse_yaml
from vss.data import DATASETS, open_data
from vss.deploy import BACKENDS
from vss.models import MODELS
from vss.prune import CRITERIA

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
CLI: Any = typer.main.get_command(app)


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


# The reference


def keys(kind: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    for name, field in kind.model_fields.items():
        below = HOOKS.section_of(field)
        if below and name != "references":
            yield from keys(below, f"{prefix}{name}.")
        else:
            yield prefix.rstrip("."), field.alias or name, field


def test_every_key_of_a_recipe_is_in_the_reference_with_a_meaning() -> None:
    page = HOOKS.recipe()
    sections = dict(zip(*[iter(["", *re.split(r"^## (.*)$", page, flags=re.M)])] * 2, strict=True))
    found = list(keys(Recipe))
    assert len(found) > 130
    for section, name, field in found:
        (row,) = re.findall(rf"^\| `{name}` \| (.*?) \| (.*?) \| (.*) \|$", sections[section], re.M)
        assert row[0] and row[1] and row[2] == HOOKS.cell(field.description or "-"), (
            f"{section}.{name} has no description"
        )


def test_types_are_words() -> None:
    rows = {f"{section}.{name}": HOOKS.type_of(field) for section, name, field in keys(Recipe)}
    assert rows["data.size"] == "list of 2, each integer ≥ 1, ≤ 16,384 or null"
    assert rows["train.grad_clip"] == "number > 0 or null" and rows["train.lr"] == "number > 0"
    assert rows["prune.keep"] == "list of text" and rows[".split"] == "`val` or `test`"
    assert not [name for name, words in rows.items() if re.search(r"[\[\]]|class|typing", words)]


def test_every_command_and_flag_is_in_the_reference() -> None:
    page = HOOKS.commands()
    for entry in HOOKS.entries(CLI):
        (text,) = re.findall(rf"^### vss {entry.name}\n(.*?)(?=^##|\Z)", page, re.M | re.S)
        for param in entry.command.params:
            for flag in [] if param.name == "help" or param.hidden else param.opts:
                assert f"`{flag.upper() if flag[0] != '-' else flag}`" in text, f"{entry.name} {flag}"


# What pages say about commands


def commands_of(path: Path) -> Iterator[list[str]]:
    """The words of every `vss ...` in the shell blocks of a page."""
    for block in blocks(path, "sh"):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = shlex.split(line, comments=True)
            if words and Path(words[0]).name == "vss":
                yield words[1:]


def resolved(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words begin with, those of all commands passed over, and the rest."""
    command = CLI
    while hasattr(command, "commands"):
        if words[0].startswith("-"):
            words = words[2:] if words[0] in ("--plugin", "--log") else words[1:]
            continue
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda path: path.stem)
def test_flags_and_keys_of_shell_examples_exist(page: Path) -> None:
    for words in commands_of(page):
        command, rest = resolved(list(words))
        known = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
        assert {word for word in rest if word.startswith("--")} <= known, words
        required = [param for param in command.params if param.required and param.param_type_name == "option"]
        assert all(set(param.opts) & set(rest) for param in required), words
        settings = [value for flag, value in itertools.pairwise(rest) if flag == "--set"]
        load_recipe("demo", [setting for setting in settings if not setting.startswith("recipe=")])


def test_recipes_in_pages_are_valid() -> None:
    (block,) = blocks(ROOT / "docs/reference/recipe.md", "yaml")
    assert Recipe.model_validate(parse_yaml(block, source="recipe.md")).prune.budget.align == 8


# The site


def test_every_page_has_a_place_in_the_menu() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for each in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(each)

    listed = sorted(pages(menu))
    assert listed == sorted([*HOOKS.PAGES.values(), *(str(path.relative_to(ROOT / "docs")) for path in DOCS)])


def test_links_out_of_docs_are_turned() -> None:
    text = "[a](../guides/x.md#y) [b](../../csrc/README.md#z) [c](https://d.e) [f](../../LICENSE)\n```\n[g](h)\n```\n"
    turned, extra = HOOKS.rewritten(text.replace("x.md", "gates.md"), "docs/extending/op.md")
    assert "(../guides/gates.md#y) [b](../csrc.md#z) [c](https://d.e) [f](../files/LICENSE)" in turned
    assert "[g](h)" in turned and extra == {"LICENSE"}
    with pytest.raises(FileNotFoundError, match=r"links to \.\./gone\.md"):
        HOOKS.rewritten("[a](../gone.md)", "docs/start.md")


# The examples of docs/extending


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the example of a page; what it registers is forgotten after the test."""
    for registry in (CRITERIA, MODELS, DATASETS, BACKENDS):
        registry.names()  # entry points come before the copy
        monkeypatch.setattr(registry, "_items", dict(registry._items))

    def run(page: str, registry: Registry[Any] | None = None) -> dict[str, Any]:
        (code,) = blocks(ROOT / f"docs/extending/{page}.md", "python")
        module = ModuleType(f"docs_example_{page}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(code, f"{page}.md", "exec"), vars(module))
        return vars(module)

    return run


def unet() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return vss.models.build("unet", 3, width=4, depth=2).eval(), torch.zeros(1, 3, 32, 32)


def test_a_criterion(example: Any) -> None:
    example("criterion")
    net, images = unet()
    budget = {"kind": "macs", "keep": 0.6}
    plan = vss.prune.make_plan(
        net, images, criterion=vss.prune.make_criterion("peak", power=1000.0), budget=budget
    )  # a large power is the largest weight
    assert plan.criterion["name"] == "peak" if isinstance(plan.criterion, dict) else plan.criterion == "peak"
    group = vss.prune.find_groups(net, images)["encoder.0.0.0"]
    peaks = net.state_dict()["encoder.0.0.0.weight"].abs().flatten(1).amax(1)
    from vss.prune.stats.base import Stats

    scores = vss.prune.make_criterion("peak", power=200.0)(group, Stats(net))
    assert torch.equal(scores.argsort(), peaks.argsort())


def test_a_network(example: Any) -> None:
    example("network")
    torch.manual_seed(0)
    net, images = vss.models.build("tiny", 3, width=8).eval(), torch.rand(1, 3, 32, 48)
    plan = vss.prune.make_plan(net, images, budget={"kind": "channels", "keep": 0.5, "scope": "local"})
    small = vss.prune.apply_plan(net, plan)
    assert small.body[0].out_channels == 4 and small(images).shape == (1, 3, 32, 48)
    with pytest.raises(vss.VssError, match="multiples of 4"):
        net(torch.zeros(1, 3, 30, 32))


def test_a_layout(example: Any, tmp_path: Path) -> None:
    example("layout")
    mask = np.zeros((40, 48), np.uint8)
    mask[8:20, 8:30], mask[30:] = 1, 255
    for split in ("train", "val", "test"):
        Image.fromarray(np.full((40, 48, 3), 90, np.uint8)).save(tmp_path / f"{split}_0.jpg")
        Image.fromarray(mask).save(tmp_path / f"{split}_0.png")
    data = open_data("parts", tmp_path)
    _, decoded = data.read(data.pairs("val")[0])
    assert np.array_equal(decoded, mask) and data.class_names == ("background", "part")
    Image.fromarray(mask + 2).save(tmp_path / "val_0.png")
    with pytest.raises(vss.VssError, match="no class owns"):
        data.read(data.pairs("val")[0])


def test_a_runtime(example: Any, tmp_path: Path) -> None:
    example("runtime")
    net, _ = unet()
    vss.deploy.export(net, tmp_path / "net.onnx", size=(32, 32))
    built = BACKENDS["reference"].build(tmp_path / "net.onnx", tmp_path / "copy.onnx", vss.deploy.BuildSpec())
    sessions = [BACKENDS[name].open(built) for name in ("reference", "onnxruntime")]
    assert str(sessions[0].inputs) == str(sessions[1].inputs)
    name = next(iter(sessions[0].inputs))
    feed = {name: np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}
    ours, theirs = (next(iter(session.run(feed).values())) for session in sessions)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_an_op(example: Any) -> None:
    names = example("op")
    logits = torch.tensor([2.0, 0.0, -1.0]).view(1, 3, 1, 1)
    p = torch.tensor([2.0, 0.0, -1.0]).softmax(0)
    assert torch.allclose(torch.ops.example.softmax_margin(logits), (p[0] - p[1]).view(1, 1, 1))
    torch.library.opcheck(torch.ops.example.softmax_margin.default, (torch.randn(1, 3, 4, 4),))
    with pytest.raises(ValueError, match="K >= 2"):
        torch.ops.example.softmax_margin(torch.zeros(1, 1, 2, 2))
    names["library"]._destroy()
