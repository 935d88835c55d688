"""`vss evaluate` of a pair: the figures beside accuracy, against what they are by definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vss
from vss import models
from vss.data import Preprocess
from vss.data.readers import CAMVID_NAMES
from vss.run import candidates
from vss.run import candidates as pair

SIZE = (48, 64)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    model = models.build("unet", 11, width=8, depth=1).eval()
    plan = vss.prune.make_plan(model, torch.zeros(1, 3, *SIZE), criterion="l1", budget={"kind": "macs", "keep": 0.5})
    small = vss.prune.apply_plan(model, plan)
    facts = {"preprocess": Preprocess(size=SIZE).model_dump(mode="json"), "classes": CAMVID_NAMES}
    for name, net in (("a", model), ("b", small)):
        vss.save(net, root / f"{name}.safetensors", info={"dataset": "camvid"}, **facts)  # type: ignore[arg-type]
    return root / "a.safetensors", root / "b.safetensors"


def test_agreement_with_itself_and_with_a_cut(nets: tuple[Path, Path], street_root: Path) -> None:
    root = str(street_root)
    same = pair.agreement(nets[0], nets[0], dataset=None, data_root=root, channels=8)
    assert same["reconstruction_mse"] == 0.0 and same["oracle_overlap"] is None and "not cut" in same["oracle_note"]
    found = pair.agreement(nets[0], nets[1], dataset=None, data_root=root, channels=16)
    assert found["oracle_channels"] == 16 and 0 < found["oracle_chance"] < 1
    kept = round(found["oracle_chance"] * 16)
    assert 0 <= found["oracle_overlap"] <= 1 and (found["oracle_overlap"] * kept) == pytest.approx(
        round(found["oracle_overlap"] * kept)
    )
    assert found["reconstruction_mse"] > 0 and found["reconstruction_relative"] > 0


def test_mse_is_the_mean_of_squares(nets: tuple[Path, Path]) -> None:
    from vss.train import checkpoint

    a, b = (checkpoint.read(path) for path in nets)
    x = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, z = a.model(x).double(), b.model(x).double()
    found = pair._moved(a, b, [(x, None)])
    assert found["reconstruction_mse"] == pytest.approx(float((y - z).square().mean()), rel=1e-9)
    assert found["reconstruction_relative"] == pytest.approx(float((y - z).square().mean() / y.square().mean()))


@pytest.mark.parametrize("stable", [True, False])
def test_speed_of_both_in_one_run(nets: tuple[Path, Path], stable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = candidates.bench_engines
    monkeypatch.setattr(candidates, "bench_engines", lambda *a, **k: real(*a, **k) | {"stable": stable})
    rows = [{"name": name, "resolution": list(SIZE)} for name in ("baseline", "candidate")]
    noisy = pair.speed(rows, *nets, seconds=0.4)
    if not stable:
        assert noisy and "too noisy" in noisy
        assert rows == [{"name": row["name"], "resolution": list(SIZE), "stable": False} for row in rows]
        return
    assert noisy is None
    assert rows[0]["speedup"] == 1.0 and rows[1]["speedup"] > 0
    for row in rows:
        assert row["pixels_per_s"] == pytest.approx(row["fps"] * 48 * 64)  # type: ignore[operator]
