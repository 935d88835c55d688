"""The texts of a bundle: README (how to run it), model card (what it is and is not), requirements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vss.core.environment import package_version
from vss.core.files import read_array
from vss.ship.manifest import Manifest
from vss.ship.source import Source
from vss.train.metrics import miou_pct


def requirements(manifest: Manifest) -> str:
    """Pinned to what the bundle was made and checked with."""
    names = {"numpy": "numpy", "pillow": "pillow"} | {name: name for name in manifest.engine.versions}
    found = {name: manifest.engine.versions.get(name) or package_version(name) for name in names}
    return "".join(f"{name}=={version}\n" for name, version in found.items())


def readme(manifest: Manifest, plugins: Sequence[str] = ()) -> str:
    """How to run and serve the bundle, from its own files; `plugins` are the libraries among them."""
    image = manifest.image.size
    gives = "a label map and an overlay" if manifest.task == "segmentation" else "a defect score, a map and an overlay"
    sample = "samples/images" if manifest.samples.images else "IMAGE_OR_FOLDER"
    return f"""# {manifest.name}

An inference bundle: {manifest.engine.backend} engine, images of {image[0]} x {image[1]} (height x width), {gives} out.
What it is, how good it is and where it should not be used is in [MODEL_CARD.md](MODEL_CARD.md).

## Check

```sh
sha256sum --quiet -c SHA256SUMS
```

`vss verify .` also checks the chain of hashes, runs the engine and scores the samples.

## Run

```sh
python3 -m venv ../env
../env/bin/pip install -q -r requirements.txt
../env/bin/python run.py {sample} --out ../out
```

There is {gives} per image then, and one line of JSON on standard output. `--batch 8` takes several images at a time,
`camera:/dev/video0` a camera, `-` raw frames from standard input. An image that cannot be read is named, the rest goes
on, and the exit code is 1. Nothing in this bundle runs by itself: `run.py` when it is started, and `model.py` of the
python variant when a Triton server loads it. Keep other files out of the bundle, or the check says so.

""" + _serving(manifest, plugins)


def _serving(manifest: Manifest, plugins: Sequence[str]) -> str:
    variants = "\n".join(f"| `{place}` | {SERVERS[variant]} |" for variant, place in manifest.triton.items())
    wants, gets = (
        "; ".join(
            f"`{name}` {value.dtype} ({', '.join(map(str, ['N', *value.shape[1:]]))})" for name, value in side.items()
        )
        for side in manifest.served()
    )
    names = ";".join(f"$PWD/{name}" for name in plugins)
    option = f' "--backend-config=tensorrt,plugins={names}"' if plugins else ""
    return f"""## Serve

| Repository | For |
|---|---|
{variants}

```
cp -r triton/{next(iter(manifest.triton))} ../models && tritonserver --model-repository=$PWD/../models{option}
```

or `vss serve .`, which finds a server, checks an answer and says when it is ready; `vss load .` measures it.

- Model: `{manifest.name}`
- Takes: {wants}
- Gives: {gets}
- N: 1 to {manifest.serving["max_batch"]}

The python variant needs numpy and onnxruntime in the Python of the server; where they live elsewhere, set
VSS_SITE_PACKAGES to that folder. Serve a copy of it: Python writes a cache beside model.py, and this bundle stays as
it was shipped.

## Another GPU

`vss rebuild .` builds the engine on this machine from `{manifest.onnx}`, compares its answers with the shipped ones and
writes it in. An engine for another GPU or another TensorRT version is refused. `cpp/` holds the least C++ that runs it.
"""


SERVERS = {
    "onnxruntime": "Triton with the onnxruntime backend",
    "python": "Triton with the python backend alone",
    "tensorrt": "Triton with the tensorrt backend, on the GPU that the engine was built on",
}


def model_card(manifest: Manifest, source: Source) -> str:
    """What it is, data, metrics with intervals, limits, licences, provenance."""
    report = source.report
    plan, recipe = report.get("plan", {}), report["recipe"]
    model = f"{recipe['model']['name']} ({pairs(recipe['model']['options'])})"
    pruned = f"pruned by {plan['criterion']} ({pairs(plan['budget'])})" if manifest.link("plan") else "not pruned"
    figures = "\n".join(f"| {key} | {show(value)} |" for key, value in sorted(manifest.metrics.items()))
    classes = ", ".join(manifest.classes) or "none"
    chain = "\n".join(f"| {link.what} | `{link.sha256}` | {link.file or '-'} |" for link in manifest.chain)
    forced = f"\n**{manifest.forced}.**\n" if manifest.forced else ""
    licences = "\n".join(f"| {what} | {text} |" for what, text in manifest.licences.items())
    return f"""# Model card: {manifest.name}
{forced}
## What

- Network: {model}, {pruned}
- Task: {manifest.task}
- Engine: {manifest.engine.backend}; row "{manifest.row}" of the run "{report["name"]}"
- Classes, in label order: {classes}

## Data

{report.get("protocol") or "The run states no protocol."}
Samples in this bundle: {manifest.samples.source or "none"}.

## Figures

| Figure | Value |
|---|---|
{figures}
{interval(source)}
Measured on: {report.get("environment", {}).get("machine", "an unnamed machine")}.

## Gates

{gates(source)}

## Limits

- It was trained and scored on the data above alone; other cameras, places, light and materials are unknown to it.
- Images become {manifest.image.size[0]} x {manifest.image.size[1]} by bilinear resampling; finer things are lost.
- The figures are of one training run and one seed ({recipe["seed"]}) unless the protocol says otherwise.
- Labels and scores are no calibrated probabilities.

## Licences

| What | Licence |
|---|---|
{licences}

## Where it comes from

| Link | SHA-256 | File |
|---|---|---|
{chain}

Made with vss {manifest.vss} on {manifest.created}.
"""


def pairs(mapping: dict[str, Any]) -> str:
    """`key value` with commas between."""
    return ", ".join(f"{key} {value}" for key, value in mapping.items())


def show(value: Any) -> str:
    """Numbers with four digits, the rest as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def interval(source: Source) -> str:
    """The 95 % bootstrap interval of mIoU, where the run kept figures by image."""
    images = read_array(source.files["scores"]) if "scores" in source.files else np.empty(0)
    if images.ndim != 3:
        return ""
    low, high = miou_interval(images)
    return f"\nmIoU, 95 % bootstrap interval over {len(images)} images: {low:.2f} to {high:.2f} %.\n"


def gates(source: Source) -> str:
    """What was compared with what, both figures, the loss with its interval, the limit and the verdict."""
    if not source.gate:
        return "No gate judged this engine."
    lines = [
        "| Gate | Figure | Before | This engine | Loss in points (95 % interval) | May lose | Verdict |",
        "|" + "---|" * 7,
    ]
    words = {True: "passed", False: "FAILED", None: "not judged"}
    for check in source.gate:
        span = " ({:.2f} to {:.2f})".format(*check["drop_interval"]) if "drop_interval" in check else ""
        loss = f"{check['drop']:.2f}{span}"
        limit = "none" if check["max_drop"] is None else f"{check['max_drop']:g}"
        figures = [check["metric"], f"{check['baseline']:.2f}", f"{check['candidate']:.2f}", loss, limit]
        lines.append(f"| {' | '.join([check.get('what', 'gate'), *figures, words[check['passed']]])} |")
    told = [check["sentence"] for check in source.gate if "all_classes" in check]
    return "\n".join([*lines, *([""] if told else []), *told])


def miou_interval(confusion: np.ndarray, *, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """confusion: (n, K, K) counts per image. Percentile bootstrap over images (Efron 1979), in percent."""
    count = len(confusion)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples)
    flat = confusion.reshape(count, -1).astype(np.float64)
    drawn = torch.from_numpy((weights @ flat).reshape(samples, *confusion.shape[1:]))
    low, high = np.nanpercentile(miou_pct(drawn).numpy(), [2.5, 97.5])
    return float(low), float(high)
