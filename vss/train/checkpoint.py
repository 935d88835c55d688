"""Checkpoints: one safetensors file whose header carries the JSON that rebuilds the network.

The header says the model's name and options, the chain of pruning plans, the preprocessing and the classes, so a pruned
network comes back in a new process by slicing a fresh one: no tracing, no data, no pickle. One file is either whole or
absent; a pair of files could disagree.

What wraps a network puts a prefix before the names of its tensors, layers and plans: `DataParallel` says `module.`, a
compiled network `_orig_mod.`, `vss.models.wrap` says `net.`, a user's container what its author chose. A file keeps the
names of the network that is saved, and is loaded into it whatever wraps it then.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from vss import models
from vss.core import __version__
from vss.core.closeness import NETWORK
from vss.core.errors import NotFinite, VssError, shown
from vss.core.files import atomic, require_checkpoint, sha256_tensors
from vss.core.networks import refuse_unready, repeated
from vss.data.preprocess import Preprocess
from vss.models import SegModel, Wrapped
from vss.models.factory import Factory
from vss.models.weights import common_beginnings, head_of, refuse_misfits
from vss.prune import Plan, apply_plan
from vss.prune.apply import name_of, tensors_of
from vss.train.header import KIND, SCHEMA, Header, not_registered, read_header

SLACK = 1 << 20
"""Elements that making a network may take besides twice its tensors."""
State = dict[str, torch.Tensor]
Rename = Callable[[str], str]
OUTER = {DataParallel: "module", DistributedDataParallel: "module", AveragedModel: "module"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A network in evaluation mode on the CPU, and what is known of it: the plans that cut it, in order, its
    preprocessing and classes, and what its writer added (`info`)."""

    model: nn.Module
    plans: tuple[Plan, ...] = ()
    preprocess: dict[str, Any] | None = None
    classes: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""


def save(
    model: nn.Module,
    path: Path | str,
    *,
    preprocess: Preprocess | dict[str, object] | None = None,
    classes: tuple[str, ...] | list[str] = (),
    info: dict[str, object] | None = None,
) -> Path:
    """Write a checkpoint atomically, with the plans by which the network or parts of it were cut.

    Of a network in `DataParallel`, compiled or averaged, the one inside is saved, in its own names.

    Raises:
        VssError: a network that was changed after it was cut, so that no file of it could be loaded.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    outer, model = model, inner(model)
    refuse_unready(model)
    odd = next((name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)), None)
    if odd:
        raise VssError(
            f"{odd} is no tensor (the extra state of a module), and a file without code holds tensors alone."
        )
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    meta = {
        "kind": KIND,
        "schema": SCHEMA,
        "vss": __version__,
        **_identity(model),
        "plans": [plan.to_dict() for plan in plans_of(outer)],
        "preprocess": preprocess.model_dump(mode="json") if isinstance(preprocess, Preprocess) else preprocess,
        "classes": list(classes),
        "info": info or {},
        "weights_sha256": sha256_tensors(state),
    }
    text = json.dumps(meta)
    header = {"vss": text, "vss_sha256": hashlib.sha256(text.encode()).hexdigest()}
    with atomic(path) as temporary:
        try:
            save_file(_unshared(state), temporary, metadata=header)
        except SafetensorError as error:
            raise VssError(f"{path} cannot be written ({error}); free some space or choose another place.") from error
    return Path(path)


def _identity(model: nn.Module) -> dict[str, Any]:
    """What a network is; attributes of a class that vss does not know mean what its author meant."""
    name, options, count = (getattr(model, each, None) for each in ("name", "options", "num_classes"))
    known = isinstance(name, str) and isinstance(options, dict) and type(count) is int
    if not isinstance(model, SegModel) and not (known and str(name) in models.MODELS):
        name, options, count = "", {}, None
    network = class_of(model)
    return {"model": name or network, "network": network, "options": options, "num_classes": count}


def _unshared(state: State) -> State:
    """safetensors refuses tensors that share memory; a clone is as good here."""
    seen: set[int] = set()
    result = {}
    for name, value in state.items():
        result[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return result


def load(path: Path | str, *, model: nn.Module | None = None) -> nn.Module:
    """The network of a checkpoint, pruned as it was saved, in evaluation mode.

    `model` is an unpruned instance, needed only for networks that are not registered with vss. It may be wrapped where
    the saved one was not, and the other way round; what comes back is in neither `DataParallel` nor compiled.
    """
    return read(path, model=model).model


def read(path: Path | str, *, model: nn.Module | None = None, replace_head: bool = False) -> Checkpoint:
    """Read a checkpoint with everything it says; see `load`.

    With `replace_head` the file is of another number of classes than `model`, whose head stays as it is.
    """
    meta, state = _read_file(Path(path))
    plans = tuple(Plan.from_dict(data, source=f"{path}, plan {i}") for i, data in enumerate(meta.plans))
    model = _built(Path(path), meta, _uncut(state, plans)) if model is None else _given(Path(path), meta, model)
    rename = matching(state, model.state_dict())
    if rename or any(plan.model != name_of(model) for plan in plans):
        same = rename or str
        state = {same(name): value for name, value in state.items()}
        plans = tuple(plan.renamed(same, name_of(model)) for plan in plans)
    own = model.state_dict()
    twice = repeated(own)
    _refuse_differing(Path(path), state, twice)
    own, state = ({name: value for name, value in each.items() if name not in twice} for each in (own, state))
    uncut = _uncut(state, plans)
    head = _new_head(Path(path), model, own, uncut) if replace_head else []
    _check_shapes(Path(path), own, uncut, head)
    try:
        for plan in plans:
            model = apply_plan(model, plan, check_weights=False)
        fresh = model.state_dict()
        state |= {name: fresh[name] for name in head}
        model.load_state_dict(_versioned({name: state[twice.get(name, name)] for name in fresh}, model))
    except (VssError, RuntimeError) as error:
        raise VssError(f"{path} does not fit its own description: {error}") from error
    _check_finite(Path(path), model)
    return Checkpoint(
        model=model.eval(),
        plans=plans,
        preprocess=meta.preprocess,
        classes=tuple(meta.classes),
        info=meta.info,
        weights_sha256=meta.weights_sha256,
    )


def uncut_shapes(path: Path | str) -> dict[str, list[int]]:
    """The shapes that the tensors in a checkpoint had before its plans, in the names of the file."""
    meta, state = _read_file(Path(path))
    return _uncut(state, [Plan.from_dict(data, source=f"{path}, plan {i}") for i, data in enumerate(meta.plans)])


def _built(path: Path, meta: Header, uncut: dict[str, list[int]]) -> nn.Module:
    """The registered network of a checkpoint, before its cuts."""
    if meta.num_classes is None or meta.model not in models.MODELS:
        raise not_registered(path, meta.model)
    entry: Any = models.MODELS[meta.model]
    if isinstance(entry, Factory):
        if meta.options not in entry.given:
            raise VssError(
                f"{path} says that {meta.model} built it with options {shown(meta.options)}; what a file says is not "
                "passed to code of yours: give them yourself, --model-option NAME=VALUE (model.options)."
            )
        return models.build(meta.model, meta.num_classes, **meta.options)
    try:
        with models.AtMost(SLACK + 2 * sum(map(math.prod, uncut.values()))):
            return models.build(meta.model, meta.num_classes, **meta.options)
    except VssError as error:
        raise VssError(f"{path} does not fit its own description: {error}") from error


def _given(path: Path, meta: Header, model: nn.Module) -> nn.Module:
    """The network that a user gave to be loaded into; one of another class is refused."""
    model = inner(model)
    foreign = not isinstance(model, SegModel) or isinstance(model, Wrapped)
    if foreign and meta.network:
        theirs, own = meta.network, class_of(model)
    else:
        theirs, own = meta.model, name_of(model) if isinstance(model, SegModel) else meta.model
    if theirs != own:
        raise VssError(f"{path} holds a {shown(theirs)} and was to be loaded into a {own!r}.")
    return model


def _check_finite(path: Path, model: nn.Module) -> None:
    """A diverged network computes NaN, whose argmax is class 0: whatever is made of it looks like a result.

    Parameters and running statistics; other buffers may hold infinity for good reason, as masks of attention do.
    """
    statistics = ((n, b) for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var")))
    for name, value in (*model.named_parameters(), *statistics):
        if not torch.isfinite(value).all():
            raise NotFinite(f"{path} holds NaN or infinity in {name}: its training diverged; {NETWORK}.")


def _uncut(state: State, plans: Iterable[Plan]) -> dict[str, list[int]]:
    """The shapes that the tensors of a cut network had before its plans."""
    shapes = {name: list(value.shape) for name, value in state.items()}
    for group in (group for plan in plans for group in plan.groups):
        for slot in group.slots:
            if slot.tensor in shapes and slot.dim < len(shapes[slot.tensor]):
                shapes[slot.tensor][slot.dim] += (group.channels - len(group.kept)) * slot.block
    return shapes


def _refuse_differing(path: Path, state: State, twice: Mapping[str, str]) -> None:
    """Refuse a file with other values under the second name of a tensor than under its first."""
    for name, first in twice.items():
        if name in state and first in state and not torch.equal(state[name], state[first]):
            raise VssError(
                f"{path} holds other values in {shown(name)} than in {shown(first)}, which are one tensor of the "
                "network that it was to be loaded into; give the network that it was saved from."
            )


def _new_head(path: Path, model: nn.Module, state: State, uncut: dict[str, list[int]]) -> list[str]:
    """The tensors of `model`, those in `state`, that differ from the file's in the number of classes alone."""
    own = {name: tuple(value.shape) for name, value in state.items()}
    head = head_of(own, uncut, int(getattr(model, "num_classes", 0) or 0))
    refuse_misfits(own, uncut, head, path, replace_head=True)
    return head


def _check_shapes(path: Path, state: State, uncut: dict[str, list[int]], head: Collection[str]) -> None:
    """Refuse a file whose tensors are not those of a network with `state` before its cuts, `head` apart."""
    own = {name: list(value.shape) for name, value in state.items()}
    for name in sorted(own.keys() | uncut.keys()):
        if own.get(name) != uncut.get(name) and name not in head:
            here, there = (f"of shape {tuple(each[name])}" if name in each else "absent" for each in (own, uncut))
            raise VssError(
                f"{path} does not fit its own description: {shown(name)} is {here} in a network with its options and "
                f"{there} in the file before its cuts; copy it again, or give the network that it was saved from."
            )


def _versioned(state: State, model: nn.Module) -> State:
    """The state with the versions of the network's modules, without which some take it for an older layout."""
    result = OrderedDict(state)
    result._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    return result


def _read_file(path: Path) -> tuple[Header, State]:
    from safetensors import SafetensorError, safe_open

    require_checkpoint(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            meta = read_header(path, header)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise VssError(f"checkpoint {path} is truncated or damaged ({error}); copy it again or retrain.") from error
    if sha256_tensors(state) != meta.weights_sha256:
        raise VssError(f"checkpoint {path} is damaged: its weights do not have the hash it was saved with.")
    return meta, state


def inner(model: nn.Module) -> nn.Module:
    """The network inside what runs, compiles or averages it."""
    while True:
        compiled = getattr(model, "_orig_mod", None)
        attribute = next((name for kind, name in OUTER.items() if isinstance(model, kind)), None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif attribute:
            model = model.get_submodule(attribute)
        else:
            return model


def class_of(model: nn.Module) -> str:
    """The class of a network, of a wrapped one that of what is wrapped."""
    model = inner(model)
    model = inner(model.net) if isinstance(model, Wrapped) else model
    return "GraphModule" if isinstance(model, GraphModule) else type(model).__name__  # a copy loses the class's name


def plans_of(outer: nn.Module) -> tuple[Plan, ...]:
    """How a network was cut, by the plans of what wraps it and of all its parts, in the names of the one inside.

    A part was cut before the whole.

    Raises:
        VssError: its tensors are not what the plans leave, so that no file of it could be loaded.
    """
    model = inner(outer)
    around = next(path for path, part in outer.named_modules() if part is model)
    found: list[tuple[int, Plan]] = []
    for path, part in outer.named_modules():
        own = vars(part).get("plans")
        for plan in own if isinstance(own, tuple) else ():
            if isinstance(plan, Plan):
                rename = _between(f"{path}.".lstrip("."), f"{around}.".lstrip("."))
                found.append((-len(path.split(".")) if path else 0, plan.renamed(rename, name_of(model))))
    plans = tuple(plan for _, plan in sorted(found, key=lambda each: each[0]))
    _check_left(model, plans)
    return plans


def _between(path: str, around: str) -> Rename:
    """Names below `path` as names below `around`."""
    return lambda name: (path + name).removeprefix(around)


def _check_left(model: nn.Module, plans: Sequence[Plan]) -> None:
    """Refuse plans that do not end in the tensors of the network."""
    sizes = {name: list(value.shape) for name, value in tensors_of(model).items()}
    for plan in reversed(plans):
        left: dict[tuple[str, int], int] = defaultdict(int)
        gone: dict[tuple[str, int], int] = defaultdict(int)
        for group in plan.groups:
            for slot in group.slots:
                left[slot.tensor, slot.dim] += len(group.kept) * slot.block
                gone[slot.tensor, slot.dim] += (group.channels - len(group.kept)) * slot.block
        for (tensor, dim), least in left.items():
            shape = sizes.get(tensor, [])
            if dim >= len(shape) or shape[dim] < least:
                what = f"is of shape {tuple(shape)}" if tensor in sizes else "is not there"
                raise VssError(
                    f"the network says that it was cut by a plan, and {tensor} {what}, of which the plan leaves "
                    f"{least} along dim {dim}; it was changed after the cut: save what apply_plan returned."
                )
            shape[dim] += gone[tensor, dim]


def matching(file: Iterable[str], own: Iterable[str]) -> Rename | None:
    """How the names of a file become those of a network, where the same network is under another prefix; else None."""
    theirs, ours = set(file), set(own)
    before, after = (["", *common_beginnings(names)][-1] for names in (theirs, ours))
    if theirs == ours or not (before.endswith(after) or after.endswith(before)):
        return None
    if {name.removeprefix(before) for name in theirs} != {name.removeprefix(after) for name in ours}:
        return None
    if before.endswith(after):
        gone = before.removesuffix(after)
        return lambda name: name.removeprefix(gone)
    prefix = after.removesuffix(before)
    return lambda name: prefix + name
