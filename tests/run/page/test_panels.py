"""Pictures: class indices, colours, share of right pixels, the change view."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vss.core.errors import VssError
from vss.data.base import generic_palette
from vss.run.page.panels import BROKEN_RGB, FIXED_RGB, VOID_RGB, WRONG_RGB, change, labels_of, panels


def pixels(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_cells_order_colours_and_accuracy(report: dict[str, Any], tmp_path: Path) -> None:
    found = panels(report, tmp_path)
    ((name, note, cells),) = found.rows
    assert (name, note) == ("0001", "lowest score: 31.5 %")
    assert [cell.name for cell in cells] == [
        "image", "truth", "unpruned", "engine of the pruned network", "change",
    ]  # fmt: skip
    truth = pixels(cells[1].uri)
    assert truth.shape == (12, 16, 3)
    assert truth[5, 0].tolist() == report["palette"][1]
    assert truth[0, 0].tolist() == list(VOID_RGB)
    # 188 pixels are not void; 8 are wrong before, 2 + 3 after
    assert cells[2].note == f"{100 * 180 / 188:.1f} % right"
    assert cells[3].note == f"{100 * 183 / 188:.1f} % right"
    assert found.compared == ("baseline", "engine")
    assert found.legend[0] == ("road", "rgb(128,64,128)") and found.legend[-1][0] == "void"


def test_change_view_counts(report: dict[str, Any], tmp_path: Path) -> None:
    load = {name: Image.open(tmp_path / path) for name, path in report["panels"][0]["files"].items()}
    masks = {name: labels_of(load[name], report["palette"]) for name in ("truth", "baseline", "engine")}
    seen = np.asarray(change(load["image"], masks["truth"], masks["baseline"], masks["engine"]).convert("RGB"))
    counts = {rgb: int((seen == rgb).all(axis=-1).sum()) for rgb in (FIXED_RGB, BROKEN_RGB, WRONG_RGB, VOID_RGB)}
    assert counts == {FIXED_RGB: 6, BROKEN_RGB: 3, WRONG_RGB: 2, VOID_RGB: 4}
    assert seen[8, 8].tolist() == [140, 140, 140]


def test_coloured_masks_are_read_back() -> None:
    palette = [[0, 0, 0], [200, 10, 10], [10, 200, 10]]
    labels = np.array([[0, 1], [2, 255]], np.uint8)
    picture = Image.fromarray(np.array([*palette, [1, 2, 3]], np.uint8)[[[0, 1], [2, 3]]])
    assert labels_of(picture, palette).tolist() == labels.tolist()


def test_without_a_palette_colours_are_those_of_voc() -> None:
    assert generic_palette(6).tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [128, 128, 0],
        [0, 0, 128],
        [128, 0, 128],
    ]


def test_missing_and_damaged_pictures_are_named(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "panels/engine.png").unlink()
    (tmp_path / "panels/baseline.png").write_bytes(b"not a picture")
    ((_, _, cells),) = panels(report, tmp_path).rows
    notes = {cell.name: cell.note for cell in cells}
    assert notes["engine of the pruned network"] == "panels/engine.png is missing"
    assert notes["unpruned"].startswith("panels/baseline.png cannot be read")
    assert "change" not in notes


def test_large_pictures_are_embedded_small(report: dict[str, Any], tmp_path: Path) -> None:
    Image.new("RGB", (2048, 1024), (10, 20, 30)).save(tmp_path / "panels/image.png")
    ((_, _, cells),) = panels(report, tmp_path).rows
    assert pixels(cells[0].uri).shape == (320, 640, 3)


def test_a_path_that_leaves_the_folder_is_refused(report: dict[str, Any], tmp_path: Path) -> None:
    report["panels"][0]["files"]["image"] = "../secret.png"
    with pytest.raises(VssError, match="outside its own folder"):
        panels(report, tmp_path)
