"""The built package: its exports and imports, and the way through sdist and wheel."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

import mambainllama
from mambainllama import _core

ROOT = Path(__file__).resolve().parents[1]


def run(*command, **options):
    """Run a command; its output is the assertion's message."""
    done = subprocess.run(
        [str(part) for part in command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_exports_only_the_init_function():
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    symbols = run("nm", "--dynamic", "--defined-only", _core.__file__).split("\n")
    names = {line.split()[-1] for line in symbols if line.strip()}
    assert names - {"_init", "_fini", "_edata", "_end", "__bss_start"} == {"PyInit__core"}


def test_links_no_foreign_library():
    """OpenBLAS is found at run time, CUDA is a module of its own."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    needed = re.findall(r"NEEDED.*\[(.+?)\]", run("readelf", "-d", _core.__file__))
    families = {re.sub(r"[-.].*", "", name) for name in needed}
    assert families <= {"libc", "libm", "libdl", "libgomp", "libomp", "libpthread", "ld"}, needed


@pytest.mark.parametrize("module", ["torch", "transformers", "matplotlib", "scipy_openblas64"])
def test_import_is_light(module):
    run(sys.executable, "-c", f"import mambainllama, sys; assert '{module}' not in sys.modules")


def test_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", mambainllama.__version__)
    try:
        assert importlib.metadata.version("mambainllama") == mambainllama.__version__
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is built in place but not installed")


def test_ships_types():
    folder = Path(mambainllama.__file__).parent
    assert (folder / "py.typed").exists()
    stub = (folder / "_core.pyi").read_text()
    missing = [
        name
        for name in dir(_core)
        if not name.startswith("_")
        and not re.search(rf"\b(def|class) {name}\b|^{name}:", stub, re.M)
    ]
    assert missing == []


def test_unknown_make_option_stops():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(
        ["make", "help", "THREADS=4"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=clean_environment(),
    )
    assert done.returncode != 0
    assert "unknown option THREADS" in done.stderr


def clean_environment():
    """The environment without what an outer make hands to inner ones."""
    return {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("word, succeeds", [("auto", True), ("1", False)])
def test_cuda_that_does_not_compile(word, succeeds, tmp_path):
    """A toolkit that cannot compile the kernels stops nothing, unless one insists on it."""
    home = tmp_path / "cuda"
    for file in (home / "include" / "cublasLt.h", home / "bin" / "nvcc"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("#!/bin/sh\necho nvcc: unknown architecture >&2\nexit 1\n")
        file.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=clean_environment() | {"CUDA_HOME": str(home), "MAMBAINLLAMA_CUDA": word},
    )
    assert (done.returncode == 0) == succeeds, done.stderr
    assert "no CUDA operators (MAMBAINLLAMA_CUDA=0 leaves them out" in done.stderr
    assert "nvcc: unknown architecture" in done.stderr
    assert not list(tmp_path.rglob("_cuda*")) and list(tmp_path.rglob("_core*"))


@pytest.mark.slow
def test_sdist_becomes_wheel_becomes_install(tmp_path):
    """From sources through sdist and wheel into an empty environment, used elsewhere."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    source = tmp_path / "source"
    names = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).split("\n")
    for name in names:
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    left_out = {name for name in names if name and not name.startswith((".ci", ".git"))} - packed
    assert left_out == set()  # what make and the README speak of is there
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", tmp_path, sdist)
    (wheel,) = tmp_path.glob("*.whl")

    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    try:
        run(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", wheel)
    except AssertionError as error:
        if "No matching distribution" in str(error) or "Could not find a version" in str(error):
            pytest.skip("the package index cannot be reached")
        raise
    script = """
import sys
import numpy, mambainllama
from mambainllama import ops
y = ops.linear_forward(numpy.ones((2, 3), "f4"), numpy.ones((4, 3), "f4"))
assert (y == 3).all() and mambainllama._core.cpu_info()["blas_loaded"]
assert "torch" not in sys.modules
"""
    run(python, "-c", script, cwd=tmp_path)
    run(tmp_path / "empty" / "bin" / "mambainllama", "--help", cwd=tmp_path)
