"""Small hand-made data sets, to be damaged by the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Write = Callable[..., Path]


def write_image(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def write() -> Write:
    """write(path, array): save an image, making its folder."""
    return write_image


@pytest.fixture
def camvid_root(tmp_path: Path) -> Path:
    """CamVid layout, 3 train and 1 val pairs of 8x10; masks hold the values 0..11 and differ from image to image."""
    root = tmp_path / "mine"
    for number in range(4):
        split = "val" if number == 3 else "train"
        rng = np.random.default_rng(number)
        write_image(root / split / f"a{number}.png", rng.integers(0, 256, (8, 10, 3), dtype=np.uint8))
        write_image(root / f"{split}annot" / f"a{number}.png", rng.integers(0, 12, (8, 10), dtype=np.uint8))
    return root
