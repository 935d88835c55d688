"""Files are whole or absent, JSON says what it is, and hashes are those of the content."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from vss.errors import VssError
from vss.files import atomic, read_json, sha256_file, sha256_json, sha256_tensors, write_json


def test_a_written_file_replaces_the_old_one_and_leaves_no_other(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "data.npz"
    with atomic(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".npz"
        temporary.write_text("one")
        assert not target.exists()
    with atomic(target) as temporary:
        temporary.write_text("two")
        assert target.read_text() == "one"
    assert target.read_text() == "two"
    assert os.listdir(target.parent) == ["data.npz"]
    assert target.stat().st_mode & 0o777 == 0o644


def test_a_failure_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    target = tmp_path / "data.txt"
    target.write_text("old")
    with pytest.raises(KeyError), atomic(target) as temporary:
        temporary.write_text("half")
        raise KeyError("stop")
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["data.txt"]


def test_a_full_disk_and_a_folder_that_is_none_are_sentences(tmp_path: Path) -> None:
    full = pytest.raises(VssError, match=r"data\.txt cannot be written \(No space left on device\)")
    with full, atomic(tmp_path / "data.txt") as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(VssError, match="cannot be written"), atomic(tmp_path / "file" / "data.txt"):
        raise AssertionError("never reached")


def test_json_round_trip_keeps_the_order(tmp_path: Path) -> None:
    data = {"kind": "k", "schema": 2, "b": [1.5, None], "a": {"ü": True}}
    path = write_json(tmp_path / "x.json", data)
    read = read_json(path, kind="k", schema=2)
    assert read == data and list(read) == list(data)
    assert read_json(path, kind="k", schema=3) == data


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_json_cannot_say(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": value})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", r"is not JSON \(.*expected a k file"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[1]", "holds 'list'; expected a file of kind 'k'"),
        ('{"schema": 1}', "holds None; expected"),
        ('{"kind": "other", "schema": 1}', "holds 'other'; expected"),
        ('{"kind": "k", "schema": 3}', "has schema 3; this version reads up to 2: upgrade"),
        ('{"kind": "k"}', "has schema None"),
        ('{"kind": "k", "schema": "1"}', "has schema '1'"),
    ],
)
def test_bad_json_files_are_sentences(tmp_path: Path, content: str | bytes, sentence: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(VssError, match=sentence):
        read_json(path, kind="k", schema=2)


def test_absent_and_unreadable_json_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(VssError, match="does not exist; expected a k file"):
        read_json(tmp_path / "x.json", kind="k", schema=2)
    with pytest.raises(VssError, match=r"cannot be read \(Is a directory\); expected a k file"):
        read_json(tmp_path, kind="k", schema=2)


def test_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_hash_of_json_ignores_order_alone() -> None:
    data = {"b": [1, 2], "a": "x"}
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    assert sha256_json(data) == sha256_json({"a": "x", "b": [1, 2]}) == hashlib.sha256(canonical).hexdigest()
    assert sha256_json({"b": [2, 1], "a": "x"}) != sha256_json(data)


def test_hash_of_tensors_sees_every_difference_and_no_layout() -> None:
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)}
    digest = sha256_tensors(state)
    assert digest == sha256_tensors(dict(reversed(state.items())))
    assert digest == sha256_tensors({**state, "a": torch.arange(6.0).view(2, 3).T.contiguous().T})
    others = [
        {**state, "a": state["a"].view(3, 2)},
        {**state, "a": state["a"].to(torch.float64)},
        {**state, "a": state["a"] + torch.tensor([0, 0, 1e-6])},
        {"a": state["a"]},
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"], "b": torch.tensor(1.0)},
        {**state, "a": torch.where(state["a"] == 0, -0.0, state["a"])},
    ]
    assert len({digest, *map(sha256_tensors, others)}) == 1 + len(others)
    assert sha256_tensors({"h": torch.ones(3, dtype=torch.bfloat16), "e": torch.zeros(0, 2)}) != digest
