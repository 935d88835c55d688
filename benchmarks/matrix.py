"""Every criterion on every network, each cell proven from scores to ONNX.

    python benchmarks/matrix.py [--methods l1,taylor] [--models unet,segnet] [--size 64,64] [--keep 0.5]
                                [--again | --missing] [--out FILE]

A cell plans a cut to half the MACs on seeded noise with labels, shows that the masked network equals the sliced one,
trains one step, saves and loads, exports, and compares ONNX Runtime with torch. Rows go one by one into
benchmarks/results/<machine>/<version>--matrix.json; a row whose `code` (a hash of the sources that made it) is still
right is not computed again. A cell is `not_applicable` only where the network has no layer that the method scores.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import logging
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import vss  # noqa: E402
from vss import deploy, models  # noqa: E402
from vss.core.environment import environment  # noqa: E402
from vss.core.errors import VssError  # noqa: E402
from vss.core.files import read_json, write_json  # noqa: E402
from vss.models.segdecnet import FeatureNorm  # noqa: E402
from vss.prune import (  # noqa: E402
    Budget,
    CostModel,
    Groups,
    apply_plan,
    find_groups,
    make_criterion,
    make_plan,
    recalibrate_bn,
    verify,
)
from vss.prune import phases as dmcp  # noqa: E402
from vss.prune.criteria import score_groups  # noqa: E402
from vss.prune.stats.base import Stats  # noqa: E402
from vss.train import checkpoint  # noqa: E402
from vss.train.losses import SegLoss  # noqa: E402

LOG = logging.getLogger("matrix")
METHODS = (
    "l1", "l2", "random", "taylor", "slimming", "fpgm", "fgp", "sirfp", "dmcp", "fn", "hw_l1", "defect", "corr",
    "taylor_fo", "obd", "dcfp", "lamp", "wanda",
)  # fmt: skip
MODELS = (
    "resnet18_seg", "unet", "segdecnet", "lraspp_mobilenet_v3_large", "segnet", "resnet50_seg", "fcn_resnet50",
    "deeplabv3_resnet50",
)  # fmt: skip
LEAST = {"segdecnet": (64, 128)}
CLASSES = 4
BATCHES, BATCH_SIZE = 2, 3
MACS_TOLERANCE = 0.02
KIND, SCHEMA, CHECKS = "vss.matrix", 1, 2  # CHECKS goes up when a cell proves something else
SOURCES = (
    "core/*.py", "models/*.py", "prune/*.py", "prune/criteria/*.py", "prune/stats/*.py", "deploy/export.py",
    "deploy/graph.py", "deploy/parity.py", "deploy/surgeon.py", "train/checkpoint.py",
)  # fmt: skip
SEARCH_STEPS = 4


@dataclass(frozen=True)
class Subject:
    """A network with everything that its cells share."""

    net: Any
    size: tuple[int, int]
    batches: list[tuple[Tensor, Tensor]]
    loss: Callable[[Any, tuple[Tensor, Tensor]], Tensor]
    groups: Groups

    @classmethod
    def make(cls, name: str, size: tuple[int, int]) -> Subject:
        """A seeded network whose norm layers are uneven and fit the images."""
        torch.manual_seed(0)
        defects = name == "segdecnet"
        net: Any = models.build(name, 1 if defects else CLASSES)
        least, multiple = LEAST.get(name, (1, 1)), net.size_multiple
        height, width = (-(-max(pair) // multiple) * multiple for pair in zip(size, least, strict=True))
        batches = [batch(seed, (height, width), defects=defects) for seed in range(BATCHES)]
        randomise(net)
        if batch_norms(net):
            recalibrate_bn(net, (images for images, _ in batches))
        net.eval()
        groups = find_groups(net, torch.zeros(1, 3, height, width))
        return cls(net, (height, width), batches, defect_loss if defects else class_loss, groups)

    @property
    def example(self) -> Tensor:
        """An input of the size at which MACs count."""
        return torch.zeros(1, 3, *self.size)


def batch(seed: int, size: tuple[int, int], *, defects: bool) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W), and labels (N, H, W) in blocks: classes, or one square defect an image.

    Images are noise on a colour and with a contrast of their own: of noise alone all global means are nearly equal, and
    a batch norm behind a global pooling (ASPP) would divide by almost nothing and magnify rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(BATCH_SIZE, 3, *size, generator=generator)
    contrast = 0.5 + torch.rand(BATCH_SIZE, 1, 1, 1, generator=generator)
    images = contrast * noise + torch.randn(BATCH_SIZE, 3, 1, 1, generator=generator)
    if defects:
        labels = torch.zeros(BATCH_SIZE, *size, dtype=torch.int64)
        labels[: BATCH_SIZE - 1, 16:40, 24:56] = 1
    else:
        cells = torch.randint(CLASSES, (BATCH_SIZE, 1, 4, 4), generator=generator)
        labels = F.interpolate(cells.float(), size=size, mode="nearest")[:, 0].long()
    return images, labels


def class_loss(model: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy over all heads."""
    return SegLoss()(model.forward_train(data[0]), data[1])


def defect_loss(model: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    """Binary cross-entropy of the decision (is there a defect?) and of the map."""
    heads = model.forward_train(data[0])
    mask = data[1][:, None].float()
    decision = F.binary_cross_entropy_with_logits(heads["decision"], mask.amax(dim=(2, 3)))
    target = F.adaptive_max_pool2d(mask, tuple(heads["seg"].shape[-2:]))
    return decision + F.binary_cross_entropy_with_logits(heads["seg"], target)


def randomise(net: nn.Module) -> None:
    """Uneven scales and shifts, so that nothing is equal by symmetry."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d | FeatureNorm):
                scale = module.weight if isinstance(module, nn.BatchNorm2d) else module.scale
                scale.copy_(0.5 + torch.rand(scale.shape, generator=generator))
                module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))


def batch_norms(net: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def may_be_silent(method: str, net: nn.Module) -> bool:
    """Whether the network has no layer of the kind that the method scores."""
    if method in ("slimming", "dcfp"):
        return not batch_norms(net)
    return method == "fn" and not any(isinstance(module, FeatureNorm) for module in net.modules())


def searched_widths(subject: Subject, *, keep: float) -> dict[str, int]:
    """Widths after a few steps of DMCP's search on alpha alone; group id -> channels."""
    groups = list(subject.groups)
    scores = score_groups(make_criterion("l1"), groups, Stats(subject.net))
    ordered = dmcp.reorder(subject.net, groups, {g.id: dmcp.importance_order(scores[g.id], g.unit) for g in groups})
    gates, chains = dmcp.Gates(ordered, groups, subject.example), [dmcp.Chain.of(group) for group in groups]
    cost = dmcp.ExpectedCost(CostModel.measure(subject.net, subject.example), "macs", groups)
    target = keep * float(cost([group.channels for group in groups]))
    alphas = [torch.full((chain.links,), 3.0, requires_grad=True) for chain in chains]
    optimiser = torch.optim.Adam([alpha for alpha in alphas if len(alpha)], lr=0.3)
    for step in range(SEARCH_STEPS):
        soft = [dmcp.soft_mask(chain, alpha) for chain, alpha in zip(chains, alphas, strict=True)]
        heads = SimpleNamespace(forward_train=lambda x, soft=soft: gates(ordered, x, soft))
        widths = [dmcp.expected_width(chain, alpha) for chain, alpha in zip(chains, alphas, strict=True)]
        loss = subject.loss(heads, subject.batches[step % BATCHES]) + 0.1 * dmcp.mac_loss(cost(widths), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return dict(zip([group.id for group in groups], dmcp.expected_widths(chains, alphas), strict=True))


def cell(method: str, subject: Subject, *, keep: float) -> dict[str, Any]:
    """All proofs of one cell; raises where one fails.

    Returns:
        Figures: shares of MACs, parameters and channels, worst differences, file size, ONNX nodes.
    """
    options = {"widths": searched_widths(subject, keep=keep)} if method == "dmcp" else {}
    criterion = make_criterion(method, **options)
    plan = make_plan(
        subject.net,
        subject.example,
        criterion=criterion,
        budget=Budget(kind="macs", keep=keep),
        batches=subject.batches if criterion.needs else None,
        loss=subject.loss,
        groups=subject.groups,
    )
    small = apply_plan(subject.net, plan)
    height, width = subject.size
    checks = verify(subject.net, small, plan, [subject.size, (height, width + max(32, subject.net.size_multiple))])
    kept = {kind: plan.cost_after[kind] / plan.cost_before[kind] for kind in plan.cost_before}
    check_macs(small, subject, plan.cost_after["macs"], kept["macs"], keep)
    if batch_norms(small):
        recalibrate_bn(small, (images for images, _ in subject.batches))
    with tempfile.TemporaryDirectory() as folder:
        size_mib = reload(small, Path(folder) / "net.safetensors", subject.batches[0][0])
        exported = deploy.export(small, Path(folder) / "net.onnx", size=subject.size, parity_batches=(1, 2))
    value = train_step(small, subject)
    return {
        "macs_kept": kept["macs"],
        "params_kept": kept["params"],
        "channels_kept": kept["channels"],
        "groups": len(subject.groups),
        "masked_max_rel": checks["masked_max_rel"],
        "onnx_max_rel": exported["parity"]["max_rel"],
        "onnx_argmax_agreement": exported["parity"]["argmax_agreement"],
        "onnx_nodes": exported["nodes_after"],
        "checkpoint_mib": size_mib,
        "loss": value,
        "plan_sha256": plan.sha256(),
    }


def check_macs(small: nn.Module, subject: Subject, planned: float, kept: float, keep: float) -> None:
    """The cut network has the MACs of its plan, and they are near the budget and not above it."""
    counted = CostModel.measure(small, subject.example).total("macs", [], [])
    if counted != planned:
        raise VssError(f"the plan says {planned:.0f} MACs and the cut network has {counted:.0f}.")
    if not keep * (1 - MACS_TOLERANCE) <= kept <= keep * (1 + 1e-9):
        raise VssError(f"{kept:.4f} of the MACs stay, more than {MACS_TOLERANCE:.0%} off the budget of {keep}.")


def reload(small: Any, path: Path, images: Tensor) -> float:
    """Save, load, compare every bit; returns MiB."""
    checkpoint.save(small, path)
    again = checkpoint.load(path)
    before, after = small.state_dict(), again.state_dict()
    if list(before) != list(after) or not all(torch.equal(before[name], after[name]) for name in before):
        raise VssError("the loaded network's weights are not those that were saved.")
    with torch.no_grad():
        pairs = zip(outputs(small.eval(), images), outputs(again, images), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise VssError("the loaded network's outputs are not those of the saved one.")
    return path.stat().st_size / 2**20


def outputs(net: Any, images: Tensor) -> Iterable[Tensor]:
    return net.forward_train(images).values()


def train_step(small: nn.Module, subject: Subject) -> float:
    """One step of training; returns the loss before it."""
    small.train().requires_grad_(True)
    value = subject.loss(small, subject.batches[0])
    value.backward()
    bad = [name for name, p in small.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    if bad or not torch.isfinite(value):
        raise VssError(f"training the cut network gives NaN or infinity{' in ' + bad[0] if bad else ''}.")
    torch.optim.SGD(small.parameters(), lr=1e-3).step()
    return float(value.detach())


def row_of(method: str, name: str, subject: Subject, *, keep: float) -> dict[str, Any]:
    """One row; an error of any kind is a row as well, and is logged."""
    row: dict[str, Any] = {"method": method, "model": name, "status": "ok", "reason": ""}
    start = time.perf_counter()
    try:
        row |= cell(method, subject, keep=keep)
    except VssError as error:
        silent = may_be_silent(method, subject.net) and "does not apply" in str(error)
        row |= {"status": "not_applicable" if silent else "failed", "reason": str(error)}
    except Exception as error:
        LOG.error("%s", traceback.format_exc())
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return row | {"size": list(subject.size), "seconds": round(time.perf_counter() - start, 2)}


def code_now() -> str:
    """Hash of the sources that cells depend on."""
    folder = Path(vss.__file__).parent
    digest = hashlib.sha256(f"{CHECKS}".encode())
    for pattern in SOURCES:
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise SystemExit(f"{pattern} in SOURCES of {Path(__file__).name} names no file")
        for path in paths:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """The rows in a file, read again before every write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(method, model) -> row."""
        if not self.path.exists():
            return {}
        return {(row["method"], row["model"]): row for row in read_json(self.path, kind=KIND, schema=SCHEMA)["rows"]}

    def add(self, row: dict[str, Any], about: dict[str, Any]) -> None:
        """Put a row in its place and write the file."""
        rows = self.rows() | {(row["method"], row["model"]): row}
        order = list(itertools.product(MODELS, METHODS))
        table = sorted(rows.values(), key=lambda r: order.index((r["model"], r["method"])))
        write_json(self.path, {"kind": KIND, "schema": SCHEMA, **about, "rows": table})


def due(arguments: argparse.Namespace, found: dict[str, Any] | None, code: str) -> bool:
    """Whether a cell is to be computed."""
    if arguments.again or found is None or found["status"] == "failed" or found["keep"] != arguments.keep:
        return True
    return not arguments.missing and found["code"] != code


def run(arguments: argparse.Namespace, results: Results) -> None:
    """All cells that are asked for and due, network by network."""
    about = {"environment": environment()}
    code = code_now()
    for name in arguments.models:
        rows = results.rows()
        todo = [m for m in arguments.methods if due(arguments, rows.get((m, name)), code)]
        if not todo:
            LOG.info("%s: all rows are there", name)
            continue
        start = time.perf_counter()
        subject = Subject.make(name, arguments.size)
        LOG.info("%s: %d groups, %.1f s", name, len(subject.groups), time.perf_counter() - start)
        for method in todo:
            row = row_of(method, name, subject, keep=arguments.keep) | {"keep": arguments.keep}
            row["code"] = code
            results.add(row, about)
            LOG.info("%-10s %-26s %-14s %6.1f s  %s", method, name, row["status"], row["seconds"], row["reason"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--size", type=lambda text: tuple(map(int, text.split(","))), default=(64, 64), help="H,W")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the MACs")
    parser.add_argument("--again", action="store_true", help="compute rows that are there already")
    parser.add_argument("--missing", action="store_true", help="leave rows that older code made")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/<machine>/<version>--matrix.json")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    LOG.setLevel(logging.INFO)
    folder = ROOT / "benchmarks" / "results" / environment()["machine"]
    results = Results(arguments.out or folder / f"{vss.__version__}--matrix.json")
    run(arguments, results)
    chosen = [results.rows()[method, name] for name in arguments.models for method in arguments.methods]
    counts = {status: sum(row["status"] == status for row in chosen) for status in ("ok", "not_applicable", "failed")}
    LOG.info("%s in %s", counts, results.path)
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
