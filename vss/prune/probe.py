"""Try every group on the network itself before anyone relies on it.

A dependency graph follows operations by type and cannot see what a reshape, an index, a softmax or a buffer does to the
channels that pass through (a channel shuffle is traced as the identity). So each group is cut once and compared with
the network in which the same channels are zero; where the two differ, the group is no set of removable slices.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vss.core.closeness import alike
from vss.core.errors import VssError
from vss.prune.apply import apply_plan, masked
from vss.prune.plan import Group, Plan, plan_group

IMAGE_RANGE, ASLEEP = 128.0, 1e-3
TOLERANCE = 1e-4  # relative to the spread of an output, as in `vss.prune.verify`
Outputs = Callable[[nn.Module, Tensor], list[Tensor]]


def unsound(model: nn.Module, example: Tensor, groups: list[Group], outputs: Outputs) -> dict[str, str]:
    """Group id -> why its slices cannot be removed; empty where all can.

    All groups are cut at once, which costs two forward passes; one by one only when that fails.

    Args:
        model: in evaluation mode. Its parameters that are all zero or next to it (a layer scale, a gain that training
            begins at zero) are drawn anew, since they hide what is behind them.
        example: (N, 3, H, W); only its shape and dtype matter, the values are drawn: of unit variance, and of the
            range of images, where a layer may act that does nothing near zero.
        groups: what to try.
        outputs: the output tensors of a forward pass.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(example.shape, generator=generator).to(example.dtype) if example.is_floating_point() else example
    _wake(model, generator)
    if _fault(model, x, groups, outputs) is None:
        return {}
    faults = {group.id: fault for group in groups if (fault := _fault(model, x, [group], outputs)) is not None}
    together = _fault(model, x, [group for group in groups if group.id not in faults], outputs)
    if together is not None:
        raise VssError(f"the groups of this network can be cut one by one but not together: {together}.")
    return faults


@torch.no_grad()
def _fault(model: nn.Module, x: Tensor, groups: list[Group], outputs: Outputs) -> str | None:
    plan = Plan(
        model=getattr(model, "name", "") or type(model).__name__,
        weights_sha256="",
        criterion="probe",
        budget={},
        groups=tuple(plan_group(group, _half(group)) for group in groups if group.channels > group.unit),
    )
    try:
        small, mask = apply_plan(model, plan, check_weights=False), masked(model, plan)
        outputs(small, x)
    except (VssError, RuntimeError, IndexError) as error:
        return f"the network does not run without some of its channels ({str(error).splitlines()[0]})"
    if not all(torch.isfinite(value).all() for value in outputs(mask, x)):
        raise VssError("the network gives NaN or infinite outputs on a random image; check its weights.")
    images = [x, IMAGE_RANGE * x] if x.is_floating_point() else [x]
    if not all(torch.isfinite(value).all() for value in outputs(mask, images[-1])):
        images = images[:1]  # values of that size are none that this network can take
    if all(alike(mask, small, image, outputs, TOLERANCE) for image in images):
        return None
    return "removing its channels is not the same as zeroing them: the network reorders or mixes them"


@torch.no_grad()
def _wake(model: nn.Module, generator: torch.Generator) -> None:
    """Draw the parameters that are all zero or next to it."""
    for value in model.parameters():
        if value.is_floating_point() and value.numel() and float(value.abs().max()) < ASLEEP:
            spread = (value[0].numel() if value.ndim > 1 else 4) ** -0.5
            value.copy_(spread * torch.randn(value.shape, generator=generator))


def _half(group: Group) -> Tensor:
    """Half of the units at random, ascending; no prefix, which a reordering could leave in place.

    Every group draws its own half, so that two groups which belong together are seen to differ.
    """
    units = group.channels // group.unit
    generator = torch.Generator().manual_seed(zlib.crc32(group.id.encode()))
    chosen = torch.randperm(units, generator=generator)[: max(1, units // 2)].sort().values
    return (chosen[:, None] * group.unit + torch.arange(group.unit)).reshape(-1)
