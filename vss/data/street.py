"""Streets in one-point perspective, painted with near-flat shapes, texture, light, haze, blur and sensor noise.

The classes are the 11 of CamVid and void. Colours of different classes overlap (grey cars on grey roads, pale houses
under a pale sky), and poles, signs, fences and people are small and rare: a network has to use shape and place too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Point = tuple[float, float]
Wall = Callable[[float, float], Point]
"""(u, v) in 0..1 along and up a wall -> (x, y)."""

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST, VOID = range(12)

COARSE = np.array([0.03, 0.06, 0.02, 0.05, 0.06, 0.16, 0.01, 0.03, 0.03, 0.05, 0.05, 0.08], np.float32)
FINE = np.array([0.005, 0.05, 0.05, 0.045, 0.07, 0.20, 0.02, 0.06, 0.03, 0.06, 0.06, 0.10], np.float32)
"""Relative amplitude of slow and of pixel-wide brightness noise on each class."""

SKIES = ((135, 175, 225), (190, 200, 210), (215, 218, 220), (225, 195, 165), (160, 180, 205))
WALLS = ((150, 90, 75), (185, 170, 145), (125, 120, 118), (205, 200, 190), (165, 130, 100), (95, 100, 110))
FENCES = ((120, 95, 70), (150, 150, 150), (80, 95, 80))
GREENS = ((60, 95, 45), (75, 110, 50), (50, 75, 45), (110, 110, 50), (130, 95, 50))
PAINTS = ((170, 30, 30), (30, 50, 120), (215, 215, 215), (40, 40, 45), (120, 122, 125), (190, 160, 60), (40, 90, 70))
CLOTHES = ((40, 40, 60), (150, 40, 45), (60, 90, 140), (200, 195, 185), (90, 70, 50), (210, 150, 40), (30, 30, 32))
SIGNS = ((190, 35, 40), (40, 80, 170), (235, 235, 230), (225, 190, 50), (40, 120, 70))
LAMPS = ((230, 60, 50), (235, 190, 60), (70, 220, 120))
SKIN = (195, 150, 125)
GREY_ROAD, GREY_PAVEMENT, METAL = (95, 95, 98), (150, 145, 138), (85, 88, 90)


def shade(colour: Sequence[float], factor: float) -> Colour:
    """A colour made darker (factor below 1) or lighter."""
    red, green, blue = (int(min(255.0, max(0.0, channel * factor))) for channel in colour)
    return red, green, blue


def smooth_noise(rng: np.random.Generator, size: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """(H, W) float32 of mean 0 and standard deviation about 1: random values on a grid of `cells`, bicubic between."""
    grid = rng.standard_normal(cells, dtype=np.float32)
    field = np.asarray(Image.fromarray(grid).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return field / max(1e-6, float(field.std()))


class Street:
    """A street in one-point perspective; what is painted with a label enters the mask too.

    Depth runs from 0 (vanishing point) to 1 (lower edge), and sizes of things scale with it; `across` is 0 in the
    middle, 1 at the kerb, 2 at the houses, negative on the left.
    """

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.rng, (self.h, self.w) = rng, size
        self.horizon = self.h * rng.uniform(0.36, 0.50)
        self.vanish = self.w * rng.uniform(0.36, 0.64)
        self.bottom = self.w * rng.uniform(0.40, 0.60)
        self.road = self.w * rng.uniform(0.30, 0.48)
        self.pavement = self.w * rng.uniform(0.12, 0.26)
        self.sky = self.pick(SKIES)
        self.image, self.labels = Image.new("RGB", (self.w, self.h), self.sky), Image.new("L", (self.w, self.h), SKY)
        self._paint, self._mark = ImageDraw.Draw(self.image), ImageDraw.Draw(self.labels)

    def vary(self, colour: Sequence[float], spread: float) -> Colour:
        """A colour near another: each channel moves by up to `spread`, the whole by up to 15 %."""
        moved = np.asarray(colour) + self.rng.uniform(-spread, spread, 3)
        return shade(moved.tolist(), self.rng.uniform(0.85, 1.15))

    def pick(self, colours: Sequence[Colour], spread: float = 12) -> Colour:
        """One of the colours, varied."""
        return self.vary(colours[int(self.rng.integers(len(colours)))], spread)

    def at(self, depth: float, across: float) -> Point:
        """(x, y) of a place on the ground."""
        side, outward = np.sign(across), abs(across)
        half = self.road * min(1.0, outward) + self.pavement * max(0.0, outward - 1)
        x = self.vanish + (self.bottom - self.vanish) * depth + side * half * depth
        return float(x), self.horizon + (self.h - self.horizon) * depth

    def wall(self, across: float, near: float, far: float, height: float) -> Wall:
        """An upright surface along the street; `height` is that at depth 1."""

        def place(u: float, v: float) -> Point:
            depth = far + (near - far) * u
            x, y = self.at(depth, across)
            return x, y - depth * height * v

        return place

    def _draw(
        self, shape: str, points: Sequence[object], colour: Colour | None, label: int | None, **options: object
    ) -> None:
        getattr(self._paint, shape)(points, fill=colour, **options)
        if label is not None:
            getattr(self._mark, shape)(points, fill=label, **options)

    def polygon(self, points: Sequence[Point], colour: Colour, label: int | None = None) -> None:
        """Filled; points are (x, y)."""
        self._draw("polygon", points, colour, label)

    def box(self, corner: Point, size: Point, colour: Colour, label: int | None = None) -> None:
        """From its upper left corner (x, y) and its (width, height), at least one pixel."""
        (x, y), (width, height) = corner, size
        self._draw("rectangle", (x, y, x + max(0.0, width - 1), y + max(0.0, height - 1)), colour, label)

    def ellipse(
        self, centre: Point, radii: Point, colour: Colour | None, label: int | None = None, **options: object
    ) -> None:
        """Filled, or with no colour and `outline` and `width` a ring."""
        (x, y), (across, down) = centre, radii
        self._draw("ellipse", (x - across, y - down, x + across, y + down), colour, label, **options)

    def line(self, points: Sequence[Point], colour: Colour, width: float, label: int | None = None) -> None:
        """A polyline of at least one pixel's width."""
        self._draw("line", points, colour, label, width=max(1, round(width)), joint="curve")

    def strip(self, near: float, far: float, across: float, colour: Colour, label: int | None = None) -> None:
        """The ground between two depths, symmetric about the middle."""
        ends = ((far, -across), (far, across), (near, across), (near, -across))
        self.polygon([self.at(depth, side) for depth, side in ends], colour, label)


def _quad(wall: Wall, u: tuple[float, float], v: tuple[float, float]) -> list[Point]:
    return [wall(u[0], v[0]), wall(u[1], v[0]), wall(u[1], v[1]), wall(u[0], v[1])]


def _background(s: Street) -> None:
    rng = s.rng
    for _ in range(int(rng.integers(0, 6))):
        centre = (rng.uniform(0, s.w), rng.uniform(0, s.horizon * 0.8))
        radii = (rng.uniform(0.05, 0.2) * s.w, rng.uniform(0.01, 0.05) * s.h)
        s.ellipse(centre, radii, shade(s.sky, rng.uniform(1.02, 1.15)))
    s.box((0, s.horizon), (s.w, s.h), s.vary(GREY_PAVEMENT, 15), PAVEMENT)
    left = 0.0
    while left < s.w:
        width, height = rng.uniform(0.06, 0.18) * s.w, rng.uniform(0.03, 0.22) * s.h
        if rng.random() < 0.45:
            s.ellipse((left + width / 2, s.horizon - height / 3), (width * 0.7, height * 0.6), s.pick(GREENS), TREE)
        else:
            s.box((left, s.horizon - height), (width, height + 1), s.pick(WALLS), BUILDING)
        left += width


def _windows(s: Street, wall: Wall, colour: Colour, height: float) -> None:
    glass = s.vary((60, 70, 80) if s.rng.random() < 0.7 else (150, 165, 180), 12)
    columns, rows = int(s.rng.integers(2, 5)), max(1, int(height / s.h * s.rng.uniform(3, 5)))
    for column, row in itertools.product(range(columns), range(rows)):
        u, v = (column + 0.25) / columns, (row + 0.35) / rows
        s.polygon(_quad(wall, (u, u + 0.5 / columns), (v, v + 0.45 / rows)), glass)
    if s.rng.random() < 0.5:
        s.polygon(_quad(wall, (0, 1), (0, 0.25 / rows)), shade(colour, 0.7))


def _fence(s: Street, wall: Wall, colour: Colour, bars: int) -> None:
    s.polygon(_quad(wall, (0, 1), (0, 1)), colour, FENCE)
    for index in range(bars + 1):
        s.line([wall(index / bars, 0), wall(index / bars, 1)], shade(colour, 0.55), 1)
    s.line([wall(0, 1), wall(1, 1)], shade(colour, 0.5), 1)


def _houses(s: Street, side: int) -> None:
    rng = s.rng
    edges = np.cumsum(rng.uniform(0.05, 0.4, 8)) + 0.06
    for far, near in itertools.pairwise([0.05, *edges[edges < 1.1].tolist(), 1.5]):
        if rng.random() < 0.2:
            wall = s.wall(2 * side, near, far, s.h * rng.uniform(0.16, 0.30))
            _fence(s, wall, s.pick(FENCES), int(rng.integers(8, 18)))
            continue
        height = s.h * rng.uniform(0.55, 1.7)
        wall, colour = s.wall(2 * side, near, far, height), s.pick(WALLS, 18)
        s.polygon(_quad(wall, (0, 1), (0, 1)), colour, BUILDING)
        _windows(s, wall, colour, height)


def _ground(s: Street) -> None:
    stone, asphalt = s.vary(GREY_PAVEMENT, 18), s.vary(GREY_ROAD, 12)
    s.strip(1.02, 0.02, 2, stone, PAVEMENT)
    s.strip(1.02, 0.02, 1, asphalt, ROAD)
    for side in (-1, 1):
        s.line([s.at(0.1, side), s.at(1.02, side)], shade(stone, 1.15), 1)
    dash = s.rng.uniform(0.05, 0.12)
    for start in np.arange(0.08, 1.0, 2 * dash):
        s.strip(start + dash, start, 0.02, shade(asphalt, 1.8))


def _tree(s: Street, depth: float, across: float) -> None:
    rng, (x, y), unit = s.rng, s.at(depth, across), s.h * depth
    leaf, top = s.pick(GREENS, 15), y - unit * rng.uniform(0.35, 0.65)
    s.line([(x, y), (x, top)], s.vary((75, 60, 48), 10), 0.05 * unit, TREE)
    spread = unit * rng.uniform(0.12, 0.24)
    for _ in range(12):
        centre = (x + rng.normal() * spread * 0.6, top + rng.normal() * spread * 0.5)
        radii = (spread * rng.uniform(0.4, 0.8), spread * rng.uniform(0.35, 0.7))
        s.ellipse(centre, radii, shade(leaf, rng.uniform(0.65, 1.3)), TREE)


def _pole(s: Street, depth: float, across: float) -> None:
    """A pole with a round or a square sign, a traffic light or an arm."""
    rng, (x, y), unit = s.rng, s.at(depth, across), s.h * depth
    top = y - unit * rng.uniform(0.45, 0.95)
    colour = s.vary(METAL if rng.random() < 0.7 else (165, 165, 160), 15)
    s.line([(x, y), (x, top)], colour, max(2.0, 0.03 * unit), POLE)
    kind, size = rng.random(), max(3.0, unit * rng.uniform(0.04, 0.08))
    if kind < 0.35:
        s.ellipse((x, top), (size, size), s.pick(SIGNS), SIGN)
        s.ellipse((x, top), (size * 0.6, size * 0.6), s.pick(SIGNS))
    elif kind < 0.55:
        s.box((x - 1.3 * size, top), (2.6 * size, 1.8 * size), s.pick(SIGNS), SIGN)
        s.box((x - 0.9 * size, top + 0.7 * size), (1.8 * size, 0.4 * size), s.pick(SIGNS))
    elif kind < 0.75:
        s.box((x - 0.6 * size, top), (1.2 * size, 3 * size), s.vary((35, 35, 35), 8), SIGN)
        lamp = int(rng.integers(3))
        s.ellipse((x, top + size * (0.5 + lamp)), (0.4 * size, 0.4 * size), LAMPS[lamp])
    else:
        s.line([(x, top), (x - np.sign(across) * 0.12 * unit, top)], colour, max(1, 0.02 * unit), POLE)


def _rail(s: Street, depth: float, across: float) -> None:
    far, height = depth * s.rng.uniform(0.5, 0.8), s.h * s.rng.uniform(0.08, 0.14)
    wall = s.wall(np.sign(across) * 1.08, depth, far, height)
    _fence(s, wall, s.vary((130, 132, 135), 20), int(s.rng.integers(6, 14)))


def _shadow(s: Street, x: float, y: float, half: float) -> None:
    s.ellipse((x, y), (half, max(1.0, 0.12 * half)), (48, 48, 52))


def _car(s: Street, depth: float, across: float) -> None:
    (x, y), width = s.at(depth, across), s.w * depth * s.rng.uniform(0.24, 0.34)
    height, paint = width * s.rng.uniform(0.58, 0.75), s.pick(PAINTS, 15)
    half, waist, roof = width / 2, y - height * 0.52, y - height

    def window(low: float, high: float, top: float) -> list[Point]:
        return [(x - half * low, waist), (x - half * high, top), (x + half * high, top), (x + half * low, waist)]

    _shadow(s, x, y, half * 1.1)
    for side in (-1, 1):
        wheel = (x + side * half * 0.72 - 0.11 * width, y - 0.2 * height)
        s.box(wheel, (0.22 * width, 0.24 * height), (28, 28, 30), CAR)
    s.box((x - half, waist), (width, 0.42 * height), paint, CAR)
    s.polygon(window(0.9, 0.68, roof), paint, CAR)
    s.polygon(window(0.74, 0.58, roof + 0.08 * height), s.vary((55, 65, 75), 12))
    lights = (190, 30, 30) if s.rng.random() < 0.6 else (245, 240, 215)
    for side in (-1, 1):
        s.box((x + side * half * 0.8 - 0.08 * width, waist + 0.08 * height), (0.16 * width, 0.1 * height), lights)
    s.box((x - 0.14 * width, y - 0.28 * height), (0.28 * width, 0.09 * height), (225, 220, 190))


def _person(s: Street, x: float, y: float, height: float, label: int) -> None:
    trousers, coat = s.pick(CLOTHES), s.pick(CLOTHES)
    width, stride = height * 0.26, height * s.rng.uniform(0.02, 0.1)
    for side in (-1, 1):
        s.line([(x, y - 0.48 * height), (x + side * stride, y)], trousers, 0.12 * height, label)
    s.box((x - width / 2, y - 0.84 * height), (width, 0.42 * height), coat, label)
    s.ellipse((x, y - 0.92 * height), (0.075 * height, 0.09 * height), s.vary(SKIN, 15), label)


def _pedestrian(s: Street, depth: float, across: float) -> None:
    (x, y), height = s.at(depth, across), max(8.0, s.h * depth * s.rng.uniform(0.30, 0.40))
    _shadow(s, x, y, 0.2 * height)
    _person(s, x, y, height, PEDESTRIAN)


def _bicyclist(s: Street, depth: float, across: float) -> None:
    (x, y), height = s.at(depth, across), max(9.0, s.h * depth * s.rng.uniform(0.30, 0.40))
    radius, gap, frame = 0.19 * height, 0.27 * height, s.pick(PAINTS)
    _shadow(s, x, y, 0.45 * height)
    for side in (-1, 1):
        wheel = (x + side * gap, y - radius)
        s.ellipse(wheel, (radius, radius), shade(GREY_ROAD, 0.9), BICYCLIST)
        s.ellipse(wheel, (radius, radius), None, outline=(25, 25, 28), width=max(1, round(0.05 * height)))
    s.polygon([(x - gap, y - radius), (x, y - 2.2 * radius), (x + gap, y - radius)], frame, BICYCLIST)
    _person(s, x, y - 0.12 * height, 0.9 * height, BICYCLIST)


def _clutter(s: Street, depth: float, across: float) -> None:
    """Something that no class owns: a bin, a box, a cone."""
    rng, (x, y), unit = s.rng, s.at(depth, across), s.h * depth
    width, height, colour = unit * rng.uniform(0.08, 0.2), unit * rng.uniform(0.12, 0.25), s.pick(SIGNS + WALLS, 30)
    if rng.random() < 0.3:
        s.polygon([(x - width / 2, y), (x, y - height), (x + width / 2, y)], colour, VOID)
    else:
        s.box((x - width / 2, y - height), (width, height), colour, VOID)
        s.box((x - width / 2, y - height), (width, 0.2 * height), shade(colour, 0.6))


THINGS: tuple[tuple[Callable[[Street, float, float], None], float, tuple[float, float]], ...] = (
    (_tree, 1.8, (1.35, 1.95)),
    (_pole, 2.4, (1.05, 1.5)),
    (_rail, 0.7, (1.08, 1.08)),
    (_car, 2.2, (0.25, 0.85)),
    (_pedestrian, 2.2, (1.1, 1.9)),
    (_bicyclist, 0.9, (0.5, 0.98)),
    (_clutter, 0.8, (1.1, 1.9)),
)
"""(how to draw it, mean number in a scene, range of its distance from the middle)."""


def _things(s: Street) -> None:
    todo = []
    for draw, mean, (low, high) in THINGS:
        for _ in range(int(s.rng.poisson(mean))):
            across = s.rng.uniform(low, high) * (1 if s.rng.random() < 0.5 else -1)
            todo.append((float(s.rng.uniform(0.25, 0.95)), float(across), draw))
    for depth, across, draw in sorted(todo, key=lambda thing: thing[0]):
        draw(s, depth, across)


def _void_seams(labels: np.ndarray) -> np.ndarray:
    """Annotators leave the seam of foliage and walls unlabelled: one pixel of it becomes void."""
    seam = np.zeros(labels.shape, np.bool_)
    for axis in (0, 1):
        ahead = np.roll(labels, -1, axis)
        seam |= (labels != ahead) & ((labels == TREE) | (ahead == TREE)) & (ahead != VOID)
    return np.where(seam, np.uint8(VOID), labels)


def _light(s: Street, labels: np.ndarray) -> np.ndarray:
    """Texture, haze, exposure and sensor noise on the painted image: (H, W, 3) uint8."""
    rng, size = s.rng, (s.h, s.w)
    picture = np.asarray(s.image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8))), dtype=np.float32)
    texture = COARSE[labels] * smooth_noise(rng, size, (s.h // 8 + 2, s.w // 8 + 2))
    texture += FINE[labels] * rng.standard_normal(size, dtype=np.float32)
    slope = smooth_noise(rng, size, (2, 3)) * rng.uniform(0.02, 0.10)
    picture *= (1 + texture + slope)[..., None]
    rows = np.abs(np.arange(s.h, dtype=np.float32) - s.horizon) / (0.2 * s.h)
    haze = (rng.uniform(0.0, 0.45) * np.exp(-rows)).astype(np.float32)[:, None, None]
    picture = picture * (1 - haze) + np.asarray(s.sky, np.float32) * haze
    gain = rng.uniform(0.65, 1.2) * (1 + rng.uniform(-0.07, 0.07, 3))
    picture = picture * gain.astype(np.float32)
    picture += rng.uniform(2, 7) * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw_street(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """One street: (H, W, 3) uint8 RGB and (H, W) uint8 labels 0..10, 11 = void."""
    s = Street(rng, size)
    _background(s)
    _houses(s, -1)
    _houses(s, 1)
    _ground(s)
    _things(s)
    if rng.random() < 0.15:  # the bonnet of the car that the camera is in
        s.ellipse((s.w * 0.5, s.h * 1.06), (s.w * 0.6, s.h * 0.13), s.pick(PAINTS), VOID)
    labels = np.asarray(s.labels)
    return _light(s, labels), _void_seams(labels) if rng.random() < 0.7 else labels
