"""The pages of docs/examples run as they stand, where the library that they are about is installed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import vss

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "smp": "segmentation_models_pytorch",
    "timm": "timm",
    "torchvision": "torchvision",
    "transformers": "transformers",
}


def test_every_page_is_run() -> None:
    assert sorted(PACKAGES) == sorted(path.stem for path in (ROOT / "docs/examples").glob("*.md"))


@pytest.mark.parametrize("page", PACKAGES)
def test_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(PACKAGES[page]) is None:
        pytest.skip(f"needs {PACKAGES[page]}")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / f"docs/examples/{page}.md").read_text(), re.M | re.S)
    names: dict[str, object] = {}
    exec(compile(code, f"{page}.md", "exec"), names)
    before, after = (vss.prune.count(names[net], (64, 96))["params_m"] for net in ("net", "again"))  # type: ignore[arg-type]
    assert after < 0.95 * before
    (written,) = tmp_path.glob("*.onnx")
    assert written.stat().st_size > 10_000
