#!/usr/bin/env python3
"""Runs the engine of this bundle on image files, folders, cameras or raw frames.

  python run.py photo.jpg --out out               label map and overlay (or defect map and score) of one image
  python run.py folder/ --out out --batch 8       a folder, eight images at a time
  python run.py camera:/dev/video0 --limit 100    frames of a camera, by way of ffmpeg
  python run.py - --frame-size 640x480            raw RGB frames from standard input, one after the other
  python run.py folder/ --backend tensorrt_rtx    on a GPU, by the bundle's engine of that runtime
  python run.py folder/ --cache ../compiled       openvino: keep what it compiles, so that it starts faster

Images are read by pixels.py beside this file, as in training: upright by their EXIF; its first lines say the rule.
Needs numpy, pillow, and onnxruntime or openvino (for an ONNX engine) or tensorrt or tensorrt_rtx with pycuda or
cuda-python (for an engine of TensorRT).
Exit code 0: all went well. 1: some images could not be read or are of a kind that is refused (named). 2: wrong use, or
an engine for another machine.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

if __package__:
    from ..data.pixels import READ_ERRORS, image_suffixes, list_images, read_rgb, to_rgb
else:  # in a bundle, whose files stay as they were shipped
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from pixels import (  # type: ignore[import-not-found, no-redef]
        READ_ERRORS,
        image_suffixes,
        list_images,
        read_rgb,
        to_rgb,
    )

log = logging.getLogger("run")
HERE = Path(__file__).resolve().parent
STAGES = ("read", "prepare", "engine", "write")
ONNX, TRT = "onnx_runner", "trt_runner"
RUNNERS = {"onnxruntime": ONNX, "openvino": ONNX, "tensorrt": TRT, "tensorrt_rtx": TRT}
"""The file beside this one that opens an engine."""
OPTIONS = {
    "threads": ("onnxruntime", "openvino"),
    "provider": ("onnxruntime",),
    "device": ("openvino",),
    "cache": ("openvino",),
    "cuda_graph": ("tensorrt", "tensorrt_rtx"),
    "runtime_cache": ("tensorrt_rtx",),
}
"""What is for engines of some runtimes alone."""
Arrays = dict[str, np.ndarray]


class UsageError(Exception):
    """One sentence for the person at the keyboard; exit code 2."""


class TensorRTEngine:
    """A TensorRT engine by way of trt_runner.py beside this file, on memory of pycuda or cuda-python."""

    def __init__(self, runner: Any, path: Path, **options: object) -> None:
        self.engine = runner.Engine(path, plugins=sorted((HERE / "engine").glob("*.so")), **options)

    def __call__(self, feed: Arrays, names: Sequence[str]) -> Arrays:
        found = self.engine.run(feed)
        return {name: found[name] for name in names}

    def close(self) -> None:
        """Keeps the runtime cache, where one was asked for."""
        self.engine.close()


def prepare(picture: Image.Image, image: dict[str, Any], nhwc: bool) -> np.ndarray:
    """A picture as the engine takes it: (H, W, 3) uint8, or normalised float32 (3, H, W).

    `image` is that of the manifest.
    """
    picture, (height, width) = to_rgb(picture), image["size"]
    if (picture.height, picture.width) != (height, width):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.array(picture)
    if nhwc:
        return pixels
    mean, std = (np.array(image[key], np.float32) for key in ("mean", "std"))
    return np.ascontiguousarray(((pixels.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1))


def readable(found: Arrays) -> Arrays:
    """Outputs of an engine with `labels` made of `logits`, and `score` and `map` in 0..1 of a defect network."""
    more: Arrays = {}
    if "logits" in found:
        more["labels"] = found["logits"].argmax(1).astype(np.uint8)
    if "decision" in found:
        more["score"] = sigmoid(found["decision"].reshape(len(found["decision"]), -1)[:, 0])
        more["map"] = sigmoid(found["seg"][:, 0])
    return found | more


def shipped(path: Path) -> dict[str, object]:
    """manifest.json, with everything in it that this program reads."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        image, engine = found["image"], found["engine"]
        words = (engine["backend"], engine["file"], found["inputs"]["image"]["dtype"])
        numbers = (*image["size"], *image["mean"], *image["std"])
        whole = [len(image[key]) for key in ("size", "mean", "std")] == [2, 3, 3]
        whole &= all(isinstance(word, str) for word in (*words, found["files"][engine["file"]]["sha256"]))
        whole &= all(isinstance(number, int | float) for number in numbers) and min(image["size"]) > 0
        whole &= all(isinstance(value, list) for value in (found["classes"], found["palette"]))
        whole &= engine["backend"] in RUNNERS and all(isinstance(name, str) for name in found["outputs"])
        whole &= isinstance(engine["as_written"], bool) and isinstance(found["threshold"], int | float | None)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path.name} cannot be read ({str(error)[:200]}); copy the bundle again.") from error
    except LookupError as error:
        raise UsageError(f"{path.name} lacks {str(error)[:200]}; copy the bundle again.") from error
    except TypeError as error:
        raise UsageError(f"{path.name} is damaged ({str(error)[:200]}); copy the bundle again.") from error
    if not whole:
        raise UsageError(f"{path.name} holds values of a wrong kind; copy the bundle again.")
    return found


class Net:
    """The engine of the bundle with what comes before and after it; `options` are those of `OPTIONS` that are given."""

    def __init__(self, manifest: dict[str, Any], backend: str = "", **options: Any) -> None:
        self.facts = manifest
        engines = {each["backend"]: each for each in [*manifest.get("elsewhere", []), manifest["engine"]]}
        if backend and backend not in engines:
            raise UsageError(f"--backend {backend}: the bundle has no such engine; it has {', '.join(engines)}.")
        engine = engines[backend] if backend else manifest["engine"]
        self.nhwc = manifest["inputs"]["image"]["dtype"] == "uint8"
        path = HERE / engine["file"]
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
        if digest != manifest["files"][engine["file"]]["sha256"]:
            raise UsageError(f"{engine['file']} is not the engine that was shipped; copy the bundle again.")
        wrong = next((name for name in options if engine["backend"] not in OPTIONS[name]), None)
        if wrong:
            raise UsageError(
                f"--{wrong.replace('_', '-')} is for engines of {' and '.join(OPTIONS[wrong])}, and this one is of "
                f"{engine['backend']}; leave it off, or choose one by --backend."
            )
        if "cache" in options and options["cache"].resolve().is_relative_to(HERE):
            raise UsageError(
                f"--cache is {options['cache']}, in the bundle, which stays as it is; name another folder."
            )
        runner = importlib.import_module(RUNNERS[engine["backend"]])
        self.error, self.names = runner.EngineError, list(manifest["outputs"])
        try:
            if runner.__name__ == TRT:
                self.engine: Any = TensorRTEngine(runner, path, **options)
            else:
                self.engine = runner.open_engine(engine["backend"], path, as_written=engine["as_written"], **options)
        except self.error as error:
            more = f" Where only the GPU differs: vss rebuild {HERE}" if runner.__name__ == TRT else ""
            raise UsageError(f"{error}{more}") from error

    def __call__(self, batch: np.ndarray) -> Arrays:
        try:
            return readable(self.engine({"image": batch}, self.names))
        except self.error as error:
            raise UsageError(str(error)) from error


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Elementwise, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x.astype(np.float64)))


def frames(source: str, frame_size: str | None) -> Iterator[tuple[str, Any]]:
    """(name, path or picture) of everything that `source` gives."""
    if source == "-":
        yield from raw_frames(sys.stdin.buffer, *sides(frame_size))
    elif source.startswith("camera:"):
        yield from camera(source.removeprefix("camera:"), *sides(frame_size or "640x480"))
    else:
        yield from files(Path(source))


def files(path: Path) -> Iterator[tuple[str, Path]]:
    """One image file, or all of a folder, as (name, path); see `names`."""
    if not path.exists():
        raise UsageError(f"{path} does not exist; give an image, a folder, camera:DEVICE or - for standard input.")
    found = list_images(path) if path.is_dir() else [path]
    if not found:
        some = ", ".join(sorted(image_suffixes())[:8])
        raise UsageError(f"{path} holds no image files; expected some of {some} and others.")
    yield from zip(names(found), found, strict=True)


def names(paths: list[Path]) -> list[str]:
    """What results are called: by the file without its suffix, or with it where another result would be called so.

    >>> names([Path("a.png"), Path("a.jpg"), Path("b.png")])
    ['a.png', 'a.jpg', 'b']
    """
    stems, whole = Counter(path.stem.lower() for path in paths), {path.name.lower() for path in paths}
    alone = [stems[path.stem.lower()] == 1 and path.stem.lower() not in whole for path in paths]
    return [path.stem if is_alone else path.name for path, is_alone in zip(paths, alone, strict=True)]


def sides(text: str | None) -> tuple[int, int]:
    """WIDTHxHEIGHT as (width, height)."""
    try:
        width, height = (int(part) for part in (text or "").lower().split("x"))
    except ValueError:
        raise UsageError(f"--frame-size takes WIDTHxHEIGHT (for example 640x480), got {text!r}.") from None
    return width, height


def raw_frames(stream: IO[bytes], width: int, height: int) -> Iterator[tuple[str, Image.Image]]:
    """RGB frames of width * height * 3 bytes until the stream ends."""
    for number in range(sys.maxsize):
        data = stream.read(width * height * 3)
        if not data:
            return
        if len(data) < width * height * 3:
            raise UsageError(f"the stream ended inside of frame {number}; is --frame-size {width}x{height} right?")
        yield f"frame-{number:06d}", Image.frombytes("RGB", (width, height), data)


def camera(device: str, width: int, height: int) -> Iterator[tuple[str, Image.Image]]:
    """Frames of a camera, scaled by ffmpeg to one size."""
    command = ["ffmpeg", "-loglevel", "error", "-i", device, "-vf", f"scale={width}:{height}"]
    try:
        pipe = subprocess.Popen([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], stdout=subprocess.PIPE)
    except FileNotFoundError:
        raise UsageError(
            "a camera is read by way of ffmpeg, which is not installed; or pipe raw frames into -."
        ) from None
    assert pipe.stdout is not None
    try:
        yield from raw_frames(pipe.stdout, width, height)
    finally:
        pipe.terminate()
        pipe.wait()


def palette(facts: dict[str, Any]) -> np.ndarray:
    """(256, 3) uint8 colours of the labels."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(facts["palette"])] = facts["palette"] or np.zeros((0, 3))
    return table


def write(out: Path, name: str, picture: Image.Image, one: Arrays, table: np.ndarray) -> None:
    """Label map and overlay, or defect map and overlay, as PNG files."""
    if "labels" in one:
        labels = Image.fromarray(one["labels"].astype(np.uint8))
        labels.putpalette(table.tobytes())
        labels.save(out / f"{name}-labels.png")
        coat = labels.convert("RGB").resize(picture.size, Image.Resampling.NEAREST)
        Image.blend(picture, coat, 0.5).save(out / f"{name}-overlay.png")
        return
    heat = Image.fromarray((255 * one["map"]).round().astype(np.uint8))
    heat.save(out / f"{name}-map.png")
    heat = heat.resize(picture.size, Image.Resampling.BILINEAR)
    Image.composite(Image.new("RGB", picture.size, (255, 0, 0)), picture, heat).save(out / f"{name}-overlay.png")


class Job:
    """One call of this program: counts, times, and the line of every image."""

    def __init__(self, net: Net, options: argparse.Namespace) -> None:
        self.net, self.options, self.bad, self.done = net, options, 0, 0
        self.times: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "whole")}
        self.table = palette(net.facts)

    def run(self) -> int:
        """Everything that the source gives; the exit code."""
        batch: list[tuple[str, Image.Image, np.ndarray, float, float]] = []
        for number, (name, item) in enumerate(frames(self.options.source, self.options.frame_size)):
            if self.options.limit and number >= self.options.limit:
                break
            start = time.perf_counter()
            try:
                picture = item if isinstance(item, Image.Image) else read_rgb(item)
            except READ_ERRORS as error:
                self.bad += 1
                log.error("bad image: %s cannot be read (%s); it is left out", item, " ".join(str(error).split()))
                continue
            read = time.perf_counter()
            pixels = prepare(picture, self.net.facts["image"], self.net.nhwc)
            batch.append((name, picture, pixels, read - start, time.perf_counter() - read))
            if len(batch) == self.options.batch:
                self.finish(batch)
                batch = []
        if batch:
            self.finish(batch)
        self.summary()
        return 1 if self.bad else 0

    def finish(self, batch: list[tuple[str, Image.Image, np.ndarray, float, float]]) -> None:
        """Engine and output of one batch; a time is that of the batch, over its images."""
        start = time.perf_counter()
        found = self.net(np.stack([pixels for _, _, pixels, _, _ in batch]))
        engine = (time.perf_counter() - start) / len(batch)
        for i, (name, picture, _, read, prepare) in enumerate(batch):
            begin, one = time.perf_counter(), {key: value[i] for key, value in found.items()}
            if self.options.out:
                write(self.options.out, name, picture, one, self.table)
            stages = dict(zip(STAGES, (read, prepare, engine, time.perf_counter() - begin), strict=True))
            for key, value in (*stages.items(), ("whole", sum(stages.values()))):
                self.times[key].append(1e3 * value)
            self.line(name, one, 1e3 * sum(stages.values()))
        self.done += len(batch)

    def line(self, name: str, one: Arrays, milliseconds: float) -> None:
        """One JSON line per image on standard output."""
        row: dict[str, object] = {"name": name, "ms": round(milliseconds, 3)}
        if "score" in one:
            row["score"] = round(float(one["score"]), 6)
            if self.net.facts["threshold"] is not None:
                row["defective"] = bool(one["score"] >= self.net.facts["threshold"])
        else:
            counts = np.bincount(one["labels"].reshape(-1), minlength=len(self.net.facts["classes"]))
            shares = dict(zip(self.net.facts["classes"], (counts / counts.sum()).round(4).tolist(), strict=False))
            row["share"] = {key: share for key, share in shares.items() if share}
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()

    def summary(self) -> None:
        """Medians and 99th percentiles per image, in milliseconds."""
        parts = [
            f"{stage} {np.percentile(values, 50):.2f}/{np.percentile(values, 99):.2f}"
            for stage, values in self.times.items()
            if values
        ]
        log.info("%d images, %d bad; ms p50/p99: %s", self.done, self.bad, ", ".join(parts) or "none")


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="image, folder, camera:DEVICE, or - for raw frames")
    parser.add_argument("--out", type=Path, help="folder for pictures; without it only lines are printed")
    parser.add_argument("--batch", type=int, default=1, help="images per run of the engine")
    parser.add_argument("--limit", type=int, default=0, help="stop after so many images")
    parser.add_argument("--frame-size", help="WIDTHxHEIGHT of raw frames")
    parser.add_argument("--threads", type=int, default=0, help="onnxruntime, openvino: on the CPU; 0: one per core")
    parser.add_argument("--provider", choices=("cpu", "cuda"), help="onnxruntime: where; default: cpu")
    parser.add_argument("--device", help="openvino: CPU, GPU, NPU, AUTO; default: what the engine was built for")
    parser.add_argument("--cache", type=Path, help="openvino: folder that keeps compiled models; not in the bundle")
    parser.add_argument("--backend", default="", help="runtime of the engine; default: the one that was judged")
    parser.add_argument("--cuda-graph", action="store_true", help="TensorRT: record launches and replay them")
    parser.add_argument("--runtime-cache", help="tensorrt_rtx: file that keeps the kernels made on this GPU")
    options = parser.parse_args(arguments)
    try:
        if options.batch < 1:
            raise UsageError(f"--batch is {options.batch}; expected 1 or more.")
        if options.threads < 0:
            raise UsageError(f"--threads is {options.threads}; expected 0 or more.")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
        given = {name: value for name in OPTIONS if (value := getattr(options, name))}
        net = Net(shipped(HERE / "manifest.json"), options.backend, **given)
        try:
            return Job(net, options).run()
        finally:
            net.engine.close()
    except UsageError as error:
        log.error("error: %s", error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
