"""What a latency table is made of: one network that can be run, timed and measured up at any widths."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import nn

from vss.deploy.profile.setting import Setting, groups_and_key
from vss.deploy.profile.units import Graph, Reading, Shape, anchor, read_engine, read_onnx, unit_shapes
from vss.deploy.profile.variants import SlicedVariants, Variants, make_variants
from vss.prune.latency import Affine
from vss.prune.plan import Group

if TYPE_CHECKING:
    from vss.data.transforms import Preprocess


class Subject(Protocol):
    """A network under measurement; widths are channels kept per group, in the order of `groups`."""

    groups: list[Group]
    key: dict[str, Any]

    def read(self, widths: Sequence[int]) -> Reading: ...
    def shapes(self, widths: Sequence[int]) -> dict[str, Shape]: ...


class OnnxSubject:
    """A network in onnxruntime or in TensorRT, from uint8 pixels to labels (or to a decision).

    Args:
        variants: files of it at any widths.
        key: what the times hold for; see `vss.deploy.profile.setting.table_key`.
        size: (H, W).
        setting: where it runs.
        seconds: length of one reading.
    """

    def __init__(
        self, variants: Variants, key: dict[str, Any], setting: Setting, *, size: tuple[int, int], seconds: float = 0.4
    ) -> None:
        self.variants, self.groups, self.key = variants, variants.groups, key
        self._setting, self._seconds = setting, seconds
        pixels = np.random.default_rng(0).integers(0, 256, (setting.batch, *size, 3), dtype=np.uint8)
        self._feed, self._graph = {"image": pixels}, Graph.of(self._model([g.channels for g in self.groups]))

    def _model(self, widths: Sequence[int]) -> Any:
        import onnx

        if isinstance(self.variants, SlicedVariants):
            return self.variants.graph(widths, empty=True)
        with tempfile.TemporaryDirectory() as folder:
            return onnx.load(str(self.variants.write(widths, Path(folder) / "variant.onnx")))

    def read(self, widths: Sequence[int]) -> Reading:
        """Time one variant."""
        with tempfile.TemporaryDirectory() as folder:
            path = self.variants.write(widths, Path(folder) / "variant.onnx")
            return read_file(
                path, self._feed, self._setting, graph=self._graph, shapes=lambda: self.shapes(widths),
                seconds=self._seconds,
            )  # fmt: skip

    def shapes(self, widths: Sequence[int]) -> dict[str, Shape]:
        """Sizes of every unit."""
        return unit_shapes(self._model(widths), self._setting.batch)


def read_file(
    path: Path,
    feed: Mapping[str, np.ndarray],
    setting: Setting,
    *,
    graph: Graph,
    shapes: Callable[[], Mapping[str, Shape]],
    seconds: float,
) -> Reading:
    """Time a float32 ONNX file, unit by unit, in the precision and the runtime of a setting.

    Args:
        path: the file; what is made of it is put beside it.
        feed: its input.
        graph: the exported graph by which units are named; widths do not matter.
        shapes: sizes of the units at its widths; asked for where one engine layer does the work of several.
        seconds: at least so long.
    """
    if setting.backend == "tensorrt":
        session: Any = setting.engine(path, path.with_suffix(""))
        try:
            return read_engine(session, feed, graph=graph, shapes=shapes, seconds=seconds)
        finally:
            session.close()
    source = setting.typed(path, path.with_suffix(f".{setting.precision}.onnx"))
    with setting.held():
        return read_onnx(source, feed, threads=setting.on_threads or 1, graph=graph, seconds=seconds)


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
    setting.check()
    groups, key = groups_and_key(model, preprocess.size, setting)
    if setting.backend == "torch":
        from vss.deploy.profile.modules import TorchSubject

        return TorchSubject(model, groups, key, setting, preprocess=preprocess, seconds=seconds)
    variants = make_variants(model, groups, folder, preprocess=preprocess, options=setting.options)
    return OnnxSubject(variants, key, setting, size=preprocess.size, seconds=seconds)


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
