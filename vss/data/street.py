"""A crude street in one-point perspective, with the 11 classes of CamVid and void.

`draw_street` composes a scene from near-flat shapes and gives it texture, light, haze, blur and sensor noise. Colours
of different classes overlap (grey cars on grey roads, pale houses under a pale sky), and poles, signs, fences and
people are small and rare, so that a net has to use shape and place too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from PIL import ImageFilter

from vss.data.canvas import Canvas, Colour, Point, shade, smooth_noise, vary

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST, VOID = range(12)

COARSE = np.array([0.03, 0.06, 0.02, 0.05, 0.06, 0.16, 0.01, 0.03, 0.03, 0.05, 0.05, 0.08], np.float32)
FINE = np.array([0.005, 0.05, 0.05, 0.045, 0.07, 0.20, 0.02, 0.06, 0.03, 0.06, 0.06, 0.10], np.float32)
"""Relative amplitude of slow and of pixel-wide brightness noise on each class."""

SKIES = ((135, 175, 225), (190, 200, 210), (215, 218, 220), (225, 195, 165), (160, 180, 205))
WALLS = ((150, 90, 75), (185, 170, 145), (125, 120, 118), (205, 200, 190), (165, 130, 100), (95, 100, 110))
GREENS = ((60, 95, 45), (75, 110, 50), (50, 75, 45), (110, 110, 50), (130, 95, 50))
PAINTS = ((170, 30, 30), (30, 50, 120), (215, 215, 215), (40, 40, 45), (120, 122, 125), (190, 160, 60), (40, 90, 70))
CLOTHES = ((40, 40, 60), (150, 40, 45), (60, 90, 140), (200, 195, 185), (90, 70, 50), (210, 150, 40), (30, 30, 32))
SIGNS = ((190, 35, 40), (40, 80, 170), (235, 235, 230), (225, 190, 50), (40, 120, 70))
SKIN = (195, 150, 125)
GREY_ROAD, GREY_PAVEMENT, METAL = (95, 95, 98), (150, 145, 138), (85, 88, 90)


def pick(rng: np.random.Generator, colours: tuple[Colour, ...], spread: float = 12) -> Colour:
    """One of the colours, varied."""
    return vary(rng, colours[int(rng.integers(len(colours)))], spread)


class Street:
    """One scene: the geometry of the street and the canvas.

    Depth runs from 0 (vanishing point) to 1 (lower edge); sizes of things scale with it. `side` is -1 (left) or 1.
    """

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.rng, (self.h, self.w) = rng, size
        self.horizon = self.h * rng.uniform(0.36, 0.50)
        self.vanish = self.w * rng.uniform(0.36, 0.64)
        self.bottom = self.w * rng.uniform(0.40, 0.60)
        self.road = self.w * rng.uniform(0.30, 0.48)
        self.pavement = self.w * rng.uniform(0.12, 0.26)
        self.sky = pick(rng, SKIES)
        self.canvas = Canvas(size, colour=self.sky, label=SKY)

    def y(self, depth: float) -> float:
        """The image row of the ground at a depth."""
        return self.horizon + (self.h - self.horizon) * depth

    def x(self, depth: float, across: float) -> float:
        """The image column at a depth; `across` is 0 in the middle, 1 at the kerb, 2 at the houses, signed."""
        side, outward = np.sign(across), abs(across)
        half = self.road * min(1.0, outward) + self.pavement * max(0.0, outward - 1)
        return float(self.vanish + (self.bottom - self.vanish) * depth + side * half * depth)

    def wall(self, side: int, near: float, far: float, heights: tuple[float, float]) -> Callable[[float, float], Point]:
        """(u, v) in 0..1 along and up a wall at the houses' line -> (x, y); `heights` at depth 1, top and bottom."""

        def at(u: float, v: float) -> Point:
            depth = far + (near - far) * u
            return self.x(depth, 2 * side), self.y(depth) - depth * (heights[1] + (heights[0] - heights[1]) * v)

        return at


def _quad(at: Callable[[float, float], Point], u: tuple[float, float], v: tuple[float, float]) -> list[Point]:
    return [at(u[0], v[0]), at(u[1], v[0]), at(u[1], v[1]), at(u[0], v[1])]


def _background(street: Street) -> None:
    rng, canvas = street.rng, street.canvas
    for _ in range(int(rng.integers(0, 6))):
        centre = (rng.uniform(0, street.w), rng.uniform(0, street.horizon * 0.8))
        radii = (rng.uniform(0.05, 0.2) * street.w, rng.uniform(0.01, 0.05) * street.h)
        canvas.ellipse(centre, radii, shade(street.sky, rng.uniform(1.02, 1.15)))
    canvas.box((0, street.horizon), (street.w, street.h), vary(rng, GREY_PAVEMENT, 15), PAVEMENT)
    left = 0.0
    while left < street.w:
        width, height = rng.uniform(0.06, 0.18) * street.w, rng.uniform(0.03, 0.22) * street.h
        if rng.random() < 0.45:
            centre = (left + width / 2, street.horizon - height / 3)
            canvas.ellipse(centre, (width * 0.7, height * 0.6), pick(rng, GREENS), TREE)
        else:
            canvas.box((left, street.horizon - height), (width, height + 1), pick(rng, WALLS), BUILDING)
        left += width


def _windows(street: Street, at: Callable[[float, float], Point], wall: Colour, height: float) -> None:
    rng = street.rng
    glass = vary(rng, (60, 70, 80) if rng.random() < 0.7 else (150, 165, 180), 12)
    columns, rows = int(rng.integers(2, 5)), max(1, int(height / street.h * rng.uniform(3, 5)))
    for column in range(columns):
        for row in range(rows):
            u, v = (column + 0.25) / columns, (row + 0.35) / rows
            street.canvas.polygon(_quad(at, (u, u + 0.5 / columns), (v, v + 0.45 / rows)), glass)
    if rng.random() < 0.5:
        street.canvas.polygon(_quad(at, (0, 1), (0, 0.25 / rows)), shade(wall, 0.7))


def _bars(street: Street, at: Callable[[float, float], Point], colour: Colour, count: int) -> None:
    for index in range(count + 1):
        street.canvas.line([at(index / count, 0), at(index / count, 1)], shade(colour, 0.55), 1)
    street.canvas.line([at(0, 1), at(1, 1)], shade(colour, 0.5), 1)


def _houses(street: Street, side: int) -> None:
    rng = street.rng
    edges = np.cumsum(rng.uniform(0.05, 0.4, 8)) + 0.06
    for far, near in itertools.pairwise([0.05, *edges[edges < 1.1].tolist(), 1.5]):
        if rng.random() < 0.2:
            at = street.wall(side, near, far, (street.h * rng.uniform(0.16, 0.30), 0))
            colour = pick(rng, ((120, 95, 70), (150, 150, 150), (80, 95, 80)))
            street.canvas.polygon(_quad(at, (0, 1), (0, 1)), colour, FENCE)
            _bars(street, at, colour, int(rng.integers(8, 18)))
            continue
        height = street.h * rng.uniform(0.55, 1.7)
        at, colour = street.wall(side, near, far, (height, 0)), pick(rng, WALLS, 18)
        street.canvas.polygon(_quad(at, (0, 1), (0, 1)), colour, BUILDING)
        _windows(street, at, colour, height)


def _ground(street: Street) -> None:
    rng, canvas, far = street.rng, street.canvas, 0.02
    stone, asphalt = vary(rng, GREY_PAVEMENT, 18), vary(rng, GREY_ROAD, 12)
    corners = [(street.x(d, a), street.y(d)) for d, a in ((far, -2), (far, 2), (1.02, 2), (1.02, -2))]
    canvas.polygon(corners, stone, PAVEMENT)
    corners = [(street.x(d, a), street.y(d)) for d, a in ((far, -1), (far, 1), (1.02, 1), (1.02, -1))]
    canvas.polygon(corners, asphalt, ROAD)
    for side in (-1, 1):
        kerb = [(street.x(d, side), street.y(d)) for d in (0.1, 1.02)]
        canvas.line(kerb, shade(stone, 1.15), 1)
    dash = rng.uniform(0.05, 0.12)
    for start in np.arange(0.08, 1.0, 2 * dash):
        ends = (start, start + dash)
        corners = [
            (street.x(d, s * 0.02), street.y(d)) for d, s in ((ends[0], -1), (ends[0], 1), (ends[1], 1), (ends[1], -1))
        ]
        canvas.polygon(corners, shade(asphalt, 1.8))


def _tree(street: Street, depth: float, across: float) -> None:
    rng, canvas = street.rng, street.canvas
    x, y, unit = street.x(depth, across), street.y(depth), street.h * depth
    leaf, top = pick(rng, GREENS, 15), y - unit * rng.uniform(0.35, 0.65)
    canvas.line([(x, y), (x, top)], vary(rng, (75, 60, 48), 10), 0.05 * unit, TREE)
    spread = unit * rng.uniform(0.12, 0.24)
    for _ in range(12):
        centre = (x + rng.normal() * spread * 0.6, top + rng.normal() * spread * 0.5)
        radii = (spread * rng.uniform(0.4, 0.8), spread * rng.uniform(0.35, 0.7))
        canvas.ellipse(centre, radii, shade(leaf, rng.uniform(0.65, 1.3)), TREE)


def _pole(street: Street, depth: float, across: float) -> None:
    rng, canvas = street.rng, street.canvas
    x, y, unit = street.x(depth, across), street.y(depth), street.h * depth
    top = y - unit * rng.uniform(0.45, 0.95)
    colour = vary(rng, METAL if rng.random() < 0.7 else (165, 165, 160), 15)
    canvas.line([(x, y), (x, top)], colour, max(2.0, 0.03 * unit), POLE)
    kind, size = rng.random(), max(3.0, unit * rng.uniform(0.04, 0.08))
    if kind < 0.35:
        canvas.ellipse((x, top), (size, size), pick(rng, SIGNS), SIGN)
        canvas.ellipse((x, top), (size * 0.6, size * 0.6), pick(rng, SIGNS))
    elif kind < 0.55:
        canvas.box((x - 1.3 * size, top), (2.6 * size, 1.8 * size), pick(rng, SIGNS), SIGN)
        canvas.box((x - 0.9 * size, top + 0.7 * size), (1.8 * size, 0.4 * size), pick(rng, SIGNS))
    elif kind < 0.75:
        canvas.box((x - 0.6 * size, top), (1.2 * size, 3 * size), vary(rng, (35, 35, 35), 8), SIGN)
        lamp = int(rng.integers(3))
        light = ((230, 60, 50), (235, 190, 60), (70, 220, 120))[lamp]
        canvas.ellipse((x, top + size * (0.5 + lamp)), (0.4 * size, 0.4 * size), light)
    else:
        canvas.line([(x, top), (x - np.sign(across) * 0.12 * unit, top)], colour, max(1, 0.02 * unit), POLE)


def _rail(street: Street, depth: float, across: float) -> None:
    rng = street.rng
    far, height = depth * rng.uniform(0.5, 0.8), street.h * rng.uniform(0.08, 0.14)

    def at(u: float, v: float) -> Point:
        here = far + (depth - far) * u
        return street.x(here, np.sign(across) * 1.08), street.y(here) - here * height * v

    colour = vary(rng, (130, 132, 135), 20)
    street.canvas.polygon(_quad(at, (0, 1), (0, 1)), colour, FENCE)
    _bars(street, at, colour, int(rng.integers(6, 14)))


def _shadow(street: Street, x: float, y: float, half: float) -> None:
    street.canvas.ellipse((x, y), (half, max(1.0, 0.12 * half)), (48, 48, 52))


def _car(street: Street, depth: float, across: float) -> None:
    rng, canvas = street.rng, street.canvas
    x, y, width = street.x(depth, across), street.y(depth), street.w * depth * rng.uniform(0.24, 0.34)
    height, paint = width * rng.uniform(0.58, 0.75), pick(rng, PAINTS, 15)
    half, waist = width / 2, y - height * 0.52
    _shadow(street, x, y, half * 1.1)
    for side in (-1, 1):
        canvas.box(
            (x + side * half * 0.72 - 0.11 * width, y - 0.2 * height), (0.22 * width, 0.24 * height), (28, 28, 30), CAR
        )
    canvas.box((x - half, waist), (width, 0.42 * height), paint, CAR)
    roof = y - height
    canvas.polygon(
        [(x - half * 0.9, waist), (x - half * 0.68, roof), (x + half * 0.68, roof), (x + half * 0.9, waist)], paint, CAR
    )
    glass = [(x - half * 0.74, waist), (x - half * 0.58, roof + 0.08 * height), (x + half * 0.58, roof + 0.08 * height)]
    canvas.polygon([*glass, (x + half * 0.74, waist)], vary(rng, (55, 65, 75), 12))
    lights = (190, 30, 30) if rng.random() < 0.6 else (245, 240, 215)
    for side in (-1, 1):
        canvas.box((x + side * half * 0.8 - 0.08 * width, waist + 0.08 * height), (0.16 * width, 0.1 * height), lights)
    canvas.box((x - 0.14 * width, y - 0.28 * height), (0.28 * width, 0.09 * height), (225, 220, 190))


def _person(street: Street, x: float, y: float, height: float, label: int) -> None:
    rng, canvas = street.rng, street.canvas
    trousers, coat = pick(rng, CLOTHES), pick(rng, CLOTHES)
    width, stride = height * 0.26, height * rng.uniform(0.02, 0.1)
    for side in (-1, 1):
        canvas.line([(x, y - 0.48 * height), (x + side * stride, y)], trousers, 0.12 * height, label)
    canvas.box((x - width / 2, y - 0.84 * height), (width, 0.42 * height), coat, label)
    canvas.ellipse((x, y - 0.92 * height), (0.075 * height, 0.09 * height), vary(rng, SKIN, 15), label)


def _pedestrian(street: Street, depth: float, across: float) -> None:
    x, y = street.x(depth, across), street.y(depth)
    height = max(8.0, street.h * depth * street.rng.uniform(0.30, 0.40))
    _shadow(street, x, y, 0.2 * height)
    _person(street, x, y, height, PEDESTRIAN)


def _bicyclist(street: Street, depth: float, across: float) -> None:
    rng, canvas = street.rng, street.canvas
    x, y, height = street.x(depth, across), street.y(depth), max(9.0, street.h * depth * rng.uniform(0.30, 0.40))
    radius, gap, frame = 0.19 * height, 0.27 * height, pick(rng, PAINTS)
    _shadow(street, x, y, 0.45 * height)
    for side in (-1, 1):
        centre = (x + side * gap, y - radius)
        canvas.ellipse(centre, (radius, radius), shade(GREY_ROAD, 0.9), BICYCLIST)
        canvas.ring(centre, radius, (25, 25, 28), max(1, round(0.05 * height)))
    canvas.polygon([(x - gap, y - radius), (x, y - 2.2 * radius), (x + gap, y - radius)], frame, BICYCLIST)
    _person(street, x, y - 0.12 * height, 0.9 * height, BICYCLIST)


def _clutter(street: Street, depth: float, across: float) -> None:
    """Something that no class owns: a bin, a box, a cone."""
    rng, canvas = street.rng, street.canvas
    x, y, unit = street.x(depth, across), street.y(depth), street.h * depth
    width, height, colour = unit * rng.uniform(0.08, 0.2), unit * rng.uniform(0.12, 0.25), pick(rng, SIGNS + WALLS, 30)
    if rng.random() < 0.3:
        canvas.polygon([(x - width / 2, y), (x, y - height), (x + width / 2, y)], colour, VOID)
    else:
        canvas.box((x - width / 2, y - height), (width, height), colour, VOID)
        canvas.box((x - width / 2, y - height), (width, 0.2 * height), shade(colour, 0.6))


THINGS: tuple[tuple[Callable[[Street, float, float], None], float, tuple[float, float]], ...] = (
    (_tree, 1.8, (1.35, 1.95)),
    (_pole, 2.4, (1.05, 1.5)),
    (_rail, 0.7, (1.08, 1.08)),
    (_car, 2.2, (0.25, 0.85)),
    (_pedestrian, 2.2, (1.1, 1.9)),
    (_bicyclist, 0.9, (0.5, 0.98)),
    (_clutter, 0.8, (1.1, 1.9)),
)
"""(how to draw it, mean number in a scene, range of its distance from the middle: 1 kerb, 2 houses)."""


def _things(street: Street) -> None:
    rng, todo = street.rng, []
    for draw, mean, (low, high) in THINGS:
        for _ in range(int(rng.poisson(mean))):
            across = rng.uniform(low, high) * (1 if rng.random() < 0.5 else -1)
            todo.append((float(rng.uniform(0.25, 0.95)), float(across), draw))
    for depth, across, draw in sorted(todo, key=lambda thing: thing[0]):
        draw(street, depth, across)


def _bonnet(street: Street) -> None:
    colour = pick(street.rng, PAINTS)
    street.canvas.ellipse((street.w * 0.5, street.h * 1.06), (street.w * 0.6, street.h * 0.13), colour, VOID)


def _void_seams(labels: np.ndarray) -> np.ndarray:
    """Annotators leave the seam of foliage and walls unlabelled: one pixel of it becomes void."""
    seam = np.zeros(labels.shape, np.bool_)
    for axis in (0, 1):
        ahead = np.roll(labels, -1, axis)
        seam |= (labels != ahead) & ((labels == TREE) | (ahead == TREE)) & (ahead != VOID)
    return np.where(seam, np.uint8(VOID), labels)


def _light(street: Street, labels: np.ndarray) -> np.ndarray:
    """Texture, haze, exposure and sensor noise on the painted image: (H, W, 3) uint8."""
    rng, size = street.rng, (street.h, street.w)
    blurred = street.canvas.image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    picture = np.asarray(blurred, dtype=np.float32)
    texture = COARSE[labels] * smooth_noise(rng, size, (street.h // 8 + 2, street.w // 8 + 2))
    texture += FINE[labels] * rng.standard_normal(size, dtype=np.float32)
    slope = smooth_noise(rng, size, (2, 3)) * rng.uniform(0.02, 0.10)
    picture *= (1 + texture + slope)[..., None]
    rows = np.abs(np.arange(street.h, dtype=np.float32) - street.horizon) / (0.2 * street.h)
    haze = (rng.uniform(0.0, 0.45) * np.exp(-rows)).astype(np.float32)[:, None, None]
    picture = picture * (1 - haze) + np.asarray(street.sky, np.float32) * haze
    gain = rng.uniform(0.65, 1.2) * (1 + rng.uniform(-0.07, 0.07, 3))
    picture = picture * gain.astype(np.float32)
    picture += rng.uniform(2, 7) * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw_street(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """One street: (H, W, 3) uint8 RGB and (H, W) uint8 labels 0..10, 11 = void."""
    street = Street(rng, size)
    _background(street)
    _houses(street, -1)
    _houses(street, 1)
    _ground(street)
    _things(street)
    if rng.random() < 0.15:
        _bonnet(street)
    labels = np.asarray(street.canvas.labels)
    return _light(street, labels), _void_seams(labels) if rng.random() < 0.7 else labels
