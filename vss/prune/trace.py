"""Find the groups of a network: follow channels through its forward passes, then try what was found.

`vss.prune.follow` runs the network once in evaluation and once in training mode, so that heads which run in training
alone are seen, and says which slices of which tensors live together. What cannot be followed is locked by name, with
the reason, and the rest is still prunable.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import vss.prune.moves
import vss.prune.products  # noqa: F401  both register rules
from vss.core.closeness import duplicate
from vss.core.errors import VssError, unknown
from vss.core.example import Example, Forward, call, default_forward, image_of, logits_of, on, paired
from vss.core.networks import eager, first_names, hooked, layers_named, refuse_unready
from vss.prune.apply import BatchNorm, Conv
from vss.prune.follow import Follower, TimeUp
from vss.prune.labels import Book
from vss.prune.plan import Groups, Locked, Role
from vss.prune.probe import TIME, Probe, short
from vss.prune.search import Key, Search

LOG = logging.getLogger(__name__)
OUTPUT = "its channels are an output of the network"
SINGLE = "it has one channel, which stays"
UNSEEN = "the network does not use it, or by an operation that cannot be followed"
TIME_LIMIT_S = 300.0


@eager
def find_groups(
    model: nn.Module,
    example: Example,
    *,
    forward: Forward | None = None,
    keep: Iterable[str] = (),
    time_limit_s: float = TIME_LIMIT_S,
) -> Groups:
    """Find every set of channels that can be removed together.

    A network may help where its operations are silent. `ties` names pairs of layers whose channels live together. A
    layer that scales channels by tensors of its own, such as a norm layer that torch does not know, declares
    `channel_params = {"scale": 1, "bias": 1}`: names of its parameters and buffers, and the dim of their channels; they
    count as a norm layer's, and a channel whose parameters are all zero must come out zero.

    Args:
        model: any `nn.Module`; it is copied, never changed.
        example: what it takes: a tensor (N, C, H, W), a tuple of arguments or a dict of keyword arguments.
        forward: how to call the model so that *all* heads are reached; default `forward_train` where there is one.
        keep: names of layers whose output channels stay; a container stands for the layers in it, * for any part.
        time_limit_s: what is not known to be right after this time is locked with that reason.

    Returns:
        Groups in model order. The channels of the network's outputs are always locked, and so is a group whose removal
        differs from zeroing it on the example or on random images.

    Raises:
        VssError: `keep` or `ties` name no layer; the network does not take the example, gives no tensor, or NaN.
    """
    if time_limit_s <= 0:
        raise VssError(f"time_limit_s is {time_limit_s}; expected seconds above 0.")
    refuse_unready(model)
    deadline = time.monotonic() + time_limit_s
    net = duplicate(model).cpu().eval()
    layers = _Layers(net, keep)
    example = on(example, "cpu")
    _check_runs(net, example, forward)
    book = Book()
    follower = Follower(net, book, deadline)
    try:
        _follow(net, example, forward, follower, layers)
        layers.declare(follower)
    except TimeUp:
        return Groups((), tuple(layers.left_over(set(), {}, TIME)))
    if not book.spans:
        return Groups((), ())
    probe = Probe(model, example, forward, deadline - time.monotonic())
    good, why = Search(book, layers.roles(follower), layers.order, probe).run()
    why |= layers.parametrised
    covered = {layer for group in good for role in ("producer", "norm") for layer in group.module_names(role)}
    return Groups(tuple(good), tuple(layers.left_over(covered, why, UNSEEN)))


def _check_runs(net: nn.Module, example: Example, forward: Forward | None) -> None:
    shape = tuple(image_of(example).shape)
    try:
        with torch.no_grad():
            outputs = (forward or default_forward)(net, example)
    except VssError:
        raise
    except Exception as error:
        raise VssError(
            f"the network does not take the example {shape} ({short(error)}); give one that it takes (a tensor, a "
            "tuple of arguments or a dict of keyword arguments), or forward=lambda net, x: ..."
        ) from error
    if not all(torch.isfinite(value).all() for value in logits_of(outputs)):
        raise VssError("the network gives NaN or infinite outputs on the example; check its weights.")


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as the operations that it consists of, not as one fused one."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _follow(net: nn.Module, example: Example, forward: Forward | None, follower: Follower, layers: _Layers) -> None:
    """Every way in which the network is called: all heads, evaluation alone, training."""
    calls = [(forward or default_forward, example, False)]
    if forward is None and hasattr(net, "forward_train"):
        calls.append((call, example, False))
    calls.append((forward or default_forward, paired(example), True))
    with hooked(layers.lock_parametrised(follower)):
        for way, x, training in calls:
            net.train(training)
            outputs: list[Tensor] = []
            try:
                with torch.no_grad(), _plain_attention(), follower:
                    outputs = logits_of(way(net, x))
            except TimeUp:
                raise
            except Exception as error:  # a network may be for evaluation alone
                if not training:
                    raise
                LOG.warning("the network does not run in training mode on two examples (%s); what runs in training "
                            "alone is not seen, and training after a cut is not tried", short(error))  # fmt: skip
            for value in outputs:
                follower.freeze(value, range(value.ndim), OUTPUT)


class _Layers:
    """Names of a network's modules and tensors, and what was asked of them."""

    def __init__(self, model: nn.Module, keep: Iterable[str]) -> None:
        self.modules, self.first = dict(model.named_modules()), first_names(model)
        self.order = {name: position for position, name in enumerate(self.modules)}
        self.keep = layers_named(model, keep, "layer to keep")
        self.parametrised = {name: f"{name}.weight is parametrised (weight norm, spectral norm, a mask); remove the "
                             "parametrisation first" for name, module in self.modules.items()
                             if _is_parametrised(module)}  # fmt: skip

    def lock_parametrised(self, follower: Follower) -> list[RemovableHandle]:
        """Hooks by which what a parametrised layer reads and gives stays."""
        hooks = []
        for name, reason in self.parametrised.items():

            def lock(_: nn.Module, inputs: Sequence[object], reason: str = reason) -> None:
                for value in inputs:
                    if isinstance(value, Tensor):
                        follower.freeze(value, range(value.ndim), reason)

            hooks.append(self.modules[name].register_forward_pre_hook(lock))
            for key, _ in self.modules[name].named_parameters():
                for span in follower.book.spans:
                    if span.tensor == f"{name}.{key}":
                        follower.book.lock(torch.arange(span.start, span.start + span.length), reason)
        return hooks

    def declare(self, follower: Follower) -> None:
        """What the network says of itself, what was asked to stay, and weights with two owners."""
        book, spans = follower.book, {(span.tensor, span.dim): span for span in follower.book.spans}

        def labels(key: Key) -> Tensor:
            return torch.arange(spans[key].start, spans[key].start + spans[key].length)

        roles = self.roles(follower)
        asked = [labels(key) for key in spans if roles.get(key, "param") != "consumer" and self.kept(_owner(key))]
        book.locks[:0] = [(each, "it was asked to stay") for each in asked]
        for key in spans:
            if key[0] in follower.shared:
                book.locks.insert(0, (labels(key), f"{key[0]} is shared with another layer"))
        for name, module in self.modules.items():
            keys = [(f"{name}.{leaf}".lstrip("."), dim) for leaf, dim in declared_channels(module).items()]
            keys = [key for key in keys if key in spans]
            for key in keys[1:]:
                book.unite(labels(keys[0]), labels(key), "channel_params name tensors of different sizes")
            for pair in getattr(module, "ties", ()):
                self._tie(pair, name, follower, labels)

    def _tie(self, pair: Iterable[str], prefix: str, follower: Follower, labels: Callable[[Key], Tensor]) -> None:
        names = [f"{prefix}.{name}" if prefix else name for name in pair]
        names = [self.first.get(name, name) for name in names]
        if len(names) != 2:
            raise VssError(f"ties must be pairs of layer names, got {names}.")
        for name in names:
            if name not in self.modules:
                raise unknown("layer in ties", name, list(self.modules))
            if f"{name}.weight" not in follower.used:
                raise VssError(f"ties {tuple(pair)}: one of these layers has no channels that the network uses.")
        first, second = (labels((f"{name}.weight", makes(self.modules[name]))) for name in names)
        if len(first) == len(second):
            follower.book.unite(first, second, "")
        else:
            for each in (first, second):
                follower.book.lock(each, "the channels that it is tied to are of another number")

    def roles(self, follower: Follower) -> dict[Key, Role]:
        """What every (tensor, dim) with channels is to them; a layer's kind says it better than the operation."""
        roles: dict[Key, Role] = {}
        for span in follower.book.spans:
            key = (span.tensor, span.dim)
            module = self.modules[_owner(key)]
            leaf = span.tensor.rpartition(".")[2]
            role: Role = follower.roles.get(key, "param")
            if isinstance(module, BatchNorm | nn.GroupNorm | nn.modules.instancenorm._InstanceNorm | nn.LayerNorm):
                role = "norm"
            elif isinstance(module, Conv) and module.groups > 1 and span.dim == 0:
                role = "producer" if module.in_channels == module.out_channels != module.groups else "norm"
            elif leaf in declared_channels(module):
                role = "norm"
            roles[key] = role
        return roles

    def kept(self, name: str) -> bool:
        """Whether a layer, or a part of the network that it belongs to, was asked to stay."""
        return any(name == stays or name.startswith(f"{stays}.") for stays in self.keep)

    def left_over(self, covered: set[str], reasons: dict[str, str], otherwise: str) -> list[Locked]:
        """Layers with channels that are in no group."""
        return [
            Locked(name, _width(module), SINGLE if _width(module) == 1 else reasons.get(name, otherwise))
            for name, module in self.modules.items()
            if name not in covered and _has_channels(module)
        ]


def _is_parametrised(module: nn.Module) -> bool:
    computed = isinstance(vars(module).get("weight"), Tensor)  # the older weight norm and masks leave a plain tensor
    return nn.utils.parametrize.is_parametrized(module) or computed


def _owner(key: Key) -> str:
    return key[0].rpartition(".")[0]


def makes(module: nn.Module) -> int:
    """The dim of a layer's weight along which its output channels lie."""
    return int(isinstance(module, Conv) and module.transposed and module.groups == 1)


def _has_channels(module: nn.Module) -> bool:
    norms = declared_channels(module)
    return isinstance(module, Conv | nn.Linear) or any(
        value.ndim > 1 and name not in norms
        for name, value in module.named_parameters(recurse=False)
        if not isinstance(module, nn.Embedding)
    )


def _width(module: nn.Module) -> int:
    if isinstance(module, Conv):
        return int(module.out_channels)
    if isinstance(module, nn.Linear):
        return int(module.out_features)
    return max(len(value) for value in module.parameters(recurse=False) if value.ndim)


def declared_channels(module: object) -> dict[str, int]:
    """A module's own tensors that hold one value per channel, by name -> dim of the channels."""
    return dict(getattr(module, "channel_params", {}))
