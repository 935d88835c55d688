"""`make_plan`: groups, one calibration pass, scores, budget search, plan. Pure: the network is not changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vss.core.closeness import AGREEMENT, duplicate, label_agreement, proven_difference
from vss.core.errors import VssError
from vss.core.files import sha256_tensors
from vss.prune.apply import masked
from vss.prune.budget import Budget, CostModel, Rounding, search
from vss.prune.criteria import Criterion, make_criterion, score_groups
from vss.prune.plan import Group, Groups, Plan, plan_group
from vss.prune.stats import Batch, Loss, Statistics, Stats, collect
from vss.prune.trace import find_groups

KINDS = ("channels", "params", "macs")
Choose = Callable[[list[Group], dict[str, Tensor], Rounding | None], dict[str, Tensor]]
"""(groups, scores by group id, width rule of the criterion) -> kept channel numbers by group id, ascending int64."""


def make_plan(
    model: nn.Module,
    example: Tensor,
    *,
    criterion: str | Criterion = "l1",
    budget: Budget | dict[str, Any] | None = None,
    batches: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    keep: Iterable[str] = (),
    groups: Groups | None = None,
    calibration: dict[str, Any] | None = None,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
    statistics: Statistics | None = None,
    choose: Choose | None = None,
    origin: Mapping[str, int] | None = None,
) -> Plan:
    """Decide which channels stay.

    Args:
        model: the network; neither its weights nor its state change.
        example: an input of the size at which MACs count, (N, 3, H, W).
        criterion, budget: by name or built; what may stay, default half the MACs.
        batches: calibration batches, whatever `loss` takes; needed by criteria with statistics.
        loss: (model, batch) -> scalar mean loss over all heads.
        seed: for criteria that draw.
        keep, groups: layers whose channels stay; result of `find_groups`, where it is known.
        calibration: facts about the calibration set, written into the plan.
        forward: how to call the model so that all heads are reached.
        statistics: of `collect`, with at least the criterion's needs, in place of `batches`.
        choose: decides in place of the budget, from the scores.
        origin: group id -> width before earlier rounds of cutting (`Plan.widths`), of which budget, floor and alignment
            count; by default those of `model`.

    Returns:
        The plan, deterministic for equal arguments.
    """
    criterion = make_criterion(criterion) if isinstance(criterion, str) else criterion
    _check_split(calibration or {})
    budget = budget if isinstance(budget, Budget) else Budget.make(**(budget or {}))
    _check_finite(model)
    groups = groups or find_groups(model, example, forward=forward, keep=keep)
    members = list(groups)
    if not members:
        raise VssError("no prunable channels were found; every layer is locked: see `vss prune --dry-run`.")
    scores, seen = _scores(model, members, criterion, batches, loss, seed, statistics)
    cost = CostModel.measure(model, example, forward=forward)
    kept = (
        choose(members, scores, criterion.rounding)
        if choose
        else search(members, scores, cost, budget, rounding=criterion.rounding, origin=origin)
    )
    about = {**(calibration or {}), "batches": seen, "input_size": list(example.shape[-2:])}
    return _written(model, members, kept, cost, criterion).model_copy(
        update={"budget": budget.model_dump(), "calibration": about, "seed": seed}
    )


def _written(
    model: nn.Module, members: list[Group], kept: dict[str, Tensor], cost: CostModel, criterion: Criterion
) -> Plan:
    """The plan that keeps those channels."""
    counts = [len(kept[group.id]) for group in members]
    full = [group.channels for group in members]
    return Plan(
        model=getattr(model, "name", "") or type(model).__name__,
        options=dict(getattr(model, "options", {})),
        num_classes=getattr(model, "num_classes", None),
        weights_sha256=sha256_tensors(model.state_dict()),
        criterion=criterion.name,
        criterion_options=criterion.options(),
        budget={},
        cost_before={kind: cost.total(kind, members, full) for kind in KINDS},
        cost_after={kind: cost.total(kind, members, counts) for kind in KINDS},
        groups=tuple(plan_group(group, kept[group.id]) for group in members),
    )


def _scores(
    model: nn.Module,
    members: list[Group],
    criterion: Criterion,
    batches: Iterable[Batch] | None,
    loss: Loss | None,
    seed: int,
    statistics: Statistics | None,
) -> tuple[dict[str, Tensor], int]:
    """Scores of every group and the number of calibration batches behind them."""
    if not criterion.needs:
        statistics = {}, 0
    mode = criterion.batch_norm_mode()
    collected, seen = statistics or collect(model, members, criterion.needs, batches, loss, batch_norm=mode)
    return score_groups(criterion, members, Stats(model, collected, seed=seed)), seen


def _check_split(calibration: dict[str, Any]) -> None:
    """Scores made from test images would leak them into the network."""
    if calibration.get("split") == "test":
        raise VssError("calibration images come from the test split; take the training split.")


def _check_finite(model: nn.Module) -> None:
    """Scores of a network with NaN weights mean nothing, and a backward pass would spread them to every layer."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise VssError(f"the weights hold NaN or infinity in {name}; give a checkpoint that was not damaged.")


def verify(model: nn.Module, small: nn.Module, plan: Plan, sizes: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Prove a cut: masked network == sliced network, same heads, forward and backward at every size.

    Args:
        model: before.
        small: what `apply_plan(model, plan)` returned, before any training.
        plan: the plan.
        sizes: at least two (H, W).

    A difference beyond the limit is looked at again in float64: rounding, which grows in deep networks and moves the
    indices of pooled maxima, vanishes there; a wrong cut does not.

    Returns:
        Figures for the report: `masked_max_abs`, `masked_max_rel` (relative to the spread of the outputs, see
        `vss.core.closeness`), `label_agreement` (share of places with the same largest channel, ties apart), `sizes`,
        `outputs`, `precision` (of the comparison: "float32", or "float64" where it was needed).

    Raises:
        VssError: a relative difference above 1e-4, other labels, an output of another shape or a missing gradient.
    """
    mask, small = masked(model, plan).eval(), small.eval()
    generator = torch.Generator().manual_seed(0)
    device = next(small.parameters()).device
    images = [torch.randn(2, 3, *size, generator=generator).to(device) for size in sizes]
    found, shapes, precision = [], [], "float32"
    for x in images:
        figures, outputs = _difference(mask, small, x)
        _check_backward(small, mask, x)
        found.append(figures)
        shapes.append(outputs)
    worst = _worst(found)
    if worst[1] > 1e-4 or worst[2] < AGREEMENT:
        exact = duplicate(mask).double(), duplicate(small).double()
        worst, precision = _worst([_difference(*exact, x.double())[0] for x in images]), "float64"
    if worst[1] > 1e-4:
        raise VssError(
            f"the cut network differs from the masked one by {worst[1]:.2e} (relative to the spread; at most 1e-4)."
        )
    if worst[2] < AGREEMENT:
        raise VssError(f"the cut network and the masked one have the same label at {worst[2]:.2%} of the places alone.")
    return {
        "masked_max_abs": worst[0],
        "masked_max_rel": worst[1],
        "label_agreement": worst[2],
        "sizes": [list(x.shape[-2:]) for x in images],
        "outputs": shapes,
        "precision": precision,
    }


Figures = tuple[float, float, float]


def _worst(found: list[Figures]) -> Figures:
    return max(f[0] for f in found), max(f[1] for f in found), min(f[2] for f in found)


def _difference(mask: nn.Module, small: nn.Module, x: Tensor) -> tuple[Figures, list[list[int]]]:
    """Largest absolute and relative difference of all outputs on one batch, their agreement, and their shapes."""
    from vss.prune.trace import default_forward, flatten

    with torch.no_grad():
        wanted, got = flatten(default_forward(mask, x)), flatten(default_forward(small, x))
    if [t.shape for t in wanted] != [t.shape for t in got]:
        raise VssError(f"the cut network's outputs have shapes {[tuple(t.shape) for t in got]}; the heads changed.")
    found: list[Figures] = []
    for a, b in zip(wanted, got, strict=True):
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise VssError("the cut network gives NaN or infinite outputs; check the checkpoint's weights.")
        found.append((float((a - b).abs().max()), proven_difference(a, b), label_agreement(a, b)))
    return _worst(found), [list(t.shape) for t in got]


def _check_backward(small: nn.Module, mask: nn.Module, x: Tensor) -> None:
    """Every parameter of the cut network gets a finite gradient; one that the uncut network never uses need not."""
    grads = _gradients(small, x)
    unused = [name for name, grad in grads.items() if grad is None]
    before = _gradients(mask, x) if unused else {}
    for name, grad in grads.items():
        if (grad is None and before[name] is not None) or (grad is not None and not torch.isfinite(grad).all()):
            raise VssError(f"the cut network gives no finite gradient for {name}.")


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Gradients of the sum of the outputs' mean squares in the mode that the model is in; `.grad` is left alone."""
    from vss.prune.trace import default_forward, flatten

    names = [name for name, _ in model.named_parameters()]
    with torch.enable_grad():
        flags = [p.requires_grad for p in model.parameters()]
        model.requires_grad_(True)
        total = torch.stack([out.square().mean() for out in flatten(default_forward(model, x))]).sum()
        grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    return dict(zip(names, grads, strict=True))


def two_sizes(size: tuple[int, int], model: nn.Module) -> list[tuple[int, int]]:
    """Two small, differently shaped sizes that the network takes; proofs do not need large images."""
    step = max(int(getattr(model, "least_side", 32)), int(getattr(model, "size_multiple", 1)))
    small = [max(step, side // 2 // step * step) for side in size]
    return [(small[0] + step, small[1]), (small[0], small[1] + step)]
