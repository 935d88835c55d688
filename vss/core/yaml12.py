"""YAML whose scalars are those of YAML 1.2's core schema; PyYAML reads those of 1.1.

There `1e-5`, `on`, `012`, `12:30` and `1_000` are a text, a truth value, ten, 750 and a thousand. Here `1e-5` is a
number, `012` is twelve, and the rest are texts; a setting that is true or false takes `on` and `off` all the same.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

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


def dump(data: Any) -> str:
    """YAML that `Loader` and readers of YAML 1.1 read alike, keys in the given order."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False)
