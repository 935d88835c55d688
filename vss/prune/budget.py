"""From scores to kept channels under a budget, without rebuilding the network for any width that is tried.

Every tensor's kept size is the product of its kept dims; a convolution costs (kept weight elements) x (output
positions), a transposed one (kept weight elements) x (input positions), a linear layer (elements) x (rows). So

    cost = sum over tensors t of  coefficient_t * prod over dims d of  kept(t, d)

where a coefficient is 1 for parameters and the number of positions for MACs. One MAC is one multiply and one add.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vss.core.closeness import evaluating
from vss.core.config import Budget
from vss.core.errors import VssError
from vss.core.example import Example, Forward, call, image_of, input_channels
from vss.core.networks import hooked, meant, refuse_unmeant
from vss.prune.plan import Group, Plan


class Unreachable(VssError):
    """No widths that are allowed meet the budget."""


_COUNTED = (nn.modules.conv._ConvNd, nn.Linear)
Rounding = Callable[[int, float], int]
"""(channels, removed fraction) -> kept channels, of a criterion that fixes widths itself."""


@dataclass(frozen=True)
class CostModel:
    """Shapes and coefficients of one network at one input size."""

    shapes: dict[str, tuple[int, ...]]
    positions: dict[str, int]
    parameters: frozenset[str]

    @classmethod
    def measure(cls, model: nn.Module, example: Example, *, forward: Forward | None = None) -> CostModel:
        """One forward of `example`; counts are per image. Auxiliary heads do not count."""
        positions: dict[str, int] = defaultdict(int)
        hooks = [
            module.register_forward_hook(_counter(f"{name}.weight", positions))
            for name, module in model.named_modules()
            if isinstance(module, _COUNTED)
        ]
        hooks += [
            module.register_forward_hook(_attention_counter(name, positions), with_kwargs=True)
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
        ]
        with hooked(hooks), torch.no_grad(), evaluating(model):
            (forward or call)(model, example)
        state = model.state_dict().items()
        shapes = {name: tuple(value.shape) for name, value in state if isinstance(value, Tensor)}
        for name in positions.keys() - shapes:  # of a parametrised layer, whose weight is computed
            layer: Any = model.get_submodule(name.rpartition(".")[0])
            shapes[name] = tuple(layer.weight.shape)
        per_image = {name: count // len(image_of(example)) for name, count in positions.items()}
        return cls(shapes, per_image, frozenset(name for name, _ in model.named_parameters()))

    def total(self, kind: str, groups: list[Group], kept: list[int]) -> float:
        """Cost with `kept[i]` channels left in `groups[i]`; kind is "params", "macs" or "channels"."""
        if kind == "channels":
            return float(sum(kept))
        lost: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for group, count in zip(groups, kept, strict=True):
            for slot in group.slots:
                lost[slot.tensor][slot.dim] += (group.channels - count) * slot.block
        coefficients = self.positions if kind == "macs" else dict.fromkeys(self.parameters, 1)
        total = 0
        for name, coefficient in coefficients.items():
            size = 1
            for dim, length in enumerate(self.shapes[name]):
                size *= length - lost[name][dim] if name in lost else length
            total += coefficient * size
        return float(total)

    def fixed(self, groups: list[Group]) -> float:
        """MACs of layers of which no group holds a slice."""
        reached = {slot.tensor for group in groups for slot in group.slots}
        return float(sum(count * math.prod(self.shapes[name]) for name, count in self.positions.items()
                         if name not in reached))  # fmt: skip


def _counter(weight: str, positions: dict[str, int]) -> Callable[..., None]:
    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            positions[weight] += output.numel() // module.out_features
        elif module.transposed:
            positions[weight] += inputs[0].numel() // module.in_channels
        else:
            positions[weight] += output.numel() // module.out_channels

    return hook


def _attention_counter(name: str, positions: dict[str, int]) -> Callable[..., None]:
    """Of the projections of an `nn.MultiheadAttention`, which it does not call as layers."""

    def hook(module: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: object) -> None:
        given = dict(zip(("query", "key", "value"), inputs, strict=False)) | named
        tokens = [math.prod(given[key].shape[:-1]) for key in ("query", "key", "value")]
        if module.in_proj_weight is None:
            for key, count in zip("qkv", tokens, strict=True):
                positions[f"{name}.{key}_proj_weight"] += count
        else:
            positions[f"{name}.in_proj_weight"] += sum(tokens) // 3
        positions[f"{name}.out_proj.weight"] += tokens[0]

    return hook


def count(
    model: nn.Module,
    size: tuple[int, int] | None = None,
    *,
    example: Example | None = None,
    forward: Forward | None = None,
) -> dict[str, float]:
    """`params_m` (million parameters) and `macs_g` (giga multiply-accumulates) of one image.

    Args:
        model: the network.
        size: (H, W) of an image with the channels that its first convolution takes; or
        example, forward: an input, and how to call the network, for what that does not fit.
    """
    if example is None:
        if size is None:
            raise VssError("MACs count at a size; give (H, W) or example=.")
        device = next((p.device for p in model.parameters()), "cpu")
        example = torch.zeros(1, input_channels(model), *size, device=device)
    cost = CostModel.measure(model, example, forward=forward)
    return {"params_m": cost.total("params", [], []) / 1e6, "macs_g": cost.total("macs", [], []) / 1e9}


LEAST_STEP = 8
"""No group that has so many channels falls back to a smaller step: half-precision kernels come in eights."""


def step_of(whole: int, align: int, *, unit: int = 1, floor: int = 1) -> int:
    """Channels between the widths that a group of `whole` channels may have: whole units, and multiples of `align`.

    Where no multiple of `align` lies between `floor` and `whole`, the largest power of two below it that has one, but
    `LEAST_STEP` at least; in a group of less than that, the largest power of two in it.
    """
    powers = [1 << place for place in range(min(whole, align).bit_length() - 1, -1, -1)]
    inside = [power for power in powers if math.lcm(power, unit) <= whole] or [1]
    steps = [math.lcm(each, unit) for each in (align, *inside) if each == align or each >= min(LEAST_STEP, inside[0])]
    return next((step for step in steps if (whole - 1) // step * step >= floor), steps[-1])


def multiple_of(budget: Budget) -> int:
    """`align` of a budget as a number."""
    if budget.align == "auto":
        raise VssError(
            "prune.budget.align is auto, and what that is depends on a target, which is not known here; give a number, "
            "or prune by `vss run` or `vss prune --backend`, which know it."
        )
    return budget.align


def allowed_counts(group: Group, budget: Budget, rounding: Rounding | None = None, whole: int | None = None) -> Tensor:
    """For each walked count 0..C of a group, the count that really stays (int64, length C + 1).

    Entry i answers "i channels would stay": at least the floor (and one channel), the nearest multiple of the group's
    step (see `step_of`) or the full width. With `rounding` that many are asked for instead of i. `whole` is the width
    before earlier rounds of cutting, of which floor, alignment and rounding count; by default C. Where `budget.ratios`
    fixes the width, that is the count of every entry, above the floor or not.
    """
    total = group.channels
    whole = whole or total
    ratio = ratio_of(group, budget)
    floor = max(1, math.ceil(whole * budget.floor - 1e-9)) if ratio is None else 1
    step = step_of(whole, multiple_of(budget), unit=group.unit, floor=floor)
    choices = sorted({count for count in [*range(step, total + 1, step), total] if count >= floor})
    table = torch.tensor(choices)
    wanted = torch.arange(total + 1) if ratio is None else torch.full((total + 1,), round(whole * (1 - ratio)))
    if rounding is not None and ratio is None:
        wanted = torch.tensor([rounding(whole, 1 - count / whole) for count in range(total + 1)])
        wanted = wanted.cummax(dim=0).values  # a rule may dip where it rounds; the walk needs counts that only fall
    distance = (table[None, :] - wanted[:, None]).abs()
    return table[distance.argmin(dim=1)]


def layers_of(groups: Iterable[Group]) -> list[str]:
    """The layers whose channels groups hold, in model order."""
    return list(dict.fromkeys(name for group in groups for name in (group.id, *group.module_names("producer"))))


def ratio_of(group: Group, budget: Budget) -> float | None:
    """The fraction that `budget.ratios` removes of a group, by its last pattern that means a layer of it."""
    found = [
        ratio for pattern, ratio in budget.ratios.items() if any(meant(pattern, name) for name in layers_of([group]))
    ]
    return found[-1] if found else None


def rank(groups: list[Group], scores: dict[str, Tensor]) -> Tensor:
    """Group index of each removal step, lowest score first: (sum of channels,) int64; ties by (group, channel)."""
    order = torch.argsort(torch.cat([scores[group.id].double() for group in groups]), stable=True)
    return torch.cat([torch.full((group.channels,), index) for index, group in enumerate(groups)])[order]


def search(
    groups: list[Group],
    scores: dict[str, Tensor],
    cost: CostModel,
    budget: Budget,
    *,
    rounding: Rounding | None = None,
    origin: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Kept channel numbers (ascending int64) per group id for the longest-kept network within the budget.

    Args:
        groups: in model order.
        scores: (C,) float, higher is more important, comparable across groups unless the scope is local.
        cost, budget: what a width costs, and what to meet; of scope "auto", which a criterion decides, all are ranked
            together.
        rounding: of a criterion that fixes widths itself; the floor and `align` of the budget still hold.
        origin: group id -> width before earlier rounds of cutting, of which the whole budget counts.

    Raises:
        Unreachable: the floors make the budget unreachable (says what can be reached).
    """
    widths = [(origin or {}).get(group.id, group.channels) for group in groups]
    refuse_unmeant(budget.ratios, layers_of(groups), "prune.budget.ratios (--ratio)")
    tables = [allowed_counts(group, budget, rounding, whole) for group, whole in zip(groups, widths, strict=True)]
    if budget.kind == "channels" and budget.scope == "local":  # the published integer rule, no search
        wanted = [int(whole * budget.keep + 1e-9) for whole in widths]
        exact = [int(t[min(count, len(t) - 1)]) for count, t in zip(wanted, tables, strict=True)]
        return _pick(groups, scores, exact)
    target = budget.keep * cost.total(budget.kind, groups, widths)
    if budget.scope in ("auto", "global"):
        counts = _global_counts(groups, scores, tables)
    else:
        counts = _even_counts(groups, scores, tables, widths, sets_of(groups, cost.shapes, budget.scope))
    length = counts.shape[0] - 1

    def spent(step: int) -> float:
        return cost.total(budget.kind, groups, counts[step].tolist())

    least = spent(length)
    if least > target * (1 + 1e-9):
        whole = target / budget.keep
        aligned = f" with widths in multiples of {budget.align}" if budget.align != 1 else ""
        raise Unreachable(
            f"the budget asks for {budget.keep:.3f} of the {budget.kind} and the floor of {budget.floor} a group"
            f"{aligned} allows no less than {least / whole:.3f}; ask for more (prune.budget.keep), or lower "
            f"prune.budget.floor{' or prune.budget.align' if aligned else ''}."
        )
    low, high = 0, length
    while low < high:
        middle = (low + high) // 2
        if spent(middle) <= target * (1 + 1e-9):
            high = middle
        else:
            low = middle + 1
    return _pick(groups, scores, counts[low].tolist())


def borrowed(plan: Plan, source: str, groups: list[Group], scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """The best channels of each group by the scores, as many as `plan` (called `source`) keeps of it."""
    require_lender(plan, source, groups)
    return _pick(groups, scores, [len(each.kept) for group in groups for each in plan.groups if each.id == group.id])


def require_lender(plan: Plan, source: str, groups: Iterable[Group]) -> None:
    """Refuse a plan, called `source`, of another network than that of the groups."""
    theirs, ours = {g.id: g.channels for g in plan.groups}, {g.id: g.channels for g in groups}
    other = next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)
    if other is not None:
        raise VssError(
            f"prune.widths is {source}, a plan of another network: {other} has {theirs.get(other, 'no')} channels "
            f"there and {ours.get(other, 'none')} to choose from here; name a plan of this network, made with the same "
            "prune.keep."
        )


def _pick(groups: list[Group], scores: dict[str, Tensor], counts: list[int]) -> dict[str, Tensor]:
    return {g.id: top_channels(scores[g.id], count, g.unit) for g, count in zip(groups, counts, strict=True)}


def _global_counts(groups: list[Group], scores: dict[str, Tensor], tables: list[Tensor]) -> Tensor:
    """(steps + 1, groups) kept counts along the global walk."""
    owners = rank(groups, scores)
    removed = torch.zeros(len(owners) + 1, len(groups), dtype=torch.int64)
    removed[1:] = torch.nn.functional.one_hot(owners, len(groups)).cumsum(dim=0)
    columns = zip(groups, tables, removed.unbind(dim=1), strict=True)
    return torch.stack([table[group.channels - gone] for group, table, gone in columns], dim=1)


def _even_counts(
    groups: list[Group], scores: dict[str, Tensor], tables: list[Tensor], widths: list[int], sets: list[list[int]],
    *, steps: int = 1000,
) -> Tensor:  # fmt: skip
    """(steps + 1, groups) kept counts when every set of groups loses the fraction step / steps of its channels, cut to
    whole channels, lowest scores first."""
    left = steps - torch.arange(steps + 1)
    counts = torch.zeros(steps + 1, len(groups), dtype=torch.int64)
    for members in sets:
        owners = rank([groups[index] for index in members], scores)
        stay = sum(widths[index] for index in members) * left // steps
        removed = len(owners) - stay.clamp(max=len(owners))
        for place, index in enumerate(members):
            gone = torch.cat([torch.zeros(1, dtype=torch.int64), (owners == place).cumsum(dim=0)])
            counts[:, index] = tables[index][groups[index].channels - gone[removed]]
    return counts


def sets_of(groups: list[Group], shapes: Mapping[str, tuple[int, ...]], scope: str) -> list[list[int]]:
    """Numbers of the groups that are ranked together and lose the same fraction: each alone under "local", and under
    "isomorphic" those whose slices lie in the same kinds of tensors, whatever their widths.

    Source: Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024, which compares sub-structures of equal
    topology alone; here that is how many slices of which role lie along which dim of which kind of tensor, kernels
    included.
    """
    if scope == "local":
        return [[index] for index in range(len(groups))]
    table: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        kinds = [(s.role, s.leaf, s.dim, s.block, len(shapes[s.tensor]), shapes[s.tensor][2:]) for s in group.slots]
        table[group.unit, *sorted(kinds)].append(index)
    return list(table.values())


def top_channels(scores: Tensor, count: int, unit: int = 1) -> Tensor:
    """The `count` best channels, ascending; ties keep the higher channel number, as the walk removes lower ones first.

    With a unit above 1 whole blocks of neighbours are ranked by their mean score.
    """
    blocks = scores.double().reshape(-1, unit).mean(dim=1)
    order = torch.argsort(blocks, stable=True)
    chosen = order[len(order) - count // unit :].sort().values
    return (chosen[:, None] * unit + torch.arange(unit)).reshape(-1)
