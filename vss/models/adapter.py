"""Any segmentation network as a `SegModel`: pruned, saved, reloaded and exported with no change to vss.

>>> model = wrap(torchvision.models.segmentation.lraspp_mobilenet_v3_large(num_classes=11), num_classes=11)
... # doctest: +SKIP
>>> small = apply_plan(model, make_plan(model, example))           # doctest: +SKIP
>>> vss.save(small, "small.safetensors")                           # doctest: +SKIP
>>> vss.load("small.safetensors", model=wrap(fresh_network(), num_classes=11))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vss.core.errors import VssError, listed, one_line
from vss.core.example import input_channels
from vss.models.base import SegModel


class Wrapped(SegModel):
    """A network of another library or of a user, see `wrap`; it lives under `net` and its state dict under `net.`."""

    def __init__(
        self, net: nn.Module, *, num_classes: int, name: str, output: str | int | None = None, size_multiple: int = 1
    ) -> None:
        super().__init__(num_classes)
        self.net, self.name, self.output, self.size_multiple = net, name, output, size_multiple
        self.jumps = any(isinstance(part, nn.MaxUnpool1d | nn.MaxUnpool2d | nn.MaxUnpool3d) for part in net.modules())

    def forward_logits(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W). Returns (N, K, h, w): the main output as the network gives it."""
        return next(iter(self.heads(x).values()))

    def forward_train(self, x: Tensor) -> dict[str, Tensor]:
        """All outputs, each (N, K, H, W): `out` first, the others under their own keys or `aux1`, `aux2`, ..."""
        self.check_size(x)
        return {key: self.resize(value, x) for key, value in self.heads(x).items()}

    def heads(self, x: Tensor) -> dict[str, Tensor]:
        """x: (N, 3, H, W). Returns the network's own outputs, `out` first; outputs that are no maps are left out."""
        found = self.net(x)
        main, outputs = _outputs(found, self.output, self.name)
        logits = outputs.pop(main)
        if not torch.compiler.is_exporting() and (logits.ndim != 4 or logits.shape[1] != self.num_classes):
            raise VssError(
                f"{self.name} gives a main output {tuple(logits.shape)}, expected (N, {self.num_classes}, h, w);"
                " say which output is meant with wrap(..., output=...) or correct num_classes."
            )
        names = (key if isinstance(key, str) and key != "out" else f"aux{key}" for key in outputs)
        return {"out": logits, **dict(zip(names, outputs.values(), strict=True))}


def _outputs(found: Any, output: str | int | None, name: str) -> tuple[str | int, dict[str | int, Tensor]]:
    """The key of the main output and all outputs that are maps."""
    if isinstance(found, Tensor):
        table: dict[str | int, Tensor] = {0: found}
    elif isinstance(found, Mapping):
        table = dict(found)
    elif isinstance(found, Sequence) and not isinstance(found, str):
        table = dict(enumerate(found))
    elif hasattr(found, "__dict__") and not isinstance(found, nn.Module):  # a dataclass, or another plain object
        table = dict(vars(found))
    else:
        raise VssError(
            f"{name} returns a {type(found).__name__}; expected a tensor, or a mapping, sequence or plain object of "
            "tensors: give another forward, which returns the logits (forward=lambda net, x: ... in Python)."
        )
    maps = {key: value for key, value in table.items() if isinstance(value, Tensor) and value.ndim == 4}
    if not maps:
        given = [f"{value.dtype} {tuple(value.shape)}" for value in table.values() if isinstance(value, Tensor)]
        raise VssError(
            f"{name} gives {listed(given) if given else 'no tensor'} and no map of scores (N, K, h, w); give another "
            "forward, which returns the logits (forward=lambda net, x: ... in Python)."
        )
    main = output if output is not None else next((key for key in ("out", "logits") if key in maps), next(iter(maps)))
    if main not in maps:
        raise VssError(
            f"{name} has no output map {main!r}; it gives {', '.join(map(repr, maps))} of (N, K, h, w): say which is "
            "meant with wrap(..., output=...)."
        )
    return main, maps


SIZES = ((64, 64), (224, 224), (256, 256), (512, 512))
"""Images that a network is tried with: usual ones, and those of networks of one size alone."""


def as_seg_model(net: nn.Module, size: tuple[int, int]) -> SegModel:
    """A plain network wrapped, with as many classes as its main output for images of `size` has channels."""
    name = type(net).__name__.lower()
    return wrap(net, num_classes=channels_given(net, name, [size]))


@torch.no_grad()
def channels_given(net: nn.Module, name: str, sizes: Sequence[tuple[int, int]] = SIZES) -> int:
    """K of the main output, from a run on an image of the first of `sizes` that the network takes."""
    training, faults = net.training, []
    like = next(net.parameters(), torch.zeros(0))
    for size in sizes:
        image = torch.zeros(1, input_channels(net), *size, device=like.device)
        try:
            main, outputs = _outputs(net.eval()(image), None, name)
            return int(outputs[main].shape[1])
        except VssError:
            raise
        except Exception as error:  # whatever the user's network raises on a size that it does not take
            faults.append(f"{type(error).__name__}: {one_line(str(error)).rstrip('.')}")
        finally:
            net.train(training)
    tried = ", ".join(f"{height}x{width}" for height, width in sizes)
    raise VssError(
        f"{name} runs on no image of {tried} pixels ({faults[0]}), so its number of classes is not known; give another "
        "size, the number itself (num_classes=K), or example= for another kind of input."
    )


def wrap(
    module: nn.Module,
    *,
    num_classes: int,
    name: str | None = None,
    output: str | int | None = None,
    size_multiple: int = 1,
) -> SegModel:
    """Make any segmentation network a `SegModel`.

    Args:
        module: (N, 3, H, W) -> (N, K, h, w), or a mapping (torchvision: `out`, `aux`) or sequence of such maps. It is
            used as it is, not copied.
        num_classes: K, 1 to 256.
        name: what checkpoints and plans call it; default is the class name in lower case. A network that is loaded by
            name alone must be registered: `MODELS.add(name, factory)`.
        output: key or position of the main output; default `out`, else the first.
        size_multiple: H and W of an input must be multiples of this (32 for most encoders).

    Returns:
        A `SegModel` whose `forward` resizes the main output to the input's size.
    """
    if not 1 <= num_classes <= 256:
        raise VssError(f"num_classes is {num_classes}; expected 1 to 256, since labels are uint8.")
    if size_multiple < 1:
        raise VssError(f"size_multiple is {size_multiple}; expected 1 or more.")
    if isinstance(module, SegModel):
        raise VssError(f"{type(module).__name__} is a SegModel already; use it as it is.")
    return Wrapped(
        module,
        num_classes=num_classes,
        name=name or type(module).__name__.lower(),
        output=output,
        size_multiple=size_multiple,
    )
