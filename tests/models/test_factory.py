"""A function of the user's own builds the network where the user names it, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vss
from vss.core.config import ModelConfig, load_recipe
from vss.core.errors import VssError
from vss.models import MODELS, factory
from vss.run.inputs import require_foreign
from vss.run.project import read_network, try_size
from vss.train import checkpoint
from vss.train.header import header

SOURCE = """
import dataclasses, pathlib
import torch
from torch import nn
pathlib.Path(__file__).with_name("imported").touch()

@dataclasses.dataclass
class Out:
    logits: torch.Tensor

class Mine(nn.Module):
    def __init__(self, classes=5, width=16, kind="tensor"):
        super().__init__()
        self.kind = kind
        self.a = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU())
        self.head = nn.Conv2d(width, classes, 1)
    def forward(self, x):
        assert x.shape[-1] % 8 == 0, "sides are multiples of 8"
        out = self.head(self.a(x))
        many = {"tensor": out, "dict": {"logits": out}, "object": Out(out), "text": "none", "labels": out.argmax(1)}
        return many[self.kind]

def build(num_classes, *, width=16, kind="tensor"):
    return Mine(num_classes, width, kind)

def fixed(width=16):
    return Mine(3, width)

def defect():
    from vss.models import build
    return build("segdecnet", 1)

net = Mine()
number = lambda: 3
def broken(): raise RuntimeError("no licence")
def leaves(): raise SystemExit(2)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The user's module in the working folder, and a registry that forgets it again."""
    (tmp_path / "own_nets.py").write_text(SOURCE)
    (tmp_path / "own_script.py").write_text("import argparse; argparse.ArgumentParser().parse_args(['--epochs'])")
    monkeypatch.chdir(tmp_path)
    MODELS.names()
    monkeypatch.setattr(MODELS, "_items", dict(MODELS._items))
    yield tmp_path
    sys.modules.pop("own_nets", None)


def small_of(mine: Path, classes: int) -> torch.nn.Module:
    """A cut network of the user's class, saved without registering as small.safetensors."""
    sys.path.insert(0, str(mine))
    try:
        import own_nets  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(mine))
    torch.manual_seed(0)
    net = own_nets.Mine(classes).eval()
    small = vss.prune.apply_plan(net, vss.prune.make_plan(net, torch.zeros(1, 3, 32, 32)))
    vss.save(small, mine / "small.safetensors")
    return small


@pytest.mark.parametrize(("target", "classes"), [("build", 4), ("Mine", 6), ("fixed", 3)])
def test_a_factory_takes_a_file_that_knows_nothing_of_it(mine: Path, target: str, classes: int) -> None:
    small, x = small_of(mine, classes), torch.randn(2, 3, 32, 40)
    config = ModelConfig(factory=f"own_nets:{target}")
    require_foreign(config, [mine / "small.safetensors"])
    again = read_network(mine / "small.safetensors", config).model
    assert torch.equal(again.forward_logits(x), small(x)) and again.num_classes == classes  # type: ignore[operator]
    vss.save(again, mine / "again.safetensors")  # and what is written from then on names it
    assert header(mine / "again.safetensors").model == f"own_nets:{target}"
    assert torch.equal(vss.load(mine / "again.safetensors").forward_logits(x), small(x))  # type: ignore[operator]


def test_a_checkpoint_alone_imports_nothing_and_passes_nothing_on(mine: Path) -> None:
    factory.use("own_nets:build", {"width": 8})
    net = vss.models.build("own_nets:build", 4, width=8)
    vss.save(net, mine / "net.safetensors")
    assert torch.equal(
        vss.load(mine / "net.safetensors").state_dict()["net.head.bias"], net.state_dict()["net.head.bias"]
    )
    MODELS._items.pop("own_nets:build")
    sys.modules.pop("own_nets")
    (mine / "imported").unlink()
    with pytest.raises(
        VssError, match=r"holds a 'own_nets:build', which is not registered; .*--model-from MODULE:NAME"
    ):
        vss.load(mine / "net.safetensors")
    with pytest.raises(VssError, match="unknown model 'own_nets:build'"):
        vss.models.build("own_nets:build", 4)
    assert not (mine / "imported").exists()
    factory.use("own_nets:build", {})
    with pytest.raises(VssError, match=r"built it with options .'width': 8.; what a file says is not passed to code"):
        checkpoint.load(mine / "net.safetensors")


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("own_nets", "a factory is MODULE:NAME"),
        ("own_nets:", "a factory is MODULE:NAME"),
        ("absent_nets:build", r"module 'absent_nets' .*cannot be imported .*PYTHONPATH"),
        ("own_nets:biuld", "unknown function of module 'own_nets' 'biuld'. Did you mean 'build'"),
        ("own_nets:net", "is a Mine; expected a function or class"),
        ("own_nets:number", "returns a int; expected a torch.nn.Module"),
        ("own_nets:broken", r"raises RuntimeError when it is called with .*no licence"),
        ("own_nets:leaves", r"raises SystemExit when it is called with .* 2\."),
        ("own_script:build", r"\(SystemExit: 2\); it ends the program when it is imported: .*__main__"),
        ("own_nets:defect", "builds a network of task 'defect'; name its class"),
    ],
)
def test_what_is_no_factory_is_a_sentence(mine: Path, target: str, sentence: str) -> None:
    with pytest.raises(VssError, match=sentence):
        vss.models.build(factory.use(target), 4)


def test_options_and_outputs(mine: Path) -> None:
    name = factory.use("own_nets:build")
    with pytest.raises(VssError, match=r"unknown option of own_nets:build 'widht'. Did you mean 'width'"):
        vss.models.build(name, 4, widht=8)
    for kind in ("dict", "object"):
        assert vss.models.build(name, 4, kind=kind)(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 16, 16)
    with pytest.raises(VssError, match=r"returns a str; expected a tensor, .*forward="):
        try_size(vss.models.build(name, 4, kind="text"), (16, 16))
    with pytest.raises(VssError, match=r"gives torch.int64 \(1, 8, 8\) and no map of scores .*forward="):
        try_size(vss.models.build(name, 4, kind="labels"), (16, 16))
    with pytest.raises(VssError, match=r"does not take images of 16x12 in RGB .*multiples of 8.*--input-size"):
        try_size(vss.models.build(name, 4), (16, 12))
    with pytest.raises(VssError, match="both say which network"):
        load_recipe(None, ["model.name=segnet", "model.factory=own_nets:build"])
    vss.save(vss.models.build("unet", 4, width=4, depth=1), mine / "unet.safetensors")
    with pytest.raises(VssError, match=r"--model-from is for networks that are not registered, and .* holds a 'unet'"):
        require_foreign(ModelConfig(factory="own_nets:build"), [mine / "unet.safetensors"])
