"""The files of a bundle: manifest.json with where it came from and the hash of every file, and the bundle as .tar.gz.

Every file is listed with its SHA-256; `SHA256SUMS` says the same in the format of `sha256sum -c` and covers the
manifest too. That finds damage and tampering of single files; it is no signature, since it holds no key.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from vss.core.errors import VssError, fault
from vss.core.files import atomic, read_json, sha256_file, write_json, write_text
from vss.data.preprocess import Preprocess
from vss.deploy.backends.trt_flavour import gpus

KIND, SCHEMA = "vss.bundle", 2
MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


def relative(path: str) -> str:
    """The path itself when it stays below its folder; a `ValueError` otherwise."""
    pure = PurePosixPath(path)
    if not path or "\\" in path or "\0" in path or pure.is_absolute() or ".." in pure.parts or str(pure) != path:
        raise ValueError(f"{path!r} is no plain path below the bundle")
    return path


Inner = Annotated[str, AfterValidator(relative)]
Side = Annotated[int, Field(ge=1, le=65536, strict=True)]
Byte = Annotated[int, Field(ge=0, le=255)]
Positive = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FileFact(_Part):
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Tensor(_Part):
    """One binding of the engine; None is a free dimension, the first is the batch."""

    dtype: str
    shape: list[int | None]


class Link(_Part):
    """One link of the chain: `sha256` of the thing, `file` where the bundle holds it.

    The hash of `weights` is that of the state dict; those of `plan` and of `calibration` (ranges and image list) are of
    their canonical JSON; all three stand in the ONNX file's metadata. The others are hashes of files.
    """

    what: Literal["weights", "plan", "calibration", "onnx", "engine", "report"]
    sha256: str
    file: Inner | None = None


class Engine(_Part):
    """The artefact: its runtime, how it was built, and the device that it is bound to (None: any).

    `as_written`: the runtime must not rewrite the graph, since its passes spoil Q/DQ in float16.
    """

    backend: str
    file: Inner
    as_written: bool = False
    spec: dict[str, object] = {}
    device: dict[str, Any] | None = None
    versions: dict[str, str] = {}


class Elsewhere(_Part):
    """An engine of the file `onnx` for GPUs that were not there when it was built, and so was not run.

    Without `targets` it is for sm80 and newer.
    """

    backend: str
    version: str
    file: Inner
    onnx: Inner
    targets: list[str] = []

    @property
    def where(self) -> str:
        return gpus(self.targets)


class Image(Preprocess):
    """The preprocessing, with nothing left to a default."""

    size: tuple[Side, Side]
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


class Samples(_Part):
    """A few images with their truth and the answers of the shipped engine, and what these answers score."""

    images: list[Inner] = []
    truth: list[Inner] = []
    expected: list[dict[str, Inner]] = []
    metrics: dict[str, float] = {}
    source: str = ""

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if not len(self.images) == len(self.truth) == len(self.expected):
            counts = f"{len(self.images)} images, {len(self.truth)} truths and {len(self.expected)} answers"
            raise ValueError(f"{counts} do not belong together")
        return self


class GateCheck(BaseModel):
    """What of one check of the gate is read; it may say more."""

    passed: bool | None = Field(strict=True)  # None: not judged, the sentence says why
    sentence: str


class Manifest(_Part):
    """The schema of manifest.json."""

    kind: Literal["vss.bundle"] = "vss.bundle"
    schema_: int = Field(default=SCHEMA, alias="schema", ge=1, le=SCHEMA)
    name: str = Field(pattern=NAME)
    row: str
    created: str
    vss: str
    versions: dict[str, str]
    task: Literal["segmentation", "defect"]
    threshold: float | None = None
    image: Image
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    classes: list[str]
    palette: list[tuple[Byte, Byte, Byte]]
    onnx: Inner
    engine: Engine
    elsewhere: list[Elsewhere] = []
    chain: list[Link]
    gate: dict[str, Any] | None
    forced: str | None = None
    metrics: dict[str, object]
    samples: Samples
    triton: dict[str, Inner]
    serving: dict[str, object]
    licences: dict[str, str] = {}
    rebuilds: list[dict[str, Any]] = []
    files: dict[Inner, FileFact] = {}

    @field_validator("gate")
    @classmethod
    def _gate_has_whole_checks(cls, value: dict[str, object] | None) -> dict[str, object] | None:
        TypeAdapter(list[GateCheck]).validate_python((value or {}).get("checks", []))
        return value

    @model_validator(mode="after")
    def _takes_an_image(self) -> Self:
        if len(self.inputs.get("image", Tensor(dtype="", shape=[])).shape) != 4:
            raise ValueError("the engine has no input 'image' of four dimensions")
        return self

    def served(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and outputs for a client of the server: uint8 (N, H, W, 3) images, labels in place of logits."""
        height, width = self.image.size
        outputs = dict(self.outputs)
        logits = outputs.pop("logits", None)
        labels = {"labels": Tensor(dtype="uint8", shape=[None, *logits.shape[2:]])} if logits else {}
        return {"image": Tensor(dtype="uint8", shape=[None, height, width, 3])}, labels | outputs

    def plugins(self) -> list[str]:
        """The libraries with plugins that its engines need."""
        return sorted(name for name in self.files if name.startswith("engine/") and name.endswith(".so"))

    def link(self, what: str) -> Link | None:
        """The link of that kind, when the chain has it."""
        return next((link for link in self.chain if link.what == what), None)


def read(bundle: Path | str) -> Manifest:
    """The checked manifest of a bundle folder; raises `VssError` for anything else."""
    path = Path(bundle) / MANIFEST
    if Path(bundle).is_file():
        raise VssError(f"{bundle} is a file; expected the folder of a bundle, or an archive that ends in .tar.gz.")
    try:
        return Manifest.model_validate(read_json(path, kind=KIND, schema=SCHEMA))
    except ValidationError as error:
        raise VssError(f"{path} does not follow the bundle schema at {fault(error)}.") from error


def inside(bundle: Path, name: str) -> Path:
    """The file of a bundle by its listed name; a path or link that leads out of the bundle is a `VssError`."""
    try:
        path = bundle / relative(name)
    except ValueError as error:
        raise VssError(f"{error}; such a bundle is refused.") from error
    if not path.resolve().is_relative_to(bundle.resolve()):
        raise VssError(f"{name} leads out of the bundle {bundle}; such a bundle is refused.")
    return path


def walk(bundle: Path) -> Iterator[str]:
    """Every file below the bundle, sorted; links are listed and never followed."""
    found = []
    for folder, folders, names in os.walk(bundle, followlinks=False):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found += [(Path(folder) / name).relative_to(bundle).as_posix() for name in (*names, *links)]
    yield from sorted(found)


def seal(bundle: Path, manifest: Manifest) -> Manifest:
    """Hash every file, write manifest.json and SHA256SUMS; returns the manifest with its `files`."""
    names = [name for name in walk(bundle) if name not in (MANIFEST, SUMS)]
    facts = {n: FileFact(sha256=sha256_file(bundle / n), bytes=(bundle / n).stat().st_size) for n in names}
    sealed = manifest.model_copy(update={"files": facts})
    write_json(bundle / MANIFEST, sealed.model_dump(mode="json", by_alias=True))
    write_text(bundle / SUMS, sums(sealed, sha256_file(bundle / MANIFEST)))
    return sealed


def sums(manifest: Manifest, own: str) -> str:
    """The text of SHA256SUMS; `own` is the hash of manifest.json."""
    rows = {name: fact.sha256 for name, fact in manifest.files.items()} | {MANIFEST: own}
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(rows.items()))


def damage(bundle: Path, manifest: Manifest) -> list[str]:
    """One sentence per file that is missing, changed, a link, or not listed; empty for a whole bundle."""
    problems = []
    for name, fact in manifest.files.items():
        path = bundle / name
        if path.is_symlink() or not path.resolve().is_relative_to(bundle.resolve()):
            problems.append(f"{name} is a link or leads out of the bundle")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != fact.bytes or sha256_file(path) != fact.sha256:
            problems.append(f"{name} does not have the hash it was shipped with")
    known = {*manifest.files, MANIFEST, SUMS}
    problems += [f"{name} is not listed in the manifest" for name in walk(bundle) if name not in known]
    return problems + _sums_damage(bundle, manifest)


def _sums_damage(bundle: Path, manifest: Manifest) -> list[str]:
    path = bundle / SUMS
    if path.is_symlink() or not path.is_file():
        return [f"{SUMS} is missing"]
    own, text = sha256_file(bundle / MANIFEST), path.read_bytes()
    if text == sums(manifest, own).encode():
        return []
    line = f"{own}  {MANIFEST}\n".encode()
    if line in text:
        return [f"{SUMS} does not say what {MANIFEST} says"]
    return [f"{MANIFEST} does not have the hash that {SUMS} states (one of the two was changed)"]


SUFFIXES = (".tar.gz", ".tgz")
MAX_BYTES, MAX_FILES = 16 * 2**30, 10_000


def is_archive(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def pack(bundle: Path, to: Path) -> Path:
    """Write every file of a folder, sorted, without owner and times: the same files give the same bytes."""
    with (
        atomic(to) as temporary,
        open(temporary, "wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in walk(bundle):
            info = tar.gettarinfo(bundle / name, arcname=name)
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mtime, info.mode = 0, 0o644
            with open(bundle / name, "rb") as file:
                tar.addfile(info, file)
    return to


def unpack(path: Path, to: Path) -> Path:
    """Unpack into the empty folder `to`.

    Plain files below `to` are all that is accepted: an absolute path, `..`, a link, a device, a name that comes twice,
    more than `MAX_FILES` files or `MAX_BYTES` in all are a `VssError` before anything is written.
    """
    try:
        with tarfile.open(path, "r:gz") as tar:
            members = _checked(path, tar)
            for member in members:
                target = to / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                with open(target, "xb") as file:
                    while chunk := source.read(2**20):
                        file.write(chunk)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise VssError(f"{path} cannot be unpacked ({error}); copy it again.") from error
    return to


def _checked(path: Path, tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    members, total, names = [], 0, set()
    for member in tar:
        if member.isdir():
            continue
        try:
            relative(member.name)
        except ValueError as error:
            raise VssError(f"{path} is refused: {error}.") from error
        if not member.isreg():
            raise VssError(f"{path} is refused: {member.name} is a link or a device; a bundle holds plain files.")
        if member.name in names:
            raise VssError(f"{path} is refused: it holds {member.name} twice.")
        names.add(member.name)
        total += member.size
        members.append(member)
        if total > MAX_BYTES or len(members) > MAX_FILES:
            raise VssError(f"{path} is refused: more than {MAX_FILES} files or {MAX_BYTES} bytes.")
    return members


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The folder of a bundle, or of an archive, unpacked for as long as it is open."""
    if not is_archive(path):
        yield path
        return
    if not path.is_file():
        raise VssError(f"{path} does not exist; expected a bundle.")
    with tempfile.TemporaryDirectory(prefix="vss-bundle-") as folder:
        yield unpack(path, Path(folder))
