"""vss.deploy.backends.trt_plan without TensorRT: what a plan refuses, profiles, shell commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from vss.core.config import parse
from vss.core.errors import VssError
from vss.deploy import BuildPlan, BuildSpec, Span, spans
from vss.deploy.backends import BACKENDS
from vss.deploy.backends.trt_flavour import TENSORRT
from vss.deploy.backends.trt_plan import OPTIONS, commands


@pytest.mark.parametrize(
    ("dims", "sizes", "expected"),
    [
        (["batch", 3, 64, 96], None, Span((1, 3, 64, 96), (2, 3, 64, 96), (4, 3, 64, 96))),
        (
            ["batch", 3, "height", "width"],
            [(32, 32), (64, 96), (128, 256)],
            Span((1, 3, 32, 32), (2, 3, 64, 96), (4, 3, 128, 256)),
        ),
        (
            ["batch", "8*height", "8*width", 3],
            [(32, 32), (64, 96), (128, 256)],
            Span((1, 32, 32, 3), (2, 64, 96, 3), (4, 128, 256, 3)),
        ),
    ],
)
def test_a_profile_from_declared_dims(dims: list, sizes: Any, expected: Span) -> None:
    assert spans({"image": dims, "fixed": [1, 2]}, (1, 2, 4), sizes) == {"image": expected}


def test_free_sides_need_sizes() -> None:
    with pytest.raises(VssError, match=r"input 'image' is \(batch, 3, height, 64\): give smallest, usual and largest"):
        spans({"image": ["batch", 3, "height", 64]})


@pytest.mark.parametrize("shapes", [((2, 3), (1, 3), (4, 3)), ((1, 3), (2, 3), (4,)), ((0, 3), (1, 3), (1, 3))])
def test_a_span_that_is_none(shapes: tuple) -> None:
    with pytest.raises(VssError, match="are no smallest, usual and largest of one input"):
        Span(*shapes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hardware": "AMPERE"}, r"--hardware is 'AMPERE'; Input should be 'NONE', 'SAME_COMPUTE_CAPABILITY' or 'AMPE"),
        ({"workspace_mib": 0}, "--workspace-mib is 0; Input should be greater than or equal to 1"),
        ({"optimisation_level": 6}, "--level is 6; Input should be less than or equal to 5"),
        ({"flags": ("INT8",)}, "INT8 is no build option here: the precision is that of the ONNX file"),
    ],
)
def test_plans_that_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(VssError, match=words):
        parse(BuildPlan, arguments, source="the build plan", flags=OPTIONS)


def options(line: str) -> dict[str, list[str]]:
    """Option -> its values, of --a=b and of --a b c."""
    found: dict[str, list[str]] = {}
    last = ""
    for word in shlex.split(line):
        if word.startswith("-"):
            last, _, value = word.partition("=")
            found.setdefault(last, []).extend([value] if value else [])
        elif last:
            found[last].append(word)
    return found


def test_both_commands_say_the_same() -> None:
    profiles = (
        {"a": Span((1, 3), (2, 3), (4, 3)), "b": Span((1,), (1,), (2,))},
        {"a": Span((8, 3), (8, 3), (8, 3)), "b": Span((8,), (8,), (8,))},
    )
    plan = BuildPlan(
        profiles=profiles,
        workspace_mib=256,
        optimisation_level=5,
        tf32=False,
        hardware="SAME_COMPUTE_CAPABILITY",
        version_compatible=True,
        flags=("REFIT",),
        auxiliary_streams=1,
        plugins=(Path("libp.so"),),
    )
    made = commands(plan, Path("m.onnx"), Path("out/m.engine"), Path("t.cache"), TENSORRT)
    trtexec, polygraphy = options(made["trtexec"]), options(made["polygraphy"])
    assert trtexec["--onnx"] == ["m.onnx"] and trtexec["--saveEngine"] == ["m.engine"]
    assert trtexec["--minShapes"] == ["a:1x3,b:1", "a:8x3,b:8"] and trtexec["--profile"] == ["0", "1"]
    assert polygraphy["--trt-min-shapes"] == ["a:[1,3]", "b:[1]", "a:[8,3]", "b:[8]"]
    words = made["polygraphy"].split()
    order = [word for word in words if word.startswith("--trt-")]
    assert order == ["--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes"] * 2
    for mine, theirs, value in [
        ("--memPoolSize", "--pool-limit", "workspace:256M"),
        ("--builderOptimizationLevel", "--builder-optimization-level", "5"),
        ("--maxAuxStreams", "--max-aux-streams", "1"),
        ("--timingCacheFile", "--load-timing-cache", "t.cache"),
        ("--staticPlugins", "--plugins", "libp.so"),
        ("--profilingVerbosity", "--profiling-verbosity", "detailed"),
    ]:
        assert trtexec[mine] == polygraphy[theirs] == [value]
    assert trtexec["--hardwareCompatibilityLevel"] == ["sameComputeCapability"]
    assert polygraphy["--hardware-compatibility-level"] == ["same_compute_capability"]
    assert {"--noTF32", "--versionCompatible", "--refit", "--stronglyTyped", "--skipInference"} <= set(trtexec)
    assert {"--version-compatible", "--refittable", "--strongly-typed"} <= set(
        polygraphy
    ) and "--tf32" not in polygraphy


def test_a_plan_as_json_names_files_and_no_folders() -> None:
    plan = BuildPlan(
        profiles=({"x": Span((1,), (2,), (3,))},),
        timing_cache=Path("/somewhere/t.cache"),
        plugins=(Path("/there/p.so"),),
    )
    data = plan.to_json()
    assert data["profiles"] == [{"x": {"low": [1], "best": [2], "high": [3]}}]
    assert (data["timing_cache"], data["plugins"]) == ("t.cache", ["p.so"])


def test_specs_of_the_wrong_runtime(tmp_path: Path) -> None:
    with pytest.raises(VssError, match="a build plan is for tensorrt"):
        BACKENDS["onnxruntime"].build(tmp_path / "m.onnx", tmp_path / "m", BuildSpec(plan=BuildPlan()))
    with pytest.raises(VssError, match="optimise is for backend onnxruntime"):
        BACKENDS["tensorrt"].build(tmp_path / "m.onnx", tmp_path / "m", BuildSpec(optimise="basic"))
