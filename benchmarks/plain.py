"""The other side of every benchmark: the same result in plain torch, as published procedures and users write it."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def seg_argmax(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners).argmax(1)


PLAIN: dict[str, Callable[..., object]] = {"seg_argmax": seg_argmax}
