"""Parameters and multiply-accumulates as a function of the kept widths, without rebuilding the network.

Every tensor's kept size is the product of its kept dims; a convolution costs (kept weight elements) x (output
positions), a transposed one (kept weight elements) x (input positions), a linear layer (elements) x (rows). So

    cost = sum over tensors t of  coefficient_t * prod over dims d of  kept(t, d)

where a coefficient is 1 for parameters and the number of positions for MACs. One MAC is one multiply and one add.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vss.prune.groups import Group

_COUNTED = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class CostModel:
    """Shapes and coefficients of one network at one input size."""

    shapes: dict[str, tuple[int, ...]]
    positions: dict[str, int]
    parameters: frozenset[str]

    @classmethod
    def measure(
        cls, model: nn.Module, example: Tensor, *, forward: Callable[[nn.Module, Tensor], Any] | None = None
    ) -> CostModel:
        """One forward of `example` (N, 3, H, W); counts are per image. Auxiliary heads do not count."""
        positions: dict[str, int] = defaultdict(int)
        hooks = [
            module.register_forward_hook(_counter(f"{name}.weight", positions))
            for name, module in model.named_modules()
            if isinstance(module, _COUNTED)
        ]
        training = {module: module.training for module in model.modules()}
        try:
            with torch.no_grad():
                (forward or nn.Module.__call__)(model.eval(), example)
        finally:
            for module, flag in training.items():
                module.training = flag
            for hook in hooks:
                hook.remove()
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        for name in positions.keys() - shapes:  # of a parametrised layer, whose weight is computed
            layer: Any = model.get_submodule(name.rpartition(".")[0])
            shapes[name] = tuple(layer.weight.shape)
        per_image = {name: count // example.shape[0] for name, count in positions.items()}
        return cls(shapes, per_image, frozenset(name for name, _ in model.named_parameters()))

    def total(self, kind: str, groups: list[Group], kept: list[int]) -> float:
        """Cost with `kept[i]` channels left in `groups[i]`; kind is "params", "macs" or "channels"."""
        if kind == "channels":
            return float(sum(kept))
        lost: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for group, count in zip(groups, kept, strict=True):
            for slot in group.slots:
                lost[slot.tensor][slot.dim] += (group.channels - count) * slot.block
        coefficients = self.positions if kind == "macs" else dict.fromkeys(self.parameters, 1)
        total = 0
        for name, coefficient in coefficients.items():
            size = 1
            for dim, length in enumerate(self.shapes[name]):
                size *= length - lost[name][dim] if name in lost else length
            total += coefficient * size
        return float(total)


def _counter(weight: str, positions: dict[str, int]) -> Callable[..., None]:
    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            positions[weight] += output.numel() // module.out_features
        elif module.transposed:
            positions[weight] += inputs[0].numel() // module.in_channels
        else:
            positions[weight] += output.numel() // module.out_channels

    return hook


def count(model: nn.Module, size: tuple[int, int]) -> dict[str, float]:
    """`params_m` (million parameters) and `macs_g` (giga multiply-accumulates) of one image of `size` (H, W)."""
    example = torch.zeros(1, 3, *size, device=next(model.parameters()).device)
    cost = CostModel.measure(model, example)
    return {"params_m": cost.total("params", [], []) / 1e6, "macs_g": cost.total("macs", [], []) / 1e9}
