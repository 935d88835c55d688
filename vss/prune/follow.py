"""Follow channels through a forward pass: every operation that runs carries marks on, or locks what it would mix.

The rules are for aten operations, below modules and functions of torch: einsum, attention and a network's own code
arrive here as products, reshapes and sums. What has no rule locks the labels that reach it, by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vss.core.networks import first_names
from vss.prune.labels import Book, axes_of
from vss.prune.plan import Role

Marks = list[Tensor]
Rule = Callable[["Follower", dict[str, Any], list[Tensor]], None]
RULES: dict[str, Rule] = {}
FIXED = "its channels meet values of a fixed number"
MIXED = "removing its channels is not the same as zeroing them: the network reorders or mixes them ({})"


class TimeUp(Exception):
    """The time for planning is used up."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of aten operations by name; in-place twins follow."""

    def add(function: Rule) -> Rule:
        for name in names:
            RULES[name] = RULES[f"{name}_"] = function
        return function

    return add


class Follower(TorchDispatchMode):
    """Runs operations and carries marks from their inputs to their outputs."""

    def __init__(self, model: nn.Module, book: Book, deadline: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.book, self.deadline = book, deadline
        self.roles: dict[tuple[str, int], Role] = {}
        self.names: dict[int, str] = {}
        self.shared: set[str] = set()
        self.marks: dict[str, Marks] = {}
        self.used: set[str] = set()
        every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        own = first_names(model)
        tensors = [(name, value) for name, value in every if own[owner := name.rpartition(".")[0]] == owner]
        for name, value in tensors:
            if not value.numel():
                continue
            first = self.names.setdefault(value.data_ptr(), name)
            if first != name:
                self.shared |= {first, name}
                continue
            self.marks[name] = []
            for dim, length in enumerate(value.shape):
                if length > 1:
                    shape = [length if d == dim else 1 for d in range(value.ndim)]
                    self.marks[name].append(book.span(name, dim, length).view(shape))
        self.shapes = {name: tuple(value.shape) for name, value in tensors}

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self.deadline:
            raise TimeUp
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        given |= kwargs or {}
        inputs = _tensors(given.values())
        marked = [value for value in inputs if self.of(value)]
        loose = any(getattr(value, "_vss_loose", False) for value in inputs)
        before = {id(value): self.of(value) for value in inputs}
        result = func(*args, **(kwargs or {}))
        outputs = _tensors([result])
        name = func._schema.name.partition("::")[2]
        if not marked or name.startswith("new_"):
            if name in FACTORIES or (loose and all(getattr(v, "_vss_loose", False) or v.ndim == 0 for v in inputs)):
                for value in outputs:
                    value._vss_loose = True  # type: ignore[attr-defined]
            return result
        found = RULES.get(name) or RULES.get(name.rstrip("_"))
        if found is None and torch.Tag.pointwise in func.tags:
            found = pointwise
        if found is None:
            found = _unknown(name)
        given["op"] = func
        self.before = before
        found(self, given, outputs)
        return result

    def of(self, value: Tensor) -> Marks:
        """The marks of a tensor; of a parameter or buffer those of its own labels."""
        marks = getattr(value, "_vss_marks", None)
        if marks is not None:
            return list(marks)
        name = self.name_of(value)
        if name:
            self.used.add(name)
            return self.marks[name]
        return []

    def name_of(self, value: Tensor) -> str:
        """The name of a parameter or buffer; "" of others, and of a part of one."""
        name = self.names.get(value.data_ptr(), "") if value.numel() else ""
        return name if name and self.shapes[name] == tuple(value.shape) else ""

    def put(self, value: Tensor, marks: Sequence[Tensor]) -> None:
        """Give a tensor its marks: those that say something, one for each set of dims."""
        value._vss_marks = [mark for mark in marks if axes_of(mark)]  # type: ignore[attr-defined]
        for mark in value._vss_marks:  # type: ignore[attr-defined]
            if len(axes_of(mark)) > 1:
                self.book.joint(mark)

    def axis(self, value: Tensor, dim: int) -> Tensor | None:
        """(n,) labels of a tensor's slices along `dim`; None where it has none."""
        dim %= max(value.ndim, 1)
        for mark in self.of(value):
            if dim in axes_of(mark):
                return self.book.axis(mark, dim)
        return None

    def freeze(self, value: Tensor, dims: Sequence[int], reason: str) -> None:
        """The slices of a tensor along these dims stay."""
        for mark in self.of(value):
            for dim in axes_of(mark):
                if dim in dims:
                    self.book.freeze(mark, dim, reason)

    def meet(self, first: Tensor, dim: int, second: Tensor, other: int, reason: str = FIXED) -> None:
        """The slices of two tensors along a dim of each live together."""
        a, b = self.axis(first, dim), self.axis(second, other)
        if a is not None and b is not None:
            self.book.unite(a, b, reason)
        elif a is not None:
            self.freeze(first, [dim % first.ndim], reason)
        elif b is not None:
            self.freeze(second, [other % second.ndim], reason)

    def role(self, labels: Tensor | None, role: Role) -> None:
        """What the tensors that own these labels are to them."""
        if labels is not None:
            for span in self.book.spans_of(labels):
                self.roles.setdefault((span.tensor, span.dim), role)


def _tensors(values: Iterable[object]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


FACTORIES = {"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like",
             "ones_like", "full_like", "empty_like", "scalar_tensor", "empty_strided", "new_empty_strided"}  # fmt: skip


def _unknown(name: str) -> Rule:
    def lock(follower: Follower, given: dict[str, Any], outputs: list[Tensor]) -> None:
        for value in _tensors(given.values()):
            for mark in follower.of(value):
                follower.book.lock(mark, f"its channels reach {name}, an operation that cannot be followed")

    return lock


def onto(mark: Tensor, ndim: int) -> Tensor:
    """The mark with dims of 1 in front, as broadcasting has it."""
    return mark.view(*(1,) * (ndim - mark.ndim), *mark.shape) if mark.ndim < ndim else mark


def pointwise(follower: Follower, given: dict[str, object], outputs: list[Tensor]) -> None:
    """Values at equal places: their labels live together, a dim of 1 is broadcast and meets nobody."""
    out = outputs[0]
    operands = [value for value in _tensors(v for k, v in given.items() if k != "op")]
    marks = merged(follower, [onto(mark, out.ndim) for value in operands for mark in follower.of(value)])
    for value in operands:
        if getattr(value, "_vss_loose", False) and not follower.of(value):
            continue
        own = {dim + out.ndim - value.ndim for mark in follower.of(value) for dim in axes_of(mark)}
        fixed = [dim + out.ndim - value.ndim for dim, size in enumerate(value.shape)
                 if size > 1 and value.stride(dim) and dim + out.ndim - value.ndim not in own]  # fmt: skip
        for mark in marks:
            for dim in axes_of(mark):
                if dim in fixed:
                    follower.book.freeze(mark, dim, FIXED)
    for value in outputs:
        follower.put(value, [mark for mark in marks if value.ndim == out.ndim])


def merged(follower: Follower, marks: Marks) -> Marks:
    """One mark for each set of dims; those with dims in common live together."""
    kept: Marks = []
    for mark in marks:
        mine = set(axes_of(mark))
        if not mine or any(mark is other for other in kept):
            continue
        add = True
        for other in list(kept):
            theirs = set(axes_of(other))
            if mine == theirs:
                follower.book.unite(mark, other, FIXED)
                add = False
                continue
            for dim in mine & theirs:
                follower.book.unite(follower.book.axis(mark, dim), follower.book.axis(other, dim), FIXED)
            add = add and not mine < theirs
            if theirs < mine:
                kept = [each for each in kept if each is not other]
        if add:
            kept.append(mark)
    return kept


def kept_without(follower: Follower, mark: Tensor, dims: Sequence[int]) -> Tensor:
    """The mark with some dims reduced to 1: what is left of a box is its slices along the one other dim."""
    left = [dim for dim in axes_of(mark) if dim not in dims]
    if len(left) == len(axes_of(mark)):
        return mark
    if len(left) == 1:
        shape = [size if dim == left[0] else 1 for dim, size in enumerate(mark.shape)]
        return follower.book.axis(mark, left[0]).view(shape)
    for dim in left:
        follower.book.freeze(mark, dim, MIXED.format("several dims"))
    return mark.new_zeros((1,) * mark.ndim)
