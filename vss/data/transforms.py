"""From a picture to a tensor: one preprocessing object for every consumer, and joint augmentation.

Images stay uint8 RGB until `Preprocess.normalise`, so that training, calibration, evaluation, the exported graph and an
engine share one definition of the input.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator
from torchvision import tv_tensors
from torchvision.transforms import v2

from vss.core.errors import VssError
from vss.core.files import sha256_json
from vss.data.base import IGNORE
from vss.data.pixels import ImageKindError, to_rgb

Triple = tuple[float, float, float]
Size = tuple[PositiveInt, PositiveInt]


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
        if x.ndim < 3 or x.shape[-3] != 3:
            raise VssError(f"images of shape {tuple(x.shape)} came; expected (..., 3, H, W) in RGB.")
        mean, std = (torch.tensor(v, dtype=torch.float32, device=x.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (x.float() / 255 - mean) / std

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
