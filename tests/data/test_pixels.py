"""Every kind of image is applied by the stated rule or refused by name, and by every reader alike."""

from __future__ import annotations

import importlib.util
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from vss.data import BadSampleError, Preprocess, open_data
from vss.data import pixels as rule
from vss.data.check import check
from vss.data.images import open_rgb, read_header, read_stored_mask
from vss.data.pixels import list_images
from vss.ship.standalone import names, prepare

RGB = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
GREY, ALPHA = RGB[..., 0], RGB[..., 1]
TABLE = np.random.default_rng(1).integers(0, 256, (7, 3), dtype=np.uint8)
INDICES = GREY % 7
TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x, 1),
}  # fmt: skip
"""EXIF 2.32, 4.6.4, Orientation: which side of the shown picture the stored row 0 and column 0 are."""


def png(width: int, depth: int, colour: int, rows: list[bytes]) -> bytes:
    """A PNG by hand: Pillow writes no 16-bit colour and no grey of 2 or 4 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def palette() -> Image.Image:
    picture = Image.fromarray(INDICES)
    picture.putpalette(TABLE.tobytes())
    return picture


def thrice(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, 2)


def save(path: Path, picture: Image.Image, **options: object) -> None:
    picture.save(path, **options)  # type: ignore[arg-type]


def turned(path: Path, value: int, **options: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    save(path, Image.fromarray(RGB), exif=exif, **options)


FRAMES = [Image.fromarray(np.roll(RGB, shift, 0)) for shift in range(3)]
APPLIED: dict[str, tuple[Callable[[Path], None], np.ndarray]] = {
    **{f"turned{n}.png": (lambda p, n=n: turned(p, n), turn(RGB)) for n, turn in TURNED.items()},
    **{f"turned{n}.tif": (lambda p, n=n: turned(p, n), turn(RGB)) for n, turn in TURNED.items()},
    **{f"turned{n}.webp": (lambda p, n=n: turned(p, n, lossless=True), turn(RGB)) for n, turn in TURNED.items()},
    "turned0.png": (lambda p: turned(p, 0), RGB),
    "turned9.png": (lambda p: turned(p, 9), RGB),
    "grey.png": (lambda p: save(p, Image.fromarray(GREY)), thrice(GREY)),
    "bit.png": (lambda p: save(p, Image.fromarray(GREY > 127)), thrice(np.where(GREY > 127, 255, 0).astype(np.uint8))),
    "bits4.png": (
        lambda p: p.write_bytes(png(4, 4, 0, [b"\x01\x2f"])) and None,
        thrice(np.array([[0, 17, 34, 255]], np.uint8)),
    ),
    "alpha.png": (lambda p: save(p, Image.fromarray(np.dstack([RGB, ALPHA]))), RGB),
    "grey_alpha.png": (lambda p: save(p, Image.fromarray(np.dstack([GREY, ALPHA]), "LA")), thrice(GREY)),
    "grey_clear.png": (lambda p: save(p, Image.fromarray(GREY), transparency=int(GREY[0, 0])), thrice(GREY)),
    "palette.png": (lambda p: save(p, palette()), TABLE[INDICES]),
    "palette_clear.png": (lambda p: save(p, palette(), transparency=3), TABLE[INDICES]),
    "palette_alpha.png": (lambda p: save(p, palette(), transparency=bytes([0, 128, 255])), TABLE[INDICES]),
    "palette.gif": (lambda p: save(p, palette(), optimize=False), TABLE[INDICES]),
    "cmyk.tif": (lambda p: save(p, Image.fromarray(np.dstack([255 - RGB, GREY * 0]), "CMYK")), RGB),
    "pixel.png": (lambda p: save(p, Image.fromarray(RGB[:1, :1])), RGB[:1, :1]),
    "UPPER.PNG": (lambda p: save(p, Image.fromarray(RGB)), RGB),
}
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "deep.png": (lambda p: save(p, Image.fromarray(GREY.astype(np.uint16) * 257)), "more than 8 bits a channel"),
    "deep.tif": (lambda p: save(p, Image.fromarray(GREY.astype(np.uint16))), "more than 8 bits a channel"),
    "deep_colour.png": (lambda p: p.write_bytes(png(2, 16, 2, [bytes(range(12))])), "more than 8 bits a channel"),
    "deep_alpha.png": (lambda p: p.write_bytes(png(2, 16, 6, [bytes(range(16))])), "more than 8 bits a channel"),
    "deep.ppm": (lambda p: p.write_bytes(b"P6 2 2 65535\n" + bytes(24)), "more than 8 bits a channel"),
    "integers.tif": (lambda p: save(p, Image.fromarray(GREY.astype(np.int32))), "more than 8 bits a channel"),
    "floats.tif": (lambda p: save(p, Image.fromarray(GREY.astype(np.float32))), "more than 8 bits a channel"),
    "lab.tif": (lambda p: save(p, Image.fromarray(RGB, "LAB")), "mode 'LAB'"),
    "pages.tif": (lambda p: save(p, FRAMES[0], save_all=True, append_images=FRAMES[1:]), "3 frames or pages (TIFF)"),
    "moving.gif": (lambda p: save(p, FRAMES[0], save_all=True, append_images=FRAMES[1:]), "3 frames or pages (GIF)"),
    "moving.png": (lambda p: save(p, FRAMES[0], save_all=True, append_images=FRAMES[1:]), "3 frames or pages (PNG)"),
    "moving.webp": (lambda p: save(p, FRAMES[0], save_all=True, append_images=FRAMES[1:]), "3 frames or pages (WEBP)"),
    "empty.png": (lambda p: p.write_bytes(b""), "cannot identify"),
    "half.png": (lambda p: p.write_bytes(png(2, 8, 2, [bytes(6)])[:-24]), ""),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `masks` set whose training images are all kinds that are applied; those that are refused are in `refused`."""
    root = tmp_path_factory.mktemp("kinds")
    for folder in ("images/train", "masks/train", "refused"):
        (root / folder).mkdir(parents=True)
    for name, (make, expected) in APPLIED.items():
        make(root / "images/train" / f"{id_of(name)}{Path(name).suffix}")
        mask = np.zeros(expected.shape[:2], np.uint8)
        mask[0, 0] = mask.size > 1
        Image.fromarray(mask).save(root / "masks/train" / f"{id_of(name)}.png")
    for name, (make, _) in REFUSED.items():
        make(root / "refused" / name)
    (root / "classes.txt").write_text("ground\nwater\n")
    return root


def id_of(name: str) -> str:
    return name.replace(".", "-").replace("_", "-")


def bundled() -> object:
    """pixels.py as it lies in a bundle: a module of its own, without this package."""
    spec = importlib.util.spec_from_file_location("pixels_of_a_bundle", str(rule.__file__))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_reader_gives_the_same_upright_pixels(kinds: Path) -> None:
    data, runner = open_data("masks", kinds), bundled()
    pairs = {pair.id: pair for pair in data.pairs("train")}
    assert set(pairs) == {id_of(name) for name in APPLIED}
    for name, (_, expected) in APPLIED.items():
        pair, size = pairs[id_of(name)], expected.shape[:2]
        preprocess = Preprocess(size=size)
        found = {
            "open_rgb": np.array(open_rgb(pair.image)),
            "training": preprocess.image(data.read(pair)[0]).permute(1, 2, 0).numpy(),
            "bundle": prepare(runner.read_rgb(pair.image), {"size": size}, True),  # type: ignore[attr-defined]
        }
        for reader, got in found.items():
            assert got.dtype == np.uint8 and np.array_equal(got, expected), f"{name} by {reader}"
        assert read_header(pair.image) == size, name
    report = check(kinds, "masks")
    assert [problem.split(" (")[0] for problem in report["problems"]] == ["no split 'val'"]


@pytest.mark.parametrize("name", REFUSED)
def test_every_reader_refuses_alike_and_by_name(kinds: Path, name: str) -> None:
    path, text = kinds / "refused" / name, REFUSED[name][1]
    with pytest.raises(BadSampleError) as caught:
        open_rgb(path)
    assert str(path) in str(caught.value) and text in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(rule.READ_ERRORS) as bundle:
        bundled().read_rgb(path)  # type: ignore[attr-defined]
    assert text in str(bundle.value)
    if name != "half.png":  # its header is whole
        with pytest.raises(BadSampleError, match=name):
            read_header(path)


def test_lossy_formats_are_turned_too(tmp_path: Path) -> None:
    flat = np.zeros((16, 32, 3), np.uint8)
    flat[:, :16] = 255
    suffixes = ["jpg", "mpo", *(["avif"] if features.check("avif") else [])]
    for suffix in suffixes:
        for value, turn in TURNED.items():
            exif = Image.Exif()
            exif[0x0112] = value
            Image.fromarray(flat).save(tmp_path / f"{value}.{suffix}", exif=exif, quality=100)
            got = np.array(open_rgb(tmp_path / f"{value}.{suffix}"))
            assert got.shape == turn(flat).shape and np.abs(got.astype(int) - turn(flat)).max() < 12, (suffix, value)


def test_a_mask_is_turned_with_its_own_exif_and_sizes_are_compared_upright(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").mkdir(parents=True)
    turned(tmp_path / "images/train/a.jpg", 6)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    Image.fromarray(GREY % 2).save(tmp_path / "masks/train/a.png")
    with pytest.raises(BadSampleError, match=r"a\.png is 6x10 and its image a\.jpg is 10x6"):
        open_data("masks", tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GREY % 2).save(tmp_path / "masks/train/a.png", exif=exif)
    data = open_data("masks", tmp_path)
    assert np.array_equal(data.read(data.pairs("train")[0])[1], np.rot90(GREY % 2, -1))


def test_masks_of_few_and_many_bits_hold_the_values_of_the_file(tmp_path: Path) -> None:
    rows = {1: [b"\x50"], 2: [b"\x1b"], 4: [b"\x01\x2f"]}
    expected = {1: [0, 1, 0, 1], 2: [0, 1, 2, 3], 4: [0, 1, 2, 15]}
    for depth, row in rows.items():
        (tmp_path / "m.png").write_bytes(png(4, depth, 0, row))
        assert read_stored_mask(tmp_path / "m.png").tolist() == [expected[depth]]
    for array in (INDICES.astype(np.uint16) * 300, INDICES.astype(np.int32) * 70000):
        Image.fromarray(array).save(tmp_path / "m.tif")
        assert np.array_equal(read_stored_mask(tmp_path / "m.tif"), array)
    palette().save(tmp_path / "p.gif")
    assert np.array_equal(read_stored_mask(tmp_path / "p.gif"), INDICES)


@pytest.mark.parametrize(
    ("suffix", "options", "text"),
    [
        ("jpg", {}, "is a JPEG file, which does not keep class indices"),
        ("webp", {}, "is a WEBP file"),
        ("tif", {"compression": "jpeg"}, "is a TIFF with jpeg compression file"),
        ("jp2", {}, "is a JPEG2000 file"),
    ],
)
def test_lossy_masks_are_refused_by_name(tmp_path: Path, suffix: str, options: dict[str, str], text: str) -> None:
    path = tmp_path / f"m.{suffix}"
    Image.fromarray(INDICES).save(path, **options)  # type: ignore[arg-type]
    shutil.copy(path, tmp_path / "m.png")  # what the file is counts, not its name
    for name in (path, tmp_path / "m.png"):
        with pytest.raises(BadSampleError, match=text) as caught:
            read_stored_mask(name)
        assert str(name) in str(caught.value) and "PNG" in str(caught.value)
        with pytest.raises(BadSampleError, match=text):
            read_header(name, mask=True)


def test_inverted_masks_and_masks_of_several_pages_are_refused(tmp_path: Path) -> None:
    Image.fromarray(INDICES).save(tmp_path / "m.tif", tiffinfo={262: 0})
    with pytest.raises(BadSampleError, match="stores white as 0"):
        read_stored_mask(tmp_path / "m.tif")
    pages = [Image.fromarray(INDICES), Image.fromarray(INDICES + 1)]
    pages[0].save(tmp_path / "m.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(BadSampleError, match="holds 2 frames or pages"):
        read_stored_mask(tmp_path / "m.tif")


def test_links_to_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    for path in (root / "own" / "a.png", other / "deep" / "b.png", root / ".hidden" / "c.png", root / "own" / ".d.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RGB).save(path)
    (root / "linked").symlink_to(other)
    (root / "again").symlink_to(other / "deep")
    (other / "back").symlink_to(root)
    (root / "gone.png").symlink_to(tmp_path / "nothing.png")
    found = [str(path.relative_to(root)) for path in list_images(root, recursive=True)]
    assert found == ["again/b.png", "gone.png", "linked/deep/b.png", "own/a.png"]
    assert [path.name for path in list_images(root)] == ["gone.png"]
    with pytest.raises(BadSampleError, match=r"gone\.png cannot be read as an image \(No such file"):
        open_rgb(root / "gone.png")


def test_results_of_equal_stems_keep_their_suffix() -> None:
    files = [Path("in") / name for name in ("a.jpg", "a.png", "b.png", "C.png", "c.tif", "d.png", "d.png.bmp")]
    assert names(files) == ["a.jpg", "a.png", "b", "C.png", "c.tif", "d", "d.png.bmp"]
    assert len({name.lower() for name in names(files)}) == len(files)


def test_pixels_alone_needs_pillow_only(tmp_path: Path) -> None:
    shutil.copy(str(rule.__file__), tmp_path / "pixels.py")
    turned(tmp_path / "a.png", 6)
    block = "import sys; sys.modules.update({'numpy': None, 'torch': None, 'vss': None}); import pixels; "
    code = block + "from pathlib import Path; print(pixels.read_rgb(Path('a.png')).size)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["(6,", "10)"], done.stderr


def test_a_damaged_picture_in_memory_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"the picture has mode 'F'; save it as 8-bit grey or colour\."):
        Preprocess(size=(2, 2)).image(Image.fromarray(np.zeros((2, 2), np.float32)))
    assert torch.equal(Preprocess(size=(6, 10)).image(palette()), torch.from_numpy(TABLE[INDICES]).permute(2, 0, 1))
