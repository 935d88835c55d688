"""What products and norms do to marks: convolutions, matrices, attention, and statistics over channels."""

from __future__ import annotations

import math

from torch import Tensor

from vss.prune.follow import FIXED, MIXED, Follower, kept_without, merged, pointwise, rule
from vss.prune.labels import axes_of
from vss.prune.moves import Given, first_of

GROUPED = "several heads of queries share one of keys and values in a call that counts them"


@rule("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "_batch_norm_with_update", "batch_norm", "_batch_norm_no_update", "miopen_batch_norm")  # fmt: skip
def normalised(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """Statistics of each channel by itself."""
    value = first_of(given)
    for key in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(given.get(key), Tensor) and given[key].numel():
            follower.meet(value, 1, given[key], 0)
            follower.role(follower.axis(given[key], 0), "norm")
    follower.freeze(value, range(2, value.ndim), MIXED.format("batch norm"))
    follower.put(outputs[0], [kept_without(follower, mark, range(2, value.ndim)) for mark in follower.of(value)])


@rule("native_group_norm", "group_norm")
def group_normalised(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """Statistics over the channels of a group: whole groups leave."""
    value, groups = first_of(given), int(given["group"] if "group" in given else given["num_groups"])
    labels = follower.axis(value, 1)
    for key in ("weight", "bias"):
        if isinstance(given.get(key), Tensor):
            follower.meet(value, 1, given[key], 0)
            follower.role(follower.axis(given[key], 0), "norm")
        elif labels is not None:
            follower.freeze(value, [1], "a GroupNorm without weights, whose size nothing records, normalises it")
    if groups == 1:
        follower.freeze(value, [1], "a GroupNorm of one group normalises across all its channels")
    elif labels is not None:
        rows = labels.view(groups, -1)
        follower.book.unite(rows[:, :1], rows, FIXED)
    follower.put(outputs[0], [kept_without(follower, mark, range(2, value.ndim)) for mark in follower.of(value)])


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def layer_normalised(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """Statistics over the channels: they stay."""
    value, shape = first_of(given), given["normalized_shape"]
    dims = range(value.ndim - len(shape), value.ndim)
    for key in ("weight", "bias"):
        if isinstance(given.get(key), Tensor):
            for place, dim in enumerate(dims):
                follower.meet(value, dim, given[key], place)
    follower.freeze(value, dims, "a LayerNorm normalises across its channels")
    follower.put(outputs[0], follower.of(value))


@rule("convolution", "_convolution", "conv2d", "conv1d", "conv3d", "mkldnn_convolution", "convolution_overrideable")
def convolved(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """(N, I, ...) * weight (O, I / groups, ...), transposed (I, O / groups, ...)."""
    value, weight, bias = given["input"], given["weight"], given.get("bias")
    groups, transposed, out = given.get("groups", 1), given.get("transposed", False), outputs[0]
    follower.freeze(value, range(2, value.ndim), FIXED)
    makes, takes = (1, 0) if transposed else (0, 1)
    if groups == 1:
        follower.meet(value, 1, weight, takes, "its channels meet the image or values of a fixed number")
        follower.role(follower.axis(weight, takes), "consumer")
        labels = follower.axis(weight, makes)
    elif transposed:
        follower.freeze(value, [1], "a transposed grouped convolution is not cut")
        follower.freeze(weight, [0, 1], "a transposed grouped convolution is not cut")
        labels = None
    else:
        labels = _grouped(follower, value, weight, groups)
    follower.role(labels, "norm" if groups == weight.shape[0] == value.shape[1] > 1 else "producer")
    if labels is not None:
        mark = labels.view([-1 if dim == 1 else 1 for dim in range(out.ndim)])
        follower.put(out, [mark])
        if isinstance(bias, Tensor):
            follower.meet(out, 1, bias, 0)
            follower.role(follower.axis(bias, 0), "producer")
    elif isinstance(bias, Tensor):
        follower.freeze(bias, [0], FIXED)


def _grouped(follower: Follower, value: Tensor, weight: Tensor, groups: int) -> Tensor | None:
    """Whole groups of a grouped convolution leave, with what they read and what they make."""
    labels, given = follower.axis(weight, 0), follower.axis(value, 1)
    follower.freeze(weight, [1], FIXED)
    if given is None or labels is None:
        reason = "a grouped convolution makes it from the image, or from what has no channels to cut"
        follower.freeze(weight, [0], reason)
        follower.freeze(value, [1], reason)
        return labels
    reads, makes = given.view(groups, -1), labels.view(groups, -1)
    follower.book.unite(reads[:, :1], reads, FIXED)
    follower.book.unite(makes[:, :1], makes, FIXED)
    follower.book.unite(reads[:, 0], makes[:, 0], FIXED)
    return labels


@rule("mm", "bmm", "matmul", "addmm", "baddbmm", "mv", "dot", "linear", "addmv")
def multiplied(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """(..., n, k) x (..., k, m): both lose the same of k, and the same matrices of a batch."""
    name = given["op"]._schema.name.partition("::")[2]
    first, second = [v for k, v in given.items() if isinstance(v, Tensor) and k not in ("bias", "beta")][
        1 if name in ("addmm", "baddbmm", "addmv") else 0 :][:2]  # fmt: skip
    out = outputs[0]
    if name in ("linear", "mv", "dot", "addmv", "matmul"):
        for value in (first, second):
            follower.freeze(value, range(value.ndim), f"its channels reach {name}, an operation that is not followed")
        return
    contracted(follower, first, second, -1, -2)
    if first.ndim == second.ndim == 3:
        follower.meet(first, 0, second, 0)
    follower.role(_owned(follower, second, 1), "producer")
    follower.role(_owned(follower, first, 0), "producer")
    follower.role(_owned(follower, second, 0), "consumer")
    follower.role(_owned(follower, first, 1), "consumer")
    marks = [kept_without(follower, mark, [out.ndim - 1]) for mark in follower.of(first)]
    marks += [kept_without(follower, mark, [out.ndim - 2]) for mark in follower.of(second)]
    follower.put(out, merged(follower, [mark for mark in marks if axes_of(mark)]))
    if isinstance(given.get("self"), Tensor) and name in ("addmm", "baddbmm"):
        follower.role(_owned(follower, given["self"], -1), "producer")
        pointwise(follower, {"op": given["op"], "out": out, "bias": given["self"]}, outputs)


def _owned(follower: Follower, value: Tensor, dim: int) -> Tensor | None:
    """The labels of a weight, also turned; None of what is computed."""
    if value.ndim > 2 or -dim > value.ndim:
        return None
    labels = follower.axis(value, dim)
    spans = [] if labels is None else follower.book.spans_of(labels)
    return labels if labels is not None and sum(span.length for span in spans) == len(labels) and any(
        value.numel() == math.prod(follower.shapes[span.tensor]) for span in spans) else None  # fmt: skip


def contracted(follower: Follower, first: Tensor, second: Tensor, one: int, other: int) -> None:
    """A sum of products over dim `one` of `first` and `other` of `second`, whose dims before the last two are alike."""
    a = next((mark for mark in follower.of(first) if first.ndim + one in axes_of(mark)), None)
    b = next((mark for mark in follower.of(second) if second.ndim + other in axes_of(mark)), None)
    for mark in (a, b):
        follower.book.read(mark)
    boxes = a is not None and b is not None and len(axes_of(a)) > 1 and len(axes_of(b)) > 1
    if boxes and set(axes_of(a)) - {first.ndim + one} == set(axes_of(b)) - {second.ndim + other}:  # type: ignore[arg-type]
        follower.book.unite(a.movedim(one, -1).squeeze(-2), b.movedim(other, -1).squeeze(-2), FIXED)  # type: ignore[union-attr]
    else:
        follower.meet(first, one, second, other)


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_attention_math",
      "scaled_dot_product_attention")  # fmt: skip
def attended(follower: Follower, given: Given, outputs: list[Tensor]) -> None:
    """query (B, heads, n, d), key (B, heads, m, d), value (B, heads, m, e), a mask or bias -> (B, heads, n, e)."""
    query, key, value = given["query"], given["key"], given["value"]
    mask = given.get("attn_mask", given.get("attn_bias"))
    if any(len({*sizes} - {1}) > 1 for sizes in zip(query.shape[:-2], key.shape[:-2], strict=True)):
        for each in (query, key, value):
            follower.freeze(each, range(each.ndim), GROUPED)
        follower.put(outputs[0], [])
        return
    follower.freeze(query, [query.ndim - 2], FIXED)
    follower.freeze(key, [key.ndim - 2], MIXED.format("softmax"))
    follower.freeze(value, [value.ndim - 2], MIXED.format("softmax"))
    if given.get("scale") is None:
        for each in (query, key):
            follower.freeze(each, [each.ndim - 1], "attention without a scale of its own divides by their number")
    contracted(follower, query, key, -1, -1)
    for dim in range(query.ndim - 2):
        follower.meet(query, dim, value, dim)
        follower.meet(key, dim, value, dim)
    if isinstance(mask, Tensor):
        follower.freeze(mask, [mask.ndim - 2, mask.ndim - 1], MIXED.format("softmax"))
        for dim in range(mask.ndim - 2):
            if mask.shape[dim] > 1 and mask.stride(dim):
                follower.meet(mask, dim, value, dim + value.ndim - mask.ndim)
    marks = [kept_without(follower, mark, [value.ndim - 2]) for mark in follower.of(value)]
    follower.put(outputs[0], marks)
