"""Any module to ONNX: its own inputs and outputs as they are, from an example, proven equal to the module on CPU."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vss.core.closeness import relative_difference
from vss.core.errors import VssError, one_line
from vss.core.example import Example, Forward, call, mapped, named_tensors
from vss.core.networks import settled
from vss.deploy.backends import BACKENDS
from vss.deploy.graph import Declared
from vss.deploy.parity import CLOSE, Tolerance


class AnyGraph(nn.Module):
    """A module whose inputs and outputs are tensors with names, whatever its example and its outputs are nested in.

    Args:
        model: the network, in evaluation mode.
        example: what it is called with: a tensor, a tuple of arguments or a mapping of keyword arguments; what is no
            tensor in it stays as it is.
        forward: how it is called; (model, example) -> outputs.

    Attributes:
        inputs: name -> tensor of the example.
        names: of the outputs: keys of a mapping or fields of an object, else `logits` for one map and `output`.
    """

    def __init__(self, model: nn.Module, example: Example, forward: Forward | None = None) -> None:
        super().__init__()
        self.model, self.example, self.call = model, example, forward or call
        self.inputs = dict(_inputs(model, example))
        if not self.inputs:
            raise VssError("the example holds no tensor; give a tensor, a tuple of arguments or a dict of keywords.")
        with torch.no_grad():
            try:
                found = self.call(model, example)
            except Exception as error:
                shapes = {name: tuple(value.shape) for name, value in self.inputs.items()}
                raise VssError(
                    f"the network does not take the example {shapes} ({type(error).__name__}: "
                    f"{one_line(str(error)).rstrip('.')}); give another example=, or forward=lambda net, x: ...."
                ) from error
        pairs = list(named_tensors(found))
        named = dict(pairs)
        if not named:
            raise VssError(
                f"the output is a {type(found).__name__} in which no tensor was found; give forward=lambda net, x: "
                "..., which returns tensors."
            )
        if len(named) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in named if names.count(name) > 1)
            raise VssError(f"two outputs would be called {twice!r}; give forward=lambda net, x: ..., with other names.")
        only = next(iter(named.values()))
        single = len(named) == 1 and isinstance(found, Tensor)
        names = [("logits" if only.ndim == 4 else "output")] if single else list(named)
        self.names = [f"{name}_out" if name in self.inputs else name for name in names]  # a file has each name once

    def __repr__(self) -> str:
        """As `SegGraph`'s."""
        return f"{type(self).__name__}({type(self.model).__name__})"

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors of `inputs`, in order. Returns those of `names`, in order."""
        left = iter(tensors)
        example = mapped(self.example, lambda value: next(left))
        return tuple(value for _, value in named_tensors(self.call(self.model, example)))


def _inputs(model: nn.Module, example: Example) -> Iterator[tuple[str, Tensor]]:
    if isinstance(example, Tensor):
        yield ("image" if example.ndim == 4 and example.is_floating_point() else "input"), example
    elif isinstance(example, Mapping):
        yield from named_tensors(example)
    elif isinstance(example, tuple | list):
        names = list(inspect.signature(model.forward).parameters)
        for index, value in enumerate(example):
            name = names[index] if index < len(names) and len(names) >= len(example) else f"input{index}"
            yield from named_tensors(value, name)


def batched(graph: AnyGraph, batch: int | None) -> tuple[list[Tensor], list[bool]]:
    """The example's tensors with `batch` images (2 where that is free), and which of them have a batch.

    The first dimension is that of the batch where it is as long as that of the first image, or first input.
    """
    values = list(graph.inputs.values())
    lead = next((value for value in values if value.ndim == 4), values[0])
    count = lead.shape[0] if lead.ndim else 0
    has = [bool(value.ndim) and bool(count) and value.shape[0] == count for value in values]
    wanted = batch or 2
    repeats = math.ceil(wanted / max(count, 1))
    shaped = [
        torch.cat([value] * repeats)[:wanted].contiguous() if batch_first else value
        for value, batch_first in zip(values, has, strict=True)
    ]
    return shaped, has


def declared(graph: AnyGraph, tensors: Sequence[Tensor], has: Sequence[bool], batch: int | None) -> dict[str, Declared]:
    """What the file must declare of its inputs."""
    return {
        name: (
            str(value.dtype).removeprefix("torch."),
            (_lead(value, first, batch), *value.shape[1:]) if value.ndim else (),
        )
        for name, value, first in zip(graph.inputs, tensors, has, strict=True)
    }


def _lead(value: Tensor, first: bool, batch: int | None) -> int | str:
    return "batch" if first and batch is None else int(value.shape[0])


def drawn(tensors: Sequence[Tensor], has: Sequence[bool], count: int, seed: int) -> list[Tensor]:
    """Inputs of `count` images like the example: noise of its mean and spread; numbers that are not floating stay."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for value, first in zip(tensors, has, strict=True):
        shape = (count, *value.shape[1:]) if first else tuple(value.shape)
        if value.is_floating_point():
            spread = float(value.std()) if value.numel() > 1 else 0.0
            noise = torch.randn(shape, generator=generator) * (spread or 1.0) + float(value.mean())
            found.append(noise.to(value.dtype))
        else:
            found.append(torch.cat([value] * math.ceil(count / len(value)))[:count] if first else value)
    return found


def parity(
    graph: AnyGraph,
    onnx: Path,
    tensors: Sequence[Tensor],
    has: Sequence[bool],
    batches: Sequence[int],
    tolerance: Tolerance | None,
) -> dict[str, Any]:
    """The module and onnxruntime (CPU) on the example and on noise like it; raises outside the tolerance.

    Where float32 itself is the larger part of a difference, float64 is the judge, as for networks of images.
    """
    limit = (tolerance or Tolerance()).relative
    rows = []
    with BACKENDS["onnxruntime"].open(onnx) as session, torch.no_grad():
        for seed, count in enumerate(batches):
            feed = drawn(tensors, has, count, seed)
            wanted = graph(*feed)
            arrays = {name: value.numpy() for name, value in zip(graph.inputs, feed, strict=True)}
            got = session.run({name: arrays[name] for name in session.inputs})
            row: dict[str, Any] = {"input": {name: list(value.shape) for name, value in arrays.items()}}
            pairs = [(w, torch.from_numpy(got[name])) for name, w in zip(graph.names, wanted, strict=True)]
            row["max_rel"] = max(_difference(w, g) for w, g in pairs)
            row["max_abs"] = max(float((w.double() - g.double()).abs().max()) if w.numel() else 0.0 for w, g in pairs)
            allowed = limit
            if row["max_rel"] > CLOSE:
                exact = copy.deepcopy(graph).double()(*(v.double() if v.is_floating_point() else v for v in feed))
                row["own_rel"] = max(_difference(e, w) for e, w in zip(exact, wanted, strict=True))
                row["exact_rel"] = max(_difference(e, g) for e, (_, g) in zip(exact, pairs, strict=True))
                allowed = max(limit, 2 * row["own_rel"])
            if not row.get("exact_rel", row["max_rel"]) <= allowed:
                raise VssError(f"the ONNX differs from torch at {row['input']}: {row}, allowed {allowed:.3g}.")
            rows.append(row)
    return {"shapes": rows, **{key: max(row[key] for row in rows) for key in ("max_abs", "max_rel")}}


def _difference(wanted: Tensor, got: Tensor) -> float:
    """Largest difference over the spread, or over a tenth of the largest value: an output of a few numbers that are
    nearly equal, such as a mean of each image, has next to no spread of its own."""
    wanted, got = wanted.double(), got.double()
    found = relative_difference(wanted, got)
    if not 0 < found < math.inf:
        return found
    return min(found, float((wanted - got).abs().max()) / max(0.1 * float(wanted.abs().max()), 1e-30))


def open_graph(model: nn.Module, example: Example, forward: Forward | None) -> AnyGraph:
    """A copy of the network on the CPU, in evaluation mode, with its names."""
    network = settled(model)
    example = mapped(example, lambda value: value.detach().cpu())
    return AnyGraph(network, example, forward).eval()
