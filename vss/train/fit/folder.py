"""What can be refused before the first step: settings that Lightning does not take, batches a norm cannot take."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import pickle
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from vss.core.config import FitConfig
from vss.core.errors import VssError, one_line, shown
from vss.core.files import at_work, atomic, read_json, remove_leftovers, sha256_json, write_json
from vss.train.fit.module import precision_of, section_of

REFUSED = (MisconfigurationException, ValueError, TypeError, KeyError, RuntimeError, ImportError, AssertionError)
"""What Lightning raises for a value that it does not take."""
DEFAULTS: dict[str, Any] = {"accelerator": "auto", "devices": "auto", "strategy": "auto", "precision": "32-true"}


def check_settings(config: FitConfig) -> None:
    """Refuse a schedule or a device that cannot work; needs neither network nor data."""
    section = section_of(config)
    if config.epochs < 1:
        raise VssError(f"{section}.epochs is {config.epochs}, which trains nothing; give 1 or more.")
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


def _refuses(**one: object) -> bool:
    """Whether one setting is refused with all others at their defaults."""
    try:
        L.Trainer(**DEFAULTS | one, logger=False, enable_checkpointing=False)
    except REFUSED:
        return True
    return False


def check_norms(model: Any, image: Tensor, config: FitConfig) -> None:
    """Refuse a batch in which a norm layer would see one value a channel, which has no variance.

    `image` is (1, 3, H, W) float, of the size that is trained on; `model` stays as it is.
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


def _refuse_one_value(
    config: FitConfig, size: tuple[int, int], name: str, module: nn.Module, given: tuple[Tensor, ...]
) -> None:
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


# The folder of a fit: locked while it works, and never mistaken for that of another fit.


log = logging.getLogger(__name__)
KIND, SCHEMA = "vss.fit", 1
BEST, CURVES, RECORD, RESUME = "best.safetensors", "curves.json", "fit.json", "lightning/resume.ckpt"
OWN = (BEST, CURVES, "lightning", "csv", "tensorboard", RECORD)  # the record goes last
PATIENCE_S = 120.0
DAMAGE: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    pickle.UnpicklingError,
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
    TypeError,
)


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoints, each whole or absent: written beside the target, flushed to the disk, renamed.

    Its own way writes into TMPDIR and moves, which is a copy where that is another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, object], path: str | Path, storage_options: object = None) -> None:
        with atomic(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def fit_folder(path: Path, inputs: Mapping[str, Any]) -> Iterator[tuple[str, Path | None]]:
    """The folder made ready for these inputs and held: their key, and the file to go on from."""
    key = sha256_json(inputs)
    if path.exists() and not path.is_dir():
        raise VssError(f"{path} is a file; a training writes a folder, so choose another --save.")
    if getattr(rank_zero_only, "rank", 0):  # the first process makes the folder ready
        _await(path, key)
        yield key, _resume_file(path, key)
        return
    with at_work(path, deep=False):
        remove_leftovers((path / RESUME).parent, deep=False)
        _make_ready(path, key, inputs)
        yield key, _resume_file(path, key)


def _make_ready(path: Path, key: str, inputs: Mapping[str, object]) -> None:
    old = _record(path)
    if old.get("key") != key:
        _set_aside(path, old, inputs)
        write_json(path / RECORD, {"kind": KIND, "schema": SCHEMA, "key": key, "inputs": dict(inputs)})
    back = path / "earlier" / key[:12]
    if back.is_dir():
        log.info("%s had this training before: going on with what was kept in %s", path, back)
        _move(back, path)
        shutil.rmtree(back)


def _set_aside(path: Path, old: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    if not any((path / name).exists() for name in OWN):
        return
    other = sorted(_flat(old.get("inputs", {})).items() ^ _flat(inputs).items())
    changed = ", ".join(dict.fromkeys(key for key, _ in other)) if old else "of which no record is left"
    earlier = path / "earlier"
    free = next(f"unknown-{i}" for i in itertools.count(1) if not (earlier / f"unknown-{i}").exists())
    aside = earlier / (str(old["key"])[:12] if old else free)
    _move(path, aside)
    log.warning("%s held another training (%s); it is kept in %s", path, changed, aside)


def _flat(data: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


def _move(source: Path, target: Path) -> None:
    """Move what a fit wrote; what a kill left behind of an earlier try is moved too."""
    for name in OWN:
        if not (source / name).exists():
            continue
        if (target / name).is_dir():
            shutil.rmtree(target / name)
        target.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, target / name)


def _record(path: Path) -> dict[str, Any]:
    if not (path / RECORD).is_file():
        return {}
    try:
        record = read_json(path / RECORD, kind=KIND, schema=SCHEMA)
    except VssError as error:
        log.warning("%s", error)
        return {}
    return record if isinstance(record.get("key"), str) and isinstance(record.get("inputs"), dict) else {}


def _await(path: Path, key: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while _record(path).get("key") != key:
        if time.monotonic() > until:
            raise VssError(f"{path} was not made ready by the first process; all nodes must see the same folder.")
        time.sleep(0.2)


def _resume_file(path: Path, key: str) -> Path | None:
    """The file to go on from; a damaged one is said and left for the next epoch to replace."""
    file = path / RESUME
    if not file.is_file():
        return None
    fault = _damage(file, key)
    if fault:
        log.warning("%s cannot be used (%s); the training starts anew", file, fault)
        return None
    return file


def _damage(file: Path, key: str) -> str:
    """What is wrong with a resume file; every part's checksum is read."""
    try:
        with zipfile.ZipFile(file) as parts:
            wrong = parts.testzip()
        if wrong:
            return f"the checksum of {wrong} is wrong"
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True).get("vss")
    except DAMAGE as error:
        return f"it is truncated or damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return "" if found == key else "it is of another training"
