"""The command line as people use it: the flags work, and every kind of bad input is one sentence with exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import vss
from tests.command import Done, cli, refused
from vss import models
from vss.data import Preprocess
from vss.data.readers import CAMVID_NAMES
from vss.train import checkpoint


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = models.build("unet", 11, width=8, depth=2)
    path = tmp_path_factory.mktemp("ckpt") / "net.safetensors"
    preprocess = Preprocess(size=(48, 64)).model_dump(mode="json")
    return vss.save(model, path, preprocess=preprocess, classes=CAMVID_NAMES, info={"dataset": "camvid"})


def test_the_chain_by_single_commands(ckpt: Path, street_root: Path, tmp_path: Path) -> None:
    data = ["--data-root", street_root]
    done = cli("prune", "--ckpt", ckpt, "--method", "taylor", "--macs", 0.5, "--batches", 2, *data, "--save", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "masked == sliced" in done.stdout and "locked: classifier" in done.stdout
    pruned = tmp_path / "pruned.safetensors"
    done = cli(
        "finetune", "--ckpt", pruned, "--teacher", ckpt, "--epochs", 1, "--batch-size", 4, *data,
        "--save", tmp_path / "ft", "--set", "finetune.accelerator=cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    best = tmp_path / "ft" / "best.safetensors"
    done = cli("export", "--ckpt", best, "--labels", "--preprocess", "--save", tmp_path / "m.onnx")
    assert done.returncode == 0, done.stderr
    done = cli("build", "--onnx", tmp_path / "m.onnx", "--save", tmp_path / "m.engine.onnx")
    assert done.returncode == 0, done.stderr
    report = tmp_path / "out.json"
    done = cli(
        "evaluate", "--baseline", best, "--candidate", tmp_path / "m.engine.onnx", "--dataset", "camvid", *data,
        "--max-drop", 0.1, "--report", report,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert rows[0]["miou_pct"] == pytest.approx(rows[1]["miou_pct"], abs=0.1)
    done = cli("bench", "--baseline", ckpt, "--candidate", best, "--max-seconds", 0.01, "--report", tmp_path / "n.json")
    assert done.returncode == 3
    assert all(part in done.stderr for part in ("no figures: the machine is too noisy", "--allow-unstable"))
    assert json.loads((tmp_path / "n.json").read_text())["stable"] is False
    done = cli("bench", "--baseline", ckpt, "--candidate", best, "--max-seconds", 0.5, "--report", tmp_path / "b.json",
               "--allow-unstable")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "b.json").read_text())["sessions"]["candidate"]["latency_ms_p50"] > 0


def test_a_failed_gate_is_exit_code_1(ckpt: Path, street_root: Path, tmp_path: Path) -> None:
    better = vss.load(ckpt)
    with torch.no_grad():  # one class everywhere is better than noise on one class
        better.classifier.weight.zero_()
        better.classifier.bias.copy_(torch.eye(11)[3])
    good = vss.save(better, tmp_path / "good.safetensors", preprocess=Preprocess(size=(48, 64)).model_dump(mode="json"),
                    classes=checkpoint.read(ckpt).classes, info={"dataset": "camvid"})  # fmt: skip
    pair = [cli("evaluate", "--ckpt", path, "--data-root", street_root, "--report", tmp_path / f"{i}.json")
            for i, path in enumerate((good, ckpt))]  # fmt: skip
    assert [done.returncode for done in pair] == [0, 0]
    scores = [json.loads((tmp_path / f"{i}.json").read_text())["rows"][0]["miou_pct"] for i in range(2)]
    first, second = (good, ckpt) if scores[0] > scores[1] else (ckpt, good)
    plain = cli("evaluate", "--baseline", first, "--candidate", second, "--data-root", street_root, "--oracle", 0,
                "--bench-seconds", 0, "--report", tmp_path / "pair.json")  # fmt: skip
    figures = json.loads((tmp_path / "pair.json").read_text())
    assert plain.returncode == 0 and "gate" not in figures and "allowed" not in plain.stdout
    assert figures["drop"] == pytest.approx(abs(scores[0] - scores[1]))
    assert figures["drop_interval"][0] <= figures["drop"] <= figures["drop_interval"][1]
    done = cli("evaluate", "--baseline", first, "--candidate", second, "--data-root", street_root, "--max-drop", 0)
    assert done.returncode == 1 and "failed" in done.stderr


def test_dry_run_writes_nothing(ckpt: Path, street_root: Path, tmp_path: Path) -> None:
    done = cli("prune", "--ckpt", ckpt, "--method", "l1", "--global-ratio", 0.5, "--data-root", street_root, "--save",
               tmp_path / "no", "--dry-run")  # fmt: skip
    assert done.returncode == 0 and "encoder.0.0.0" in done.stdout and "output of the network" in done.stdout
    assert not (tmp_path / "no").exists()
    done = cli("prune", "--ckpt", ckpt, "--method", "l1", "--macs", 0.6, "--data-root", street_root, "--dry-run",
               "--align", "auto", "--backend", "tensorrt", "--precision", "fp16")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "widths in steps of 8, auto: tensorrt wants 4 in fp32 and 8 in fp16: " in " ".join(done.stdout.split())


def test_names_that_do_not_exist(ckpt: Path, street_root: Path, tmp_path: Path) -> None:
    refused(cli("run", "camvid_unett"), "unknown recipe", "camvid_unet")
    refused(cli("run", "no[red]such[/]"), "'no[red]such[/]'")
    refused(cli("run", "camvid_unet", "--set", "train.epoch=3"), "train.epoch", "train.epochs")
    refused(cli("train", "--model", "unett", "--data-root", street_root), "unknown model", "'unet'")
    refused(cli("train", "--dataset", "camvit", "--data-root", street_root), "unknown dataset", "'camvid'")
    prune = ["prune", "--ckpt", ckpt, "--data-root", street_root, "--save", tmp_path, "--macs", 0.5]
    refused(cli(*prune, "--method", "tailor"), "unknown criterion", "'taylor'")
    refused(cli("train", "--data-root", street_root, "--option", "widht=8"), "option of model 'unet'", "'width'")
    refused(cli("--plugin", "no_such_module", "doctor"), "no_such_module", "PYTHONPATH")


def test_numbers_outside_their_range(ckpt: Path, street_root: Path, tmp_path: Path) -> None:
    prune = ["prune", "--ckpt", ckpt, "--data-root", street_root, "--save", tmp_path / "p", "--method", "l1"]
    refused(cli(*prune, "--global-ratio", 1.0), "--global-ratio is 1.0", "0 to 0.999")
    refused(cli(*prune, "--global-ratio", -0.1), "-0.1")
    refused(cli(*prune, "--macs", 1.5), "--macs is 1.5")
    refused(cli(*prune), "exactly one of")
    refused(cli(*prune, "--macs", 0.01, "--floor", 0.5), "allows no less than")
    train = ["train", "--data-root", street_root, "--save", tmp_path / "t"]
    refused(cli(*train, "--input-size", "50,64"), "multiples of 16", "64,64")
    refused(cli("train", "--data-root", street_root, "--input-size", "big"), "H,W")
    assert not (tmp_path / "p").exists() and not (tmp_path / "t").exists()


def damaged(street_root: Path, tmp_path: Path) -> Path:
    root = tmp_path / "street"
    shutil.copytree(street_root, root)
    return root


def train(root: Path, save: Path) -> Done:
    return cli("train", "--data-root", root, "--option", "width=4", "--option", "depth=2", "--input-size", "48,64",
               "--epochs", 1, "--batch-size", 4, "--save", save)  # fmt: skip


def test_data_that_is_wrong(street_root: Path, tmp_path: Path) -> None:
    refused(cli("train", "--data-root", tmp_path / "nowhere"), "nowhere", "does not exist")
    root = damaged(street_root, tmp_path / "a")
    mask = sorted((root / "trainannot").iterdir())[0]
    mask.unlink()
    refused(train(root, tmp_path / "t"), mask.stem)
    root = damaged(street_root, tmp_path / "b")
    mask = sorted((root / "trainannot").iterdir())[0]
    Image.new("L", (10, 10)).save(mask)
    refused(train(root, tmp_path / "t"), mask.name, "10")
    root = damaged(street_root, tmp_path / "c")
    for mask in (root / "trainannot").iterdir():
        Image.new("L", Image.open(mask).size, 77).save(mask)
    refused(train(root, tmp_path / "t"), "77")
    root = damaged(street_root, tmp_path / "d")
    for image in (root / "train").iterdir():
        image.write_bytes(image.read_bytes()[:300])
    refused(train(root, tmp_path / "t"), "train")
    root = damaged(street_root, tmp_path / "e")
    for folder in ("val", "valannot"):
        for file in (root / folder).iterdir():
            file.unlink()
    refused(train(root, tmp_path / "t"), "val")
    assert not list((tmp_path / "t").glob("*.safetensors"))


def test_files_that_are_wrong(ckpt: Path, street_root: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(ckpt.read_bytes()[:5000])
    refused(cli("export", "--ckpt", cut, "--save", tmp_path / "m.onnx"), "cut.safetensors", "truncated")
    code = tmp_path / "code.pt"
    torch.save({"x": print}, code)
    refused(cli("export", "--ckpt", code, "--save", tmp_path / "m.onnx"), "code.pt", ".safetensors")
    refused(cli("train", "--data-root", street_root, "--model", "resnet18_seg", "--input-size", "64,64", "--set",
                f"model.backbone_weights={code}", "--save", tmp_path / "t"), "code.pt", "weights")  # fmt: skip
    (tmp_path / "m.engine.onnx").write_bytes(b"no onnx")
    refused(cli("bench", "--candidate", tmp_path / "m.engine.onnx"), "m.engine.onnx")
    refused(cli("bench", "--candidate", tmp_path / "m.onnx", "--precision", "fp16"), "--precision are of checkpoints")
    assert not (tmp_path / "m.onnx").exists()


def test_a_full_disk_is_a_sentence_and_leaves_nothing(ckpt: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "vss.cli", "export", "--ckpt", str(ckpt), "--save", str(tmp_path / "m.onnx")]
    limited = "ulimit -f 16; trap '' XFSZ; exec \"$@\""  # files of at most 16 KiB, as a disk that fills up
    done = subprocess.run(
        ["bash", "-c", limited, "bash", *words], capture_output=True, text=True, check=False, env=os.environ
    )
    assert "Traceback" not in done.stderr
    refused(Done(done.returncode, done.stdout, done.stderr), "m.onnx", "free some space")
    assert not list(tmp_path.iterdir())


def test_data_check_and_make(tmp_path: Path) -> None:
    assert cli("data", "make", "defects", tmp_path / "d").returncode == 0
    done = cli("data", "check", tmp_path / "d", "--report", tmp_path / "check.json")
    assert done.returncode == 0 and "ok: ksdd2" in done.stdout
    assert "(height x width)" in done.stdout and "{" not in done.stdout
    assert json.loads((tmp_path / "check.json").read_text())["ok"] is True
    refused(cli("data", "make", "streets", tmp_path / "s"), "'street'")


def test_doctor_and_methods() -> None:
    done = cli("doctor", "--json")
    findings = {f["name"]: f["status"] for f in json.loads(done.stdout)["findings"]}
    assert findings["torch"] == "ok"
    done = cli("methods")
    assert done.returncode == 0 and "bn_taylor" in done.stdout


def test_one_prune_reads_once_builds_once_and_traces_once(
    ckpt: Path, street_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vss.prune import make
    from vss.run import pruning

    counts: dict[str, int] = {}

    def count(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def counted(*args: object, **options: object) -> object:
            counts[name] = counts.get(name, 0) + 1
            return real(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in ((checkpoint, "read"), (models, "build"), (pruning, "find_groups"), (make, "find_groups")):
        count(owner, name)
    done = cli("prune", "--ckpt", ckpt, "--method", "corr", "--option", "lam=1e-3", "--option", "redundancy=mean",
               "--macs", 0.6, "--batches", 2, "--set", "prune.batch_size=1", "--set", "prune.recalibrate=2",
               "--data-root", street_root, "--save", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert counts == {"read": 1, "build": 1, "find_groups": 1}
    assert vss.load(tmp_path / "pruned.safetensors").plans[0].criterion_options["lam"] == 1e-3


def test_options_of_prune_that_cannot_be_done_are_refused(ckpt: Path, street_root: Path, tmp_path: Path) -> None:
    prune = ["prune", "--ckpt", ckpt, "--data-root", street_root, "--save", tmp_path / "p", "--batches", 1]
    for words, parts in {
        ("--macs", 0.5, "--floor", 1.0): ("allows no less than 1.000",),
        ("--macs", 0.5, "--floor", "nan"): ("Invalid value for '--floor'",),
        ("--macs", 0.5, "--align", 0): ("--align is 0; expected a whole number from 1, or auto",),
        ("--macs", 0.5, "--align", 4096): ("multiples of 4096", "no less than"),
        ("--macs", 0.5, "--align", "auto"): ("--align auto", "--backend tensorrt --precision fp16"),
        ("--macs", 0.5, "--backend", "torch"): ("--backend is for --align auto and --latency",),
        ("--macs", 0.5, "--iterative", 0): ("Invalid value for '--iterative'",),
        ("--macs", 0.5, "--batches", 0): ("Invalid value for '--batches'",),
        ("--macs", "nan"): ("--macs is nan",),
        ("--macs", 1.5): ("--macs is 1.5",),
        ("--global-ratio", -0.1): ("--global-ratio is -0.1",),
        ("--macs", 0.5, "--method", "dcfp", "--scope", "local"): ("scope is local", "criterion 'dcfp' cannot have"),
        ("--local-ratio", 0.5, "--scope", "global"): ("--scope is for --macs and --params",),
        ("--macs", 0.5, "--widths", "tailor"): ("prune.widths is 'tailor'", "or one of corr, "),
        ("--macs", 0.5, "--widths", "plan.json"): ("--macs says how much stays, and so does the plan of --widths",),
        ("--align", 8, "--widths", "plan.json"): ("--align says how much stays",),
        ("--widths", "taylor"): ("give exactly one of --global-ratio",),
        ("--widths", tmp_path / "plan.json"): ("plan.json",),
        ("--macs", 0.5, "--set", "prune.keep=[encoderr]"): ("unknown layer to keep 'encoderr'", "'encoder'"),
        ("--macs", 0.5, "--preset", "faithfull"): ("unknown preset", "'faithful'"),
        ("--macs", 0.5, "--preset", "faithful", "--option", "preset=x"): ("--option 'preset' is given twice",),
        ("--macs", 0.5, "--option", "joint=no", "--option", "joint=yes"): ("--option 'joint' is given twice",),
        ("--macs", 0.5, "--option", "joint=1e-3"): ("option joint of criterion 'taylor' is 0.001",),
    }.items():
        refused(cli(*prune, *words), *parts)
    assert not (tmp_path / "p" / "pruned.safetensors").exists()
    none = cli(*prune, "--method", "l1", "--global-ratio", 0)
    assert none.returncode == 0 and "100.0% of the channels" in none.stdout
