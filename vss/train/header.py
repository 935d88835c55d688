"""What a checkpoint says of itself, read without torch and without its weights; `vss.train.checkpoint` reads both."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from vss.core.errors import VssError, fault, shown
from vss.core.files import parse_json, require_checkpoint
from vss.data.preprocess import Preprocess

KIND, SCHEMA = "vss.checkpoint", 1


class Header(BaseModel):
    """The JSON in a checkpoint; `vss_sha256` beside it is the hash of its text, which older files lack."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str
    network: str = ""  # class of what is saved; older files lack it
    options: dict[str, Any]
    num_classes: int | None
    plans: list[dict[str, Any]]
    preprocess: dict[str, Any] | None
    classes: list[str]
    info: dict[str, Any]
    weights_sha256: str

    @field_validator("preprocess")
    @classmethod
    def _is_one(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            Preprocess.model_validate(value)
        return value


def header(path: Path | str) -> Header:
    """What a checkpoint says of itself, without its weights; `read` gives and checks both."""
    from safetensors import SafetensorError, safe_open

    require_checkpoint(Path(path))
    try:
        with safe_open(path, framework="np") as file:
            return read_header(Path(path), file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise VssError(f"checkpoint {path} is truncated or damaged ({error}); copy it again or retrain.") from error


def not_registered(path: Path | str, name: str) -> VssError:
    """The error for a checkpoint of a network that nobody has said how to build."""
    return VssError(
        f"{path} holds a {shown(name)}, which is not registered; give an unpruned instance: vss.load(path, model=...), "
        "name what builds it with --model-from MODULE:NAME (model.factory), or load its package with --plugin."
    )


def read_header(path: Path, header: dict[str, str]) -> Header:
    text = header.get("vss")
    if text is None:
        raise VssError(f"{path} is a safetensors file without a vss header; save it with vss.save.")
    if header.get("vss_sha256", digest := hashlib.sha256(text.encode()).hexdigest()) != digest:
        raise VssError(f"checkpoint {path} is damaged: its header does not have the hash it was saved with.")
    meta = parse_json(text, source=f"the header of checkpoint {path}", kind=KIND, finite=False)
    own = isinstance(meta, dict) and meta.get("kind") == KIND and type(meta.get("schema")) is int
    if not own or meta["schema"] < 1:
        raise VssError(f"checkpoint {path} is damaged: its header is of no {KIND}; copy it again.")
    if meta["schema"] > SCHEMA:
        raise VssError(
            f"checkpoint {path} has schema {meta['schema']}; this version reads up to {SCHEMA}: upgrade vss."
        )
    try:
        return Header.model_validate(meta)
    except ValidationError as error:
        raise VssError(f"checkpoint {path} is damaged: in its header {fault(error)}; copy it again.") from error
