"""Around a cut: `make_plan` decides, `recalibrate_bn` renews the batch-norm statistics of what was cut.

`make_plan` is pure: groups, one calibration pass, scores, budget search, plan; the network is not changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from vss.core.closeness import evaluating
from vss.core.config import Budget
from vss.core.errors import VssError
from vss.core.example import Example, Forward, default_forward, image_of, own_attribute
from vss.core.files import sha256_tensors
from vss.core.networks import eager, hooked, refuse_unready
from vss.core.yaml12 import parse
from vss.prune.apply import BatchNorm, name_of
from vss.prune.budget import CostModel, Rounding, Unreachable, search
from vss.prune.criteria import Criterion, make_criterion, score_groups
from vss.prune.plan import Group, Groups, Plan
from vss.prune.probe import Probe
from vss.prune.stats.base import Stats
from vss.prune.stats.run import Loss, Statistics, collect
from vss.prune.stats.taps import Batch
from vss.prune.trace import TIME_LIMIT_S, find_groups

LOG = logging.getLogger(__name__)
KINDS = ("channels", "params", "macs")
Choose = Callable[[list[Group], dict[str, Tensor], Rounding | None], dict[str, Tensor]]
"""(groups, scores by group id, width rule of the criterion) -> kept channel numbers by group id, ascending int64."""


@eager
def make_plan(
    model: nn.Module,
    example: Example,
    *,
    criterion: str | Criterion = "l1",
    budget: Budget | dict[str, object] | None = None,
    batches: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    keep: Iterable[str] = (),
    groups: Groups | None = None,
    calibration: dict[str, object] | None = None,
    forward: Forward | None = None,
    statistics: Statistics | None = None,
    choose: Choose | None = None,
    origin: Mapping[str, int] | None = None,
    time_limit_s: float = TIME_LIMIT_S,
) -> Plan:
    """Decide which channels stay; the same for equal arguments. In the plan, a budget's scope "auto" is the one used.

    Args:
        model: the network; neither its weights nor its state change.
        example: an input of the size at which MACs count: a tensor (N, C, H, W), a tuple of arguments or a dict.
        criterion, budget: by name or built; what may stay, default half the MACs.
        batches: calibration batches, whatever `loss` takes; needed by criteria with statistics.
        loss: (model, batch) -> scalar mean loss over all heads.
        seed: for criteria that draw.
        keep, groups: layers whose channels stay; result of `find_groups`, where it is known.
        calibration: facts about the calibration set, written into the plan.
        forward: (model, example) -> outputs, all heads; groups, costs, statistics and trials use it.
        statistics: of `collect`, with at least the criterion's needs, in place of `batches`.
        choose: decides in place of the budget, from the scores.
        origin: group id -> width before earlier rounds of cutting (`Plan.widths`), of which budget, floor and alignment
            count; by default those of `model`.
        time_limit_s: for finding groups, and again for trying the planned cut; what was not tried by then stays.
    """
    criterion = make_criterion(criterion) if isinstance(criterion, str) else criterion
    if (calibration or {}).get("split") == "test":
        raise VssError("calibration images come from the test split; take the training split.")
    limits: Budget = budget if isinstance(budget, Budget) else parse(Budget, budget or {}, source="budget")
    if choose is None:
        limits = limits.model_copy(update={"scope": criterion.scope_of(limits.scope)})
    _check_finite(model)
    groups = groups or find_groups(model, example, forward=forward, keep=keep, time_limit_s=time_limit_s)
    members, cost = list(groups), CostModel.measure(model, example, forward=forward)
    if not members:
        raise VssError(f"no prunable channels were found. {why_locked(groups, cost)}")
    collected, seen = (statistics if criterion.needs else ({}, 0)) or collect(
        model, members, criterion.needs, batches, loss, batch_norm=criterion.batch_norm_mode(), forward=forward
    )
    scores, rule = score_groups(criterion, members, Stats(model, collected, seed=seed)), criterion.rounding
    decide = choose or (lambda free, scores, rule: search(free, scores, cost, limits, rounding=rule, origin=origin))
    probe = Probe(model, example, forward, time_limit_s)
    try:
        kept = _tried(members, lambda free: decide(free, scores, rule), probe, movable=choose is None)
    except Unreachable as error:
        raise VssError(f"{error} {why_locked(groups, cost)}") from error
    about = {**(calibration or {}), "batches": seen, "input_size": list(image_of(example).shape[-2:])}
    chosen = {"budget": limits.model_dump(), "calibration": about, "seed": seed}
    return _plan(model, members, kept, cost, criterion).model_copy(update=chosen)


def _tried(
    members: list[Group], decide: Callable[[list[Group]], dict[str, Tensor]], probe: Probe, *, movable: bool
) -> dict[str, Tensor]:
    """Kept channels that were tried on the network as they are; groups that fail keep all, and the others give more."""
    whole: dict[str, Tensor] = {}
    while True:
        free = [group for group in members if group.id not in whole]
        kept = (decide(free) if free else {}) | whole
        probe.begin()  # deciding may measure times for minutes
        faults = probe.faults([group.keep(kept[group.id]) for group in members])
        if not faults:
            return kept
        first, fault = next(iter(faults.items()))
        if not movable or not free:
            raise VssError(f"the planned cut of {first} does not hold ({fault}); keep that layer whole.")
        LOG.warning("the planned cut of %s does not hold, so all its channels stay: %s", first, fault)
        whole |= {group.id: torch.arange(group.channels) for group in members if group.id in faults}


def why_locked(groups: Groups, cost: CostModel, *, shown: int = 3) -> str:
    """How much of the MACs no cut reaches, and the first layers that are locked, with their reasons; "" if none."""
    if not groups.locked:
        return ""
    fixed, total = cost.fixed(list(groups)), cost.total("macs", [], [])
    reasons = {lock.reason: lock.layer for lock in reversed(groups.locked)}
    listed = "; ".join(f"{layer}: {reason}" for reason, layer in list(reversed(reasons.items()))[:shown])
    return f"{fixed / max(total, 1):.0%} of the MACs are in layers that no cut reaches ({listed})."


def _plan(
    model: nn.Module, members: list[Group], kept: dict[str, Tensor], cost: CostModel, criterion: Criterion
) -> Plan:
    full, counts = [group.channels for group in members], [len(kept[group.id]) for group in members]
    return Plan(
        model=name_of(model),
        options=dict(own_attribute(model, "options", dict) or {}),
        num_classes=own_attribute(model, "num_classes", int),
        weights_sha256=sha256_tensors(model.state_dict()),
        criterion=criterion.name,
        criterion_options=criterion.options(),
        budget={},
        cost_before={kind: cost.total(kind, members, full) for kind in KINDS},
        cost_after={kind: cost.total(kind, members, counts) for kind in KINDS},
        groups=tuple(group.keep(kept[group.id]) for group in members),
    )


def _check_finite(model: nn.Module) -> None:
    """Scores of a network with NaN weights mean nothing, and a backward pass would spread them to every layer."""
    refuse_unready(model)
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise VssError(f"the weights hold NaN or infinity in {name}; give a checkpoint that was not damaged.")


@torch.no_grad()
def recalibrate_bn(model: nn.Module, batches: Iterable[Tensor], *, forward: Forward | None = None) -> int:
    """Recompute batch-norm running statistics as the plain average over `batches` of (N, 3, H, W); forward only.

    Removing channels changes what later layers see; this is done before any accuracy without fine-tuning is reported.
    A batch norm on 1x1 maps needs N > 1. Returns the number of batches seen.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    count = 0
    with evaluating(model):
        try:
            for batch in batches:
                if not count:  # statistics are forgotten only once there is something to replace them
                    for norm in norms:
                        norm.reset_running_stats()
                        norm.momentum = None
                        norm.train()
                (forward or default_forward)(model, batch)
                count += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not count:
        raise VssError("batch norms were to be recalibrated on no batches; give at least one.")
    return count


@torch.no_grad()
def norm_of_single_values(model: nn.Module, example: Tensor) -> str:
    """The first batch norm that sees one value of a channel in `example` (1, 3, H, W), all heads included; "" if none.

    Its statistics need two images.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        return lambda _, inputs: found.append(name if inputs[0][0, 0].numel() == 1 else "")

    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, BatchNorm)]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in norms]
    with hooked(hooks), evaluating(model):
        default_forward(model, example)
    return next(filter(None, found), "")


def refuse_single_images(model: nn.Module, example: Tensor) -> None:
    """Calibration images come one at a time: refuse a network with a batch norm that needs two."""
    name = norm_of_single_values(model, example)
    if name:
        raise VssError(
            f"calibration images come one at a time and batch norm {name!r} sees one position of each; set "
            "prune.batch_size to 2 or more (with as many training images), or prune.recalibrate to 0."
        )
