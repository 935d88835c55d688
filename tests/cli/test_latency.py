"""`vss lut`, `vss explain` and `vss prune --latency` from the command line, on a small network and real files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vss
from tests.run.test_explain import Line, engines, write_run
from vss import models
from vss.cli.main import app, main
from vss.core.errors import VssError
from vss.data import Preprocess
from vss.data.readers import CAMVID_NAMES
from vss.deploy.profile.table import LatencyTable, Sample
from vss.deploy.profile.units import Reading
from vss.prune import Plan
from vss.run.latency import Measured


def refusal(arguments: list[str]) -> str:
    """The sentence of exit code 2."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, (done.output, done.exception)
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ckpt") / "net.safetensors"
    net = models.build("unet", 11, width=16, depth=2)
    return vss.save(net, path, preprocess=Preprocess(size=(48, 64)).model_dump(mode="json"), classes=CAMVID_NAMES,
                    info={"dataset": "camvid"})  # fmt: skip


@pytest.fixture(scope="module")
def table(ckpt: Path) -> Path:
    path = ckpt.parent / "table.json"
    arguments = ["lut", "build", "--ckpt", str(ckpt), "--save", str(path), "--quick", "--threads", "1",
                 "--seconds", "0.03", "--step", "8", "--allow-unstable"]  # fmt: skip
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "error on 5 unseen width vectors" in done.output
    return path


def test_a_table_is_built_shown_and_drawn(table: Path, tmp_path: Path) -> None:
    known = LatencyTable.load(table)
    assert known.done
    assert known.step == 8
    assert known.key["threads"] == 1
    plot = tmp_path / "cliffs.svg"
    done = CliRunner().invoke(app, ["lut", "show", str(table), "--plot", str(plot)], catch_exceptions=False)
    assert f"step 8, {len(known.samples)} samples" in done.output
    assert plot.read_text().count("<path") > 5


def test_prune_to_a_time_and_its_plan(
    ckpt: Path, table: Path, street_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = Measured(1.0, 0.7, 0.7, 0.69, 0.71)  # whatever else the machine does
    monkeypatch.setattr("vss.run.latency.measure", lambda *_: reached)
    arguments = ["prune", "--ckpt", str(ckpt), "--method", "l1", "--latency", "0.7x", "--lut", str(table),
                 "--data-root", str(street_root), "--save", str(tmp_path)]  # fmt: skip
    changes = {"build.threads": 1, "prune.latency.noise": 0.9, "prune.latency.max_seconds": 1.5,
               "prune.latency.iterations": 2, "prune.recalibrate": 1}  # fmt: skip
    arguments += [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.budget["kind"] == "latency"
    assert plan.budget["target"] == "0.7x"
    assert plan.criterion == "l1"
    assert 0.2 < plan.cost_after["macs"] / plan.cost_before["macs"] < 0.9
    small = vss.load(tmp_path / "pruned.safetensors")
    kept = {group.id: len(group.kept) for group in plan.groups}
    assert small.get_submodule("encoder.1.0.0").out_channels == kept["encoder.1.0.0"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--latency", "0.5x", "--macs", "0.5"], "exactly one of"),
        (["--latency", "0.5x", "--dry-run"], "no dry run"),
        (["--macs", "0.5", "--lut", "x.json"], "--lut is the table of --latency"),
    ],
)
def test_flags_that_do_not_go_together(ckpt: Path, arguments: list[str], sentence: str) -> None:
    assert sentence in refusal(["prune", "--ckpt", str(ckpt), *arguments])


def test_a_table_of_another_device_is_refused(ckpt: Path, table: Path, street_root: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.json"
    data = json.loads(table.read_text())
    data["key"]["device"] = "another"
    foreign.write_text(json.dumps(data))
    with pytest.raises(VssError, match=r"foreign\.json was changed after it was written"):
        LatencyTable.load(foreign)
    del data["sha256"]
    foreign.write_text(json.dumps(data))
    arguments = ["prune", "--ckpt", str(ckpt), "--method", "l1", "--latency", "0.5x", "--lut", str(foreign),
                 "--data-root", str(street_root), "--set", "build.threads=1", "--save", str(tmp_path)]  # fmt: skip
    assert re.search(r"holds for device another and this is .* build one here: vss lut build", refusal(arguments))


@pytest.fixture
def small_run(tmp_path: Path) -> Path:
    """The folder of a run that cut two convolutions of 16 channels to 8, with a latency table of its own."""
    folder = tmp_path / "run"
    (folder / "engine").mkdir(parents=True)
    _, _, plan = engines(Line([16, 16]).eval(), [8, 8], (16, 16), folder)
    plan.save(folder / "plan.json")
    write_run(folder)
    ids = [group.id for group in plan.groups]
    cuts = [
        Sample(f"cliff-0-{width}", "cliff", (width, 16), Reading({"convs.0": width / 10}, 3.0)) for width in (8, 16)
    ]
    full = Sample("full-0", "full", (16, 16), Reading({"convs.0": 1.6}, 3.0))
    key = {"network": "line", "backend": "onnxruntime"}
    channels = {"convs.0": [3, 16, {"0": [0, 1]}]}
    table = LatencyTable(key, [[i, 16, 1] for i in ids], 0.1, 8, {}, [full, *cuts], channels, done=True)
    table.save(folder / "latency_table.json")
    return folder


def test_a_run_is_explained_with_its_cliffs(small_run: Path) -> None:
    arguments = ["explain", str(small_run), "--seconds", "0.05", "--allow-unstable", "--report",
                 str(small_run / "why.json"), "--plot", str(small_run / "cliffs.svg")]  # fmt: skip
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    figures = json.loads((small_run / "why.json").read_text())
    assert f"{figures['speedup']:.2f}x faster for {figures['mac_reduction']:.2f}x fewer MACs" in done.output
    assert {row["unit"] for row in figures["rows"]} >= {"convs.0", "convs.1", "head"}
    assert figures["noise"] >= 0 and ("noisy:" in done.output) == (figures["noise"] > 0.1)
    assert "kept: 8" in (small_run / "cliffs.svg").read_text()
    page = (small_run / "report.html").read_text()
    assert all(f'href="{name}"' in page for name in ("why.json", "cliffs.svg", "latency_table.json"))


def test_times_of_a_noisy_machine_are_exit_code_3(
    ckpt: Path, table: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = LatencyTable.load(table)
    known.drift = 0.5
    monkeypatch.setattr("vss.deploy.profile.subject.open_subject", lambda *_, **__: None)
    monkeypatch.setattr("vss.deploy.profile.build.build", lambda *_, **__: known)
    figures = {"rows": [], "causes": [], "request": {}, "noise": float("nan"), "ms_before": 2.0, "ms_after": 1.0,
               "speedup": 2.0, "mac_reduction": 2.0, "speedup_per_mac_reduction": 1.0, "floating": []}  # fmt: skip
    monkeypatch.setattr("vss.run.explain.explain", lambda *_, **__: figures)
    lut = ["lut", "build", "--ckpt", str(ckpt), "--save", str(tmp_path / "t.json")]
    for arguments, said in ((lut, "differ by 50%: the uncut network drifted"), (["explain", str(small_run)], "nan%")):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 3 and said in done.output and "--allow-unstable" in done.output
        assert CliRunner().invoke(app, [*arguments, "--allow-unstable"]).exit_code == 0


def refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int = 2
) -> str:
    """The one sentence of a command that ends in this exit code."""
    monkeypatch.setattr(sys, "argv", ["vss", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


def test_bad_input_is_one_sentence_and_exit_code_2(
    ckpt: Path, table: Path, street_root: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def told(*arguments: object, code: int = 2) -> str:
        return refused([str(each) for each in arguments], monkeypatch, capsys, code)

    def changed(old: str, new: str) -> Path:
        text = table.read_text()
        assert old in text
        data = json.loads(text.replace(old, new, 1))
        del data["sha256"]  # a change on purpose
        (tmp_path / "changed.json").write_text(json.dumps(data))
        return tmp_path / "changed.json"

    def prune(target: str, lut: Path, *more: str, code: int = 2) -> str:
        settings = ("build.threads=1", "prune.recalibrate=1", "prune.latency.max_seconds=0.6", *more)
        flags = [part for setting in settings for part in ("--set", setting)]
        return told("prune", "--ckpt", ckpt, "--method", "l1", "--latency", target, "--lut", lut, "--data-root",
                    street_root, "--save", tmp_path / "out", *flags, code=code)  # fmt: skip

    below = prune("0.001x", table)
    assert "target 0.001x is below the floor: with 10% of every group" in below and "ask for at least 0." in below
    assert "is too noisy" in prune("0.6x", table, "prune.latency.noise=1e-9", code=3)
    rebuild = "build one here: vss lut build --ckpt CKPT --save TABLE --backend onnxruntime --threads 1"
    assert rebuild in prune("0.5x", changed('"device": "', '"device": "another-'))
    version = prune("0.5x", changed('"onnxruntime": "', '"onnxruntime": "0.'))
    assert "holds for versions" in version and rebuild in version
    assert "is not finished; go on with: vss lut build" in prune("0.5x", changed('"done": true', '"done": false'))
    assert "is no whole latency table" in prune("0.5x", changed('"groups"', '"troops"'))
    (tmp_path / "changed.json").write_text(table.read_text()[:500])
    assert "is not JSON" in prune("0.5x", tmp_path / "changed.json")
    assert "is not JSON" in told("lut", "show", tmp_path / "changed.json")
    assert not (tmp_path / "out" / "plan.json").exists()

    assert "--lut is the table of --plot" in told("explain", small_run, "--lut", table)
    other = told("explain", small_run, "--lut", table, "--plot", tmp_path / "c.svg")
    assert "is a table of unet with other channels than the run's network" in other
    (small_run / "latency_table.json").unlink()
    assert "give --lut TABLE, made by: vss lut build" in told("explain", small_run, "--plot", tmp_path / "c.svg")
    (small_run / "engine" / "finetuned.onnx").write_bytes(b"broken")
    assert "finetuned.onnx is not the file that" in told("explain", small_run)
    write_run(small_run, status="failed")
    assert "is not finished, a step failed" in told("explain", small_run)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    assert "takes the folder of a finished" in refusal(["explain", str(tmp_path)])
