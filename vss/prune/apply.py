"""Cut a network by a plan, or mask it: pure tensor slicing, no tracing, no data, no criterion."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss.core.closeness import duplicate, evaluating
from vss.core.errors import SHOWN, VssError, one_line
from vss.core.example import default_forward, input_channels, own_attribute
from vss.core.files import sha256_tensors
from vss.core.networks import eager
from vss.prune.plan import Group, Plan, PlanGroup

Conv = nn.modules.conv._ConvNd
BatchNorm = nn.modules.batchnorm._BatchNorm
NOTHING = torch.zeros(0, dtype=torch.int64)
SIZED = (Conv, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm)
"""Layers whose weight, bias and statistics have one size in common."""
TOLERANCE = 1e-4  # of masked against cut outputs, relative to their spread


@eager
def apply_plan(model: nn.Module, plan: Plan, *, check_weights: bool = True) -> nn.Module:
    """Return a smaller copy of `model`; the original is untouched. The copy's `plans` says how it was cut.

    `check_weights` refuses a model whose weights are not those of the plan, and a plan that leaves a network which
    cannot be run. Off where only the shapes matter, as in rebuilding a checkpoint before its weights are loaded and
    held against them.

    Raises:
        VssError: a plan of another network or of other weights.
    """
    check_plan(model, plan, check_weights=check_weights)
    small = cut_by(model, plan.groups)
    vars(small)["plans"] = (*vars(model).get("plans", ()), plan)  # its own, not those of what it wraps
    misfit = _misfit(small) if check_weights else ""
    if misfit and not _misfit(model):
        raise VssError(
            f"the network that the plan leaves cannot be run ({misfit}); the plan lacks slots of layers that take what "
            "it removes: make it again."
        )
    return small


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the same shape in which every removed slice is zero; it computes what `apply_plan`'s network does."""
    check_plan(model, plan, check_weights=False)
    return masked_by(model, plan.groups)


def cut(model: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> nn.Module:
    """A smaller copy for measuring: its `plans` do not say that it was cut.

    `kept`: group id -> channel numbers that stay, ascending int64.
    """
    chosen = [group.keep(kept[group.id]) for group in groups]
    check_slots(model, chosen)
    return cut_by(model, chosen)


def zero_channels(model: nn.Module, removed: Iterable[tuple[Group, Tensor]]) -> None:
    """Zero channels in place, as removing them would: (group, channel numbers int64) pairs.

    The running variance is left alone, since 0 / sqrt(0 + eps) is 0 as well and 1 / 0 never arises.
    """
    tensors = tensors_of(model)
    with torch.no_grad():
        for group, channels in removed:
            for slot in group.slots:
                if slot.leaf != "running_var":
                    value = tensors[slot.tensor]
                    value.index_fill_(slot.dim, slot.indices(channels).to(value.device), 0)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by full name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def masked_by(model: nn.Module, groups: Iterable[PlanGroup]) -> nn.Module:
    copy = duplicate(model)
    zero_channels(copy, [(group, group.removed()) for group in groups])
    return copy


def cut_by(model: nn.Module, groups: Iterable[PlanGroup]) -> nn.Module:
    """A smaller copy, whatever it says of how it was cut."""
    small, groups = duplicate(model), list(groups)
    tensors = tensors_of(small)
    before = {name: tuple(value.shape) for name, value in tensors.items()}
    removed = removed_positions(groups)
    for name, dims in removed.items():
        value = tensors[name].data
        for dim, gone in dims.items():
            stays = torch.ones(value.shape[dim], dtype=torch.bool)
            stays[gone] = False
            value = value.index_select(dim, stays.nonzero().flatten().to(value.device))
        _replace(small, name, value)
    for layer in {name.rpartition(".")[0] for name in removed}:
        _sync_attributes(small.get_submodule(layer), before.get(f"{layer}.weight", ()))
    for group in groups:
        for name in group.counts:
            owner, _, leaf = name.rpartition(".")
            module = small.get_submodule(owner)
            setattr(module, leaf, getattr(module, leaf) * len(group.kept) // group.channels)
    return small


@torch.no_grad()
def _misfit(model: nn.Module) -> str:
    """Why a network cannot be run on a small image; empty where it can."""
    side = 64 + -64 % (own_attribute(model, "size_multiple", int) or 1)
    first = next(model.parameters(), torch.zeros(0))
    x = torch.zeros(1, input_channels(model), side, 2 * side, device=first.device)
    with evaluating(model):
        try:
            default_forward(model, x.to(first.dtype) if first.is_floating_point() else x)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, VssError) as error:
            return one_line(str(error), SHOWN) or type(error).__name__
    return ""


def removed_positions(groups: Iterable[PlanGroup]) -> dict[str, dict[int, Tensor]]:
    """Tensor name -> dim -> positions that go (int64)."""
    table: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        gone = group.removed()
        if len(gone):
            for slot in group.slots:
                table[slot.tensor][slot.dim].append(slot.indices(gone))
    return {name: {dim: torch.cat(parts) for dim, parts in dims.items()} for name, dims in table.items()}


def check_plan(model: nn.Module, plan: Plan, *, check_weights: bool) -> None:
    """Refuse a plan that names another network, other shapes or other weights."""
    name = name_of(model)
    if plan.model != name:
        raise VssError(f"the plan is for model {plan.model!r} and was given a {name!r}; make a plan for this one.")
    check_slots(model, plan.groups)
    if check_weights and sha256_tensors(model.state_dict()) != plan.weights_sha256:
        raise VssError(
            f"the plan was made for other weights of {name!r} (hash {plan.weights_sha256[:12]}); "
            "give the checkpoint it was made from, or make a new plan."
        )


def name_of(model: nn.Module) -> str:
    """The registered name of a network, or that of its class."""
    return own_attribute(model, "name", str) or type(model).__name__


def check_slots(model: nn.Module, groups: Sequence[PlanGroup]) -> None:
    """Refuse slots that the network does not have, and removals that leave a layer inconsistent."""
    tensors, modules = tensors_of(model), dict(model.named_modules())
    for group in groups:
        for slot in group.slots:
            value = tensors.get(slot.tensor)
            needed = slot.offset + group.channels * slot.block
            if value is None or not 0 <= slot.dim < value.ndim or value.shape[slot.dim] < needed:
                found = "none" if value is None else tuple(value.shape)
                tensor = one_line(slot.tensor, SHOWN)
                raise VssError(
                    f"the plan needs {needed} slices along dim {slot.dim} of {tensor} and found {found}; "
                    f"it was made for other options or for an uncut {name_of(model)!r}."
                )
        for name in group.counts:
            owner, _, leaf = name.rpartition(".")
            number = getattr(modules.get(owner), leaf, None)
            if type(number) is not int or number * len(group.kept) % group.channels:
                raise VssError(
                    f"the plan shrinks {one_line(name, SHOWN)} to {len(group.kept)} of {group.channels} and found "
                    f"{number!r}; it was made for other options or for an uncut {name_of(model)!r}."
                )
    _check_layers(model, removed_positions(groups))


def _check_layers(model: nn.Module, removed: dict[str, dict[int, Tensor]]) -> None:
    """Refuse a plan that removes a slice twice, or from one tensor of a layer and not from the others."""
    for name, dims in removed.items():
        for dim, gone in dims.items():
            if len(set(gone.tolist())) < len(gone):
                raise VssError(f"the plan removes slices of {name} along dim {dim} twice; make it again.")
    for layer in {name.rpartition(".")[0] for name in removed}:
        module: Any = model.get_submodule(layer)
        lines = isinstance(module, Conv) and module.transposed and module.groups == 1
        units = module.groups if isinstance(module, Conv) else getattr(module, "num_groups", 1)
        if units > 1:
            _check_units(layer, len(module.weight), units, removed.get(f"{layer}.weight".lstrip("."), {}))
        along = {"weight": int(lines), "bias": 0, "running_mean": 0, "running_var": 0}
        if not isinstance(module, SIZED):
            continue
        own = [name for name in along if getattr(module, name, None) is not None]
        gone_of = {name: removed.get(f"{layer}.{name}".lstrip("."), {}).get(along[name], NOTHING) for name in own}
        first = gone_of[own[0]].sort().values
        odd = next((name for name in own if not torch.equal(gone_of[name].sort().values, first)), None)
        if odd:
            raise VssError(
                f"the plan removes other channels from {layer}.{odd} than from {layer}.{own[0]}; it lacks slots of "
                "that layer: make it again."
            )


def _check_units(layer: str, channels: int, units: int, removed: dict[int, Tensor]) -> None:
    """A grouped convolution and a group norm lose whole groups."""
    counts = torch.bincount(removed.get(0, NOTHING) * units // channels, minlength=units)
    if set(removed) - {0} or not set(counts.tolist()) <= {0, channels // units}:
        raise VssError(f"the plan removes parts of the {units} groups of {layer}, which go whole: make it again.")


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    old = getattr(owner, leaf)
    if isinstance(old, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(value.contiguous(), requires_grad=old.requires_grad))
    else:
        owner.register_buffer(leaf, value.contiguous(), persistent=leaf not in owner._non_persistent_buffers_set)


def _sync_attributes(module: object, before: tuple[int, ...]) -> None:
    """Make a layer's size attributes say what its tensors now say."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, Conv):
        if module.groups > 1:  # whole groups leave: the filters of a group keep their size
            per_group = module.in_channels // module.groups
            module.groups = module.groups * weight.shape[0] // before[0]
            module.in_channels, module.out_channels = module.groups * per_group, weight.shape[0]
        elif module.transposed:
            module.in_channels, module.out_channels = weight.shape[:2]
        else:
            module.out_channels, module.in_channels = weight.shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        owner: Any = weight if weight is not None else module.running_mean
        module.num_features = owner.shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * weight.shape[0] // before[0]
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
    elif isinstance(module, nn.MultiheadAttention):
        NarrowAttention.of(module)


# `nn.MultiheadAttention` after a cut: torch's own takes the sizes of everything inside it from `embed_dim`.


class NarrowAttention(nn.MultiheadAttention):
    """What is left of an `nn.MultiheadAttention`: fewer heads, or heads of fewer channels, with its scale and names.

    Query and key have `num_heads` heads of as many channels as their weights have rows for; `head_dim` is that before
    the cut, of which the scale is made. Values may have another number. Arguments and results are those of torch's.
    """

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> None:
        """Turn a module into one, in place; one with an added key stays torch's, so that its cut does not run."""
        if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn:
            module.__class__ = cls
            module._qkv_same_embed_dim = False  # by which the fused layers of torch leave it alone

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention`; of `is_causal` the mask that comes with it is used."""
        batched, turned = query.ndim == 3, query.ndim == 3 and not self.batch_first
        given = [x.transpose(0, 1) if turned else x if batched else x[None] for x in (query, key, value)]
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, (weight, bias) in zip(given, self._projections(), strict=True)
        )
        mask = _added(attn_mask, key_padding_mask, q)
        scale, dropout = self.head_dim**-0.5, self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = q * scale @ k.transpose(-2, -1)
            weights = F.dropout((weights if mask is None else weights + mask).softmax(-1), dropout)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        return out.transpose(0, 1) if turned else out if batched else out[0], weights

    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """(weight, bias) of query, key and value."""
        wide = self.out_proj.weight.shape[1]
        if self.in_proj_weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            rows = (self.in_proj_weight.shape[0] - wide) // 2
            weights = list(self.in_proj_weight.split([rows, rows, wide]))
        biases: list[Tensor | None] = [None] * 3
        if self.in_proj_bias is not None:
            biases = list(self.in_proj_bias.split([len(weight) for weight in weights]))
        return list(zip(weights, biases, strict=True))


def _added(mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to products of q (N, heads, L, d): a mask (L, S) or (N heads, L, S), a padding (N, S) or (S,)."""
    batch, heads = q.shape[:2]
    found = None
    if mask is not None:
        found = _numbers(mask, q)
        found = found.unflatten(0, (batch, heads)) if found.ndim == 3 else found
    if padding is not None:
        own = _numbers(padding, q).view(batch, 1, 1, -1)
        found = own if found is None else found + own
    return found


def _numbers(mask: Tensor, q: Tensor) -> Tensor:
    """-inf where a mask of bool is true."""
    if mask.dtype is not torch.bool:
        return mask.to(q.dtype)
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, float("-inf"))
