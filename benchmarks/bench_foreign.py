"""Networks that nobody here wrote, from plan to ONNX and engine, with torch-pruning beside it.

    pip install segmentation-models-pytorch timm monai transformers pytorchcv ultralytics torch-pruning
    python benchmarks/bench_foreign.py [--family smp,timm] [--net NAME ...] [--jobs 2] [--again | --failed]
                                       [--side vss] [--out FILE]

A row plans half the MACs by L1 (half the channels where half the MACs cannot be reached), cuts, proves that the masked
network equals the sliced one at two sizes, trains one step, saves, loads into a new network of the factory, exports,
holds ONNX Runtime against torch and builds an engine by TensorRT for RTX where that is installed. torch-pruning's
`MagnitudePruner` removes 30 % of every layer of the same network, with the layers that make outputs named to it, and
its result is held against the network in which the same channels are zero. Each side of a row runs in a process of its
own, since either may crash or hang; seconds are of CPU time, one thread. Weights are random, and batch norms fit noise.
Rows go one by one into benchmarks/results/<machine>/<version>--foreign.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import math
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from foreign_nets import Net, forward_of, nets, package_of
from torch import Tensor, nn

import vss
from vss import deploy
from vss.core.environment import environment
from vss.core.errors import VssError, one_line
from vss.core.example import at_size, default_forward, logits_of, paired
from vss.core.files import read_json, write_json
from vss.deploy import BACKENDS, BuildPlan, BuildSpec, onnx_file, spans
from vss.prune import Budget, CostModel, apply_plan, find_groups, make_plan, recalibrate_bn, verify
from vss.prune.budget import Unreachable
from vss.prune.trace import OUTPUT

ROOT = Path(__file__).resolve().parents[1]
LOG = logging.getLogger("bench_foreign")
KIND, SCHEMA = "vss.foreign", 1
LIMIT_S, ENGINE = 900, "tensorrt_rtx"
TARGETS = ("sm86",)


def made(name: str, net: Net) -> tuple[nn.Module, Tensor]:
    """The network, the same weights every time, with uneven batch norms that fit noise; and its example."""
    torch.manual_seed(0)
    model = net.make().eval()
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, net.side, net.side, generator=generator)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            if norm.affine:
                norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator))
                norm.bias.copy_(0.2 * torch.randn(norm.bias.shape, generator=generator))
    if norms:
        images = torch.randn(4, 3, net.side, net.side, generator=generator)
        recalibrate_bn(model, [images + torch.randn(4, 3, 1, 1, generator=generator)], forward=forward_of(name, net))
    return model, image


class Row:
    """What is known of one network, stage by stage; the first stage that fails ends it."""

    def __init__(self, name: str, net: Net) -> None:
        self.name, self.net, self.forward = name, net, forward_of(name, net)
        self.facts: dict[str, Any] = {"stage": "build", "status": "ok", "reason": ""}

    def run(self) -> dict[str, Any]:
        """All stages; an error of any kind is a fact."""
        try:
            self.model, self.example = made(self.name, self.net)
            for stage in (self.plan, self.verify, self.train, self.save, self.export, self.engine):
                self.facts["stage"] = stage.__name__
                stage()
        except VssError as error:
            self.facts |= {"status": "refused", "reason": str(error)}
        except Exception as error:
            traceback.print_exc()
            self.facts |= {"status": "traceback", "reason": f"{type(error).__name__}: {one_line(str(error), 300)}"}
        return self.facts

    def plan(self) -> None:
        """Groups, what they reach, and a plan, with seconds."""
        start = time.process_time()
        groups = find_groups(self.model, self.example, forward=self.forward)
        self.facts["groups_s"] = round(time.process_time() - start, 2)
        cost = CostModel.measure(self.model, self.example, forward=self.forward)
        members, total = list(groups), cost.total("macs", [], [])
        macs = {name: count * math.prod(cost.shapes[name]) for name, count in cost.positions.items()}
        reasons: dict[str, float] = defaultdict(float)
        for lock in groups.locked:
            reasons[lock.reason] += macs.get(f"{lock.layer}.weight", 0) / total
        self.facts |= {
            "params_m": round(cost.total("params", [], []) / 1e6, 2),
            "macs_g": round(total / 1e9, 3),
            "groups": len(groups),
            "locked_share": round(sum(reasons.values()), 4),
            "unreached_share": round(cost.fixed(members) / total, 4),
            "least_macs": round(cost.total("macs", members, [group.unit for group in members]) / total, 4),
            "locked": {reason: round(share, 4) for reason, share in sorted(reasons.items(), key=lambda r: -r[1])},
            "outputs": [lock.layer for lock in groups.locked if lock.reason == OUTPUT],
        }
        start = time.process_time()
        self.facts["budget"] = "macs"
        try:
            plan = self.planned(groups, "macs")
        except VssError as error:
            if not isinstance(error.__cause__, Unreachable):
                raise
            self.facts["budget"] = "channels"
            plan = self.planned(groups, "channels")
        self.facts["plan_s"] = round(self.facts["groups_s"] + time.process_time() - start, 2)
        self.small, self.made_plan = apply_plan(self.model, plan), plan
        self.facts |= {
            f"{kind}_kept": round(plan.cost_after[kind] / plan.cost_before[kind], 4) for kind in ("macs", "params")
        }

    def planned(self, groups: Any, kind: Any) -> Any:
        """A plan for half."""
        budget = Budget(kind=kind, keep=0.5)
        return make_plan(self.model, self.example, budget=budget, groups=groups, forward=self.forward)

    def verify(self) -> None:
        """masked == sliced at two sizes, or at one where the network takes no other."""
        side = self.net.side
        sizes = [(side, side), (side + 32, side)]
        try:
            with torch.no_grad():
                (self.forward or default_forward)(self.model, at_size(self.example, sizes[1], 1))
        except Exception:  # whatever a foreign network says to another size
            sizes = sizes[:1]
        checks = verify(self.model, self.small, self.made_plan, sizes, example=self.example, forward=self.forward)
        self.facts |= {"sizes": len(sizes), "masked_max_rel": checks["masked_max_rel"]}

    def train(self) -> None:
        """One step on two images."""
        self.small.train()
        found = (self.forward or default_forward)(self.small, paired(self.example))
        loss = torch.stack([value.square().mean() for value in logits_of(found)]).sum()
        loss.backward()
        bad = [name for name, p in self.small.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        if bad or not loss.isfinite():
            raise VssError(f"training the cut network gives NaN or infinity in {bad[:1] or 'the loss'}.")
        torch.optim.SGD(self.small.parameters(), lr=1e-4).step()
        self.small.zero_grad()
        self.small.eval()

    def save(self) -> None:
        """Loaded into a new network of the factory, every bit and every output is the same."""
        with tempfile.TemporaryDirectory() as folder:
            vss.save(self.small, Path(folder) / "net.safetensors")
            again = vss.load(Path(folder) / "net.safetensors", model=self.net.make()).eval()
        before, after = self.small.state_dict(), again.state_dict()
        if list(before) != list(after) or not all(torch.equal(before[name], after[name]) for name in before):
            raise VssError("the loaded network's weights are not those that were saved.")
        with torch.no_grad():
            call = self.forward or default_forward
            pairs = zip(*(logits_of(call(net, self.example)) for net in (self.small, again)), strict=True)
            if not all(torch.equal(a, b) for a, b in pairs):
                raise VssError("the loaded network's outputs are not those of the saved one.")

    def export(self) -> None:
        """ONNX, equal to torch in ONNX Runtime; with a fixed batch where the network allows no other."""
        self.folder = tempfile.TemporaryDirectory()
        self.onnx = Path(self.folder.name) / "net.onnx"
        options: dict[str, Any] = {"example": self.example, "forward": self.forward}
        try:
            exported = deploy.export(self.small, self.onnx, **options)
            self.facts["batch"] = "any"
        except VssError as error:
            self.facts |= {"batch": "1", "batch_reason": one_line(str(error), 300)}
            exported = deploy.export(self.small, self.onnx, batch=1, parity_batches=(1,), **options)
        self.facts |= {"onnx_max_rel": exported["parity"]["max_rel"], "onnx_nodes": exported["nodes_after"]}

    def engine(self) -> None:
        """An engine for one target, built and not run; a refusal is a fact of TensorRT and no failure of the row."""
        if BACKENDS[ENGINE].unavailable():
            return
        from vss.deploy.backends.trt_plan import declared

        size = (self.net.side, self.net.side)
        try:
            profile = spans(declared(onnx_file.load(self.onnx)), (1, 2, 4), (size, size, size))
            plan = BuildPlan(targets=TARGETS, profiles=(profile,) if self.facts["batch"] == "any" else ())
            BACKENDS[ENGINE].build(self.onnx, Path(self.folder.name) / "net.engine", BuildSpec(plan=plan))
            self.facts["engine"] = "built"
        except VssError as error:
            self.facts["engine"] = one_line(str(error), 300)


def beside(name: str, net: Net, outputs: list[str]) -> dict[str, Any]:
    """torch-pruning on the same network: does it run, is it exact, seconds."""
    import torch_pruning as tp

    facts: dict[str, Any] = {"status": "ok", "reason": ""}
    try:
        model, example = made(name, net)
        call = forward_of(name, net) or default_forward
        mask = made(name, net)[0]
        start = time.process_time()
        modules = dict(model.named_modules())
        pruner = tp.pruner.MagnitudePruner(
            model, example, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.3,
            ignored_layers=[modules[each] for each in outputs if each in modules],
            forward_fn=lambda net, x: logits_of(call(net, x)),
            output_transform=lambda found: sum(value.sum() for value in found),
        )  # fmt: skip
        names = {module: each for each, module in modules.items()}
        zeroed = dict(mask.named_modules())
        alive: dict[nn.Module, list[int]] = {}
        for group in pruner.step(interactive=True):
            for dep, indices in group:
                layer = dep.target.module
                if layer in names and "out_channels" in dep.handler.__name__:
                    _zero(zeroed[names[layer]], layer, indices, alive)
            group.prune()
        facts["seconds"] = round(time.process_time() - start, 2)
        with torch.no_grad():
            pairs = list(zip(*(logits_of(call(each.double().eval(), example.double())) for each in (mask, model)),
                             strict=True))  # fmt: skip
        after, before = (sum(map(Tensor.numel, each.parameters())) for each in (model, mask))
        facts["removed_params"] = round(1 - after / before, 4)
        spread = max(float((a - b).abs().max() / max(float(a.std()), 1e-12)) for a, b in pairs)
        facts |= {"masked_max_rel": spread, "exact": spread < 1e-4}
    except Exception as error:
        traceback.print_exc()
        facts |= {"status": "traceback", "reason": f"{type(error).__name__}: {one_line(str(error), 300)}"}
    return facts


def _zero(layer: Any, cut: nn.Module, indices: list[int], alive: dict[nn.Module, list[int]]) -> None:
    """Zero output channels by their first numbers; `indices` count what earlier groups left."""
    dim = int(getattr(layer, "transposed", False) and layer.groups == 1)
    weight = layer.weight if layer.weight is not None else layer.running_mean
    left = alive.setdefault(cut, list(range(weight.shape[dim])))
    gone = sorted({left[index] for index in indices})
    with torch.no_grad():
        if layer.weight is not None:
            layer.weight.index_fill_(dim, torch.tensor(gone), 0.0)
        if getattr(layer, "bias", None) is not None:
            layer.bias[gone] = 0.0
    alive[cut] = [index for index in left if index not in set(gone)]


def child(name: str, side: str, outputs: list[str]) -> None:
    """One side of one row; the answer is the last line."""
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    net = nets()[name]
    facts = Row(name, net).run() if side == "vss" else beside(name, net, outputs)
    print("\n" + json.dumps(facts))


def asked(name: str, side: str, outputs: list[str]) -> dict[str, Any]:
    """One side of one row, in a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--side", side, "--outputs", json.dumps(outputs)]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"status": "hang", "reason": f"no answer in {LIMIT_S} s", "wall_s": LIMIT_S}
    try:
        facts = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        facts = {"status": "crash", "reason": f"exit {done.returncode}: {one_line(done.stderr[-300:])}"}
    if facts["status"] == "traceback":
        LOG.info("%s", done.stderr[-1500:])
    return facts | {"wall_s": round(time.perf_counter() - start, 1)}


def counts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the whole table."""
    ours = [row["vss"] for row in rows if row.get("vss")]
    theirs = [row["torch_pruning"] for row in rows if row.get("torch_pruning")]
    planned = [each for each in ours if "plan_s" in each]
    both = [row for row in rows if row.get("vss", {}).get("plan_s") and row.get("torch_pruning", {}).get("seconds")]
    found: dict[str, Any] = {
        "networks": len(rows),
        "vss": dict(Counter(each["status"] for each in ours)),
        "cut and proven": sum("masked_max_rel" in each for each in ours),
        "two sizes": sum(each.get("sizes") == 2 for each in ours),
        "exported": sum("onnx_nodes" in each for each in ours),
        "exported with a free batch": sum("onnx_nodes" in each and each["batch"] == "any" for each in ours),
        "engines built": sum(each.get("engine") == "built" for each in ours),
        "half the MACs": sum(each.get("budget") == "macs" for each in planned),
        "torch-pruning": dict(Counter(each["status"] for each in theirs)),
        "torch-pruning exact": sum(bool(each.get("exact")) for each in theirs),
    }
    if planned:
        for key in ("locked_share", "unreached_share", "least_macs", "plan_s"):
            values = sorted(each[key] for each in planned)
            found[key] = {"median": statistics.median(values), "worst": values[-1]}
    if both:
        found["seconds where both plan"] = {
            "networks": len(both),
            **{side: {"median": statistics.median(values), "worst": max(values)} for side, values in (
                ("vss", [row["vss"]["plan_s"] for row in both]),
                ("torch-pruning", [row["torch_pruning"]["seconds"] for row in both]))},
        }  # fmt: skip
    return found


class Table:
    """The rows in a file, written after each."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, environment()
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.rows = {row["net"]: row for row in read_json(path, kind=KIND, schema=SCHEMA)["rows"]}

    def put(self, name: str, row: dict[str, Any], order: list[str]) -> None:
        """Put a row in its place and write the file."""
        self.rows[name] = row
        rows = sorted(self.rows.values(), key=lambda each: order.index(each["net"]))
        body = {"environment": self.known, "counts": counts(rows), "rows": rows}
        write_json(self.path, {"kind": KIND, "schema": SCHEMA, **body})


def work(arguments: argparse.Namespace, table: Table, every: dict[str, Net]) -> None:
    """All rows that are asked for and due."""
    missing = {each.family for each in every.values() if not importlib.util.find_spec(package_of(each.family))}
    for family in sorted(missing):
        LOG.info("%s is not installed; its rows stay as they are", package_of(family))
    names = [name for name, net in every.items() if net.family not in missing
             and (not arguments.net or name in arguments.net)
             and (not arguments.family or net.family in arguments.family)]  # fmt: skip
    packages = {name: importlib.metadata.version(name) for name in ("torch", "torch-pruning")}

    def one(name: str) -> None:
        row = table.rows.get(name, {}) | {"net": name, "family": every[name].family, "side": every[name].side}
        for side in ("vss", "torch_pruning"):
            old = row.get(side)
            due = old is None or arguments.again or (arguments.failed and old["status"] != "ok")
            if due and arguments.side in (None, side):
                row = row | {side: asked(name, side, row.get("vss", {}).get("outputs", []))} | {"packages": packages}
        table.put(name, row, list(every))
        LOG.info("%s", line_of(row))

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, names))


def line_of(row: dict[str, Any]) -> str:
    """One row for the log."""
    ours, theirs = row.get("vss", {}), row.get("torch_pruning", {})
    said = {key: ours.get(key) for key in ("plan_s", "groups", "locked_share", "macs_kept", "batch", "engine")}
    failed = f" AT {ours.get('stage')}: {ours.get('reason')}" if ours.get("status") != "ok" else ""
    other = " ".join(str(theirs.get(key)) for key in ("status", "exact", "seconds")) + theirs.get("reason", "")[:80]
    return f"{row['net']:44s} {ours.get('status')}{failed} {said} | torch-pruning {other}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", type=lambda text: text.split(","), help="with commas; default: all")
    parser.add_argument("--net", action="append", help="a row by its name; repeat it")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once, one thread each")
    parser.add_argument("--again", action="store_true", help="compute rows that are there already")
    parser.add_argument("--failed", action="store_true", help="compute rows that failed again")
    parser.add_argument("--side", choices=("vss", "torch_pruning"))
    parser.add_argument("--out", type=Path, help="default benchmarks/results/<machine>/<version>--foreign.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--outputs", type=json.loads, default=[], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.child:
        child(arguments.child, arguments.side, arguments.outputs)
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    LOG.setLevel(logging.INFO)
    every = nets()
    results = ROOT / "benchmarks" / "results" / environment()["machine"]
    table = Table(arguments.out or results / f"{vss.__version__}--foreign.json")
    work(arguments, table, every)
    for key, value in counts(list(table.rows.values())).items():
        LOG.info("%s: %s", key, value)
    return 0 if all(row["vss"]["status"] == "ok" for row in table.rows.values() if "vss" in row) else 1


if __name__ == "__main__":
    sys.exit(main())
