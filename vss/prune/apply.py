"""Cut a network by a plan, or mask it: pure tensor slicing, no tracing, no data, no criterion."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vss.core.closeness import duplicate
from vss.core.errors import SHOWN, VssError, one_line
from vss.core.files import sha256_tensors
from vss.prune.plan import Plan

NOTHING = torch.zeros(0, dtype=torch.int64)
SIZED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm)
"""Layers whose weight, bias and statistics have one size in common."""


def apply_plan(model: nn.Module, plan: Plan, *, check_weights: bool = True) -> nn.Module:
    """Return a smaller copy of `model`; the original is untouched. The copy's `plans` says how it was cut.

    Args:
        model: the network that the plan was made for.
        plan: what to keep.
        check_weights: refuse a model whose weights are not those of the plan, and a plan that leaves a network which
            cannot be run. Off where only the shapes matter, as in rebuilding a checkpoint before its weights are loaded
            and held against them.

    Raises:
        VssError: a plan of another network or of other weights.
    """
    check_plan(model, plan, check_weights=check_weights)
    small: Any = duplicate(model)
    tensors = _tensors(small)
    sizes_before = {name: tuple(value.shape) for name, value in tensors.items()}
    for name, dims in removed_positions(plan).items():
        value = tensors[name].data
        for dim, gone in dims.items():
            stay = torch.ones(value.shape[dim], dtype=torch.bool)
            stay[gone] = False
            value = value.index_select(dim, stay.nonzero().flatten().to(value.device))
        _replace(small, name, value)
    touched = {name.rpartition(".")[0] for name in removed_positions(plan)}
    for name in touched:
        _sync_attributes(small.get_submodule(name), sizes_before.get(f"{name}.weight", ()))
    small.plans = (*getattr(model, "plans", ()), plan)
    misfit = _misfit(small) if check_weights else ""
    if misfit and not _misfit(model):
        raise VssError(
            f"the network that the plan leaves cannot be run ({misfit}); the plan lacks slots of layers that take what "
            "it removes: make it again."
        )
    return small


@torch.no_grad()
def _misfit(model: nn.Module) -> str:
    """Why a network cannot be run on a small image; empty where it can."""
    side = 64 + -64 % int(getattr(model, "size_multiple", 1))
    first = next(model.parameters(), NOTHING)
    kind: dict[str, Any] = {
        "device": first.device,
        "dtype": first.dtype if first.is_floating_point() else torch.float32,
    }
    training = {module: module.training for module in model.modules()}
    try:
        default_forward(model.eval(), torch.zeros(1, 3, side, 2 * side, **kind))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, VssError) as error:
        return one_line(str(error), SHOWN) or type(error).__name__
    finally:
        for module, flag in training.items():
            module.training = flag
    return ""


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of the same shape in which every removed slice is zero; it computes what `apply_plan`'s net does.

    The running variance is left alone, since 0/sqrt(0 + eps) is 0 as well and 1/0 never arises.
    """
    check_plan(model, plan, check_weights=False)
    model = duplicate(model)
    tensors = _tensors(model)
    with torch.no_grad():
        for name, dims in removed_positions(plan).items():
            if name.endswith("running_var"):
                continue
            for dim, gone in dims.items():
                tensors[name].index_fill_(dim, gone.to(tensors[name].device), 0)
    return model


def removed_positions(plan: Plan) -> dict[str, dict[int, Tensor]]:
    """Tensor name -> dim -> positions that go (int64), from all groups of the plan."""
    table: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for group in plan.groups:
        gone = group.removed()
        if len(gone):
            for slot in group.slots:
                table[slot.tensor][slot.dim].append(slot.slot().indices(gone))
    return {name: {dim: torch.cat(parts) for dim, parts in dims.items()} for name, dims in table.items()}


def check_plan(model: nn.Module, plan: Plan, *, check_weights: bool) -> None:
    """Refuse a plan that names another network, other shapes or other weights."""
    name = getattr(model, "name", "") or type(model).__name__
    if plan.model != name:
        raise VssError(f"the plan is for model {plan.model!r} and was given a {name!r}; make a plan for this one.")
    tensors = _tensors(model)
    for group in plan.groups:
        for slot in group.slots:
            value = tensors.get(slot.tensor)
            needed = slot.offset + group.channels * slot.block
            if value is None or not 0 <= slot.dim < value.ndim or value.shape[slot.dim] < needed:
                found = "none" if value is None else tuple(value.shape)
                tensor = one_line(slot.tensor, SHOWN)
                raise VssError(
                    f"the plan needs {needed} slices along dim {slot.dim} of {tensor} and found {found}; "
                    f"it was made for other options or for an uncut {name!r}."
                )
    _check_layers(model, removed_positions(plan))
    if check_weights and sha256_tensors(model.state_dict()) != plan.weights_sha256:
        raise VssError(
            f"the plan was made for other weights of {name!r} (hash {plan.weights_sha256[:12]}); "
            "give the checkpoint it was made from, or make a new plan."
        )


def _check_layers(model: nn.Module, removed: dict[str, dict[int, Tensor]]) -> None:
    """Refuse a plan that removes a slice twice, or from one tensor of a layer and not from the others."""
    for name, dims in removed.items():
        for dim, gone in dims.items():
            if len(gone.unique()) < len(gone):
                raise VssError(f"the plan removes slices of {name} along dim {dim} twice; make it again.")
    for layer in {name.rpartition(".")[0] for name in removed}:
        module: Any = model.get_submodule(layer)
        lines = isinstance(module, nn.modules.conv._ConvNd) and module.transposed and module.groups == 1
        units = module.groups if isinstance(module, nn.modules.conv._ConvNd) else getattr(module, "num_groups", 1)
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


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    old = getattr(owner, leaf)
    if isinstance(old, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(value.contiguous(), requires_grad=old.requires_grad))
    else:
        owner.register_buffer(leaf, value.contiguous(), persistent=leaf not in owner._non_persistent_buffers_set)


def _sync_attributes(module: Any, before: tuple[int, ...]) -> None:
    """Make a layer's size attributes say what its tensors now say."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
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


@torch.no_grad()
def recalibrate_bn(
    model: nn.Module, batches: Iterable[Tensor], *, forward: Callable[[nn.Module, Tensor], Any] | None = None
) -> int:
    """Recompute batch-norm running statistics as the plain average over `batches` of (N, 3, H, W); forward only.

    Removing channels changes what later layers see; this is done before any accuracy without fine-tuning is reported.
    A batch norm on 1x1 maps needs N > 1. Returns the number of batches seen.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    training = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    count = 0
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
        for module, flag in training.items():
            module.training = flag
    if not count:
        raise VssError("batch norms were to be recalibrated on no batches; give at least one.")
    return count


@torch.no_grad()
def norm_of_single_values(model: nn.Module, example: Tensor) -> str:
    """The first batch norm that sees one value of a channel in an image, whose statistics need two images; "" if none.

    Args:
        model: all heads are looked at.
        example: (1, 3, H, W).
    """
    found: list[str] = []
    training = {module: module.training for module in model.modules()}

    def watch(name: str) -> Callable[..., None]:
        return lambda _, inputs: found.append(name if inputs[0][0, 0].numel() == 1 else "")

    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in norms]
    try:
        default_forward(model.eval(), example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training.items():
            module.training = flag
    return next(filter(None, found), "")


def refuse_single_images(model: nn.Module, example: Tensor) -> None:
    """Calibration images come one at a time: refuse a network with a batch norm that needs two."""
    name = norm_of_single_values(model, example)
    if name:
        raise VssError(
            f"calibration images come one at a time and batch norm {name!r} sees one position of each; set "
            "prune.batch_size to 2 or more (with as many training images), or prune.recalibrate to 0."
        )


def default_forward(model: Any, x: Tensor) -> Any:
    """Call `forward_train` where the network has one (auxiliary heads included), else the network."""
    call: Any = getattr(model, "forward_train", model)
    return call(x)
