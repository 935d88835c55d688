"""The network of a recipe: built anew, from weights of others, or from a checkpoint, under a name or by a factory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vss import models
from vss.core.config import ModelConfig
from vss.core.errors import VssError, one_line
from vss.core.networks import repeated
from vss.models.weights import head_of
from vss.train import checkpoint
from vss.train.checkpoint import Checkpoint, matching
from vss.train.header import header

GUESS = 7
"""Classes of a network that is built to see which of its tensors depend on their number."""


def read(path: Path | str, config: ModelConfig, *, classes: int | None = None, seed: int = 0) -> Checkpoint:
    """A checkpoint, loaded into what the factory of `config` builds unless it is of a registered network.

    `classes`: their number, where it is known and the file does not say it; with `config.replace_head` that of the
    network in place of the file's, whose new head is drawn by `seed`.
    """
    saved = header(path)
    foreign = config.factory and (saved.model == config.factory or saved.model not in models.MODELS)
    if not foreign and not config.replace_head:
        return checkpoint.read(path)
    torch.manual_seed(seed)
    count = classes if config.replace_head else saved.num_classes or len(saved.classes) or classes
    if foreign:
        model = _made(path, str(config.factory), config.options, count)
    else:
        model = models.build(saved.model, count or 0, **saved.options)
    return checkpoint.read(path, model=model, replace_head=config.replace_head)


def _made(path: Path | str, name: str, options: dict[str, Any], count: int | None) -> Any:
    """What a factory builds for a checkpoint; where nobody says the number of classes, its tensors do."""
    entry: Any = models.MODELS[name]
    if count is None and entry.counts(options):
        trial = entry.build(GUESS, options)
        found = checkpoint.uncut_shapes(path)
        rename = matching(found, trial.state_dict()) or str
        theirs = {rename(tensor): shape for tensor, shape in found.items()}
        twice = repeated(trial.state_dict())
        own = {name: tuple(value.shape) for name, value in trial.state_dict().items() if name not in twice}
        pairs = [zip(own[tensor], theirs[tensor], strict=True) for tensor in head_of(own, theirs, GUESS)]
        count = next((there for pair in pairs for here, there in pair if here != there), GUESS)
    return entry.build(count, options)


def task_name(config: ModelConfig, saved_model: str = "") -> str:
    """The registered name, by which a task is chosen, of a network or of a checkpoint that says `saved_model`."""
    return config.name if config.factory and saved_model not in models.MODELS else saved_model or config.name


def build(config: ModelConfig, classes: int, size: tuple[int, int], seed: int) -> Any:
    """The unpruned network of a recipe, seeded, or the one in its checkpoint; it takes images of `size`."""
    if config.checkpoint:
        return read(config.checkpoint, config, classes=classes, seed=seed).model
    torch.manual_seed(seed)
    model = models.build(config.name, classes, **config.options)
    models.check_multiple(config.name, size, model.size_multiple)
    if config.factory:
        try_size(model, size)
    if config.backbone_weights:
        if not hasattr(model, "backbone"):
            raise VssError(f"model.backbone_weights came and {config.name} has no backbone; leave the key out.")
        models.load_backbone(model.get_submodule("backbone"), config.backbone_weights)
    if config.weights:
        models.load_weights(model, config.weights, classes=classes, replace_head=config.replace_head)
    return model


@torch.no_grad()
def try_size(model: Any, size: tuple[int, int]) -> None:
    """Refuse a network of a factory that does not take RGB images of `size` (H, W), or gives no map of classes."""
    training = model.training
    image = torch.zeros(1, 3, *size)
    try:
        found = model.eval()(image)
    except VssError:
        raise
    except Exception as error:
        raise VssError(
            f"the network of {model.name} does not take images of {size[0]}x{size[1]} in RGB ({type(error).__name__}: "
            f"{one_line(str(error)).rstrip('.')}); give another --input-size (data.size), or change the network."
        ) from error
    finally:
        model.train(training)
    if not isinstance(found, torch.Tensor | tuple):
        raise VssError(f"the network of {model.name} gives a {type(found).__name__}; expected a tensor.")
