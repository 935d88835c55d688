"""What a latency table is made of: one network that can be run, timed and measured up at any widths."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
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


def table_key(
    model: Any,
    groups: Sequence[Group],
    *,
    backend: str,
    device: str,
    size: tuple[int, int],
    batch: int,
    threads: int,
    precision: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What a table holds for: the network's shapes, and where and how it runs. All JSON types."""
    about = environment()
    gpu = device.startswith("cuda")
    driver = about["devices"][0]["driver"] if gpu and about["devices"] else None
    package = {"torch": ["torch"], "onnxruntime": ["onnxruntime", "onnxruntime-gpu"], "tensorrt": ["tensorrt"]}
    versions = {name: about["packages"][name] for name in package.get(backend, []) if name in about["packages"]}
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    members = [[group.id, group.channels, group.unit] for group in groups]
    return {
        "device": about["machine"],
        "driver": driver,
        "versions": versions,
        "backend": backend,
        "precision": precision,
        "resolution": list(size),
        "batch": batch,
        "threads": None if gpu else threads,
        "network": getattr(model, "name", "") or type(model).__name__,
        "shapes_sha256": sha256_json([shapes, members, sorted(options.items())]),
    }


def open_subject(
    model: nn.Module,
    folder: Path,
    *,
    preprocess: Preprocess,
    backend: str = "onnxruntime",
    device: str = "cpu",
    threads: int | None = None,
    batch: int = 1,
    precision: str = "fp32",
    keep: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    seconds: float = 0.4,
) -> Subject:
    """A network ready to be measured.

    Args:
        model: uncut, or cut before.
        folder: for the exported file.
        preprocess: size and normalisation of the engine.
        backend: "onnxruntime" (CPU) or "torch".
        device, precision: of torch: "cpu" or "cuda", "fp32" or "fp16".
        threads: None for one per usable core.
        keep: layers whose channels stay.
        options: of the export; default labels=True.
        seconds: length of one reading.
    """
    groups = list(find_groups(model, example_of(preprocess.size), keep=keep))
    options = {"labels": True} if options is None else dict(options)
    count, size = usable_threads(threads), preprocess.size
    where: dict[str, Any] = {"backend": backend, "device": device, "precision": precision, "size": size}
    key = table_key(model, groups, **where, batch=batch, threads=count, options=options)
    if backend == "onnxruntime":
        if device != "cpu" or precision != "fp32":
            raise VssError(f"onnxruntime tables are of fp32 on the cpu; {precision} on {device} needs backend torch.")
        variants = make_variants(model, groups, folder, preprocess=preprocess, options=options)
        return OnnxSubject(variants, key, size=size, threads=count, batch=batch, seconds=seconds)
    if backend == "torch":
        from vss.latency.modules import TorchSubject

        return TorchSubject(
            model, groups, key, size=size, threads=count, batch=batch, device=device, precision=precision,
            seconds=seconds,
        )  # fmt: skip
    raise VssError(f"there is no way to time the layers of {backend}; expected onnxruntime or torch.")


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
