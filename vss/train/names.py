"""One network under several names: what wraps it puts a prefix before the names of its tensors, layers and plans.

`DataParallel` says `module.`, a compiled network `_orig_mod.`, `vss.models.wrap` says `net.`, a user's container what
its author chose. A file keeps the names of the network that is saved, and is loaded into it whatever wraps it then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.fx import GraphModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from vss.core.errors import VssError
from vss.models import Wrapped
from vss.models.weights import common_beginnings
from vss.prune import Plan
from vss.prune.apply import name_of, tensors_of

OUTER = {DataParallel: "module", DistributedDataParallel: "module", AveragedModel: "module"}
Rename = Callable[[str], str]


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


def adding(prefix: str) -> Rename:
    return lambda name: prefix + name


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
    return adding(after.removesuffix(before))
