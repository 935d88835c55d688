"""A pruned network comes back bit for bit in a new process; a damaged file is one sentence."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vss import models
from vss.core.errors import NotFinite, VssError
from vss.core.files import sha256_tensors
from vss.data import Preprocess
from vss.prune import Plan, apply_plan, make_plan
from vss.train import checkpoint

X = torch.zeros(1, 3, 16, 16)


def pruned(keeps: tuple[float, ...] = (0.6,)) -> nn.Module:
    torch.manual_seed(0)
    net = models.build("unet", 5, width=4, depth=2).eval()
    for keep in keeps:
        net = apply_plan(net, make_plan(net, X, budget={"kind": "channels", "keep": keep}))
    return net


def header(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["vss"])


def rewrite(path: Path, **changes: object) -> Path:
    """The same weights under a changed header; a value of ... drops the key."""
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    meta = {key: value for key, value in {**header(path), **changes}.items() if value is not ...}
    save_file(state, path, metadata={"vss": json.dumps(meta)})
    return path


SCRIPT = """
import sys
import torch
import vss
net = vss.load(sys.argv[1])
torch.save((net(torch.load(sys.argv[2])), net.predict(torch.load(sys.argv[2]))), sys.argv[3])
assert not net.training
assert "torch_pruning" not in sys.modules, "rebuilding traced the network"
print(len(net.plans), sum(p.numel() for p in net.parameters()))
"""


def test_twice_pruned_network_comes_back_in_a_new_process(tmp_path: Path) -> None:
    net = pruned((0.8, 0.6))
    path = checkpoint.save(net, tmp_path / "net.safetensors")
    x = torch.randn(2, 3, 32, 16)
    torch.save(x, tmp_path / "x.pt")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")],
        env={**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["2", str(sum(p.numel() for p in net.parameters()))]
    logits, labels = torch.load(tmp_path / "y.pt")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(logits, net(x)) and torch.equal(labels, net.predict(x))
    finally:
        torch.set_num_threads(threads)


def test_everything_that_was_written_is_read(tmp_path: Path) -> None:
    net = pruned()
    preprocess = {"size": [16, 16], "mean": [0.5, 0.5, 0.5]}
    path = checkpoint.save(
        net, tmp_path / "a" / "net.safetensors", preprocess=preprocess, classes=["sky", "road"], info={"miou_pct": 51.5}
    )
    found = checkpoint.read(path)
    assert found.plans == net.plans and len(found.plans) == 1 and found.model.plans == net.plans
    assert (found.preprocess, found.classes, found.info) == (preprocess, ("sky", "road"), {"miou_pct": 51.5})
    assert found.weights_sha256 == sha256_tensors(net.state_dict()) == sha256_tensors(found.model.state_dict())
    assert (found.model.name, found.model.options, found.model.num_classes) == ("unet", {"width": 4, "depth": 2}, 5)
    assert os.listdir(tmp_path / "a") == ["net.safetensors"]
    size = Preprocess(size=(16, 16), mean=(0.5, 0.5, 0.5))
    again = checkpoint.read(checkpoint.save(found.model, tmp_path / "b.safetensors", preprocess=size))
    assert again.weights_sha256 == found.weights_sha256 and again.preprocess == size.model_dump(mode="json")


def test_a_loaded_network_is_pruned_further_by_a_plan_for_it(tmp_path: Path) -> None:
    net = pruned()
    plan = make_plan(net, X, budget={"kind": "channels", "keep": 0.7})
    loaded = checkpoint.load(checkpoint.save(net, tmp_path / "net.safetensors"))
    assert make_plan(loaded, X, budget={"kind": "channels", "keep": 0.7}) == plan
    smaller = apply_plan(loaded, plan)
    assert smaller.plans == (*net.plans, plan)
    assert torch.equal(smaller(X), apply_plan(net, plan)(X))


def test_options_that_json_turns_into_lists_still_build(tmp_path: Path) -> None:
    net = models.build("resnet50_seg", 3, decoder=4, dilate=(False, False, True)).eval()
    loaded = checkpoint.load(checkpoint.save(net, tmp_path / "net.safetensors"))
    x = torch.randn(1, 3, 32, 32)
    assert loaded.backbone.layer4[1].conv2.dilation == (2, 2)
    assert torch.equal(loaded(x), net(x))


class Own(nn.Module):
    """A user's network that is not registered."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).relu())


def test_a_users_own_module_needs_an_unpruned_instance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Own()
    small = apply_plan(net, make_plan(net, X, budget={"kind": "channels", "keep": 0.5}))
    path = checkpoint.save(small, tmp_path / "own.safetensors")
    loaded = checkpoint.load(path, model=Own())
    x = torch.randn(1, 3, 8, 8)
    assert loaded.a.out_channels == 3 and torch.equal(loaded(x), small(x))
    with pytest.raises(VssError, match=r"holds a 'Own', which is not registered; give an unpruned instance: vss\.load"):
        checkpoint.load(path)
    with pytest.raises(VssError, match=r"does not fit its own description: .a.bias. is of shape .4,."):
        checkpoint.load(path, model=Own(width=4))
    with pytest.raises(VssError, match="holds a 'Own' and was to be loaded into a 'unet'"):
        checkpoint.load(path, model=models.build("unet", 5, width=4))


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    net = models.build("unet", 4, width=4, depth=1)
    net.decoder[0][1][1].weight = net.decoder[0][0][1].weight
    loaded = checkpoint.load(checkpoint.save(net.eval(), tmp_path / "net.safetensors"))
    assert torch.equal(loaded(X), net(X))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.save(pruned(), tmp_path_factory.mktemp("saved") / "net.safetensors")


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(saved, tmp_path))


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_truncated_file(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(VssError, match=r"net\.safetensors is truncated or damaged .*copy it again"):
        checkpoint.load(path)


def test_one_changed_byte_of_the_weights(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(VssError, match="is damaged: its weights do not have the hash"):
        checkpoint.load(path)


def test_a_foreign_safetensors_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with pytest.raises(VssError, match=r"without a vss header; save it with vss\.save"):
        checkpoint.load(tmp_path / "x.safetensors")


def test_absent_and_torch_files(tmp_path: Path) -> None:
    with pytest.raises(VssError, match="does not exist"):
        checkpoint.load(tmp_path / "none.safetensors")
    for suffix in (".pt", ".pth", ".ckpt"):
        torch.save({}, tmp_path / f"x{suffix}")
        with pytest.raises(VssError, match=r"is a torch file; vss checkpoints are \.safetensors"):
            checkpoint.load(tmp_path / f"x{suffix}")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schema": 2}, "has schema 2; this version reads up to 1: upgrade vss"),
        ({"schema": "1"}, "its header is of no vss.checkpoint"),
        ({"kind": "other"}, "its header is of no vss.checkpoint"),
        ({"plans": ..., "info": ...}, "in its header plans is missing"),
        ({"model": "unknown_net"}, "holds a 'unknown_net', which is not registered"),
        ({"options": {"width": 8, "depth": 2}}, "does not fit its own description"),
        ({"options": {"widht": 4}}, "Did you mean 'width'"),
        ({"plans": [{"kind": "vss.plan"}]}, r"net\.safetensors, plan 0 is no valid plan"),
        ({"plans": []}, "does not fit its own description: .* before its cuts"),
    ],
)
def test_a_header_that_does_not_hold(path: Path, changes: dict, sentence: str) -> None:
    with pytest.raises(VssError, match=sentence):
        checkpoint.load(rewrite(path, **changes))


def test_a_header_that_is_no_json(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path, metadata={"vss": "{not json"})
    with pytest.raises(VssError, match=r"the header of checkpoint .* is not JSON"):
        checkpoint.load(path)


def test_a_plan_of_a_newer_schema_inside(path: Path) -> None:
    plans = header(path)["plans"]
    assert Plan.from_dict(plans[0]).model == "unet"
    with pytest.raises(VssError, match="plan 0 is no valid plan: schema"):
        checkpoint.load(rewrite(path, plans=[{**plans[0], "schema": 2}]))


def slot_of(meta: dict, **changes: object) -> dict:
    plans = copy.deepcopy(meta["plans"])
    plans[0]["groups"][0]["slots"][0].update(changes)
    return {"plans": plans}


def group_of(meta: dict, **changes: object) -> dict:
    plans = copy.deepcopy(meta["plans"])
    plans[0]["groups"][0].update(changes)
    return {"plans": plans}


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: {"options": 0},
        lambda meta: {"options": {"width": "4" * 10**6}},
        lambda meta: {"options": {"depth": 10**9}},
        lambda meta: {"options": {"depth": 64}},
        lambda meta: {"options": {"depth": 2, "width": 2000}},
        lambda meta: {"options": {"depth": 10, "width": 2**60}},
        lambda meta: {"plans": 7},
        lambda meta: {"plans": [7]},
        lambda meta: {"num_classes": "11"},
        lambda meta: {"num_classes": True},
        lambda meta: {"num_classes": 10**12},
        lambda meta: {"model": []},
        lambda meta: {"classes": 1.5},
        lambda meta: {"classes": [1]},
        lambda meta: {"info": []},
        lambda meta: {"schema": 0},
        lambda meta: {"schema": True},
        lambda meta: {"preprocess": {"size": [0, 64]}},
        lambda meta: {"preprocess": {"size": [32, 64], "std": [0, 1, 1]}},
        lambda meta: {"weights_sha256": None},
        lambda meta: slot_of(meta, dim=-5),
        lambda meta: slot_of(meta, dim=True),
        lambda meta: slot_of(meta, offset=-1),
        lambda meta: slot_of(meta, offset=1),
        lambda meta: slot_of(meta, block=0),
        lambda meta: slot_of(meta, block=2),
        lambda meta: slot_of(meta, tensor="classifier.weight"),
        lambda meta: group_of(meta, slots=[]),
        lambda meta: group_of(meta, channels=3 * 10**9),
        lambda meta: group_of(meta, channels=300),
        lambda meta: group_of(meta, kept=[0.0]),
        lambda meta: group_of(meta, slots=meta["plans"][0]["groups"][0]["slots"][1:]),
        lambda meta: group_of(meta, slots=meta["plans"][0]["groups"][0]["slots"] * 2),
    ],
)
def test_a_header_of_the_wrong_kind_or_size_is_refused_before_anything_is_built(
    path: Path, change: Callable[[dict], dict]
) -> None:
    with pytest.raises(VssError, match=r"net\.safetensors") as caught:
        checkpoint.load(rewrite(path, **change(header(path))))
    assert len(str(caught.value)) < 900 and "\n" not in str(caught.value)


def test_one_digit_of_the_header(path: Path) -> None:
    data = path.read_bytes()
    changed = data.replace(b'seed\\": 0', b'seed\\": 1', 1)
    assert changed != data
    path.write_bytes(changed)
    with pytest.raises(VssError, match="its header does not have the hash it was saved with"):
        checkpoint.load(path)


def test_a_header_without_a_hash_is_of_an_older_version_and_loads(path: Path) -> None:
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"vss", "vss_sha256"}
    expected = checkpoint.load(path).state_dict()
    rewrite(path)
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"vss"}
    assert sha256_tensors(checkpoint.load(path).state_dict()) == sha256_tensors(expected)


@pytest.mark.parametrize("name", ["classifier.weight", "encoder.0.0.1.running_var"])
def test_weights_of_a_diverged_training_are_refused_by_name(tmp_path: Path, name: str) -> None:
    net = pruned()
    net.state_dict()[name].view(-1)[0] = float("inf")
    path = checkpoint.save(net, tmp_path / "x.safetensors")
    with pytest.raises(NotFinite, match=rf"x\.safetensors holds NaN or infinity in {name}: its training diverged"):
        checkpoint.load(path)


def test_versions_of_modules_are_those_of_the_network(tmp_path: Path) -> None:
    class Versioned(nn.Conv2d):
        _version = 2

        def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, *rest: object) -> None:
            assert metadata.get("version") == 2, "taken for an older layout"
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    net = nn.Sequential(Versioned(3, 4, 1), nn.Conv2d(4, 2, 1))
    checkpoint.save(net, tmp_path / "a.safetensors")
    again = checkpoint.load(tmp_path / "a.safetensors", model=nn.Sequential(Versioned(3, 4, 1), nn.Conv2d(4, 2, 1)))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
