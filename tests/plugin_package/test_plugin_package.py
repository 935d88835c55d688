"""A network of a user's package, found by its entry point in a process that names it and imports nothing else of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vss import models
from vss.core.errors import VssError

HERE = Path(__file__).resolve().parent

PLAN = """
import json, sys, torch, vss
from vss import models
from vss.prune import apply_plan, find_groups, make_plan, verify

torch.manual_seed(0)
net = models.build("example_net", 3, width=12).eval()
example = torch.zeros(1, 3, 32, 32)
groups = find_groups(net, example)
plan = make_plan(net, example, budget={"kind": "macs", "keep": 0.5}, groups=groups)
small = apply_plan(net, plan)
checks = verify(net, small, plan, [(32, 32), (48, 32)])
vss.save(small, sys.argv[1])
plan.save(sys.argv[2])
json.dump({
    "groups": {g.id: g.module_names("producer") for g in groups},
    "norms": [slot.tensor for g in groups for slot in g.by_role("norm")],
    "kept": plan.cost_after["macs"] / plan.cost_before["macs"],
    "difference": checks["masked_max_rel"],
    "widths": [small.stem[0].out_channels, small.left.out_channels, small.right.out_channels],
}, sys.stdout)
"""

LOAD = """
import json, sys, torch, vss
from vss.prune import Plan

net = vss.load(sys.argv[1])
plan = Plan.load(sys.argv[2])
x = torch.ones(1, 3, 32, 32)
json.dump({
    "name": net.name,
    "module": type(net).__module__,
    "plan": plan.model,
    "widths": [net.stem[0].out_channels, net.left.out_channels, net.right.out_channels],
    "shape": list(net(x).shape),
    "norm": [len(net.stem[1].gain), len(net.stem[1].shift)],
}, sys.stdout)
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process where the package is installed: its folder and what an installer writes."""
    metadata = tmp_path / "site" / "vss_example_plugin-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vss-example-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vss.plugins]\nexample = vss_example_plugin\n")
    paths = [str(tmp_path / "site"), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def run(code: str, environment: dict[str, str], *arguments: Path) -> dict[str, object]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_network_by_entry_point_is_planned_cut_saved_and_loaded(installed: dict[str, str], tmp_path: Path) -> None:
    weights, plan = tmp_path / "small.safetensors", tmp_path / "plan.json"
    made = run(PLAN, installed, weights, plan)
    assert made["groups"] == {"stem.0": ["stem.0"], "left": ["left", "right"]}
    assert made["norms"] == ["stem.1.gain", "stem.1.shift"]
    assert 0.3 < float(str(made["kept"])) <= 0.5 and float(str(made["difference"])) < 1e-4
    loaded = run(LOAD, installed, weights, plan)
    assert (loaded["name"], loaded["module"], loaded["plan"]) == ("example_net", "vss_example_plugin", "example_net")
    assert loaded["widths"] == made["widths"] and loaded["shape"] == [1, 3, 32, 32]
    assert loaded["norm"] == [made["widths"][0]] * 2  # type: ignore[index]
    assert made["widths"][1] == made["widths"][2] < 12  # type: ignore[index]


def test_without_the_package_the_name_is_unknown() -> None:
    with pytest.raises(VssError, match="'example_net'"):
        models.build("example_net", 3)
