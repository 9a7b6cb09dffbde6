"""Types of the C core, by hand; stubtest compares the names with the built module (make lint).

`_Array` is what crosses without a copy: a NumPy array, a DLPack tensor or a buffer
(csrc/python/arrays.c).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, final

import numpy as np
import numpy.typing as npt

_Array: TypeAlias = Any
_Floats: TypeAlias = npt.NDArray[np.float32]
_MixerState: TypeAlias = dict[str, _Array]
_Gradients: TypeAlias = dict[str, _Floats]
_Out: TypeAlias = Mapping[str, _Array | None] | None

WINDOW: int
TAIL: int
_cpu_table: object

# ---- errors (csrc/python/errors.c)
# ----------------------------------------------------------------------

class Error(Exception): ...
class ArgumentError(Error, ValueError): ...
class ShapeError(Error, ValueError): ...
class DtypeError(Error, TypeError): ...
class FormatError(Error, ValueError): ...
class OutOfMemoryError(Error, MemoryError): ...
class FileError(Error, OSError): ...
class DeviceError(Error, RuntimeError): ...
class UnsupportedError(Error, NotImplementedError): ...
class StateError(Error, RuntimeError): ...
class NonFiniteError(Error, ArithmeticError): ...
class StoppedError(Error, RuntimeError): ...

# ---- settings (module.c)
# --------------------------------------------------------------------------------

def cpu_info() -> dict[str, Any]: ...
def table_info(table: object | None, /) -> dict[str, Any]: ...
def set_threads(threads: int | None, /) -> None: ...
def get_threads() -> int: ...
def convert(source: Any, dtype: str, target: Any, to: str, /) -> None: ...
def load_blas(path: Any, /) -> None: ...
def memory() -> dict[str, int]: ...
def trim_memory() -> None: ...
def fail_after(allocations: int, /) -> None: ...

# ---- operators (ops_*.c); documented in ops.py
# --------------------------------------------------------

def linear_forward(
    *,
    x: _Array,
    weight: _Array,
    bias: _Array | None = None,
    dtype: str | None = None,
    accumulate: bool = False,
    fast: bool = False,
    out: _Array | None = None,
    stream: int | None = None,
) -> _Floats: ...
def linear_group(
    *,
    x: _Array,
    weights: tuple[_Array, ...],
    dtype: str | None = None,
    fast: bool = False,
    stream: int | None = None,
) -> dict[str, _Floats]: ...
def linear_backward(
    *,
    x: _Array,
    weight: _Array,
    grad_y: _Array,
    bias: bool = False,
    dtype: str | None = None,
    accumulate: bool = False,
    out: _Out = None,
) -> _Gradients: ...
def norm_forward(
    *,
    x: _Array,
    weight: _Array | None = None,
    z: _Array | None = None,
    group: int | None = None,
    norm_before_gate: bool = False,
    weight_per_group: bool = False,
    eps: float = 1e-5,
    out: _Array | None = None,
    stream: int | None = None,
) -> _Floats: ...
def norm_backward(
    *,
    x: _Array,
    weight: _Array | None,
    grad_y: _Array,
    z: _Array | None = None,
    group: int | None = None,
    norm_before_gate: bool = False,
    weight_per_group: bool = False,
    eps: float = 1e-5,
    accumulate: bool = False,
    out: _Out = None,
) -> _Gradients: ...
def rope_table(
    *,
    inv_freq: _Array,
    rows: int,
    offsets: _Array | None = None,
    past: _Array | None = None,
    boundary: _Array | None = None,
    scale: float = 1.0,
    out: _Array | None = None,
    stream: int | None = None,
) -> _Floats: ...
def rope(
    *,
    x: _Array,
    table: _Array,
    inverse: bool = False,
    out: _Array | None = None,
    stream: int | None = None,
) -> _Floats: ...
def attention_forward(
    *,
    q: _Array,
    k: _Array | None = None,
    v: _Array | None = None,
    caches: Sequence[tuple[_Array, _Array]] | None = None,
    cache_dtype: str | None = None,
    offsets: _Array | None = None,
    past: _Array | None = None,
    boundary: _Array | None = None,
    scale: float = 1.0,
    window: int = 0,
    log_sum_exp: bool = False,
    out: _Array | None = None,
    stream: int | None = None,
) -> Any: ...
def attention_backward(
    *,
    q: _Array,
    k: _Array,
    v: _Array,
    y: _Array,
    log_sum_exp: _Array,
    grad_y: _Array,
    offsets: _Array | None = None,
    scale: float = 1.0,
    window: int = 0,
    out: _Out = None,
) -> _Gradients: ...
def kv_append(
    *,
    k: _Array,
    v: _Array,
    caches: Sequence[tuple[_Array, _Array]],
    cache_dtype: str | None = None,
    offsets: _Array | None = None,
    past: _Array | None = None,
    boundary: _Array | None = None,
    stream: int | None = None,
) -> None: ...
def conv1d_forward(
    *,
    x: _Array,
    weight: _Array,
    bias: _Array | None = None,
    silu: bool = True,
    repeat: int = 1,
    repeat_group: int = 1,
    offsets: _Array | None = None,
    past: _Array | None = None,
    boundary: _Array | None = None,
    states: Sequence[_MixerState] | None = None,
    out: _Array | None = None,
    stream: int | None = None,
) -> _Floats: ...
def conv1d_backward(
    *,
    x: _Array,
    weight: _Array,
    bias: _Array | None = None,
    grad_y: _Array,
    silu: bool = True,
    repeat: int = 1,
    repeat_group: int = 1,
    offsets: _Array | None = None,
    out: _Out = None,
) -> _Gradients: ...
def scan_forward(
    *,
    x: _Array,
    dt: _Array,
    B: _Array,
    C: _Array,
    A_log: _Array,
    D: _Array,
    dt_bias: _Array,
    z: _Array | None = None,
    dt_bias_scale: float = 1.0,
    dt_min: float = 0.0,
    dt_max: float = ...,
    x_repeat: int = 1,
    x_repeat_group: int = 1,
    offsets: _Array | None = None,
    past: _Array | None = None,
    boundary: _Array | None = None,
    states: Sequence[_MixerState] | None = None,
    out: _Array | None = None,
    stream: int | None = None,
) -> _Floats: ...
def scan_backward(
    *,
    x: _Array,
    dt: _Array,
    B: _Array,
    C: _Array,
    grad_y: _Array,
    A_log: _Array,
    D: _Array,
    dt_bias: _Array,
    z: _Array | None = None,
    dt_bias_scale: float = 1.0,
    dt_min: float = 0.0,
    dt_max: float = ...,
    x_repeat: int = 1,
    x_repeat_group: int = 1,
    offsets: _Array | None = None,
    out: _Out = None,
) -> _Gradients: ...
def ssd_forward(
    *,
    x: _Array,
    dt: _Array,
    B: _Array,
    C: _Array,
    A_log: _Array,
    D: _Array,
    dt_bias: _Array,
    dt_min: float = 0.0,
    dt_max: float = ...,
    offsets: _Array | None = None,
    past: _Array | None = None,
    boundary: _Array | None = None,
    states: Sequence[_MixerState] | None = None,
    out: _Array | None = None,
    stream: int | None = None,
) -> _Floats: ...
def ssd_backward(
    *,
    x: _Array,
    dt: _Array,
    B: _Array,
    C: _Array,
    grad_y: _Array,
    A_log: _Array,
    D: _Array,
    dt_bias: _Array,
    dt_min: float = 0.0,
    dt_max: float = ...,
    offsets: _Array | None = None,
    out: _Out = None,
) -> _Gradients: ...
def glu_forward(
    *,
    gate: _Array,
    up: _Array | None = None,
    activation: str = "silu",
    out: _Array | None = None,
    stream: int | None = None,
) -> _Floats: ...
def glu_backward(
    *, gate: _Array, up: _Array | None, grad_y: _Array, activation: str = "silu", out: _Out = None
) -> _Gradients: ...
def embedding_forward(
    *,
    tokens: _Array,
    table: _Array,
    scale: float = 1.0,
    dtype: str | None = None,
    out: _Array | None = None,
    stream: int | None = None,
) -> _Floats: ...
def embedding_backward(
    *, tokens: _Array, grad_y: _Array, vocab: int, scale: float = 1.0, out: _Out = None
) -> _Gradients: ...
def add(
    *, x: _Array, y: _Array, out: _Array | None = None, stream: int | None = None
) -> _Floats: ...
def gather_rows(
    *, x: _Array, index: _Array, out: _Array | None = None, stream: int | None = None
) -> _Floats: ...
def linear_loss(
    *,
    x: _Array,
    weight: _Array,
    teacher_x: _Array | None = None,
    teacher_weight: _Array | None = None,
    labels: _Array | None = None,
    row_weight: _Array | None = None,
    kl_weight: float | None = None,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    scale: float = 1.0,
    direction: str = "forward",
    mix: float = 0.5,
    top_tokens: _Array | None = None,
    top_logprobs: _Array | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab: int | None = None,
    dtype: str | None = None,
    teacher_dtype: str | None = None,
    gradients: bool = True,
    out: _Out = None,
) -> dict[str, Any]: ...
def relative_mse(
    *, x: _Array, target: _Array, weight: float = 1.0, out: _Out = None
) -> dict[str, Any]: ...
def adamw(
    *,
    master: _Array,
    grad: _Array,
    m: _Array,
    v: _Array,
    weight: _Array | None = None,
    dtype: str | None = None,
    step: int,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
) -> None: ...
def muon(
    *,
    master: _Array,
    grad: _Array,
    m: _Array,
    learning_rate: float,
    momentum: float = 0.95,
    parts: _Array | None = None,
    weight: _Array | None = None,
    dtype: str | None = None,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
) -> None: ...
def sum_squares(*, x: _Array) -> float: ...

# ---- models and states (model.c)
# ------------------------------------------------------------------------

@final
class Model:
    """A model over borrowed arrays: `config` as csrc/python/config.c reads it, `parameters` name ->
    array, `codes` name -> "float8" or "int8" for matrices that become that on the device."""

    def __new__(
        cls,
        config: Mapping[str, Any],
        parameters: Mapping[str, _Array],
        dtypes: Mapping[str, str] = ...,
        table: object | None = None,
        codes: Mapping[str, str] = ...,
    ) -> Model: ...
    @classmethod
    def parameter_specs(
        cls, config: Mapping[str, Any], /
    ) -> list[tuple[str, tuple[int, ...], bool, bool]]: ...
    @classmethod
    def footprint(
        cls,
        config: Mapping[str, Any],
        *,
        dtype: str = "float32",
        activation: str | None = None,
        sequences: int = 1,
        rows: int = 1,
        logits: int = 0,
    ) -> dict[str, int]: ...
    @property
    def config(self) -> Any: ...
    @property
    def table_info(self) -> dict[str, Any]: ...
    def parameters(self) -> dict[str, _Array]: ...
    def device_parameters(self) -> dict[str, DeviceArray]: ...
    def dtypes(self) -> dict[str, str]: ...
    def forward(
        self,
        tokens: _Array,
        offsets: _Array | None = None,
        *,
        states: Sequence[State] | None = None,
        rows: _Array | None = None,
        capture: Sequence[tuple[str, int]] | None = None,
        fast: bool = False,
    ) -> Any: ...
    def state(self, capacity: int = 0) -> State: ...
    def state_bytes(self, tokens: int, /) -> int: ...

@final
class DeviceArray:
    """An array in the memory of a CUDA device."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def numpy(self) -> npt.NDArray[Any]: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def device_array(
    table: object, shape: tuple[int, ...], dtype: str, zero: bool, /
) -> DeviceArray: ...

@final
class State:
    """The state of one sequence. Made by Model.state()."""

    @classmethod
    def restore(cls, model: Any, image: bytes, /) -> State: ...
    @property
    def model(self) -> Model: ...
    @property
    def length(self) -> int: ...
    @property
    def boundary(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def copy(self) -> State: ...
    def rollback(self, count: int, /) -> None: ...
    def clear(self) -> None: ...
    def save(self) -> bytes: ...

# ---- training (trainer.c)
# -------------------------------------------------------------------------------

@final
class Trainer:
    """Gradients and AdamW of a student."""

    def __new__(
        cls,
        student: Model,
        teacher: Model | None = None,
        *,
        trainable: Sequence[str] | None = None,
        checkpointing: bool = False,
    ) -> Trainer: ...
    @property
    def step(self) -> int: ...
    @step.setter
    def step(self, steps: int, /) -> None: ...
    def backward(
        self,
        tokens: _Array,
        offsets: _Array | None = None,
        *,
        labels: _Array | None = None,
        row_weight: _Array | None = None,
        kl_weight: float = ...,
        ce_weight: float = 0.0,
        temperature: float = 1.0,
        direction: str = "forward",
        scale: float = 1.0,
        hidden_weight: float = 0.0,
        align_weight: float = 0.0,
        evaluate: bool = False,
        mix: float = 0.5,
        top_tokens: _Array | None = None,
        top_logprobs: _Array | None = None,
        reference: _Array | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        length_normalized: bool = False,
    ) -> dict[str, float]: ...
    def apply(
        self,
        learning_rate: float,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        vector_rate: float = 1.0,
        muon_rate: float = 0.0,
        muon_momentum: float = 0.95,
    ) -> float: ...
    def gradients(self) -> dict[str, _Floats]: ...
    def state(self) -> dict[str, _Floats]: ...

def evaluate(
    student: Model,
    teacher: Model | None,
    tokens: _Array,
    offsets: _Array | None = None,
    *,
    labels: _Array | None = None,
    row_weight: _Array | None = None,
    temperature: float = 1.0,
    direction: str = "forward",
    rows: bool = False,
) -> dict[str, Any]: ...

# ---- generation (generate.c)
# ----------------------------------------------------------------------------

def generate(
    model: Model,
    requests: Sequence[Mapping[str, Any]],
    *,
    draft: Model | Literal["ngram"] | None = None,
    max_batch: int = 16,
    prefill_rows: int = 0,
    on_tokens: Callable[..., Any] | None = None,
    on_finish: Callable[..., Any] | None = None,
    more: Callable[..., Any] | None = None,
    verify_cost: float = 0.0,
    draft_cost: float = 0.0,
    _break_accept: int = 0,
    _force_acceptance: float = 0.0,
    workspace: int = 0,
) -> Any: ...
def sample(
    logits: _Array, options: Mapping[str, Any], *, history: _Array | None = None, position: int = 0
) -> tuple[int, _Floats, float]: ...
def philox(
    counter: tuple[int, int, int, int], key: tuple[int, int], /
) -> tuple[int, int, int, int]: ...
def uniform(seed: int, position: int, stream: int, /) -> float: ...
def ngram_propose(tokens: _Array, longest: int, shortest: int, most: int, /) -> Any: ...
