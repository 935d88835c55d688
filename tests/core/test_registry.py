"""Names: one owner, the closest on a miss, and plug-ins from outside."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from vss.core import registry
from vss.core.errors import VssError
from vss.core.registry import Registry, load_plugin


@pytest.fixture
def colours() -> Registry[int]:
    table = Registry[int]("colour")
    table.add("red", 1, aliases=["r", "rouge"])
    table.add("blue", 2)
    return table


def test_names_aliases_and_items(colours: Registry[int]) -> None:
    assert colours["red"] == colours["r"] == colours["rouge"] == 1
    assert colours.canonical("rouge") == "red" and colours.canonical("blue") == "blue"
    assert colours.names() == ["blue", "red"]
    assert colours.aliases("red") == ["r", "rouge"] and colours.aliases("blue") == []
    assert "r" in colours and "red" in colours and "green" not in colours


@pytest.mark.parametrize(("name", "aliases"), [("red", []), ("r", []), ("pink", ["red"]), ("pink", ["rouge"])])
def test_a_name_has_one_owner(colours: Registry[int], name: str, aliases: list[str]) -> None:
    with pytest.raises(VssError, match="is registered already by 1; choose another name"):
        colours.add(name, 3, aliases=aliases)
    assert colours.names() == ["blue", "red"] and "pink" not in colours


def test_an_unknown_name_gets_the_closest_and_the_list(colours: Registry[int]) -> None:
    with pytest.raises(VssError, match=r"unknown colour 'bleu'\. Did you mean 'blue'\? Known: blue, r, red, rouge\."):
        colours["bleu"]
    with pytest.raises(VssError, match=r"unknown colour 'xyz'\. Known: blue"):
        colours["xyz"]
    with pytest.raises(VssError, match=r"unknown empty 'a'\. Known: none\."):
        Registry[int]("empty")["a"]


def test_decorator_form_returns_the_item(colours: Registry[int]) -> None:
    table: Registry[type] = Registry("thing")

    @table.register("mine", aliases=["m"])
    class Mine:
        pass

    assert table["m"] is Mine


class Point:
    """An installed package's entry point."""

    def __init__(self, table: Registry[int]) -> None:
        self.table, self.loads = table, 0

    def load(self) -> None:
        self.loads += 1
        self.table.add("green", 3, aliases=["g"])


@pytest.mark.parametrize("ask", ["item", "canonical", "in", "names"])
def test_an_entry_point_is_loaded_once_when_a_name_is_first_asked_for(
    colours: Registry[int], monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    point = Point(colours)
    groups: list[str] = []

    def entry_points(*, group: str) -> list[Point]:
        groups.append(group)
        return [point]

    monkeypatch.setattr(registry, "_entry_points_loaded", False)
    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert colours["red"] == 1 and point.loads == 0  # what is here already needs no packages
    if ask == "item":
        assert colours["g"] == 3
    elif ask == "canonical":
        assert colours.canonical("g") == "green"
    elif ask == "in":
        assert "green" in colours
    else:
        assert colours.names() == ["blue", "green", "red"]
    assert colours["green"] == 3 and "violet" not in colours
    assert point.loads == 1 and groups == ["vss.plugins"]


def test_a_plugin_module_registers_by_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_vss_plugin.py").write_text(
        "from vss.core.registry import Registry\nT = Registry('t')\nT.add('a', 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    load_plugin("my_vss_plugin")
    assert sys.modules.pop("my_vss_plugin").T["a"] == 1


def test_a_missing_plugin_is_a_sentence() -> None:
    with pytest.raises(VssError, match=r"plugin module 'no_such_plugin' cannot be imported .*PYTHONPATH"):
        load_plugin("no_such_plugin")
