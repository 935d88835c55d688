"""Local weights: every layout that torchvision writes, and no code from any file."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import resnet18

from vss.core.errors import VssError
from vss.models import load_backbone, read_state_dict
from vss.models.torchvision import ResNetFeatures


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    torch.manual_seed(7)
    net = resnet18(weights=None)
    net.bn1.running_mean.normal_()
    return net.state_dict()


def matches(backbone: ResNetFeatures, published: dict[str, Tensor]) -> bool:
    ours = backbone.state_dict()
    renamed = {k.replace("stem.0.", "conv1.").replace("stem.1.", "bn1."): v for k, v in ours.items()}
    assert len(renamed) == len([k for k in published if not k.startswith("fc.")])
    return all(torch.equal(value, published[key]) for key, value in renamed.items())


@pytest.mark.parametrize("layout", ["safetensors", "pth", "state_dict", "module"])
def test_a_torchvision_classifier_fills_the_backbone(layout: str, published: dict, tmp_path: Path) -> None:
    path = tmp_path / ("weights.safetensors" if layout == "safetensors" else "weights.pth")
    if layout == "safetensors":
        save_file(published, path)
    elif layout == "pth":
        torch.save(published, path)
    elif layout == "state_dict":
        torch.save({"epoch": 3, "state_dict": published}, path)
    else:
        torch.save({f"module.{key}": value for key, value in published.items()}, path)
    torch.manual_seed(0)
    backbone = ResNetFeatures(18)
    assert not matches(backbone, published)
    load_backbone(backbone, path)
    assert matches(backbone, published)


def test_weights_of_another_depth_do_not_fit(published: dict, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(published, path)
    with pytest.raises(VssError, match=r"weights\.pth does not fit this backbone: .*layer1\.0\.conv3"):
        load_backbone(ResNetFeatures(50), path)


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("writer", ["torch", "pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_pickle_of_code_is_refused_and_never_run(writer: str, suffix: str, tmp_path: Path) -> None:
    target, path = tmp_path / "created", tmp_path / f"evil{suffix}"
    state = {"conv1.weight": Payload(target)}
    pickle.loads(pickle.dumps(state))["conv1.weight"].close()
    assert target.exists()  # the payload works where code is let run
    target.unlink()
    if writer == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state))
    with pytest.raises(VssError, match=r"cannot be read as weights alone .*re-save"):
        read_state_dict(path)
    with pytest.raises(VssError):
        load_backbone(ResNetFeatures(18), path)
    assert not target.exists()


def test_files_that_hold_no_weights_are_sentences(published: dict, tmp_path: Path) -> None:
    with pytest.raises(VssError, match="does not exist"):
        read_state_dict(tmp_path / "none.pth")
    for name, content in (("empty.pth", b""), ("text.pth", b"not weights"), ("zeros.pt", bytes(64))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VssError, match=r"cannot be read as weights alone \(\w+Error"):
            read_state_dict(tmp_path / name)
    torch.save(published, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    with pytest.raises(VssError, match="cannot be read as weights alone"):
        read_state_dict(tmp_path / "cut.pth")
    for name in ("bad.safetensors", "short.safetensors"):
        (tmp_path / name).write_bytes(b"" if name.startswith("short") else b"no header at all")
        with pytest.raises(VssError, match="truncated or no safetensors file"):
            read_state_dict(tmp_path / name)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "net.pth")
    with pytest.raises(VssError, match=r"\(it holds code, torch\.nn\.modules\.linear\.Linear\)"):
        read_state_dict(tmp_path / "net.pth")
    torch.save({"lr": 0.1, "weights": torch.zeros(2)}, tmp_path / "mixed.pth")
    with pytest.raises(VssError, match="holds no state dict of tensors"):
        read_state_dict(tmp_path / "mixed.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(VssError, match="holds no state dict of tensors"):
        read_state_dict(tmp_path / "list.pth")
