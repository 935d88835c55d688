"""`fit` itself: checks, folder, trainer, and how it ends."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from vss.core.config import FitConfig
from vss.core.errors import VssError
from vss.core.files import sha256_tensors
from vss.train.fit.checks import check_norms, check_settings, trainer
from vss.train.fit.folder import WholeFiles, fit_folder
from vss.train.fit.keep import Best, Lines, Save
from vss.train.fit.module import Diverged, FitModule
from vss.train.fit.parts import FitData, Phase, precision_of, section_of

log = logging.getLogger(__name__)
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
    with fit_folder(run_dir, inputs) as (key, resume):
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
