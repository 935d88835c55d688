"""Where a bundle comes from: a finished run, what of its records may leave the house, and the texts made of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from vss.core.environment import package_version
from vss.core.errors import VssError, unknown
from vss.core.files import read_array, sha256_file, write_json, write_text
from vss.core.report import read_report
from vss.data.preprocess import Preprocess
from vss.deploy.backends import AUTO
from vss.deploy.backends.trt_flavour import FLAVOURS, gpus
from vss.deploy.backends.trt_runner import read_about
from vss.deploy.onnx_file import metadata, stated
from vss.deploy.quantize.ranges import Ranges
from vss.prune import Plan
from vss.ship.manifest import Elsewhere, Manifest, Tensor
from vss.ship.triton import VARIANTS, runtime_of
from vss.train.gate import miou_interval
from vss.train.tasks.base import EQUAL

ELSEWHERE = "requirements-elsewhere.txt"
HOME_GROUND = {"home", "root", "Users", "mnt", "media", "srv", "data", "tmp", "var", "opt", "scratch", "workspace"}
COMMANDS = ("command", "commands")


def public(record: Mapping[str, object], *folders: Path) -> dict[str, Any]:
    """A record without its command lines, whose texts name files by their last part alone.

    Args:
        record: a report with its recipe, or another tree of JSON values.
        folders: that must not be named; the home and the working folder are among them anyway.
    """
    recipe = record.get("recipe", {})
    known = {text for text in _texts(recipe) if text.startswith(("/", "~", ".")) and "/" in text}
    known |= {str(Path(text).expanduser().resolve()) for text in known}
    known |= {str(place.resolve()) for place in (*folders, Path.home(), Path.cwd()) if len(place.resolve().parts) > 1}
    grounds = HOME_GROUND | {place.name for place in Path("/").iterdir() if place.is_dir()}
    first = "|".join(map(re.escape, sorted(grounds)))
    literal = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    # a node of a network may be called "/down/conv", so a path begins with a folder that there is
    rest = r"""(?:/[^\s/'",;()<>]+)*/?"""
    pattern = re.compile(rf"(?<![\w./~-])(?:{literal}|/(?:{first})(?![\w.-]){rest}|~{rest}(?<=[^~])|[A-Z]:\\\S+)")

    def clean(text: str) -> str:
        return pattern.sub(lambda found: _name(found[0]), text)

    kept = {key: value for key, value in record.items() if key not in COMMANDS}
    cleaned: dict[str, object] = _mapped({**kept, **({"recipe": _mapped(recipe, _name)} if recipe else {})}, clean)
    return cleaned


def _name(text: str) -> str:
    """The last part of a path, of either kind; other text as it is."""
    if "/" in text or text.startswith("~"):
        return PurePosixPath(text).name
    return PureWindowsPath(text).name if "\\" in text else text


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _mapped(value: object, change: Callable[[str], str]) -> Any:
    """The tree with every text changed, keys too."""
    if isinstance(value, Mapping):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def copy_about(engine: Path, to: Path) -> None:
    """What stands beside an engine, where anything does, without the commands that built it."""
    about = read_about(engine)
    if about is not None:
        write_json(beside(to), public(about))


def beside(engine: Path) -> Path:
    """Where TensorRT's backend says of an engine what it is."""
    return engine.with_name(engine.name + ".json")


# Where a bundle comes from: the folder of a finished `vss run`, read from its report and checked against it.


DEFAULT_ROW = "engine pruned"


@dataclass(frozen=True)
class Source:
    """One engine of a run.

    Attributes:
        run: folder of the run.
        row: the row of the report that is shipped.
        report: the checked report, as it may leave the house (see `vss.ship.source`).
        recipe: as the run had it.
        backend: name of the runtime.
        spec: `BuildSpec` as a dictionary.
        files: role -> existing file: "onnx", "engine", "scores", and where there are any "plugins".
        gate: the verdicts on this engine; empty when nothing judged it.
        preprocess: the run's preprocessing.
        built: engines for GPUs elsewhere that the run has built of the same network in the same precision.
    """

    run: Path
    row: str
    report: dict[str, Any]
    recipe: dict[str, object]
    backend: str
    spec: dict[str, Any]
    files: dict[str, Path]
    gate: list[dict[str, Any]]
    preprocess: Preprocess
    built: tuple[Path, ...] = ()

    @property
    def pruned(self) -> bool:
        """Whether the engine is of the pruned network, in whatever precision."""
        return self.row.startswith(DEFAULT_ROW)

    @property
    def metrics(self) -> dict[str, Any]:
        rows = [row for row in self.report["rows"] if row["name"] == self.row]
        return {key: value for key, value in rows[0].items() if key != "name"} if rows else {}


def open_run(run: Path, row: str | None = None) -> Source:
    """Read the report of a run and check the files it names.

    Raises:
        VssError: no finished report, no such engine, or files that changed since the report was written.
    """
    own = read_report(run / "report.json")
    report = public(own, run)
    if report["status"] != "ok":
        raise VssError(f"the run in {run} did not finish; run it again to its end, then ship it.")
    artefacts = report.get("artefacts", {})
    if not artefacts:
        raise VssError(f"{run}/report.json names no engines; run the recipe again (finished steps are kept).")
    row = row or _kept(report)
    if row not in artefacts:
        raise unknown("engine of this run", row, artefacts)
    built = artefacts[row]
    files = {role: run / name for role, name in built["files"].items()}
    for role, path in files.items():
        if not path.is_file():
            raise VssError(f"{path} ({role} of {row!r}) does not exist; run the recipe again to make it.")
        if sha256_file(path) != built["sha256"].get(role):
            raise VssError(f"{path} is not the file that the report was made with; run the recipe again.")
    return Source(
        run,
        row,
        report,
        own["recipe"],
        built["backend"],
        built["spec"],
        files,
        _gates(report, row),
        _preprocess(run, report, files["onnx"]),
        tuple(_built(run, row, report)),
    )


def _kept(report: dict[str, Any]) -> str:
    """The pruned engine of the recipe's runtime, and that which was chosen where the recipe left the runtime open."""
    recipe, choices = report.get("recipe", {}), report.get("precision", {}).get(DEFAULT_ROW, {})
    kept = choices.get("choice", {}).get("chosen", "fp32")
    left_open = recipe.get("build", {}).get("backend") == AUTO
    return f"{DEFAULT_ROW} {kept}" if left_open and kept != "fp32" else DEFAULT_ROW


def _built(run: Path, row: str, report: dict[str, Any]) -> Iterator[Path]:
    """Of the same row: "engine pruned" in float32, "engine pruned int8" in INT8; what was not built is left out."""
    for each in report.get("built", []):
        name = each["name"] if each["precision"] == "fp32" else f"{each['name']} {each['precision']}"
        if name != row or not each["passed"]:
            continue
        path = run / each["file"]
        if not path.is_file() or sha256_file(path) != each["sha256"]:
            raise VssError(f"{path} is not the engine that the report was made with; run the recipe again.")
        yield path


def copy_engines(folder: Path, source: Source) -> list[Elsewhere]:
    """Copy the engines that the run has built beside the shipped one, with their plugins, into `engine/`.

    One in INT8 may be of an ONNX file of its own: what its runtime does not run in INT8 is in floating point there.
    """
    found = []
    for path in source.built:
        about = about_of(path)
        onnx, own = "engine/model.onnx", path.with_name(about["onnx"])
        if not own.is_file() or sha256_file(own) != about["onnx_sha256"]:
            raise VssError(f"{path} was built of another file than {own.name}; run the recipe again.")
        if sha256_file(own) != sha256_file(source.files["onnx"]):
            onnx = f"engine/model.{about['flavour']}.onnx"
            shutil.copyfile(own, folder / onnx)
        for name in about["plan"]["plugins"]:
            if not path.with_name(name).is_file():
                raise VssError(
                    f"{path} needs the plugins in {name}, which the run does not hold; run the recipe again."
                )
            shutil.copyfile(path.with_name(name), folder / "engine" / name)
        found.append(put_engine(path, folder, about, onnx))
    return found


def about_of(engine: Path) -> dict[str, Any]:
    about = read_about(engine)
    if about is None or not about.get("onnx_sha256"):
        raise VssError(f"{engine} has no {engine.name}.json that says what it is; build it with vss.")
    return about


def put_engine(engine: Path, folder: Path, about: dict[str, Any], onnx: str) -> Elsewhere:
    """Copy an engine under the name of what it is for."""
    flavour, version = FLAVOURS[about["flavour"]], about["tensorrt"]
    where = re.sub(r"\W+", "-", gpus(about["targets"]))
    target = f"engine/{where}-{flavour.tag}{version}{engine.suffix}"
    shutil.copyfile(engine, folder / target)
    copy_about(engine, folder / target)
    return Elsewhere(backend=flavour.name, version=version, file=target, onnx=onnx, targets=about["targets"])


def hash_of(what: str, path: Path) -> str:
    """The hash by which a link of the chain names its file; see `vss.ship.manifest.Link`."""
    if what == "plan":
        return Plan.load(path).sha256()
    return Ranges.load(path).sha256() if what == "calibration" else sha256_file(path)


def _gates(report: dict[str, Any], row: str) -> list[dict[str, object]]:
    """The verdicts on one engine: the run's own are on its pruned float32 engine, other precisions have theirs."""
    for title, net in report.get("precision", {}).items():
        for kind, facts in net.items():
            if row == f"{title} {kind}" and "gate" in facts:
                verdict = facts["gate"]
                equal = {"what": f"{kind} {EQUAL}", **verdict.get("equal", verdict)}
                return [equal, *verdict.get("ship", [])]
    return list(report.get("gate", {}).get("checks", [])) if row == DEFAULT_ROW else []


def _preprocess(run: Path, report: dict[str, Any], onnx: Path) -> Preprocess:
    """What the file states; one from before files did so was made with the defaults, which the report's hash proves."""
    said = stated(metadata(onnx)) or {"size": report["recipe"]["data"]["size"]}
    made = Preprocess(**said)
    if made.sha256 != report["inputs"].get("preprocess"):
        raise VssError(
            f"{run}/report.json was made with another preprocessing than this version of vss has; run again."
        )
    return made


# The texts of a bundle: README (how to run it), model card (what it is and is not), requirements.


def requirements(manifest: Manifest) -> str:
    """Pinned to what the bundle was made and checked with."""
    names = ("numpy", "pillow", *manifest.engine.versions)
    found = {name: manifest.engine.versions.get(name) or package_version(name) for name in names}
    return "".join(f"{name}=={version}\n" for name, version in found.items())


def elsewhere_requirements(engines: Sequence[Elsewhere]) -> str:
    """What runs them on a GPU; device memory comes from pycuda as well."""
    packages = {FLAVOURS[each.backend].packages[0]: each.version for each in engines}
    return "".join(["numpy\npillow\ncuda-python\n", *(f"{name}=={version}\n" for name, version in packages.items())])


def write_runner(folder: Path, manifest: Manifest) -> None:
    """run.py, and what its engines need beside it."""
    shutil.copyfile(Path(__file__).with_name("standalone.py"), folder / "run.py")
    for backend in (manifest.engine.backend, *(each.backend for each in manifest.elsewhere)):
        for path in runtime_of(backend).runner:
            shutil.copyfile(path, folder / path.name)
    if manifest.elsewhere:
        write_text(folder / ELSEWHERE, elsewhere_requirements(manifest.elsewhere))


def readme(manifest: Manifest, plugins: Sequence[str] = ()) -> str:
    """How to run and serve the bundle, from its own files; `plugins` are the libraries among them."""
    gives = "a label map and an overlay" if manifest.task == "segmentation" else "a defect score, a map and an overlay"
    runtime, servers = runtime_of(manifest.engine.backend), {name: each.server for name, each in VARIANTS.items()}
    return _text(
        "README.md", manifest, gives=gives, plugins=plugins, servers=servers, served=manifest.served(), runtime=runtime
    )


def model_card(manifest: Manifest, source: Source) -> str:
    """What it is, data, metrics with intervals, limits, licences, provenance."""
    images, interval = read_array(source.files["scores"]) if "scores" in source.files else np.empty(0), None
    if images.ndim == 3:
        low, high = miou_interval(images)
        interval = {"images": len(images), "low": low, "high": high}
    return _text(
        "MODEL_CARD.md", manifest, report=source.report, recipe=source.report["recipe"], interval=interval,
        gates=gates(source),
    )  # fmt: skip


def _text(name: str, manifest: Manifest, **values: object) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    jinja = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    jinja.filters.update(pairs=pairs, show=show, bindings=_bindings)
    return jinja.get_template(f"{name}.j2").render(manifest=manifest, size=manifest.image.size, **values)


def _bindings(side: Mapping[str, Tensor]) -> str:
    shapes = {name: ", ".join(map(str, ["N", *value.shape[1:]])) for name, value in side.items()}
    return "; ".join(f"`{name}` {value.dtype} ({shapes[name]})" for name, value in side.items())


def pairs(mapping: dict[str, object]) -> str:
    """`key value` with commas between."""
    return ", ".join(f"{key} {value}" for key, value in mapping.items())


def show(value: object) -> str:
    """Numbers with four digits, the rest as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
