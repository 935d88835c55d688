"""What every network here promises about shapes, sizes and labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss import models
from vss.core.errors import VssError
from vss.models import SegModel, check_multiple

NETS = {
    "unet": lambda: models.build("unet", 5, width=4, depth=2),
    "unet bilinear": lambda: models.build("unet", 5, width=4, depth=2, up="bilinear"),
    "resnet18_seg": lambda: models.build("resnet18_seg", 5, decoder=8),
    "resnet50_seg": lambda: models.build("resnet50_seg", 5, decoder=8, dilate=(False, True, True)),
}


@pytest.fixture(scope="module", params=NETS)
def net(request: pytest.FixtureRequest) -> SegModel:
    """With batch-norm statistics of its own activations, as after training: logits of a sane size."""
    torch.manual_seed(0)
    net = NETS[request.param]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net.train()(torch.randn(8, 3, 64, 64))
    return net.eval()


@torch.no_grad()
def test_forward_is_the_resized_head_and_predict_its_argmax(net: SegModel) -> None:
    x = torch.randn(2, 3, 32, 48)
    logits, head = net(x), net.forward_logits(x)
    assert logits.shape == (2, 5, 32, 48) and logits.dtype == torch.float32
    if head.shape[-2:] == (32, 48):
        wanted = head
    else:
        assert head.shape == (2, 5, 8, 12)
        wanted = F.interpolate(head, size=(32, 48), mode="bilinear", align_corners=False)
    assert torch.equal(logits, wanted)
    labels = net.predict(x)
    assert labels.shape == (2, 32, 48) and labels.dtype == torch.uint8
    top = logits.topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1]) > 1e-4  # two classes nearer than rounding may swap
    assert clear.float().mean() > 0.85
    assert torch.equal(labels[clear], logits.argmax(1).to(torch.uint8)[clear])
    assert len(labels.unique()) > 1
    train = net.forward_train(x)
    assert list(train) == ["out"] and torch.equal(train["out"], logits)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours(net: SegModel) -> None:
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]), rtol=1e-4, atol=1e-4)


def test_every_parameter_learns(net: SegModel) -> None:
    loss = sum(out.square().mean() for out in net.forward_train(torch.randn(2, 3, 32, 32)).values())
    grads = torch.autograd.grad(loss, list(net.parameters()))
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize(
    ("size", "wanted"), [((33, 48), "36,48"), ((32, 50), "32,52"), ((1, 1), "4,4"), ((30, 47), "32,48")]
)
def test_a_size_that_does_not_fit_names_the_one_to_pad_to(size: tuple[int, int], wanted: str) -> None:
    unet = NETS["unet"]().eval()
    sentence = rf"unet needs .* multiples of 4, got {size[0]}x{size[1]}; give --input-size {wanted} "
    for call in (unet, unet.predict):
        with pytest.raises(VssError, match=sentence):
            call(torch.zeros(1, 3, *size))


def test_check_multiple_accepts_what_fits() -> None:
    assert check_multiple("n", (64, 32), 32) is None
    with pytest.raises(VssError, match="give --input-size 96,32 "):
        check_multiple("n", (65, 32), 32)


@torch.no_grad()
def test_any_size_fits_a_network_without_a_multiple() -> None:
    net = NETS["resnet18_seg"]().eval()
    assert net.size_multiple == 1
    x = torch.randn(1, 3, 37, 51)
    assert net(x).shape == (1, 5, 37, 51) and net.predict(x).shape == (1, 37, 51)


def test_the_corner_rule_is_one_for_logits_and_labels() -> None:
    class Corners(SegModel):
        align_corners = True

        def forward_logits(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 4)[:, :2]

    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    net = Corners(2)
    wanted = F.interpolate(F.avg_pool2d(x, 4)[:, :2], size=(16, 16), mode="bilinear", align_corners=True)
    assert torch.equal(net(x), wanted)
    assert torch.equal(net.predict(x).long(), wanted.argmax(1))
    other = F.interpolate(F.avg_pool2d(x, 4)[:, :2], size=(16, 16), mode="bilinear", align_corners=False)
    assert not torch.equal(other.argmax(1), wanted.argmax(1))


def test_a_network_without_a_head_says_so() -> None:
    class Empty(SegModel):
        pass

    with pytest.raises(TypeError, match="Empty must define forward_logits"):
        Empty(2)(torch.zeros(1, 3, 4, 4))
    assert isinstance(Empty(2), nn.Module)
