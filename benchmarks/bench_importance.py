"""channel_reduce against torch-pruning's own importances, over all groups of deeplabv3_resnet50.

    python benchmarks/bench_importance.py [--rounds 7] [--threads 2] [--device cpu|cuda] [--quick] [--write]

Both sides start from the same groups and end with the same scores, which are compared: the mean over all members of a
group (filters of producers, input slices of consumers), divided by the group's own mean. torch-pruning's side is
`MagnitudeImportance(p=1)` and `TaylorImportance()` called on every group in turn. Ours reduces every weight once along
each axis that some group asks for, in one call for each axis, and gathers all groups by one index.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import Clock, facts, summary, write  # noqa: E402

from vss import ops  # noqa: E402

LOG = logging.getLogger("bench_importance")
KINDS = (nn.Conv2d,)


def network(device: str, quick: bool) -> tuple[nn.Module, list[nn.Module]]:
    """deeplabv3_resnet50 of 12 classes with its auxiliary head, or resnet18, with random weights and gradients; and the
    layers that stay."""
    torch.manual_seed(0)
    model: Any = (
        torchvision.models.resnet18()
        if quick
        else torchvision.models.segmentation.deeplabv3_resnet50(
            weights=None, weights_backbone=None, num_classes=12, aux_loss=True
        )
    )
    model = model.to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return model, [model.fc] if quick else [model.classifier[-1], model.aux_classifier[-1]]


def groups_of(model: nn.Module, ends: list[nn.Module], device: str) -> list[Any]:
    import torch_pruning as tp

    example = torch.zeros(2, 3, 64, 64, device=device)
    graph = tp.DependencyGraph().build_dependency(model.eval(), example_inputs=example)
    return list(graph.get_all_groups(ignored_layers=ends, root_module_types=[nn.Conv2d]))


class Gather:
    """All groups as one gather from the sums of all weights, and one scatter to the scores of all groups."""

    def __init__(self, groups: list[Any], device: str) -> None:
        self.axes: tuple[dict[nn.Module, int], dict[nn.Module, int]] = ({}, {})  # axis -> layer -> offset in its sums
        pieces: list[tuple[int, nn.Module, list[int], list[int], int]] = []
        self.sizes, members = [], []
        for number, group in enumerate(groups):
            roots = [i for item in group for i in item.root_idxs]
            self.sizes.append(max(roots) + 1)
            found = [self._item(item) for item in group if isinstance(item.dep.target.module, KINDS)]
            pieces += [(axis, layer, idxs, root, number) for axis, layer, idxs, root in found]
            members.append(len(found))
        total = 0
        for axis, layers in enumerate(self.axes):
            for layer in layers:
                layers[layer] = total
                total += layer.weight.shape[axis]  # type: ignore[union-attr]
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.source = torch.tensor([self.axes[a][m] + i for a, m, idxs, _, _ in pieces for i in idxs], device=device)
        self.target = torch.tensor([starts[n] + r for *_, root, n in pieces for r in root], device=device)
        widths = torch.tensor(self.sizes, device=device)
        self.owner = torch.repeat_interleave(torch.arange(len(groups), device=device), widths)
        self.members, self.widths = torch.tensor(members, device=device)[self.owner], widths

    def _item(self, item: Any) -> tuple[int, nn.Module, list[int], list[int]]:
        axis = 0 if "out_channels" in item.dep.handler.__name__ else 1
        layer = item.dep.target.module
        self.axes[axis].setdefault(layer, 0)
        return axis, layer, list(item.idxs), list(item.root_idxs)

    def __call__(self, mode: str) -> Tensor:
        """Scores of all groups, one after the other."""
        weights = [layer.weight for layers in self.axes for layer in layers]
        grads = [weight.grad for weight in weights] if "product" in mode else []
        dims = [axis for axis, layers in enumerate(self.axes) for _ in layers]
        sums = ops.channel_reduce(weights, grads, mode=mode, dims=dims)  # type: ignore[arg-type]
        flat = torch.cat(sums)[self.source]
        scores = flat.new_zeros(len(self.owner)).index_add_(0, self.target, flat) / self.members
        means = flat.new_zeros(len(self.widths)).index_add_(0, self.owner, scores) / self.widths
        return scores / means[self.owner]


def compare(
    name: str, theirs: Callable[[], Tensor], ours: Callable[[], Tensor], a: argparse.Namespace
) -> dict[str, Any]:
    expected, got = theirs(), ours()
    difference = float(((got - expected).abs() / expected.abs().clamp(min=1e-12)).max())
    if not difference < 1e-3:
        raise SystemExit(f"{name}: scores differ by {difference:.2e} (relative)")
    clock, times = Clock(a.device), {"native": [], "torch_pruning": []}
    for turn in range(a.rounds + 1):
        for side, call in (("native", ours), ("torch_pruning", theirs)):
            elapsed = clock(call)
            if turn:
                times[side].append(elapsed)
    row = {"importance": name, "channels": len(got), "largest_relative_difference": difference} | summary(times)
    LOG.info("%-22s %8.2f ms, torch-pruning %8.2f ms: %.1fx, scores agree to %.1e", name, row["native_ms_p50"],
             row["torch_pruning_ms_p50"], row["speedup_over_torch_pruning"], difference)  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="resnet18, two rounds")
    parser.add_argument("--write", action="store_true", help="write results/<machine>/<version>--importance.json")
    arguments = parser.parse_args()
    arguments.rounds = min(arguments.rounds, 2) if arguments.quick else arguments.rounds
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    import torch_pruning as tp

    model, ends = network(arguments.device, arguments.quick)
    groups = groups_of(model, ends, arguments.device)
    gather = Gather(groups, arguments.device)
    options = {"target_types": list(KINDS)}
    magnitude, taylor = tp.importance.MagnitudeImportance(p=1, **options), tp.importance.TaylorImportance(**options)
    with torch.no_grad():
        rows = [
            compare(name, lambda call=call: torch.cat([call(g) for g in groups]), lambda m=mode: gather(m), arguments)
            for name, call, mode in (
                ("MagnitudeImportance", magnitude, "l1"),
                ("TaylorImportance", taylor, "abs_product"),
            )
        ]
    LOG.info("%d groups, %d members", len(groups), len(gather.source))
    if arguments.write:
        known = facts(arguments.device, rounds=arguments.rounds, torch_pruning=tp.__version__)
        LOG.info("written: %s", write("importance", arguments.device, known, {"rows": rows}))


if __name__ == "__main__":
    main()
