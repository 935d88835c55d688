"""How a network is called, and what it gives: an example is a tensor, a tuple of arguments or a mapping of keywords.

Outputs may be nested in dicts, sequences, dataclasses or other plain objects (`SimpleNamespace`, a library's
`ModelOutput`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from vss.core.errors import VssError

if TYPE_CHECKING:
    from torch import Generator, Tensor, device, nn

T = TypeVar("T")
Example = Any
"""A tensor (N, C, H, W), a tuple or list of positional arguments, or a mapping of keyword arguments."""
Forward = Callable[["nn.Module", Example], object]
"""(network, example) -> outputs; how a network is called where `call` would not reach what matters."""
ADVICE = "give forward=lambda net, x: ..., which returns the logits"


def call(model: Any, example: Example) -> Any:
    """`model(x)`, `model(*args)` or `model(**kwargs)`."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple | list) else model(example)


def default_forward(model: object, example: Example) -> Any:
    """Call `forward_train` where the network has one (auxiliary heads included), else the network."""
    return call(getattr(model, "forward_train", model), example)


def mapped(example: Example, change: Callable[[Tensor], Tensor]) -> Example:
    """The example with every tensor changed, in order; what is no tensor in it stays."""
    from torch import Tensor

    if isinstance(example, Tensor):
        return change(example)
    if isinstance(example, Mapping):
        return {key: mapped(value, change) for key, value in example.items()}
    if isinstance(example, tuple | list):
        return tuple(mapped(value, change) for value in example)
    return example


def inputs_of(example: Example) -> list[Tensor]:
    """The tensors of an example, in order."""
    found: list[Tensor] = []

    def note(value: Tensor) -> Tensor:
        found.append(value)
        return value

    mapped(example, note)
    return found


def image_of(example: Example) -> Tensor:
    """The first input that holds images (three dims or more, floating point), else the first tensor."""
    tensors = inputs_of(example)
    images = [value for value in tensors if value.ndim >= 3 and value.is_floating_point()]
    if not tensors:
        raise VssError(
            f"the example is a {type(example).__name__} without a tensor; give a tensor (N, C, H, W), a tuple of "
            "arguments or a dict of keyword arguments."
        )
    return (images or tensors)[0]


def on(example: Example, where: device | str) -> Example:
    """The example on a device."""
    return mapped(example, lambda value: value.to(where))


def doubled(example: Example) -> Example:
    """The example in float64, as far as it is floating point."""
    return mapped(example, lambda value: value.double() if value.is_floating_point() else value)


def paired(example: Example) -> Example:
    """The example with two images where it has one: a batch norm in training needs two."""
    count = len(image_of(example)) if image_of(example).ndim else 0
    return mapped(example, lambda v: v.repeat(2, *(1,) * (v.ndim - 1)) if count == 1 and v.ndim and len(v) == 1 else v)


def drawn(example: Example, generator: Generator, scale: float = 1.0) -> Example:
    """The same shapes with random values; inputs that are no floating-point numbers stay."""
    import torch

    def draw(value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator).to(value) if value.is_floating_point() else value
        return scale * noise if value.is_floating_point() else value

    return mapped(example, draw)


def at_size(example: Example, size: tuple[int, int], batch: int) -> Example:
    """The example at another (H, W): inputs that lie on the image's grid are drawn new, zeros until then."""
    image = image_of(example)

    def shaped(value: Tensor) -> Tensor:
        if value.ndim < 3 or value.shape[-2:] != image.shape[-2:]:
            return value
        return value.new_zeros(batch, *value.shape[1:-2], *size)

    return mapped(example, shaped)


def input_channels(model: nn.Module) -> int:
    """Channels of the images that a network takes: `in_channels` where it says so, else those of its first convolution.

    3 where there is neither.
    """
    from torch.nn.modules.conv import _ConvNd

    said = own_attribute(model, "in_channels", int)
    first = next((module.in_channels for module in model.modules() if isinstance(module, _ConvNd)), 3)
    return said if said is not None else first


def own_attribute(model: object, name: str, kind: type[T]) -> T | None:
    """An attribute that vss gives a meaning; a foreign network's, of another type, is none."""
    value = getattr(model, name, None)
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def outputs_of(value: object) -> list[Tensor]:
    """All tensors in a nested structure of mappings, sequences, dataclasses and plain objects, in order."""
    return [tensor for _, tensor in named_tensors(value)]


def named_tensors(value: object, name: str = "", inside: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything in a nested structure, in order; a name is the way to it, joined by `_`.

    `name` is that of the structure itself, and `inside` holds the ids of what it lies in: nothing is walked in circles.
    """
    import torch

    if isinstance(value, torch.Tensor):
        yield name or "output", value
        return
    if isinstance(value, str | bytes | type | torch.nn.Module) or id(value) in inside:
        return
    if isinstance(value, Mapping):
        parts: Any = value.items()
    elif isinstance(value, tuple | list):
        parts = [(str(index) if name else f"output{index}", part) for index, part in enumerate(value)]
    else:
        parts = getattr(value, "__dict__", {}).items()
    for key, part in parts:
        yield from named_tensors(part, f"{name}_{key}" if name else str(key), (*inside, id(value)))


def logits_of(value: object) -> list[Tensor]:
    """The floating-point outputs; one sentence where there are none."""
    found = outputs_of(value)
    floating = [each for each in found if each.is_floating_point()]
    if not floating and found:
        raise VssError(f"the output holds {found[0].dtype} values alone, no floating-point tensor; {ADVICE}.")
    if not floating:
        raise VssError(f"the output is a {type(value).__name__} in which no tensor was found; {ADVICE}.")
    return floating
