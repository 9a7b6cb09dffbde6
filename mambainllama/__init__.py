"""Turn Llama-family Transformers into hybrid Mamba models, distil them, and run them fast."""

from . import _blas, errors, evaluate, ops
from ._core import State
from ._version import __version__
from .choose import LayerChoice, choose_layers
from .convert import convert
from .distill import DistillConfig, SftConfig, distill, sft
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
from .generate import Generation, GenerationStats, Score, generate, score
from .history import History
from .label import label
from .memory import MemoryPlan, memory_plan
from .model import Model, load
from .pipeline import run_recipe
from .preference import DPOConfig, dpo
from .soft_labels import soft_labels
from .stepwise import AlignConfig, StepwiseConfig, align, stepwise
from .tokenizer import Tokenizer
from .training import TrainingConfig, TrainingInterrupted

_blas.load()

__all__ = [
    "AlignConfig",
    "ArgumentError",
    "DPOConfig",
    "DeviceError",
    "DistillConfig",
    "DtypeError",
    "Error",
    "FileError",
    "FormatError",
    "Generation",
    "GenerationStats",
    "History",
    "LayerChoice",
    "MemoryPlan",
    "Model",
    "NonFiniteError",
    "NotFoundError",
    "OutOfMemoryError",
    "Score",
    "SftConfig",
    "ShapeError",
    "State",
    "StateError",
    "StepwiseConfig",
    "StoppedError",
    "Tokenizer",
    "TrainingConfig",
    "TrainingInterrupted",
    "UnsupportedError",
    "__version__",
    "align",
    "choose_layers",
    "convert",
    "distill",
    "dpo",
    "errors",
    "evaluate",
    "generate",
    "label",
    "load",
    "memory_plan",
    "ops",
    "run_recipe",
    "score",
    "sft",
    "soft_labels",
    "stepwise",
]


def __getattr__(name: str) -> object:
    """Modules that are loaded when they are first asked for: mil.demo, mil.bench, mil.plot."""
    if name in ("bench", "demo", "plot"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
