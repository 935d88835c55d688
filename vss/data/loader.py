"""Batches in an order that is a pure function of seed and epoch, shared out over processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from vss.core.errors import VssError
from vss.data.transforms import SegSplit


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (index, epoch) keys of this rank.

    With `shuffle` the order is a permutation drawn from (seed, epoch). With `pad` the order is repeated from its start
    until every rank has equally many (training: ranks step together); without, rank r takes r, r + world, ... and each
    index appears once over all ranks (evaluation).
    """

    def __init__(
        self, length: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world: int = 1, pad: bool = True
    ) -> None:
        if length < 1 or not 0 <= rank < world:
            raise VssError(f"length {length}, rank {rank} of {world} came; expected length >= 1 and 0 <= rank < world.")
        self.length, self.shuffle, self.seed = length, shuffle, seed
        self.rank, self.world, self.pad = rank, world, pad
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration (the trainer calls this)."""
        self.epoch = epoch

    def order(self) -> np.ndarray:
        """The indices of this epoch over all ranks, int64."""
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        return np.resize(order, -(-self.length // self.world) * self.world) if self.pad else order

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        return iter([(int(index), epoch) for index in self.order()[self.rank :: self.world]])

    def __len__(self) -> int:
        return len(range(self.rank, len(self.order()), self.world))


class BalancedSampler(EpochSampler):
    """Defective and sound images by turns: every epoch has all defective ones and equally many sound ones.

    Sound images are taken from one permutation after another, so that all of them are used equally often over the
    epochs, and no epoch ends in batches of one kind. Processes share out whole pairs.

    Args:
        labels: (n,) bool, True for a defect; both kinds must be there.
    """

    def __init__(self, labels: np.ndarray, *, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        self.defective, self.sound = np.flatnonzero(labels), np.flatnonzero(~np.asarray(labels, bool))
        if not len(self.defective) or not len(self.sound):
            raise VssError(
                f"{len(self.defective)} defective and {len(self.sound)} sound images came; balanced sampling needs "
                "both: add images, or set defect.balance to false."
            )
        super().__init__(2 * len(self.defective), shuffle=True, seed=seed, rank=rank, world=world)

    def order(self) -> np.ndarray:
        """The indices of this epoch over all ranks, int64, a defective one first."""
        count, size = len(self.defective), len(self.sound)
        defective = np.random.default_rng([self.seed, self.epoch]).permutation(self.defective)
        places = np.arange(self.epoch * count, (self.epoch + 1) * count)
        cycles = {cycle: np.random.default_rng([self.seed, int(cycle), 1]) for cycle in np.unique(places // size)}
        tables = {cycle: rng.permutation(self.sound) for cycle, rng in cycles.items()}
        sound = np.array([tables[place // size][place % size] for place in places])
        pairs = np.stack([defective, sound], axis=1)
        whole = np.resize(pairs, (-(-count // self.world) * self.world, 2))
        return whole.reshape(-1, self.world, 2).swapaxes(1, 2).reshape(-1)


def make_loader(
    split: SegSplit,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
    labels: np.ndarray | None = None,
) -> DataLoader[dict[str, torch.Tensor]]:
    """Batches `{"image": (N, 3, H, W) uint8, "mask": (N, H, W) int64, "index": (N,) int64}` of one rank.

    A shuffled (training) loader gives every rank equally many samples; a loader in order (evaluation) gives each sample
    once over all ranks. The epoch comes from `loader.sampler.set_epoch`. Global generators are not touched. With
    `labels`, (n,) bool, a shuffled loader takes defective and sound images by turns (`BalancedSampler`).
    """
    if batch_size < 1:
        raise VssError(f"batch size {batch_size} came; expected 1 or more.")
    sampler = EpochSampler(len(split), shuffle=shuffle, seed=seed, rank=rank, world=world, pad=shuffle)
    if shuffle and labels is not None:
        sampler = BalancedSampler(labels, seed=seed, rank=rank, world=world)
    if drop_last and len(sampler) < batch_size:
        raise VssError(
            f"split {split.split!r} gives {len(sampler)} images per process, fewer than one batch of {batch_size}, and "
            "incomplete batches are dropped; choose a smaller batch size."
        )
    return DataLoader(
        split,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=drop_last,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )
