"""Flags that commands share. Most set a key of the recipe, and its model gives their type, range, default and help."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer import Option

from vss.core.config import DataOptions, Recipe, TensorRTConfig, load_recipe
from vss.core.errors import VssError, shown
from vss.core.files import target_of
from vss.core.yaml12 import Override, assignment, parse_yaml

Set = Annotated[list[str] | None, Option("--set", help="any key of the recipe: a.b=value", metavar="KEY=VALUE")]
RecipeName = Annotated[str | None, Option("--recipe", help="recipe to start from: a packaged one or a YAML file")]
Save = Annotated[Path, Option("--save", help="folder or file to write")]
OutFolder = Annotated[Path, Option("--save", "--out", "--out-dir", help="folder to write")]
Ckpt = Annotated[Path, Option("--ckpt", help="checkpoint to read, .safetensors")]
Candidate = Annotated[Path, Option("--ckpt", "--candidate", help="checkpoint or engine to judge")]
PrecisionName = Annotated[Literal["fp32", "fp16", "int8"], Option("--precision", help="what layers compute in")]
Split = Annotated[Literal["train", "val", "test"], Option("--split", help="images to score on")]
Cache = Annotated[Path, Option("--cache", help="folder of INT8 ranges that were measured before")]
Unstable = Annotated[
    bool, Option("--allow-unstable/--no-allow-unstable", help="accept times of a machine that is too noisy")
]
Plot = Annotated[Path | None, Option("--plot", help="SVG file to write: time over width, layer by layer")]
Criteria = Annotated[
    str, Option("--criteria", "--methods", help="criteria with commas between; NAME:PRESET takes a preset")
]
ReportFile = Annotated[
    Path | None,
    Option(
        "--report", help="JSON file to write the figures to", callback=lambda path: path and target_of(path) and path
    ),
]
Given = dict[str, Any]
"""Dotted keys of the recipe and the values that flags gave them."""

READING = tuple(f"data.{name}" for name in DataOptions.model_fields)
DATA = ("data.dataset", "data.root", *READING)
TENSORRT = (
    "build.targets",
    *(f"build.tensorrt.{name}" for name in TensorRTConfig.model_fields if name != "plugins"),
)
OPENVINO = ("build.openvino.device", "build.openvino.precision", "build.openvino.cache")
FLAG_PANELS = {"Reading the data": READING, "TensorRT": TENSORRT, "OpenVINO": OPENVINO}
NAMES = {
    "data.root": ("--data-root",),
    "data.size": ("--input-size",),
    "data.split": ("--data-split",),
    "model.name": ("--model",),
    "model.factory": ("--model-from",),
    "model.options": ("--option",),
    "prune.criterion": ("--criterion", "--method"),
    "prune.options": ("--option",),
    "prune.steps": ("--iterative",),
    "prune.keep": ("--freeze", "--frozen", "--keep"),
    "prune.budget.ratios": ("--ratio",),
    "prune.latency.target": ("--latency",),
    "build.tensorrt.optimisation_level": ("--level",),
    "build.tensorrt.flags": ("--flag",),
    "build.tensorrt.plugins": ("--plugin-library",),
    "build.openvino.precision": ("--compute",),
    "build.openvino.cache": ("--compiled",),
}
"""Names of flags that are not the last word of their key; the first is shown in sentences."""
LIMITS = {"ge": "min", "gt": "min", "le": "max", "lt": "max"}
METAVARS = {
    "data.size": "H,W",
    "data.classes": "NAME,NAME",
    "data.label_map": "OLD=NEW",
    "data.colors": "FILE",
    "data.split": "SPLIT=PART",
    "model.factory": "MODULE:NAME",
    "model.options": "NAME=VALUE",
    "prune.options": "NAME=VALUE",
    "prune.budget.ratios": "LAYER=FRACTION",
    "bench.cores": "0,1",
    "build.targets": "sm86,sm89",
}
MAX_SIDE = 16384  # pixels


def numbers_of(
    flag: str, text: str, form: str, *, counts: Collection[int], low: float, high: float, whole: bool = True
) -> list[Any]:
    """Numbers with commas (or x) between, read as YAML reads them; `form` says what was expected."""
    values = parse_yaml(f"[{text.lower().replace('x', ',')}]", source=flag)
    kinds = (int,) if whole else (int, float)
    if len(values) not in counts or not all(type(value) in kinds and low <= value <= high for value in values):
        raise VssError(f"{flag} takes {form} and got {shown(text)}.")
    return list(values)


def size_of(text: str, flag: str = "--input-size") -> list[int]:
    """Height and width, in this order."""
    form = f"H,W (for example 360,480), each from 1 to {MAX_SIDE} pixels,"
    return numbers_of(flag, text, form, counts=[2], low=1, high=MAX_SIDE)


def cores_of(text: str) -> list[int]:
    return numbers_of(
        "--cores", text, "numbers of cores with commas between (0,1)", counts=range(1, 4097), low=0, high=4095
    )


def options_of(pairs: Iterable[str], flag: str = "--option") -> dict[str, Any]:
    """Values of `--option name=value`, each name once."""
    given = [assignment(pair, flag) for pair in pairs]
    names = [name for name, _ in given]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise VssError(f"{flag} {twice!r} is given twice; give it once.")
    return dict(given)


def backend_of(name: str) -> str:
    """The name of a runtime that there is; `auto` is that of those which are installed."""
    from vss.deploy.backends import AUTO, BACKENDS

    if name != AUTO:
        BACKENDS.canonical(name)
    return name


def pairs_in(text: str) -> list[str]:
    """`a=b,c=d` as two pairs; a comma within a name is part of it.

    >>> pairs_in("car=ignore,tree=plant"), pairs_in("road, route=road")
    (['car=ignore', 'tree=plant'], ['road, route=road'])
    """
    parts = text.split(",")
    return parts if all("=" in part for part in parts) else [text]


def named_or(flag: str) -> Callable[[list[str]], Any]:
    """A reader of one word (a file, a ready table), or of name=value as often as there are some."""
    return lambda texts: texts[0] if len(texts) == 1 and "=" not in texts[0] else options_of(texts, flag)


READERS: dict[str, Callable[[Any], Any]] = {
    "build.backend": backend_of,
    "data.size": size_of,
    "data.classes": lambda texts: [name.strip() for text in texts for name in text.split(",")],
    "data.label_map": lambda texts: named_or("--label-map")([pair for text in texts for pair in pairs_in(text)]),
    "data.colors": named_or("--colors"),
    "data.split": lambda texts: options_of([part for text in texts for part in text.split(",")], "--data-split"),
    "bench.cores": cores_of,
    "model.options": options_of,
    "prune.options": options_of,
    "prune.budget.ratios": lambda pairs: options_of(pairs, "--ratio"),
    "prune.budget.align": lambda text: int(text) if text.isdecimal() else text,
    "build.tensorrt.flags": lambda names: [name.upper() for name in names],
    "build.targets": lambda names: [each.strip().lower() for name in names for each in name.split(",") if each.strip()],
}
"""What becomes of the text of a flag that is no plain value."""


def statistics_of(
    mean: Annotated[str | None, Option(help="mean of a foreign engine's images, 0 to 1", metavar="R,G,B")] = None,
    std: Annotated[str | None, Option(help="their standard deviation, 0 to 1", metavar="R,G,B")] = None,
) -> dict[str, list[float]] | None:
    """{"mean", "std"} of the images of an engine that does not say them."""
    if mean is None or std is None:
        if mean is not std:
            raise VssError("--mean and --std go together; give both.")
        return None
    form = "R,G,B, three numbers in units of 0 to 1 (0.485,0.456,0.406),"
    return {
        name: numbers_of(f"--{name}", text, form, counts=[3], low=low, high=1, whole=False)
        for name, text, low in (("mean", mean, 0), ("std", std, 1e-6))
    }


def network_of(
    model_from: Annotated[
        str | None,
        Option(
            help="function of yours that builds the uncut network of --ckpt, where it is not registered; it runs your "
            "code",
            metavar="MODULE:NAME",
        ),
    ] = None,
    model_option: Annotated[list[str] | None, Option(help="option of that function", metavar="NAME=VALUE")] = None,
) -> Given:
    """The network of checkpoints, as keys of the recipe."""
    if model_option and not model_from:
        raise VssError("--model-option is for the function of --model-from; give both.")
    options = options_of(model_option or [], "--model-option")
    return {"model.factory": model_from, "model.options": options} if model_from else {}


def names_of(key: str) -> tuple[str, ...]:
    """The names of the flag that sets a key of the recipe."""
    return NAMES.get(key) or (f"--{key.rpartition('.')[2].replace('_', '-')}",)


def field_of(key: str) -> FieldInfo:
    """The field of the recipe behind a dotted key."""
    kind: type[BaseModel] = Recipe
    *sections, leaf = key.split(".")
    for name in sections:
        parts = [kind.model_fields[name].annotation, *typing.get_args(kind.model_fields[name].annotation)]
        kind = next(part for part in parts if isinstance(part, type) and issubclass(part, BaseModel))
    return kind.model_fields[leaf]


def type_of(key: str, annotation: Any) -> Any:
    """The type of a flag: that of its field, texts for what a reader takes, a list for what may be given many times."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        if any(typing.get_origin(part) is dict for part in typing.get_args(annotation)):
            return list[str]
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        return type_of(key, parts[0]) if len(parts) == 1 else str
    if origin is dict or (origin is tuple and annotation == tuple[str, ...]):
        return list[str]
    if annotation == tuple[Path, ...]:
        return list[Path]
    return str if key in READERS else annotation


def limits_of(field: FieldInfo, kind: Any) -> dict[str, float]:
    """The closed range of a number; what is open or all that float32 holds is left to the model."""
    found = {name: getattr(each, name) for each in field.metadata for name in LIMITS if hasattr(each, name)}
    step = {"gt": 1, "lt": -1} if kind is int else {}
    limits = {LIMITS[name]: found[name] + step.get(name, 0) for name in found if name in ("ge", "le") or step}
    return {name: value for name, value in limits.items() if value == 0 or 1e-6 <= abs(value) <= 1e10}


def flag_of(key: str) -> tuple[Any, Any]:
    """The type and the option of a key of the recipe."""
    field, names = field_of(key), names_of(key)
    kind = type_of(key, field.annotation)
    limits: Any = limits_of(field, kind) if kind in (int, float) else {}
    text = (field.description or "").replace("null:", "default:")
    told = isinstance(field.default, bool | int | float | str) and field.default is not False
    if told and key not in ("data.dataset", "data.root"):
        text += f"; default: {'on' if field.default is True else field.default}"
    option: Any = Option(
        *([f"{names[0]}/--no-{names[0][2:]}"] if kind is bool else names),
        help=text,
        metavar=METAVARS.get(key),
        case_sensitive=False,
        show_default=False,
        rich_help_panel=next((panel for panel, keys in FLAG_PANELS.items() if key in keys), None),
        **limits,
    )
    return kind, option


def recipe_keys(*keys: str | tuple[str, Any]) -> Callable[..., Given]:
    """A function of flags, one for each key of the recipe (or key and default), that returns what was given."""
    defaults = dict(key if isinstance(key, tuple) else (key, None) for key in keys)

    def given(**values: Any) -> Given:
        found = {key: values[key.replace(".", "__")] for key in defaults}
        return {
            key: READERS.get(key, lambda same: same)(value) for key, value in found.items() if value not in (None, [])
        }

    annotated: Any = Annotated
    parameters = []
    for key, default in defaults.items():
        kind, option = flag_of(key)
        if default is not None:
            option.help = option.help.partition("; default:")[0]
            option.show_default = True
        hint = annotated[kind | None, option]
        name = key.replace(".", "__")
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
    given.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return given


def takes(**makers: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace parameters of a command by the flags of functions: each gets what its function returns."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        parameters: dict[str, inspect.Parameter] = {}
        owners: dict[str, str] = {}
        for name in inspect.signature(command).parameters:
            source = makers.get(name, command)
            for part in inspect.signature(source, eval_str=True).parameters.values():
                if source is not command or part.name == name:
                    parameters[part.name] = part.replace(kind=inspect.Parameter.KEYWORD_ONLY)
                    owners[part.name] = name

        @functools.wraps(command)
        def run(**values: Any) -> None:
            mine = {name: {key: value for key, value in values.items() if owners[key] == name} for name in makers}
            own = {key: value for key, value in values.items() if owners[key] not in makers}
            command(**own, **{name: maker(**mine[name]) for name, maker in makers.items()})

        run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
        run.__annotations__ = {name: part.annotation for name, part in parameters.items()}
        return run

    return wrap


def recipe_of(given: Given, overrides: Iterable[Override] | None = None, name: str | None = None) -> Recipe:
    """The recipe `name`, else the defaults, with what flags gave and then `--set`; a fault names the flag."""
    flags = {key: names_of(key)[0] for key in given}
    return load_recipe(name, [*given.items(), *(overrides or [])], flags=flags)


def refuse_given(ctx: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse a flag (by parameter or key) that the command line holds and that nothing would read: `why`."""
    wanted = {name.replace(".", "__") for name in names}
    for param in ctx.command.params:
        source = ctx.get_parameter_source(param.name or "")
        if param.name in wanted and source is not None and source.name == "COMMANDLINE":
            raise VssError(f"{param.opts[0]} {why}; leave it off.")
