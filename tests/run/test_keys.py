"""vss.run.runner: every key of a recipe, changed in turn, changes the key of a step or is listed with a reason; and
what is listed is not read while the step works."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from vss.core import config
from vss.core.config import Recipe, Section
from vss.core.errors import VssError
from vss.data import Preprocess, open_data
from vss.run import runner
from vss.run.job import Job
from vss.run.project import Project
from vss.run.runner import Json, Runner

SEGMENTS: dict[str, Any] = {
    "name": "keys",
    "data": {"dataset": "camvid", "size": [48, 64], "limit": 4, "augment": {"scale": [1, 1]}},
    "model": {"name": "unet", "options": {"width": 4, "depth": 1}},
    "train": {"epochs": 1, "batch_size": 4, "precision": "32-true", "accelerator": "cpu"},
    "prune": {"batches": 1, "batch_size": 4, "recalibrate": 1},
    "finetune": {"epochs": 1, "batch_size": 4, "precision": "32-true", "accelerator": "cpu"},
    "bench": {"min_seconds": 0.01, "max_seconds": 0.1, "images": 1, "spread": 50},
    "gate": {"max_drop": 100},
    "panels": 1,
}
SLIMMING = {"prune": {"criterion": "slimming"}, "sparse": {"epochs": 1}}
DMCP = {"prune": {"criterion": "dmcp"}, "dmcp": {"epochs": 1}}
LATENCY = {"prune": {"latency": {"target": "0.5x"}, "steps": 1}}
AUTO = {"prune": {"criterion": "dmcp", "budget": {"align": "auto"}}, "dmcp": {"epochs": 1}}
ROUNDS = {"prune": {"steps": 2, "epochs_between": 1}}


def fields(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section], FieldInfo]]:
    """Every key of a section and of those in it: (dotted key, class, field)."""
    for name, field in kind.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        parts = [field.annotation, *typing.get_args(field.annotation)]
        inner = [part for part in parts if isinstance(part, type) and issubclass(part, Section)]
        if inner and key != "references":
            yield from fields(inner[0], f"{key}.")
            if inner[0] is not field.annotation:
                yield key, kind, field
        else:
            yield key, kind, field


def others(annotation: Any, value: Any) -> Iterator[Any]:
    """Values of a type that differ from `value`."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        yield from (each for each in parts if each != value)
    elif origin in (typing.Union, types.UnionType):
        for part in parts:
            yield from others(part, None if part is type(None) else value)
    elif origin is typing.Annotated:
        yield from others(parts[0], value)
    elif origin is tuple:
        inner = [next(others(part, None)) for part in parts if part is not Ellipsis]
        yield from (inner, [*(value or []), *inner])
    elif origin is dict:
        yield from ({"another": 1}, {"another": 0.5}, {"train": "another"})
    elif annotation is type(None):
        yield None
    elif annotation is bool:
        yield not value
    elif annotation in (int, float):
        start = value if isinstance(value, int | float) else 0
        yield from (start + 1, start * 2, start / 2, start - 1, start + 0.1, 0.25, 20, 33, 1)
    elif annotation is Path:
        yield "another"
    elif annotation is str:
        yield from ("l1", "another", "1/2")
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield LATENCY["prune"]["latency"] if annotation is config.LatencyConfig else {"name": "segnet"}


def put(data: Any, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = dict(LATENCY["prune"]["latency"])  # the one section that may be missing
        data = data[parent]
    data[leaf] = value


def changed(recipe: Recipe, key: str, field: FieldInfo, file: Path) -> Recipe:
    """The recipe with another value of a key."""
    now: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        now = (now or {}).get(part)
    values = [str(file), [str(file)]] if key in runner.FILES else list(others(field.annotation, now))
    for value in values:
        data = recipe.model_dump(mode="json")
        put(data, key, value)
        try:
            found = Recipe.model_validate(data)
        except ValidationError:
            continue
        if found != recipe:
            return found
    raise AssertionError(f"no other value of {key} ({field.annotation}) was found: {values}")


def made(recipe: Recipe) -> dict[str, str]:
    """Kind of step -> its key without those of the steps before it."""
    return {kind: str(runner.depends(recipe, kind)) for kind in runner.VERSIONS}


def listed(recipe: Recipe, kind: str, key: str) -> bool:
    names = runner.unread(recipe, kind)
    return any(key == name or key.startswith(f"{name}.") for name in names)


@pytest.mark.parametrize(
    "more", [{}, SLIMMING, DMCP, LATENCY, ROUNDS, AUTO], ids=["", "slimming", "dmcp", "latency", "rounds", "auto"]
)
def test_every_key_changes_a_step_or_is_listed_for_it(more: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.model_validate(SEGMENTS | {"prune": {}} | more)
    file = tmp_path / "file"
    file.write_text("one")
    before, count = made(recipe), 0
    for key, _, field in fields(Recipe):
        if key.startswith("prune.latency.") and recipe.prune.latency is None:
            continue
        if key == "prune.widths" and (recipe.prune.latency or recipe.prune.steps > 1):
            continue  # refused together
        if len(typing.get_args(field.annotation)) == 1 and typing.get_origin(field.annotation) is typing.Literal:
            continue  # one value alone
        after, count = made(found := changed(recipe, key, field, file)), count + 1
        for kind in runner.VERSIONS:
            silent = listed(recipe, kind, key) and listed(found, kind, key)
            assert (before[kind] == after[kind]) == silent, f"{key} and {kind}"
    assert count > 130
    for kind in runner.VERSIONS:
        assert all(reason for reason in runner.unread(recipe, kind).values())


def test_files_count_by_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for key in runner.FILES:
        one.write_text("a")
        two.write_text("a")
        field = next(field for name, _, field in fields(Recipe) if name == key)
        recipe = Recipe.model_validate(SEGMENTS)
        first, same = (changed(recipe, key, field, path) for path in (one, two))
        assert runner.depends(first, "cell") == runner.depends(same, "cell")
        before = runner.depends(first, "cell")
        one.write_text("other")
        assert runner.depends(first, "cell") != before
    with pytest.raises(VssError, match=r"model\.checkpoint is .*gone, which cannot be read"):
        runner.depends(Recipe.model_validate({"model": {"checkpoint": str(tmp_path / "gone")}}), "train")


PREFIX = {kind: key.rpartition(".")[0] for key, kind, _ in fields(Recipe)} | {
    config.ModelConfig: "model", config.FitConfig: "train", config.FinetuneConfig: "finetune",
}  # fmt: skip


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Kind of step -> the keys that are read while such a step works."""
    found: dict[str, set[str]] = {}
    now: list[str] = []

    def get(self: Section, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if now and name in type(self).model_fields and not isinstance(value, Section) and type(self) in PREFIX:
            alias = type(self).model_fields[name].alias or name
            found.setdefault(now[-1], set()).add(f"{PREFIX[type(self)]}.{alias}".strip("."))
        return value

    def call(self: Runner, name: str, depends: Any, after: list[str], outputs: list[str], work: Any) -> Json:
        def noted() -> Json:
            now.append(depends["step"])
            try:
                return work()
            finally:
                now.pop()

        return own(self, name, depends, after, outputs, noted)

    own: Callable[..., Json] = Runner.__call__
    monkeypatch.setattr(Section, "__getattribute__", get)
    monkeypatch.setattr(Runner, "__call__", call)
    return found


HARMLESS = {"name": "written beside the weights", "data.workers": "how samples are read, not which"}


def test_what_is_listed_is_not_read(reads: dict[str, set[str]], street_root: Path, tmp_path: Path) -> None:
    data = SEGMENTS["data"] | {"root": str(street_root)}
    recipe = Recipe.model_validate(SEGMENTS | {"data": data, "precision": {"kinds": ["fp16"]}})
    job = Job(
        Project(recipe, open_data("camvid", street_root), Preprocess(size=recipe.data.size)),
        tmp_path, Runner(tmp_path, lambda *_: None), False, "",
    )  # fmt: skip
    job.everything()
    assert {"train", "prune", "finetune", "evaluate", "engine", "gate", "bench", "panels"} <= reads.keys()
    assert {"train.lr", "seed", "model.name"} <= reads["train"] and "export.labels" in reads["engine"]
    for kind, found in reads.items():
        wrong = {key for key in found - HARMLESS.keys() if listed(recipe, kind, key)}
        assert wrong == set(), kind
