"""The plan file: nothing is lost on the way through JSON, and a damaged one is one sentence."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from vss import models
from vss.core.errors import VssError
from vss.prune import Plan, apply_plan, make_plan

from .nets import Chain, Concat, Residual, randomise

X = torch.zeros(1, 3, 16, 16)


def plan_of(net: torch.nn.Module, **budget: object) -> Plan:
    return make_plan(net, X, criterion="l2", budget={"kind": "channels", "keep": 0.5, **budget}, seed=4)


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = randomise(Concat())
    plan = plan_of(net)
    path = plan.save(tmp_path / "plan.json")
    data = json.loads(path.read_text())
    assert (data["kind"], data["schema"], data["criterion"], data["seed"]) == ("vss.plan", 1, "l2", 4)
    again = Plan.load(path)
    assert again == plan and again.sha256() == plan.sha256()
    ours, theirs = apply_plan(net, plan).state_dict(), apply_plan(net, again).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_hash_is_of_the_whole_decision() -> None:
    torch.manual_seed(0)
    plan = plan_of(Chain())
    assert plan.sha256() == plan.model_copy().sha256()
    assert plan.model_copy(update={"seed": 5}).sha256() != plan.sha256()


def test_newer_schema_is_refused_in_a_file_and_inside_other_data(tmp_path: Path) -> None:
    data = plan_of(Chain()).to_dict() | {"schema": 2}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(VssError, match="schema 2; this version reads up to 1: upgrade"):
        Plan.load(path)
    with pytest.raises(VssError, match="no valid plan: schema"):
        Plan.from_dict(data)


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [-1, 2], [0, 8]])
def test_kept_must_be_ascending_channel_numbers(kept: list[int]) -> None:
    data = plan_of(Chain()).to_dict()
    data["groups"][0]["kept"] = kept
    with pytest.raises(VssError, match=r"no valid plan: groups\.0.*0\.\.7"):
        Plan.from_dict(data)


def test_unknown_fields_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VssError, match=r"p\.json is no valid plan: extra"):
        Plan.from_dict(plan_of(Chain()).to_dict() | {"extra": 1}, source="p.json")
    path = tmp_path / "other.json"
    path.write_text('{"kind": "vss.report", "schema": 1}')
    with pytest.raises(VssError, match=r"holds 'vss\.report'; expected a file of kind 'vss\.plan'"):
        Plan.load(path)


def test_a_changed_plan_file_is_refused_and_one_without_a_hash_is_taken(tmp_path: Path) -> None:
    plan = plan_of(Chain())
    path = plan.save(tmp_path / "plan.json")
    assert Plan.load(path) == plan
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"seed": 7}))
    with pytest.raises(VssError, match=r"plan\.json was changed after it was written"):
        Plan.load(path)
    del data["sha256"]
    path.write_text(json.dumps(data | {"seed": 7}))
    assert Plan.load(path) == plan.model_copy(update={"seed": 7})


@pytest.mark.parametrize("leaf", ["weight", "bias", "running_mean", "running_var"])
def test_a_plan_that_cuts_a_part_of_a_layer_alone_is_refused(leaf: str) -> None:
    net = Chain(nn.BatchNorm2d(8))
    data = plan_of(net).to_dict()
    group = next(each for each in data["groups"] if any(slot["tensor"] == "middle.bias" for slot in each["slots"]))
    group["slots"] = [slot for slot in group["slots"] if slot["tensor"] != f"middle.{leaf}"]
    with pytest.raises(VssError, match="it lacks slots of that layer"):
        apply_plan(net, Plan.from_dict(data), check_weights=False)
    whole = plan_of(net).to_dict()
    whole["groups"] = [*whole["groups"], {**whole["groups"][0], "id": "again"}]
    with pytest.raises(VssError, match="twice"):
        apply_plan(net, Plan.from_dict(whole), check_weights=False)


@pytest.mark.parametrize("net", [Chain(), Concat(), Residual(), models.build("unet", 3, width=4, depth=1)])
def test_a_plan_that_lacks_any_one_layer_is_refused(net: nn.Module) -> None:
    """Every layer's slots of every group in turn, those of consumers and of the other producers too."""
    whole = plan_of(net, scope="local").to_dict()
    tried = set()
    for number, group in enumerate(whole["groups"]):
        for layer in {slot["tensor"].rpartition(".")[0] for slot in group["slots"]}:
            data = copy.deepcopy(whole)
            slots = [slot for slot in group["slots"] if slot["tensor"].rpartition(".")[0] != layer]
            data["groups"][number]["slots"] = slots
            tried |= {slot["role"] for slot in group["slots"] if slot not in slots}
            if slots:
                with pytest.raises(VssError, match="make it again"):
                    apply_plan(net, Plan.from_dict(data))
    assert {"producer", "consumer"} <= tried
    before = {name: value.clone() for name, value in net.state_dict().items()}
    apply_plan(net.train(), Plan.from_dict(whole))
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("middle", [nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3, padding=1, groups=4)])
def test_groups_of_a_norm_or_convolution_go_whole(middle: nn.Module) -> None:
    net = Chain(middle)
    data = plan_of(net, scope="local").to_dict()
    group = next(each for each in data["groups"] if each["channels"] == 8 and len(each["kept"]) == 4)
    apply_plan(net, Plan.from_dict(data), check_weights=False)
    group["kept"], group["unit"] = [0, 2, 4, 7], 1
    with pytest.raises(VssError, match="parts of the 4 groups of middle, which go whole"):
        apply_plan(net, Plan.from_dict(data), check_weights=False)


def test_only_plans_of_one_network_compose() -> None:
    torch.manual_seed(0)
    net = Chain()
    first = plan_of(net)
    with pytest.raises(VssError, match="same groups"):
        first.then(plan_of(Residual()))
    with pytest.raises(VssError, match="expects 8 channels in group a, but the first leaves 4"):
        plan_of(net, scope="local").then(first)


def test_composition_indexes_through_the_first_cut() -> None:
    torch.manual_seed(0)
    net = Chain()
    first = plan_of(net, scope="local")
    second = plan_of(apply_plan(net, first), scope="local")
    both = first.then(second)
    for one, two, joint in zip(first.groups, second.groups, both.groups, strict=True):
        assert joint.kept == tuple(one.kept[i] for i in two.kept) and joint.channels == one.channels
    assert both.cost_before == first.cost_before and both.cost_after == second.cost_after
    assert both.weights_sha256 == first.weights_sha256
    assert both.widths()["a"] == (8, 2)
