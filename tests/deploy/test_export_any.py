"""Any module becomes an ONNX file that answers as it does: its own inputs, outputs and numbers of channels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.deploy import export
from vss.deploy.profile.setting import SlicedVariants
from vss.models import wrap
from vss.prune import find_groups
from vss.prune.apply import cut


@dataclasses.dataclass
class Out:
    logits: Tensor
    depth: Tensor


class RGBD(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(1, 8, 3, 2, 1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, rgb: Tensor, depth: Tensor, scale: float = 1.0) -> Any:
        x = torch.cat([self.a(rgb).relu(), self.d(depth).relu()], 1)
        return Out(self.head(x) * scale, x.mean((1, 2, 3)))


def body(channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()


def run(path: Path, **feed: Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(None, {name: x.numpy() for name, x in feed.items()}), strict=True))


RGB, DEPTH = torch.randn(1, 3, 32, 48), torch.randn(1, 1, 32, 48)


@pytest.mark.parametrize("example", [(RGB, DEPTH), {"rgb": RGB, "depth": DEPTH, "scale": 2.0}], ids=["tuple", "dict"])
def test_several_inputs_and_an_object(example: Any, tmp_path: Path) -> None:
    net = RGBD().eval()
    report = export(net, tmp_path / "net.onnx", example=example)
    assert report["inputs"]["depth"] == {"dtype": "float32", "shape": ["batch", 1, 32, 48]}
    assert report["parity"]["max_rel"] < 1e-4 and len(report["parity"]["shapes"]) == 3
    scale = example["scale"] if isinstance(example, dict) else 1.0
    rgb, depth = torch.randn(3, 3, 32, 48), torch.randn(3, 1, 32, 48)
    found, wanted = run(tmp_path / "net.onnx", rgb=rgb, depth=depth), net(rgb, depth, scale)
    assert list(found) == ["logits", "depth_out"]  # the input has the name itself
    for got, want in zip(found.values(), (wanted.logits, wanted.depth), strict=True):
        assert np.allclose(got, want.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(channels: int, tmp_path: Path) -> None:
    net, x = body(channels), torch.randn(2, channels, 32, 48)
    report = export(net, tmp_path / "net.onnx", example=x, batch=2)
    assert report["inputs"]["image"]["shape"] == [2, channels, 32, 48]
    assert np.allclose(run(tmp_path / "net.onnx", image=x)["logits"], net(x).detach().numpy(), atol=1e-5)
    model = wrap(net, num_classes=5)
    report = export(model, tmp_path / "net.onnx", size=(32, 48), batch=1)
    assert report["outputs"]["logits"]["shape"] == [1, 5, 32, 48]
    assert np.allclose(run(tmp_path / "net.onnx", image=x[:1])["logits"], model(x[:1]).detach().numpy(), atol=1e-5)


def test_a_plain_network_of_images_gives_labels(tmp_path: Path) -> None:
    net, x = body(3), torch.randn(2, 3, 32, 48)
    for asked in ({"size": (32, 48)}, {"example": x}):
        report = export(net, tmp_path / "net.onnx", labels=True, **asked)  # type: ignore[arg-type]
        assert report["outputs"] == {"labels": {"dtype": "int32", "shape": ["batch", 32, 48]}}
    wanted = wrap(net, num_classes=5).predict(x)
    assert (run(tmp_path / "net.onnx", image=x)["labels"] == wanted.numpy()).mean() > 0.999


def test_what_cannot_be_is_a_sentence(tmp_path: Path) -> None:
    class Text(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return "no tensor"

    path, x = tmp_path / "net.onnx", torch.zeros(1, 3, 32, 32)
    with pytest.raises(VssError, match=r"the output is a str in which no tensor was found; give forward="):
        export(Text(), path, example=x)
    with pytest.raises(VssError, match=r"does not take the example .*'image': \(1, 4, 32, 32\).*forward="):
        export(body(3), path, example=torch.zeros(1, 4, 32, 32))
    with pytest.raises(VssError, match="returns a str; expected a tensor"):
        export(Text(), path, size=(32, 32))
    with pytest.raises(VssError, match="labels is for images of a size"):
        export(RGBD(), path, example=(RGB, DEPTH), labels=True)
    with pytest.raises(VssError, match=r"give size=\(H, W\) for images, or example="):
        export(body(3), path)
    assert not path.exists()
    report = export(
        RGBD(), path, example=torch.zeros(1, 4, 16, 16), forward=lambda net, x: net(x[:, :3], x[:, 3:]).logits
    )
    assert report["outputs"]["logits"]["shape"] == ["batch", 5, 8, 8]


class Unprintable(nn.Module):
    """A layer of another library that fails at being printed; or at being traced, by an error that is not torch's."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.fails = fails

    def __repr__(self) -> str:
        raise KeyError("alpha")

    def forward(self, x: Tensor) -> Tensor:
        if self.fails and torch.compiler.is_exporting():
            raise KeyError("not while traced")
        return x * 2


@pytest.mark.parametrize("asked", [{"size": (16, 24)}, {"example": torch.randn(2, 3, 16, 24)}], ids=["size", "example"])
def test_a_layer_that_cannot_be_printed_is_exported(asked: dict[str, Any], tmp_path: Path) -> None:
    net = nn.Sequential(body(3), Unprintable(fails=False)).eval()
    assert export(net, tmp_path / "net.onnx", **asked)["parity"]["max_rel"] < 1e-4
    with pytest.raises(VssError, match=r"cannot be exported to ONNX opset .* traced"):
        export(nn.Sequential(body(3), Unprintable(fails=True)).eval(), tmp_path / "other.onnx", **asked)
    assert not (tmp_path / "other.onnx").exists()


class Twice(nn.Module):
    """Its first block is registered again behind the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 5, 1)
        self.again = nn.ModuleList([self.a, self.b])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again[1](self.again[0](x).relu()).relu())


@pytest.mark.parametrize("asked", [{"size": (16, 24)}, {"example": torch.randn(2, 3, 16, 24)}], ids=["size", "example"])
def test_weights_are_named_as_in_a_plan(asked: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Twice().eval(), torch.randn(2, 3, 16, 24)
    export(net, tmp_path / "net.onnx", **asked)
    file = onnx.load(tmp_path / "net.onnx")
    named = {each.name for each in file.graph.initializer if each.name.startswith("model.")}
    assert named == {f"model.{name}" for name, _ in net.named_parameters()}
    groups = list(find_groups(net, x))
    assert [group.id for group in groups] == ["a", "b"]
    SlicedVariants(tmp_path / "net.onnx", groups).write([5, 3], tmp_path / "cut.onnx")
    small = cut(net, groups, {"a": torch.arange(5), "b": torch.arange(3)})
    assert np.allclose(run(tmp_path / "cut.onnx", image=x)["logits"], small(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("asked", [{"size": (16, 24)}, {"example": torch.randn(2, 3, 16, 24)}], ids=["size", "example"])
def test_parametrised_weights_are_plain_ones_in_the_file(asked: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval(),
        torch.randn(2, 3, 16, 24),
    )
    nn.utils.parametrizations.orthogonal(net[0])
    nn.utils.parametrizations.weight_norm(net[2])
    wanted = net(x)
    export(net, tmp_path / "net.onnx", **asked)
    named = {each.name for each in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert named == {f"model.{layer}.{leaf}" for layer in "02" for leaf in ("weight", "bias")}
    assert np.allclose(run(tmp_path / "net.onnx", image=x)["logits"], wanted.detach().numpy(), atol=1e-5)
    assert torch.equal(net(x), wanted) and nn.utils.parametrize.is_parametrized(net[0])  # untouched
