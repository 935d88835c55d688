"""Around a cut: `make_plan` decides, `verify` proves the result, `recalibrate_bn` renews its batch-norm statistics.

`make_plan` is pure: groups, one calibration pass, scores, budget search, plan; the network is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vss.core.closeness import AGREEMENT, duplicate, evaluating, label_agreement, proven_difference
from vss.core.config import Budget
from vss.core.errors import VssError
from vss.core.files import sha256_tensors
from vss.core.yaml12 import parse
from vss.prune.apply import TOLERANCE, BatchNorm, Forward, default_forward, flatten, masked, name_of
from vss.prune.budget import CostModel, Rounding, search
from vss.prune.criteria import Criterion, make_criterion, score_groups
from vss.prune.plan import Group, Groups, Plan
from vss.prune.stats import Batch, Loss, Statistics, Stats, collect
from vss.prune.trace import find_groups

KINDS = ("channels", "params", "macs")
Choose = Callable[[list[Group], dict[str, Tensor], Rounding | None], dict[str, Tensor]]
"""(groups, scores by group id, width rule of the criterion) -> kept channel numbers by group id, ascending int64."""
Figures = tuple[float, float, float]


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
    forward: Forward | None = None,
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
    if (calibration or {}).get("split") == "test":
        raise VssError("calibration images come from the test split; take the training split.")
    limits: Budget = budget if isinstance(budget, Budget) else parse(Budget, budget or {}, source="budget")
    _check_finite(model)
    members = list(groups or find_groups(model, example, forward=forward, keep=keep))
    if not members:
        raise VssError("no prunable channels were found; every layer is locked: see `vss prune --dry-run`.")
    if not criterion.needs:
        statistics = {}, 0
    mode = criterion.batch_norm_mode()
    collected, seen = statistics or collect(model, members, criterion.needs, batches, loss, batch_norm=mode)
    scores = score_groups(criterion, members, Stats(model, collected, seed=seed))
    cost = CostModel.measure(model, example, forward=forward)
    kept = (
        choose(members, scores, criterion.rounding)
        if choose
        else search(members, scores, cost, limits, rounding=criterion.rounding, origin=origin)
    )
    about = {**(calibration or {}), "batches": seen, "input_size": list(example.shape[-2:])}
    return _plan(model, members, kept, cost, criterion).model_copy(
        update={"budget": limits.model_dump(), "calibration": about, "seed": seed}
    )


def _plan(
    model: nn.Module, members: list[Group], kept: dict[str, Tensor], cost: CostModel, criterion: Criterion
) -> Plan:
    full, counts = [group.channels for group in members], [len(kept[group.id]) for group in members]
    return Plan(
        model=name_of(model),
        options=dict(getattr(model, "options", {})),
        num_classes=getattr(model, "num_classes", None),
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
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise VssError(f"the weights hold NaN or infinity in {name}; give a checkpoint that was not damaged.")


def verify(model: nn.Module, small: nn.Module, plan: Plan, sizes: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Prove a cut: masked network == sliced network, same heads, forward and backward at every size (H, W).

    `small` is what `apply_plan(model, plan)` returned, before any training. A difference beyond the limit is looked at
    again in float64: rounding, which grows in deep networks and moves the indices of pooled maxima, vanishes there; a
        wrong
    cut does not.

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
    if worst[1] > TOLERANCE or worst[2] < AGREEMENT:
        exact = duplicate(mask).double(), duplicate(small).double()
        worst, precision = _worst([_difference(*exact, x.double())[0] for x in images]), "float64"
    if worst[1] > TOLERANCE:
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


def _worst(found: list[Figures]) -> Figures:
    return max(f[0] for f in found), max(f[1] for f in found), min(f[2] for f in found)


def _difference(mask: nn.Module, small: nn.Module, x: Tensor) -> tuple[Figures, list[list[int]]]:
    """Largest absolute and relative difference of all outputs on one batch, their agreement, and their shapes."""
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
    try:
        with evaluating(model):
            default_forward(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return next(filter(None, found), "")


def refuse_single_images(model: nn.Module, example: Tensor) -> None:
    """Calibration images come one at a time: refuse a network with a batch norm that needs two."""
    name = norm_of_single_values(model, example)
    if name:
        raise VssError(
            f"calibration images come one at a time and batch norm {name!r} sees one position of each; set "
            "prune.batch_size to 2 or more (with as many training images), or prune.recalibrate to 0."
        )
