"""`vss build`: the artefact that a runtime loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vss.console import Save, out
from vss.errors import VssError

build_app = typer.Typer()


@build_app.command()
def build(
    onnx: Annotated[Path, typer.Option(help="an exported file")],
    save: Save = Path("model.engine"),
    backend: Annotated[str, typer.Option(help="onnxruntime or tensorrt")] = "onnxruntime",
    optimise: Annotated[str | None, typer.Option(help="onnxruntime: basic or extended, once at build time")] = None,
    batch: Annotated[str, typer.Option(help="tensorrt: smallest, usual and largest batch")] = "1,1,8",
    sizes: Annotated[str | None, typer.Option(help="tensorrt: smallest, usual and largest HxW of a free size")] = None,
    workspace_mib: Annotated[int | None, typer.Option(help="tensorrt: scratch memory of a layer")] = None,
    level: Annotated[int | None, typer.Option(help="tensorrt: optimisation level, 0 to 5")] = None,
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
    from vss.deploy.trt import declared, dry_commands
    from vss.deploy.trt_plan import spans

    if BACKENDS.canonical(backend) != "tensorrt":
        out.print(f"wrote {available(backend).build(onnx, save, BuildSpec(optimise))}")
        return
    if optimise is not None:
        raise VssError("--optimise is for backend onnxruntime; tensorrt takes --level.")
    plan = BuildPlan(
        profiles=(spans(declared(onnx_file.load(onnx)), three(batch, "--batch"), _sizes(sizes)),),
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
        for line in dry_commands(plan, onnx, save).values():
            out.print(line, highlight=False, soft_wrap=True)
        return
    runtime = available(backend)
    path = runtime.build(onnx, runtime.named(save), BuildSpec(plan=plan))
    out.print(f"wrote {path} and, beside it, .json, .layers.json and .sh")


def three(text: str, flag: str) -> list[int]:
    """Three numbers with commas between; one stands for all three."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise VssError(f"{flag} takes smallest,usual,largest and got {text!r}.") from error
    if len(numbers) not in (1, 3):
        raise VssError(f"{flag} takes one number or three, smallest,usual,largest, and got {text!r}.")
    return numbers * (3 // len(numbers))


def _sizes(text: str | None) -> list[tuple[int, int]] | None:
    if text is None:
        return None
    parts: list[Any] = [part.lower().split("x") for part in text.split(",")]
    if len(parts) not in (1, 3) or any(len(part) != 2 or not all(side.isdigit() for side in part) for part in parts):
        raise VssError(f"--sizes takes HxW, or three of them with commas between, and got {text!r}.")
    return [(int(height), int(width)) for height, width in parts] * (3 // len(parts))
