"""`vss build`: the artefact that a runtime loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vss.cli.console import Level, Save, Workspace, out, refuse_given
from vss.core.errors import VssError, shown, unknown
from vss.core.files import require_file, target_of

build_app = typer.Typer()
OF_TENSORRT = (
    "batch", "sizes", "workspace_mib", "level", "tf32", "hardware", "version_compatible", "flag", "timing_cache",
    "plugin", "aot", "dry_run",
)  # fmt: skip
MAX_BATCH = 65536


@build_app.command()
def build(
    ctx: typer.Context,
    onnx: Annotated[Path, typer.Option(help="an exported file")],
    save: Save = Path("model.engine"),
    backend: Annotated[str, typer.Option(help="onnxruntime or tensorrt")] = "onnxruntime",
    optimise: Annotated[str | None, typer.Option(help="onnxruntime: basic or extended, once at build time")] = None,
    batch: Annotated[str, typer.Option(help="tensorrt: smallest, usual and largest batch")] = "1,1,8",
    sizes: Annotated[str | None, typer.Option(help="tensorrt: smallest, usual and largest HxW of a free size")] = None,
    workspace_mib: Workspace = None,
    level: Level = None,
    tf32: Annotated[bool, typer.Option(help="tensorrt: float32 layers may use TF32")] = True,
    hardware: Annotated[str, typer.Option(help="tensorrt: none, same_compute_capability or ampere_plus")] = "none",
    version_compatible: Annotated[bool, typer.Option(help="tensorrt: load in newer releases too")] = False,
    flag: Annotated[list[str] | None, typer.Option(help="tensorrt: a further BuilderFlag by name")] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="tensorrt: file of measured layer times")] = None,
    plugin: Annotated[list[Path] | None, typer.Option("--plugin-library", help="tensorrt: a library")] = None,
    aot: Annotated[Path | None, typer.Option("--aot-ptx", help="tensorrt, experimental: PTX of VssSegArgmax")] = None,
    dry_run: Annotated[bool, typer.Option(help="tensorrt: print the plan as shell commands, build nothing")] = False,
) -> None:
    """Make the artefact that a runtime loads. A TensorRT engine is named after GPU and version, its facts beside it."""
    from vss.deploy import BACKENDS, BuildPlan, BuildSpec, onnx_file
    from vss.deploy.backends import available
    from vss.deploy.backends.trt import declared, dry_commands
    from vss.deploy.backends.trt_plan import TRTEXEC_FLAGS, spans

    target_of(save)
    if BACKENDS.canonical(backend) != "tensorrt":
        refuse_given(ctx, OF_TENSORRT, f"is for backend tensorrt, and the backend is {backend}")
        out.print(f"wrote {available(backend).build(onnx, save, BuildSpec(optimise))}")
        return
    if optimise is not None:
        raise VssError("--optimise is for backend onnxruntime; tensorrt takes --level.")
    inputs = declared(onnx_file.load(onnx))
    _check_given(ctx, inputs, timing_cache, plugin or [], aot)
    plan = BuildPlan(
        profiles=(spans(inputs, three(batch, "--batch"), _sizes(sizes)),),
        workspace_mib=workspace_mib,
        optimisation_level=level,
        tf32=tf32,
        hardware=hardware.upper(),
        version_compatible=version_compatible,
        timing_cache=timing_cache,
        flags=tuple(name.upper() for name in flag or []),
        plugins=tuple(plugin or []),
        aot=aot,
    )
    if dry_run:
        for name in set(plan.flags) - TRTEXEC_FLAGS.keys():
            raise unknown("--flag of trtexec and polygraphy", name, TRTEXEC_FLAGS)
        for line in dry_commands(plan, onnx, save).values():
            out.print(line, highlight=False, soft_wrap=True)
        return
    runtime = available(backend)
    path = runtime.build(onnx, runtime.named(save), BuildSpec(plan=plan))
    out.print(f"wrote {path} and, beside it, .json, .layers.json and .sh")


def _check_given(
    ctx: typer.Context, inputs: dict[str, list[int | str]], cache: Path | None, plugins: list[Path], aot: Path | None
) -> None:
    """Refuse flags that the file's inputs have no use for, and files that are none."""
    if not any(isinstance(side, str) for dims in inputs.values() for side in dims[:1]):
        refuse_given(ctx, ["batch"], "is for a free batch, and the file's is fixed")
    if not any(isinstance(side, str) for dims in inputs.values() for side in dims[1:]):
        refuse_given(ctx, ["sizes"], "is for a free size, and the file's is fixed")
    for path in plugins:
        require_file(path, kind="plugin library")
    if aot:
        require_file(aot, kind="PTX")
    if cache:
        target_of(cache)


def three(text: str, flag: str) -> list[int]:
    """Three numbers with commas between, which do not fall; one stands for all three."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise VssError(f"{flag} takes smallest,usual,largest and got {shown(text)}.")
    numbers = [int(part) for part in parts]
    if len(numbers) not in (1, 3):
        raise VssError(f"{flag} takes one number or three, smallest,usual,largest, and got {shown(text)}.")
    if numbers != sorted(numbers) or not 1 <= numbers[0] <= numbers[-1] <= MAX_BATCH:
        raise VssError(f"{flag} is {shown(text)}; expected numbers from 1 to {MAX_BATCH} that do not fall.")
    return numbers * (3 // len(numbers))


def _sizes(text: str | None) -> list[tuple[int, int]] | None:
    if text is None:
        return None
    parts = [part.split("x") for part in text.lower().split(",")]
    if any(len(part) != 2 for part in parts):
        raise VssError(f"--sizes takes HxW, or three of them with commas between, and got {shown(text)}.")
    sides = (three(",".join(each), "--sizes") for each in zip(*parts, strict=True))
    return list(zip(*sides, strict=True))
