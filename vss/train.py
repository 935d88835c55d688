"""`fit`: training and fine-tuning, one function, on Lightning.

Lightning owns devices, precision, processes and resuming. Here is only what it cannot know: the loss, the schedule, the
metric, and that a run killed at any moment and started again ends in the very same weights. For that, everything
random is a function of (seed, epoch, image), and the resume file is written at the end of every epoch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vss.config import FitConfig
from vss.errors import VssError
from vss.files import read_json, write_json
from vss.learner import Learner

try:
    import lightning as L
    from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, RichProgressBar
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
except ModuleNotFoundError as error:
    raise VssError(f"training needs {error.name}; install it with: pip install lightning tensorboard") from error

Loader = Callable[[int, int], DataLoader[Any]]  # (rank, world size) -> this process's loader
CURVES, SCHEMA = "vss.curves", 1


@dataclass(frozen=True, kw_only=True)
class FitData:
    """What `fit` needs to know of the data and the task.

    Attributes:
        train, val: (rank, world) -> loader of {"image": uint8 (N,3,H,W), "mask": int64 (N,H,W), ...}, what `learner`
            reads.
        normalise: uint8 images -> what the network takes.
        learner: loss and validation score.
    """

    train: Loader
    val: Loader
    normalise: Callable[[Tensor], Tensor]
    learner: Learner


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

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and dictionaries of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""


def fit(
    model: nn.Module,
    data: FitData,
    config: FitConfig,
    run_dir: Path | str,
    *,
    save: Callable[[nn.Module, Path, dict[str, float]], None],
    seed: int = 0,
    teacher: nn.Module | None = None,
    progress: bool = True,
    phase: Phase | None = None,
) -> dict[str, Any]:
    """Train `model` in place; it ends with the weights of the best validation epoch, or of the last with a phase.

    Args:
        model: a `SegModel` (or any module with `forward_train` and `predict`).
        data: loaders, loss and score.
        config: schedule.
        run_dir: everything is written here; a run that was killed resumes from it.
        save: writes a checkpoint: (model, path, metrics).
        seed: of the whole run.
        teacher: unpruned network for distillation; needs `config.distill` > 0.
        phase: what a method adds to each step (sparse training, a search).

    Returns:
        {"best": path, "best_epoch", "metric", "best_METRIC", "steps", "epochs", "curves": [rows]}; the rows have
        `val_METRIC` where METRIC is that of the learner, such as `miou_pct`.
    """
    run_dir = Path(run_dir)
    L.seed_everything(seed, workers=True, verbose=False)
    model.train()  # a loaded checkpoint comes in evaluation mode, and Lightning keeps the mode it finds
    best = _Best(run_dir, save, data.learner.metric)
    task = _Task(model, data, config, seed=seed, teacher=teacher, phase=phase)
    trainer = _trainer(config, run_dir, best, progress=progress)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*(isinstance|LeafSpec|treespec).*deprecated.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists.*")
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
        trainer.fit(task, ckpt_path=_resume_file(run_dir), weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    best_weights = best.read()
    if phase is None:
        model.load_state_dict(best_weights)
    facts = {"steps": trainer.global_step, "epochs": trainer.current_epoch, "precision": precision_of(config)}
    return {**best.summary(), **facts}


def _trainer(config: FitConfig, run_dir: Path, best: _Best, *, progress: bool) -> L.Trainer:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    keep = ModelCheckpoint(
        dirpath=run_dir / "lightning",
        filename="resume",
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    callbacks: list[Callback] = [best, keep]
    if config.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=config.ema))
    if progress:
        callbacks.append(RichProgressBar(leave=False))
    return L.Trainer(
        max_epochs=config.epochs,
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        precision=precision_of(config),
        gradient_clip_val=config.grad_clip,
        check_val_every_n_epoch=config.val_every,
        callbacks=callbacks,
        logger=[CSVLogger(run_dir, name="csv"), TensorBoardLogger(run_dir, name="tensorboard")],
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        use_distributed_sampler=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        deterministic="warn",
        default_root_dir=run_dir,
    )


def precision_of(config: FitConfig) -> Any:
    """Lightning's name of the precision; "auto" is bf16-mixed where the device computes in bfloat16 natively."""
    if config.precision != "auto":
        return config.precision
    if torch.cuda.is_available() and config.accelerator != "cpu":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"


def _resume_file(run_dir: Path) -> Path | None:
    path = run_dir / "lightning" / "resume.ckpt"
    return path if path.is_file() else None


class _Task(L.LightningModule):
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
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.data, self.config, self.seed, self.phase = data, config, seed, phase
        self.moment: Moment | None = None
        self.learner = data.learner
        self._teacher = [teacher.eval().requires_grad_(False)] if teacher is not None and config.distill else []

    def train_dataloader(self) -> DataLoader[Any]:
        return self.data.train(self.trainer.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.data.val(self.trainer.global_rank, self.trainer.world_size)

    def on_train_epoch_start(self) -> None:
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
            raise VssError(
                f"the loss is {float(loss)} at step {self.global_step}; lower the learning rate "
                f"(now {self.config.lr}) or use precision 32-true."
            )
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.phase is not None:
            checkpoint["phase"] = self.phase.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.phase is not None:
            self.phase.load_state_dict(checkpoint["phase"])

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.learner.update(self.model, self.data.normalise(batch["image"]), batch)

    def configure_optimizers(self) -> Any:
        config = self.config
        groups = _decay_groups(self.model, config.weight_decay)
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


def _decay_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and norm parameters do not: tensors of one dimension, and those that a module of its own
    kind names as one value a channel (`channel_params`)."""
    scales = {id(getattr(module, name)) for module in model.modules() for name in getattr(module, "channel_params", ())}
    parameters = [p for p in model.parameters() if p.requires_grad]
    free = [p.ndim <= 1 or id(p) in scales for p in parameters]
    return [
        {"params": [p for p, is_free in zip(parameters, free, strict=True) if is_free is kind], "weight_decay": amount}
        for kind, amount in ((False, decay), (True, 0.0))
    ]


class _Best(Callback):
    """Keeps the weights of the best validation epoch, and the curves; both survive a kill."""

    def __init__(self, run_dir: Path, save: Callable[[nn.Module, Path, dict[str, float]], None], metric: str) -> None:
        self.path = run_dir / "best.safetensors"
        self.curves_path = run_dir / "curves.json"
        self.save, self.metric = save, metric
        self.score, self.epoch, self.latest = -1.0, -1, -1.0
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "epoch": self.epoch, "rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score, self.epoch, self.rows = state_dict["score"], state_dict["epoch"], state_dict["rows"]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        # This callback stands before the averaging one, so here the averaged weights, if any, are in the model.
        score = self.latest = pl_module.learner.compute()
        pl_module.learner.reset()
        pl_module.log(f"val_{self.metric}", score, prog_bar=True, rank_zero_only=True)
        if score >= self.score:  # of equal epochs the last: a small validation set is soon at its best
            self.score, self.epoch = score, trainer.current_epoch
            if trainer.is_global_zero:
                self.save(pl_module.model, self.path, {f"val_{self.metric}": score, "epoch": trainer.current_epoch})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "loss": float(metrics["loss_epoch"]),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
        }
        if (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
            row[f"val_{self.metric}"] = self.latest
        self.rows = [*[old for old in self.rows if old["epoch"] < row["epoch"]], row]
        if trainer.is_global_zero:
            write_json(self.curves_path, {"kind": CURVES, "schema": SCHEMA, "rows": self.rows})

    def read(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        if not self.path.is_file():
            raise VssError(
                f"training ended without one validation, so no best epoch is known ({self.path}); "
                "let val_every be at most the number of epochs."
            )
        return load_file(self.path)

    def summary(self) -> dict[str, Any]:
        return {
            "best": str(self.path),
            "best_epoch": self.epoch,
            "metric": self.metric,
            f"best_{self.metric}": self.score,
            "curves": read_json(self.curves_path, kind=CURVES, schema=SCHEMA)["rows"],
        }
