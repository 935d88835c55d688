"""vss.train.tasks.base: every image has files of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vss.train.tasks.base import write_panels


class Split(list[Any]):
    ids = ("a/b", "a_b", "a b")


def test_ids_that_look_alike_have_pictures_of_their_own(tmp_path: Path) -> None:
    split: Any = Split(
        {"image": torch.full((3, 4, 4), 10 * n, dtype=torch.uint8), "mask": torch.full((4, 4), n)} for n in range(3)
    )
    palette = np.arange(9, dtype=np.uint8).reshape(3, 3)
    panels = write_panels(tmp_path, split, range(3), {"engine": lambda _: torch.zeros(1, 4, 4).long()}, palette)
    assert [panel["id"] for panel in panels] == ["a/b", "a_b", "a b"]
    assert len({file for panel in panels for file in panel["files"].values()}) == 9
    for number, panel in enumerate(panels):
        assert np.unique(np.array(Image.open(tmp_path / panel["files"]["image"]))).tolist() == [10 * number]
