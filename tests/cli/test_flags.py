"""What the flags promise: old names work, each has a help, ranges and types are those of the recipe, help is light."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import vss
from vss.cli import options
from vss.cli.main import PANELS, app
from vss.cli.options import field_of, flag_of, numbers_of, recipe_keys, recipe_of, takes
from vss.core.config import Recipe
from vss.core.errors import VssError

OLD = json.loads((Path(__file__).parent.parent / "old" / "flags.json").read_text())
FOR_ONE = {"--sizes": "8x8", "--ratios": "0.5", "--input-size": "8,8", "--cores": "0", "--seed": "1"}


def command(name: str) -> Any:
    found: Any = typer.main.get_command(app)
    for word in name.split():
        found = found.commands[word]
    return found


def every_command() -> list[tuple[str, Any]]:
    found: Any = typer.main.get_command(app)
    return [
        (f"{name} {inner}".strip(), below)
        for name, each in found.commands.items()
        for inner, below in getattr(each, "commands", {"": each}).items()
    ]


@pytest.mark.parametrize(("name", "flag"), [(name, flag) for name, flags in OLD.items() for flag in flags])
def test_a_flag_of_0_1_0_is_accepted_and_sets_what_its_new_name_sets(name: str, flag: str) -> None:
    made = command(name)
    [param] = [each for each in made.params if flag in (*each.opts, *each.secondary_opts)]
    value = [] if param.is_flag else [FOR_ONE.get(flag, choice_of(param))]
    for word in (flag, *param.opts[:1]):
        context = made.make_context("vss", [word, *value], resilient_parsing=True)
        assert context.get_parameter_source(param.name).name == "COMMANDLINE", (name, word)
        assert (context.params[param.name] is False) == (word in param.secondary_opts)


def choice_of(param: Any) -> str:
    """A text that the type of an option takes: its first choice, else 1."""
    choices = getattr(param.type_descriptor, "choices", None)
    return str(choices[0]) if choices else "8" if "--limit" in param.opts else "1"


def test_every_option_and_argument_has_a_help_without_words_about_code() -> None:
    for name, made in every_command():
        assert made.help and made.help[0].isupper(), name
        for param in made.params:
            if param.name != "help":
                assert param.help and not param.help.endswith("."), (name, param.opts, param.help)
                assert "null" not in param.help and "`fit`" not in param.help, (name, param.opts, param.help)


def test_what_is_written_is_save_and_what_is_read_is_ckpt() -> None:
    for name, made in every_command():
        for param in made.params:
            others = {"--out", "--out-dir", "--to"} & set(param.opts)
            assert not others or param.opts[0] == "--save", (name, param.opts)
            assert "--candidate" not in param.opts or param.opts[0] == "--ckpt", (name, param.opts)


def test_panels_are_in_the_order_of_the_work_and_hold_every_command() -> None:
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).output
    places = [text.index(f"─ {panel} ─") for panel in PANELS]
    assert places == sorted(places) and list(PANELS)[:5] == ["Train", "Prune", "Deploy", "Measure", "Ship"]
    assert "─ Commands ─" not in text


def test_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"vss {vss.__version__}\n")


@pytest.mark.parametrize(
    ("line", "found"),
    [("vss prune --cr", "--criterion"), ("vss export --precision i", "int8"), ("vss qu", "quality")],
)
def test_a_shell_completes_commands_flags_and_choices(line: str, found: str) -> None:
    words = {"_VSS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    run = [sys.executable, "-m", "vss.cli"]
    done = subprocess.run(run, env=os.environ | words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found], done.stderr


def test_the_completion_script_is_printed() -> None:
    run = [sys.executable, "-m", "vss.cli"]
    settings = os.environ | {"_VSS_COMPLETE": "source_bash"}
    done = subprocess.run(run, env=settings, capture_output=True, text=True, check=True)
    assert "complete -o default -F _vss_completion vss" in done.stdout


@pytest.mark.parametrize("words", [["no-such"], ["train", "--no-such"], ["export"], ["build", "--level", "6"]])
def test_usage_is_one_sentence_and_exit_code_2(words: list[str]) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and done.output.startswith("error: ") and len(done.output.splitlines()) == 1
    assert "--help." in done.output


def test_flags_of_a_section_are_made_from_it() -> None:
    tensorrt = typing.get_type_hints(type(Recipe().build.tensorrt))
    keys = {key.rpartition(".")[2] for key in options.TENSORRT if key.startswith("build.tensorrt.")}
    assert keys == set(tensorrt) - {"model_config", "plugins"}  # tables are of networks without plugins
    kind, level = flag_of("build.tensorrt.optimisation_level")
    assert (kind, level.min, level.max, level.help) == (
        int, 0, 5, "how long the fastest engine is searched for; default: TensorRT's own, 3"
    )  # fmt: skip
    assert flag_of("train.lr")[1].min is None  # open, so the model judges it
    assert flag_of("seed")[1].max == 2**32 - 1
    assert field_of("prune.latency.target").is_required()


def test_a_value_that_the_model_refuses_names_the_flag() -> None:
    made = recipe_keys("train.lr", "data.size", ("export.labels", False))
    given = made(train__lr=float("nan"), data__size=None, export__labels=False)
    assert set(given) == {"train.lr", "export.labels"}
    with pytest.raises(VssError, match=r"^--lr is nan; "):
        recipe_of(given)
    assert recipe_of(made(train__lr=1e-5, data__size="8x16", export__labels=False)).data.size == (8, 16)


def test_a_parameter_is_replaced_by_the_flags_of_a_function() -> None:
    found: list[Any] = []
    tool = typer.Typer()

    def pair_of(left: int = 1, right: int = 2) -> tuple[int, int]:
        return left, right

    @takes(pair=pair_of)
    def work(name: str, pair: Any, last: bool = False) -> None:
        found.append((name, pair, last))

    tool.command()(work)
    assert CliRunner().invoke(tool, ["a", "--right", "5", "--last"]).exit_code == 0
    assert found == [("a", (1, 5), True)]


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "a,b", "0,8", "1.5,2", "1e3,8", "nan,1", "[1],2", "1,true", "²x1"])
def test_numbers_that_are_none_name_the_flag(text: str) -> None:
    with pytest.raises(VssError, match="--x"):
        numbers_of("--x", text, "two numbers", counts=[2], low=1, high=100)


def test_numbers_are_those_of_yaml() -> None:
    assert numbers_of("--x", "1e-5, .5,012", "", counts=[3], low=0, high=100, whole=False) == [1e-5, 0.5, 12]
