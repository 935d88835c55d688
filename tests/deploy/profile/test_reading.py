"""Readings of real runtimes: units add up, layers have their names, torch and onnxruntime agree on them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vss.core.errors import VssError
from vss.deploy.profile.setting import Setting, SlicedVariants, table_key
from vss.deploy.profile.subject import channels, open_subject
from vss.deploy.profile.units import Graph, pinned, read_onnxruntime, usable_threads


def test_a_profile_names_every_layer_and_adds_up(variants: SlicedVariants, net: Any, tmp_path: Path) -> None:
    widths = [group.channels for group in variants.groups]
    path = variants.write(widths, tmp_path / "v.onnx")
    feed = {"image": np.zeros((1, 48, 64, 3), np.uint8)}
    reading = read_onnxruntime(path, feed, threads=1, graph=Graph.of(variants.model), seconds=0.2)
    layers = {name.removesuffix(".weight") for name, p in net.named_parameters() if p.ndim == 4}
    assert layers <= set(reading.units)
    assert all(ms > 0 for ms in reading.units.values())
    assert 0.5 * reading.total < sum(reading.units.values()) < 1.1 * reading.total


def test_narrow_is_faster_and_channels_follow_widths(net: Any, preprocess: Any, tmp_path: Path) -> None:
    subject = open_subject(net, tmp_path, preprocess, Setting(threads=1), seconds=0.2)
    full = [group.channels for group in subject.groups]
    half = [max(16, count // 2) for count in full]
    whole = subject.read(full)
    fastest = [float("inf"), float("inf")]
    for _ in range(20):  # noise only adds, so the minimum over passes in turn ends where a quiet machine is
        for at, widths in enumerate((half, full)):
            fastest[at] = min(fastest[at], sum(subject.read(widths).units.values()))
        if fastest[0] < 0.8 * fastest[1] < float("inf"):
            break
    assert fastest[0] < 0.8 * fastest[1]
    units = sorted(whole.units)
    cin, cout = channels(subject, units)
    shapes = subject.shapes(half)
    for row, unit in enumerate(units):
        if unit in shapes:
            got = cin(np.array([half], float))[0, row], cout(np.array([half], float))[0, row]
            assert got == (max(1, shapes[unit].cin), max(1, shapes[unit].cout)), unit


def test_torch_modules_are_timed_by_hooks(net: Any, preprocess: Any, tmp_path: Path) -> None:
    subject = open_subject(net, tmp_path, preprocess, Setting("torch", threads=1), seconds=0.1)
    full = [group.channels for group in subject.groups]
    reading, shapes = subject.read(full), subject.shapes(full)
    assert {name for name, module in net.named_modules() if name and not list(module.children())} <= set(reading.units)
    assert sum(reading.units.values()) == pytest.approx(reading.total, rel=0.5)
    convs = {name: module for name, module in net.named_modules() if hasattr(module, "out_channels")}
    assert {n: (shapes[n].cin, shapes[n].cout) for n in convs} == {
        n: (m.in_channels, m.out_channels) for n, m in convs.items()
    }
    cin, cout = channels(subject, sorted(reading.units))
    assert cin.slope.any() and cout.slope.any()


def test_cores_are_pinned_and_given_back() -> None:
    before = os.sched_getaffinity(0)
    with pinned(1) as cores:
        assert os.sched_getaffinity(0) == set(cores or []) == {min(before)}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(VssError, match=r"threads is 9999; this process may use 1 to \d+ cores"):
        usable_threads(9999)


def test_what_a_table_holds_for_is_told_apart(net: Any, variants: SlicedVariants) -> None:
    base = table_key(net, variants.groups, (48, 64), Setting(threads=1))
    assert base == table_key(net, variants.groups, (48, 64), Setting(threads=1))
    others = [
        table_key(net, variants.groups, (48, 80), Setting(threads=1)),
        table_key(net, variants.groups[1:], (48, 64), Setting(threads=1)),
        table_key(net, variants.groups, (48, 64), Setting(threads=1, batch=2)),
        table_key(net, variants.groups, (48, 64), Setting(threads=1, options={})),
        table_key(net, variants.groups, (48, 64), Setting("torch", threads=1)),
    ]
    assert all(other != base for other in others)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"backend": "tenzorrt"}, "unknown backend 'tenzorrt'. Did you mean 'tensorrt'"),
        ({"device": "cuda"}, "onnxruntime is timed in fp32 or int8 on cpu; got fp32 on cuda"),
        ({"precision": "fp16"}, "onnxruntime is timed in fp32 or int8 on cpu; got fp16 on cpu"),
        ({"backend": "ov", "precision": "fp16"}, "openvino is timed in fp32 or int8 on cpu; got fp16 on cpu"),
        ({"backend": "openvino", "device": "cuda"}, "openvino is timed in fp32 or int8 on cpu; got fp32 on cuda"),
        ({"backend": "torch", "precision": "int8"}, "torch is timed in fp32 or fp16 on cpu or cuda; got int8 on cpu"),
        ({"backend": "tensorrt", "device": "cpu"}, "tensorrt is timed in fp32 or fp16 or int8 on cuda; got fp32"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(given: dict[str, str], sentence: str) -> None:
    with pytest.raises(VssError, match=sentence):
        Setting(**given)  # type: ignore[arg-type]
