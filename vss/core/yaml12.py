"""YAML in and out, and overrides `a.b=value` whose values are YAML: the one reader of recipes, grids and flags.

Scalars are those of YAML 1.2's core schema; PyYAML reads those of 1.1.

There `1e-5`, `on`, `012`, `12:30` and `1_000` are a text, a truth value, ten, 750 and a thousand. Here `1e-5` is a
number, `012` is twelve, and the rest are texts; a setting that is true or false takes `on` and `off` all the same.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vss.core.errors import SHOWN, VssError, fault, one_line, shown, unknown
from vss.core.files import MAX_DEPTH, bounded, read_text

MAX_YAML, MAX_NODES = 256 << 10, 50_000  # bytes, values
M = TypeVar("M", bound=BaseModel)
Override = str | tuple[str, object]
"""`a.b=c`, where c is YAML, or the dotted key and the value itself."""

_SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _kind, (_pattern, _first) in _SCALARS.items():
    for _character in _first:
        _entry = (f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"))
        _RESOLVERS.setdefault(_character.strip("\0"), []).append(_entry)


class Loader(yaml.SafeLoader):
    """Plain values, with the scalars of YAML 1.2."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """An integer; a leading zero says nothing."""
        text = str(self.construct_scalar(node))
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class Dumper(yaml.SafeDumper):
    """Quotes texts that either version of YAML would take for something else."""


Loader.yaml_implicit_resolvers = _RESOLVERS
Dumper.yaml_implicit_resolvers = {
    key: [*yaml.SafeDumper.yaml_implicit_resolvers.get(key, []), *_RESOLVERS.get(key, [])]
    for key in {*yaml.SafeDumper.yaml_implicit_resolvers, *_RESOLVERS}
}
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def dump(data: object) -> str:
    """YAML that `Loader` and readers of YAML 1.1 read alike, keys in the given order."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False)


def flow(value: object) -> str:
    """A value on one line, as `dump` would quote it."""
    text = yaml.dump(value, Dumper=Dumper, sort_keys=False, default_flow_style=True, width=1 << 20)
    return text.removesuffix("\n").removesuffix("\n...")


def parse_yaml(text: str, *, source: str) -> Any:
    """YAML of plain values; aliases that grow, anchors that hold themselves, keys given twice are refused."""
    open_brackets = 0
    for bracket in re.findall(r"[\[\]{}]", text):  # before the scanner, whose time grows with the square of them
        open_brackets += 1 if bracket in "[{" else -1
        if open_brackets > 4 * MAX_DEPTH:
            raise VssError(f"{source} is nested more than {MAX_DEPTH} deep; a recipe or grid never is.")
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        data = None
        if node is not None:
            _node_size(node, {}, set())
            data = loader.construct_document(node)
    except RecursionError as error:
        raise VssError(f"{source} is nested more than {MAX_DEPTH} deep; a recipe or grid never is.") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f" (line {mark.line + 1})" if mark else ""
        raise VssError(f"{source} is no YAML: {one_line(str(problem))}{where}.") from error
    except (ValueError, AttributeError, LookupError, TypeError, ArithmeticError) as error:  # of PyYAML's constructors
        raise VssError(
            f"{source} holds what YAML takes for a number, date or other value and cannot be one "
            f"({one_line(str(error))}); quote what is a text."
        ) from error
    bounded(data, source=source)
    return data


def _node_size(node: yaml.Node, seen: dict[int, int], above: set[int]) -> int:
    """How many values a YAML node stands for once its aliases are written out."""
    if id(node) in seen:
        return seen[id(node)]
    if id(node) in above:
        raise yaml.YAMLError("an anchor holds its own alias")
    above.add(id(node))
    size = 1
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for name in {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ():
            raise yaml.YAMLError(f"the key {shown(name)} stands there twice")
        size += sum(_node_size(key, seen, above) + _node_size(value, seen, above) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_node_size(value, seen, above) for value in node.value)
    if size > MAX_NODES:
        raise yaml.YAMLError(f"with its aliases written out it has more than {MAX_NODES} values")
    above.discard(id(node))
    seen[id(node)] = size
    return size


def read_yaml(path: Path | str, *, kind: str) -> dict[str, Any]:
    """Read the keys and values of a recipe or grid; see `parse_yaml`."""
    data = parse_yaml(read_text(path, kind=kind, limit=MAX_YAML), source=f"{kind} {path}") or {}
    if not isinstance(data, dict):
        raise VssError(f"{kind} {path} holds a {type(data).__name__}; expected keys and values.")
    for key in data:
        if not isinstance(key, str):
            raise VssError(f"{kind} {path} has the key {shown(key)}; keys are texts.")
    return data


def assignment(setting: str, flag: str = "--set") -> tuple[str, object]:
    """The key and the value of `key=value`, whose value is YAML; every override that is a text is read here."""
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise VssError(f"{flag} takes {'key.path' if flag == '--set' else 'name'}=value and got {shown(setting)}.")
    return key, parse_yaml(text, source=f"{flag} {one_line(setting, SHOWN)}")


def overridden(data: Mapping[str, object], overrides: Iterable[Override]) -> dict[str, Any]:
    """A deep copy of nested dictionaries with dotted keys set, in the given order."""
    top: dict[str, Any] = copy.deepcopy(dict(data))
    for each in overrides:
        key, value = assignment(each) if isinstance(each, str) else each
        *parents, leaf = key.split(".")
        section: Any = top
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise VssError(f"{one_line(key, SHOWN)}: {shown(parent)} is a value, not a section.")
        section[leaf] = copy.deepcopy(value)
    return top


def parse(kind: type[M], data: Mapping[str, object], *, source: str, flags: Mapping[str, str] | None = None) -> M:
    """Validate into `kind`; the first fault becomes one sentence, which names the flag of a key that has one."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known, section = _keys(kind), where.rpartition(".")[0]
            near = [key for key in known if key.rpartition(".")[0] == section]
            raise unknown(f"key in {source}", where, near, hints=known) from error
        for key, flag in (flags or {}).items():
            if f"{where}.".startswith(f"{key}."):
                raise VssError(f"{flag}{fault(error).removeprefix(where)}.") from error
        raise VssError(f"{source}: {fault(error)}.") from error


def _keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []  # dotted, of sub-sections too
    for field_name, field in kind.model_fields.items():
        name = field.alias or field_name
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            keys += [prefix + name, *_keys(nested, f"{prefix}{name}.")]
        else:
            keys.append(prefix + name)
    return keys
