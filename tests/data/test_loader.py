from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vss.core.errors import VssError
from vss.data import (
    Augment,
    BadSampleError,
    BalancedSampler,
    EpochSampler,
    Preprocess,
    SegSplit,
    make_loader,
    open_data,
)


@pytest.fixture
def split(street_root: Path) -> SegSplit:
    return SegSplit(open_data("camvid", street_root), "train", Preprocess(size=(48, 64)), Augment(), seed=3)


def keys(sampler: EpochSampler, epoch: int = 0) -> list[tuple[int, int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    one = EpochSampler(50, shuffle=True, seed=4)
    first = keys(one, 3)
    torch.manual_seed(1)
    assert keys(EpochSampler(50, shuffle=True, seed=4), 3) == first
    assert sorted(index for index, _ in first) == list(range(50)) and {epoch for _, epoch in first} == {3}
    others = [keys(one, 4), keys(EpochSampler(50, shuffle=True, seed=5), 3)]
    assert all([index for index, _ in other] != [index for index, _ in first] for other in others)
    assert keys(EpochSampler(5, shuffle=False), 2) == [(index, 2) for index in range(5)]


@pytest.mark.parametrize(("length", "world"), [(10, 3), (8, 4), (2, 5), (7, 1)])
def test_ranks(length: int, world: int) -> None:
    def shares(pad: bool) -> list[list[int]]:
        samplers = [EpochSampler(length, shuffle=pad, rank=rank, world=world, pad=pad) for rank in range(world)]
        for sampler in samplers:
            assert len(list(sampler)) == len(sampler)
        return [[index for index, _ in sampler] for sampler in samplers]

    training, evaluation = shares(True), shares(False)
    each = -(-length // world)
    assert [len(share) for share in training] == [each] * world
    counts = np.bincount(np.concatenate(training), minlength=length)
    assert counts.min() >= 1 and counts.max() - counts.min() <= 1
    assert evaluation == [list(range(length))[rank::world] for rank in range(world)]


def test_one_process_and_two_see_the_same_global_batch(split: SegSplit) -> None:
    whole = make_loader(split, batch_size=8, shuffle=True, seed=2)
    halves = [make_loader(split, batch_size=4, shuffle=True, seed=2, rank=rank, world=2) for rank in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert set(batch["index"].tolist()) == {i for part in parts for i in part["index"].tolist()}


def test_workers_do_not_change_the_batches(split: SegSplit) -> None:
    before = torch.get_rng_state()
    loaders = [make_loader(split, batch_size=5, shuffle=True, seed=2, workers=workers) for workers in (0, 2)]
    for epoch in (0, 1):
        for loader in loaders:
            assert isinstance(loader.sampler, EpochSampler)
            loader.sampler.set_epoch(epoch)
        batches = [list(loader) for loader in loaders]
        assert [len(batch["index"]) for batch in batches[0]] == [5, 5, 5, 5, 4]
        for one, two in zip(*batches, strict=True):
            assert all(torch.equal(one[name], two[name]) for name in ("image", "mask", "index"))
    assert torch.equal(before, torch.get_rng_state())


def test_batch_shapes_and_drop_last(split: SegSplit) -> None:
    loader = make_loader(split, batch_size=5, shuffle=True, drop_last=True)
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert batches[0]["image"].shape == (5, 3, 48, 64) and batches[0]["image"].dtype == torch.uint8
    assert batches[0]["mask"].shape == (5, 48, 64) and batches[0]["mask"].dtype == torch.int64
    with pytest.raises(VssError, match=r"gives 24 images per process, fewer than one batch of 25, .* --batch-size \("):
        make_loader(split, batch_size=25, shuffle=True, drop_last=True)
    with pytest.raises(VssError, match="batch size 0 came"):
        make_loader(split, batch_size=0, shuffle=True)
    with pytest.raises(VssError, match="rank 2 of 2 came"):
        make_loader(split, batch_size=1, shuffle=True, rank=2, world=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_one_sentence_with_workers_too(camvid_root: Path, workers: int) -> None:
    path = camvid_root / "train" / "a1.png"
    data = open_data("camvid", camvid_root)
    path.write_bytes(path.read_bytes()[:60])
    loader = make_loader(SegSplit(data, "train", Preprocess(size=(8, 8))), batch_size=3, shuffle=False, workers=workers)
    with pytest.raises(BadSampleError) as caught:
        list(loader)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_balanced_sampler_no_negative_tail_epochs_alternate_and_use_every_sound_image_equally_often() -> None:
    labels = np.zeros(23, bool)
    labels[[3, 7, 11, 20]] = True
    sampler = BalancedSampler(labels, seed=5)
    used: dict[int, int] = {}
    for epoch in range(19):  # 19 * 4 places = 4 passes over the 19 sound images
        sampler.set_epoch(epoch)
        order = [index for index, _ in sampler]
        assert len(order) == len(sampler) == 8 and labels[order[::2]].all() and not labels[order[1::2]].any()
        assert sorted(order[::2]) == [3, 7, 11, 20]
        for index in order[1::2]:
            used[index] = used.get(index, 0) + 1
    assert set(used.values()) == {4} and len(used) == 19


def test_balanced_order_depends_on_seed_and_epoch_alone() -> None:
    labels = np.arange(30) % 5 == 0
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            sampler = BalancedSampler(labels, seed=seed)
            sampler.set_epoch(epoch)
            orders[seed, epoch] = sampler.order().tolist()
            assert orders[seed, epoch] == sampler.order().tolist()
    assert len({tuple(order) for order in orders.values()}) == 4


@pytest.mark.parametrize("world", [1, 2, 3])
def test_balanced_processes_share_out_pairs(world: int) -> None:
    labels = np.arange(28) % 4 == 0  # seven defective
    parts = [list(BalancedSampler(labels, seed=2, rank=rank, world=world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1 and len(parts[0]) == 2 * -(-7 // world)
    for part in parts:
        assert labels[[index for index, _ in part[::2]]].all() and not labels[[i for i, _ in part[1::2]]].any()
    assert {index for part in parts for index, _ in part[::2]} == set(np.flatnonzero(labels).tolist())


def test_more_defective_than_sound_images() -> None:
    labels = np.array([True] * 5 + [False] * 2)
    sampler = BalancedSampler(labels)
    order = [index for index, _ in sampler]
    assert sorted(order[::2]) == [0, 1, 2, 3, 4] and set(order[1::2]) == {5, 6}


@pytest.mark.parametrize("labels", [np.ones(4, bool), np.zeros(4, bool)])
def test_one_kind_alone_cannot_be_balanced(labels: np.ndarray) -> None:
    with pytest.raises(VssError, match="needs both"):
        BalancedSampler(labels)
