"""From a picture to batches: one preprocessing object for every consumer, joint augmentation, the split as a Dataset.

Images stay uint8 RGB until `Preprocess.normalise`, so that training, calibration, evaluation, the exported graph and an
engine share one definition of the input. The randomness of a sample is a pure function of (seed, epoch, index): it does
not depend on the order of reading, the number of workers or processes, or the state of the global generators.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from vss.core.errors import VssError
from vss.core.files import sha256_json
from vss.data.base import IGNORE, Pair, SegData
from vss.data.images import READING, sha256_files
from vss.data.preprocess import Preprocess, Size, resize_image, resize_mask


class Augment(BaseModel):
    """Joint augmentation of an image and its mask; the defaults suit street scenes, and every part can be switched off.

    Scale by a factor from `scale` (relative to the preprocessing size), pad (image with the mean colour, mask with
    255) and crop to `crop` (H, W; None: the preprocessing size), mirror with probability `hflip`, jitter the colours by
    up to the given factors (torchvision's `ColorJitter`). `scale=(1, 1)`, `hflip=0` and jitters of 0 change nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: tuple[float, float] = (0.75, 1.5)
    crop: Size | None = None
    hflip: float = Field(0.5, ge=0, le=1)
    brightness: float = Field(0.25, ge=0, le=1)
    contrast: float = Field(0.25, ge=0, le=1)
    saturation: float = Field(0.25, ge=0, le=1)
    hue: float = Field(0.0, ge=0, le=0.5)

    @field_validator("scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"scale is {value}; expected 0 < low <= high")
        return value

    def __call__(
        self, image: Image.Image, mask: np.ndarray, *, preprocess: Preprocess, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(RGB image, (h, w) class indices) -> ((3, H, W) uint8, (H, W) int64), a pure function of `seed`.

        The image is resampled once, from its own size to the scaled size.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            factor = float(torch.empty(()).uniform_(*self.scale))
            size = (max(1, round(preprocess.size[0] * factor)), max(1, round(preprocess.size[1] * factor)))
            pair = (tv_tensors.Image(resize_image(image, size)), tv_tensors.Mask(resize_mask(mask, size)))
            image_out, mask_out = _pipeline(self, preprocess)(*pair)
        return image_out.as_subclass(torch.Tensor).contiguous(), mask_out.as_subclass(torch.Tensor).contiguous()


@functools.lru_cache(maxsize=16)
def _pipeline(augment: Augment, preprocess: Preprocess) -> v2.Transform:
    """The part after scaling. Transforms hold no state, so they are built once."""
    fill: dict[type, int | list[int]] = {
        tv_tensors.Image: [round(255 * value) for value in preprocess.mean],
        tv_tensors.Mask: IGNORE,
    }
    steps: list[v2.Transform] = [v2.RandomCrop(augment.crop or preprocess.size, pad_if_needed=True, fill=fill)]
    if augment.hflip:
        steps.append(v2.RandomHorizontalFlip(augment.hflip))
    if augment.brightness or augment.contrast or augment.saturation or augment.hue:
        jitter = {name: getattr(augment, name) for name in ("brightness", "contrast", "saturation", "hue")}
        steps.append(v2.ColorJitter(**jitter))
    return v2.Compose(steps)


Key = int | tuple[int, int]


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A 63-bit seed, well mixed, from three integers."""
    words = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def _limited(pairs: list[Pair], limit: int | None) -> list[Pair]:
    if limit is None or limit >= len(pairs):
        return list(pairs)
    return [pairs[index * len(pairs) // limit] for index in range(limit)]


@dataclass(eq=False, repr=False)
class SegSplit(Dataset[dict[str, Any]]):
    """One split as a torch Dataset of `{"image": (3, H, W) uint8, "mask": (H, W) int64, "index": int}`.

    A key is an index, or (index, epoch): with `augment`, the randomness of a sample is a pure function of
    (seed, epoch, index). `limit` keeps that many pairs, spread evenly over the split.
    """

    data: SegData
    split: str
    preprocess: Preprocess
    augment: Augment | None = None
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise VssError(f"limit is {self.limit}; expected 1 or more images, or no limit.")
        self.pairs = _limited(self.data.pairs(self.split), self.limit)
        if not self.pairs:
            raise VssError(f"split {self.split!r} of {self.data.root} is empty; expected images with masks: add them.")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        index = range(len(self.pairs))[index]
        image, mask = self.read(self.pairs[index])
        if self.augment is None:
            return {"image": self.preprocess.image(image), "mask": self.preprocess.mask(mask), "index": index}
        x, y = self.augment(image, mask, preprocess=self.preprocess, seed=sample_seed(self.seed, epoch, index))
        return {"image": x, "mask": y, "index": index}

    def read(self, pair: Pair) -> tuple[Image.Image, np.ndarray]:
        """(8-bit RGB image, decoded mask) before anything is resized."""
        return self.data.read(pair)

    @property
    def ids(self) -> list[str]:
        """The ids of the pairs, in index order."""
        return [pair.id for pair in self.pairs]

    def sha256(self) -> str:
        """Hex SHA-256 over the split's ids, the contents of images and masks, and what the masks' values mean."""
        digests = sha256_files([path for pair in self.pairs for path in (pair.image, pair.mask)])
        rows = zip(self.ids, digests[::2], digests[1::2], strict=True)
        return sha256_json([READING, self.data.meaning, list(rows)])


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
            "incomplete batches are dropped; give a smaller --batch-size (train.batch_size, finetune.batch_size)."
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
