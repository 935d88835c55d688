"""What can be refused before the first step: settings that Lightning does not take, batches a norm cannot take."""

from __future__ import annotations

import functools
import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from vss.core.config import FitConfig
from vss.core.errors import VssError, one_line, shown
from vss.train.fit.parts import precision_of, section_of

REFUSED = (MisconfigurationException, ValueError, TypeError, KeyError, RuntimeError, ImportError, AssertionError)
"""What Lightning raises for a value that it does not take."""
DEFAULTS: dict[str, Any] = {"accelerator": "auto", "devices": "auto", "strategy": "auto", "precision": "32-true"}


def check_settings(config: FitConfig) -> None:
    """Refuse a schedule or a device that cannot work; needs neither network nor data."""
    section = section_of(config)
    if config.epochs < 1:
        raise VssError(f"{section}.epochs is {config.epochs}, which trains nothing; give 1 or more.")
    if config.val_every > config.epochs:
        raise VssError(
            f"{section}.val_every is {config.val_every} and {section}.epochs {config.epochs}: no epoch but the last "
            f"would be validated; let {section}.val_every be at most {config.epochs}."
        )
    trainer(config, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


def trainer(config: FitConfig, **settings: Any) -> L.Trainer:
    """Lightning's trainer on the devices of `config`; what it refuses is one sentence with the key."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    given: dict[str, Any] = {"accelerator": config.accelerator, "devices": config.devices, "strategy": config.strategy}
    given["precision"] = precision_of(config)
    try:
        return L.Trainer(num_nodes=config.num_nodes, **given, **settings)
    except REFUSED as error:
        section = section_of(config)
        wrong = [key for key in given if _refuses(**{key: given[key]})] or list(given)
        values = ", ".join(f"{section}.{key} {shown(given[key])}" for key in wrong)
        raise VssError(f"{values} cannot be used here: {one_line(str(error)).rstrip('.')}.") from error


def _refuses(**one: Any) -> bool:
    """Whether one setting is refused with all others at their defaults."""
    try:
        L.Trainer(**DEFAULTS | one, logger=False, enable_checkpointing=False)
    except REFUSED:
        return True
    return False


def check_norms(model: Any, image: Tensor, config: FitConfig) -> None:
    """Refuse a batch in which a norm layer would see one value a channel, which has no variance.

    Args:
        model: with `forward_train`; stays as it is.
        image: (1, 3, H, W) float, of the size that is trained on.
        config: for the batch size.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _NormBase)}
    if config.batch_size > 1 and all(isinstance(module, _BatchNorm) for module in norms.values()):
        return
    handles = [
        module.register_forward_pre_hook(
            functools.partial(_refuse_one_value, config, (image.shape[-2], image.shape[-1]), name)
        )
        for name, module in norms.items()
    ]
    mode = model.training
    try:
        with torch.no_grad():
            model.eval().forward_train(image.to(next(model.parameters()).device))
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()


def _refuse_one_value(config: FitConfig, size: tuple[int, int], name: str, module: nn.Module, given: Any) -> None:
    section, single = section_of(config), given[0][0, 0].numel() == 1
    if single and not isinstance(module, _BatchNorm):
        raise VssError(
            f"{name} normalises each map by itself and sees maps of 1x1 at {size[0]}x{size[1]}; enlarge data.size."
        )
    if single and config.batch_size == 1:
        raise VssError(
            f"the batch norm {name} sees maps of 1x1, and {section}.batch_size is 1: one value a channel has no "
            f"variance; set {section}.batch_size (--batch-size) to 2 or more."
        )
