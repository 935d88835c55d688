"""TensorRT's own Python bindings, 10 and 11, on a machine without GPU and without TensorRT's builder.

    python tests/deploy/trt_bindings.py

makes one folder per version below the cache. The wheels are NVIDIA's: the full bindings (enums and classes, everything
that Python can see) and the lean runtime, whose library holds the real plugin registry. The bindings want three further
libraries, which no wheel offers; they are compiled here as stubs of a few lines. So every name can be used and every
plugin registered, and nothing can be built: `trt.Builder(...)` raises TypeError.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOG = logging.getLogger(__name__)
VERSIONS = {10: "10.16.1.11", 11: "11.4.0.106"}
PACKAGES = ("tensorrt-cu13", "tensorrt-cu13-bindings", "tensorrt-lean-cu13-libs", "tensorrt-lean-cu13-bindings")
NUMPY = "numpy==2.3.5"  # quick plugins of 10.16 fail with 2.4 and newer

STUBS = {
    "libnvinfer": """
        void* getPluginRegistry(void);
        void* createInferBuilder_INTERNAL(void* logger, int version) { (void)logger; (void)version; return 0; }
        void* getBuilderPluginRegistry(int capability) { (void)capability; return getPluginRegistry(); }
    """,
    "libnvonnxparser": """
        int getNvOnnxParserVersion(void) { return 0; }
        void* createNvOnnxParser_INTERNAL(void* n, void* l, int v) { (void)n; (void)l; (void)v; return 0; }
        void* createNvOnnxParserRefitter_INTERNAL(void* r, void* l, int v) { (void)r; (void)l; (void)v; return 0; }
    """,
    "libnvinfer_plugin": """
        int initLibNvInferPlugins(void* logger, const char* space) { (void)logger; (void)space; return 1; }
    """,
}
LOADER = """\
import ctypes
from pathlib import Path

for name in {names!r}:
    ctypes.CDLL(str(Path(__file__).parent / name), mode=ctypes.RTLD_GLOBAL)
"""


class UnavailableError(Exception):
    """Why the bindings cannot be had here."""


def cache() -> Path:
    """Where foreign things of the tests are kept: VSS_TEST_CACHE, or vss-test in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VSS_TEST_CACHE") or Path(base) / "vss-test")


def bindings(major: int) -> Path:
    """The folder to put on PYTHONPATH so that `import tensorrt` gives that version; made once."""
    version = VERSIONS[major]

    def fill(folder: Path) -> None:
        _install(folder, [f"{name}=={version}" for name in PACKAGES])
        _compile_stubs(folder, major)

    return _once(f"tensorrt-{version}", fill)


def old_numpy() -> Path:
    """The folder of a numpy that quick plugins of TensorRT 10.16 work with."""
    return _once(NUMPY.replace("==", "-"), lambda folder: _install(folder, [NUMPY]))


def run(major: int, *command: str | Path, numpy: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` with the bindings of that version and this interpreter's packages."""
    folders = [bindings(major), *([old_numpy()] if numpy and major == 10 else []), Path(__file__).parents[2]]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))} | environment
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False, env=env, timeout=240
    )


def _once(name: str, fill: object) -> Path:
    target = cache() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{name}.lock")):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
                fill(Path(temporary) / "site")  # type: ignore[operator]
                (Path(temporary) / "site").rename(target)
            LOG.info("made %s", target)
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _install(folder: Path, packages: list[str]) -> None:
    """Without dependencies: those of tensorrt-cu13 would draw in libraries that only NVIDIA's own index has."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", str(folder), *packages], capture_output=True, text=True, check=False, timeout=200
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UnavailableError(f"pip cannot install {packages[0]}: {errors[-1] if errors else done.stderr[-200:]}")


def _compile_stubs(folder: Path, major: int) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise UnavailableError("the stub libraries need a C compiler")
    target = folder / "tensorrt_libs"
    target.mkdir()
    lean = folder / "tensorrt_lean_libs"
    for name, source in STUBS.items():
        code = target / f"{name}.c"
        code.write_text(source)
        link = [str(lean / f"libnvinfer_lean.so.{major}"), "-Wl,-rpath,$ORIGIN/../tensorrt_lean_libs"]
        command = [compiler, "-shared", "-fPIC", "-o", str(target / f"{name}.so.{major}"), str(code)]
        command += [f"-Wl,-soname,{name}.so.{major}", *(link if name == "libnvinfer" else [])]
        subprocess.run(command, check=True, capture_output=True)
    names = [f"{name}.so.{major}" for name in STUBS]
    (target / "__init__.py").write_text(LOADER.format(names=names))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for each in VERSIONS:
        LOG.info("TensorRT %s: %s", VERSIONS[each], bindings(each))
    LOG.info("numpy: %s", old_numpy())
