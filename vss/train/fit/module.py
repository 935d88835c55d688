"""One training step, the schedule and the validation, as Lightning wants them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader

from vss.core.config import FitConfig
from vss.core.errors import VssError
from vss.train.fit.parts import FitData, Moment, Phase


class Diverged(VssError):
    """The training has left the numbers that float32 has."""


class FitModule(L.LightningModule):
    """Loss, schedule and validation metric."""

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
        self.moment: Moment | None = None
        self.learner = data.learner
        self._teacher = [teacher.eval().requires_grad_(False)] if teacher is not None and config.distill else []

    def train_dataloader(self) -> DataLoader[Any]:
        return self.data.train(self.trainer.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.data.val(self.trainer.global_rank, self.trainer.world_size)

    def on_train_epoch_start(self) -> None:
        self.begun = True
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
            self.moment = self._moment(images, batch, outputs, progress)
        for teacher in self._teacher:
            with torch.no_grad():
                soft = self.learner.teach(teacher, images)
            far = self.learner.divergence(outputs, soft, batch, temperature=self.config.temperature)
            loss = loss + self.config.distill * far
        if not torch.isfinite(loss.detach()):
            raise Diverged(f"the loss is {float(loss.detach())}")
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def _moment(self, images: Tensor, batch: dict[str, Tensor], outputs: dict[str, Tensor], progress: float) -> Moment:
        plugin = self.trainer.precision_plugin
        scaler = getattr(plugin, "scaler", None)
        return Moment(
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
        if self.phase is not None and self.moment is not None:
            self.phase.after_backward(self.moment)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.phase is not None and self.moment is not None:
            self.phase.after_step(self.moment)
        self.moment = None

    def refuse_non_finite(self) -> None:
        """Weights and the running statistics of norms; other buffers may hold infinity by intent."""
        tensors = dict(self.model.named_parameters())
        for name, module in self.model.named_modules():
            if isinstance(module, _NormBase) and module.running_var is not None:
                tensors |= {f"{name}.running_mean": module.running_mean, f"{name}.running_var": module.running_var}
        for name, value in tensors.items():
            if not bool(torch.isfinite(value.detach()).all()):
                raise Diverged(f"{name} is no longer finite")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
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
