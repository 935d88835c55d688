"""What moves, pools and reductions do to marks. See `vss.prune.follow`; products and norms: `vss.prune.products`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vss.prune.follow import FIXED, MIXED, Follower, kept_without, merged, onto, pointwise, rule
from vss.prune.labels import axes_of, compressed

Given = dict[str, Any]


def first_of(given: Given) -> Tensor:
    """The first tensor among the arguments."""
    return next(value for value in given.values() if isinstance(value, Tensor))


rule("clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous", "native_dropout", "dropout", "_prelu_kernel",
     "bernoulli", "rand_like", "randn_like", "triu", "tril", "rrelu_with_noise", "zeros_like", "ones_like", "full_like",
     "empty_like", "fill", "zero", "_conj", "normal", "uniform", "hardtanh", "hardswish", "feature_dropout",
     "_fused_dropout", "pow", "clamp", "silu", "gelu")(pointwise)  # fmt: skip


@rule("copy")
def copied(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """A tensor written into a part of another is lost from sight there."""
    target, source = first_of(given), given["src"]
    if target.untyped_storage().nbytes() > target.numel() * target.element_size():
        for mark in follower.of(source):
            follower.book.lock(mark, "its channels are written into a part of another tensor")
    pointwise(follower, given, outputs)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "_reshape_copy", "flatten",
      "unflatten", "view_as_real")  # fmt: skip
def reshaped(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """Another shape for the same values in the same order."""
    value, out = first_of(given), outputs[0]
    follower.put(out, [regrouped(mark, tuple(value.shape), tuple(out.shape)) for mark in follower.of(value)])


def regrouped(mark: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """A mark through a reshape; dims that it does not vary along stay 1 wherever they are."""
    sizes, shape = list(mark.shape), [1] * len(new)
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0, a, b = i, j, 1, 1
        while i == i0 or j == j0 or a != b:
            if i < len(old) and (a <= b or j >= len(new)):
                a, i = a * old[i], i + 1
            elif j < len(new):
                b, j = b * new[j], j + 1
            else:
                break
        if any(size > 1 for size in mark.shape[i0:i]):
            sizes[i0:i], shape[j0:j] = old[i0:i], new[j0:j]
    return compressed(mark.expand(sizes).reshape(shape))


@rule("permute", "transpose", "t", "numpy_T", "movedim", "swapaxes", "adjoint", "mT", "permute_copy", "transpose_copy")
def turned(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """Dims in another order: the same on the mark."""
    value, rest = first_of(given), [v for k, v in given.items() if k != "op"][1:]
    follower.put(outputs[0], [given["op"](mark, *rest) for mark in follower.of(value)])


@rule("expand", "expand_as", "broadcast_to")
def expanded(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """Broadcast: marks stay, with dims of 1 in front."""
    follower.put(outputs[0], [onto(mark, outputs[0].ndim) for mark in follower.of(first_of(given))])


@rule("slice", "split", "split_with_sizes", "chunk", "narrow", "unsafe_split", "unsafe_chunk", "tensor_split", "flip",
      "select", "unbind", "index_select")  # fmt: skip
def sliced(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """Parts along one dim (flip: several)."""
    value = first_of(given)
    asked: Any = given.get("dims", given.get("dim", 0))
    dims = [dim % value.ndim for dim in (asked if isinstance(asked, list | tuple) else [asked])]
    rest = {key: part for key, part in given.items() if key not in ("op", "self")}
    gone = given["op"]._schema.name in ("aten::select", "aten::unbind")
    table: list[list[Tensor]] = [[] for _ in outputs]
    for mark in follower.of(value):
        if any(mark.shape[dim] > 1 for dim in dims):
            parts = given["op"](mark, **rest)
            for place, part in enumerate([parts] if isinstance(parts, Tensor) else parts):
                table[place].append(compressed(part))
        else:
            for row in table:
                row.append(mark.squeeze(dims[0]) if gone else mark)
    for out, marks in zip(outputs, table, strict=True):
        follower.put(out, marks)


@rule("cat", "concat", "stack")
def joined(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """Side by side along one dim; along the others as at equal places."""
    out, name = outputs[0], given["op"]._schema.name
    dim = given.get("dim", 0) % out.ndim
    parts = [value for value in given["tensors"] if value.ndim > 0 and (value.numel() or value.ndim > 1)]
    new = name == "aten::stack"
    marks = [[mark.unsqueeze(dim) if new else mark for mark in follower.of(value)] for value in parts]
    beside: list[Tensor] = []
    for value, own in zip(parts, marks, strict=True):
        size = 1 if new else value.shape[dim]
        along = next((mark for mark in own if mark.shape[dim] > 1), None)
        beside.append(torch.zeros([size if d == dim else 1 for d in range(out.ndim)], dtype=torch.int64)
                      if along is None else along)  # fmt: skip
    shape = [max(part.shape[d] for part in beside) for d in range(out.ndim)]
    full = [part.expand([part.shape[d] if d == dim else shape[d] for d in range(out.ndim)]) for part in beside]
    others = [kept_without(follower, mark, [dim]) for own in marks for mark in own if mark.shape[dim] == 1]
    rest = merged(follower, [mark for mark in others if axes_of(mark)])
    for mark in rest:
        for value, own in zip(parts, marks, strict=True):
            for axis in axes_of(mark):
                if not any(each.shape[axis] > 1 for each in own) and not getattr(value, "_vss_loose", False):
                    follower.book.freeze(mark, axis, FIXED)
    whole = compressed(torch.cat(full, dim))
    follower.put(out, [whole, *rest] if (whole > 0).any() else rest)


@rule("repeat", "index", "gather", "roll", "unfold", "diagonal", "tile", "as_strided", "take_along_dim", "rot90",
      "repeat_interleave", "constant_pad_nd", "diag_embed",
      "embedding", "_unsafe_index")  # fmt: skip
def moved(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """Any other move of values: done to the mark, at the size of the tensor where the move touches what it names."""
    value, out = first_of(given), outputs[0]
    first = next(key for key, part in given.items() if part is value)
    rest = {key: part for key, part in given.items() if key not in ("op", first)}
    if given["op"]._schema.name == "aten::constant_pad_nd":
        rest["value"] = 0
    marks = []
    for mark in follower.of(value):
        if not set(_touched(given, value)) & set(axes_of(mark)):
            marks.append(mark)
            continue
        full = mark.expand(value.shape).contiguous()
        marks.append(compressed(given["op"](full, **rest)))
    follower.put(out, marks)


def _touched(given: Given, value: Tensor) -> Sequence[int]:
    """The dims of a tensor that a move changes, where that is known and keeps the number of dims."""
    name = given["op"]._schema.name.partition("::")[2]
    if name == "constant_pad_nd":
        pad = given["pad"]
        return [value.ndim - 1 - k // 2 for k, width in enumerate(pad) if width]
    if name == "roll":
        return [dim % value.ndim for dim in given.get("dims") or range(value.ndim)]
    return range(value.ndim)


@rule("channel_shuffle", "native_channel_shuffle")
def shuffled(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """(g d) -> (d g): a box of channels, turned."""
    value, out = first_of(given), outputs[0]
    labels = follower.axis(value, 1)
    if labels is not None:
        box = labels.view(given["groups"], -1)
        follower.book.joint(box)
        follower.put(out, [box.t().reshape([-1 if dim == 1 else 1 for dim in range(out.ndim)])])


@rule("pixel_shuffle")
def packed(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """(C r r, H, W) -> (C, r H, r W): r r neighbours make one channel."""
    value, out, square = first_of(given), outputs[0], given["upscale_factor"] ** 2
    labels = follower.axis(value, -3)
    follower.freeze(value, [value.ndim - 2, value.ndim - 1], FIXED)
    if labels is not None:
        rows = labels.view(-1, square)
        follower.book.unite(rows[:, :1], rows, FIXED)
        follower.put(out, [rows[:, 0].reshape(*(1,) * (out.ndim - 3), -1, 1, 1)])


@rule("pixel_unshuffle", "im2col")
def unpacked(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """(C, H, W) -> (C k, ...): one channel makes k neighbours."""
    value, out = first_of(given), outputs[0]
    dim = value.ndim - 3
    labels = follower.axis(value, dim)
    follower.freeze(value, [value.ndim - 2, value.ndim - 1], FIXED)
    if labels is not None:
        rows = labels.repeat_interleave(out.shape[dim] // len(labels))
        follower.put(out, [rows.reshape([-1 if d == dim else 1 for d in range(out.ndim)])])


SPATIAL = """
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d max_pool_indices
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d _adaptive_avg_pool3d
    adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d grid_sampler_2d grid_sampler_3d
    upsample_nearest1d upsample_linear1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_nearest3d
    upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
"""


@rule(*SPATIAL.split())
def spatial(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """Works along the last dims and leaves batch and channels alone."""
    value = first_of(given)
    count = next(int(digit) for digit in given["op"]._schema.name.replace("_aa", "") + "2" if digit.isdigit())
    dims = range(value.ndim - count, value.ndim)
    follower.freeze(value, dims, MIXED.format(given["op"]._schema.name.partition("::")[2]))
    marks = [kept_without(follower, mark, dims) for mark in follower.of(value)]
    for out in outputs:
        follower.put(out, marks)


@rule("max_unpool2d", "max_unpool3d", "max_unpool")
def unpooled(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """Values go where the indices of a pooling say: both keep the same channels."""
    value = first_of(given)
    follower.meet(value, 1, given["indices"], 1, "it is unpooled with indices of unknown origin")
    follower.put(outputs[0], follower.of(value))


def _dims(given: Given, value: Tensor) -> list[int]:
    dims = given.get("dim", given.get("dims"))
    listed = list(dims) if isinstance(dims, list | tuple) else [] if dims is None else [dims]
    return [dim % max(value.ndim, 1) for dim in listed] or list(range(value.ndim))


@rule("sum", "linalg_vector_norm", "norm", "amax", "amin", "max", "min", "nansum", "any", "all", "count_nonzero")
def reduced(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """A reduction in which a zero is as good as nothing; whether it is one, the probe sees."""
    value = first_of(given)
    if isinstance(given.get("other"), Tensor):
        return pointwise(follower, given, outputs)
    dims = _dims(given, value)
    for mark in follower.of(value):
        follower.book.read(mark)
    marks = [kept_without(follower, mark, dims) for mark in follower.of(value)]
    for out in outputs:
        keeps = out.ndim == value.ndim
        left = [dim for dim in range(value.ndim) if dim not in dims]
        follower.put(out, [mark if keeps else mark.reshape([mark.shape[d] for d in left]) for mark in marks])
    return None


@rule("mean", "var", "std", "var_mean", "std_mean", "prod", "logsumexp", "argmax", "argmin", "median", "nanmean",
      "mode", "kthvalue", "quantile", "topk")  # fmt: skip
def averaged(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """A reduction that counts its channels."""
    value = first_of(given)
    name = given["op"]._schema.name.partition("::")[2]
    if name == "topk":
        given = given | {"dim": given.get("dim", -1)}
    follower.freeze(value, _dims(given, value), MIXED.format(name))
    if name == "topk":
        dims = _dims(given, value)
        for out in outputs:
            follower.put(out, [kept_without(follower, mark, dims) for mark in follower.of(value)])
    else:
        reduced(follower, given, outputs)


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "sort", "_safe_softmax",
      "logcumsumexp", "renorm", "_masked_softmax")  # fmt: skip
def along(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """Every value depends on the others along one dim."""
    value = first_of(given)
    dims = _dims(given, value)
    follower.freeze(value, dims, MIXED.format(given["op"]._schema.name.partition("::")[2].strip("_")))
    for out in outputs:
        follower.put(out, follower.of(value))


@rule("glu")
def gated(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """First half times the sigmoid of the second."""
    value = first_of(given)
    dim = given.get("dim", -1) % value.ndim
    half = value.shape[dim] // 2
    marks = []
    for mark in follower.of(value):
        varies = mark.shape[dim] > 1
        marks += [mark.narrow(dim, 0, half), mark.narrow(dim, half, half)] if varies else [mark]
    follower.put(outputs[0], merged(follower, [compressed(mark) for mark in marks]))


@rule("col2im")
def folded(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """(N, C k, L) -> (N, C, H, W): k neighbours make one channel."""
    value, out = first_of(given), outputs[0]
    labels = follower.axis(value, 1)
    follower.freeze(value, [2], FIXED)
    if labels is not None:
        rows = labels.view(out.shape[1], -1)
        follower.book.unite(rows[:, :1], rows, FIXED)
        follower.put(out, [rows[:, 0].view(1, -1, 1, 1)])


@rule("masked_fill", "where", "index_put", "scatter", "scatter_add", "index_add", "index_copy", "masked_scatter")
def written(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """Values written at places that data choose; masks at equal places are as any operand."""
    name = given["op"]._schema.name.partition("::")[2]
    if name.startswith(("masked_fill", "where")):
        return pointwise(follower, given, outputs)
    for value in (each for each in given.values() if isinstance(each, Tensor)):
        follower.freeze(value, range(value.ndim), f"its channels reach {name}, an operation that cannot be followed")
    return None
