"""Networks as users bring them: none ends in a traceback or a hang, what is offered is exact, the rest has a reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.prune import apply_plan, count, find_groups, make_plan, masked, verify

from .nets import HALF, Residual, around, proven, randomise, reasons


class Skip(nn.Module):
    """Two blocks side by side into a third, as in a U-Net."""

    def __init__(self, norm: Callable[[int], nn.Module], act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1), norm(o), act()) for i, o in ((3, 16), (16, 16), (32, 16))
        )
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.c(torch.cat([a, self.b(a)], 1)))


@pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match num_features")
@pytest.mark.parametrize(
    ("norm", "act"),
    [
        (nn.BatchNorm2d, nn.PReLU),
        (nn.InstanceNorm2d, nn.PReLU),
        (lambda c: nn.InstanceNorm2d(c, affine=True), lambda: nn.LeakyReLU(inplace=True)),
    ],
)
def test_norms_and_activations_before_a_concatenation(norm: Any, act: Any) -> None:
    net, x = randomise(Skip(norm, act)), torch.randn(1, 3, 16, 16)
    assert [g.id for g in find_groups(net, x)] == ["a.0", "b.0", "c.0"]
    proven(net, x)


class Split(nn.Module):
    """A unit of ShuffleNet v2: half of the channels pass, half are transformed, then they are shuffled."""

    def __init__(self, c: int) -> None:
        super().__init__()
        inner = [nn.Conv2d(c // 2, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, c // 2, 1)]
        self.branch = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)


def test_units_of_a_shuffle_net_are_cut_inside() -> None:
    net, x = around(nn.Sequential(Split(32), Split(32))), torch.randn(1, 3, 8, 8)
    ids = [g.id for g in find_groups(net, x)]
    assert {"2.0.branch.0", "2.1.branch.0", "3"} <= set(ids)
    proven(net, x)


class Blocks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        return x.view(n, -1, 8, h, w).mul(2).flatten(1, 2)


def test_a_view_in_blocks_of_eight_sets_the_unit() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), Blocks(), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
                        nn.Conv2d(32, 5, 1)).eval()  # fmt: skip
    x = torch.randn(1, 3, 16, 16)
    assert [(g.id, g.channels, g.unit) for g in find_groups(net, x)] == [("0", 32, 8), ("3", 32, 1)]
    plan, _ = proven(net, x, {"kind": "channels", "keep": 0.6, "scope": "local", "align": 4})
    assert plan.widths()["0"] in ((32, 16), (32, 24))


class Needs(nn.Module):
    """Runs with an even number of channels alone."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2 and x.shape[1] != 31:
            raise RuntimeError("odd")
        return x


def test_the_planned_cut_is_tried_and_what_fails_stays_whole(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), Needs(), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(),
                        nn.Conv2d(16, 5, 1)).eval()  # fmt: skip
    plan, _ = proven(net, torch.randn(1, 3, 16, 16), {"kind": "channels", "keep": 0.66, "scope": "local"})
    assert plan.widths() == {"0": (32, 32), "2": (16, 10)}
    assert "the planned cut of 0 does not hold" in caplog.text


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.a(x).relu()[:, torch.tensor([1, 0, *range(2, 16)])]
        return self.head(self.c(f).relu().to(torch.float32).float())


def test_a_cast_inside_is_no_traceback() -> None:
    groups = find_groups(Cast().eval(), torch.randn(1, 3, 16, 16))
    assert [g.id for g in groups] == ["c"] and "a" in reasons(groups)


class Aux(nn.Module):
    """A head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.head, self.aux = (
            nn.Conv2d(32, 5, 1),
            nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)),
        )

    def forward(self, x: Tensor) -> Any:
        f = self.a(x).relu()
        out = self.head(self.b(f).relu())
        return (out, self.aux(f)) if self.training else out


def test_a_head_that_runs_in_training_only_is_cut_too() -> None:
    net, x = Aux().eval(), torch.randn(1, 3, 32, 32)
    assert ("aux.0.weight", 1) in {(s.tensor, s.dim) for s in find_groups(net, x)["a"].slots}
    plan, small = proven(net, x)
    assert plan.widths()["a"] == (16, 8)
    outputs = small.train()(torch.randn(2, 3, 32, 32))
    assert [out.shape[1] for out in outputs] == [5, 5]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(1, 16, 3, padding=1)
        self.b, self.head = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 5, 1)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return self.head(self.b(torch.cat([self.a(rgb).relu(), self.d(depth).relu()], 1)).relu())


def test_two_inputs_as_a_tuple_a_dict_or_by_forward() -> None:
    net, rgb, depth = Two().eval(), torch.randn(1, 3, 32, 32), torch.randn(1, 1, 32, 32)
    forms: list[tuple[Any, dict[str, Any]]] = [
        ((rgb, depth), {}),
        ({"rgb": rgb, "depth": depth}, {}),
        (torch.cat([rgb, depth], 1), {"forward": lambda m, x: m(x[:, :3], x[:, 3:])}),
    ]
    costs = set()
    for example, options in forms:
        plan, small = proven(net, example, **options)
        assert set(plan.widths()) == {"a", "d", "b"}
        costs.add((plan.cost_before["macs"], count(small, example=example, **options)["macs_g"]))
    assert costs == {(1024 * (16 * 27 + 16 * 9 + 16 * 32 * 9 + 80), 1024 * (8 * 27 + 8 * 9 + 8 * 16 * 9 + 40) / 1e9)}


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_images_of_any_number_of_channels(channels: int) -> None:
    net = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 5, 1)).eval()
    plan = make_plan(net, torch.randn(1, channels, 32, 32), budget=HALF)
    small = apply_plan(net, plan)
    assert verify(net, small, plan, [(32, 32), (48, 40)])["outputs"] == [[[2, 5, 32, 32]], [[2, 5, 48, 40]]]
    assert count(small, (32, 32))["macs_g"] == pytest.approx(1024 * (8 * 9 * channels + 40) / 1e9)


def test_a_net_of_one_size_is_verified_on_its_example() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8 * 16, 10)
            self.head = nn.Linear(10, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(self.a(x).flatten(1)).relu())

    plan, _ = proven(Fixed().eval(), torch.randn(1, 3, 16, 16))
    assert plan.widths() == {"a": (8, 4), "fc": (10, 5)}


@dataclasses.dataclass
class Out:
    logits: Tensor
    other: Any = None


class Wraps(nn.Module):
    """A small network with odd attributes and an odd output."""

    def __init__(
        self, give: Callable[[Tensor], Any], norm: Callable[[int], nn.Module] = nn.BatchNorm2d, **odd: Any
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), norm(16), nn.ReLU(), nn.Conv2d(16, 5, 1))
        self.give = give
        for name, value in odd.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.give(self.net(x))


@pytest.mark.parametrize("give", [Out, lambda y: {"a": [y]}, lambda y: Out(y.argmax(1), {"b": (y,)})])
def test_outputs_in_dataclasses_and_nested(give: Callable[[Tensor], Any]) -> None:
    plan, _ = proven(Wraps(give).eval(), torch.randn(1, 3, 16, 16))
    assert plan.widths() == {"net.0": (16, 8)}


def test_outputs_that_cannot_be_judged_are_sentences() -> None:
    x = torch.randn(1, 3, 16, 16)
    with pytest.raises(VssError, match=r"torch.int64 values alone.*forward="):
        make_plan(Wraps(lambda y: y.argmax(1)).eval(), x)
    with pytest.raises(VssError, match=r"output is a int in which no tensor was found.*forward="):
        make_plan(Wraps(lambda y: 3).eval(), x)
    with pytest.raises(VssError, match=r"does not take the example \(1, 4, 16, 16\)"):
        make_plan(Wraps(lambda y: y).eval(), torch.randn(1, 4, 16, 16))
    with pytest.raises(VssError, match=r"100% of the MACs are in layers that no cut reaches.*GroupNorm of one group"):
        make_plan(Wraps(lambda y: y, lambda c: nn.GroupNorm(1, c)).eval(), x)


def test_attributes_of_a_foreign_network_are_its_own() -> None:
    odd = {"options": object(), "name": lambda: "x", "num_classes": [5], "size_multiple": "32"}
    plan, _ = proven(Wraps(lambda y: y, **odd).eval(), torch.randn(1, 3, 16, 16))
    assert (plan.model, plan.options, plan.num_classes) == ("Wraps", {}, None)


def test_frozen_batch_norms_are_cut() -> None:
    torchvision = pytest.importorskip("torchvision")
    net = Wraps(lambda y: y, torchvision.ops.FrozenBatchNorm2d).eval()
    _, small = proven(net, torch.randn(1, 3, 16, 16))
    assert len(small.net[1].running_var) == 8  # type: ignore[index,union-attr]


def test_response_norm_is_judged_at_the_range_of_the_example() -> None:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.LocalResponseNorm(5), nn.Conv2d(16, 8, 1), nn.ReLU()]
    net, x = nn.Sequential(*layers, nn.Conv2d(8, 5, 1)).eval(), torch.randint(0, 256, (1, 3, 16, 16)).float()
    assert "reorders or mixes" in reasons(find_groups(net, x))["0"]
    plan, small = proven(net, x)
    with torch.no_grad():
        assert float((masked(net, plan)(x) - small(x)).abs().max()) <= 1e-4 * float(small(x).abs().max())


class Unfollowed(nn.Module):
    """Channels through an operation that nobody follows, and through numpy."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x)


@pytest.mark.parametrize(
    "how",
    [
        lambda x: torch.from_numpy(x.detach().double().numpy()).to(x.dtype),
        lambda x: torch.fft.ifft(torch.fft.fft(x, dim=1), dim=1).real,
        lambda x: torch.linalg.qr(x.flatten(2))[0].sum() + x,
        lambda x: x.sort(dim=1).values,
    ],
)
def test_what_cannot_be_followed_is_locked_and_the_rest_is_offered(how: Callable[[Tensor], Tensor]) -> None:
    net, x = around(Unfollowed(how)), torch.randn(1, 3, 8, 8)
    groups = find_groups(net, x)
    assert [g.id for g in groups] == ["3"] and reasons(groups)["0"]
    proven(net, x)


def test_the_model_is_not_touched() -> None:
    net = Residual().train()
    net.stem[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    find_groups(net, torch.zeros(2, 3, 32, 48))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training and not net.stem[1].training
    assert not any(m._forward_hooks or m._backward_hooks for m in net.modules())


def test_a_network_for_evaluation_alone_is_said_and_cut(caplog: pytest.LogCaptureFixture) -> None:
    class Frozen(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("deployed, no training")
            return super().forward(x)

    net = Frozen(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()
    assert [group.id for group in find_groups(net, torch.randn(1, 3, 16, 16))] == ["0"]
    assert "does not run in training mode on two examples (deployed, no training)" in caplog.text
