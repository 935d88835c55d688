"""Pictures of label maps: those of the report with the share of right pixels and what changed, and a page of overlays
of a folder: does every mask lie on its image, and what did the check find?"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vss.core.errors import VssError, counted
from vss.core.files import write_text
from vss.data import BadSampleError, Pair, SegData
from vss.data.counts import count_classes
from vss.run.page.words import css, number, template, title

VOID = 255
VOID_RGB = (36, 36, 36)
FIXED_RGB, BROKEN_RGB, WRONG_RGB = (20, 184, 166), (239, 68, 68), (139, 120, 190)
MAX_SIDE, OPACITY = 640, 0.55
_INDEXED = {"P", "L", "1", "I", "I;16"}
_ORDER = ("image", "truth", "baseline", "pruned", "finetuned", "engine")


class Cell(NamedTuple):
    """One picture: `uri` is a data address, or empty and `note` says why."""

    name: str
    uri: str
    note: str
    mask: bool


class Panels(NamedTuple):
    """`rows` is [(image id, note, cells)], `legend` [(class, css colour)], `compared` the two masks of the change
    view."""

    rows: list[tuple[str, str, list[Cell]]]
    legend: list[tuple[str, str]]
    compared: tuple[str, str] | None


def panels(report: Mapping[str, Any], root: Path) -> Panels:
    """Read every picture below `root`; one that is missing or unreadable becomes a note in its place."""
    classes = report.get("classes", [])
    palette = report.get("palette")
    if not palette:
        from vss.data.base import generic_palette

        palette = generic_palette(max(len(classes), 2)).tolist()
    rows: list[tuple[str, str, list[Cell]]] = []
    compared = None
    for panel in report.get("panels", []):
        cells, pair = _panel(panel["files"], root, palette)
        rows.append((panel["id"], panel.get("note") or "", cells))
        compared = compared or pair
    legend = [(name, css(colour)) for name, colour in zip(classes, palette, strict=False)]
    return Panels(rows, [*legend, ("void", css(VOID_RGB))] if legend else [], compared)


def labels_of(picture: Image.Image, palette: list[list[int]]) -> np.ndarray:
    """(H, W) uint8 class indices of a mask picture: stored indices as they are, colours looked up, the rest void."""

    if picture.mode in _INDEXED:
        return np.asarray(picture).astype(np.uint8)
    pixels = np.asarray(picture.convert("RGB")).astype(np.int32)
    keys = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
    labels = np.full(keys.shape, VOID, np.uint8)
    for index, (red, green, blue) in reversed(list(enumerate(palette))):
        labels[keys == (red << 16 | green << 8 | blue)] = index
    return labels


def change(image: Image.Image, truth: np.ndarray, before: np.ndarray, after: np.ndarray) -> Image.Image:
    """Grey picture with coloured errors: wrong before and right now, right before and wrong now, wrong in both."""

    grey = np.asarray(image.convert("L").resize(truth.shape[::-1]), dtype=np.float32)
    canvas = np.repeat((90 + grey * 0.5)[..., None], 3, axis=2)
    valid, was, now = truth != VOID, before == truth, after == truth
    for where, colour in ((~was & now, FIXED_RGB), (was & ~now, BROKEN_RGB), (~was & ~now, WRONG_RGB)):
        canvas[valid & where] = colour
    canvas[~valid] = VOID_RGB
    return Image.fromarray(canvas.astype(np.uint8)).quantize(64)


def _panel(files: Mapping[str, str], root: Path, palette: list[list[int]]) -> tuple[list[Cell], tuple[str, str] | None]:
    names = [name for name in _ORDER if name in files] + [name for name in files if name not in _ORDER]
    pictures = {name: open_picture(root, files[name]) for name in names}
    masks = {n: labels_of(p, palette) for n, p in pictures.items() if n != "image" and not isinstance(p, str)}
    truth, cells = masks.get("truth"), []
    for name in names:
        picture = pictures[name]
        if isinstance(picture, str):
            cells.append(Cell(title(name), "", picture, name != "image"))
        elif name == "image":
            cells.append(Cell(name, data_uri(shrink(picture)), "", False))
        else:
            right = _right(masks[name], truth) if name != "truth" else ""
            shown = _paint(masks[name], palette) if picture.mode in _INDEXED else shrink(picture, smooth=False)
            cells.append(Cell(title(name), data_uri(shown), right, True))
    after = next((name for name in ("engine", "finetuned", "pruned") if name in masks), None)
    if truth is None or after is None or "baseline" not in masks or isinstance(pictures.get("image", ""), str):
        return cells, None
    if not masks["baseline"].shape == masks[after].shape == truth.shape:
        return cells, None
    seen = change(pictures["image"], truth, masks["baseline"], masks[after])  # type: ignore[arg-type]
    return [*cells, Cell("change", data_uri(seen), "what pruning changed", True)], ("baseline", after)


def _right(mask: np.ndarray, truth: np.ndarray | None) -> str:
    if truth is None or mask.shape != truth.shape or not (truth != VOID).any():
        return ""
    return f"{number(100 * float((mask == truth)[truth != VOID].mean()), 1)} % right"


def open_picture(root: Path, name: str) -> Image.Image | str:
    """The picture, or a note on why there is none. A path that leaves `root` raises `VssError`."""

    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise VssError(f"the report names the picture {name!r} outside its own folder; move it below {root}.")
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.copy()
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, Image.DecompressionBombError) as error:
        return f"{name} cannot be read ({error})"


def shrink(picture: Image.Image, smooth: bool = True) -> Image.Image:

    picture = picture.convert("RGB")
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)
    return picture


def _paint(labels: np.ndarray, palette: list[list[int]]) -> Image.Image:
    """An indexed picture in the palette's colours; every index beyond it is void."""

    table = [list(VOID_RGB)] * 256
    table[: len(palette)] = [list(colour) for colour in palette]
    picture = Image.fromarray(labels)
    picture = picture.convert("P") if picture.mode != "P" else picture
    picture.putpalette([channel for colour in table for channel in colour])
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.NEAREST)
    return picture


def data_uri(picture: Image.Image, kind: str = "png", **options: object) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options or {"optimize": True})
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def write_data_page(data: SegData, figures: Mapping[str, Any], path: Path, *, images: int = 12) -> Path:
    """Write the page of a data set; `figures` are those of `vss.data.check.check`."""
    jobs = [(split, pair) for split, pairs in data.splits.items() for pair in pairs]
    pictures = []
    for split, pair in _chosen(data, jobs, images):
        try:
            image, mask = data.read(pair)
        except BadSampleError:
            continue  # it is among the problems
        held = [data.class_names[i] for i in np.unique(mask) if i < data.num_classes]
        note = f"{split}, {image.height}x{image.width}: {', '.join(held[:6])}{' and more' if len(held) > 6 else ''}"
        pictures.append((pair.id, note, _jpeg(image), _jpeg(overlay(image, mask, data.palette))))
    context = {
        "figures": figures,
        "classes": _classes(data, figures),
        "splits": {name: _split(facts) for name, facts in figures["splits"].items()},
        "pictures": pictures,
        "void": css(VOID_RGB),
    }
    return write_text(path, str(template("data.html.j2").render(context)))


def overlay(image: Image.Image, mask: np.ndarray, palette: np.ndarray) -> Image.Image:
    """The picture in grey under the colours of the classes; what is ignored is dark."""

    table = np.tile(np.array(VOID_RGB, np.float32), (256, 1))
    table[: len(palette)] = palette
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    return Image.fromarray((OPACITY * table[mask] + (1 - OPACITY) * grey).astype(np.uint8))


def _chosen(data: SegData, jobs: list[tuple[str, Pair]], count: int) -> list[tuple[str, Pair]]:
    """Of every class the first image that shows it, the rarest class first, then images evenly over the set."""
    try:
        present = count_classes(data, [pair for _, pair in jobs]).rows > 0
    except BadSampleError:  # it is among the problems; pictures are taken evenly
        present = np.zeros((len(jobs), data.num_classes), np.bool_)
    taken: list[int] = []
    for label in np.argsort(present.sum(0), kind="stable").tolist():
        shows = np.flatnonzero(present[:, label]).tolist()
        if shows and not present[taken, label].any():
            taken.append(shows[0])
    spread = [index * len(jobs) // max(1, count) for index in range(count)]
    order = list(dict.fromkeys([*taken, *spread]))[: min(count, len(jobs))]
    return [jobs[index] for index in sorted(order)]


def _classes(data: SegData, figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Colour, share of the labelled pixels and number of images of every class, by split."""
    rows = []
    for name, colour in zip(data.class_names, data.palette.tolist(), strict=True):
        facts = [split["classes"][name] for split in figures["splits"].values()]
        shares = [(fact["pixels_pct"], number(fact["pixels_pct"], 2), fact["images"]) for fact in facts]
        rows.append({"name": name, "colour": css(colour), "shares": shares})
    return rows


def _split(facts: Mapping[str, Any]) -> str:
    sizes = facts["sizes"]
    common = ", ".join(f"{count} of {size}" for size, count in sizes["common"].items())
    more = f" and {sizes['distinct'] - len(sizes['common'])} other sizes" if sizes["distinct"] > 5 else ""
    ignored = f", {number(facts['ignored_pct'], 1)} % ignored" if facts["ignored_pct"] else ""
    return f"{counted(facts['pairs'], 'pair')}: {common}{more}{ignored}"


def _jpeg(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    return data_uri(small, "jpeg", quality=85)
