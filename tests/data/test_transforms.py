from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from vss.core.errors import VssError
from vss.data import Augment, Preprocess, SegSplit, open_data
from vss.data.transforms import sample_seed

OFF = {"scale": (1.0, 1.0), "hflip": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0}


@pytest.fixture
def split(street_root: Path) -> SegSplit:
    return SegSplit(open_data("camvid", street_root), "train", Preprocess(size=(64, 96)), Augment(), seed=3)


def test_normalise_is_the_formula() -> None:
    preprocess = Preprocess(size=(16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    mean, std = (np.array(v, np.float64).reshape(3, 1, 1) for v in (preprocess.mean, preprocess.std))
    expected = (x.numpy().astype(np.float64) / 255 - mean) / std
    got = preprocess.normalise(x)
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - expected).max() < 1e-6
    with pytest.raises(VssError, match=r"shape \(1, 16, 16, 3\) came; expected \(\.\.\., 3, H, W\)"):
        preprocess.normalise(x.permute(0, 2, 3, 1))


def test_resize_image_is_an_area_weighted_mean() -> None:
    """Halving with an antialiased triangle filter: each output pixel is the (1 3 3 1)/8 mean of its neighbourhood."""
    values = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    got = Preprocess(size=(8, 8)).image(Image.fromarray(values))
    assert got.shape == (3, 8, 8) and got.dtype == torch.uint8 and torch.equal(got[0], got[2])
    kernel = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    for row in range(1, 7):
        for column in range(1, 7):
            patch = values[2 * row - 1 : 2 * row + 3, 2 * column - 1 : 2 * column + 3]
            assert abs(float(got[0, row, column]) - float((patch * kernel).sum())) <= 1.0


def test_mask_is_resized_to_the_nearest_pixel() -> None:
    mask = np.random.default_rng(0).integers(0, 12, (9, 15), dtype=np.uint8)
    got = Preprocess(size=(3, 5)).mask(mask)
    assert got.dtype == torch.int64
    assert np.array_equal(got.numpy(), mask[1::3, 1::3])
    assert torch.equal(Preprocess(size=(9, 15)).mask(mask), torch.from_numpy(mask.astype(np.int64)))
    assert torch.equal(Preprocess(size=(3, 5)).mask(Image.fromarray(mask)), got)


def test_preprocess_is_strict_and_hashes_its_values() -> None:
    one = Preprocess(size=(64, 96))
    assert one.sha256 == Preprocess(size=(64, 96)).sha256 == Preprocess.model_validate(one.model_dump()).sha256
    assert one.sha256 != Preprocess(size=(96, 64)).sha256
    for wrong in ({"size": (0, 4)}, {"size": (4, 4), "std": (1, 0, 1)}, {"size": (4, 4), "colour": 1}):
        with pytest.raises(ValidationError):
            Preprocess.model_validate(wrong)
    with pytest.raises(ValidationError):
        Augment(scale=(2.0, 1.0))


def test_split_items(split: SegSplit) -> None:
    item = split[5]
    assert item["image"].shape == (3, 64, 96) and item["image"].dtype == torch.uint8
    assert item["mask"].shape == (64, 96) and item["mask"].dtype == torch.int64 and item["index"] == 5
    assert len(split) == len(split.ids) == 24 and split.ids == sorted(split.ids)
    assert split[-1]["index"] == 23
    with pytest.raises(IndexError):
        split[24]


def test_limit_spreads_over_the_split(street_root: Path) -> None:
    data = open_data("camvid", street_root)
    few = SegSplit(data, "train", Preprocess(size=(32, 32)), limit=5)
    assert few.ids == [data.pairs("train")[index].id for index in (0, 4, 9, 14, 19)]
    assert SegSplit(data, "val", Preprocess(size=(32, 32)), limit=100).ids == [pair.id for pair in data.pairs("val")]
    with pytest.raises(VssError, match="limit is 0; expected 1 or more"):
        SegSplit(data, "train", Preprocess(size=(32, 32)), limit=0)


def test_split_hash_follows_ids_and_sizes(camvid_root: Path) -> None:
    data, preprocess = open_data("camvid", camvid_root), Preprocess(size=(8, 8))
    before = SegSplit(data, "train", preprocess).sha256()
    assert before == SegSplit(data, "train", Preprocess(size=(4, 4))).sha256()
    assert before != SegSplit(data, "train", preprocess, limit=2).sha256()
    with open(data.pairs("train")[0].image, "ab") as file:
        file.write(b"\0")
    assert before != SegSplit(data, "train", preprocess).sha256()


def test_same_key_same_bytes_and_other_key_other_bytes(split: SegSplit) -> None:
    first = split[(4, 2)]
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    for other in ((0, 0), (4, 3), (5, 2)):
        assert not torch.equal(split[other]["image"], first["image"])
    again = split[(4, 2)]
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["mask"], again["mask"])
    assert torch.equal(split[4]["image"], split[(4, 0)]["image"])
    split.seed += 1
    assert not torch.equal(split[(4, 2)]["image"], first["image"])


def test_global_generators_are_untouched(split: SegSplit) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[union-attr]
    split[(1, 1)]
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]
    assert before[2] == random.getstate()


def test_seeds_of_neighbours_differ() -> None:
    seeds = {sample_seed(s, e, i) for s in range(4) for e in range(10) for i in range(50)}
    assert len(seeds) == 4 * 10 * 50 and all(0 <= seed < 2**63 for seed in seeds)


def test_preprocessing_identical_train_eval_where_augment_is_off(split: SegSplit) -> None:
    plain = SegSplit(split.data, "train", split.preprocess)[7]
    off = SegSplit(split.data, "train", split.preprocess, Augment.model_validate(OFF))[(7, 5)]
    assert torch.equal(plain["image"], off["image"]) and torch.equal(plain["mask"], off["mask"])


def test_flip_alone_mirrors_both(split: SegSplit) -> None:
    plain = SegSplit(split.data, "train", split.preprocess)[7]
    flipped = SegSplit(split.data, "train", split.preprocess, Augment.model_validate(OFF | {"hflip": 1.0}))[(7, 5)]
    assert torch.equal(plain["image"].flip(2), flipped["image"]) and torch.equal(plain["mask"].flip(1), flipped["mask"])


def blobs() -> tuple[Image.Image, np.ndarray]:
    """An image whose red channel is 20 * class of its mask, with large regions; green and blue are 250 everywhere."""
    columns, rows = np.meshgrid(np.arange(120), np.arange(90))
    mask = ((columns // 30 + rows // 30) % 12).astype(np.uint8)
    image = np.full((90, 120, 3), 250, np.uint8)
    image[..., 0] = 20 * mask
    return Image.fromarray(image), mask


@pytest.mark.parametrize("seed", range(12))
def test_image_and_mask_move_together(seed: int) -> None:
    image, mask = blobs()
    geometry = Augment.model_validate(OFF | {"scale": (0.5, 2.0), "hflip": 0.5})
    preprocess = Preprocess(size=(60, 84), mean=(1.0, 0.0, 0.0))
    x, y = geometry(image, mask, preprocess=preprocess, seed=seed)
    assert x.shape == (3, 60, 84) and y.shape == (60, 84)
    padded = y == 255
    # Padding carries the mean colour (255, 0, 0) in the image and 255 in the mask, at the same pixels.
    assert torch.equal(padded, (x[1] == 0) & (x[2] == 0)) and bool((x[0][padded] == 255).all())
    # Away from the regions' borders the red channel is exactly 20 * class.
    same = torch.ones_like(padded)
    for down in (-2, 0, 2):
        for right in (-2, 0, 2):
            same &= torch.roll(y, (down, right), (0, 1)) == y
    same[:2], same[-2:], same[:, :2], same[:, -2:] = False, False, False, False
    inner = same & ~padded
    assert int(inner.sum()) > 300
    assert torch.equal(x[0][inner].long(), 20 * y[inner])
    # Everywhere the labelled classes are within one interpolated pixel: some neighbour of the red value has its class.
    near = torch.zeros_like(padded)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            near |= (x[0].long() - 20 * torch.roll(y, (down, right), (0, 1))).abs() <= 10
    assert bool(near[2:-2, 2:-2][~padded[2:-2, 2:-2]].float().mean() > 0.99)


def test_scale_covers_its_range() -> None:
    """At scale s < 1 the image covers s * s of the crop; the share of padding must spread over the asked range."""
    image, mask = blobs()
    geometry = Augment.model_validate(OFF | {"scale": (0.5, 1.0)})
    preprocess = Preprocess(size=(60, 80))
    covered = []
    for seed in range(60):
        _, y = geometry(image, mask, preprocess=preprocess, seed=seed)
        covered.append(float((y != 255).float().mean()) ** 0.5)
    assert 0.49 < min(covered) < 0.58 and 0.92 < max(covered) < 1.01
    assert abs(np.mean(covered) - 0.75) < 0.06


def test_crop_smaller_than_the_preprocessing_size() -> None:
    image, mask = blobs()
    crop = Augment.model_validate(OFF | {"crop": (32, 40)})
    x, y = crop(image, mask, preprocess=Preprocess(size=(90, 120)), seed=1)
    assert x.shape == (3, 32, 40) and y.shape == (32, 40)
    assert torch.equal(x[0].long(), 20 * y)


def test_jitter_changes_colours_only() -> None:
    image, mask = blobs()
    jitter = Augment.model_validate(OFF | {"brightness": 0.4})
    preprocess = Preprocess(size=(90, 120))
    outputs = [jitter(image, mask, preprocess=preprocess, seed=seed) for seed in range(20)]
    assert all(torch.equal(y, torch.from_numpy(mask.astype(np.int64))) for _, y in outputs)
    # Brightness multiplies, within 0.6..1.4, and saturates at 255: read the factor off the red channel of class 5.
    factors = [float(x[0][y == 5].float().mean()) / 100 for x, y in outputs]
    assert 0.6 <= min(factors) < 0.8 and 1.2 < max(factors) <= 1.4
