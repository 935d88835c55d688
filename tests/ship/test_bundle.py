"""`vss ship`: what a bundle holds, and which runs are refused."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.deploy.test_probe import spoiled
from vss.core.errors import GateFailed, NotFinite, VssError
from vss.core.files import sha256_file
from vss.core.report import write_report
from vss.prune import Plan
from vss.run.page import write_page
from vss.ship import manifest as archive
from vss.ship import read, ship, verify
from vss.ship.manifest import walk
from vss.ship.source import public
from vss.ship.triton import parse

from .conftest import make_run


def test_every_file_is_listed_with_its_hash(seg_bundle: Path) -> None:
    stated = {name: fact.sha256 for name, fact in read(seg_bundle).files.items()}
    found = {
        path.relative_to(seg_bundle).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in seg_bundle.rglob("*")
        if path.is_file() and path.name not in ("manifest.json", "SHA256SUMS")
    }
    assert found == stated
    wanted = {"run.py", "requirements.txt", "README.md", "MODEL_CARD.md", "labels.txt", "plan.json"}
    wanted |= {"engine/model.onnx", "reports/report.json", "cpp/ort_example.cpp"}
    wanted |= {"triton/python/street/1/model.py", "triton/onnxruntime/street/config.pbtxt"}
    assert wanted <= set(stated) and "cpp/trt_example.cpp" not in stated
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=seg_bundle, check=True)


def test_the_chain_leads_from_the_weights_to_the_report(seg_bundle: Path, seg_run: Path) -> None:
    manifest = read(seg_bundle)
    exported = json.loads((seg_run / "report.json").read_text())["export"]["engine pruned"]
    hashes = {link.what: link.sha256 for link in manifest.chain}
    assert list(hashes) == ["weights", "plan", "onnx", "engine", "report"]
    assert hashes["weights"] == exported["metadata"]["vss.weights_sha256"]
    assert hashes["plan"] == exported["metadata"]["vss.plan_sha256"] == Plan.load(seg_bundle / "plan.json").sha256()
    assert hashes["onnx"] == hashes["engine"] == exported["sha256"] == sha256_file(seg_bundle / manifest.engine.file)
    assert hashes["report"] == sha256_file(seg_bundle / "reports/report.json")


def test_nothing_of_the_training_code_is_imported(seg_bundle: Path) -> None:
    for path in seg_bundle.rglob("*.py"):
        lines = [
            line.split() for line in path.read_text().splitlines() if line.strip().startswith(("import ", "from "))
        ]
        assert not {words[1].split(".")[0] for words in lines} & {"vss", "torch", "pickle"}, path


def test_samples_are_images_truth_and_answers(seg_bundle: Path) -> None:
    samples = read(seg_bundle).samples
    assert len(samples.images) == len(samples.truth) == len(samples.expected) == 3
    for truth, files in zip(samples.truth, samples.expected, strict=True):
        answer = np.load(seg_bundle / files["labels"], allow_pickle=False)
        assert answer.shape == (1, 32, 48) and answer.dtype == np.int32
        assert np.array(Image.open(seg_bundle / truth)).shape == (32, 48)
    predicted = [np.load(seg_bundle / files["labels"])[0] for files in samples.expected]
    truths = [np.array(Image.open(seg_bundle / truth)) for truth in samples.truth]
    valid = [truth != 255 for truth in truths]
    right = sum(int((p == t)[v].sum()) for p, t, v in zip(predicted, truths, valid, strict=True))
    assert samples.metrics["pixel_acc_pct"] == pytest.approx(100 * right / sum(int(v.sum()) for v in valid))


def test_texts(seg_bundle: Path) -> None:
    card, requirements = (seg_bundle / "MODEL_CARD.md").read_text(), (seg_bundle / "requirements.txt").read_text()
    assert "| pruned against baseline | miou_pct |" in card and "| 0.00 (4.00 to 6.50) | 1 | passed |" in card
    assert "95 % bootstrap interval over 8 images" in card and "pruned by l1" in card and "Apache-2.0" in card
    assert {line.split("==")[0] for line in requirements.split()} == {"numpy", "pillow", "onnxruntime"}
    labels = (seg_bundle / "labels.txt").read_text().split()
    assert labels == read(seg_bundle).classes and len(labels) == 11


def test_the_baseline_is_shipped_by_force_and_is_larger(baseline_bundle: Path, seg_bundle: Path) -> None:
    manifest = read(baseline_bundle)
    assert manifest.forced == "shipped with --force: no gate judged 'engine baseline'"
    assert manifest.link("plan") is None and "plan.json" not in manifest.files
    assert "not pruned" in (baseline_bundle / "MODEL_CARD.md").read_text()
    pruned = read(seg_bundle)
    assert manifest.files[manifest.onnx].bytes > pruned.files[pruned.onnx].bytes


def test_a_defect_bundle_has_scores(defect_bundle: Path) -> None:
    manifest = read(defect_bundle)
    assert manifest.task == "defect" and set(manifest.outputs) == {"decision", "seg"}
    truths = [np.array(Image.open(defect_bundle / path)).any() for path in manifest.samples.truth]
    assert sorted(truths) == [False, True]
    assert manifest.samples.metrics["decision_acc_pct"] in (0.0, 50.0, 100.0)
    assert parse(defect_bundle / "triton/python/defects/config.pbtxt").output[1].dims == [1, 16, 8]


def test_a_logits_engine_becomes_an_ensemble(logits_bundle: Path) -> None:
    folders = {path.parent.name for path in (logits_bundle / "triton/python").glob("*/config.pbtxt")}
    assert folders == {"logits", "logits_pre", "logits_net", "logits_post"}
    assert verify(logits_bundle)[-1]["status"] == "ok"


def test_no_gate_is_refused_unless_forced(seg_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(seg_run, run)
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(report | {"gate": {}}))
    with pytest.raises(VssError, match=r"no gate judged 'engine pruned'; --force"):
        ship(run, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    manifest = ship(run, tmp_path / "bundle", force=True, samples=0)
    assert manifest.forced == "shipped with --force: no gate judged 'engine pruned'" and manifest.gate is None
    assert manifest.forced in (tmp_path / "bundle/MODEL_CARD.md").read_text()
    assert {row["name"]: row["detail"] for row in verify(tmp_path / "bundle")}["gate"] == manifest.forced


def test_a_failed_gate_is_exit_code_1(street_root: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", street_root, passed=False)
    told = r"gate pruned against baseline failed: .* 5\.000 points .* where 1 is allowed\. --accept-failed-gate"
    for force in (False, True):
        with pytest.raises(GateFailed, match=told) as caught:
            ship(run, tmp_path / "bundle", force=force)
    assert caught.value.exit_code == 1 and not (tmp_path / "bundle").exists()
    with pytest.raises(VssError, match="words that say why"):
        ship(run, tmp_path / "bundle", accept=" ")
    reason = "the customer asked\nfor speed alone"
    manifest = ship(run, tmp_path / "bundle", accept=reason, samples=0)
    card = (tmp_path / "bundle/MODEL_CARD.md").read_text()
    assert manifest.forced and manifest.forced.endswith("Accepted because: the customer asked for speed alone")
    assert manifest.forced in card and "| 5.00 (4.00 to 6.50) | 1 | FAILED |" in card
    detail = {row["name"]: row["detail"] for row in verify(tmp_path / "bundle")}["gate"].splitlines()
    assert detail[0] == manifest.forced and [line.split(" passed")[0] for line in detail[1:2]] == [
        "engine equals its network"
    ]
    assert detail[2].startswith("pruned against baseline failed: ")


def test_words_for_a_gate_that_did_not_fail_are_refused(seg_run: Path, tmp_path: Path) -> None:
    with pytest.raises(VssError, match="none did"):
        ship(seg_run, tmp_path / "bundle", accept="why not")


def test_a_report_that_judged_the_engine_alone_is_no_passed_gate(seg_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(seg_run, run)
    report = json.loads((run / "report.json").read_text())
    report["gate"]["checks"] = report["gate"]["checks"][:1]
    (run / "report.json").write_text(json.dumps(report))
    with pytest.raises(VssError, match="nothing judged what pruning cost; run the recipe again"):
        ship(run, tmp_path / "bundle")


def test_bad_runs_are_one_sentence(seg_run: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("")
    with pytest.raises(VssError, match="exists already"):
        ship(seg_run, tmp_path / "taken")
    with pytest.raises(VssError, match=r"unknown engine of this run 'engine prune'. Did you mean 'engine pruned'"):
        ship(seg_run, tmp_path / "b", row="engine prune")
    run = tmp_path / "run"
    shutil.copytree(seg_run, run)
    (run / "engine/a.engine.onnx").write_bytes(b"changed")
    with pytest.raises(VssError, match=r"a\.engine\.onnx is not the file that the report was made with"):
        ship(run, tmp_path / "b")
    (run / "engine/a.engine.onnx").unlink()
    with pytest.raises(VssError, match="does not exist; run the recipe again"):
        ship(run, tmp_path / "b")
    with pytest.raises(VssError, match=r"nowhere"):
        ship(seg_run, tmp_path / "b", data_root=str(tmp_path / "nowhere"))
    assert not (tmp_path / "b").exists()


def test_nothing_of_the_house_is_in_a_bundle(
    seg_run: Path, street_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home/jane doe-4711"
    run = Path(shutil.copytree(seg_run, home / "runs/one"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", home.name)
    for module, name in ((socket, "gethostname"), (platform, "node")):
        monkeypatch.setattr(module, name, lambda: "host-4711")
    report = json.loads((run / "report.json").read_text())
    weak = home / "weak.safetensors"
    report["command"] = ["vss", "run", "street", "--set", f"model.checkpoint={weak}"]
    report["recipe"]["data"]["root"] = str(home / "my data/street")
    report["recipe"].setdefault("precision", {})["image_list"] = str(weak)  # ship opens no such list
    report["steps"] = [
        {"name": "train", "status": "ok", "detail": f"taken from {weak}; see {run}/log and /data/x/y.txt"}
    ]
    report["checks"] = {f"of {run}/a": "node /down/conv of https://example.org/a/b and ~/secret/c.txt"}
    write_report(run / "report.json", report)
    write_page(run / "report.json", run / "report.html")
    assert b"jane" in (run / "report.html").read_bytes() and "vss run" in (run / "report.html").read_text()
    manifest = ship(run, tmp_path / "bundle.tar.gz", samples=2, data_root=str(street_root))
    with archive.opened(tmp_path / "bundle.tar.gz") as bundle:
        assert verify(bundle)[1]["detail"].endswith("report")
        found = json.loads((bundle / "reports/report.json").read_text())
        files = {name: (bundle / name).read_bytes() for name in walk(bundle)}
    assert "reports/report.html" in files and set(manifest.files) < set(files)
    words = [str(tmp_path), str(street_root), "jane", "4711", "vss run", "my data", "secret/"]
    telling = {(name, word) for name, data in files.items() for word in words if word.encode() in data}
    assert not telling
    assert "command" not in found and found["recipe"]["data"]["root"] == "street"
    assert found["recipe"]["precision"]["image_list"] == "weak.safetensors"
    start = {"recipe": {"model": {"checkpoint": str(weak)}, "prune": {"keep": ["out.*"]}}}
    assert public(start)["recipe"] == {"model": {"checkpoint": "weak.safetensors"}, "prune": {"keep": ["out.*"]}}
    assert found["steps"][0]["detail"] == "taken from weak.safetensors; see one/log and y.txt"
    assert found["checks"] == {"of one/a": "node /down/conv of https://example.org/a/b and c.txt"}
    untouched = {"command", "recipe", "steps", "checks"}
    own = json.loads((run / "report.json").read_text())
    assert {k: v for k, v in own.items() if k not in untouched} == {
        k: v for k, v in found.items() if k not in untouched
    }


def test_an_engine_that_gives_nan_is_not_shipped(seg_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(seg_run, tmp_path / "run"))
    report = json.loads((run / "report.json").read_text())
    artefact = report["artefacts"]["engine pruned"]
    for role in ("onnx", "engine"):
        path = run / artefact["files"][role]
        artefact["sha256"][role] = sha256_file(spoiled(path, path, float("nan")))
    write_report(run / "report.json", report)
    with pytest.raises(NotFinite, match="NaN"):
        ship(run, tmp_path / "b", samples=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
