"""What a latency table is made of: one network that can be run, timed and measured up at any widths."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from vss.environment import environment
from vss.errors import VssError
from vss.files import sha256_json
from vss.latency.fit import Affine
from vss.latency.reading import Reading, pinned, read_onnx, usable_threads
from vss.latency.units import Graph, Shape, anchor, unit_shapes
from vss.latency.variants import SlicedVariants, Variants, example_of, make_variants
from vss.prune import find_groups
from vss.prune.groups import Group

if TYPE_CHECKING:
    from vss.data.transforms import Preprocess


class Subject(Protocol):
    """A network under measurement; widths are channels kept per group, in the order of `groups`."""

    groups: list[Group]
    key: dict[str, Any]

    def read(self, widths: Sequence[int]) -> Reading: ...
    def shapes(self, widths: Sequence[int]) -> dict[str, Shape]: ...


class OnnxSubject:
    """A network in onnxruntime on the CPU, from uint8 pixels to labels (or to a decision).

    Args:
        variants: files of it at any widths.
        key: what the times hold for; see `table_key`.
        size: (H, W).
        threads: within an operator; the cores are pinned while it runs.
        batch: images.
        seconds: length of one reading.
    """

    def __init__(
        self,
        variants: Variants,
        key: dict[str, Any],
        *,
        size: tuple[int, int],
        threads: int,
        batch: int = 1,
        seconds: float = 0.4,
    ) -> None:
        self.variants, self.groups, self.key = variants, variants.groups, key
        self._threads, self._batch, self._seconds = threads, batch, seconds
        pixels = np.random.default_rng(0).integers(0, 256, (batch, *size, 3), dtype=np.uint8)
        self._feed, self._graph = {"image": pixels}, Graph.of(self._model([g.channels for g in self.groups]))

    def _model(self, widths: Sequence[int]) -> Any:
        import onnx

        if isinstance(self.variants, SlicedVariants):
            return self.variants.graph(widths, empty=True)
        with tempfile.TemporaryDirectory() as folder:
            return onnx.load(str(self.variants.write(widths, Path(folder) / "variant.onnx")))

    def read(self, widths: Sequence[int]) -> Reading:
        """Profile one variant."""
        with tempfile.TemporaryDirectory() as folder, pinned(self._threads):
            path = self.variants.write(widths, Path(folder) / "variant.onnx")
            return read_onnx(path, self._feed, threads=self._threads, graph=self._graph, seconds=self._seconds)

    def shapes(self, widths: Sequence[int]) -> dict[str, Shape]:
        """Sizes of every unit."""
        return unit_shapes(self._model(widths), self._batch)


@dataclass(frozen=True)
class Setting:
    """Where and how a network runs.

    Attributes:
        backend: "onnxruntime" (CPU) or "torch".
        device, precision: of torch: "cpu" or "cuda", "fp32" or "fp16".
        threads: None for one per usable core.
        batch: images.
        options: of the export, such as labels=True.
        keep: layers whose channels stay.
    """

    backend: str = "onnxruntime"
    device: str = "cpu"
    precision: str = "fp32"
    threads: int | None = None
    batch: int = 1
    options: Mapping[str, Any] = field(default_factory=lambda: {"labels": True})
    keep: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.backend not in ("onnxruntime", "torch"):
            raise VssError(
                f"the layers of {self.backend} cannot be timed here; prune to a time on onnxruntime or torch."
            )
        if self.backend == "onnxruntime" and (self.device, self.precision) != ("cpu", "fp32"):
            raise VssError(
                f"onnxruntime tables are of fp32 on the cpu; {self.precision} on {self.device} needs backend torch."
            )
        if self.precision not in ("fp32", "fp16"):
            raise VssError(f"precision is {self.precision!r}; expected fp32 or fp16.")


def table_key(model: Any, groups: Sequence[Group], size: tuple[int, int], setting: Setting) -> dict[str, Any]:
    """What a table holds for: the network's shapes, and where and how it runs. All JSON types."""
    about = environment()
    gpu = setting.device.startswith("cuda")
    driver = about["devices"][0]["driver"] if gpu and about["devices"] else None
    names = {"torch": ["torch"], "onnxruntime": ["onnxruntime", "onnxruntime-gpu"]}[setting.backend]
    versions = {name: about["packages"][name] for name in names if name in about["packages"]}
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    members = [[group.id, group.channels, group.unit] for group in groups]
    return {
        "device": about["machine"],
        "driver": driver,
        "versions": versions,
        "backend": setting.backend,
        "precision": setting.precision,
        "resolution": list(size),
        "batch": setting.batch,
        "threads": None if gpu else usable_threads(setting.threads),
        "network": getattr(model, "name", "") or type(model).__name__,
        "shapes_sha256": sha256_json([shapes, members, sorted(setting.options.items())]),
    }


def groups_and_key(model: nn.Module, size: tuple[int, int], setting: Setting) -> tuple[list[Group], dict[str, Any]]:
    """The groups of a network and what a table of it holds for, (H, W) pixels."""
    groups = list(find_groups(model, example_of(size), keep=setting.keep))
    return groups, table_key(model, groups, size, setting)


def open_subject(
    model: nn.Module, folder: Path, preprocess: Preprocess, setting: Setting, *, seconds: float = 0.4
) -> Subject:
    """A network ready to be measured.

    Args:
        model: uncut, or cut before.
        folder: for the exported file; it must last as long as the subject.
        preprocess: size and normalisation of the engine.
        setting: where and how it runs.
        seconds: length of one reading.
    """
    groups, key = groups_and_key(model, preprocess.size, setting)
    share: dict[str, Any] = {"threads": usable_threads(setting.threads), "batch": setting.batch, "seconds": seconds}
    if setting.backend == "torch":
        from vss.latency.modules import TorchSubject

        share |= {"device": torch_device(setting.device), "precision": setting.precision}
        return TorchSubject(model, groups, key, size=preprocess.size, **share)
    variants = make_variants(model, groups, folder, preprocess=preprocess, options=setting.options)
    return OnnxSubject(variants, key, size=preprocess.size, **share)


def channels(subject: Subject, units: Sequence[str]) -> tuple[Affine, Affine]:
    """Channels that units read and write, as functions of widths, from the uncut network and one probe per group."""
    full = [group.channels for group in subject.groups]
    whole = subject.shapes(full)
    known = [anchor(unit, whole) or Shape(0, 0, 0, 0, 0) for unit in units]
    slopes = np.zeros((2, len(units), len(full)))
    for index, group in enumerate(subject.groups):
        if group.channels == group.unit:
            continue
        less = subject.shapes([count - group.unit * (i == index) for i, count in enumerate(full)])
        for row, unit in enumerate(units):
            now = anchor(unit, less)
            if now is not None:
                slopes[0, row, index] = (known[row].cin - now.cin) / group.unit
                slopes[1, row, index] = (known[row].cout - now.cout) / group.unit
    widths = np.array(full, float)
    cin, cout = (np.array([getattr(each, side) for each in known], float) for side in ("cin", "cout"))
    return Affine(np.maximum(cin, 1), slopes[0], widths), Affine(np.maximum(cout, 1), slopes[1], widths)


def torch_device(device: str) -> torch.device:
    """A torch device that is there, or the sentence that says it is not."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise VssError(f"device is {device} and torch sees no CUDA device; use device cpu.")
    return torch.device(device)
