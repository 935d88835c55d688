"""Images, labels and heads of a calibration batch.

A batch is `(images, labels, ...)`, a mapping with `image` and `mask`, or the images alone; images are what the network
takes: (N, 3, H, W) float, normalised. Labels are (N, H, W) integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vss.core.errors import VssError

Batch = Any


def images_of(batch: Batch, model: nn.Module) -> Tensor:
    """The images of a batch, on the network's device."""
    value: Any = batch
    if isinstance(batch, Mapping):
        value = batch.get("image", batch.get("images"))
    elif isinstance(batch, Sequence) and len(batch):
        value = batch[0]
    if not isinstance(value, Tensor):
        raise VssError(
            f"a calibration batch must be images, (images, labels) or a mapping with 'image' and 'mask', got "
            f"{type(batch).__name__}."
        )
    device = next((p.device for p in model.parameters()), value.device)
    return value.to(device)


def labels_of(batch: Batch) -> Tensor | None:
    """(N, H, W) labels of a batch, or None where it has none."""
    value: Any = None
    if isinstance(batch, Mapping):
        value = batch.get("mask", batch.get("labels"))
    elif isinstance(batch, Sequence) and len(batch) > 1:
        value = batch[1]
    if not isinstance(value, Tensor):
        return None
    return value[:, 0] if value.ndim == 4 and value.shape[1] == 1 else value


def require_labels(batch: Batch, what: str) -> Tensor:
    """The labels of a batch, or one sentence that names who asks."""
    labels = labels_of(batch)
    if labels is None:
        raise VssError(f"{what} needs labels, and the calibration batches have none; give (images, labels).")
    return labels


def heads_of(outputs: Any) -> list[Tensor]:
    """The heads of a network as (N, K, h, w), the main one first: `out` of a mapping, else the first with positions."""
    if isinstance(outputs, Tensor):
        heads = [outputs]
    elif isinstance(outputs, Mapping):
        named = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
        heads = [named[name] for name in sorted(named, key=lambda name: (name != "out", named[name].ndim != 4))]
    else:
        heads = [value for value in outputs if isinstance(value, Tensor)]
        heads.sort(key=lambda value: value.ndim != 4)
    heads = [head[:, :, None, None] if head.ndim == 2 else head for head in heads]
    classes = {head.shape[1] for head in heads if head.ndim == 4}
    if not heads or len(classes) != 1 or any(head.ndim != 4 for head in heads):
        shapes = [tuple(head.shape) for head in heads]
        raise VssError(f"a criterion that looks at classes needs heads of (N, K, h, w) with one K, got {shapes}.")
    return heads
