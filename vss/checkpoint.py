"""Checkpoints: one safetensors file whose header carries the JSON that rebuilds the network.

The header says the model's name and options, the chain of pruning plans, the preprocessing and the classes, so a pruned
network comes back in a new process by slicing a fresh one: no tracing, no data, no pickle. One file is either whole or
absent; a pair of files could disagree.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vss import models
from vss.errors import VssError
from vss.files import atomic, sha256_tensors
from vss.models import SegModel
from vss.prune import Plan, apply_plan
from vss.version import __version__

KIND, SCHEMA = "vss.checkpoint", 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A network and what is known of it.

    Attributes:
        model: in evaluation mode, on the CPU.
        plans: how it was cut, first cut first.
        preprocess: `Preprocess` as a dictionary, or None.
        classes: names of the K classes.
        info: dataset, metrics and whatever the writer added.
        weights_sha256: hash of the state dict.
    """

    model: nn.Module
    plans: tuple[Plan, ...] = ()
    preprocess: dict[str, Any] | None = None
    classes: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""


def save(
    model: nn.Module,
    path: Path | str,
    *,
    preprocess: dict[str, Any] | None = None,
    classes: tuple[str, ...] | list[str] = (),
    info: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint atomically.

    The pruning history is read from `model.plans`, which `apply_plan` keeps.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    meta = {
        "kind": KIND,
        "schema": SCHEMA,
        "vss": __version__,
        "model": getattr(model, "name", "") or type(model).__name__,
        "options": dict(getattr(model, "options", {})),
        "num_classes": getattr(model, "num_classes", None),
        "plans": [plan.to_dict() for plan in getattr(model, "plans", ())],
        "preprocess": preprocess,
        "classes": list(classes),
        "info": info or {},
        "weights_sha256": sha256_tensors(state),
    }
    with atomic(path) as temporary:
        try:
            save_file(_unshared(state), temporary, metadata={"vss": json.dumps(meta)})
        except SafetensorError as error:
            raise VssError(f"{path} cannot be written ({error}); free some space or choose another place.") from error
    return Path(path)


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors that share memory; a clone is as good here."""
    seen: set[int] = set()
    result = {}
    for name, value in state.items():
        result[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return result


def load(path: Path | str, *, model: nn.Module | None = None) -> nn.Module:
    """Give the network of a checkpoint back, pruned as it was saved, in evaluation mode.

    Args:
        path: a file that `save` wrote.
        model: an unpruned instance, needed only for networks that are not registered with vss.
    """
    return read(path, model=model).model


def read(path: Path | str, *, model: nn.Module | None = None) -> Checkpoint:
    """Read a checkpoint with everything it says; see `load`."""
    meta, state = _read_file(Path(path))
    plans = tuple(Plan.from_dict(data, source=f"{path}, plan {i}") for i, data in enumerate(meta["plans"]))
    if model is None:
        if meta["num_classes"] is None or meta["model"] not in models.MODELS:
            raise VssError(
                f"{path} holds a {meta['model']!r}, which is not registered; give an unpruned instance: "
                "vss.load(path, model=...), or load its package with --plugin."
            )
        model = models.build(meta["model"], meta["num_classes"], **meta["options"])
    elif isinstance(model, SegModel) and model.name != meta["model"]:
        raise VssError(f"{path} holds a {meta['model']!r} and was to be loaded into a {model.name!r}.")
    for plan in plans:
        model = apply_plan(model, plan, check_weights=False)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise VssError(f"{path} does not fit its own description: {str(error).splitlines()[1].strip()}") from error
    return Checkpoint(
        model=model.eval(),
        plans=plans,
        preprocess=meta["preprocess"],
        classes=tuple(meta["classes"]),
        info=meta["info"],
        weights_sha256=meta["weights_sha256"],
    )


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise VssError(f"checkpoint {path} does not exist.")
    if path.suffix in (".pt", ".pth", ".ckpt"):
        raise VssError(
            f"{path} is a torch file; vss checkpoints are .safetensors. Load its weights with "
            "`vss prune --model NAME --weights FILE` or vss.models.read_state_dict."
        )
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("vss")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise VssError(f"checkpoint {path} is truncated or damaged ({error}); copy it again or retrain.") from error
    if text is None:
        raise VssError(f"{path} is a safetensors file without a vss header; save it with vss.save.")
    meta = _read_header(path, text)
    if sha256_tensors(state) != meta["weights_sha256"]:
        raise VssError(f"checkpoint {path} is damaged: its weights do not have the hash it was saved with.")
    return meta, state


def _read_header(path: Path, text: str) -> dict[str, Any]:
    try:
        meta = json.loads(text)
    except json.JSONDecodeError as error:
        raise VssError(f"checkpoint {path} is damaged: its header is not JSON ({error}); copy it again.") from error
    if not isinstance(meta, dict) or meta.get("kind") != KIND or not isinstance(meta.get("schema"), int):
        raise VssError(f"checkpoint {path} is damaged: its header is of no {KIND}; copy it again.")
    if meta["schema"] > SCHEMA:
        raise VssError(
            f"checkpoint {path} has schema {meta['schema']}; this version reads up to {SCHEMA}: upgrade vss."
        )
    needed = ("model", "options", "num_classes", "plans", "preprocess", "classes", "info", "weights_sha256")
    missing = [key for key in needed if key not in meta]
    if missing:
        raise VssError(f"checkpoint {path} is damaged: its header lacks {', '.join(missing)}; copy it again.")
    return meta
