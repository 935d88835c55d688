"""Files that are either whole or absent (temporary file, then rename), JSON with a schema number, hashes, locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, TextIO
from zipfile import BadZipFile

from vss.core.errors import VssError, one_line, shown

if TYPE_CHECKING:
    import numpy as np
    import torch


TEMPORARY = ".vss-unfinished-"
"""What the name of a file has in it until it is whole."""
LOCK = ".lock"
"""Name of the lock in a folder."""
MAX_NAME = 120
"""Characters of a name that somebody chose; a file system takes 255 bytes, and suffixes come behind."""
MAX_JSON = 64 << 20  # bytes
MAX_DEPTH = 64
NO_ARRAY = (ValueError, OSError, EOFError, TypeError, OverflowError, SyntaxError, MemoryError, BadZipFile, TokenError)
PLAIN = {str, int, float, bool, type(None)}


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success rename it to `path`, on any error remove it.

    The temporary name keeps the suffix of `path`, since writers (numpy, PIL, onnx) look at it.
    A link stays a link: what it leads to is replaced. What cannot be written is one `VssError`. The temporary file is
    locked while it is written, so that those which killed writers of the same file left are known, and removed.
    """
    path = target_of(Path(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.stem[:100]}{TEMPORARY}"
        for other in os.scandir(path.parent):
            if other.name.startswith(prefix) and other.name.endswith(path.suffix):
                _remove_orphan(Path(other.path))
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
        with contextlib.suppress(OSError):  # a file system without locks keeps what is left
            fcntl.flock(handle, fcntl.LOCK_EX)
        temporary = Path(name)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def made_beside(to: Path) -> Iterator[Path]:
    """An empty folder next to `to`, in which to make what is then renamed to it; what a killed one left goes first."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{to.name}{TEMPORARY}"
        for leftover in to.parent.glob(f"{glob.escape(prefix)}*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=to.parent) as temporary:
            yield Path(temporary)
    except OSError as error:
        raise write_error(to, error) from error


def _remove_orphan(path: Path) -> None:
    """Remove a temporary file that nobody holds."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)


def target_of(path: Path) -> Path:
    """The file that writing to `path` replaces: itself, or where a link leads."""
    try:
        target = path.resolve() if path.is_symlink() else path
        if target.exists() and not target.is_file():
            kind = "folder" if target.is_dir() else "device or pipe"
            raise VssError(f"{path} is a {kind}; expected a file to write: give a name in it, or another place.")
        above = next(each for each in target.absolute().parents if each.exists())
        if not above.is_dir():
            raise VssError(f"{path} cannot be written ({above} is a file); choose another place.")
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, VssError):
            raise
        raise VssError(f"{path} cannot be written ({error}); choose another place.") from error
    return target


def safe_name(text: str, most: int = MAX_NAME) -> str:
    """A name as a file or folder: letters, digits and ._=+-, no dot at the start; a long one ends in a hash.

    >>> safe_name("a/b c"), safe_name(".."), safe_name("../x"), len(safe_name("n" * 300))
    ('a_b_c', '_', '_x', 120)
    """
    name = re.sub(r"[^A-Za-z0-9._=+-]+", "_", text).lstrip(".")
    name = name if name.strip("_") else "_"
    return name if len(name) <= most else f"{name[: most - 9]}-{sha256_json(text)[:8]}"


def write_error(path: Path, error: OSError) -> VssError:
    """Why something could not be written, in a sentence."""
    space = "free some space or " if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
    return VssError(f"{path} cannot be written ({error.strerror or error}); {space}choose another place.")


def write_text(path: Path | str, text: str) -> Path:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: Path | str, data: Mapping[str, object], *, sealed: bool = False) -> Path:
    """Write JSON atomically, stable key order as given, NaN refused; `sealed` adds the hash of the content."""
    data = {**data, "sha256": sha256_json(data)} if sealed else data
    return write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def require_file(path: Path | str, *, kind: str, limit: int = 1 << 62) -> Path:
    """The path of a regular file of at most `limit` bytes; a folder, a device, a pipe or nothing is a `VssError`."""
    try:
        about = os.stat(path)
    except FileNotFoundError as error:
        raise VssError(f"{shown_path(path)} does not exist; expected {_a(kind)} file.") from error
    except OSError as error:
        reason = error.strerror or error
        raise VssError(f"{shown_path(path)} cannot be read ({reason}); expected {_a(kind)} file.") from error
    except ValueError as error:  # a zero in it
        raise VssError(f"{shown_path(path)} is no path ({error}); expected {_a(kind)} file.") from error
    if not stat.S_ISREG(about.st_mode):
        found = "folder" if stat.S_ISDIR(about.st_mode) else "device or pipe"
        raise VssError(f"{path} is a {found}; expected {_a(kind)} file.")
    if about.st_size > limit:
        raise VssError(f"{path} has {about.st_size} bytes; a {kind} file has at most {limit}.")
    return Path(path)


def require_checkpoint(path: Path) -> Path:
    """The path of a file that may be a checkpoint of vss."""
    if not path.is_file():
        raise VssError(f"checkpoint {path} does not exist.")
    if path.suffix in (".pt", ".pth", ".ckpt"):
        raise VssError(
            f"{path} is a torch file; vss checkpoints are .safetensors. Load its weights with "
            "`vss prune --model NAME --weights FILE` or vss.models.read_state_dict."
        )
    return path


def _a(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aeioAEIO' else 'a'} {kind}"


def shown_path(path: Path | str) -> str:
    """A path that may be no path, on one line and cut."""
    return one_line(str(path).replace("\0", "?"))


def read_text(path: Path | str, *, kind: str, limit: int = MAX_JSON) -> str:
    """The text of a regular file, UTF-8, of at most `limit` bytes."""
    try:
        return require_file(path, kind=kind, limit=limit).read_text(encoding="utf-8")
    except OSError as error:
        raise VssError(f"{path} cannot be read ({error.strerror or error}); expected {_a(kind)} file.") from error
    except UnicodeDecodeError as error:
        raise VssError(f"{path} is no text ({error}); expected {_a(kind)} file.") from error


def read_array(path: Path | str) -> np.ndarray:
    """An array of numbers as `numpy.save` wrote it; its header is held against the file's size first."""
    import numpy as np

    require_file(path, kind="numpy")
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False) if os.path.getsize(path) else None
    except NO_ARRAY as error:
        raise VssError(f"{path} is no whole numpy file ({one_line(str(error))}); copy it again.") from error
    if not isinstance(mapped, np.ndarray) or mapped.dtype.kind not in "biuf":
        raise VssError(f"{path} is no numpy file of one array of numbers; copy it again.")
    return np.array(mapped)


def parse_json(text: str | bytes, *, source: str, kind: str, finite: bool = True) -> Any:
    """JSON of bounded depth and numbers, each key once; `finite` refuses NaN and infinity."""
    try:
        data = json.loads(text, object_pairs_hook=_each_once)
    except RecursionError as error:
        raise VssError(f"{source} is nested more than {MAX_DEPTH} deep; expected {_a(kind)} file.") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of thousands of digits, a key twice
        raise VssError(f"{source} is not JSON ({error}); expected {_a(kind)} file.") from error
    bounded(data, source=source, finite=finite)
    return data


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(name for name in names if names.count(name) > 1))} stands there twice")
    return result


def _finite_floats(values: list[Any]) -> bool:
    """Whether a list holds finite floats alone: coordinates by the million need no look at each; False where unsure."""
    return set(map(type, values)) == {float} and math.isfinite(sum(values))


def bounded(data: object, *, source: str, finite: bool = True) -> None:
    """Refuse values nested deeper than `MAX_DEPTH`, integers beyond 64 bits, and NaN or infinity where `finite`."""
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            kind = type(value)
            if kind is dict:
                below += value.keys()
                below += value.values()
            elif kind is list:
                below += () if _finite_floats(value) else value
            elif kind is int and value.bit_length() > 64:
                raise VssError(f"{source} holds an integer of {value.bit_length()} bits; expected at most 64.")
            elif kind is float and finite and not math.isfinite(value):
                raise VssError(f"{source} holds {value}; expected finite numbers.")
            elif kind not in PLAIN:
                raise VssError(
                    f"{source} holds a {kind.__name__}; expected texts, numbers, lists and keys with values."
                )
        if not below:
            return
        level = below
    raise VssError(f"{source} is nested more than {MAX_DEPTH} deep; vss writes no such file.")


def read_json(path: Path | str, *, kind: str, schema: int, sealed: bool = False) -> dict[str, Any]:
    """Read a JSON object that carries `kind` and `schema`; older schemas are accepted, newer ones refused.

    `sealed`: the content is held against the hash that `write_json` put in it; a file without one is an older one.
    """
    data = parse_json(read_text(path, kind=kind), source=str(path), kind=kind)
    if not isinstance(data, dict) or data.get("kind") != kind:
        found = shown(data.get("kind")) if isinstance(data, dict) else f"a {type(data).__name__}"
        raise VssError(f"{path} holds {found}; expected a file of kind {kind!r}.")
    if type(data.get("schema")) is not int or not 1 <= data["schema"] <= schema:
        raise VssError(
            f"{path} has schema {shown(data.get('schema'))}; this version reads up to {schema}: upgrade vss to read it."
        )
    stated = data.pop("sha256", None) if sealed else None
    if stated is not None and stated != sha256_json(data):
        raise VssError(
            f"{path} was changed after it was written: it does not have the hash that it states; make it again, or "
            'take its line "sha256" out if the change was meant.'
        )
    return data


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_artefact(root: Path, artefact: Mapping[str, Any]) -> dict[str, Any]:
    """The artefact of a report, whose `files` are role -> path below `root`, with `sha256`, role -> hash."""
    return {**artefact, "sha256": {role: sha256_file(root / name) for role, name in artefact["files"].items()}}


def sha256_json(data: object) -> str:
    """Hex SHA-256 of canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over names, dtypes, shapes and bytes of a state dict, independent of its order and device.

    What is no tensor in it (the extra state of a module) does not count.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(name for name, value in tensors.items() if isinstance(value, torch.Tensor)):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False, refusal: str = "", stays: bool = True) -> Iterator[None]:
    """Hold a file lock that names its holder and goes with the process, however that ends.

    Args:
        path: the lock's file.
        wait: until another holder lets go; without, a held lock is a `VssError`.
        refusal: its sentence; by default that `path.parent` is in use.
        stays: whether the file stays; where nobody waits it may go.
    """
    made = [each for each in (target_of(path).parent, *path.parent.parents) if not each.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _held(path, wait=wait)
    except BlockingIOError as error:
        raise VssError(refusal or f"another vss command is at work in {path.parent}; wait for it.") from error
    except OSError as error:
        raise write_error(path, error) from error
    with file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            if not stays:
                path.unlink(missing_ok=True)
            for folder in made:  # goes again where nothing was written into it
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _held(path: Path, *, wait: bool) -> TextIO:
    """The file, locked; one that its last holder took away while this one waited for it is opened anew."""
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BaseException:
            file.close()
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


@contextlib.contextmanager
def at_work(folder: Path, *, wait: bool = False, deep: bool = True) -> Iterator[None]:
    """Hold the lock of a folder that a command writes into; what a killed one left half-written goes first.

    Args:
        folder: made where it is not there; it goes again when nothing was written into it.
        wait: see `locked`.
        deep: the folders in it are this command's too.
    """
    made = not folder.exists()
    with locked(folder / LOCK, wait=wait):
        remove_leftovers(folder, deep=deep)
        try:
            yield
        finally:
            if made and [path.name for path in folder.iterdir()] == [LOCK]:  # refused before anything was written
                (folder / LOCK).unlink()


def file_at_work(path: Path) -> AbstractContextManager[None]:
    """The lock of one file that a command works at for long."""
    refusal = f"another vss command is at work on {path}; wait for it, or choose another name."
    return locked(path.parent / f".{path.name}{LOCK}", refusal=refusal, stays=False)


def at_rest(folder: Path) -> AbstractContextManager[None]:
    """The lock of a folder that is read as a whole, where there is one and it can be locked."""
    lockable = folder.is_dir() and os.access(folder, os.W_OK)
    return locked(folder / LOCK, stays=(folder / LOCK).exists()) if lockable else contextlib.nullcontext()


def is_leftover(path: Path) -> bool:
    """Whether a file is one that `atomic` had not finished."""
    return path.name.startswith(".") and TEMPORARY in path.name


def remove_leftovers(folder: Path, *, deep: bool) -> None:
    """Remove what killed writes have left in a folder whose lock is held."""
    pattern = f".*{TEMPORARY}*"
    for path in list(folder.rglob(pattern) if deep else folder.glob(pattern)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
