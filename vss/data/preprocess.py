"""The one preprocessing of every step and engine, and how pictures and masks are resized; torch comes when one is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt, field_validator

from vss.core.errors import VssError
from vss.core.files import sha256_json

if TYPE_CHECKING:
    import torch
    from PIL import Image

Triple = tuple[float, float, float]
Size = tuple[PositiveInt, PositiveInt]


def resize_image(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """8-bit RGB image -> (3, H, W) uint8 by bilinear resampling with antialiasing (Pillow)."""
    import torch
    from PIL import Image

    if (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def resize_mask(mask: np.ndarray | Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """(h, w) class indices 0..255 -> (H, W) int64 by nearest neighbour at pixel centres (Pillow)."""
    import torch
    from PIL import Image

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
        from vss.data.pixels import ImageKindError, to_rgb

        try:
            return resize_image(to_rgb(image), self.size)
        except ImageKindError as error:
            raise VssError(f"the picture {error}.") from error

    def mask(self, mask: np.ndarray | Image.Image) -> torch.Tensor:
        """(h, w) class indices -> (H, W) int64."""
        return resize_mask(mask, self.size)

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 3, H, W) uint8 -> float32, (x / 255 - mean) / std, on the device of `x`."""
        import torch

        if x.ndim < 3 or x.shape[-3] != 3:
            raise VssError(f"images of shape {tuple(x.shape)} came; expected (..., 3, H, W) in RGB.")
        mean, std = (torch.tensor(v, dtype=torch.float32, device=x.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (x.float() / 255 - mean) / std

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the values."""
        return sha256_json(self.model_dump(mode="json"))
