"""What is exported: a network with its pre- and post-processing as one module of plain operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.core.example import input_channels
from vss.ops import onnx_nodes

if TYPE_CHECKING:
    from vss.data.preprocess import Preprocess

Declared = tuple[str, tuple[int | str, ...]]
"""What a file declares of an input or output: dtype name, and an int or a symbol per dimension."""
LABEL_DTYPES = {"int32": torch.int32, "uint8": torch.uint8}


class SegGraph(nn.Module):
    """`image` -> `logits` or `labels`; for a defect network -> `decision` and `seg`, both logits.

    Args:
        model: SegModel.
        preprocess: when given, the input is uint8 NHWC RGB and the normalisation is one Mul and one Add in the graph.
        labels: end in the argmax over the full-size logits.
        labels_dtype: "int32", or "uint8" by way of float32, since TensorRT casts to UINT8 from floating point only.
        native: labels from `model.predict`, which never makes full-size logits; for running in torch, not for export.
        half: the network gets float16, channels last, as its weights must be; logits come back in float32.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        preprocess: Preprocess | None = None,
        labels: bool = False,
        labels_dtype: str = "int32",
        native: bool = False,
        half: bool = False,
    ) -> None:
        super().__init__()
        if labels_dtype not in LABEL_DTYPES:
            raise VssError(f"labels_dtype is {labels_dtype!r}; expected one of {', '.join(LABEL_DTYPES)}.")
        self.model: Any = model
        self.nhwc, self.labels, self.native = preprocess is not None, labels, native
        self.half_in, self.channels = half, input_channels(model)
        if preprocess is not None and self.channels != 3:
            raise VssError(
                f"{self.model.name} takes {self.channels} channels, and preprocessing in the graph is for RGB; leave "
                "it out (--no-preprocess)."
            )
        self.dtype = LABEL_DTYPES[labels_dtype]
        self.defect = getattr(model, "task", "segmentation") == "defect"
        if self.defect and labels:
            raise VssError(f"{self.model.name} gives a decision and a defect map, no labels; leave labels off.")
        if preprocess is not None:
            mean, std = (torch.tensor(values, dtype=torch.float64) for values in (preprocess.mean, preprocess.std))
            self.register_buffer("scale", (1 / (255 * std)).float().view(1, 3, 1, 1), persistent=False)
            self.register_buffer("shift", (-mean / std).float().view(1, 3, 1, 1), persistent=False)

    def __repr__(self) -> str:
        """Its own name alone: torch's exporter prints what it traces, and a layer of another library may fail at it."""
        return f"{type(self).__name__}({type(self.model).__name__})"

    def outputs(self, sides: tuple[object, object]) -> dict[str, tuple[str, tuple[Any, ...]]]:
        """Name -> (dtype, shape without N) of every output, in order; `sides` are H and W of the image."""
        if self.defect:
            small = [side // self.model.stride for side in sides]
            return {"decision": ("float32", (1,)), "seg": ("float32", (1, *small))}
        if self.labels:
            return {"labels": (str(self.dtype).removeprefix("torch."), sides)}
        return {"logits": ("float32", (self.model.num_classes, *sides))}

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """image: (N, C, H, W) float32 normalised, or (N, H, W, 3) uint8 RGB.

        Returns (N, K, H, W) logits or (N, H, W) labels; of a defect network (N, 1) and (N, 1, h, w) logits.
        """
        if self.nhwc:
            image = image.to(torch.float32).permute(0, 3, 1, 2) * self.scale + self.shift
        if self.half_in:
            image = image.to(torch.float16, memory_format=torch.channels_last)
        if not self.labels:
            found: Tensor | tuple[Tensor, Tensor] = self.model(image)
            return _float(found) if self.half_in else found
        labels: Tensor
        if self.native:
            labels = self.model.predict(image)
            return labels.to(self.dtype)
        if onnx_nodes.writes_nodes():
            logits = self.model.forward_logits(image)
            labels = onnx_nodes.seg_argmax_node(logits, image, self.model.align_corners)
        else:
            labels = self.model(image).argmax(1)
        return labels.to(torch.float32).to(torch.uint8) if self.dtype == torch.uint8 else labels.to(self.dtype)


def _float(found: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    return (found[0].float(), found[1].float()) if isinstance(found, tuple) else found.float()
