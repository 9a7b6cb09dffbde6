"""Arrays of other libraries on a CUDA device: their streams, and new arrays of the same kind.

`mambainllama.ops` computes on whatever exports DLPack (csrc/python/call.c).  What DLPack does not
say is asked of the library that an array comes from, if that is PyTorch or CuPy: on which stream
its caller works, so that an operator takes its place in it and nobody waits, and a new array for a
result.  Arrays of other libraries (JAX) work as well: results are then `_core.DeviceArray`, which
exports DLPack, and a call returns when its work is done.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import _core
from .devices import operator_table
from .errors import DeviceError

__all__ = ["current_stream", "empty", "is_on_device", "meet", "table", "to_host", "zeros"]


def table(device: int, dtype: str) -> Any:
    """The operators of a CUDA device for activations of `dtype`, as the core takes them."""
    return operator_table(f"cuda:{device}", dtype)


def _library(array: Any) -> str:
    return type(array).__module__.partition(".")[0]


def meet(array: Any, what: str) -> int | None:
    """Before an operator takes its first array of a device: the caller's stream, or DeviceError
    where there are no operators for it. `what` names operator and argument."""
    device = int(array.__dlpack_device__()[1])
    try:
        operator_table(f"cuda:{device}", "float32")
    except DeviceError as error:
        reason = str(error).rpartition("; ")[0] or str(error)
        raise DeviceError(
            f"{what} lies on cuda:{device}, but {reason}; or move it to the CPU (torch: .cpu())"
        ) from None
    return current_stream(array)


def current_stream(array: Any) -> int | None:
    """The stream that the caller works on, by DLPack's numbers; None: nobody says."""
    library = _library(array)
    if library == "torch":
        stream = sys.modules["torch"].cuda.current_stream(array.device).cuda_stream
    elif library == "cupy":
        with array.device:
            stream = sys.modules["cupy"].cuda.get_current_stream().ptr
    else:
        return None
    return int(stream) or 1  # 0 is CUDA's default stream, which DLPack calls 1


def empty(like: Any, table_of_device: Any, shape: tuple[int, ...], dtype: str, zero: bool) -> Any:
    """A new array on the device of `like`, of its library where that is one we know."""
    library = _library(like)
    if library == "torch":
        torch = sys.modules["torch"]
        make = torch.zeros if zero else torch.empty
        return make(shape, dtype=getattr(torch, dtype), device=like.device)
    if library == "cupy" and dtype != "bfloat16":
        cupy = sys.modules["cupy"]
        with like.device:
            return (cupy.zeros if zero else cupy.empty)(shape, dtype=dtype)
    return _core.device_array(table_of_device, shape, dtype, zero)


def zeros(shape: tuple[int, ...], like: Any = None) -> Any:
    """A float32 array at zero: NumPy's, or on the device of `like`."""
    if like is None or not is_on_device(like):
        return np.zeros(shape, np.float32)
    device = int(like.__dlpack_device__()[1])
    return empty(like, table(device, "float32"), shape, "float32", True)


def to_host(array: Any) -> Any:
    """An array of a CUDA device as something that NumPy reads; others as they are."""
    for method in ("cpu", "get", "numpy"):  # torch, CuPy, ours
        if is_on_device(array) and hasattr(array, method):
            return getattr(array, method)()
    return array


def is_on_device(array: Any) -> bool:
    """Whether it lies in a CUDA device's own memory."""
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack_device__"):
        return False
    return int(array.__dlpack_device__()[0]) == 2
