"""Files that are either whole or absent: temporary file, then rename. JSON with a schema number. Hashes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vss.errors import VssError

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success rename it to `path`, on any error remove it.

    The temporary name keeps the suffix of `path`, since writers (numpy, PIL, onnx) look at it.
    A full disk or a folder that cannot be written is one `VssError`.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _write_error(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False, refusal: str = "") -> Iterator[None]:
    """Hold a file lock that names its holder and goes with the process, however that ends.

    Args:
        path: the lock's file, which stays.
        wait: until another holder lets go; without, a held lock is a `VssError`.
        refusal: its sentence; the default says that `path.parent` is in use.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise _write_error(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            default = f"another vss command is at work in {path.parent}; wait for it, or choose another folder."
            raise VssError(refusal or default) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _write_error(path: Path, error: OSError) -> VssError:
    reason = error.strerror or str(error)
    return VssError(f"{path} cannot be written ({reason}); free some space or choose another place.")


def write_json(path: Path | str, data: Mapping[str, Any]) -> Path:
    """Write JSON atomically, stable key order as given, NaN refused."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    return Path(path)


def read_json(path: Path | str, *, kind: str, schema: int) -> dict[str, Any]:
    """Read a JSON object that carries `kind` and `schema`; older schemas are accepted, newer ones refused."""
    path = Path(path)
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise VssError(f"{path} does not exist; expected a {kind} file.") from error
    except OSError as error:
        raise VssError(f"{path} cannot be read ({error.strerror or error}); expected a {kind} file.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VssError(f"{path} is not JSON ({error}); expected a {kind} file.") from error
    if not isinstance(data, dict) or data.get("kind") != kind:
        found = data.get("kind") if isinstance(data, dict) else type(data).__name__
        raise VssError(f"{path} holds {found!r}; expected a file of kind {kind!r}.")
    if not isinstance(data.get("schema"), int) or data["schema"] > schema:
        raise VssError(
            f"{path} has schema {data.get('schema')!r}; this version reads up to {schema}: upgrade vss to read it."
        )
    return data


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_artefact(root: Path, artefact: Mapping[str, Any]) -> dict[str, Any]:
    """The artefact of a report, whose `files` are role -> path below `root`, with `sha256`, role -> hash."""
    return {**artefact, "sha256": {role: sha256_file(root / name) for role, name in artefact["files"].items()}}


def sha256_json(data: Any) -> str:
    """Hex SHA-256 of canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over names, dtypes, shapes and bytes of a state dict, independent of its order and device."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
