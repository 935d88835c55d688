"""A real Triton Inference Server without root and without a container: the one inside the nvidia-pytriton wheel.

It runs on the CPU and has the python backend alone. It needs numpy below 2, so it lives in an environment of its own,
made once and kept: `make` writes it, `server.json` in it says how to start it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from vss.core.errors import VssError
from vss.core.files import write_json

log = logging.getLogger(__name__)

KIND, SCHEMA = "vss.triton", 1
PINS = ("nvidia-pytriton==0.7.0", "numpy==1.26.4", "onnxruntime==1.31.1")
FACTS = """
import json, os, pytriton, sysconfig
print(json.dumps({
    "packages": os.path.dirname(os.path.dirname(pytriton.__file__)),
    "libdir": sysconfig.get_config_var("LIBDIR"),
    "library": sysconfig.get_config_var("INSTSONAME"),
    "python": sysconfig.get_python_version(),
}))
"""


def home() -> Path:
    """Where the environment is: VSS_TRITON, or a folder of the user's cache named by its versions."""
    given = os.environ.get("VSS_TRITON")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Path(given) if given else cache / "vss" / f"{PINS[0].replace('==', '-')}-py{python}"


def make(folder: Path | None = None) -> Path:
    """Install the server (about 440 MB with its Python packages) unless it is there; returns its folder."""
    folder = folder or home()
    if (folder / "server.json").is_file():
        return folder
    log.info("installing %s into %s", PINS[0], folder)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    python = folder / "bin" / "python"
    _run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *PINS])
    facts = json.loads(_run([str(python), "-c", FACTS]))
    if not (Path(facts["libdir"]) / facts["library"]).is_file():
        raise VssError(
            f"{sys.executable} has no shared library {facts['library']} in {facts['libdir']}, which Triton's python "
            "backend needs; use a Python that was built with --enable-shared (on Debian: libpython3)."
        )
    server = Path(facts["packages"]) / "pytriton" / "tritonserver"
    backend = folder / "backends" / "python"
    shutil.copytree(server / "backends" / "python", backend)
    stub = server / "python_backend_stubs" / facts["python"] / "triton_python_backend_stub"
    shutil.copy2(stub, backend / stub.name)
    write_json(
        folder / "server.json",
        {
            "kind": KIND,
            "schema": SCHEMA,
            "pins": list(PINS),
            "binary": str(server / "bin" / "tritonserver"),
            "backends": str(folder / "backends"),
            "library_path": [facts["libdir"], str(Path(facts["packages"]) / "nvidia_pytriton.libs")],
            "site_packages": facts["packages"],
        },
    )
    return folder


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise VssError(f"the Triton environment cannot be made ({' '.join(command[-3:])}: {last[0]}).")
    return done.stdout
