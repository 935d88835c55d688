"""Training phases of pruning methods on `fit`: the sparse phase of slimming and fn, the search of DMCP.

DMCP (Guo et al., CVPR 2020; vss.prune.phases) trains one network at many widths and the widths with it:

- every step, the full width learns from labels, and the least width and two random ones from the full width's output;
- in the joint part, each step also moves alpha, by the task loss of the network with gated channels and by the cost;
- at the end alpha stands still and its widths are trained on.

Against the published code: random numbers are functions of the step; batch norms keep the running statistics of the
full width; the step of alpha leaves the weights' gradients alone; drawing widths cannot loop for ever.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vss.core.closeness import alike, evaluating
from vss.core.config import DmcpConfig, FitConfig
from vss.core.errors import VssError
from vss.core.example import default_forward, logits_of
from vss.prune import CostModel, Group, Groups, find_groups, make_criterion
from vss.prune.apply import TOLERANCE
from vss.prune.criteria.base import score_groups
from vss.prune.phases import (
    Chain,
    ExpectedCost,
    Gates,
    add_subgradient,
    expected_width,
    expected_widths,
    importance_order,
    mac_loss,
    reorder,
    sample_width,
    sample_widths,
    soft_mask,
    uniform_width,
    untracked,
)
from vss.prune.stats.base import Stats
from vss.prune.stats.run import Loss, collect
from vss.prune.stats.taps import Batch
from vss.train.fit import FitData, Phase, StepContext, fit

log = logging.getLogger(__name__)


@dataclass
class SparsePhase(Phase):
    """Adds the penalty on scales (`strength` is lambda) to the gradients, see `vss.prune.phases`; with `group_lasso`
    coupled layers shrink together."""

    groups: Groups
    strength: float
    group_lasso: bool = True

    def about(self) -> dict[str, Any]:
        return {"strength": self.strength, "group_lasso": self.group_lasso}

    def after_backward(self, context: StepContext) -> None:
        """The subgradient, in the gradients' scale."""
        add_subgradient(context.model, self.groups, self.strength * context.scale, group_lasso=self.group_lasso)


class SearchPhase(Phase):
    """DMCP's training step, and the alphas: one (K,) float64 tensor a group, on the CPU.

    `model` has the channels of its groups in order of importance and is only looked at; `kind` and `keep` are the
    budget, `example` an input (N, 3, H, W).
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Iterable[Group],
        cost: CostModel,
        *,
        kind: str,
        keep: float,
        config: DmcpConfig,
        example: Tensor,
        seed: int = 0,
    ) -> None:
        members = list(groups)
        self.config, self.seed = config, seed
        self.chains = [Chain.of(group, min_width=config.min_width, offset=config.offset) for group in members]
        self.gates = Gates(model, members, example)
        self.cost = ExpectedCost(cost, kind, members)
        self.full = float(self.cost([float(chain.channels) for chain in self.chains]))
        self.target = keep * self.full
        least = float(self.cost([float(chain.least) for chain in self.chains]))
        if least > self.target:
            raise VssError(
                f"the search is to keep {keep:.3f} of the {kind} and the least widths need {least / self.full:.3f}; "
                "ask for more or lower dmcp.min_width."
            )
        self.alphas = [
            torch.full((chain.links,), config.start, dtype=torch.float64, requires_grad=True) for chain in self.chains
        ]
        moving = [alpha for alpha in self.alphas if len(alpha)]
        if not moving:
            raise VssError("the search has nothing to choose: every group stays at one width; lower dmcp.min_width.")
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(moving, lr=config.alpha_lr)
            if config.optimizer == "adam"
            else torch.optim.SGD(moving, lr=config.alpha_lr, momentum=0.9, nesterov=True)
        )

    def about(self) -> dict[str, Any]:
        return {"settings": self.config.model_dump(mode="json"), "target": self.target, "seed": self.seed}

    # -- weights ------------------------------------------------------------------------------------------------------

    def after_backward(self, context: StepContext) -> None:
        """Add the gradients of the least width and of two drawn ones, one graph at a time."""
        parameters = [p for p in context.model.parameters() if p.requires_grad]
        total: list[Tensor | None] = [None] * len(parameters)
        for widths in self.sandwich(context.step, context.steps):
            gates = [chain.mask(width) for chain, width in zip(self.chains, widths, strict=True)]
            with untracked(context.model), context.autocast():
                outputs = self.gates(context.model, context.images, gates)
                loss = self.agreement(outputs, context)
            grads = torch.autograd.grad(loss * context.scale, parameters, allow_unused=True)
            for index, grad in enumerate(grads):
                before = total[index]
                total[index] = grad if before is None else before if grad is None else before + grad
        for parameter, change in zip(parameters, total, strict=True):
            if change is not None:
                mean = _average(change)
                parameter.grad = mean if parameter.grad is None else parameter.grad + mean

    def sandwich(self, step: int, steps: int) -> list[list[int]]:
        """The least widths and two more for this step: uniform before the joint part, more and more by the chains in
        it, and after it the expected ones and one by the chains."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        least = [chain.least for chain in self.chains]
        begin, end = self.joint_part(steps)
        if step >= end > begin:
            return [least, expected_widths(self.chains, self.alphas, form=self.config.form), self._by_chain(generator)]
        progress = max(0, step - begin) / max(1, end - begin)
        uniform = math.exp(-progress)  # the published 0.9999 every ten of ImageNet's steps ends there as well
        drawn = []
        for _ in range(2):
            free = step < begin or float(torch.rand((), generator=generator)) < uniform
            drawn.append([uniform_width(c, generator) for c in self.chains] if free else self._by_chain(generator))
        return [least, *drawn]

    def _by_chain(self, generator: torch.Generator) -> list[int]:
        pairs = zip(self.chains, self.alphas, strict=True)
        return [sample_width(chain, alpha, generator, self.config.form) for chain, alpha in pairs]

    def agreement(self, outputs: dict[str, Tensor], context: StepContext) -> Tensor:
        """Divergence of all heads from those of the full width; void pixels do not count, labels do not either."""
        return context.learner.distillation_loss(outputs, context.outputs, context.batch)

    # -- widths -------------------------------------------------------------------------------------------------------

    def joint_part(self, steps: int) -> tuple[int, int]:
        """First step in which alpha moves, and the first after it in which it stands still."""
        begin = round(self.config.warmup * steps)
        return begin, max(begin, round((self.config.warmup + self.config.joint) * steps))

    def after_step(self, context: StepContext) -> None:
        """One step of alpha, in the joint part; weights, their gradients and running statistics stay as they are."""
        begin, end = self.joint_part(context.steps)
        if not begin <= context.step < end:
            return
        form = self.config.form
        gates = [soft_mask(chain, alpha, form) for chain, alpha in zip(self.chains, self.alphas, strict=True)]
        with untracked(context.model), context.autocast():
            task = context.loss(self.gates(context.model, context.images, gates))
        widths = [expected_width(chain, alpha, form) for chain, alpha in zip(self.chains, self.alphas, strict=True)]
        price = self.config.mac_weight * mac_loss(self.cost(widths), self.target)
        moving = [alpha for alpha in self.alphas if len(alpha)]
        by_task = torch.autograd.grad(task * context.scale, moving, allow_unused=True)
        by_price = torch.autograd.grad(price, moving, allow_unused=True)
        for alpha, first, second in zip(moving, by_task, by_price, strict=True):
            pull = torch.zeros_like(alpha) if first is None else _average(first) / context.scale
            alpha.grad = pull + (0 if second is None else second)
        if any(not torch.isfinite(alpha.grad).all() for alpha in moving if alpha.grad is not None):
            log.warning("step %d of the width search had no finite gradient and was left out", context.step)
            return
        lr = self.config.alpha_lr * (0.6 + 0.4 * math.cos(math.pi * (context.step - begin) / (end - begin)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"alphas": [alpha.detach().clone() for alpha in self.alphas], "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for alpha, value in zip(self.alphas, state["alphas"], strict=True):
                alpha.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])

    def result(self, *, align: int = 1) -> dict[str, Any]:
        """The found widths and how they were found."""
        config, tries = self.config, None
        widths = expected_widths(self.chains, self.alphas, form=config.form, align=align)
        if config.final == "sampled":
            generator = torch.Generator().manual_seed(self.seed)
            drawn, tries = sample_widths(
                self.chains, self.alphas, cost=self.cost, target=self.target, generator=generator,
                form=config.form, tolerance=config.tolerance, tries=config.tries,
            )  # fmt: skip
            if tries is None:
                log.warning("no draw of %d met the budget; the expected widths are taken", config.tries)
            else:
                widths = [chain.nearest(width, align) for chain, width in zip(self.chains, drawn, strict=True)]
        pairs = zip(self.chains, self.alphas, strict=True)
        expected = [float(expected_width(chain, alpha.detach(), config.form)) for chain, alpha in pairs]
        return {
            "widths": {group.id: width for group, width in zip(self.gates.groups, widths, strict=True)},
            "expected": {group.id: width for group, width in zip(self.gates.groups, expected, strict=True)},
            "kept": float(self.cost(widths)) / self.full,
            "kept_expected": float(self.cost(expected)) / self.full,
            "target": self.target / self.full,
            "draws": tries,
        }


def ordered(
    model: nn.Module,
    groups: Groups,
    *,
    order: str,
    batches: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    example: Tensor,
) -> nn.Module:
    """A copy of `model` with the channels of every group in order of importance, best first; the same function.

    Raises:
        VssError: the outputs change, which means that the network treats channels by their number.
    """
    criterion = make_criterion(order)
    members = list(groups)
    found, _ = collect(model, members, criterion.needs, batches, loss, batch_norm=criterion.batch_norm_mode())
    scores = score_groups(criterion, members, Stats(model, found, seed=seed))
    result = reorder(model, members, {g.id: importance_order(scores[g.id], g.unit) for g in members})
    x = torch.randn(example.shape, generator=torch.Generator().manual_seed(seed)).to(example.device)
    with evaluating(model, result):
        equal = alike(model, result, x, lambda net, image: logits_of(default_forward(net, image)), TOLERANCE)
    if not equal:
        raise VssError("channels of this network cannot be put in order: it treats them by their number.")
    return result


def search(
    model: nn.Module,
    data: FitData,
    config: FitConfig,
    settings: DmcpConfig,
    run_dir: Path | str,
    *,
    example: Tensor,
    save: Callable[[nn.Module, Path, dict[str, float]], None],
    kind: str = "macs",
    keep: float = 0.5,
    align: int = 1,
    stay: Iterable[str] = (),
    batches: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """Find widths for the budget `kind`, `keep`, multiples of `align`; a killed search resumes from `run_dir`.

    `model` is not changed, the layers `stay` keep their channels; `example` is an input of the size at which MACs
    count; `batches` and `loss` calibrate the ordering criterion, where it needs them. The rest is as for `fit`.

    Returns:
        The network with ordered channels and the weights of the search, and {"widths": group id -> channels, ...,
        "fit": what `fit` returned}. Prune it with criterion `dmcp`, options `{"order": "index", "widths": widths}`.
    """
    groups = find_groups(model, example, keep=stay)
    net = ordered(model, groups, order=settings.order, batches=batches, loss=loss, seed=seed, example=example)
    phase = SearchPhase(
        net, groups, CostModel.measure(net, example), kind=kind, keep=keep, config=settings, example=example,
        seed=seed,
    )  # fmt: skip
    fitted = fit(net, data, config, run_dir, save=save, seed=seed, progress=progress, phase=phase)
    return net, {**phase.result(align=align), "fit": fitted}


def _average(value: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value
