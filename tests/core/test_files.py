"""Files are whole or absent, JSON says what it is, and hashes are those of the content."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vss.core.errors import VssError
from vss.core.files import (
    TEMPORARY,
    atomic,
    file_at_work,
    parse_json,
    read_json,
    safe_name,
    sha256_file,
    sha256_json,
    sha256_tensors,
    write_json,
)
from vss.core.yaml12 import parse_yaml


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
        (b"\xff\xfe\x00", "is no text"),
        ("[1]", "holds a list; expected a file of kind 'k'"),
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
    with pytest.raises(VssError, match=r"is a folder; expected a k file"):
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


# What comes from outside

ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
JSON_BOMBS = {
    "[" * 100_000 + "]" * 100_000: "nested more than 64 deep",
    "[" * 65 + "]" * 65: "nested more than 64 deep",
    '{"a": ' + "9" * 6000 + "}": "not JSON",
    '{"a": ' + "9" * 40 + "}": "an integer of 133 bits",
    '{"a": NaN}': "holds nan",
    '{"a": -1e999}': "holds -inf",
    '{"a": 1, "b": {"c": 1, "c": 2}}': "the key 'c' stands there twice",
    '{"a": "\ud800': "not JSON",
}
YAML_BOMBS = {
    f"{ALIASES}data: *i\n": "more than 50000 values",
    "a: &a {b: *a}\n": "holds its own alias",
    "a: &a {b: 1}\nc: {<<: *a, <<: *a}\n": "",  # merges may come twice
    "[" * 5000: "nested more than 64 deep",
    "- " * 100 + "x": "nested more than 64 deep",
    f"seed: {'9' * 5000}": "what YAML takes for a number",
    f"seed: 0x{'f' * 5000}": "an integer of 20000 bits",
    "name: !!timestamp x": "quote what is a text",
    "name: !!timestamp 2020-01-02": "holds a date",
    "name: !!bool x": "quote what is a text",
    "name: !!python/object/apply:os.system [x]": "no YAML",
    "name: !!binary aGFsbG8=": "holds a bytes",
    "lr: .nan": "holds nan",
    "lr: 1\nlr: 2": "the key 'lr' stands there twice",
    "? [a, b]\n: c": "no YAML",
    "a: b: c": "no YAML",
    "\x00": "no YAML",
}


@pytest.mark.parametrize("text", JSON_BOMBS, ids=lambda text: text[:12])
def test_json_bombs_are_one_short_sentence(text: str) -> None:
    with pytest.raises(VssError, match=re.escape(JSON_BOMBS[text])) as caught:
        parse_json(text, source="x.json", kind="table")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", YAML_BOMBS, ids=lambda text: text[:12])
def test_yaml_bombs_are_one_short_sentence(text: str) -> None:
    if not YAML_BOMBS[text]:
        assert parse_yaml(text, source="x.yaml") == {"a": {"b": 1}, "c": {"b": 1}}
        return
    with pytest.raises(VssError, match=re.escape(YAML_BOMBS[text])) as caught:
        parse_yaml(text, source="x.yaml")
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_plain_values_are_read_as_they_stand() -> None:
    data = {"a": [1, -2.5, True, None, "x\ny"], "b": {"c": 2**63, "d": {}}}
    assert parse_json(json.dumps(data), source="x", kind="y") == data == parse_yaml(json.dumps(data), source="x")
    assert parse_yaml("a: &a [1, 2]\nb: *a", source="x") == {"a": [1, 2], "b": [1, 2]}
    assert parse_json("[" * 64 + "]" * 64, source="x", kind="y")
    assert str(parse_json("[NaN]", source="x", kind="y", finite=False)) == "[nan]"


def test_only_a_regular_file_of_some_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(3 << 30)
    wanted = {"zero": "device", "pipe": "device", "folder": "folder", "binary": "no text", "large": "3221225472 bytes"}
    for name, reason in wanted.items():
        with pytest.raises(VssError, match=reason):
            read_json(tmp_path / name, kind="x", schema=1)
    with pytest.raises(VssError, match="does not exist"):
        read_json(tmp_path / "none", kind="x", schema=1)
    with pytest.raises(VssError, match="is no path"):
        read_json("a\0b", kind="x", schema=1)
    with pytest.raises(VssError, match="cannot be read"):
        read_json("n" * 300, kind="x", schema=1)


@pytest.mark.parametrize("schema", ["2", "true", "0", "-1", "1.0", '"1"', "null"])
def test_a_schema_is_a_known_number(tmp_path: Path, schema: str) -> None:
    (tmp_path / "a.json").write_text(f'{{"kind": "x", "schema": {schema}}}')
    with pytest.raises(VssError, match="this version reads up to 1"):
        read_json(tmp_path / "a.json", kind="x", schema=1)


def test_a_sentence_is_one_line_of_bounded_length() -> None:
    assert str(VssError("a\n  b\r\nc")) == "a b c"
    text = str(VssError("x" * 10**6 + "\nend"))
    assert len(text) < 4100 and text.endswith("end")


@pytest.mark.parametrize(
    ("text", "name"),
    [("l1", "l1"), ("macs 0.5", "macs_0.5"), ("..", "_"), (".", "_"), ("", "_"), ("a/../b", "a_.._b"), ("../x", "_x"),
     ("/etc/passwd", "_etc_passwd"), (".lock", "lock"), ("a\x00\nb", "a_b"), ("\u00fc" * 200, "_")],
)  # fmt: skip
def test_a_name_that_becomes_a_folder_is_safe(text: str, name: str) -> None:
    assert safe_name(text) == name
    long = safe_name("n" * 500)
    assert len(long) == 120 and long != safe_name("n" * 501)


def test_a_link_stays_a_link_and_a_folder_a_folder(tmp_path: Path) -> None:
    """What a link leads to is what is written; a folder, a device and a link to them are refused before anything."""
    store, folder = tmp_path / "store" / "a.json", tmp_path / "folder"
    folder.mkdir()
    store.parent.mkdir()
    store.write_text("old")
    for name, target in (("file", store), ("dir", folder), ("null", "/dev/null"), ("new", store.with_name("b.json"))):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, written in (("file", store), ("new", store.with_name("b.json"))):
        write_json(tmp_path / name, {"a": 1})
        assert (tmp_path / name).is_symlink() and json.loads(written.read_text()) == {"a": 1}
    assert sorted(each.name for each in store.parent.iterdir()) == ["a.json", "b.json"]
    for place in (folder, tmp_path / "dir", tmp_path / "null", Path("/dev/null"), store / "below", tmp_path / "loop"):
        with pytest.raises(VssError, match=r"is a folder|is a device|is a file|cannot be written"):
            write_json(place, {})
    assert (tmp_path / "dir").is_symlink() and list(folder.iterdir()) == []


def test_what_a_killed_writer_left_goes_with_the_next_write_and_what_another_writes_stays(tmp_path: Path) -> None:
    left, live, foreign = (
        tmp_path / f".{name}.json" for name in (f"a{TEMPORARY}x", f"a{TEMPORARY}y", f"b{TEMPORARY}x")
    )
    for path in (left, live, foreign):
        path.write_text("half")
    with live.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_json(tmp_path / "a.json", {"done": True})
        assert (left.exists(), live.exists(), foreign.exists()) == (False, True, True)
    write_json(tmp_path / "a.json", {"done": True})
    assert not live.exists() and foreign.exists()


def test_a_lock_whose_file_was_taken_away_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last holder unlinks the file between this one's opening and locking of it: another would lock a new one."""
    target, flock, calls = tmp_path / "a.json", fcntl.flock, []

    def taken_away(file: Any, how: int) -> None:
        flock(file, how)
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / ".a.json.lock").unlink()

    monkeypatch.setattr(fcntl, "flock", taken_away)
    with file_at_work(target):
        assert len(calls) == 2 and (tmp_path / ".a.json.lock").exists()
        with pytest.raises(VssError, match="another vss command is at work on"), file_at_work(target):
            pass
    assert not (tmp_path / ".a.json.lock").exists()
