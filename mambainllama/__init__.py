"""Turn Llama-family Transformers into hybrid Mamba models, distil them, and run them fast."""

from . import _blas, errors, ops
from ._version import __version__
from .convert import convert
from .errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    Error,
    FileError,
    FormatError,
    NonFiniteError,
    NotFoundError,
    OutOfMemoryError,
    ShapeError,
    StateError,
    StoppedError,
    UnsupportedError,
)
from .model import Model, load
from .tokenizer import Tokenizer

_blas.load()

__all__ = [
    "ArgumentError",
    "DeviceError",
    "DtypeError",
    "Error",
    "FileError",
    "FormatError",
    "Model",
    "NonFiniteError",
    "NotFoundError",
    "OutOfMemoryError",
    "ShapeError",
    "StateError",
    "StoppedError",
    "Tokenizer",
    "UnsupportedError",
    "__version__",
    "convert",
    "errors",
    "load",
    "ops",
]
