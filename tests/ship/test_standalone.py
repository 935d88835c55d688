"""The runner of a bundle as a program of its own: answers, inputs, exit codes; and without torch at all."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vss.data.preprocess import Preprocess
from vss.deploy.backends import trt_runner
from vss.ship import read
from vss.ship.check import open_engine
from vss.ship.manifest import seal
from vss.ship.standalone import UsageError, prepare, readable, shipped, sigmoid

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"  # noqa: E501


def start(bundle: Path, *arguments: str, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """run.py in a process where `import torch` fails."""
    command = [sys.executable, "-B", "-c", WITHOUT_TORCH, str(bundle / "run.py"), *arguments]
    return subprocess.run(command, input=data, capture_output=True, check=False)


def rows(done: subprocess.CompletedProcess[bytes]) -> list[dict[str, object]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_folder_gives_the_shipped_labels_alone_and_in_batches(seg_bundle: Path, tmp_path: Path) -> None:
    samples = read(seg_bundle).samples
    for batch in ("1", "2"):
        out = tmp_path / batch
        done = start(seg_bundle, str(seg_bundle / "samples/images"), "--out", str(out), "--batch", batch)
        assert done.returncode == 0, done.stderr
        assert [row["name"] for row in rows(done)] == [Path(path).stem for path in samples.images]
        for path, files in zip(samples.images, samples.expected, strict=True):
            got = np.array(Image.open(out / f"{Path(path).stem}-labels.png"))
            assert np.array_equal(got, np.load(seg_bundle / files["labels"])[0])
            overlay = Image.open(out / f"{Path(path).stem}-overlay.png")
            assert overlay.size == Image.open(seg_bundle / path).size and overlay.mode == "RGB"
        found = re.search(
            rb"3 images, 0 bad; ms p50/p99: read ([\d.]+)/([\d.]+), .*whole ([\d.]+)/([\d.]+)", done.stderr
        )
        assert found is not None and float(found[3]) <= float(found[4])
    shares = rows(done)[0]["share"]
    assert isinstance(shares, dict) and sum(shares.values()) == pytest.approx(1, abs=1e-3)


def test_raw_frames_and_one_file_agree(seg_bundle: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    done = start(
        seg_bundle, "-", "--frame-size", "30x20", "--limit", "2", "--out", str(tmp_path), data=pixels.tobytes()
    )
    assert done.returncode == 0 and [row["name"] for row in rows(done)] == ["frame-000000", "frame-000001"]
    Image.fromarray(pixels[1]).save(tmp_path / "one.png")
    alone = start(seg_bundle, str(tmp_path / "one.png"), "--out", str(tmp_path))
    assert alone.returncode == 0
    first, second = (Image.open(tmp_path / f"{name}-labels.png") for name in ("frame-000001", "one"))
    assert np.array_equal(np.array(first), np.array(second))
    cut = start(seg_bundle, "-", "--frame-size", "30x20", data=pixels.tobytes()[:-1])
    assert cut.returncode == 2 and b"the stream ended inside of frame 2" in cut.stderr and len(rows(cut)) == 2


def test_a_camera_is_read_by_way_of_ffmpeg(seg_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "ffmpeg"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nassert 'scale=16:8' in sys.argv\nsys.stdout.buffer.write(bytes(1152))\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = start(seg_bundle, "camera:/dev/video9", "--frame-size", "16x8")
    assert done.returncode == 0 and len(rows(done)) == 3, done.stderr
    tool.unlink()
    missing = start(seg_bundle, "camera:/dev/video9")
    assert missing.returncode == 2 and b"ffmpeg, which is not installed" in missing.stderr


def test_a_corrupt_image_is_named_and_the_rest_goes_on(seg_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(seg_bundle / "samples/images", tmp_path / "images"))
    good = sorted(folder.iterdir())
    (folder / "00-broken.png").write_bytes(good[0].read_bytes()[:50])
    (folder / "notes.txt").write_text("no image")
    done = start(seg_bundle, str(folder))
    assert done.returncode == 1 and len(rows(done)) == len(good)
    assert b"00-broken.png cannot be read" in done.stderr and b"3 images, 1 bad" in done.stderr


def test_wrong_use_is_one_sentence_and_exit_code_2(seg_bundle: Path, tmp_path: Path) -> None:
    cases = [
        ([str(tmp_path / "none")], b"none does not exist"),
        ([str(tmp_path)], b"holds no image files"),
        (["-", "--frame-size", "big"], b"--frame-size takes WIDTHxHEIGHT"),
        (["-", "--batch", "0"], b"--batch is 0"),
        (["-", "--provider", "cuda"], b"has no CUDAExecutionProvider"),
    ]
    for arguments, words in cases:
        done = start(seg_bundle, *arguments, data=b"")
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert done.stderr.count(b"\n") == 1


def test_an_exchanged_engine_is_refused(seg_bundle: Path, defect_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(seg_bundle, tmp_path / "bundle"))
    shutil.copyfile(defect_bundle / "engine/model.onnx", copy / "engine/model.onnx")
    done = start(copy, str(copy / "samples/images"))
    assert done.returncode == 2 and b"is not the engine that was shipped" in done.stderr
    shutil.copyfile(seg_bundle / "engine/model.onnx", copy / "engine/model.onnx")
    manifest = read(copy)
    for name in trt_runner.ALONE:
        shutil.copyfile(Path(str(trt_runner.__file__)).with_name(name), copy / name)
    seal(copy, manifest.model_copy(update={"engine": manifest.engine.model_copy(update={"backend": "tensorrt"})}))
    other = start(copy, str(copy / "samples/images"))
    assert other.returncode == 2 and b"vss rebuild" in other.stderr and b"Traceback" not in other.stderr


def test_a_damaged_manifest_is_one_sentence(seg_bundle: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "manifest.json", json.loads((seg_bundle / "manifest.json").read_text())
    path.write_text(json.dumps(whole))
    assert shipped(path) == whole
    cases = [
        ({key: value for key, value in whole.items() if key != "image"}, "manifest.json lacks 'image'"),
        ({**whole, "files": {}}, "manifest.json lacks 'engine/"),
        ({**whole, "image": None}, "manifest.json is damaged"),
        ({**whole, "image": {**whole["image"], "size": [32, 0]}}, "values of a wrong kind"),
        ({**whole, "image": {**whole["image"], "mean": [0.5]}}, "values of a wrong kind"),
        ({**whole, "classes": 3}, "values of a wrong kind"),
        ([1], "manifest.json is damaged"),
    ]
    for content, words in cases:
        path.write_text(json.dumps(content))
        with pytest.raises(UsageError, match=words):
            shipped(path)
    for text in ("{", "[" * 100_000, "é".encode("latin-1")):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UsageError, match=r"manifest\.json cannot be read .*; copy the bundle again"):
            shipped(path)
    copy = Path(shutil.copytree(seg_bundle, tmp_path / "bundle"))
    (copy / "manifest.json").write_text(json.dumps(cases[0][0]))
    done = start(copy, str(copy / "samples/images"))
    assert done.returncode == 2 and done.stderr == b"error: manifest.json lacks 'image'; copy the bundle again.\n"


def test_a_defect_bundle_gives_scores_and_maps(defect_bundle: Path, tmp_path: Path) -> None:
    manifest = read(defect_bundle)
    done = start(defect_bundle, str(defect_bundle / "samples/images"), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for row, files in zip(rows(done), manifest.samples.expected, strict=True):
        decision = float(np.load(defect_bundle / files["decision"])[0, 0])
        assert row["score"] == pytest.approx(1 / (1 + np.exp(-decision)), abs=1e-5)
        assert row["defective"] == (decision >= 0)
        heat = np.array(Image.open(tmp_path / f"{row['name']}-map.png"))
        want = 255 / (1 + np.exp(-np.load(defect_bundle / files["seg"])[0, 0].astype(np.float64)))
        assert np.abs(heat - want).max() <= 0.501


def test_prepare_is_the_preprocessing_of_training() -> None:
    made = Preprocess(size=(24, 32))
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    want = made.image(picture)
    assert np.array_equal(prepare(picture, made.model_dump(), True), want.permute(1, 2, 0).numpy())
    floats = prepare(picture.convert("L"), made.model_dump(), False)
    assert floats.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(floats), made.normalise(made.image(picture.convert("L"))))


def test_readable_and_sigmoid() -> None:
    assert np.allclose(sigmoid(np.array([-1000.0, 0.0, 1000.0, 1.5])), [0, 0.5, 1, 1 / (1 + np.exp(-1.5))])
    logits = np.random.default_rng(0).standard_normal((2, 5, 3, 4)).astype(np.float32)
    assert np.array_equal(readable({"logits": logits})["labels"], logits.argmax(1))


def test_logits_engines_run_too(logits_bundle: Path, tmp_path: Path) -> None:
    manifest = read(logits_bundle)
    done = start(logits_bundle, str(logits_bundle / "samples/images"), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    with open_engine(logits_bundle, manifest) as session:
        for path in manifest.samples.images:
            pixels = prepare(Image.open(logits_bundle / path).convert("RGB"), manifest.image.model_dump(), False)
            want = session.run({"image": pixels[None]})["logits"].argmax(1)[0]
            assert np.array_equal(np.array(Image.open(tmp_path / f"{Path(path).stem}-labels.png")), want)


@pytest.mark.server
def test_the_readme_runs_in_an_empty_environment_without_torch(seg_bundle: Path, tmp_path: Path) -> None:
    """The bundle's own README, word by word; needs a package index."""
    copy = Path(shutil.copytree(seg_bundle, tmp_path / "bundle"))
    blocks = re.findall(r"```sh\n(.*?)```", (copy / "README.md").read_text(), re.S)
    assert len(blocks) == 2 and "-m venv" in blocks[1]
    builder = tmp_path / "first"
    venv.create(builder, with_pip=False)
    environment = {"PATH": f"{builder / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
    shell = subprocess.run(
        ["sh", "-e", "-c", "\n".join(blocks)], cwd=copy, capture_output=True, text=True, env=environment, check=False
    )
    if "No matching distribution" in shell.stderr or "Connection" in shell.stderr:
        pytest.skip("needs a package index")
    assert shell.returncode == 0, shell.stderr
    assert len(list((tmp_path / "out").glob("*-labels.png"))) == 3
    listed = subprocess.run([tmp_path / "env/bin/pip", "list"], capture_output=True, text=True, check=True).stdout
    assert "onnxruntime" in listed and "torch" not in listed and "vss" not in listed
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=copy, check=True)
