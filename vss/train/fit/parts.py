"""What a fit is given: data, task, and what a method adds to each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vss.core.config import FinetuneConfig, FitConfig
from vss.train.learner import Learner

Loader = Callable[[int, int], DataLoader[Any]]  # (rank, world size) -> this process's loader


@dataclass(frozen=True, kw_only=True)
class FitData:
    """What `fit` needs to know of the data and the task.

    Attributes:
        train, val: (rank, world) -> loader of {"image": uint8 (N,3,H,W), "mask": int64 (N,H,W), ...}, what `learner`
            reads.
        normalise: uint8 images -> what the network takes.
        learner: loss and validation score.
        about: JSON that stands for the data and the task: hashes of the splits, settings. A fit in a folder goes on
            only where it is the same.
    """

    train: Loader
    val: Loader
    normalise: Callable[[Tensor], Tensor]
    learner: Learner
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What a `Phase` sees of one training step.

    Attributes:
        model: the network.
        images: (N, 3, H, W) float, normalised.
        batch: what the loader gave, on the device.
        outputs: {head: logits} of this step's forward, detached.
        learner: of the task.
        loss: outputs -> scalar task loss of this batch over all heads.
        step, steps: optimiser steps before this one, and of the whole fit.
        scale: factor on the gradients (that of mixed float16 precision, else 1).
        autocast: context in which a forward has the fit's precision.
    """

    model: Any
    images: Tensor
    batch: dict[str, Tensor]
    outputs: dict[str, Tensor]
    learner: Learner
    loss: Callable[[dict[str, Tensor]], Tensor]
    step: int
    steps: int
    scale: float
    autocast: Callable[[], AbstractContextManager[Any]]


class Phase:
    """What a method adds to plain training; this one adds nothing.

    A fit with a phase ends with its last weights: the best validation epoch would be one in which the method has not
    done its work yet. All that changes during the fit is in `state_dict`, so that a killed run resumes bit for bit;
    random numbers are functions of the step.
    """

    def after_backward(self, moment: Moment) -> None:
        """Add to the gradients, which are there and synchronised between processes."""

    def after_step(self, moment: Moment) -> None:
        """After the optimiser's step, on the same batch."""

    def about(self) -> dict[str, Any]:
        """The settings, as JSON: a fit goes on only where they are the same."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and dictionaries of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""


def section_of(config: FitConfig) -> str:
    """The section of the recipe whose keys a sentence names."""
    return "finetune" if isinstance(config, FinetuneConfig) else "train"


def precision_of(config: FitConfig) -> Any:
    """Lightning's name of the precision; "auto" is bf16-mixed where the device computes in bfloat16 natively."""
    if config.precision != "auto":
        return config.precision
    if torch.cuda.is_available() and config.accelerator != "cpu":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"
