"""Grey textured surfaces, some with a scratch, a crack or a blob, as in surface inspection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vss.data.canvas import Point, smooth_noise


def _surface(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32 grey: slow shading, stains, machining lines and grain."""
    height, width = size
    grey = np.full(size, rng.uniform(85, 165), np.float32)
    grey += rng.uniform(3, 10) * smooth_noise(rng, size, (4, 3))
    grey += rng.uniform(2, 6) * smooth_noise(rng, size, (height // 12 + 2, width // 12 + 2))
    lines = (height // 2, 3) if rng.random() < 0.5 else (3, width // 2)
    grey += rng.uniform(1, 6) * smooth_noise(rng, size, lines)
    grey += rng.uniform(2, 6) * rng.standard_normal(size, dtype=np.float32)
    edge = np.abs(np.linspace(-1, 1, width, dtype=np.float32)) ** 6
    return grey - rng.uniform(0, 45) * edge


def _walk(
    rng: np.random.Generator, start: Point, heading: float, steps: int, stride: float, bend: float
) -> list[Point]:
    points = [start]
    for _ in range(steps):
        heading += rng.normal() * bend
        x, y = points[-1]
        points.append((x + stride * float(np.cos(heading)), y + stride * float(np.sin(heading))))
    return points


def _scratch(rng: np.random.Generator, draw: ImageDraw.ImageDraw, start: Point, unit: float) -> None:
    path = _walk(rng, start, rng.uniform(0, 2 * np.pi), int(rng.integers(6, 14)), unit * rng.uniform(0.04, 0.09), 0.12)
    draw.line(path, fill=255, width=int(rng.integers(2, 4)))


def _crack(rng: np.random.Generator, draw: ImageDraw.ImageDraw, start: Point, unit: float) -> None:
    heading = rng.uniform(0, 2 * np.pi)
    path = _walk(rng, start, heading, int(rng.integers(12, 26)), unit * 0.03, 0.55)
    draw.line(path, fill=255, width=int(rng.integers(2, 4)))
    for _ in range(int(rng.integers(1, 4))):
        fork = path[int(rng.integers(2, len(path)))]
        branch = _walk(rng, fork, heading + rng.uniform(-1.4, 1.4), int(rng.integers(4, 10)), unit * 0.03, 0.5)
        draw.line(branch, fill=255, width=2)


def _blob(rng: np.random.Generator, draw: ImageDraw.ImageDraw, start: Point, unit: float) -> None:
    radius = unit * rng.uniform(0.03, 0.1)
    angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    radii = radius * rng.uniform(0.7, 1.3, angles.size)
    stretch = rng.uniform(0.6, 1.6)
    points = zip(start[0] + stretch * radii * np.cos(angles), start[1] + radii * np.sin(angles), strict=True)
    draw.polygon([(float(x), float(y)) for x, y in points], fill=255)


KINDS: tuple[Callable[[np.random.Generator, ImageDraw.ImageDraw, Point, float], None], ...] = (_scratch, _crack, _blob)


def _marks(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """An 8-bit mask with one to three defects; it is never empty."""
    height, width = size
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    kind = KINDS[int(rng.integers(len(KINDS)))]
    for _ in range(int(rng.integers(1, 4))):
        start = (float(rng.uniform(0.15, 0.85) * width), float(rng.uniform(0.15, 0.85) * height))
        kind(rng, draw, start, float(min(2 * width, height)))
    return mask


def draw_surface(rng: np.random.Generator, size: tuple[int, int], *, defective: bool) -> tuple[np.ndarray, np.ndarray]:
    """One surface: (H, W, 3) uint8 grey as RGB, and its mask (H, W) uint8, 0 or 255.

    Sound and defective surfaces both carry harmless stains with soft edges; defects have sharp edges, inside which the
    grey value is shifted by 25..70 of 255, mostly to dark.
    """
    grey = _surface(rng, size)
    for _ in range(int(rng.integers(0, 3))):
        stain = _marks(rng, size).filter(ImageFilter.GaussianBlur(rng.uniform(5, 9)))
        grey += rng.uniform(-28, 28) * np.asarray(stain, np.float32) / 255
    mask = np.zeros(size, np.uint8)
    if defective:
        marks = _marks(rng, size)
        soft = np.asarray(marks.filter(ImageFilter.GaussianBlur(0.7)), np.float32) / 255
        shift = rng.uniform(25, 70) * (1 if rng.random() < 0.25 else -1)
        grey += soft * (shift + 8 * rng.standard_normal(size, dtype=np.float32))
        mask = np.asarray(marks)
    picture = np.clip(grey, 0, 255).astype(np.uint8)
    return np.repeat(picture[..., None], 3, axis=2), mask
