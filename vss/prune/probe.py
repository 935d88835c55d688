"""Hold cut networks against masked ones: cuts that are tried before anyone relies on them, and the proof of one.

Following operations cannot see everything: a size that is written into the code, a custom function, a scale that counts
channels. So a cut is made and compared with the network in which the same channels are zero; where the two differ, or
the cut network does not run, the channels are no set of removable slices.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from vss.core.closeness import AGREEMENT, alike, doubled_outputs, duplicate, label_agreement, proven_difference
from vss.core.errors import SHOWN, VssError, one_line
from vss.core.example import (
    Example,
    Forward,
    at_size,
    default_forward,
    drawn,
    image_of,
    input_channels,
    inputs_of,
    logits_of,
    on,
    own_attribute,
    paired,
)
from vss.core.networks import eager
from vss.prune.apply import TOLERANCE, check_slots, cut_by, masked, masked_by
from vss.prune.plan import Group, Plan, PlanGroup

LOG = logging.getLogger(__name__)
MOST_COUNTS = 3  # of one group
IMAGE_RANGE, ASLEEP = 128.0, 1e-3
TALLER = (32, 64)  # by so many rows the second size is larger: the first of these that the network takes
EVERY_S = 10.0  # between two lines of progress
DIFFERS = "removing its channels is not the same as zeroing them: the network reorders or mixes them"
SIZED = "which of its channels belong together depends on the size of the image"
TIME = "the time for planning was used up before it was tried; give more by time_limit_s"
Figures = tuple[float, float, float]
"""Largest absolute and relative difference, and the share of equal labels."""


class Probe:
    """Cuts of one network, tried on the example, on noise, and on noise of the range of images and of another size.

    The network's parameters that are all zero or next to it (a layer scale, a gain that training begins at zero) are
    drawn anew, since they hide what is behind them. Where the network runs in training mode, so must the cut one.

    Args:
        model: copied.
        example: what it takes.
        forward: how to call it.
        time_limit_s: seconds from now, and again from `begin`; what was not tried by then is refused.
    """

    def __init__(self, model: nn.Module, example: Example, forward: Forward | None, time_limit_s: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model, self.limit = duplicate(model).cpu().eval(), time_limit_s
        self.begin()
        self.forward, example = forward or default_forward, on(example, "cpu")
        _wake(self.model, generator)
        noise = drawn(example, generator)
        self.images: list[Example] = [noise]
        if image_of(example).is_floating_point():
            loud = (_loud(each) for each in (*_taller(example), example))
            self.images += [first] if (first := next(filter(self.takes, loud), None)) is not None else []
            varied = any(bool((value != value.reshape(-1)[0]).any()) for value in inputs_of(example) if value.numel())
            self.images += [example] if varied and self.takes(example) else []
        self.pair = paired(noise)
        self.trains = self._trains(self.model) == ""

    def begin(self) -> None:
        """The time for trying starts now."""
        self.spoke = time.monotonic()
        self.deadline = self.spoke + self.limit

    @torch.no_grad()
    def outputs(self, net: nn.Module, x: Example) -> list[Tensor]:
        """The floating-point outputs, all heads."""
        return logits_of(self.forward(net, x))

    def takes(self, x: Example) -> bool:
        """Whether the network runs on it and gives finite values."""
        try:
            return all(bool(torch.isfinite(value).all()) for value in self.outputs(self.model, x))
        except Exception:  # whatever the forward of a foreign network raises
            return False

    def faults(self, chosen: Sequence[PlanGroup]) -> dict[str, str]:
        """Group id -> why it cannot be cut so; empty where all can. Halves until the culprits are found."""
        found = self._search(list(chosen))
        while (left := [group for group in chosen if group.id not in found]) and found:
            more = self._search(left)
            if not more:
                break
            found |= more
        return found

    def _search(self, chosen: list[PlanGroup]) -> dict[str, str]:
        if not chosen:
            return {}
        if time.monotonic() > self.deadline:
            return {group.id: TIME for group in chosen}
        fault = self.fault(chosen)
        if fault is None:
            return {}
        if len(chosen) == 1:
            return {chosen[0].id: fault}
        middle = len(chosen) // 2
        found = self._search(chosen[:middle]) | self._search(chosen[middle:])
        if found:
            return found
        good = chosen[:middle]
        for group in chosen[middle:]:  # each half can be cut, and both together cannot
            fault = TIME if time.monotonic() > self.deadline else self.fault([*good, group])
            if fault is None:
                good.append(group)
            else:
                found[group.id] = f"{fault}, together with {good[-1].id}"
        return found

    @torch.no_grad()
    def fault(self, chosen: Iterable[PlanGroup]) -> str | None:
        """Why these cuts cannot be made together; None where they can."""
        chosen = [group for group in chosen if len(group.kept) < group.channels]
        self._speak(len(chosen))
        try:
            check_slots(self.model, chosen)
            small = cut_by(self.model, chosen)
            self.outputs(small, self.images[0])
        except Exception as error:  # whatever the forward of a foreign network raises is the reason
            return f"the network does not run without some of its channels ({short(error)})"
        mask = masked_by(self.model, chosen)
        if not all(torch.isfinite(value).all() for value in self.outputs(mask, self.images[0])):
            raise VssError("the network gives NaN or infinite outputs on a random image; check its weights.")
        try:
            differs = next((x for x in self.images if not alike(mask, small, x, self.outputs, TOLERANCE)), None)
        except Exception as error:
            return f"the network does not run in float64, or at another size, without some channels ({short(error)})"
        if differs is not None:
            return SIZED if self._by_size(mask, small, differs) else DIFFERS
        wrong = self._trains(small) if self.trains else ""
        return f"the network does not train without some of its channels ({wrong})" if wrong else None

    def _by_size(self, mask: nn.Module, small: nn.Module, x: Example) -> bool:
        """Whether two networks that differ on `x` do so for its size alone."""
        noise = self.images[0]
        other = image_of(x).shape != image_of(noise).shape
        return other and alike(mask, small, _loud(noise), self.outputs, TOLERANCE)

    def counted(self, group: Group) -> Group | None:
        """The group with the whole numbers, such as `num_heads`, that have to shrink with it; None where none help."""
        names = sorted(counts_of(self.model, group))
        for size in range(1, min(len(names), MOST_COUNTS) + 1):
            for some in combinations(names, size):
                tried = dataclasses.replace(group, counts=some)
                if not any(self.fault([part(tried)]) for part in (most_of, half_of)):
                    return tried
        return None

    @torch.no_grad()
    def _trains(self, net: nn.Module) -> str:
        """Why a network does not run in training mode; "" where it does."""
        try:
            self.outputs(duplicate(net).train(), self.pair)
        except Exception as error:
            return short(error)
        return ""

    def _speak(self, count: int) -> None:
        if time.monotonic() - self.spoke > EVERY_S:
            self.spoke = time.monotonic()
            LOG.info("planning: a cut of %d groups is tried, %.0f s are left", count, self.deadline - self.spoke)


def _loud(example: Example) -> Example:
    """Noise of the range of images."""
    return drawn(example, torch.Generator().manual_seed(0), IMAGE_RANGE)


def _taller(example: Example) -> Iterator[Example]:
    """The example at other sizes, without values."""
    image = image_of(example)
    if image.ndim > 2:
        height, width = image.shape[-2:]
        yield from (at_size(example, (height + more, width), len(image)) for more in TALLER)


def short(error: Exception) -> str:
    """The first line of what an error says, else its class."""
    return one_line(str(error).splitlines()[0] if str(error) else "", SHOWN) or type(error).__name__


@torch.no_grad()
def _wake(model: nn.Module, generator: torch.Generator) -> None:
    """Draw the parameters that are all zero or next to it."""
    for value in model.parameters():
        if value.is_floating_point() and value.numel() and float(value.abs().max()) < ASLEEP:
            spread = (value[0].numel() if value.ndim > 1 else 4) ** -0.5
            value.copy_(spread * torch.randn(value.shape, generator=generator))


def counts_of(model: nn.Module, group: Group) -> dict[str, int]:
    """Whole numbers of the modules that own a group's layers which may say how many channels it has, or units, or rows.

    Numbers of the modules that hold the layers, where any cut of whole units leaves a whole number.
    """
    units = group.channels // group.unit
    rows: dict[tuple[str, int], int] = defaultdict(int)
    for slot in group.slots:
        rows[slot.tensor, slot.dim] += group.channels * slot.block
    values = {units, group.channels, *(group.channels * slot.block for slot in group.slots), *rows.values()}
    layers = group.module_names("producer")
    owners = {(name.rpartition(".")[0], "") for name in layers}
    owners |= {(name, "num_heads") for name in layers if isinstance(model.get_submodule(name), nn.MultiheadAttention)}
    found = {}
    for owner, only in sorted(owners):
        for leaf, value in vars(model.get_submodule(owner)).items():
            if only not in ("", leaf):
                continue
            if type(value) is int and value > 1 and value in values and not value % units:
                found[f"{owner}.{leaf}".lstrip(".")] = value
    return found


def half_of(group: Group) -> PlanGroup:
    """Half of the units at random; no prefix, which a reordering could leave in place.

    Every group draws its own half, so that two groups which belong together are seen to differ.
    """
    units = group.channels // group.unit
    return _some(group, units // 2)


def most_of(group: Group) -> PlanGroup:
    """All units but one, which shows a width that must be a multiple of something."""
    return _some(group, group.channels // group.unit - 1)


def _some(group: Group, count: int) -> PlanGroup:
    generator = torch.Generator().manual_seed(zlib.crc32(group.id.encode()))
    chosen = torch.randperm(group.channels // group.unit, generator=generator)[: max(1, count)].sort().values
    return group.keep((chosen[:, None] * group.unit + torch.arange(group.unit)).reshape(-1))


# The proof of one cut, forward and backward.


@eager
def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    sizes: Iterable[tuple[int, int]] = (),
    *,
    example: Example | None = None,
    forward: Forward | None = None,
) -> dict[str, Any]:
    """Prove a cut: masked network == sliced network, same heads, forward and backward at every size (H, W).

    `small` is what `apply_plan(model, plan)` returned, before any training. A difference beyond the limit is looked at
    again in float64: rounding, which grows in deep networks and moves the indices of pooled maxima, vanishes there; a
    wrong cut does not.

    Args:
        model, small, plan: the network, what was cut from it, and how.
        sizes: (H, W) of the random images; none: those of `example`, and its own values as well.
        example: what the network takes (a tensor, a tuple of arguments, a dict of keywords); default: images with the
            channels of its first convolution.
        forward: how to call the network; default `forward_train` where there is one.

    Returns:
        Figures for the report: `masked_max_abs`, `masked_max_rel` (relative to the spread of the outputs, see
        `vss.core.closeness`), `label_agreement` (share of places with the same largest channel, ties apart), `sizes`,
        `outputs`, `precision` (of the comparison: "float32", or "float64" where it was needed).

    Raises:
        VssError: a relative difference above 1e-4, other labels, an output of another shape or a missing gradient.
    """
    mask, small, forward = masked(model, plan).eval(), small.eval(), forward or default_forward
    images = _images(small, list(sizes), example)
    found, shapes, precision = [], [], "float32"
    for x in images:
        with torch.no_grad():
            figures, outputs = _difference(logits_of(forward(mask, x)), logits_of(forward(small, x)))
        _check_backward(small, mask, x, forward)
        found.append(figures)
        shapes.append(outputs)
    worst = _worst(found)
    if worst[1] > TOLERANCE or worst[2] < AGREEMENT:
        exact = [[doubled_outputs(net, x, lambda n, v: logits_of(forward(n, v))) for net in (mask, small)]
                 for x in images]  # fmt: skip
        worst, precision = _worst([_difference(*pair)[0] for pair in exact]), "float64"
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
        "sizes": [list(image_of(x).shape[-2:]) for x in images],
        "outputs": shapes,
        "precision": precision,
    }


def _images(small: nn.Module, sizes: list[tuple[int, int]], example: Example | None) -> list[Example]:
    """Two random images of every size; without sizes the example itself, and random values in its place."""
    generator, device = torch.Generator().manual_seed(0), next(small.parameters()).device
    if example is None and not sizes:
        raise VssError("there is nothing to verify on; give sizes=[(H, W), ...] or example=.")
    if example is None:
        example = torch.zeros(1, input_channels(small), 1, 1)
    images = [drawn(at_size(example, size, 2), generator) for size in sizes] or [example, drawn(example, generator)]
    return [on(image, device) for image in images]


def _worst(found: list[Figures]) -> Figures:
    return max(f[0] for f in found), max(f[1] for f in found), min(f[2] for f in found)


def _difference(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> tuple[Figures, list[list[int]]]:
    """Largest absolute and relative difference of all outputs on one batch, their agreement, and their shapes."""
    if [t.shape for t in wanted] != [t.shape for t in got]:
        raise VssError(f"the cut network's outputs have shapes {[tuple(t.shape) for t in got]}; the heads changed.")
    found: list[Figures] = []
    for a, b in zip(wanted, got, strict=True):
        a, b = a.detach(), b.detach()
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise VssError("the cut network gives NaN or infinite outputs; check the checkpoint's weights.")
        found.append((float((a - b).abs().max()), proven_difference(a, b), label_agreement(a, b)))
    return _worst(found), [list(t.shape) for t in got]


def _check_backward(small: nn.Module, mask: nn.Module, x: Example, forward: Forward) -> None:
    """Every parameter of the cut network gets a finite gradient; one that the uncut network never uses need not."""
    grads = _gradients(small, x, forward)
    unused = [name for name, grad in grads.items() if grad is None]
    before = _gradients(mask, x, forward) if unused else {}
    for name, grad in grads.items():
        if (grad is None and before[name] is not None) or (grad is not None and not torch.isfinite(grad).all()):
            raise VssError(f"the cut network gives no finite gradient for {name}.")


def _gradients(model: nn.Module, x: Example, forward: Forward) -> dict[str, Tensor | None]:
    """Gradients of the sum of the outputs' mean squares in the mode that the model is in; `.grad` is left alone."""
    names = [name for name, _ in model.named_parameters()]
    with torch.enable_grad():
        flags = [p.requires_grad for p in model.parameters()]
        model.requires_grad_(True)
        total = torch.stack([out.square().mean() for out in logits_of(forward(model, x))]).sum()
        grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        for buffer in model.buffers():  # one that the forward computes anew holds on to its graph
            if buffer.grad_fn is not None:
                buffer.detach_()
    return dict(zip(names, grads, strict=True))


def two_sizes(size: tuple[int, int], model: nn.Module) -> list[tuple[int, int]]:
    """Two small, differently shaped sizes that the network takes; proofs do not need large images."""
    step = max(own_attribute(model, "least_side", int) or 32, own_attribute(model, "size_multiple", int) or 1)
    small = [max(step, side // 2 // step * step) for side in size]
    return [(small[0] + step, small[1]), (small[0], small[1] + step)]
