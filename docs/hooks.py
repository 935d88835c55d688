"""Hooks of mkdocs: pages from elsewhere in the repository, links that leave docs/, and the reference from the code.

A page of docs/ holds `<!-- commands -->` or `<!-- recipe -->` where the tables go, so they are as new as the code.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "README.zh.md": "zh.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "csrc/README.md": "csrc.md",
    "plugins_trt/README.md": "plugins_trt.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Files outside docs/ that are pages of the site."""
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


# Pages and links


def site_path(path: str) -> str | None:
    """Where a file of the repository lies in the site; None for a folder or nothing."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}" if (ROOT / path).is_file() else None


def rewritten(text: str, source: str) -> tuple[str, set[str]]:
    """The text of a page with links as they are in the site, and the files that go along; `source` is its path."""
    here, extra = posixpath.dirname(site_path(source) or ""), set[str]()

    def link(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups("")
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        where = site_path(path)
        if where is None:
            raise FileNotFoundError(f"{source} links to {target}, which is no file")
        if where.startswith("files/"):
            extra.add(path)
        return f"{before}{posixpath.relpath(where, here or '.')}{anchor}{after}"

    parts = FENCE.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts), extra


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of `PAGES`, and the files that pages link to."""
    from mkdocs.structure.files import File

    sources = {source: ROOT / source for source in PAGES}
    sources |= {f"docs/{file.src_uri}": Path(file.abs_src_path) for file in files.documentation_pages()}
    for source, path in sources.items():
        text, extra = rewritten(path.read_text(encoding="utf-8"), source)
        if source in PAGES:
            files.append(File.generated(config, PAGES[source], content=text))
        for name in extra:
            if files.get_file_from_path(f"files/{name}") is None:
                files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put in the reference, and turn links of docs/ that leave it."""
    if page.file.src_uri not in PAGES.values():
        markdown, _ = rewritten(markdown, f"docs/{page.file.src_uri}")
    for marker, make in (("<!-- commands -->", commands), ("<!-- recipe -->", recipe)):
        if marker in markdown:
            made = f'<div class="reference" markdown>\n\n{make()}\n</div>'
            markdown = markdown.replace(marker, made)
    return markdown


# Tables


def cell(text: str) -> str:
    """Text in a cell of a table; what would be HTML or a column is none."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(p if p.startswith("`") else re.sub(r"([|*])", r"\\\1", p).replace("<", "&lt;") for p in parts)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# Recipes


def recipe() -> str:
    """Every key of a recipe by section: type, default, meaning."""
    from vss.core.config import Recipe

    return "\n".join(section(Recipe, ""))


def section(kind: type[BaseModel], prefix: str) -> Iterator[str]:
    """Heading, meaning and keys of a section, then the sections in it."""
    if prefix:
        yield f"## {prefix}\n"
        yield " ".join((kind.__doc__ or "").split()) + "\n"
    rows, inner = [], []
    for name, field in kind.model_fields.items():
        key = field.alias or name
        below = section_of(field)
        path = f"{prefix}.{key}".strip(".")
        if below and key != "references":
            inner.append((below, path))
            if below is field.annotation:
                continue
        rows.append([f"`{key}`", cell(type_of(field)), cell(default_of(field)), cell(meaning_of(field, path))])
    yield table(["Key", "Type", "Default", "Meaning"], rows)
    for below, path in inner:
        yield from section(below, path)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds."""
    parts = [field.annotation, *typing.get_args(field.annotation)]
    return next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)


def meaning_of(field: FieldInfo, path: str) -> str:
    """The description of a key."""
    below = section_of(field)
    if not field.description and below:
        return f"the section [{path}](#{path.replace('.', '')})"
    return field.description or ""


def default_of(field: FieldInfo) -> str:
    """The default of a key, as YAML has it."""
    from vss.core.yaml12 import dump

    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "`" + dump(list(value) if isinstance(value, tuple) else value).removesuffix("\n").removesuffix("\n...") + "`"


NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "anything"}
NAMES[Path] = "file"
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def type_of(field: FieldInfo) -> str:
    """The type of a key with its range, in words."""
    words, null, rest = named(field.annotation).partition(" or null")
    return f"{words}{limits(field.metadata)}{null}{rest}"


def limits(metadata: Any) -> str:
    """ "≥ 0, < 1" of the constraints beside a type."""
    found = [(name, getattr(part, name)) for part in metadata for name in SIGNS if hasattr(part, name)]
    shown = [f"{SIGNS[name]} {value:,}" for name, value in found if 1e-30 < abs(value) < 1e30 or value == 0]
    if any(0 < abs(value) <= 1e-30 for _, value in found):  # the smallest number that float32 can hold
        shown.insert(0, "> 0")
    return f" {', '.join(shown)}" if shown else ""


def named(annotation: Any) -> str:
    """An annotation in words."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(named(part) for part in parts)
    if origin is typing.Annotated:
        inner = [m for part in parts[1:] for m in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return f"{named(parts[0])}{limits(inner)}"
    if origin is tuple:
        if len(parts) == 2 and parts[1] is Ellipsis:
            return f"list of {named(parts[0])}"
        return f"list of {len(parts)}, each {named(parts[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


# Commands


@dataclasses.dataclass(frozen=True)
class Entry:
    """A command that does something: "lut build" and what typer made of it."""

    name: str
    command: Any


def entries(group: Any, prefix: str = "") -> Iterator[Entry]:
    """All commands, those of sub-groups too, in their order."""
    for name, command in group.commands.items():
        if getattr(command, "hidden", False):
            continue
        if hasattr(command, "commands"):
            yield from entries(command, f"{prefix}{name} ")
        else:
            yield Entry(prefix + name, command)


def commands() -> str:
    """Every command with its flags, by help panel where commands have one."""
    from vss.cli.main import app

    group = typer.main.get_command(app)
    parts = ["## Flags of all commands\n", "Before the command: `vss -q train ...`.\n", flags(group)]
    panel = ""
    for entry in sorted(entries(group), key=lambda e: panels(group).index(panel_of(e.command, group, e.name))):
        here = panel_of(entry.command, group, entry.name)
        if here != panel:
            parts.append(f"## {here}\n")
            panel = here
        text = re.sub(r"\s*\n\s*\n\s*", "\n\n", (entry.command.help or "").strip())
        parts += [
            f"### vss {entry.name}\n",
            cell_free(text) + "\n",
            f"```\n{usage(entry)}\n```\n",
            flags(entry.command),
        ]
    return "\n".join(parts)


def cell_free(text: str) -> str:
    """Help as Markdown: no HTML."""
    return text.replace("<", "&lt;").replace("*", "\\*")


def panel_of(command: Any, group: Any, name: str) -> str:
    """The help panel of a command, or of the group that holds it."""
    own = getattr(command, "rich_help_panel", None)
    above = getattr(group.commands[name.split()[0]], "rich_help_panel", None)
    return next((panel for panel in (own, above) if isinstance(panel, str)), "Commands")


def panels(group: Any) -> list[str]:
    """The panels in the order of their first command."""
    return list(dict.fromkeys(panel_of(entry.command, group, entry.name) for entry in entries(group)))


def usage(entry: Entry) -> str:
    """The line of a command with what it must be given."""
    words = [f"vss {entry.name}"]
    for param in entry.command.params:
        if param.param_type_name == "argument":
            name = f"{param.name.upper()}{'...' if param.nargs == -1 else ''}"
            words.append(name if param.required else f"[{name}]")
        elif param.required:
            words.append(f"{param.opts[0]} {value_of(param)}")
    return " ".join([*words, "[OPTIONS]"])


def value_of(param: Any) -> str:
    """What follows a flag."""
    if getattr(param, "is_flag", False):
        return ""
    if param.metavar:
        return str(param.metavar)
    kind = param.type_descriptor.annotation
    inner = [part for part in (kind, *typing.get_args(kind)) if part in (int, float, str, Path)]
    words = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}
    return words[inner[0]] if inner else "TEXT"


def flags(command: Any) -> str:
    """A table of the arguments and flags of a command."""
    rows = []
    for param in command.params:
        if getattr(param, "hidden", False) or param.name == "help":
            continue
        argument = param.param_type_name == "argument"
        names = [param.name.upper()] if argument else [*param.opts, *param.secondary_opts]
        shown = " ".join(f"`{name}`" for name in names)
        value = "" if argument else value_of(param)
        text = (param.help or "") + (" (may be given several times)" if getattr(param, "multiple", False) else "")
        rows.append([shown, f"`{value}`" if value else "", cell(shown_default(param)), cell(text.strip())])
    return table(["Flag", "Value", "Default", "Meaning"], rows) if rows else ""


def shown_default(param: Any) -> str:
    """The default of a flag as it is typed."""
    value = param.default
    if param.required:
        return "required"
    if value is None or value is False or value == [] or value == ():
        return ""
    return f"`{'on' if value is True else value}`"
