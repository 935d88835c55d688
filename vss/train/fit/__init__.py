"""`fit`: training and fine-tuning, one function, on Lightning.

Lightning owns devices, precision, processes and resuming. Here is only what it cannot know: the loss, the schedule, the
metric, and that a run killed at any moment and started again ends in the very same weights. For that, everything
random is a function of (seed, epoch, image), the resume file is written whole at the end of every epoch, and a folder
remembers what its training was made from: it never goes on with another one.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vss.core.errors import EVERY_S, VssError, counted, duration

try:
    import lightning as L
except ModuleNotFoundError as error:
    raise VssError(f"training needs {error.name}; install it with: pip install lightning tensorboard") from error

from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from vss.core.config import FitConfig
from vss.core.files import sha256_tensors, write_json
from vss.train.fit.folder import BEST, WholeFiles, check_norms, check_settings, fit_folder, trainer
from vss.train.fit.folder import CURVES as CURVES_FILE
from vss.train.fit.module import Diverged, FitData, FitModule, Phase, StepContext, freezing, precision_of, section_of

__all__ = ["FitData", "Phase", "StepContext", "check_norms", "check_settings", "fit", "precision_of"]

log = logging.getLogger(__name__)
CURVES, SCHEMA = "vss.curves", 1
Save = Callable[[nn.Module, Path, dict[str, float]], None]


class Best(Callback):
    """The weights of the best validation epoch, and the curves.

    Both are part of the resume file, so that what a resumed training ends with never hangs on another file.
    """

    def __init__(self, run_dir: Path, save: Save, metric: str) -> None:
        self.path, self.curves_path = run_dir / BEST, run_dir / CURVES_FILE
        self.save, self.metric = save, metric
        self.score, self.epoch, self.latest = -1.0, -1, -1.0
        self.rows: list[dict[str, float]] = []
        self.weights: dict[str, Tensor] = {}
        self.restored = False

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "epoch": self.epoch, "rows": self.rows, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score, self.epoch, self.rows = state_dict["score"], state_dict["epoch"], state_dict["rows"]
        self.weights, self.restored = state_dict["weights"], True

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.refuse_non_finite()  # before anything is scored

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        # This callback stands before the averaging one, so here the averaged weights, if any, are in the model.
        pl_module.refuse_non_finite()
        score = self.latest = pl_module.learner.compute()
        pl_module.learner.reset()
        pl_module.log(f"val_{self.metric}", score, prog_bar=True, rank_zero_only=True)
        if score >= self.score:  # of equal epochs the last: a small validation set is soon at its best
            self.score, self.epoch = score, trainer.current_epoch
            self.weights = _copy(pl_module.model)
            if trainer.is_global_zero:
                self._save(pl_module.model)

    def _save(self, model: nn.Module) -> None:
        self.save(model, self.path, {f"val_{self.metric}": self.score, "epoch": self.epoch})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.refuse_non_finite()  # the resume file is written after this
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
            self._save_curves()

    def _save_curves(self) -> None:
        write_json(self.curves_path, {"kind": CURVES, "schema": SCHEMA, "rows": self.rows})

    def finish(self, model: nn.Module, *, keep_last: bool, write: bool) -> None:
        """Leave the best weights in `model`, or the last with `keep_last`; a resumed fit writes its files again."""
        if not self.weights:
            raise VssError(
                f"no validation gave a score, so no epoch is the best; look at the validation data. ({self.path})"
            )
        last = _copy(model)
        model.load_state_dict(self.weights)
        if self.restored and write:
            self._save(model)
            self._save_curves()
        if keep_last:
            model.load_state_dict(last)

    def kept(self) -> str:
        """Where the last good weights are."""
        if not self.weights:
            return "no epoch was finished before, so no weights are kept"
        score = f"{self.metric} {self.score:.2f}"
        return f"the best weights until then, of epoch {self.epoch + 1} ({score}), are in {self.path}"

    def summary(self) -> dict[str, Any]:
        return {
            "best": str(self.path),
            "best_epoch": self.epoch,
            "metric": self.metric,
            f"best_{self.metric}": self.score,
            "curves": self.rows,
        }


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


class Lines(Callback):
    """A line when the training starts, one an epoch, and one every half minute of a long epoch."""

    def __init__(self, config: FitConfig, best: Best) -> None:
        self.config, self.best, self.name = config, best, section_of(config)
        self.start = self.told = time.monotonic()
        self.first = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start, self.first = time.monotonic(), trainer.current_epoch
        begun = f", of which {self.first} are done" if self.first else ""
        place = f"{trainer.world_size} x {trainer.strategy.root_device.type}, {trainer.precision}"
        epochs, steps = counted(self.config.epochs, "epoch"), counted(int(trainer.num_training_batches), "step")
        self._say(trainer, f"{epochs} of {steps}{begun}, on {place}")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.told = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self.told > EVERY_S:
            self.told = time.monotonic()
            steps = int(trainer.num_training_batches)
            done = trainer.current_epoch + (batch_idx + 1) / steps
            loss = float(outputs["loss"] if isinstance(outputs, dict) else outputs)
            self._say(
                trainer, f"{self._epoch(trainer)}, step {batch_idx + 1}/{steps}: loss {loss:.4f}, {self._left(done)}"
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        row, metric = self.best.rows[-1], self.best.metric
        score = f", val {metric} {row[f'val_{metric}']:.2f}" if f"val_{metric}" in row else ""
        end = self._left(trainer.current_epoch + 1)
        self._say(trainer, f"{self._epoch(trainer)}: loss {row['loss']:.4f}{score}, lr {row['lr']:.3g}, {end}")

    def _epoch(self, trainer: L.Trainer) -> str:
        return f"epoch {trainer.current_epoch + 1}/{self.config.epochs}"

    def _left(self, done: float) -> str:
        """Time left, at the pace of the epochs that this process has done."""
        return f"{duration((time.monotonic() - self.start) * (self.config.epochs - done) / (done - self.first))} left"

    def _say(self, trainer: L.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            log.info("%s: %s", self.name, text)


QUIET = (
    ".*does not have many workers.*",
    ".*(isinstance|LeafSpec|treespec).*deprecated.*",
    ".*Checkpoint directory .* exists.*",
    ".*smaller than the logging interval.*",
)


def fit(
    model: nn.Module,
    data: FitData,
    config: FitConfig,
    run_dir: Path | str,
    *,
    save: Save,
    seed: int = 0,
    teacher: nn.Module | None = None,
    progress: bool = True,
    phase: Phase | None = None,
) -> dict[str, Any]:
    """Train `model` in place; it ends with the weights of the best validation epoch, or of the last with a phase.

    The last epoch is always validated.

    Args:
        model: a `SegModel` (or any module with `forward_train` and `predict`).
        data: loaders, loss and score.
        config: schedule.
        run_dir: everything is written here. A fit of the same inputs (settings, seed, start weights, teacher, data)
            goes on where it stopped; one of others starts anew and keeps what was there in `run_dir/earlier`.
        save: writes a checkpoint: (model, path, metrics).
        seed: of the whole run.
        teacher: unpruned network for distillation; goes with `config.distill` > 0.
        phase: what a method adds to each step (sparse training, a search).

    Returns:
        {"best": path, "best_epoch", "metric", "best_METRIC", "steps", "epochs", "curves": [rows]}; the rows have
        `val_METRIC` where METRIC is that of the learner, such as `miou_pct`.

    Raises:
        VssError: the training diverged; `run_dir` keeps the best weights until then.
    """
    run_dir = Path(run_dir)
    check_settings(config)
    section = section_of(config)
    if (teacher is None) is bool(config.distill):
        what = "there is no teacher to distil from" if teacher is None else "there is a teacher"
        raise VssError(f"{section}.distill is {config.distill} and {what}; give both or neither.")
    sampled = data.train(0, 1)
    image = sampled.dataset[next(iter(sampled.sampler))]["image"]
    check_norms(model, data.normalise(image[None]), config)
    inputs = {
        section: config.model_dump(mode="json"),
        "seed": seed,
        "network": [getattr(model, "name", type(model).__name__), str(getattr(model, "options", {}))],
        "start weights": sha256_tensors(model.state_dict()),
        "teacher": sha256_tensors(teacher.state_dict()) if teacher else None,
        "phase": [type(phase).__name__, phase.about()] if phase else None,
        **data.about,
    }
    with freezing(model, config), fit_folder(run_dir, inputs) as (key, resume):
        L.seed_everything(seed, workers=True, verbose=False)
        model.train()  # a loaded checkpoint comes in evaluation mode, and Lightning keeps the mode it finds
        best = Best(run_dir, save, data.learner.metric)
        task = FitModule(model, data, config, seed=seed, teacher=teacher, phase=phase, key=key)
        return _run(task, _trainer(config, run_dir, best, progress=progress), best, resume)


def _run(task: FitModule, lightning: L.Trainer, best: Best, resume: Path | None) -> dict[str, Any]:
    config, section = task.config, section_of(task.config)
    try:
        with warnings.catch_warnings():
            for message in QUIET:
                warnings.filterwarnings("ignore", message=message)
            lightning.fit(task, ckpt_path=resume, weights_only=True)
    except Diverged as error:
        raise VssError(
            f"the training diverged in epoch {lightning.current_epoch + 1}, step {lightning.global_step}: {error}; "
            f"{best.kept()}. Lower {section}.lr (--lr, now {config.lr}), or set {section}.precision to 32-true."
        ) from error
    except SystemExit as end:  # Lightning makes this of Ctrl-C, and of a SIGTERM that nobody else handles
        if isinstance(end.__context__, KeyboardInterrupt):
            done = best.rows[-1]["epoch"] + 1 if best.rows else 0
            end.__context__.add_note(f"{done} of {config.epochs} epochs of {section} are kept in {best.path.parent}")
            raise end.__context__ from None
        raise SystemExit(end.code or 143) from None
    if not task.begun:
        log.info("%s: all %d epochs were done before, nothing is computed anew", section, config.epochs)
    best.finish(task.model, keep_last=task.phase is not None, write=lightning.is_global_zero)
    facts = {"steps": lightning.global_step, "epochs": lightning.current_epoch, "precision": precision_of(config)}
    return {**best.summary(), **facts}


def _trainer(config: FitConfig, run_dir: Path, best: Best, *, progress: bool) -> L.Trainer:
    keep = ModelCheckpoint(
        dirpath=run_dir / "lightning",
        filename="resume",
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    callbacks: list[Callback] = [best, Lines(config, best), keep]
    if config.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=config.ema))
    if progress:
        callbacks.append(RichProgressBar(leave=False))
    return trainer(
        config,
        max_epochs=config.epochs,
        gradient_clip_val=config.grad_clip,
        callbacks=callbacks,
        plugins=[WholeFiles()],
        logger=[CSVLogger(run_dir, name="csv"), TensorBoardLogger(run_dir, name="tensorboard")],
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        use_distributed_sampler=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        deterministic="warn",
        default_root_dir=run_dir,
    )
