"""Drawing an image and its label mask together, and noise to make surfaces of flat colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]


def shade(colour: Sequence[float], factor: float) -> Colour:
    """A colour made darker (factor below 1) or lighter."""
    red, green, blue = (int(min(255.0, max(0.0, channel * factor))) for channel in colour)
    return red, green, blue


def vary(rng: np.random.Generator, colour: Sequence[float], spread: float) -> Colour:
    """A colour near another: each channel moves by up to `spread`, the whole by up to 15 %."""
    moved = np.asarray(colour) + rng.uniform(-spread, spread, 3)
    return shade(moved.tolist(), rng.uniform(0.85, 1.15))


def smooth_noise(rng: np.random.Generator, size: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """(H, W) float32 of mean 0 and standard deviation about 1: random values on a grid of `cells`, bicubic between."""
    grid = rng.standard_normal(cells, dtype=np.float32)
    field = np.asarray(Image.fromarray(grid).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return field / max(1e-6, float(field.std()))


class Canvas:
    """An RGB image and an 8-bit mask that receive the same shapes; a label of None paints the image alone."""

    def __init__(self, size: tuple[int, int], *, colour: Colour, label: int) -> None:
        self.size = size
        self.image = Image.new("RGB", (size[1], size[0]), colour)
        self.labels = Image.new("L", (size[1], size[0]), label)
        self._paint, self._mark = ImageDraw.Draw(self.image), ImageDraw.Draw(self.labels)

    def polygon(self, points: Sequence[Point], colour: Colour, label: int | None = None) -> None:
        """A filled polygon; points are (x, y)."""
        self._paint.polygon(points, fill=colour)
        if label is not None:
            self._mark.polygon(points, fill=label)

    def box(self, corner: Point, size: Point, colour: Colour, label: int | None = None) -> None:
        """A filled rectangle from its upper left corner (x, y) and its (width, height), at least one pixel."""
        (x, y), (width, height) = corner, size
        bounds = (x, y, x + max(0.0, width - 1), y + max(0.0, height - 1))
        self._paint.rectangle(bounds, fill=colour)
        if label is not None:
            self._mark.rectangle(bounds, fill=label)

    def ellipse(self, centre: Point, radii: Point, colour: Colour, label: int | None = None) -> None:
        """A filled ellipse."""
        (x, y), (across, down) = centre, radii
        bounds = (x - across, y - down, x + across, y + down)
        self._paint.ellipse(bounds, fill=colour)
        if label is not None:
            self._mark.ellipse(bounds, fill=label)

    def ring(self, centre: Point, radius: float, colour: Colour, width: int) -> None:
        """A circle's outline, in the image alone."""
        x, y = centre
        self._paint.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)

    def line(self, points: Sequence[Point], colour: Colour, width: float, label: int | None = None) -> None:
        """A polyline of at least one pixel's width."""
        pixels = max(1, round(width))
        self._paint.line(points, fill=colour, width=pixels, joint="curve")
        if label is not None:
            self._mark.line(points, fill=label, width=pixels, joint="curve")
