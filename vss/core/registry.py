"""Names to things: models, datasets, criteria, backends.

A registry refuses a second owner of a name and answers an unknown name with the closest one. A user's package adds its
own entries without a fork, either by the entry-point group `vss.plugins` (each entry point names a module whose import
registers things) or by `--plugin MODULE` on the command line, which calls `load_plugin`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Generic, Literal, TypeVar

from vss.core.errors import VssError, one_line, shown, unknown

T = TypeVar("T")
ENTRY_POINT_GROUP = "vss.plugins"


@dataclass(frozen=True)
class Later:
    """Where a registered thing is, "module:attribute", until somebody asks for it."""

    target: str


class Registry(Generic[T]):
    """A dictionary of named things of one kind, with aliases.

    >>> colours = Registry[int]("colour")
    >>> colours.add("red", 1, aliases=["r"])
    1
    >>> colours["r"], colours.canonical("r"), colours.names()
    (1, 'red', ['red'])
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T | Later] = {}
        self._aliases: dict[str, str] = {}

    def add(self, name: str, item: T, *, aliases: Iterable[str] = ()) -> T:
        """Register `item`; raises `VssError` when the name or an alias is taken."""
        self._put(name, item, list(aliases))
        return item

    def later(self, name: str, target: str, *, aliases: Iterable[str] = ()) -> None:
        """Register what "module:attribute" is: names are known at once, and the module is imported on first use."""
        self._put(name, Later(target), list(aliases))

    def _put(self, name: str, item: T | Later, aliases: list[str]) -> None:
        for key in (name, *aliases):
            if key in self._items or key in self._aliases:
                raise VssError(f"{self.kind} {key!r} is registered already by {self[key]!r}; choose another name.")
        self._items[name] = item
        self._aliases.update(dict.fromkeys(aliases, name))

    def register(self, name: str, *, aliases: Iterable[str] = ()) -> Callable[[T], T]:
        """Decorator form of `add`."""
        return lambda item: self.add(name, item, aliases=aliases)

    def canonical(self, name: str) -> str:
        """The registered name behind a name or an alias."""
        name = self._aliases.get(name, name)
        if name not in self._items:
            load_entry_points()
            name = self._aliases.get(name, name)
        if name not in self._items:
            raise unknown(self.kind, name, [*self._items, *self._aliases])
        return name

    def __getitem__(self, name: str) -> T:
        name = self.canonical(name)
        item = self._items[name]
        if isinstance(item, Later):
            item = self._items[name] = typing.cast(T, pkgutil.resolve_name(item.target))
        return item

    def __contains__(self, name: str) -> bool:
        load_entry_points()
        return name in self._items or name in self._aliases

    def names(self) -> list[str]:
        """The canonical names, sorted."""
        load_entry_points()
        return sorted(self._items)

    def aliases(self, name: str) -> list[str]:
        """The other names of a canonical name."""
        return sorted(alias for alias, target in self._aliases.items() if target == name)


def checked_options(owner: str, annotations: Mapping[str, Any], options: Mapping[str, object]) -> dict[str, Any]:
    """Options by their annotations, `Annotated[float, Field(ge=0)]` with its range; a list stands for a tuple.

    Args:
        owner: what sentences call the thing that has the options.
        annotations: of every option.
        options: name -> value. No text is read as a number, no truth value as one, and NaN and infinity are none.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    config, result = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True), {}
    for name, value in options.items():
        kind, fault = annotations[name], dict[str, Any]()
        if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
            raise unknown(f"{name} of {owner}", value if isinstance(value, str) else shown(value),
                          map(str, typing.get_args(kind)))  # fmt: skip
        for form in (value, _tuples(value)):
            try:
                result[name] = TypeAdapter(kind, config=config).validate_python(form)
                break
            except ValidationError as error:
                fault = dict(error.errors(include_url=False)[0])
        else:
            place = "".join(f"[{part}]" for part in fault["loc"] if isinstance(part, int))
            given = shown(fault["input"] if place else value)
            raise VssError(f"option {name}{place} of {owner} is {given}; {one_line(fault['msg'])}.")
    return result


def _tuples(value: object) -> object:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def keyword_options(factory: Callable[..., object]) -> dict[str, Any]:
    """Name -> annotation, resolved, of the keyword-only parameters of a function or class."""
    function: Any = inspect.unwrap(getattr(factory, "__init__") if isinstance(factory, type) else factory)  # noqa: B009
    parameters = inspect.signature(factory).parameters.values()
    hints = {p.name: Any if p.annotation is p.empty else p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    names = vars(sys.modules[function.__module__])
    try:
        return typing.get_type_hints(SimpleNamespace(__annotations__=hints), names, include_extras=True)
    except NameError as error:
        raise VssError(f"the options of {factory!r} have annotations that cannot be read ({error}).") from error


def load_plugin(module: str) -> None:
    """Import a user's module so that it registers its own nets, datasets and criteria."""
    try:
        importlib.import_module(module)
    except (ImportError, ValueError, TypeError) as error:
        raise VssError(
            f"plugin module {shown(module)} cannot be imported ({error}); install it or put its folder on PYTHONPATH."
        ) from error
    except SyntaxError as error:
        raise VssError(f"plugin module {shown(module)} is no Python: {error}.") from error


_entry_points_loaded = False


def load_entry_points() -> None:
    """Import every module named by the entry-point group `vss.plugins`, once per process."""
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        point.load()


def lazy_names(package: str, modules: Mapping[str, Iterable[str]]) -> Callable[[str], object]:
    """The `__getattr__` of `package` (PEP 562), whose `modules` (relative) define those names: one is imported when
    somebody asks for such a name.

    No name may be that of a module of the package: once that is imported, it is what the package has by that name.
    """
    homes = {name: f"{package}.{module}" for module, names in modules.items() for name in names}

    def find(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return find
