"""Whole SIRFP scoring of deeplabv3_resnet50: the ops against the published procedure in plain torch, on the same maps.

    python benchmarks/bench_sirfp.py [--batch 1] [--size 360,480] [--rounds 3] [--threads 2] [--device cpu|cuda]
                                     [--ckpt FILE] [--data NAME=FOLDER] [--widest 2048] [--quick] [--write]

Scoring is what the published code does at every batch norm: L1-normalised Gram matrix and spread of Sobel edges,
averaged with decay 0.999; then the greedy elimination of |S|, and 0.4 (backbone) or 0 (head) times the edges less the
sum at removal. Both sides see the very same maps, in turns within one forward; the forward itself is not counted. The
published elimination runs once a layer, right before ours; ours takes all layers in one call.

Kept channels are compared at half of all channels in each of the two pools, by the published rule. Peak extra memory is
what scoring holds between maps plus the most that the work on one map takes; it is measured in a pass of its own.
`--widest` leaves out layers with more channels. `--quick`: an eighth of the size each way, one round, layers up to 512.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import Clock, facts, peak_of, write  # noqa: E402
from plain import greedy_order, greedy_order_incremental  # noqa: E402

import vss  # noqa: E402
from vss import models, ops  # noqa: E402

LOG = logging.getLogger("bench_sirfp")
RHO, LAMBDA, EPS = 0.999, 0.4, 1e-5
SOBEL = ((-0.5, 0.0, 0.5), (-1.0, 0.0, 1.0), (-0.5, 0.0, 0.5))


class Published:
    """Statistics of one layer as published: a normalised copy of the maps, a (B, C, C) buffer in host memory, Sobel by
    depthwise convolutions."""

    def __init__(self, channels: int, device: str) -> None:
        self.similarity, self.edges = torch.zeros(channels, channels), torch.zeros(channels, device=device)

    def gram(self, x: Tensor) -> None:
        rows = (x / (x.abs().sum((2, 3), keepdim=True) + EPS)).flatten(2)
        each = torch.empty(x.shape[0], x.shape[1], x.shape[1])
        for b in range(x.shape[0]):
            each[b] = rows[b] @ rows[b].T
        self.similarity = RHO * self.similarity + (1 - RHO) * each.mean(0)

    def edge(self, x: Tensor) -> None:
        kernel = torch.tensor(SOBEL, device=x.device)
        gx, gy = (F.conv2d(x, k.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1]) for k in (kernel, kernel.T))
        strength = torch.sqrt(gx**2 + gy**2)
        variance = (strength**2).mean((2, 3)) - strength.mean((2, 3)) ** 2
        self.edges = RHO * self.edges + (1 - RHO) * variance.clamp(min=0).sqrt().mean(0)

    def matrix(self) -> Tensor:
        return self.similarity.abs().to(self.edges.device)

    @property
    def state(self) -> list[Tensor]:
        return [self.similarity, self.edges]


class Ours:
    """The same statistics by `map_stats`, one read of the maps, and `gram_accumulate`, straight into the average."""

    def __init__(self, channels: int, device: str) -> None:
        self.similarity = torch.zeros(channels, channels, device=device)
        self.edges = torch.zeros(channels, device=device)
        self.sums = torch.zeros(0)

    def edge(self, x: Tensor) -> None:
        self.sums = ops.map_stats(x, padding="zeros")
        edge, square = (
            self.sums[..., ops.STATS.index(name)].double() / (x.shape[2] * x.shape[3])
            for name in ("edge_sum", "edge_square_sum")
        )
        spread = (square - edge.square()).clamp(min=0).sqrt().mean(0)
        self.edges.mul_(RHO).add_(spread.float(), alpha=1 - RHO)

    def gram(self, x: Tensor) -> None:
        norms = self.sums[..., ops.STATS.index("abs_sum")] + EPS
        norms = norms * (len(x) / (1 - RHO)) ** 0.5  # the average's weight goes into the norms
        ops.gram_accumulate(self.similarity.mul_(RHO), x, norms=norms)

    def matrix(self) -> Tensor:
        return self.similarity.abs_()

    @property
    def state(self) -> list[Tensor]:
        return [self.similarity, self.edges]


class Scoring:
    """Both sides on every batch norm of a network, and what their work took."""

    def __init__(self, model: nn.Module, arguments: argparse.Namespace) -> None:
        self.device, self.clock = arguments.device, Clock(arguments.device)
        self.model, self.memory = model, ""
        norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        self.layers = {n: m for n, m in norms.items() if m.num_features <= arguments.widest}
        self.reset()

    def reset(self) -> None:
        self.sides = {
            kind.__name__.lower(): {n: kind(m.num_features, self.device) for n, m in self.layers.items()}
            for kind in (Published, Ours)
        }
        self.spent = {side: {"edge": 0.0, "gram": 0.0} for side in self.sides}
        self.peak, self.turn = 0, 0

    def _see(self, name: str, x: Tensor) -> None:
        x, self.turn = x.detach(), self.turn + 1
        if self.memory:
            side = self.sides[self.memory][name]
            self.peak = max(self.peak, peak_of(lambda: (side.edge(x), side.gram(x)), self.device)[0])
            return
        for side in sorted(self.sides, reverse=bool(self.turn % 2)):
            for part in ("edge", "gram"):
                work: Callable[[Tensor], None] = getattr(self.sides[side][name], part)
                self.spent[side][part] += self.clock(lambda work=work: work(x))  # type: ignore[misc]

    @torch.no_grad()
    def forward(self, images: Tensor, memory: str = "") -> None:
        self.memory = memory
        hooks = [
            m.register_forward_hook(lambda _m, _i, out, name=name: self._see(name, out))
            for name, m in self.layers.items()
        ]
        self.model(images)
        for hook in hooks:
            hook.remove()

    def eliminate(self) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
        """Milliseconds of the elimination of all layers by every side, and the scores of both."""
        given = {side: [layer.matrix() for layer in layers.values()] for side, layers in self.sides.items()}
        taken = {"published": 0.0, "ours": 0.0, "incremental": 0.0}
        found: dict[str, list[Any]] = {"published": [], "ours": []}
        for matrix in given["published"]:
            taken["published"] += self.clock(lambda m=matrix: found["published"].extend(greedy_order([m])))  # type: ignore[misc]
            taken["incremental"] += self.clock(lambda m=matrix: greedy_order_incremental([m]))  # type: ignore[misc]
        taken["ours"] = self.clock(lambda: found["ours"].extend(ops.greedy_orders(given["ours"])))
        scores = {
            side: {
                name: weight(name) * layer.edges.cpu().double() - value.cpu().double()
                for (name, layer), (_, value) in zip(self.sides[side].items(), found[side], strict=True)
            }
            for side in found
        }
        return taken, scores


def weight(layer: str) -> float:
    return LAMBDA if in_backbone(layer) else 0.0


def in_backbone(layer: str) -> bool:
    return "backbone" in layer


def kept(scores: dict[str, Tensor], fraction: float = 0.5) -> dict[str, Tensor]:
    """Masks of kept channels: above the threshold of the pool, at least 2 % of a layer."""
    masks = {}
    for pool in (True, False):
        names = [name for name in scores if in_backbone(name) == pool]
        if not names:
            continue
        ranked = torch.cat([scores[name] for name in names]).sort()[0]
        threshold = ranked[int(len(ranked) * fraction)]
        for name in names:
            least = max(1, int(len(scores[name]) * 0.02))
            masks[name] = scores[name] > threshold
            masks[name][scores[name].argsort(descending=True)[:least]] = True
    return masks


def agreement(scores: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    masks = {side: kept(found) for side, found in scores.items()}
    differ = sum(int((masks["published"][n] != masks["ours"][n]).sum()) for n in masks["ours"])
    pairs = [(scores["published"][n], scores["ours"][n]) for n in masks["ours"]]
    largest = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)
    channels = sum(len(a) for a, _ in pairs)
    return {"channels": channels, "kept_differ": differ, "same_kept_set": differ == 0, "score_difference": largest}


def images_of(arguments: argparse.Namespace) -> Tensor:
    """Training images of --data, normalised; else noise."""
    height, width = arguments.size
    if arguments.data is None:
        return torch.randn(arguments.batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    from vss.data import Preprocess, SegSplit, open_data

    name, _, folder = arguments.data.partition("=")
    preprocess = Preprocess(size=arguments.size)
    split = SegSplit(open_data(name, Path(folder)), "train", preprocess)
    return preprocess.normalise(torch.stack([split[i]["image"] for i in range(arguments.batch)]))


def measure(model: nn.Module, arguments: argparse.Namespace) -> dict[str, Any]:
    images, scoring = images_of(arguments).to(arguments.device), Scoring(model, arguments)
    scoring.forward(images)  # libraries, threads and pools exist from here on
    best: dict[str, dict[str, float]] = {}
    for _ in range(arguments.rounds):
        scoring.reset()
        scoring.forward(images)
        total = {side: sum(parts.values()) for side, parts in scoring.spent.items()}
        if not best or total["ours"] < sum(best["ours"].values()):
            best = scoring.spent
    greedy, scores = scoring.eliminate()
    peaks = {}
    for side in ("published", "ours"):
        scoring.reset()
        scoring.forward(images, memory=side)
        held = sum(t.numel() * t.element_size() for layer in scoring.sides[side].values() for t in layer.state)
        peaks[side] = {"held_mib": held / 2**20, "on_one_map_mib": scoring.peak / 2**20}
        peaks[side]["peak_mib"] = sum(peaks[side].values())
    squares = sum(4 * m.num_features**2 for m in scoring.layers.values()) / 2**20
    times = {side: best[side] | {"greedy": greedy[side]} for side in ("published", "ours")}
    return report(times, greedy["incremental"]) | agreement(scores) | {"memory": peaks, "sum_of_squares_mib": squares,
        "layers": len(scoring.layers), "batch": len(images), "size": list(images.shape[2:])}  # fmt: skip


def report(times: dict[str, dict[str, float]], incremental: float) -> dict[str, Any]:
    published, ours = times["published"], times["ours"]
    both = (published["greedy"] + published["edge"]) / (ours["greedy"] + ours["edge"])
    ratios = {part: published[part] / ours[part] for part in ours}
    overall = sum(published.values()) / sum(ours.values())
    return {
        "ms": times, "incremental_greedy_ms": incremental, "speedup": ratios | {"greedy and edge": both, "all": overall,
        "all, incremental greedy": (published["edge"] + published["gram"] + incremental) / sum(ours.values())},
    }  # fmt: skip


def sides_of(text: str) -> tuple[int, int]:
    height, width = map(int, text.split(","))
    return height, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=sides_of, default=(360, 480), metavar="H,W")
    parser.add_argument("--rounds", type=int, default=3, help="of the statistics; the fastest is taken")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ckpt", type=Path, help="a trained network in place of random weights")
    parser.add_argument("--data", metavar="NAME=FOLDER", help="training images in place of noise")
    parser.add_argument("--widest", type=int, default=2048)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="write results/<machine>/<version>--sirfp.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.rounds = (arguments.size[0] // 8, arguments.size[1] // 8), 1
        arguments.widest = min(arguments.widest, 512)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = vss.load(arguments.ckpt) if arguments.ckpt else models.build("deeplabv3_resnet50", 12)
    row = measure(model.to(arguments.device).eval(), arguments)
    for side, parts in row["ms"].items():
        LOG.info("%-10s %s", side, ", ".join(f"{part} {value:.1f} ms" for part, value in parts.items()))
    LOG.info("speed-up   %s", ", ".join(f"{part} {value:.1f}x" for part, value in row["speedup"].items()))
    LOG.info("memory     ours %.1f MiB, published %.1f MiB, sum of C^2 %.1f MiB", row["memory"]["ours"]["peak_mib"],
             row["memory"]["published"]["peak_mib"], row["sum_of_squares_mib"])  # fmt: skip
    LOG.info("%d of %d channels are kept by one side alone", row["kept_differ"], row["channels"])
    if arguments.write:
        known = facts(arguments.device, rounds=arguments.rounds)
        LOG.info("written: %s", write("sirfp", arguments.device, known, {"rows": [row]}))


if __name__ == "__main__":
    main()
