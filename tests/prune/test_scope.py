"""Where a budget takes from: as a criterion was published, and by borrowed widths."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from vss import models
from vss.core.config import Budget, PruneConfig, Recipe
from vss.core.errors import VssError
from vss.core.yaml12 import parse
from vss.prune import CRITERIA, CostModel, Plan, find_groups, make_criterion, make_plan
from vss.prune.budget import borrowed, search, sets_of
from vss.prune.criteria.base import Scope
from vss.run.inputs import require_criterion

X = torch.zeros(1, 3, 32, 32)
LOCAL = {"l1", "l2", "fpgm", "hw_l1", "taylor_fo", "defect", "corr", "random", "wanda"}


def unet() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build("unet", 5, width=8, depth=3).eval()


def test_auto_is_the_scope_of_the_publication() -> None:
    assert {name for name in CRITERIA.names() if make_criterion(name).scope_of("auto") == "local"} == LOCAL
    assert {make_criterion(name).scope_of("auto") for name in set(CRITERIA.names()) - LOCAL} == {"global"}
    net = unet()
    plans = {name: make_plan(net, X, criterion=name, budget={"kind": "macs", "keep": 0.5}) for name in ("l1", "lamp")}
    assert plans["l1"].budget["scope"] == "local" and plans["lamp"].budget["scope"] == "global"
    shares = {len(g.kept) / g.channels for g in plans["l1"].groups}
    assert max(shares) - min(shares) <= 1 / 8  # one channel of the narrowest group
    explicit = make_plan(net, X, criterion="l1", budget={"kind": "macs", "keep": 0.5, "scope": "global"})
    assert explicit.budget["scope"] == "global" and explicit.widths() != plans["l1"].widths()


@pytest.mark.parametrize("options", [{"pool": "backbone_head"}, {"pool": "group"}])
def test_pools_and_searched_widths_have_no_other_scope(options: dict) -> None:
    for criterion in (make_criterion("sirfp", **options), make_criterion("dmcp"), make_criterion("dcfp")):
        assert criterion.scopes == ("global",)
        for scope in ("local", "isomorphic"):
            with pytest.raises(VssError, match=f"scope is {scope}, which criterion '{criterion.name}' cannot have"):
                criterion.scope_of(scope)
    assert set(make_criterion("sirfp").scopes) == set(get_args(Scope))


def test_groups_of_equal_structure_are_ranked_together() -> None:
    net = unet()
    groups, cost = list(find_groups(net, X)), CostModel.measure(net, X)
    sets = sets_of(groups, cost.shapes, "isomorphic")
    assert sorted(i for members in sets for i in members) == list(range(len(groups)))
    assert 1 < len(sets) < len(groups)
    for members in sets:  # the slices of a set lie in the same kinds of tensors
        kinds = {
            tuple(
                sorted((s.role, s.tensor.rpartition(".")[2], s.dim, tuple(cost.shapes[s.tensor][2:])) for s in g.slots)
            )
            for g in (groups[i] for i in members)
        }
        assert len(kinds) == 1
    scores = {g.id: torch.rand(g.channels, generator=torch.Generator().manual_seed(i)) for i, g in enumerate(groups)}
    kept = search(groups, scores, cost, Budget(kind="macs", keep=0.5, scope="isomorphic", floor=0))
    for members in sets:  # each loses the same fraction, and what stays of a set scores above what goes
        whole = sum(groups[i].channels for i in members)
        share = sum(len(kept[groups[i].id]) for i in members) / whole
        assert abs(share - sum(map(len, kept.values())) / sum(g.channels for g in groups)) <= len(sets) / whole
        stay = torch.cat([scores[groups[i].id][kept[groups[i].id]] for i in members])
        gone = torch.cat([scores[groups[i].id][groups[i].others(kept[groups[i].id])] for i in members])
        least = sum(len(kept[groups[i].id]) == 1 for i in members)  # a group keeps a channel, whatever it scores
        assert int((stay < gone.max()).sum()) <= least


def test_borrowed_widths_keep_the_lenders_counts_and_the_borrowers_channels() -> None:
    net = unet()
    lender = make_plan(net, X, criterion="lamp", budget={"kind": "macs", "keep": 0.5})
    groups = list(find_groups(net, X))
    generator = torch.Generator().manual_seed(3)
    scores = {g.id: torch.rand(g.channels, generator=generator) for g in groups}
    kept = borrowed(lender, "plan.json", groups, scores)
    for theirs in lender.groups:
        best = scores[theirs.id].topk(len(theirs.kept)).indices.sort().values
        assert torch.equal(kept[theirs.id], best)
    other = list(find_groups(models.build("unet", 5, width=4, depth=3).eval(), X))
    with pytest.raises(VssError, match=r"prune.widths is plan.json, a plan of another network: .* has 8 channels"):
        borrowed(lender, "plan.json", other, {g.id: torch.rand(g.channels) for g in other})


def test_what_widths_cannot_be_is_refused_before_anything_long(tmp_path: Path) -> None:
    plan = make_plan(unet(), X, budget={"kind": "macs", "keep": 0.5})
    plan.save(tmp_path / "plan.json")

    def config(**keys: object) -> PruneConfig:
        return parse(PruneConfig, keys, source="prune")

    require_criterion(config(widths=str(tmp_path / "plan.json"), criterion="l1"))
    require_criterion(config(widths="taylor", criterion="sirfp"))
    for keys, message in (
        ({"widths": "tailor"}, "prune.widths is 'tailor'; expected a plan.json of `vss prune`, or one of"),
        ({"widths": str(tmp_path / "none.json")}, "none.json"),
        ({"widths": "slimming"}, "whose widths follow from a phase of training"),
        ({"widths": "taylor", "criterion": "dmcp"}, "dmcp searches widths of its own"),
        ({"criterion": "dmcp", "budget": {"scope": "local"}}, "scope is local, which criterion 'dmcp' cannot have"),
    ):
        with pytest.raises(VssError, match=message):
            require_criterion(config(**keys))
    for keys, message in (
        ({"widths": "taylor", "steps": 2}, "set steps to 1"),
        ({"widths": "taylor", "latency": {"target": "0.5x"}}, "give one"),
        ({"widths": "taylor", "budget": {"ratios": {"a": 0.5}}}, "give one"),
    ):
        with pytest.raises(VssError, match=message):
            config(**keys)


def test_a_plan_that_is_named_counts_by_its_content(tmp_path: Path) -> None:
    from vss.run.runner import depends

    first = make_plan(unet(), X, budget={"kind": "macs", "keep": 0.5})
    second = make_plan(unet(), X, budget={"kind": "macs", "keep": 0.6})

    def key(folder: str, plan: Plan) -> object:
        (tmp_path / folder).mkdir(exist_ok=True)
        plan.save(tmp_path / folder / "plan.json")
        keys = {"prune": {"widths": str(tmp_path / folder / "plan.json")}}
        return depends(Recipe.model_validate(keys), "prune")

    assert key("a", first) == key("b", first) != key("c", second)
    assert (
        depends(Recipe.model_validate({"prune": {"widths": "taylor"}}), "prune")["recipe"]["prune"]["widths"]
        == "taylor"
    )
