"""One evaluation for everything that predicts: a torch network and an engine go through the same function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vss import ops
from vss.core.closeness import ENGINE, NETWORK, refuse_not_finite
from vss.core.errors import VssError, shown, steadily
from vss.train.metrics import boundary_counts, confusion_per_image, scores

if TYPE_CHECKING:
    from vss.data.preprocess import Preprocess

Predictor = Callable[[Tensor], Any]
"""uint8 (N, 3, H, W) RGB -> integer (N, H, W) labels; of a defect network {"decision": (N, 1), "seg": (N, 1, h, w)},
float logits."""

ADVICE = "nothing can be scored: use larger images, or masks with classes"

HEADS = ("decision", "seg")


class _Session(Protocol):
    @property
    def inputs(self) -> Mapping[str, Any]: ...
    @property
    def outputs(self) -> Mapping[str, Any]: ...
    @property
    def images(self) -> dict[str, Any] | None: ...
    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...
    def probe(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...


def evaluate(
    predict: Predictor,
    dataset: Dataset,
    *,
    num_classes: int,
    class_names: Sequence[str],
    ignore_index: int = 255,
    batch_size: int = 8,
    workers: int = 0,
    boundary: bool = True,
    per_image: bool = False,
) -> dict[str, Any]:
    """Score a predictor over a split, from one confusion matrix.

    Args:
        predict: see `Predictor`; from `torch_predictor`, `engine_predictor` or anywhere else.
        dataset: `[i]` -> {"image": uint8 (3, H, W), "mask": int64 (H, W)}, all of one size.
        class_names: K names, in label order.
        boundary: also boundary IoU.
        per_image: also `confusion_per_image`, an (n, K, K) int64 numpy array in the order of the dataset, for the
            bootstrap of `vss.train.gate`; it is no JSON, take it out before writing the result.

    Returns:
        The scores of `vss.train.metrics.scores` and `boundary_iou_pct`, in percent; `classes`, `images` (their number)
        and `resolution` [H, W] at which truth and prediction were compared.

    Raises:
        NotFinite: the predictor's network or engine gives NaN or infinity.
        VssError: an empty split, a class count that does not fit, labels of another shape or outside of the classes.
    """
    total = len(dataset)  # type: ignore[arg-type]
    if not total:
        raise VssError("the split holds no images; nothing can be evaluated.")
    if len(class_names) != num_classes:
        raise VssError(f"{len(class_names)} class names for {num_classes} classes.")
    confusions: list[Tensor] = []
    edges = torch.zeros(2, num_classes, dtype=torch.int64)
    resolution = [0, 0]
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers)
    for batch in steadily(loader, "evaluate: batch", len(loader)):
        target = batch["mask"]
        labels = predict(batch["image"]).to("cpu")
        if labels.shape != target.shape or labels.is_floating_point():
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise VssError(f"the predictor gave {got}; expected integer labels of shape {tuple(target.shape)}.")
        confusions.append(confusion_per_image(labels, target, num_classes, ignore_index))
        if boundary:
            edges += boundary_counts(labels, target, num_classes, ignore_index)
        resolution = list(target.shape[-2:])
    confusion = torch.cat(confusions)
    if not confusion.any():
        raise VssError(f"no labelled pixel is left in {total} masks at {resolution[0]}x{resolution[1]}; {ADVICE}.")
    result = scores(confusion.sum(0), edges if boundary else None)
    result |= {"classes": list(class_names), "images": total, "resolution": resolution}
    return result | ({"confusion_per_image": confusion.numpy()} if per_image else {})


def torch_predictor(
    model: nn.Module, preprocess: Preprocess, device: str | torch.device = "cpu", *, method: str = "predict"
) -> Predictor:
    """A predictor from a SegModel, which is moved to `device` and set to eval mode here and now.

    `method`: which of its methods predicts, "predict" or, for the heads of a defect network, "forward_train".
    """
    network: Any = model.to(device).eval()

    def predict(images: Tensor) -> Any:
        x = preprocess.normalise(images.to(device, non_blocking=True))
        with torch.inference_mode():
            if method != "predict":
                return _finite(getattr(network, method)(x))
            network.check_size(x)
            logits = _finite(network.forward_logits(x))
            return ops.seg_argmax(logits, tuple(x.shape[-2:]), network.align_corners)

    return predict


def _finite(found: object) -> Any:
    refuse_not_finite(found.values() if isinstance(found, Mapping) else (found,), "the network", NETWORK)
    return found


def engine_predictor(session: _Session, preprocess: Preprocess) -> EnginePredictor:
    """A predictor from an opened engine; what has to be done around it is read off its bindings."""
    return EnginePredictor(session, preprocess)


class EnginePredictor:
    """uint8 (N, 3, H, W) RGB -> labels or heads, by way of `feed`, `infer` and `finish`; a benchmark times each.

    The input `image` is uint8 NHWC (normalisation in the graph) or floating-point NCHW (normalised here); the output
    is `labels`, or `logits` of any resolution, or the heads `decision` and `seg` of a defect network. An engine with a
    fixed batch gets the last images repeated.

    Raises:
        VssError: bindings that are none of these, or an engine for another size, mean or std than `preprocess`.
    """

    def __init__(self, session: _Session, preprocess: Preprocess) -> None:
        said = session.images or {}
        for name in ("mean", "std") if said else ():
            if said[name] != list(getattr(preprocess, name)):
                raise VssError(
                    f"the engine takes images with the {name} {shown(said[name])} and is to be fed with "
                    f"{list(getattr(preprocess, name))}; export and evaluate with one preprocessing."
                )
        self.session, self.preprocess = session, preprocess
        self.batch, self.nhwc, self.dtype = _input(session, tuple(preprocess.size))
        self.output, self._probed = _output(session), False

    def __call__(self, images: Tensor) -> Any:
        """images: (N, 3, H, W) uint8. Returns (N, H, W) integer labels, or the heads; see `Predictor`."""
        chunks = images.split(self.batch) if self.batch else (images,)
        parts = [self.finish(self._checked(self.feed(chunk)), len(chunk)) for chunk in chunks]
        if self.output == HEADS:
            return {name: torch.cat([part[name] for part in parts]) for name in HEADS}
        return torch.cat(parts)

    def _checked(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs, all of them finite; the logits behind labels are looked at for the first images alone."""
        outputs = self.infer(feed)
        floats = [value for value in outputs.values() if value.dtype.kind == "f"]
        if not floats and not self._probed:
            floats, self._probed = list(self.session.probe(feed).values()), True
        refuse_not_finite(floats, "the engine", ENGINE)
        return outputs

    def feed(self, images: Tensor) -> dict[str, np.ndarray]:
        """Pad to the engine's batch, normalise or reorder, copy to contiguous host memory."""
        if self.batch and len(images) < self.batch:
            images = torch.cat([images, images[-1:].expand(self.batch - len(images), -1, -1, -1)])
        if self.nhwc:
            return {"image": np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())}
        floats = self.preprocess.normalise(images).cpu().numpy()
        return {"image": np.ascontiguousarray(floats, dtype=self.dtype)}

    def infer(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The engine alone, with the copies that its session makes."""
        return self.session.run(feed)

    def finish(self, outputs: Mapping[str, np.ndarray], count: int) -> Any:
        """Labels (count, H, W): the engine's own, or the argmax of its logits at the size of the input; or the heads,
        as they are."""
        found = {name: torch.from_numpy(outputs[name])[:count].float() for name in HEADS if name in self.output}
        if found:
            return found
        result = torch.from_numpy(outputs[self.output[0]])[:count]
        if self.output == ("labels",):
            return result
        height, width = self.preprocess.size
        return ops.seg_argmax(result, (height, width))


def _input(session: _Session, size: tuple[int, ...]) -> tuple[int | None, bool, str]:
    binding = session.inputs.get("image")
    if binding is None or len(session.inputs) != 1 or len(binding.shape) != 4:
        found = {name: str(each) for name, each in session.inputs.items()}
        raise VssError(f"the engine takes {found}; expected one input 'image' of four dimensions: export it with vss.")
    batch, *rest = binding.shape
    nhwc = binding.dtype == "uint8" and rest[2] == 3
    if not nhwc and not (binding.dtype in ("float32", "float16") and rest[0] == 3):
        raise VssError(
            f"the engine takes image as {binding}; expected uint8 (N, H, W, 3) or float32 (N, 3, H, W): "
            "export it with vss."
        )
    sides = rest[:2] if nhwc else rest[1:]
    if any(have not in (None, want) for have, want in zip(sides, size, strict=True)):
        raise VssError(
            f"the engine is built for {sides[0]} x {sides[1]} and the preprocessing gives {size[0]} x {size[1]}; "
            "export and evaluate at the same size."
        )
    return batch, nhwc, binding.dtype


def _output(session: _Session) -> tuple[str, ...]:
    known: tuple[tuple[str, ...], ...] = (("labels",), ("logits",), HEADS)
    found = next((names for names in known if all(name in session.outputs for name in names)), None)
    if found is None:
        raise VssError(
            f"the engine gives {sorted(session.outputs)}; expected 'labels' or 'logits', or 'decision' and 'seg'."
        )
    return found
