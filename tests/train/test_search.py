"""The phases on `fit`: what a step may touch, resuming bit for bit, the search end to end, labels of skipped phases."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vss.core.config import DmcpConfig, Recipe
from vss.core.errors import VssError
from vss.prune import Budget, CostModel, apply_plan, find_groups
from vss.prune.plan import Plan
from vss.run import pruning
from vss.run.project import Project
from vss.train.fit import StepContext
from vss.train.losses import SegLearner
from vss.train.search import SearchPhase, SparsePhase, ordered

SIZE = (32, 48)
EXAMPLE = torch.zeros(1, 3, *SIZE)


def project(root: Path, **changes: Any) -> Project:
    settings: dict[str, Any] = {
        "data": {"dataset": "camvid", "root": str(root), "size": list(SIZE), "limit": 8},
        "model": {"name": "unet", "options": {"width": 8, "depth": 2}},
        "train": {"epochs": 3, "batch_size": 4, "lr": 0.02, "precision": "32-true", "accelerator": "cpu"},
        "prune": {"criterion": "dmcp", "batches": 2, "batch_size": 4, "recalibrate": 2},
    }
    return Project.open(Recipe.model_validate(settings | changes))


def phase_of(model: torch.nn.Module, **changes: Any) -> SearchPhase:
    config = DmcpConfig.model_validate({"alpha_lr": 0.3, "warmup": 0.25, "joint": 0.5} | changes)
    cost, groups = CostModel.measure(model, EXAMPLE), find_groups(model, EXAMPLE)
    return SearchPhase(model, groups, cost, kind="macs", keep=0.5, config=config, example=EXAMPLE)


def context(model: Any, step: int = 5, total: int = 10) -> StepContext:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(2, 3, *SIZE, generator=generator)
    mask = torch.randint(0, 11, (2, *SIZE), generator=generator)
    mask[:, :4] = 255
    learner, batch = SegLearner(11), {"mask": mask}
    outputs = model.train().forward_train(images)
    model.zero_grad()
    learner(outputs, batch).backward()
    return StepContext(
        model=model, images=images, batch=batch, outputs={h: o.detach() for h, o in outputs.items()}, learner=learner,
        loss=lambda heads: learner(heads, batch), step=step, steps=total, scale=1.0, autocast=contextlib.nullcontext,
    )  # fmt: skip


@pytest.fixture
def net(street_root: Path) -> Any:
    return project(street_root).build_model()


def test_the_step_of_alpha_leaves_weights_and_the_step_of_weights_leaves_alpha(net: Any) -> None:
    phase, now = phase_of(net), context(net)
    state = copy.deepcopy(net.state_dict())
    grads = [p.grad.clone() for p in net.parameters()]
    alphas = [a.detach().clone() for a in phase.alphas]
    phase.after_step(now)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())  # running statistics included
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, net.parameters(), strict=True))
    assert all((b < a).any() for a, b in zip(alphas, phase.alphas, strict=True))  # the cost, 1.6 of the target, pulls
    moved = [a.detach().clone() for a in phase.alphas]
    phase.after_backward(now)
    assert all(torch.equal(a, b) for a, b in zip(moved, phase.alphas, strict=True))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
    assert any(not torch.equal(g, p.grad) for g, p in zip(grads, net.parameters(), strict=True))


def test_alpha_moves_in_the_joint_part_alone(net: Any) -> None:
    phase = phase_of(net)
    assert phase.joint_part(8) == (2, 6)
    for step, moves in ((0, False), (1, False), (2, True), (5, True), (6, False), (7, False)):
        before = [a.detach().clone() for a in phase.alphas]
        phase.after_step(context(net, step, 8))
        assert any(not torch.equal(a, b) for a, b in zip(before, phase.alphas, strict=True)) == moves, step


def test_gradients_of_the_sandwich_are_those_of_one_sum(net: Any) -> None:
    phase, now = phase_of(net), context(net)
    plain = [p.grad.clone() for p in net.parameters()]
    phase.after_backward(now)
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    total = torch.zeros(())
    soft = now.outputs["out"].double().softmax(1)
    for widths in phase.sandwich(now.step, now.steps):
        masks = [c.mask(w) for c, w in zip(phase.chains, widths, strict=True)]
        own = phase.gates(net, now.images, masks)["out"].double().log_softmax(1)
        divergence = (soft * (soft.log() - own)).sum(1)  # KL of each pixel, void ones left out
        total = total + divergence[now.batch["mask"] != 255].mean()
    total.backward()
    for p, a, b in zip(net.parameters(), plain, got, strict=True):
        assert torch.allclose(a + p.grad, b, rtol=1e-3, atol=1e-5)


def test_sandwich_has_the_least_width_and_is_a_function_of_the_step(net: Any) -> None:
    phase = phase_of(net)
    for step in (0, 4, 9):
        drawn = phase.sandwich(step, 10)
        assert drawn == phase.sandwich(step, 10) and len(drawn) == 3
        assert drawn[0] == [c.least for c in phase.chains]
    assert phase.sandwich(0, 10) != phase.sandwich(1, 10)
    expected = phase.result()["expected"].values()
    assert phase.sandwich(9, 10)[1] == [c.nearest(w) for c, w in zip(phase.chains, expected, strict=True)]


def test_ordered_channels_give_the_same_outputs_best_first(net: Any) -> None:
    groups = find_groups(net, EXAMPLE)
    other = ordered(net, groups, order="l1", example=EXAMPLE)
    x = torch.randn(2, 3, *SIZE)
    assert torch.allclose(net.eval()(x), other.eval()(x), atol=1e-4)
    first = other.get_parameter("encoder.0.0.0.weight").detach().abs().sum((1, 2, 3))
    assert (first[:-1] >= first[1:]).all()


def test_a_budget_below_the_least_widths_is_refused(net: Any) -> None:
    with pytest.raises(VssError, match="least widths need"):
        phase_of(net, min_width=0.9)


class Killed(Exception):
    pass


def test_a_killed_search_resumes_bit_for_bit(street_root: Path, tmp_path: Path) -> None:
    work, seen = project(street_root), []

    def run(out: Path, die_at: int | None) -> tuple[SearchPhase, dict[str, torch.Tensor]]:
        model = work.build_model()
        phase = phase_of(model)
        step = phase.after_step

        def after_step(now: StepContext) -> None:
            if now.step == die_at:
                raise Killed
            seen.append(now.step)
            step(now)

        phase.after_step = after_step  # type: ignore[method-assign]
        work.train(model, work.recipe.train, out, progress=False, phase=phase)
        return phase, model.state_dict()

    whole, weights = run(tmp_path / "whole", None)
    with pytest.raises(Killed):
        run(tmp_path / "broken", 5)
    seen.clear()
    again, others = run(tmp_path / "broken", None)
    assert seen == [4, 5]  # two steps an epoch: from the end of the second epoch on
    assert all(torch.equal(a, b) for a, b in zip(whole.alphas, again.alphas, strict=True))
    assert all(torch.equal(v, others[k]) for k, v in weights.items())
    assert any(float(a.detach().min()) != 3.7 for a in whole.alphas)


def test_search_to_plan_to_cut_network(street_root: Path, tmp_path: Path) -> None:
    work = project(street_root, dmcp={"epochs": 2, "alpha_lr": 0.3})
    model = work.build_model()
    before = copy.deepcopy(model.state_dict())
    small, facts = pruning.prune(work, model, work.recipe.prune, tmp_path, progress=False)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.labels == () and plan.criterion == "dmcp" and plan.criterion_options["order"] == "index"
    assert all(group.kept == tuple(range(len(group.kept))) for group in plan.groups)
    assert 0.48 < facts.kept["macs"] <= 0.5 and facts.checks["masked_max_rel"] <= 1e-4
    found = facts.phase["search"]
    assert found["kept_expected"] < 0.85 and set(found["widths"]) == {group.id for group in plan.groups}
    from vss.train import checkpoint

    again = apply_plan(checkpoint.load(tmp_path / "sparse.safetensors"), plan)
    assert [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]


def test_sparse_training_shrinks_scales_and_nothing_is_labelled(street_root: Path, tmp_path: Path) -> None:
    sparse = {"epochs": 1, "lambda": 0.5, "lr": 0.05}
    work = project(street_root, sparse=sparse, prune={"criterion": "slimming", "batch_size": 4, "recalibrate": 2})
    net, config, facts = pruning.sparsify(work, work.build_model(), work.recipe.prune, tmp_path, progress=False)
    assert facts["scales"]["median"] < 0.99 * facts["scales_before"]["median"] and facts["labels"] == []
    assert config == work.recipe.prune and len(facts["curves"]) == 1
    assert pruning.plan_once(work, net, config, Budget()).labels == ()


@pytest.mark.parametrize(("criterion", "label"), [("slimming", ("slimming without its sparse phase",)), ("l1", ())])
def test_a_skipped_phase_is_a_label_of_the_plan(
    street_root: Path, tmp_path: Path, criterion: str, label: tuple[str, ...]
) -> None:
    work = project(street_root, prune={"criterion": criterion, "batch_size": 4, "recalibrate": 2})
    _, facts = pruning.prune(work, work.build_model(), work.recipe.prune, tmp_path, progress=False)
    assert Plan.load(tmp_path / "plan.json").labels == label and tuple(facts.labels) == label


def test_the_sparse_phase_adds_its_penalty_in_the_gradients_scale(net: Any) -> None:
    now, groups = context(net), find_groups(net, EXAMPLE)
    before = net.get_parameter("encoder.0.0.1.weight").grad.clone()
    scaled = StepContext(**{**vars(now), "scale": 8.0})
    SparsePhase(groups, 0.25, group_lasso=False).after_backward(scaled)
    weight = net.get_parameter("encoder.0.0.1.weight")
    assert torch.allclose(weight.grad - before, 2.0 * weight.detach().sign(), atol=1e-6)


SEARCHER = """
import json, sys, os, torch
from pathlib import Path
from vss.core.config import Recipe
from vss.run import pruning
from vss.run.project import Project
torch.manual_seed(int(os.environ["RANK"]))
work = Project.open(Recipe.model_validate(json.loads(sys.argv[1])))
out = Path(sys.argv[2])
net, config, facts = pruning.sparsify(work, work.build_model(), work.recipe.prune, out, progress=False)
state = {name: value.double().abs().sum().item() for name, value in net.named_parameters()}
rank = {"widths": config.options["widths"], "state": state, "curves": facts["curves"]}
(out / f"{os.environ['RANK']}.json").write_text(json.dumps(rank))
"""


def test_two_processes_search_the_same_widths(street_root: Path, tmp_path: Path) -> None:
    script = tmp_path / "searcher.py"
    script.write_text(SEARCHER)
    settings = project(street_root, dmcp={"epochs": 2, "alpha_lr": 0.3}).recipe.model_dump(mode="json")
    settings["train"] |= {"devices": 2, "strategy": "ddp", "batch_size": 2}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*run, json.dumps(settings), str(tmp_path)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["widths"] == second["widths"] and first["state"] == second["state"]
    full = {group.id: group.channels for group in find_groups(project(street_root).build_model(), EXAMPLE)}
    assert first["widths"].keys() == full.keys() and any(first["widths"][name] < full[name] for name in full)
