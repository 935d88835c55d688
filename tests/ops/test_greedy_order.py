"""greedy_order on both floors against the O(C^3) definition in float64."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Floors, of, similarity
from torch import Tensor

from vss import ops

CASES = pytest.mark.parametrize("case", [c for c in of("greedy_order") if not c.bench], ids=lambda case: case.name)


def definition(a: Tensor) -> tuple[list[int], Tensor]:
    """Every step sums the matrix of what is left, in float64."""
    left, value, order = list(range(a.shape[0])), torch.zeros(a.shape[0], dtype=torch.float64), []
    while left:
        sums = a.double()[left][:, left].sum(1)
        at = int(sums.argmax())
        value[left[at]] = sums[at]
        order.append(left.pop(at))
    return order, value


@CASES
def test_order_and_values_are_those_of_the_definition(case: Case, floor: Floors) -> None:
    (matrices,) = case.inputs()
    order, value = floor("greedy_order")(matrices)
    sizes = [a.shape[0] for a in matrices]
    for a, got, sums in zip(matrices, order.split(sizes), value.split(sizes), strict=True):
        expected, expected_sums = definition(a)
        assert got.tolist() == expected
        torch.testing.assert_close(sums, expected_sums, rtol=1e-12, atol=1e-9)


def test_the_objective_falls_by_exactly_the_removed_sum_and_values_never_rise(floor: Floors) -> None:
    a = similarity(40)
    order, value = floor("greedy_order")([a])
    left, total = list(range(40)), a.double().tril(-1).sum()
    for k in order.tolist():
        left.remove(k)
        after = a.double()[left][:, left].tril(-1).sum()
        assert abs(total - after - value[k]) < 1e-9
        total = after
    assert total == 0 and (value[order].diff() <= 1e-9).all()


def test_a_tie_goes_to_the_lowest_index(floor: Floors) -> None:
    order, value = floor("greedy_order")([torch.ones(20, 20)])
    assert order.tolist() == list(range(20))
    assert value.tolist() == list(range(20, 0, -1))


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_a_special_value_is_removed_first_and_shows_in_the_values(special: float, floor: Floors) -> None:
    a = similarity(19)
    a[7, 12] = a[12, 7] = special
    order, value = floor("greedy_order")([a])
    assert order[0] == 7 and sorted(order.tolist()) == list(range(19))
    assert not value[7].isfinite()


def test_a_dead_channel_is_removed_last(floor: Floors) -> None:
    a = similarity(12)
    a[5], a[:, 5] = 0, 0
    order, value = floor("greedy_order")([a])
    assert set(order[-2:].tolist()) >= {5} and value[5] == 0


def test_the_public_forms_split_what_the_op_concatenates() -> None:
    matrices = [similarity(5), similarity(9)]
    both = ops.greedy_orders(matrices)
    for a, (order, value) in zip(matrices, both, strict=True):
        alone, alone_value = ops.greedy_order(a)
        assert torch.equal(order, alone) and torch.equal(value, alone_value)
    assert ops.greedy_orders([]) == []


BAD = [
    (torch.zeros(3, 4), r"must be \(C, C\), got shape \[3, 4\]"),
    (torch.zeros(3), r"must be \(C, C\), got shape \[3\]"),
    (torch.zeros(0, 0), "1 to 65536 channels, got 0"),
    (torch.zeros(3, 3, dtype=torch.float16), "must be float32, got"),
]


@pytest.mark.parametrize(("matrix", "message"), BAD)
def test_bad_input_is_one_clear_sentence(matrix: Tensor, message: str, floor: Floors) -> None:
    with pytest.raises(ValueError, match=f"greedy_order: .*{message}"):
        floor("greedy_order")([similarity(4), matrix])


def test_matrices_on_two_devices_are_refused(floor: Floors) -> None:
    with pytest.raises(ValueError, match=r"greedy_order: all tensors must be on one device, got .* and "):
        floor("greedy_order")([similarity(4), similarity(4).to("meta")])


def test_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="greedy_order: at least one similarity matrix is needed, got none"):
        ops.reference_pruning.greedy_order([])
