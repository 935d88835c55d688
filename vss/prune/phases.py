"""The training phases that pruning methods assume, as pure functions: sparse scales, and DMCP's search of widths.

**Sparse training** adds a penalty on the scales of norm layers to gradients after the backward pass. Network slimming
(Liu et al., ICCV 2017) adds lambda * sign(gamma), the subgradient of lambda * |gamma|. Coupled norm layers share their
channels, and a channel goes only when all of them let it go: there the group lasso, lambda * ||(gamma_m,k)_m||_2,
shrinks them together (Torch-Pruning's BNScalePruner does the same).

**DMCP** (Guo et al., CVPR 2020) searches widths as Markov chains by gradient. A group of C channels has `least` that
always stay and `links` blocks of `step` channels behind them. Block k is kept with probability p_k when block k - 1 is,
so with q_k = p_1 ... p_k

    expected width = least + step * sum of q_k

and one learnable number a block, alpha, gives p. Channels are put in order of importance first (`reorder`), so that a
width means a prefix. Widths are zeros behind the norm layers, never another convolution: batch norm works channel by
channel, hence a net with zeroed channels computes what the cut one does, across concatenations too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vss.core.closeness import proven_difference
from vss.core.errors import VssError
from vss.core.example import default_forward, logits_of
from vss.prune.apply import TOLERANCE, BatchNorm, tensors_of, zero_channels
from vss.prune.budget import CostModel, step_of
from vss.prune.plan import Group, Slot
from vss.prune.stats.taps import following_norm, norm_slots, owner, slot_values

Form = Literal["sigmoid", "exp"]
SCALES = ("weight", "scale")  # of batch, instance and group norm; of a feature norm


def scale_slots(model: nn.Module, group: Group) -> list[Slot]:
    """The slots of a group that hold scales of its norm layers, never their shifts."""
    return [slot for slot in norm_slots(model, group) if slot.leaf in SCALES]


def penalty(rows: list[Tensor], *, group_lasso: bool) -> tuple[Tensor, list[Tensor]]:
    """The scalar penalty of one group, and its subgradients (C, D), one for each member's scales; 0 where all is 0.

    `group_lasso` takes the norm over members of each channel; else the sum of absolute values.
    """
    if not group_lasso:
        return torch.stack([row.abs().sum() for row in rows]).sum(), [row.sign() for row in rows]
    norms = torch.stack([row.square().sum(dim=1) for row in rows]).sum(dim=0).sqrt()
    safe = torch.where(norms > 0, norms, torch.ones_like(norms))[:, None]
    return norms.sum(), [row / safe for row in rows]


@torch.no_grad()
def add_subgradient(model: nn.Module, groups: Iterable[Group], strength: float, *, group_lasso: bool = True) -> int:
    """Add `strength` times the subgradient to the gradients of the groups' scales; call it after the backward pass.

    Layers that no group holds, whose channels cannot go, are left alone, and so are shifts. Returns the number of scale
    tensors that were reached.

    Raises:
        VssError: no group has a norm layer with scales; a scale has no gradient.
    """
    reached = 0
    parameters = dict(model.named_parameters())
    for group in groups:
        slots = scale_slots(model, group)
        values = [parameters[slot.tensor] for slot in slots]
        if not slots:
            continue
        rows = [slot_values(value, slot, group.channels) for value, slot in zip(values, slots, strict=True)]
        for slot, value, change in zip(slots, values, penalty(rows, group_lasso=group_lasso)[1], strict=True):
            if value.grad is None:
                raise VssError(f"{slot.tensor} got no gradient: its head is outside the loss; include every head.")
            place = slot.indices(torch.arange(group.channels)).to(value.device)
            view = value.grad.movedim(slot.dim, 0)
            view[place] += (strength * change).reshape(view[place].shape)
            reached += 1
    if not reached:
        raise VssError(
            "sparse training needs norm layers with scales on prunable channels and found none; "
            "choose a criterion that reads weights, such as l1 or fpgm."
        )
    return reached


@torch.no_grad()
def scale_facts(model: nn.Module, groups: Iterable[Group], *, bins: int = 20) -> dict[str, Any]:
    """How far the scales are apart, which shows whether the phase has done its work.

    Returns:
        `histogram` of |scale| in `bins` equal bins from 0 to `max`, `median`, and `near_zero`: the fraction below a
        hundredth of the largest. Without a peak at zero the ranking of channels means little.
    """
    parameters = dict(model.named_parameters())
    rows = [
        slot_values(parameters[slot.tensor], slot, group.channels).abs().flatten().double().cpu()
        for group in groups
        for slot in scale_slots(model, group)
    ]
    if not rows:
        raise VssError("this network has no norm layers with scales on prunable channels.")
    values = torch.cat(rows)
    top = float(values.max())
    return {
        "histogram": torch.histc(values, bins=bins, min=0, max=max(top, 1e-12)).long().tolist(),
        "max": top,
        "median": float(values.median()),
        "near_zero": float((values < 0.01 * top).double().mean()),
    }


@dataclass(frozen=True)
class Chain:
    """The widths that a group may have: `least + k * step` channels, k in 0 .. `links`; all multiples of `unit`."""

    channels: int
    least: int
    step: int
    links: int
    unit: int = 1

    @classmethod
    def of(cls, group: Group, *, min_width: float = 0.1, offset: float = 0.1) -> Chain:
        """Blocks of `offset` of the channels (one unit at least) above `min_width` of them."""
        units = group.channels // group.unit
        step = max(1, int(offset * units + 1e-9))
        links = max(0, min(int((1 - min_width) / offset + 1e-4), (units - 1) // step))
        least = units - step * links
        return cls(group.channels, least * group.unit, step * group.unit, links, group.unit)

    def mask(self, width: int) -> Tensor:
        """(C,) float: 1 for the first `width` channels, 0 behind."""
        return (torch.arange(self.channels) < width).float()

    def nearest(self, width: float, align: int = 1) -> int:
        """The whole number of units nearest to `width`, aligned as `step_of` says."""
        step = step_of(self.channels, align, unit=self.unit)
        return min(self.channels, max(step, round(width / step) * step))


def keep_probabilities(alpha: Tensor, form: Form = "sigmoid") -> Tensor:
    """(K,) p_k: sigmoid(alpha), or exp(-max(alpha, 0)), which begins at full width."""
    return torch.sigmoid(alpha) if form == "sigmoid" else torch.exp(-alpha.clamp(min=0))


def marginals(alpha: Tensor, form: Form = "sigmoid") -> Tensor:
    """(K,) q_k, the probability that block k is kept; never increasing."""
    return keep_probabilities(alpha, form).cumprod(dim=0)


def expected_width(chain: Chain, alpha: Tensor, form: Form = "sigmoid") -> Tensor:
    """Scalar, differentiable."""
    return chain.least + chain.step * marginals(alpha, form).sum()


def soft_mask(chain: Chain, alpha: Tensor, form: Form = "sigmoid") -> Tensor:
    """(C,) factors of the channels: 1 for those that always stay, q_k for those of block k; differentiable."""
    return torch.cat([alpha.new_ones(chain.least), marginals(alpha, form).repeat_interleave(chain.step)])


def sample_width(chain: Chain, alpha: Tensor, generator: torch.Generator, form: Form = "sigmoid") -> int:
    """Walk the chain from the first block on and stop at the first that fails."""
    draws = torch.rand(chain.links, generator=generator)
    kept = (draws < keep_probabilities(alpha.detach(), form).cpu()).long().cumprod(dim=0)
    return chain.least + chain.step * int(kept.sum())


def uniform_width(chain: Chain, generator: torch.Generator) -> int:
    """Any allowed width, all equally likely."""
    return chain.least + chain.step * int(torch.randint(chain.links + 1, (), generator=generator))


class ExpectedCost:
    """A `CostModel` as a differentiable function of widths.

    The widths of two groups that meet in a convolution are multiplied as if they were independent, as in the paper.
    """

    def __init__(self, cost: CostModel, kind: str, groups: Sequence[Group]) -> None:
        self.channels = [group.channels for group in groups]
        self.kind, self.constant = kind, 0.0
        self.terms: list[tuple[float, dict[int, int], dict[int, list[tuple[int, int]]]]] = []
        where: dict[str, dict[int, list[tuple[int, int]]]] = {}
        for index, group in enumerate(groups):
            for slot in group.slots:
                where.setdefault(slot.tensor, {}).setdefault(slot.dim, []).append((index, slot.block))
        coefficients = cost.positions if kind == "macs" else dict.fromkeys(sorted(cost.parameters), 1)
        for name, coefficient in coefficients.items() if kind != "channels" else ():
            shape, cut = dict(enumerate(cost.shapes[name])), where.get(name, {})
            fixed = float(coefficient)
            for dim, length in shape.items():
                fixed *= 1 if dim in cut else length
            if cut:
                self.terms.append((fixed, {dim: shape[dim] for dim in cut}, cut))
            else:
                self.constant += fixed

    def __call__(self, widths: Sequence[Tensor | float]) -> Tensor:
        """Scalar float64 cost at these widths, one a group."""
        lost = [c - torch.as_tensor(w, dtype=torch.float64) for c, w in zip(self.channels, widths, strict=True)]
        if self.kind == "channels":
            return sum(self.channels) - torch.stack(lost).sum()
        total = torch.tensor(self.constant, dtype=torch.float64)
        for fixed, lengths, cut in self.terms:
            term = torch.tensor(fixed, dtype=torch.float64)
            for dim, parts in cut.items():
                term = term * (lengths[dim] - sum(lost[index] * block for index, block in parts))
            total = total + term
        return total


def mac_loss(expected: Tensor, target: float) -> Tensor:
    """log |r - 1| below 0.95 of the target, 0 from there to the target, log |r - 0.95| above it; r = expected / target.

    Relative cost only adds a constant to the paper's logarithm, so its gradient is the published one in any unit. The
    pull is towards the zone between 0.95 and 1 of the target, and there is none inside.
    """
    ratio = expected / target
    if float(ratio.detach()) < 0.95:
        return torch.log(1 - ratio)
    if float(ratio.detach()) < 1:
        return ratio * 0
    return torch.log(ratio - 0.95)


def expected_widths(
    chains: Sequence[Chain], alphas: Sequence[Tensor], *, form: Form = "sigmoid", align: int = 1
) -> list[int]:
    """The expected widths as whole, aligned numbers of channels."""
    pairs = zip(chains, alphas, strict=True)
    return [chain.nearest(float(expected_width(chain, alpha.detach(), form)), align) for chain, alpha in pairs]


def sample_widths(
    chains: Sequence[Chain],
    alphas: Sequence[Tensor],
    *,
    cost: ExpectedCost,
    target: float,
    generator: torch.Generator,
    form: Form = "sigmoid",
    tolerance: float = 0.01,
    tries: int = 1000,
) -> tuple[list[int], int | None]:
    """Widths drawn from the chains until the cost is within `tolerance` of the target, and the draws that it took.

    After `tries` draws it gives up and returns the expected widths and None: a chain may be so sure of itself that no
    draw ever meets the target, where the original loops for ever.
    """
    for attempt in range(1, tries + 1):
        widths = [sample_width(chain, alpha, generator, form) for chain, alpha in zip(chains, alphas, strict=True)]
        if abs(float(cost(widths)) / target - 1) <= tolerance:
            return widths, attempt
    return expected_widths(chains, alphas, form=form), None


def importance_order(scores: Tensor, unit: int = 1) -> Tensor:
    """(C,) int64 channel numbers, best first; whole units by their mean score, equal ones by number."""
    best = torch.argsort(scores.double().reshape(-1, unit).mean(dim=1), descending=True, stable=True)
    return (best[:, None] * unit + torch.arange(unit)).reshape(-1)


@torch.no_grad()
def reorder(model: nn.Module, groups: Sequence[Group], orders: dict[str, Tensor]) -> nn.Module:
    """A copy in which channel j of a group is channel `orders[group.id][j]` of the original, with the same outputs."""
    model = copy.deepcopy(model)
    tensors = tensors_of(model)
    for group in groups:
        for slot in group.slots:
            view = tensors[slot.tensor].data.movedim(slot.dim, 0)
            there, whence = slot.indices(torch.arange(group.channels)), slot.indices(orders[group.id])
            view[there.to(view.device)] = view[whence.to(view.device)].clone()
    return model


class Gates:
    """Runs a network with its channels multiplied by gates, without changing it.

    A gate multiplies scale and shift of the norm layers of its group, which is the output times the gate; producers
    that no norm layer follows are multiplied themselves. Where that does not zero all that the cut removes (a stream
    that is read beside its norm layer), every tensor of the group is multiplied; each group is tried at the start.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], example: Tensor) -> None:
        self.groups = tuple(groups)
        self.points = [gate_points(model, group) for group in self.groups]
        if self._differs(model, example, range(len(self.groups))):
            for index, group in enumerate(self.groups):
                if self._differs(model, example, [index]):
                    self.points[index] = [slot for slot in group.slots if slot.role != "consumer"]
            if self._differs(model, example, range(len(self.groups))):
                raise VssError("the widths of this network cannot be searched: zeroed channels still reach its output.")

    def __call__(self, model: nn.Module, x: Tensor, gates: Sequence[Tensor]) -> Any:
        """All heads of `model` on x (N, 3, H, W) with `gates[i]` (C,) on the channels of group i; differentiable."""
        tensors: dict[str, Tensor] = dict(_Whole(model).named_parameters())
        factors: dict[tuple[str, int], Tensor] = {}
        for points, gate, group in zip(self.points, gates, self.groups, strict=True):
            for slot in points:
                key = (f"net.{slot.tensor}", slot.dim)
                if key[0] not in tensors:
                    continue
                value = tensors[key[0]]
                factor = factors.get(key, torch.ones(value.shape[slot.dim], device=value.device, dtype=value.dtype))
                place = slot.indices(torch.arange(group.channels)).to(value.device)
                change = gate.to(value.device, value.dtype).repeat_interleave(slot.block)
                factors[key] = factor * torch.ones_like(factor).index_copy(0, place, change)
        gated: dict[str, Tensor] = {}
        for (name, dim), factor in factors.items():
            value = gated[name] if name in gated else tensors[name]
            gated[name] = value * factor.view([-1 if d == dim else 1 for d in range(value.ndim)])
        return torch.func.functional_call(_Whole(model), gated, (x,))

    @torch.no_grad()
    def _differs(self, model: nn.Module, example: Tensor, chosen: Sequence[int]) -> bool:
        """Whether gates of 0 on half of each chosen group differ from its slices being zero, in evaluation mode."""
        halves = [max(1, group.channels // group.unit // 2) * group.unit for group in self.groups]
        widths = [n if i in chosen else g.channels for i, (g, n) in enumerate(zip(self.groups, halves, strict=True))]
        pairs = list(zip(self.groups, widths, strict=True))
        gates = [(torch.arange(group.channels) < width).float() for group, width in pairs]
        x = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example.device)

        def differs(still: nn.Module, x: Tensor) -> bool:
            mask = copy.deepcopy(still)
            zero_channels(mask, [(group, torch.arange(width, group.channels)) for group, width in pairs])
            wanted, got = logits_of(default_forward(mask, x)), logits_of(self(still, x, gates))
            return any(proven_difference(a, b) > TOLERANCE for a, b in zip(wanted, got, strict=True))

        still = copy.deepcopy(model).eval()
        return differs(still, x) and differs(still.double(), x.double())  # what is left in float64 is no rounding


class _Whole(nn.Module):
    """A network called so that all heads are reached."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> object:
        """Whatever the network gives."""
        return default_forward(self.net, x)


def gate_points(model: nn.Module, group: Group) -> list[Slot]:
    """Slots whose values, times a gate, multiply the channels where they leave the group's layers."""
    norms = norm_slots(model, group)
    layers = {slot.layer for slot in norms}
    bare = [
        slot
        for slot in group.slots
        if slot.role in ("producer", "norm")
        and slot.layer not in layers
        and not isinstance(owner(model, slot.tensor), BatchNorm)
        and following_norm(model, group, slot.layer) not in layers
    ]
    return [*norms, *bare]


@contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    """Batch norms use the batch's statistics and leave their running ones alone, which belong to the full width."""
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats and m.training]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
