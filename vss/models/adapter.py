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

from vss.core.errors import VssError
from vss.models.base import SegModel


class Wrapped(SegModel):
    """A network of another library or of a user; it lives under `net` and its state dict under `net.`.

    Args:
        net: (N, 3, H, W) -> a tensor, a mapping of tensors, or a sequence of tensors, all (N, K, h, w).
        num_classes: K of the main output.
        name: what checkpoints and plans call it.
        output: key or position of the main output among several.
        size_multiple: H and W of an input must be multiples of this.
    """

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
    else:
        raise VssError(
            f"{name} returns a {type(found).__name__}; expected a tensor, a mapping or a sequence of tensors."
        )
    table = {key: value for key, value in table.items() if isinstance(value, Tensor) and value.ndim == 4}
    main = output if output is not None else ("out" if "out" in table else next(iter(table), 0))
    if main not in table:
        raise VssError(f"{name} has no output map {main!r}; it gives {', '.join(map(repr, table)) or 'none'}.")
    return main, table


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
