"""Types of the C core, by hand; stubtest compares the names with the built module (make lint).

`Array` is what crosses without a copy: a NumPy array, a DLPack tensor or a buffer
(csrc/python/arrays.c).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, final

import numpy as np
import numpy.typing as npt

Array: TypeAlias = Any
Floats: TypeAlias = npt.NDArray[np.float32]
MixerState: TypeAlias = dict[str, Array]
Gradients: TypeAlias = dict[str, Floats]
Out: TypeAlias = Mapping[str, Array | None] | None

WINDOW: int
TAIL: int

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
def set_threads(threads: int | None, /) -> None: ...
def get_threads() -> int: ...
def load_blas(path: Any, /) -> None: ...
def memory() -> dict[str, int]: ...
def trim_memory() -> None: ...
def fail_after(allocations: int, /) -> None: ...

# ---- operators (ops_*.c); documented in ops.py
# --------------------------------------------------------

def linear_forward(
    *,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    dtype: str | None = None,
    accumulate: bool = False,
    fast: bool = False,
    out: Array | None = None,
) -> Floats: ...
def linear_group(
    *, x: Array, weights: tuple[Array, ...], dtype: str | None = None, fast: bool = False
) -> dict[str, Floats]: ...
def linear_backward(
    *,
    x: Array,
    weight: Array,
    grad_y: Array,
    bias: bool = False,
    dtype: str | None = None,
    accumulate: bool = False,
    out: Out = None,
) -> Gradients: ...
def norm_forward(
    *,
    x: Array,
    weight: Array | None = None,
    z: Array | None = None,
    group: int | None = None,
    norm_before_gate: bool = False,
    weight_per_group: bool = False,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Floats: ...
def norm_backward(
    *,
    x: Array,
    weight: Array | None,
    grad_y: Array,
    z: Array | None = None,
    group: int | None = None,
    norm_before_gate: bool = False,
    weight_per_group: bool = False,
    eps: float = 1e-5,
    accumulate: bool = False,
    out: Out = None,
) -> Gradients: ...
def rope_table(
    *,
    inv_freq: Array,
    rows: int,
    offsets: Array | None = None,
    past: Array | None = None,
    boundary: Array | None = None,
    scale: float = 1.0,
    out: Array | None = None,
) -> Floats: ...
def rope(*, x: Array, table: Array, inverse: bool = False, out: Array | None = None) -> Floats: ...
def attention_forward(
    *,
    q: Array,
    k: Array | None = None,
    v: Array | None = None,
    caches: Sequence[tuple[Array, Array]] | None = None,
    cache_dtype: str | None = None,
    offsets: Array | None = None,
    past: Array | None = None,
    boundary: Array | None = None,
    scale: float = 1.0,
    window: int = 0,
    log_sum_exp: bool = False,
    out: Array | None = None,
) -> Any: ...
def attention_backward(
    *,
    q: Array,
    k: Array,
    v: Array,
    y: Array,
    log_sum_exp: Array,
    grad_y: Array,
    offsets: Array | None = None,
    scale: float = 1.0,
    window: int = 0,
    out: Out = None,
) -> Gradients: ...
def kv_append(
    *,
    k: Array,
    v: Array,
    caches: Sequence[tuple[Array, Array]],
    cache_dtype: str | None = None,
    offsets: Array | None = None,
    past: Array | None = None,
    boundary: Array | None = None,
) -> None: ...
def conv1d_forward(
    *,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    silu: bool = True,
    repeat: int = 1,
    repeat_group: int = 1,
    offsets: Array | None = None,
    past: Array | None = None,
    boundary: Array | None = None,
    states: Sequence[MixerState] | None = None,
    out: Array | None = None,
) -> Floats: ...
def conv1d_backward(
    *,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    grad_y: Array,
    silu: bool = True,
    repeat: int = 1,
    repeat_group: int = 1,
    offsets: Array | None = None,
    out: Out = None,
) -> Gradients: ...
def scan_forward(
    *,
    x: Array,
    dt: Array,
    B: Array,
    C: Array,
    A_log: Array,
    D: Array,
    dt_bias: Array,
    z: Array | None = None,
    dt_bias_scale: float = 1.0,
    dt_min: float = 0.0,
    dt_max: float = ...,
    x_repeat: int = 1,
    x_repeat_group: int = 1,
    offsets: Array | None = None,
    past: Array | None = None,
    boundary: Array | None = None,
    states: Sequence[MixerState] | None = None,
    out: Array | None = None,
) -> Floats: ...
def scan_backward(
    *,
    x: Array,
    dt: Array,
    B: Array,
    C: Array,
    grad_y: Array,
    A_log: Array,
    D: Array,
    dt_bias: Array,
    z: Array | None = None,
    dt_bias_scale: float = 1.0,
    dt_min: float = 0.0,
    dt_max: float = ...,
    x_repeat: int = 1,
    x_repeat_group: int = 1,
    offsets: Array | None = None,
    out: Out = None,
) -> Gradients: ...
def ssd_forward(
    *,
    x: Array,
    dt: Array,
    B: Array,
    C: Array,
    A_log: Array,
    D: Array,
    dt_bias: Array,
    dt_min: float = 0.0,
    dt_max: float = ...,
    offsets: Array | None = None,
    past: Array | None = None,
    boundary: Array | None = None,
    states: Sequence[MixerState] | None = None,
    out: Array | None = None,
) -> Floats: ...
def ssd_backward(
    *,
    x: Array,
    dt: Array,
    B: Array,
    C: Array,
    grad_y: Array,
    A_log: Array,
    D: Array,
    dt_bias: Array,
    dt_min: float = 0.0,
    dt_max: float = ...,
    offsets: Array | None = None,
    out: Out = None,
) -> Gradients: ...
def glu_forward(
    *, gate: Array, up: Array | None = None, activation: str = "silu", out: Array | None = None
) -> Floats: ...
def glu_backward(
    *, gate: Array, up: Array | None, grad_y: Array, activation: str = "silu", out: Out = None
) -> Gradients: ...
def embedding_forward(
    *,
    tokens: Array,
    table: Array,
    scale: float = 1.0,
    dtype: str | None = None,
    out: Array | None = None,
) -> Floats: ...
def embedding_backward(
    *, tokens: Array, grad_y: Array, vocab: int, scale: float = 1.0, out: Out = None
) -> Gradients: ...
def add(*, x: Array, y: Array, out: Array | None = None) -> Floats: ...
def gather_rows(*, x: Array, index: Array, out: Array | None = None) -> Floats: ...
def linear_loss(
    *,
    x: Array,
    weight: Array,
    teacher_x: Array | None = None,
    teacher_weight: Array | None = None,
    labels: Array | None = None,
    row_weight: Array | None = None,
    kl_weight: float | None = None,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    scale: float = 1.0,
    direction: str = "forward",
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab: int | None = None,
    dtype: str | None = None,
    teacher_dtype: str | None = None,
    gradients: bool = True,
    out: Out = None,
) -> dict[str, Any]: ...
def relative_mse(
    *, x: Array, target: Array, weight: float = 1.0, out: Out = None
) -> dict[str, Any]: ...
def adamw(
    *,
    master: Array,
    grad: Array,
    m: Array,
    v: Array,
    weight: Array | None = None,
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
    master: Array,
    grad: Array,
    m: Array,
    learning_rate: float,
    momentum: float = 0.95,
    parts: Array | None = None,
    weight: Array | None = None,
    dtype: str | None = None,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
) -> None: ...
def sum_squares(*, x: Array) -> float: ...

# ---- models and states (model.c)
# ------------------------------------------------------------------------

@final
class Model:
    """A model over borrowed arrays: `config` as csrc/python/config.c reads it, `parameters` name ->
    array."""

    def __new__(
        cls,
        config: Mapping[str, Any],
        parameters: Mapping[str, Array],
        dtypes: Mapping[str, str] = ...,
    ) -> Model: ...
    @classmethod
    def parameter_specs(
        cls, config: Mapping[str, Any], /
    ) -> list[tuple[str, tuple[int, ...], bool, bool]]: ...
    @property
    def config(self) -> Any: ...
    def parameters(self) -> dict[str, Array]: ...
    def dtypes(self) -> dict[str, str]: ...
    def forward(
        self,
        tokens: Array,
        offsets: Array | None = None,
        *,
        states: Sequence[State] | None = None,
        rows: Array | None = None,
        capture: Sequence[tuple[str, int]] | None = None,
        fast: bool = False,
    ) -> Any: ...
    def state(self, capacity: int = 0) -> State: ...
    def state_bytes(self, tokens: int, /) -> int: ...

@final
class State:
    """The state of one sequence. Made by Model.state()."""

    @classmethod
    def restore(cls, model: Model, image: bytes, /) -> State: ...
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
        tokens: Array,
        offsets: Array | None = None,
        *,
        labels: Array | None = None,
        row_weight: Array | None = None,
        kl_weight: float = ...,
        ce_weight: float = 0.0,
        temperature: float = 1.0,
        direction: str = "forward",
        scale: float = 1.0,
        hidden_weight: float = 0.0,
        align_weight: float = 0.0,
        evaluate: bool = False,
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
    def gradients(self) -> dict[str, Floats]: ...
    def state(self) -> dict[str, Floats]: ...

def evaluate(
    student: Model,
    teacher: Model | None,
    tokens: Array,
    offsets: Array | None = None,
    *,
    labels: Array | None = None,
    row_weight: Array | None = None,
    temperature: float = 1.0,
    direction: str = "forward",
) -> dict[str, float]: ...

# ---- generation (generate.c)
# ----------------------------------------------------------------------------

def generate(
    model: Model,
    requests: Sequence[Mapping[str, Any]],
    *,
    draft: Model | Literal["ngram"] | None = None,
    max_batch: int = 16,
    prefill_rows: int = 512,
    on_tokens: Callable[..., Any] | None = None,
    on_finish: Callable[..., Any] | None = None,
    more: Callable[..., Any] | None = None,
    verify_cost: float = 0.0,
    draft_cost: float = 0.0,
    _break_accept: int = 0,
) -> Any: ...
def sample(
    logits: Array, options: Mapping[str, Any], *, history: Array | None = None, position: int = 0
) -> tuple[int, Floats, float]: ...
def philox(
    counter: tuple[int, int, int, int], key: tuple[int, int], /
) -> tuple[int, int, int, int]: ...
def uniform(seed: int, position: int, stream: int, /) -> float: ...
def ngram_propose(tokens: Array, longest: int, shortest: int, most: int, /) -> Any: ...
