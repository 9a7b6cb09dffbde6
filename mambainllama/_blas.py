"""Finds the BLAS library for float32 products and hands it to the core.

By default this is OpenBLAS from the scipy-openblas64 wheel.  MAMBAINLLAMA_BLAS names another shared
library with a CBLAS interface, or is "none" for the core's own kernels, which serve wherever no
library is found.
"""

import importlib.util
import os
import warnings
from pathlib import Path

from . import _core


def wheel_library() -> Path | None:
    """Path of the library in the scipy-openblas64 wheel, or None; does not import the wheel."""
    spec = importlib.util.find_spec("scipy_openblas64")
    for folder in (spec and spec.submodule_search_locations) or []:
        for path in sorted((Path(folder) / "lib").glob("libscipy_openblas64_*")):
            if path.suffix in (".so", ".dylib"):
                return path
    return None


def load() -> None:
    """Load the library that the environment names, or the wheel's."""
    wanted = os.environ.get("MAMBAINLLAMA_BLAS", "")
    if wanted.lower() == "none":
        return
    if wanted:
        _core.load_blas(wanted)  # asked for by name: a failure is the user's to know
        return
    path = wheel_library()
    if path is None:
        return
    try:
        _core.load_blas(path)
    except _core.Error as error:
        warnings.warn(f"{error}; float32 products use our own, slower kernels", stacklevel=2)
