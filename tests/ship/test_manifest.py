"""Paths and hashes of a manifest; tampering is in test_check.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from vss.core.errors import VssError
from vss.ship import read
from vss.ship.manifest import GateCheck, inside, relative, walk


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../b", "a//b", "./a", "a\\b", "a/", "a\0b"])
def test_paths_that_are_not_plain(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no plain path"):
        relative(name)
    with pytest.raises(VssError, match="such a bundle is refused"):
        inside(tmp_path, name)


def test_a_link_that_leads_out_is_refused_and_listed(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "out").symlink_to(tmp_path)
    (bundle / "a").write_text("")
    with pytest.raises(VssError, match="leads out of the bundle"):
        inside(bundle, "out/secret")
    assert list(walk(bundle)) == ["a", "out"]
    assert inside(bundle, "a") == bundle / "a"


def test_what_a_client_of_the_server_sees(seg_bundle: Path, logits_bundle: Path, defect_bundle: Path) -> None:
    for bundle, outputs in (
        (seg_bundle, {"labels": ("int32", [None, 32, 48])}),
        (logits_bundle, {"labels": ("uint8", [None, 32, 48])}),
        (defect_bundle, {"decision": ("float32", [None, 1]), "seg": ("float32", [None, 1, 16, 8])}),
    ):
        manifest = read(bundle)
        inputs, found = manifest.served()
        assert {name: (each.dtype, each.shape) for name, each in found.items()} == outputs
        assert (inputs["image"].dtype, inputs["image"].shape) == ("uint8", [None, *manifest.image.size, 3])


def test_a_gate_that_judges_nothing_is_said_and_no_failure() -> None:
    """`gate.max_drop_from_baseline: null` gives such a verdict."""
    assert GateCheck(passed=None, sentence="not judged.").passed is None
    with pytest.raises(ValueError, match="passed"):
        GateCheck(passed="yes", sentence="")
