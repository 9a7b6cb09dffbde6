"""Turn Llama-family Transformers into hybrid Mamba models, distil them, and run them fast."""

from . import _blas, errors, ops
from ._version import __version__
from .errors import Error

_blas.load()

__all__ = ["Error", "__version__", "errors", "ops"]
