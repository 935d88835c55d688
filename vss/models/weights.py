"""Weights that something else has trained: from a file, under names and in a form of its own, into a network.

A file may hold a state dict under a key beside other things, its names may begin with what wrapped the network there
(`module.`, `model.`, `_orig_mod.`), counters of batch norms may be missing, and its classes may be others.
"""

from __future__ import annotations

import itertools
import logging
import pickle
import re
import struct
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vss.core.errors import VssError, counted, listed, one_line
from vss.core.files import require_file
from vss.core.networks import repeated

log = logging.getLogger(__name__)

DAMAGED = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
    ArithmeticError, AssertionError, MemoryError, struct.error, ImportError,
)  # fmt: skip
STATES = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "ema", "model_ema", "ema_state_dict",
    "state_dict_ema", "module", "params",
)  # fmt: skip
"""Keys under which trainers put a state dict, in the order in which they are taken."""
COUNTER = "num_batches_tracked"
NAMED = 3  # tensors that a sentence names
Shapes = Mapping[str, Sequence[int]]


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Read a flat state dict from safetensors or from a torch file, never running code from it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = require_file(path, kind="weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([Namespace]):  # of a trainer's arguments: plain values
            state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise VssError(f"{path} is truncated or no safetensors file ({error}); copy it again.") from error
    except DAMAGED as error:  # what torch's reader is led to by damaged bytes; it has no common class for them
        code = re.search(r"GLOBAL (\S+) was", str(error))
        said = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
        reason = f"it holds code, {code[1]}" if code else one_line(f"{type(error).__name__}: {said}").rstrip(": ")
        raise VssError(
            f"{path} cannot be read as weights alone ({reason}); expected a state dict saved by "
            "torch.save or safetensors: re-save model.state_dict() from the code that made it."
        ) from error
    depth = 0
    while isinstance(state, dict) and depth < NAMED:
        found = [key for key in STATES if isinstance(state.get(key), dict)]
        if not found:
            break
        if len(found) > 1:
            log.info("%s: read %s, and not %s beside it", path, found[0], listed(found[1:]))
        state, depth = state[found[0]], depth + 1
    if not isinstance(state, dict) or not all(isinstance(k, str) and _plain(v) for k, v in state.items()):
        raise VssError(f"{path} holds no state dict of tensors; re-save model.state_dict() from the code that made it.")
    return dict(state)


def _plain(value: object) -> bool:
    """A dense tensor whose numbers are there."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_quantized or value.is_meta)


def load_weights(net: nn.Module, path: Path | str, *, classes: int = 0, replace_head: bool = False) -> list[str]:
    """Load a whole network's weights from a file; every tensor must fit, but for counters of batch norms.

    Args:
        net: what they are loaded into.
        path: .safetensors, .pt or .pth; see the module for what may be in it.
        classes: number of classes of `net`, where it is known.
        replace_head: the file is of another number of classes: layers that differ in that alone keep their own values.

    Returns:
        Names of the tensors that were not loaded.

    Raises:
        VssError: weights that fit in part, by name, and a head that is not to be found.
    """
    own = {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}
    state = _named_as(read_state_dict(path), own)
    state = _without_auxiliary(state, own)
    for name, first in repeated(own).items():
        state.setdefault(name, state.get(first, own[first]))
        if first in state and not torch.equal(state[name], state[first]):
            raise VssError(
                f"{path} does not fit the network: it has other values in {name} than in {first}, which are one tensor "
                "of the network; check the network and its options."
            )
    state = {name: own[name] for name in own if name.endswith(COUNTER) and name not in state} | state
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    head = head_of({name: tuple(value.shape) for name, value in own.items()}, shapes, classes)
    refuse_misfits({name: tuple(value.shape) for name, value in own.items()}, shapes, head, path, replace_head)
    net.load_state_dict({**state, **{name: own[name] for name in head}})
    return head


def head_of(own: Shapes, theirs: Shapes, classes: int) -> list[str]:
    """Tensors that differ in the number of classes alone, which is `classes` here; none where that is not so."""
    found, pairs = [], set()
    for name in own.keys() & theirs.keys():
        differing = [pair for pair in zip(own[name], theirs[name], strict=False) if pair[0] != pair[1]]
        if len(own[name]) == len(theirs[name]) and len(differing) == 1:
            found.append(name)
            pairs.add(differing[0])
    same = len(pairs) == 1 and next(iter(pairs))[0] == classes
    return [name for name in own if name in found] if same else []


def refuse_misfits(own: Shapes, theirs: Shapes, head: list[str], path: Path | str, replace_head: bool) -> None:
    """Refuse weights that fit in part, naming what does and what does not; `head` may differ where it is replaced."""
    faults = [f"has no {name}" for name in own if name not in theirs]
    faults += [f"has {name}, which the network does not" for name in theirs if name not in own]
    faults += [
        f"has {name} of {tuple(theirs[name])} and the network of {tuple(own[name])}"
        for name in own
        if name in theirs and tuple(own[name]) != tuple(theirs[name]) and name not in head
    ]
    fitting = sum(name in theirs and tuple(own[name]) == tuple(theirs[name]) for name in own)
    share = f"{fitting} of its {len(own)} tensors fit"
    if faults:
        more = f", and differs in {counted(len(faults) - NAMED, 'more place')}" if len(faults) > NAMED else ""
        raise VssError(
            f"{path} does not fit the network: {share}; it {'; it '.join(faults[:NAMED])}{more}; check the "
            "network, its options and classes."
        )
    if replace_head and not head:
        raise VssError(
            f"{path} fits the network as it is, so there is no head of other classes to replace; leave --replace-head "
            "(model.replace_head) off."
        )
    if not head:
        return
    dims = next(pair for pair in zip(theirs[head[0]], own[head[0]], strict=True) if pair[0] != pair[1])
    names = f"{listed(head[:NAMED])}{f' and {len(head) - NAMED} more' if len(head) > NAMED else ''}"
    if not replace_head:
        raise VssError(
            f"{path} does not fit the network: it is of {dims[0]} classes and the network of {dims[1]} ({names}); "
            f"{share}: --replace-head (model.replace_head) takes those and starts the head anew."
        )
    log.warning("%s: %s; the head starts anew, from %d classes to %d: %s", path, share, *dims, names)


def _named_as(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state under the names of a network: what begins all names there, or here, is exchanged.

    Where all tensors of the network are found under one beginning, others (of a loss, of a teacher) are left out.
    """
    best = (-1, 0, "", "")
    for theirs in {"", *_beginnings(state)}:
        for ours in {"", *common_beginnings(own)}:
            count = sum(name.startswith(ours) and theirs + name[len(ours) :] in state for name in own)
            best = max(best, (count, -len(theirs + ours), theirs, ours))
    count, _, theirs, ours = best
    wanted = sum(not name.endswith(COUNTER) for name in own)
    inside = {name: value for name, value in state.items() if name.startswith(theirs)}
    if len(inside) < len(state) and count >= wanted:
        log.info("%d tensors that do not begin with %r are left out", len(state) - len(inside), theirs)
    else:
        rest = {name: value for name, value in state.items() if name not in inside}
        return {ours + name[len(theirs) :]: value for name, value in inside.items()} | rest
    return {ours + name[len(theirs) :]: value for name, value in inside.items()}


def _without_auxiliary(state: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """A state without the auxiliary heads (`aux_classifier.`, `auxiliary_head.`) that the network does not have."""
    prefix = next(reversed(common_beginnings(own)), "")
    parts = {name.removeprefix(prefix).partition(".")[0] for name in own}
    heads = {name: name.removeprefix(prefix).partition(".")[0] for name in state}
    gone = sorted({head for head in heads.values() if head.startswith("aux")} - parts)
    if gone:
        log.info("%s left out, which the network does not have", listed(gone))
    return {name: value for name, value in state.items() if heads[name] not in gone}


def _beginnings(names: Iterable[str]) -> set[str]:
    """Up to three first segments of every name."""
    return {
        ".".join(segments[:count]) + "." for segments in (name.split(".") for name in names) for count in (1, 2, 3)
        if len(segments) > count
    }  # fmt: skip


def common_beginnings(names: Iterable[str]) -> list[str]:
    """What begins all names, a segment more each time; the last segment of a name is never part of it."""
    parts: Iterable[tuple[str, ...]] = zip(*(name.split(".")[:-1] for name in names), strict=False)
    same = [segments[0] for segments in itertools.takewhile(lambda segments: len(set(segments)) == 1, parts)]
    return [".".join(same[:size]) + "." for size in range(1, len(same) + 1)]


def load_backbone(backbone: nn.Module, path: Path | str) -> None:
    """Load local weights in the layout of torchvision's classifiers into a backbone; the head is left out.

    They may be those of a classifier or the backbone (`backbone.`, `encoder.`) of a whole segmentation network. Fits
    every backbone here: `ResNetFeatures`, torchvision's own `IntermediateLayerGetter` around a ResNet or a MobileNet,
    and SegNet's VGG. `path` is a .safetensors, .pt or .pth file; pickles of code are refused (`weights_only=True`).
    """
    own, found = backbone.state_dict(), read_state_dict(path)
    states = []
    for prefix in {"", *_beginnings(found)}:
        inside = {name[len(prefix) :]: value for name, value in found.items() if name.startswith(prefix)}
        keys = {_backbone_key(name, own): value for name, value in inside.items()
                if not name.startswith(("fc.", "classifier."))}  # fmt: skip
        states.append((sum(name in own for name in keys), -len(prefix), keys))
    state = max(states, key=lambda each: each[:2])[2]
    counters = {name: value for name, value in own.items() if name.endswith(COUNTER)}
    try:
        backbone.load_state_dict(counters | state)
    except RuntimeError as error:
        raise VssError(f"{path} does not fit this backbone: {one_line(str(error))}.") from error


def _backbone_key(key: str, own: dict[str, Tensor]) -> str:
    """torchvision's name of a tensor in the names of a backbone with the tensors `own`."""
    if "stem.0.weight" in own:
        for old, new in {"conv1.": "stem.0.", "bn1.": "stem.1."}.items():
            if key.startswith(old):
                return new + key[len(old) :]
    if not any(name.startswith("features.") for name in own):
        return key.removeprefix("features.")
    return key
