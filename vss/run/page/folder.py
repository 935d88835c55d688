"""A page of overlays of a folder of images and masks: does every mask lie on its image, and what did the check find?"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vss.core.errors import counted
from vss.data import BadSampleError, SegData
from vss.data.counts import count_classes
from vss.run.page.panels import MAX_SIDE, VOID_RGB
from vss.run.page.words import number, template, write_html

if TYPE_CHECKING:
    from PIL import Image

    from vss.data.base import Pair

OPACITY = 0.55


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
        "void": "rgb({},{},{})".format(*VOID_RGB),
    }
    return write_html(path, str(template("data.html.j2").render(context)))


def overlay(image: Image.Image, mask: np.ndarray, palette: np.ndarray) -> Image.Image:
    """The picture in grey under the colours of the classes; what is ignored is dark."""
    from PIL import Image

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
        rows.append({"name": name, "colour": "rgb({},{},{})".format(*colour), "shares": shares})
    return rows


def _split(facts: Mapping[str, Any]) -> str:
    """How many pairs of which sizes."""
    sizes = facts["sizes"]
    common = ", ".join(f"{count} of {size}" for size, count in sizes["common"].items())
    more = f" and {sizes['distinct'] - len(sizes['common'])} other sizes" if sizes["distinct"] > 5 else ""
    ignored = f", {number(facts['ignored_pct'], 1)} % ignored" if facts["ignored_pct"] else ""
    return f"{counted(facts['pairs'], 'pair')}: {common}{more}{ignored}"


def _jpeg(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
