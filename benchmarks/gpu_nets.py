"""Networks at full size, uncut against cut, in torch: is what is cut off the MACs won in time?

    python benchmarks/gpu_nets.py [--device cuda|cpu] [--quick] [--seconds-left 220] [--write]

On CUDA: float16, channels last, one image, as a CUDA graph, and with torch.compile; on a CPU: float32, eager. Cut are
half of the MACs by l1 with widths in steps of 1, 8, 16 and 32, and to half of the time (0.5x) by a latency table that
is measured here. Weights are random: times alone are measured. Uncut and cut run interleaved, and a ratio is the median
of the ratios round by round. `efficiency` is the speed-up over the factor of the MACs (1: all of the cut is won). What
is known is kept after every row, and a call goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import STOPPED, facts, result_path, write
from torch import Tensor, nn

from vss import models
from vss.core.errors import VssError
from vss.data import Preprocess
from vss.deploy.profile.build import Effort, build
from vss.deploy.profile.setting import Setting
from vss.deploy.profile.subject import open_subject
from vss.prune import Budget, apply_plan, count, make_plan
from vss.prune.budget import top_channels
from vss.prune.latency import choices, search

ROOT = Path(__file__).resolve().parents[1]
LOG = logging.getLogger("gpu_nets")
ALIGNS = (1, 8, 16, 32)
GOAL = 0.5
LABELS = {"labels": True}


@dataclass(frozen=True)
class Net:
    """A network at its size (H, W). Where that is large, cuts are planned, and time is the target, at `small`: planning
    and the shapes of a table run on the host."""

    name: str
    classes: int
    size: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)
    small: tuple[int, int] | None = None

    @property
    def example(self) -> Tensor:
        return torch.zeros(1, 3, *(self.small or self.size))


NETS = (
    Net("resnet18_seg", 11, (360, 480)),
    Net("unet", 11, (360, 480), {"width": 64}),
    Net("segdecnet", 1, (640, 232)),
    Net("deeplabv3_resnet50", 19, (1024, 2048), small=(256, 512)),
)
QUICK = (Net("unet", 3, (96, 128), {"width": 32, "depth": 2}),)
TABLE = Effort(vectors=1, coarse=16, batch=8, limit=24, error=0.05, tests=4, cliffs=0, passes=1)
SCAN = Effort(vectors=1, coarse=4, batch=4, limit=6, error=0.5, tests=1, cliffs=0, passes=1)


class Runner:
    """A network on one image, ready to be timed: milliseconds of a call, the minimum window of `seconds`."""

    def __init__(self, model: nn.Module, size: tuple[int, int], device: str, *, compiled: bool = False) -> None:
        self.cuda = device == "cuda"
        dtype = torch.float16 if self.cuda else torch.float32
        model = model.eval().to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        image = torch.randn(1, 3, *size).to(device, dtype).contiguous(memory_format=torch.channels_last)
        call = torch.compile(model) if compiled else model
        self._model = model
        with torch.inference_mode():
            for _ in range(3):
                call(image)
            self.call: Callable[[], object] = self._recorded(call, image) if self.cuda else lambda: call(image)
            self.repeats = max(1, min(200, round(5.0 / max(self._window(1), 1e-3))))

    def _recorded(self, call: Callable[[Tensor], object], image: Tensor) -> Callable[[], object]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(image)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._held = call(image), image
        return graph.replay

    def _window(self, repeats: int) -> float:
        """Milliseconds of a call, over so many of them."""
        if not self.cuda:
            begin = time.perf_counter()
            for _ in range(repeats):
                self.call()
            return (time.perf_counter() - begin) * 1e3 / repeats
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            self.call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / repeats

    def __call__(self) -> float:
        with torch.inference_mode():
            return self._window(self.repeats)


def interleaved(sides: dict[str, Runner], rounds: int) -> dict[str, Any]:
    """Medians of both sides and of their ratio, with its range, after two rounds that are dropped."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 2):
        for name, runner in sides.items():
            elapsed = runner()
            if turn >= 2:
                times[name].append(elapsed)
    ratios = [a / b for a, b in zip(times["uncut"], times["cut"], strict=True)]
    row: dict[str, Any] = {f"{name}_ms_p50": statistics.median(values) for name, values in times.items()}
    row |= {"speedup": statistics.median(ratios), "speedup_min": min(ratios), "speedup_max": max(ratios)}
    return row | {"rounds": rounds}


class Suite:
    """The rows of all networks; `once` measures what is not known."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.begin, self.arguments = time.monotonic(), arguments
        self.rounds = 3 if arguments.quick else 25
        self.known = facts(arguments.device, rounds=self.rounds)
        self.rows: dict[str, Any] = {}
        path = result_path("nets", arguments.device, self.known)
        if arguments.write and path.is_file():
            record = json.loads(path.read_text())
            self.rows = record["rows"] if record["environment"]["git"] == self.known["git"] else {}
        self.out_of_time = self.failed = False

    def left(self) -> float:
        return float(self.arguments.seconds_left - (time.monotonic() - self.begin))

    def once(self, key: str, needs: float, work: Callable[[], dict[str, Any]]) -> None:
        """`needs`: seconds that this row takes at most, as a rule. What failed is tried again by the next call."""
        if ("speedup" in self.rows.get(key, {})) or self.out_of_time:
            return
        if self.left() < needs:
            self.out_of_time = True
            LOG.info("%.0f s are left and %s needs about %.0f s; what is measured stays, the same call goes on",
                     max(0.0, self.left()), key, needs)  # fmt: skip
            return
        try:
            row = work()
        except (VssError, RuntimeError) as error:  # out of memory, a compiler that is not there
            row, self.failed = {"failed": str(error).strip().partition("\n")[0]}, True
        self.rows[key] = row
        if self.arguments.write:
            write("nets", self.arguments.device, self.known, {"rows": self.rows})
        LOG.info("%-40s %s", key, summary(row))


def summary(row: dict[str, Any]) -> str:
    if "speedup" not in row:
        return json.dumps(row)
    text = f"{row['uncut_ms_p50']:.3f} -> {row['cut_ms_p50']:.3f} ms, {row['speedup']:.2f}x"
    return f"{text} for {row['macs_factor']:.2f}x fewer MACs: {row['efficiency']:.2f}"


def network(net: Net) -> nn.Module:
    torch.manual_seed(0)
    return models.build(net.name, net.classes, **net.options).eval()


def compare(suite: Suite, net: Net, small: nn.Module, compiled: bool = False) -> dict[str, Any]:
    model, device = network(net), suite.arguments.device
    before, after = (count(each, tuple(net.example.shape[2:]))["macs_g"] for each in (model, small))
    sides = {"uncut": Runner(model, net.size, device, compiled=compiled),
             "cut": Runner(small, net.size, device, compiled=compiled)}  # fmt: skip
    row = interleaved(sides, suite.rounds) | {"size": list(net.size), "macs_factor": before / after}
    return row | {"efficiency": row["speedup"] / row["macs_factor"]}


def cut_macs(suite: Suite, net: Net, align: int, *, compiled: bool = False) -> dict[str, Any]:
    model = network(net)
    plan = make_plan(model, net.example, budget=Budget(kind="macs", keep=0.5, align=align))
    return compare(suite, net, apply_plan(model, plan), compiled)


def cut_time(suite: Suite, net: Net) -> dict[str, Any]:
    """To half of the time, by a table of this machine; one correction where the first cut missed."""
    device, quick, part = suite.arguments.device, suite.arguments.quick, goal_of(suite)
    precision = "fp16" if device == "cuda" else "fp32"
    options = LABELS if net.name != "segdecnet" else {}
    setting, path = Setting("torch", device, precision, 1, options=options), table_path(suite, net)
    with tempfile.TemporaryDirectory() as folder:
        subject = open_subject(network(net), Path(folder), Preprocess(size=net.size), setting, seconds=0.02)
        table = build(subject, path, effort=SCAN if quick else TABLE)
    predict = table.model()
    whole = float(predict(torch.tensor(table.full).double().numpy())[0])
    asked, row = part * whole, dict[str, Any]()
    for _ in range(1 if quick else 2):

        def choose(groups: Any, scores: Any, rule: Any, goal: float = asked) -> dict[str, Tensor]:
            widths = search(choices(groups, scores, step=table.step, floor=0.02, rounding=rule), predict, goal)
            pairs = zip(groups, widths, strict=True)
            return {g.id: top_channels(scores[g.id], int(each), g.unit) for g, each in pairs}

        plan = make_plan(network(net), net.example, choose=choose)
        row = compare(suite, net, apply_plan(network(net), plan))
        row |= {"asked": part, "reached": 1 / row["speedup"], "step": table.step}
        if abs(row["reached"] / part - 1) < 0.05:
            break
        asked *= part / row["reached"]
    return row


def goal_of(suite: Suite) -> float:
    """The part of the time that is asked for; of a dry run one that the small network reaches on a busy machine."""
    return 0.8 if suite.arguments.quick else GOAL


def table_path(suite: Suite, net: Net) -> Path:
    commit = str(suite.known["git"]["commit"])[:12] if suite.known["git"] else "none"
    path = ROOT / "build" / "gpu" / f"{net.name}-{suite.arguments.device}-{net.size[0]}-{commit}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def run(suite: Suite) -> None:
    """What is cheap first, for all networks; the compiler last."""
    cuda = suite.arguments.device == "cuda"
    nets = QUICK if suite.arguments.quick else NETS
    for net in nets:
        large = net.size[0] * net.size[1] > 500_000
        for align in ALIGNS[:2] if suite.arguments.quick else ALIGNS:
            suite.once(f"{net.name} macs 0.5 align {align}", 15 if large else 6, partial(cut_macs, suite, net, align))
    for net in nets:
        here = replace(net, size=net.small or net.size)
        suite.once(
            f"{net.name} latency {goal_of(suite)}x", 10 if suite.arguments.quick else 40, partial(cut_time, suite, here)
        )
    for net in nets if cuda or suite.arguments.compile else ():
        suite.once(f"{net.name} macs 0.5 align 8 compiled", 60, partial(cut_macs, suite, net, 8, compiled=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="one small network, few rounds")
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU, too")
    parser.add_argument("--seconds-left", type=float, default=220.0, help="begin no row for which they are too few")
    parser.add_argument("--write", action="store_true", help="keep results/<machine>/<version>--nets[-cuda].json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("vss").setLevel(logging.WARNING)
    suite = Suite(arguments)
    run(suite)
    raise SystemExit(1 if suite.failed else STOPPED if suite.out_of_time else 0)


if __name__ == "__main__":
    main()
