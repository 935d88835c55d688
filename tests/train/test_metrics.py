"""vss.train.metrics against brute force in numpy float64, loops over pixels and classes."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics.classification import MulticlassConfusionMatrix

from vss.core.errors import VssError
from vss.train.losses import SegLearner, SegLoss
from vss.train.metrics import boundary_counts, boundary_width, confusion_per_image, miou_pct, scores

VOID = 255


def random_labels(seed: int, *, classes: int = 5, shape: tuple[int, ...] = (4, 24, 31), void: float = 0.1):
    """Blocky truth with void, and a prediction that is right for most pixels."""
    rng = np.random.default_rng(seed)
    count, height, width = shape
    coarse = rng.integers(0, classes, (count, -(-height // 5), -(-width // 5)))
    target = np.kron(coarse, np.ones((1, 5, 5), np.int64))[:, :height, :width]
    pred = np.where(rng.random(shape) < 0.15, rng.integers(0, classes, shape), np.roll(target, 1, axis=2))
    target = np.where(rng.random(shape) < void, VOID, target)
    return torch.from_numpy(pred.astype(np.uint8)), torch.from_numpy(target)


def brute_scores(pred: np.ndarray, target: np.ndarray, classes: int) -> dict:
    valid = target != VOID
    iou, recall, weighted, right = [], [], 0.0, int(((pred == target) & valid).sum())
    for k in range(classes):
        p, t = (pred == k) & valid, target == k
        union = int((p | t).sum())
        iou.append(100.0 * int((p & t).sum()) / union if union else None)
        if t.any():
            recall.append(100.0 * int((p & t).sum()) / int(t.sum()))
            weighted += iou[-1] * int(t.sum()) / int(valid.sum())
    present = [value for value in iou if value is not None]
    return {
        "miou_pct": sum(present) / len(present),
        "pixel_acc_pct": 100.0 * right / int(valid.sum()),
        "class_acc_pct": sum(recall) / len(recall),
        "fwiou_pct": weighted,
        "iou_pct": iou,
    }


def brute_boundary(mask: np.ndarray, counted: np.ndarray, width: int) -> np.ndarray:
    """Pixels of `mask` with a counted pixel outside of it, or the image's outside, in their square neighbourhood."""
    edge = np.zeros_like(mask)
    height, length = mask.shape
    for y, x in zip(*np.nonzero(mask & counted), strict=True):
        if y < width or x < width or y + width >= height or x + width >= length:
            edge[y, x] = True
            continue
        window = np.s_[y - width : y + width + 1, x - width : x + width + 1]
        edge[y, x] = bool((~mask[window] & counted[window]).any())
    return edge


def brute_boundary_iou(pred: np.ndarray, target: np.ndarray, classes: int, width: int) -> float:
    values = []
    for k in range(classes):
        both = either = 0
        for p, t in zip(pred, target, strict=True):
            counted = t != VOID
            a, b = brute_boundary(p == k, counted, width), brute_boundary(t == k, counted, width)
            both, either = both + int((a & b).sum()), either + int((a | b).sum())
        if either:
            values.append(100.0 * both / either)
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_equal_brute_force(seed: int) -> None:
    pred, target = random_labels(seed, classes=5)
    found = scores(confusion_per_image(pred, target, 7, VOID).sum(0))  # two classes never appear
    expected = brute_scores(pred.numpy(), target.numpy(), 7)
    assert found["iou_pct"][5:] == [None, None]
    for key in ("miou_pct", "pixel_acc_pct", "class_acc_pct", "fwiou_pct"):
        assert found[key] == pytest.approx(expected[key], abs=1e-9), key
    assert found["iou_pct"][:5] == pytest.approx(expected["iou_pct"][:5], abs=1e-9)


def test_confusion_equals_torchmetrics() -> None:
    pred, target = random_labels(3)
    reference = MulticlassConfusionMatrix(5, ignore_index=VOID)
    reference.update(pred.long(), target)
    found = confusion_per_image(pred, target, 5, VOID).sum(0)
    assert torch.equal(found, reference.compute()) and found.dtype == torch.int64


def test_confusion_per_image_is_one_matrix_each() -> None:
    pred, target = random_labels(4)
    each = confusion_per_image(pred, target, 5, VOID)
    assert each.shape == (4, 5, 5)
    for index in range(4):
        assert torch.equal(each[index], confusion_per_image(pred[index : index + 1], target[index : index + 1], 5)[0])


def test_class_only_predicted_counts_as_zero_and_rows_are_truth() -> None:
    pred, target = torch.tensor([[[0, 0, 1, 2]]]), torch.tensor([[[0, 0, 1, 1]]])
    confusion = confusion_per_image(pred, target, 4)[0]
    assert confusion.tolist() == [[2, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    found = scores(confusion)
    assert found["iou_pct"] == [100.0, 50.0, 0.0, None]
    assert found["miou_pct"] == pytest.approx(50.0)
    assert found["class_acc_pct"] == pytest.approx(75.0)
    assert found["fwiou_pct"] == pytest.approx(75.0)


def test_void_only_gives_none() -> None:
    nothing, void = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.full((1, 4, 4), VOID)
    confusion, edges = confusion_per_image(nothing, void, 3, VOID)[0], boundary_counts(nothing, void, 3, VOID)
    assert scores(confusion, edges) == {
        "miou_pct": None,
        "miou_truth_pct": None,
        "pixel_acc_pct": None,
        "class_acc_pct": None,
        "fwiou_pct": None,
        "iou_pct": [None, None, None],
        "boundary_iou_pct": None,
    }
    ones = torch.ones(1, 4, 4, dtype=torch.int64)
    found = scores(confusion_per_image(ones, ones, 3)[0], boundary_counts(ones, ones, 3))
    assert found["miou_pct"] == found["boundary_iou_pct"] == 100.0


def test_miou_of_many_matrices_equals_scores_of_each() -> None:
    pred, target = random_labels(5)
    each = confusion_per_image(pred, target, 6)
    assert miou_pct(each).tolist() == pytest.approx([scores(matrix)["miou_pct"] for matrix in each], abs=1e-9)


@pytest.mark.parametrize(
    ("pred", "target", "words"),
    [
        ([[[3, 0]]], [[[0, 0]]], "prediction labels reach from 0 to 3; expected 0..2"),
        ([[[0, 0]]], [[[0, 7]]], "truth labels reach from 0 to 7; expected 0..2 or 255"),
        ([[[0]]], [[[0, 0]]], r"\(1, 1, 1\) and truth \(1, 1, 2\)"),
    ],
)
def test_labels_outside_the_classes_are_refused(pred: list, target: list, words: str) -> None:
    with pytest.raises(VssError, match=words):
        confusion_per_image(torch.tensor(pred), torch.tensor(target), 3, VOID)


def test_prediction_under_void_is_not_looked_at() -> None:
    assert int(confusion_per_image(torch.tensor([[[200, 1]]]), torch.tensor([[[VOID, 1]]]), 3, VOID).sum()) == 1


@pytest.mark.parametrize(("height", "width", "expected"), [(10, 10, 1), (360, 480, 12), (1024, 2048, 46)])
def test_boundary_width_is_two_percent_of_the_diagonal(height: int, width: int, expected: int) -> None:
    assert boundary_width(height, width) == expected


@pytest.mark.parametrize("ratio", [0.02, 0.06, 0.12])
def test_boundary_iou_equals_brute_force(ratio: float) -> None:
    pred, target = random_labels(6, classes=3, shape=(2, 23, 30), void=0.05)
    both, either = boundary_counts(pred, target, 4, VOID, ratio)
    found = float((both[either > 0] / either[either > 0].double()).mean() * 100)
    expected = brute_boundary_iou(pred.numpy(), target.numpy(), 4, boundary_width(23, 30, ratio))
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0 < found < 100


def test_boundary_equals_the_papers_erosion_by_max_pool() -> None:
    """Cheng et al.: boundary = mask - erode(mask), zero outside; erosion is a max_pool of the complement."""
    pred, target = random_labels(7, classes=4, shape=(3, 40, 50), void=0.0)
    width = boundary_width(40, 50, 0.05)
    total = torch.zeros(2, 4, dtype=torch.int64)
    for k in range(4):
        edges = []
        for labels in (pred, target):
            mask = (labels == k).float()
            outside = torch.nn.functional.pad(1 - mask, (width,) * 4, value=1.0)
            edges.append((mask - (1 - torch.nn.functional.max_pool2d(outside, 2 * width + 1, 1))).bool())
        total[0, k], total[1, k] = (edges[0] & edges[1]).sum(), (edges[0] | edges[1]).sum()
    assert torch.equal(boundary_counts(pred, target, 4, VOID, 0.05), total)


def _distributed(rank: int, store: str, expected: float) -> None:
    torch.set_num_threads(1)  # a forked process has no OpenMP pool
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        assert _validated(rank, 2) == expected
    finally:
        dist.destroy_process_group()


def _validated(rank: int, world: int) -> float:
    pred, target = random_labels(8)
    learner = SegLearner(5, SegLoss(ignore_index=VOID))
    for index in range(rank, len(pred), world):
        network = SimpleNamespace(predict=lambda _, index=index: pred[index : index + 1])
        learner.update(network, torch.zeros(1), {"mask": target[index : index + 1]})
    return learner.compute()


def test_two_processes_give_the_validation_score_of_one(tmp_path: os.PathLike) -> None:
    pred, target = random_labels(8)
    expected = scores(confusion_per_image(pred, target, 5, VOID).sum(0))["miou_pct"]
    assert _validated(0, 1) == expected
    mp.start_processes(_distributed, args=(os.path.join(tmp_path, "store"), expected), nprocs=2, start_method="fork")
