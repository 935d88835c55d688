"""The commands around a bundle: sentences and exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.ship.conftest import make_run
from vss.cli.main import main


@pytest.fixture(scope="module")
def run(street_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), street_root)


def vss(*words: str | Path) -> SimpleNamespace:
    """`vss WORDS` through its entry point, in this process; what it raises is not caught here."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", ["vss", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return SimpleNamespace(
        returncode=code, stdout=" ".join(stdout.getvalue().split()), stderr=" ".join(stderr.getvalue().split())
    )


def test_ship_verify_rebuild_and_tamper(run: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    done = vss("ship", run, "--to", bundle, "--name", "street-2", "--samples", "2", "--licence", "CC-BY-4.0")
    assert done.returncode == 0 and "onnxruntime and python servers" in done.stdout, done.stderr
    assert "not settled: There is no unpruned control that was trained as long" in done.stdout
    assert "| weights | CC-BY-4.0 |" in (bundle / "MODEL_CARD.md").read_text()
    assert json.loads((bundle / "manifest.json").read_text())["name"] == "street-2"
    whole = vss("verify", bundle)
    assert whole.returncode == 0 and "2 images" in whole.stdout
    assert vss("rebuild", bundle).returncode == 0
    (bundle / "labels.txt").write_text("other\n")
    broken = vss("verify", bundle, "--no-run")
    assert broken.returncode == 2 and "labels.txt does not have the hash it was shipped with" in broken.stderr


def test_bad_input_is_one_sentence(run: Path, tmp_path: Path) -> None:
    ungated = Path(shutil.copytree(run, tmp_path / "ungated"))
    report = json.loads((ungated / "report.json").read_text())
    (ungated / "report.json").write_text(json.dumps(report | {"gate": {}}))
    cases = [
        (["ship", tmp_path / "no", "--to", tmp_path / "b"], "report.json does not exist"),
        (["ship", ungated, "--to", tmp_path / "b"], "no gate judged 'engine pruned'; --force ships it"),
        (["ship", run, "--to", tmp_path / "b", "--max-batch", "0"], "Invalid value for '--max-batch'"),
        (["ship", run, "--to", tmp_path / "b", "--name", "a b"], "'a b' is no name of a model"),
        (["verify", tmp_path], "manifest.json does not exist"),
        (["verify", run / "report.json"], "expected the folder of a bundle"),
        (["serve"], "give one or more bundles"),
        (["serve", tmp_path], "manifest.json does not exist"),
    ]
    for arguments, words in cases:
        done = vss(*arguments)
        assert done.returncode == 2 and words in done.stderr, (arguments, done.stderr)
        assert not (tmp_path / "b").exists()


def test_a_missing_server_says_how_to_get_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSS_TRITON", str(tmp_path))
    assert vss("ship", run, "--to", tmp_path / "b", "--samples", "1").returncode == 0
    done = vss("serve", tmp_path / "b")
    assert done.returncode == 2 and "vss serve --get-server" in done.stderr
    away = vss("load", tmp_path / "b", "--address", "127.0.0.1:1", "--seconds", "0.1")
    assert away.returncode == 2 and "127.0.0.1:1" in away.stderr
