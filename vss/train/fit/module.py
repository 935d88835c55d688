"""What a fit is given: data, task, and what a method adds to each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader

from vss.core.config import FinetuneConfig, FitConfig
from vss.core.errors import VssError
from vss.core.networks import layers_named
from vss.train.losses import Learner

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
class StepContext:
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

    def after_backward(self, context: StepContext) -> None:
        """Add to the gradients, which are there and synchronised between processes."""

    def after_step(self, context: StepContext) -> None:
        """After the optimiser's step, on the same batch."""

    def about(self) -> dict[str, Any]:
        """The settings, as JSON: a fit goes on only where they are the same."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and dictionaries of them."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
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


# One training step, the schedule and the validation, as Lightning wants them.


EVERY = 10
"""Steps after which the losses of a GPU are looked at."""


class Diverged(VssError):
    """The training has left the numbers that float32 has."""


class FitModule(L.LightningModule):
    def __init__(
        self,
        model: nn.Module,
        data: FitData,
        config: FitConfig,
        *,
        seed: int,
        teacher: nn.Module | None,
        phase: Phase | None,
        key: str,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.key, self.begun = key, False
        self.data, self.config, self.seed, self.phase = data, config, seed, phase
        self.context: StepContext | None = None
        self.learner = data.learner
        self.losses: list[Tensor] = []
        self.frozen = frozen_modules(model, config)
        self._teacher = [teacher.eval().requires_grad_(False)] if teacher is not None and config.distill else []

    def train_dataloader(self) -> DataLoader[Any]:
        return self.data.train(self.trainer.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.data.val(self.trainer.global_rank, self.trainer.world_size)

    def on_train_epoch_start(self) -> None:
        self.begun = True
        for module in self.frozen:
            module.eval()
        last = self.current_epoch + 1 == self.config.epochs  # which is always validated, whatever val_every divides
        self.trainer.check_val_every_n_epoch = 1 if last else self.config.val_every
        # Dropout draws from the global generator: seeding it by epoch makes a resumed run equal to an unbroken one.
        torch.manual_seed(self.seed * 1_000_003 + self.current_epoch)
        for teacher in self._teacher:
            teacher.to(self.device)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        images = self.data.normalise(batch["image"])
        outputs = self.model.forward_train(images)
        progress = self.current_epoch / max(1, self.config.epochs)
        loss = self.learner(outputs, batch, progress=progress)
        if self.phase is not None:
            self.context = self._context(images, batch, outputs, progress)
        for teacher in self._teacher:
            with torch.no_grad():
                soft = self.learner.teacher_outputs(teacher, images)
            far = self.learner.distillation_loss(outputs, soft, batch, temperature=self.config.temperature)
            loss = loss + self.config.distill * far
        self.losses.append(loss.detach())
        if len(self.losses) >= EVERY or not loss.is_cuda:
            self.refuse_losses()
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def _context(
        self, images: Tensor, batch: dict[str, Tensor], outputs: dict[str, Tensor], progress: float
    ) -> StepContext:
        plugin = self.trainer.precision_plugin
        scaler = getattr(plugin, "scaler", None)
        return StepContext(
            model=self.model,
            images=images,
            batch=batch,
            outputs={head: logits.detach() for head, logits in outputs.items()},
            learner=self.learner,
            loss=lambda heads: self.learner(heads, batch, progress=progress),
            step=self.trainer.global_step,
            steps=max(1, int(self.trainer.estimated_stepping_batches)),
            scale=float(scaler.get_scale()) if scaler is not None else 1.0,
            autocast=plugin.forward_context,
        )

    def on_after_backward(self) -> None:
        if self.phase is not None and self.context is not None:
            self.phase.after_backward(self.context)

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        if self.phase is not None and self.context is not None:
            self.phase.after_step(self.context)
        self.context = None

    def refuse_losses(self) -> None:
        """Those since the last look; a look waits for the device, so a GPU is not asked at every step."""
        losses, self.losses = self.losses, []
        for loss in torch.stack(losses).tolist() if losses else ():
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss}")

    def refuse_non_finite(self) -> None:
        """Losses, weights and the running statistics of norms; other buffers may hold infinity by intent."""
        self.refuse_losses()
        tensors = dict(self.model.named_parameters())
        for name, module in self.model.named_modules():
            if isinstance(module, _NormBase) and module.running_var is not None:
                tensors |= {f"{name}.running_mean": module.running_mean, f"{name}.running_var": module.running_var}
        for name, value in tensors.items():
            if not bool(torch.isfinite(value.detach()).all()):
                raise Diverged(f"{name} is no longer finite")

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        checkpoint["vss"] = self.key
        if self.phase is not None:
            checkpoint["phase"] = self.phase.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.phase is not None:
            self.phase.load_state_dict(checkpoint["phase"])

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.learner.update(self.model, self.data.normalise(batch["image"]), batch)

    def configure_optimizers(self) -> Any:
        config = self.config
        groups = decay_groups(self.model, config.weight_decay)
        if config.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
        else:
            optimizer = torch.optim.AdamW(groups, lr=config.lr)
        total = max(1, int(self.trainer.estimated_stepping_batches))

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
            return warm * max(0.0, 1 - step / total) ** config.poly_power

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def frozen_modules(model: nn.Module, config: FitConfig) -> list[nn.Module]:
    """The modules that a fit leaves as they are: not trained, and in evaluation mode, so that statistics stay."""
    names = layers_named(model, config.freeze, f"layer of {section_of(config)}.freeze (--freeze)")
    frozen = [model.get_submodule(name) for name in names]
    return frozen + [part for part in model.modules() if config.freeze_norms and isinstance(part, NORMS)]


@contextmanager
def freezing(model: nn.Module, config: FitConfig) -> Iterator[None]:
    """Parameters of `frozen_modules` need no gradient in here."""
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for module in frozen_modules(model, config):
        module.requires_grad_(False)
    try:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise VssError(f"{section_of(config)}.freeze (--freeze) means all layers; nothing is left to train.")
        yield
    finally:
        for parameter, before in needed.items():
            parameter.requires_grad_(before)


def decay_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and norm parameters do not: tensors of one dimension, and those that a module of its own
    kind names as one value a channel (`channel_params`)."""
    scales = {id(getattr(module, name)) for module in model.modules() for name in getattr(module, "channel_params", ())}
    parameters = [p for p in model.parameters() if p.requires_grad]
    free = [p.ndim <= 1 or id(p) in scales for p in parameters]
    return [
        {"params": [p for p, is_free in zip(parameters, free, strict=True) if is_free is kind], "weight_decay": amount}
        for kind, amount in ((False, decay), (True, 0.0))
    ]
