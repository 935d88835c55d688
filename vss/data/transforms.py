"""From a file to a tensor: one preprocessing object for every consumer, joint augmentation, and the split as a Dataset.

Images stay uint8 RGB until `Preprocess.normalise`, so that training, calibration, evaluation, the exported graph and an
engine share one definition of the input. Randomness is a pure function of (seed, epoch, index): it does not depend on
the order of reading, the number of workers or the state of the global generators.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from vss.core.errors import VssError
from vss.core.files import sha256_json
from vss.data.base import Pair, SegData
from vss.data.contents import sha256_files
from vss.data.images import READING, open_rgb
from vss.data.labels import IGNORE
from vss.data.pixels import ImageKindError, to_rgb
from vss.data.presence import class_counts

__all__ = ["Augment", "Preprocess", "SegSplit", "open_rgb", "resize_image", "resize_mask", "sample_seed"]

Triple = tuple[float, float, float]
Size = tuple[PositiveInt, PositiveInt]
Key = int | tuple[int, int]


def resize_image(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """8-bit RGB image -> (3, H, W) uint8 by bilinear resampling with antialiasing (Pillow)."""
    if (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def resize_mask(mask: np.ndarray | Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """(h, w) class indices 0..255 -> (H, W) int64 by nearest neighbour at pixel centres (Pillow)."""
    picture = mask if isinstance(mask, Image.Image) else Image.fromarray(np.asarray(mask, dtype=np.uint8))
    if (picture.height, picture.width) != size:
        picture = picture.resize((size[1], size[0]), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(picture).astype(np.int64))


class Preprocess(BaseModel):
    """What happens to every image: resize to `size` (H, W), then (x / 255 - mean) / std per RGB channel.

    `mean` and `std` are in units of 0..1; the defaults are those of ImageNet.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Size
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)

    @field_validator("std")
    @classmethod
    def _positive(cls, value: Triple) -> Triple:
        if min(value) <= 0:
            raise ValueError(f"std is {value}; expected three numbers above 0")
        return value

    def image(self, image: Image.Image) -> torch.Tensor:
        """A picture, as `open_rgb` reads it from a file, -> (3, H, W) uint8 RGB."""
        try:
            return resize_image(to_rgb(image), self.size)
        except ImageKindError as error:
            raise VssError(f"the picture {error}.") from error

    def mask(self, mask: np.ndarray | Image.Image) -> torch.Tensor:
        """(h, w) class indices -> (H, W) int64."""
        return resize_mask(mask, self.size)

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 3, H, W) uint8 -> float32, (x / 255 - mean) / std, on the device of `x`."""
        mean, std = self._statistics(x)
        return (x.float() / 255 - mean) / std

    def denormalise(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 3, H, W) float -> uint8, the inverse of `normalise`, rounded and clamped."""
        mean, std = self._statistics(x)
        return ((x.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def _statistics(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if x.ndim < 3 or x.shape[-3] != 3:
            raise VssError(f"images of shape {tuple(x.shape)} came; expected (..., 3, H, W) in RGB.")
        mean = torch.tensor(self.mean, dtype=torch.float32, device=x.device).view(3, 1, 1)
        return mean, torch.tensor(self.std, dtype=torch.float32, device=x.device).view(3, 1, 1)

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the values."""
        return sha256_json(self.model_dump(mode="json"))


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
    fill: dict[Any, Any] = {
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


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A 63-bit seed, well mixed, from three integers."""
    words = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def _limited(pairs: list[Pair], limit: int | None) -> list[Pair]:
    if limit is None or limit >= len(pairs):
        return list(pairs)
    return [pairs[index * len(pairs) // limit] for index in range(limit)]


class SegSplit(Dataset[dict[str, Any]]):
    """One split as a torch Dataset of `{"image": (3, H, W) uint8, "mask": (H, W) int64, "index": int}`.

    A key is an index, or (index, epoch): with `augment`, the randomness of a sample is a pure function of
    (seed, epoch, index). `limit` keeps that many pairs, spread evenly over the split.
    """

    def __init__(
        self,
        data: SegData,
        split: str,
        preprocess: Preprocess,
        augment: Augment | None = None,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise VssError(f"limit is {limit}; expected 1 or more images, or no limit.")
        self.data, self.split, self.preprocess, self.augment, self.seed = data, split, preprocess, augment, seed
        self.pairs = _limited(data.pairs(split), limit)
        if not self.pairs:
            raise VssError(f"split {split!r} of {data.root} is empty; expected images with masks: add them.")

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


# A split of defect images: is there a defect, where, and how much each position of the map counts in training.


DEFECT = 1


def labels_of(data: SegData, pairs: Collection[Pair]) -> np.ndarray:
    """(n,) bool, True where the stored mask shows a defect; masks are read once."""
    return class_counts(data, list(pairs))[:, DEFECT] > 0


def distance_weights(mask: np.ndarray, *, power: float = 2.0, maximum: float = 3.0) -> np.ndarray:
    """How much each pixel counts in the loss of the map (Bozic et al. 2021, section 3.2).

    Inside each defect (8-connected) the distance to its edge, divided by the largest one there, to the `power`, times
    `maximum`; 1 elsewhere, and where an image is all defect.

    Args:
        mask: (H, W) bool.

    Returns:
        (H, W) float32, from 0 to `maximum`.
    """
    weights = np.ones(mask.shape, np.float32)
    if not mask.any() or mask.all():
        return weights
    distance = ndimage.distance_transform_edt(mask)
    regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
    tops = np.concatenate([[1.0], ndimage.maximum(distance, regions, range(1, count + 1))])
    weights[mask] = (maximum * (distance / tops[regions]) ** power)[mask]
    return weights


def shrink(x: Tensor, stride: int) -> Tensor:
    """(H, W) float -> (H / stride, W / stride): mean over windows of 2 stride + 1, reflected at the border.

    This is how the published code brings mask and weights to the size of the map; a mask becomes soft.
    """
    padded = F.pad(x[None, None], (stride,) * 4, mode="reflect")
    return F.avg_pool2d(padded, 2 * stride + 1, stride=stride)[0, 0]


@dataclass(frozen=True)
class Targets:
    """How masks become targets of the map.

    Attributes:
        stride: image size / map size.
        dilate: side in stored pixels of the square by which masks grow, odd; 1 leaves them.
        power, maximum: see `distance_weights`.
        annotated: ids of the images whose mask may be used (mixed supervision); None: all.
    """

    stride: int = 8
    dilate: int = 1
    power: float = 2.0
    maximum: float = 3.0
    annotated: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if self.dilate < 1 or self.dilate % 2 == 0:
            raise VssError(f"defect.dilate is {self.dilate}; expected an odd number of pixels, 1 for none.")

    def of(self, mask: Tensor) -> dict[str, Tensor]:
        """(H, W) int64 with 0, 1 and 255 for void -> `target` and `weight`, (H / stride, W / stride) float32."""
        defect = mask == DEFECT
        weight = torch.from_numpy(distance_weights(defect.numpy(), power=self.power, maximum=self.maximum))
        weight[mask == 255] = 0
        return {"target": shrink(defect.float(), self.stride), "weight": shrink(weight, self.stride)}


class DefectSplit(SegSplit):
    """A `SegSplit` whose samples also have `label`: float32, 1 for a defect.

    With `targets` (training) samples have `target` and `weight`, see `Targets.of`, and `annotated`: float32, 0 where
    the map is not to be taught; their mask is the dilated one.
    """

    def __init__(
        self,
        data: SegData,
        split: str,
        preprocess: Preprocess,
        augment: Augment | None = None,
        seed: int = 0,
        limit: int | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(data, split, preprocess, augment, seed, limit)
        self.targets = targets
        self.labels = labels_of(data, self.pairs)

    def read(self, pair: Pair) -> tuple[Image.Image, np.ndarray]:
        """As stored; in training the mask is dilated."""
        image, mask = super().read(pair)
        if self.targets is not None and self.targets.dilate > 1:
            mask = ndimage.maximum_filter(mask, size=self.targets.dilate, mode="constant")
        return image, mask

    def __getitem__(self, key: Key) -> dict[str, Any]:
        item = super().__getitem__(key)
        item["label"] = torch.tensor(float(self.labels[item["index"]]))
        if self.targets is not None:
            known = self.targets.annotated
            taught = known is None or self.pairs[item["index"]].id in known
            item |= {**self.targets.of(item["mask"]), "annotated": torch.tensor(float(taught))}
        return item


def choose_annotated(data: SegData, pairs: Collection[Pair], count: int, *, seed: int = 0) -> frozenset[str]:
    """Ids whose masks may be used when `count` defective images have one: those, chosen by SHA-256 of seed and id,
    and all sound ones, whose masks are known to be empty."""
    labels = labels_of(data, pairs)
    defective = [pair.id for pair, label in zip(pairs, labels, strict=True) if label]
    if not 0 <= count <= len(defective):
        raise VssError(f"defect.annotated is {count}; expected 0..{len(defective)}, the defective training images.")
    defective.sort(key=lambda name: hashlib.sha256(f"annotated:{seed}:{name}".encode()).digest())
    sound = [pair.id for pair, label in zip(pairs, labels, strict=True) if not label]
    return frozenset(defective[:count]) | frozenset(sound)
