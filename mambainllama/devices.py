"""Devices: their names, and the operator tables that the C core computes with.

The CPU's operators are part of the core. Those of CUDA devices live in the extension module
`_cuda`, which is built where a CUDA toolkit is found and imported only when a CUDA device is asked
for, so that a machine without one neither needs nor notices it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from .errors import ArgumentError, DeviceError, shorten

__all__ = ["check_device", "cuda_devices", "free_memory", "operator_table"]

_DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}  # mil_dtype


@cache
def _cuda() -> ModuleType:
    """The module `_cuda`; DeviceError with the reason where there is none."""
    if importlib.util.find_spec("mambainllama._cuda") is None:
        raise DeviceError(
            'device "cuda": this build has no CUDA operators; install a CUDA 12.6+ toolkit (nvcc) '
            'and reinstall mambainllama with MAMBAINLLAMA_CUDA=1, or use device="cpu"'
        )
    _preload_cublas()
    try:
        from . import _cuda
    except ImportError as error:
        raise DeviceError(
            f'device "cuda": the CUDA operators do not load ({error}); use device="cpu"'
        ) from None
    return _cuda


def _preload_cublas() -> None:
    """Loads cuBLASLt of the nvidia-cublas wheel, where there is one: it is then found by name."""
    for entry in sys.path:
        for folder in ("nvidia/cu13/lib", "nvidia/cublas/lib"):
            for library in sorted(Path(entry, folder).glob("libcublasLt.so.*"), reverse=True):
                try:
                    ctypes.CDLL(os.fspath(library), mode=ctypes.RTLD_LOCAL)
                    return
                except OSError:
                    continue


def cuda_devices() -> list[dict]:
    """Name, compute capability, multiprocessors, and bytes of memory (all and free) of each CUDA
    device; empty where there are none or this build has no CUDA operators."""
    try:
        return _cuda().devices()
    except DeviceError:
        return []


def free_memory(device: str) -> tuple[int, int]:
    """Bytes of a device's memory that are free, and all of them.

    For the CPU what this process can still get: available memory and free swap, or less where a
    container's limit is nearer.
    """
    if device == "cpu":
        return _free_host_memory()
    try:
        return _cuda().memory(int(device.partition(":")[2]))
    except RuntimeError as error:
        raise DeviceError(str(error)) from None


def _free_host_memory() -> tuple[int, int]:
    try:
        lines = (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())
        facts = {name: int(rest.split()[0]) * 1024 for name, _, rest in lines}
        total, free = facts["MemTotal"], facts["MemAvailable"] + facts.get("SwapFree", 0)
    except (OSError, ValueError, IndexError, KeyError):  # not Linux: nobody can say
        return 1 << 62, 1 << 62
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most = int(Path(folder, limit).read_text())
            if most >= total:  # no limit; the kernel takes milliseconds to add up the rest
                continue
            now = int(Path(folder, used).read_text())
            # Pages of files count as used there and are given up where memory is wanted.
            stat = dict(
                line.split() for line in Path(folder, "memory.stat").read_text().splitlines()
            )
            now -= int(stat.get("file") or stat.get("total_cache") or 0)
        except (OSError, ValueError):  # no such controller, or "max"
            continue
        total, free = min(total, most), min(free, max(0, most - now))
    return free, total


def check_device(device: str) -> str:
    """The full name of a device: "cpu", or "cuda:0" and so on.

    "auto" is "cpu": training and conversion run there only, so a GPU has to be asked for.

    Raises
    ------
    DeviceError
        A CUDA device that this build or machine does not have; the message says which and why.
    ArgumentError
        A name that is no device.
    """
    kind, colon, number = str(device).lower().partition(":")
    if kind == "auto" and not colon:
        return "cpu"
    if kind == "cpu" and not colon:
        return "cpu"
    if kind not in ("cuda", "gpu") or (colon and not (number.isdecimal() and len(number) < 5)):
        raise ArgumentError(
            f'device {shorten(device)} is not known; use "auto", "cpu", "cuda" or "cuda:1"'
        )
    index = int(number) if colon else 0
    operator_table(f"cuda:{index}", "float32")  # fails where there is no such device
    return f"cuda:{index}"


def operator_table(device: str, dtype: str) -> object:
    """The capsule of a device's operators for models of `dtype`; None for the CPU's, which are
    built into the core."""
    if device == "cpu":
        return None
    try:
        return _cuda().table(_DTYPE_CODES[dtype], int(device.partition(":")[2]))
    except RuntimeError as error:
        raise DeviceError(str(error)) from None
