"""Every kernel of the C core, on NumPy arrays and other CPU arrays, and the forward ones on CUDA
arrays of PyTorch, CuPy and JAX, without copies.

Arrays in
    Float32 and C-contiguous unless told otherwise; activations may have rows that are farther apart
    than they are wide, so a slice such as ``projection[:, 64:128]`` is read in place.  NumPy
    arrays, DLPack tensors (torch, JAX, CuPy in host memory) and buffers are all taken as they are.
    What would need a copy is refused with the words that make one.  Integer arguments (tokens,
    offsets ...) may also be lists.
bfloat16
    Weights and caches may be float32, float16 or bfloat16.  NumPy has no bfloat16, so it comes as a
    DLPack tensor, as an array of ``ml_dtypes.bfloat16``, or as a uint16 array beside
    ``dtype="bfloat16"``.
Arrays out
    New float32 arrays, or ``out``.  Backward functions return a dict with the gradients' names as
    keys; their ``out`` is a dict, too: an array under a key is used (gradients of parameters are
    ADDED to it, new ones start at zero; gradients of activations overwrite it), and None under a
    key leaves that gradient out where it is documented as optional.
CUDA arrays
    Forward functions take DLPack tensors of one CUDA device, where the build has CUDA operators.
    There activations are float32, bfloat16 or float16, all alike, and weights of products are of
    the same dtype; weights of norms, biases, dt_bias, A_log, D, cosines and sines, and states are
    float32; integers are read in host memory (and copied there). Results are arrays of the same
    library (PyTorch, CuPy), else `mambainllama._core.DeviceArray`, which exports DLPack. Work takes
    its place on the caller's stream, and nobody waits on the host: PyTorch's or CuPy's current
    stream, or ``stream``, a number as in DLPack (1 is the default stream). Where neither says it, a
    call returns when its work is done.
Rows
    Tokens of several sequences are packed one after another along the first axis, without padding.
    ``offsets`` [sequences + 1] tells where each starts, by default one sequence; ``past``
    [sequences] is the number of tokens before these rows; ``boundary`` [sequences] the number of
    tokens folded into the states (see `boundary_after`).
Numbers
    Sums are at least float32.  The result of a row does not depend on its neighbours, on the number
    of rows or on threads, bit for bit; products with ``fast=True`` and gradients of products repeat
    for the same shapes.

Every function raises `mambainllama.ShapeError` (a ValueError), `DtypeError` (a TypeError) or
`ArgumentError` (a ValueError) with a line that names the argument, what was expected and what came.

Examples
--------
>>> import numpy as np
>>> from mambainllama import ops
>>> x = np.ones((2, 4), np.float32)
>>> ops.linear_forward(x, np.eye(3, 4, dtype=np.float32))
array([[1., 1., 1.],
       [1., 1., 1.]], dtype=float32)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from . import _core, interop
from .errors import ArgumentError, DtypeError, ShapeError

__all__ = [
    "TAIL",
    "WINDOW",
    "adamw",
    "add",
    "attention_backward",
    "attention_forward",
    "boundary_after",
    "conv1d_backward",
    "conv1d_forward",
    "embedding_backward",
    "embedding_forward",
    "gather_rows",
    "get_threads",
    "glu_backward",
    "glu_forward",
    "kv_append",
    "linear_backward",
    "linear_forward",
    "linear_group",
    "linear_loss",
    "muon",
    "norm_backward",
    "norm_forward",
    "relative_mse",
    "rope",
    "rope_table",
    "scan_backward",
    "scan_forward",
    "scan_state",
    "set_threads",
    "ssd_backward",
    "ssd_forward",
    "ssd_state",
    "sum_squares",
]

#: A NumPy array, DLPack tensor or buffer; given back as the same library's, else NumPy's.
Array: TypeAlias = Any
#: Whole numbers in host memory: a list, an array, a tensor.
Integers: TypeAlias = Any

#: Tokens in one window of a mixer's state, and rows in its tail (csrc/device.h).
WINDOW = _core.WINDOW
TAIL = _core.TAIL


def set_threads(threads: int) -> None:
    """Set the size of the thread team of every later call; None restores the default.

    The default is OMP_NUM_THREADS, else the cores that this process may use (affinity and container
    quota).
    """
    _core.set_threads(threads)


def get_threads() -> int:
    """Return the size of the thread team."""
    return _core.get_threads()


def _integers(name: str, value: Any, dtype: Any, axes: int = 1) -> np.ndarray | None:
    """`value` as a contiguous integer array; it is small, so converting is worth a copy."""
    if value is None:
        return None
    try:
        array = np.asarray(interop.to_host(value))
    except Exception as error:
        raise DtypeError(f"{name} cannot be read as an array of integers: {error}") from error
    if array.ndim != axes:
        raise ShapeError(f"{name} has {array.ndim} axes; expected {'one' if axes == 1 else axes}")
    if array.dtype.kind not in "iu":
        raise DtypeError(f"{name} has dtype {array.dtype}; expected integers")
    limits = np.iinfo(dtype)
    if array.size and not (limits.min <= int(array.min()) and int(array.max()) <= limits.max):
        raise ArgumentError(f"{name} holds numbers outside {np.dtype(dtype).name}")
    return np.ascontiguousarray(array, dtype=dtype)


def _rows(
    offsets: Integers, past: Integers | None = None, boundary: Integers | None = None
) -> dict[str, np.ndarray | None]:
    return {
        "offsets": _integers("offsets", offsets, np.int64),
        "past": _integers("past", past, np.int64),
        "boundary": _integers("boundary", boundary, np.int64),
    }


# ---- products -----------------------------------------------------------------------------------


def linear_forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    dtype: str | None = None,
    accumulate: bool = False,
    fast: bool = False,
    out: Array | None = None,
    stream: int | None = None,
) -> Array:
    """Compute ``y = x @ weight.T + bias``.

    Parameters
    ----------
    x : float32 [rows, in]
    weight : float32, bfloat16 or float16 [out, in]
        A 16-bit weight rounds x to its type once (unless ``fast``); sums are float32.
    bias : float32 [out], optional
    dtype : "bfloat16" or "float16", optional
        What a uint16 ``weight`` holds.
    accumulate : bool
        Add to ``out`` instead of overwriting it.
    fast : bool
        Training: any order of summation (the BLAS library's), x not rounded.

    Returns
    -------
    float32 [rows, out]
    """
    return _core.linear_forward(
        x=x,
        weight=weight,
        bias=bias,
        dtype=dtype,
        accumulate=accumulate,
        fast=fast,
        out=out,
        stream=stream,
    )


def linear_group(
    x: Array,
    weights: list[Array] | tuple[Array, ...],
    *,
    dtype: str | None = None,
    fast: bool = False,
    stream: int | None = None,
) -> list[Array]:
    """Compute several products of one x in one pass over it: ``[x @ w.T for w in weights]``.

    Parameters are those of `linear_forward`; at most 16 weights. Each result has the same bits as
    alone.
    """
    if isinstance(weights, list):
        weights = tuple(weights)
    group = _core.linear_group(x=x, weights=weights, dtype=dtype, fast=fast, stream=stream)
    return list(group.values())


def linear_backward(
    x: Array,
    weight: Array,
    grad_y: Array,
    *,
    bias: bool = False,
    dtype: str | None = None,
    accumulate: bool = False,
    out: dict[str, Array] | None = None,
) -> dict[str, Array]:
    """Gradients of `linear_forward`: ``grad_x = grad_y @ weight``, ``grad_weight = grad_y.T @ x``.

    Parameters
    ----------
    x : float32 [rows, in]
    weight : float32, bfloat16 or float16 [out, in]
    grad_y : float32 [rows, out]
    bias : bool
        Also return ``grad_bias``, the sum of grad_y over rows.
    accumulate : bool
        Add to ``out["grad_x"]`` instead of overwriting it.

    Returns
    -------
    dict
        grad_x [rows, in], grad_weight [out, in], grad_bias [out]; each optional.
    """
    return _core.linear_backward(
        x=x, weight=weight, grad_y=grad_y, bias=bias, dtype=dtype, accumulate=accumulate, out=out
    )


# ---- norms --------------------------------------------------------------------------------------


def norm_forward(
    x: Array,
    weight: Array | None = None,
    *,
    z: Array | None = None,
    group: int | None = None,
    norm_before_gate: bool = False,
    weight_per_group: bool = False,
    eps: float = 1e-05,
    out: Array | None = None,
    stream: int | None = None,
) -> Array:
    """RMS norm over each group of columns, with an optional gate.

    ``y = u / sqrt(mean(u**2) + eps) * weight`` with ``u = x * silu(z)`` where z is given (Mamba-2),
    or ``u = x`` and ``y *= silu(z)`` afterwards where ``norm_before_gate``.

    Parameters
    ----------
    x : float32 [rows, width]
    weight : float32 [width] or, with ``weight_per_group``, [group]; optional
    z : float32 [rows, width], optional
    group : int
        Columns that are normalised together; divides width. Default: width.

    Returns
    -------
    float32 [rows, width]
        ``out`` may be x.

    References
    ----------
    Zhang & Sennrich 2019, "Root mean square layer normalization"; Dao & Gu 2024, section 7.1
    (gate).
    """
    return _core.norm_forward(
        x=x,
        weight=weight,
        z=z,
        group=group,
        norm_before_gate=norm_before_gate,
        weight_per_group=weight_per_group,
        eps=eps,
        out=out,
        stream=stream,
    )


def norm_backward(
    x: Array,
    weight: Array,
    grad_y: Array,
    *,
    z: Array | None = None,
    group: int | None = None,
    norm_before_gate: bool = False,
    weight_per_group: bool = False,
    eps: float = 1e-05,
    accumulate: bool = False,
    out: dict[str, Array] | None = None,
) -> dict[str, Array]:
    """Gradients of `norm_forward`, whose parameters it takes besides grad_y [rows, width].

    Returns
    -------
    dict
        grad_x [rows, width] (added to ``out["grad_x"]`` where ``accumulate``); grad_z [rows, width]
        where z is given; grad_weight, shaped as weight, where weight is given (optional).
    """
    return _core.norm_backward(
        x=x,
        weight=weight,
        grad_y=grad_y,
        z=z,
        group=group,
        norm_before_gate=norm_before_gate,
        weight_per_group=weight_per_group,
        eps=eps,
        accumulate=accumulate,
        out=out,
    )


# ---- attention ----------------------------------------------------------------------------------


def rope_table(
    inv_freq: Array,
    rows: int | None = None,
    *,
    offsets: Integers | None = None,
    past: Integers | None = None,
    scale: float = 1.0,
    out: Array | None = None,
    stream: int | None = None,
) -> Array:
    """Cosines and sines of ``position * inv_freq``, times scale.

    Parameters
    ----------
    inv_freq : float32 [rotary / 2] or [sequences, rotary / 2]
    rows : int
        Number of tokens; default ``offsets[-1]``.
    scale : float
        Attention factor of YaRN and LongRoPE.
    out : float32 [rows, rotary / 2, 2], optional
        An array of a CUDA device makes the table there; inv_freq stays in host memory.

    Returns
    -------
    float32 [rows, rotary / 2, 2]
        Positions are ``past[s] + i`` for the i-th row of sequence s.

    References
    ----------
    Su et al. 2021, "RoFormer", section 3.2.
    """
    packed = _rows(offsets, past)
    if rows is None and packed["offsets"] is not None and packed["offsets"].size:
        rows = int(packed["offsets"][-1])
    if rows is None:
        raise ArgumentError("rope_table: give rows or offsets")
    return _core.rope_table(
        inv_freq=inv_freq, rows=rows, scale=scale, out=out, stream=stream, **packed
    )


def rope(
    x: Array,
    table: Array,
    *,
    inverse: bool = False,
    out: Array | None = None,
    stream: int | None = None,
) -> Array:
    """Rotate the first ``rotary`` entries of each head, entry i with entry ``i + rotary / 2``.

    Parameters
    ----------
    x : float32 [rows, heads, head_dim]
    table : float32 [rows, rotary / 2, 2]
        Of `rope_table`.
    inverse : bool
        Rotate back; also the backward pass.
    out : float32 [rows, heads, head_dim], optional
        May be x: then nothing is copied.

    Returns
    -------
    float32 [rows, heads, head_dim]
    """
    return _core.rope(x=x, table=table, inverse=inverse, out=out, stream=stream)


def attention_forward(
    q: Array,
    k: Array | None = None,
    v: Array | None = None,
    *,
    caches: Sequence[tuple[Array, Array]] | None = None,
    cache_dtype: str | None = None,
    offsets: Integers | None = None,
    past: Integers | None = None,
    scale: float | None = None,
    window: int = 0,
    log_sum_exp: bool = False,
    out: Array | None = None,
    stream: int | None = None,
) -> Any:
    """Causal attention within each sequence: ``softmax(q k^T * scale) v``.

    Parameters
    ----------
    q : float32 [rows, heads, head_dim]
    k, v : float32 [rows, kv_heads, head_dim]
        Query head i reads key head ``i * kv_heads // heads``.
    caches : list of (k, v), one a sequence, instead of k and v
        Each [capacity, kv_heads, head_dim]; these rows' own keys were appended before
        (`kv_append`).
    cache_dtype : "bfloat16" or "float16", optional
        What uint16 caches hold.
    scale : float
        Default ``1 / sqrt(head_dim)``.
    window : int
        Only the last ``window`` keys, a token's own included; 0 = all.
    log_sum_exp : bool
        Also return the logarithm of each softmax's denominator, for `attention_backward`.

    Returns
    -------
    float32 [rows, heads, head_dim], or a pair of it and float32 [rows, heads]

    References
    ----------
    Vaswani et al. 2017; Ainslie et al. 2023 (grouped queries); Milakov & Gimelshein 2018 (online
    softmax).
    """
    result = _core.attention_forward(
        q=q,
        k=k,
        v=v,
        caches=caches,
        cache_dtype=cache_dtype,
        scale=_attention_scale(q) if scale is None else scale,
        window=window,
        log_sum_exp=log_sum_exp,
        out=out,
        stream=stream,
        **_rows(offsets, past),
    )
    return (result["y"], result["log_sum_exp"]) if log_sum_exp else result


def attention_backward(
    q: Array,
    k: Array,
    v: Array,
    y: Array,
    log_sum_exp: Array,
    grad_y: Array,
    *,
    offsets: Integers | None = None,
    scale: float | None = None,
    window: int = 0,
    out: dict[str, Array] | None = None,
) -> dict[str, Array]:
    """Gradients of `attention_forward` without caches.

    Parameters
    ----------
    q, y, grad_y : float32 [rows, heads, head_dim]
    k, v : float32 [rows, kv_heads, head_dim]
    log_sum_exp : float32 [rows, heads]

    Returns
    -------
    dict
        grad_q, grad_k, grad_v, shaped as q, k and v.

    References
    ----------
    Dao et al. 2022, "FlashAttention", appendix B.
    """
    return _core.attention_backward(
        q=q,
        k=k,
        v=v,
        y=y,
        log_sum_exp=log_sum_exp,
        grad_y=grad_y,
        scale=_attention_scale(q) if scale is None else scale,
        window=window,
        out=out,
        offsets=_integers("offsets", offsets, np.int64),
    )


def _attention_scale(q: Array) -> float:
    shape: tuple[int, ...] = getattr(q, "shape", ())
    return 1.0 if len(shape) == 0 or shape[-1] == 0 else float(shape[-1]) ** -0.5


def kv_append(
    k: Array,
    v: Array,
    caches: Sequence[tuple[Array, Array]],
    *,
    cache_dtype: str | None = None,
    offsets: Integers | None = None,
    past: Integers | None = None,
    stream: int | None = None,
) -> None:
    """Write rows' keys and values into the caches at positions ``past .. past + count``.

    Parameters
    ----------
    k, v : float32 [rows, kv_heads, head_dim]
    caches : list of (k, v), one a sequence
        Each [capacity, kv_heads, head_dim] of float32, bfloat16 or float16; changed in place,
        rounding to nearest even.
    """
    _core.kv_append(
        k=k, v=v, caches=caches, cache_dtype=cache_dtype, stream=stream, **_rows(offsets, past)
    )


# ---- mixers -------------------------------------------------------------------------------------


def boundary_after(past: int, count: int) -> int:
    """Tokens folded into the states after a call of ``count`` rows with ``past`` tokens before.

    A call of more than `WINDOW` rows folds its own whole windows, too; a shorter one leaves all its
    rows in the tail, so that they can be taken back (csrc/device.h).
    """
    folded = past + count if count > WINDOW else past
    return folded - folded % WINDOW


def scan_state(
    inner: int,
    state_dim: int,
    conv_width: int,
    conv_inputs: int,
    *,
    B_groups: int,
    x_repeat: int = 1,
    current: bool = False,
    like: Array | None = None,
) -> dict[str, Array]:
    """Return the empty state of one sequence in one Mamba-1 layer, a dict of float32 arrays at
    zero.

    Keys: state [state_dim, inner], conv [conv_width - 1 + TAIL, conv_inputs], x [TAIL, inner /
    x_repeat], B [TAIL, B_groups, state_dim], dt [TAIL, inner] and, with ``current``, current
    [state_dim, inner] with current_tokens, int64 [1] (on the CPU only). ``like`` is a CUDA array:
    they lie where it does.
    """
    state = {
        "state": interop.zeros((state_dim, inner), like),
        "conv": interop.zeros((conv_width - 1 + TAIL, conv_inputs), like),
        "x": interop.zeros((TAIL, inner // x_repeat), like),
        "B": interop.zeros((TAIL, B_groups, state_dim), like),
        "dt": interop.zeros((TAIL, inner), like),
    }
    if current:
        state["current"] = np.zeros((state_dim, inner), np.float32)
        state["current_tokens"] = np.zeros(1, np.int64)
    return state


def ssd_state(
    heads: int,
    head_dim: int,
    state_dim: int,
    conv_width: int,
    conv_inputs: int,
    *,
    x_heads: int,
    B_groups: int,
    like: Array | None = None,
) -> dict[str, Array]:
    """Return the empty state of one sequence in one Mamba-2 layer, a dict of float32 arrays at
    zero.

    Keys: state [heads, state_dim, head_dim], conv [conv_width - 1 + TAIL, conv_inputs],
    x [TAIL, x_heads, head_dim], B [TAIL, B_groups, state_dim], dt [TAIL, heads]. ``like`` is a CUDA
    array: they lie where it does.
    """
    return {
        "state": interop.zeros((heads, state_dim, head_dim), like),
        "conv": interop.zeros((conv_width - 1 + TAIL, conv_inputs), like),
        "x": interop.zeros((TAIL, x_heads, head_dim), like),
        "B": interop.zeros((TAIL, B_groups, state_dim), like),
        "dt": interop.zeros((TAIL, heads), like),
    }


def conv1d_forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    silu: bool = True,
    repeat: int = 1,
    repeat_group: int = 1,
    offsets: Integers | None = None,
    past: Integers | None = None,
    boundary: Integers | None = None,
    states: Sequence[dict[str, Array]] | None = None,
    out: Array | None = None,
    stream: int | None = None,
) -> Array:
    """Depthwise causal convolution of each sequence, with SiLU.

    ``y[t, c] = silu(bias[c] + sum_j weight[c, j] * x[t - width + 1 + j, source(c)])``; rows before
    the first are zero, or come from ``states``.

    Parameters
    ----------
    x : float32 [rows, channels / repeat]
    weight : float32 [channels, width], 2 to 8 taps
    bias : float32 [channels], optional
    repeat, repeat_group : int
        Grouped heads: each run of ``repeat_group`` inputs is read ``repeat`` times in a row.
    states : list of dict, one a sequence, optional
        Entry "conv" (see `ssd_state`) is read and changed in place.

    Returns
    -------
    float32 [rows, channels]
    """
    return _core.conv1d_forward(
        x=x,
        weight=weight,
        bias=bias,
        silu=silu,
        repeat=repeat,
        repeat_group=repeat_group,
        states=states,
        out=out,
        stream=stream,
        **_rows(offsets, past, boundary),
    )


def conv1d_backward(
    x: Array,
    weight: Array,
    grad_y: Array,
    *,
    bias: Array | None = None,
    silu: bool = True,
    repeat: int = 1,
    repeat_group: int = 1,
    offsets: Integers | None = None,
    out: dict[str, Array] | None = None,
) -> dict[str, Array]:
    """Gradients of `conv1d_forward` without states, besides its parameters grad_y [rows, channels].

    Returns
    -------
    dict
        grad_x [rows, channels / repeat]; grad_weight [channels, width] and, where bias is given,
        grad_bias [channels] (both optional).
    """
    return _core.conv1d_backward(
        x=x,
        weight=weight,
        bias=bias,
        grad_y=grad_y,
        silu=silu,
        repeat=repeat,
        repeat_group=repeat_group,
        out=out,
        offsets=_integers("offsets", offsets, np.int64),
    )


def scan_forward(
    x: Array,
    dt: Array,
    B: Array,
    C: Array,
    *,
    A_log: Array,
    D: Array,
    dt_bias: Array,
    z: Array | None = None,
    dt_bias_scale: float = 1.0,
    dt_min: float = 0.0,
    dt_max: float = float("inf"),
    x_repeat: int = 1,
    x_repeat_group: int = 1,
    offsets: Integers | None = None,
    past: Integers | None = None,
    boundary: Integers | None = None,
    states: Sequence[dict[str, Array]] | None = None,
    out: Array | None = None,
    stream: int | None = None,
) -> Array:
    """Mamba-1's selective scan.

    For channel c and state n, with ``A = -exp(A_log)``::

        dt_t = clamp(softplus(dt[t, c] + dt_bias_scale * dt_bias[c]), dt_min, dt_max)
        H_t  = exp(dt_t * A[c, n]) * H_{t-1} + dt_t * x[t, c] * B[t, g(c), n]
        y_t  = sum_n C[t, g'(c), n] * H_t[n] + D[c] * x[t, c],  times silu(z[t, c]) where z is given

    Parameters
    ----------
    x : float32 [rows, inner / x_repeat]
    dt : float32 [rows, inner]
        Before bias and softplus.
    B : float32 [rows, B_groups, state_dim]
        Channel c reads group ``c * B_groups // inner``; inner is a multiple of B_groups.
    C : float32 [rows, C_groups, state_dim]
    A_log : float32 [inner, state_dim]
    D, dt_bias : float32 [inner]
    z : float32 [rows, inner], optional
    x_repeat, x_repeat_group : int
        Grouped heads: each run of ``x_repeat_group`` channels of x is read ``x_repeat`` times in a
        row.
    states : list of dict, one a sequence, optional
        As `scan_state` makes them; changed in place.

    Returns
    -------
    float32 [rows, inner]

    References
    ----------
    Gu & Dao 2023, "Mamba", section 3.2 and algorithm 2.
    """
    return _core.scan_forward(
        x=x,
        dt=dt,
        B=B,
        C=C,
        A_log=A_log,
        D=D,
        dt_bias=dt_bias,
        z=z,
        dt_bias_scale=dt_bias_scale,
        dt_min=dt_min,
        dt_max=dt_max,
        x_repeat=x_repeat,
        x_repeat_group=x_repeat_group,
        states=states,
        out=out,
        stream=stream,
        **_rows(offsets, past, boundary),
    )


def scan_backward(
    x: Array,
    dt: Array,
    B: Array,
    C: Array,
    grad_y: Array,
    *,
    A_log: Array,
    D: Array,
    dt_bias: Array,
    z: Array | None = None,
    dt_bias_scale: float = 1.0,
    dt_min: float = 0.0,
    dt_max: float = float("inf"),
    x_repeat: int = 1,
    x_repeat_group: int = 1,
    offsets: Integers | None = None,
    out: dict[str, Array] | None = None,
) -> dict[str, Array]:
    """Gradients of `scan_forward` without states, besides its parameters grad_y [rows, inner].

    Returns
    -------
    dict
        grad_x, grad_dt, grad_B, grad_C and, where z is given, grad_z, shaped as the inputs;
        grad_dt_bias [inner], grad_A_log [inner, state_dim] and grad_D [inner] (optional).
    """
    return _core.scan_backward(
        x=x,
        dt=dt,
        B=B,
        C=C,
        grad_y=grad_y,
        A_log=A_log,
        D=D,
        dt_bias=dt_bias,
        z=z,
        dt_bias_scale=dt_bias_scale,
        dt_min=dt_min,
        dt_max=dt_max,
        x_repeat=x_repeat,
        x_repeat_group=x_repeat_group,
        out=out,
        offsets=_integers("offsets", offsets, np.int64),
    )


def ssd_forward(
    x: Array,
    dt: Array,
    B: Array,
    C: Array,
    *,
    A_log: Array,
    D: Array,
    dt_bias: Array,
    dt_min: float = 0.0,
    dt_max: float = float("inf"),
    offsets: Integers | None = None,
    past: Integers | None = None,
    boundary: Integers | None = None,
    states: Sequence[dict[str, Array]] | None = None,
    out: Array | None = None,
    stream: int | None = None,
) -> Array:
    """Mamba-2's state space recurrence in its dual form, window by window.

    For head h, with ``A = -exp(A_log[h])``::

        dt_t = clamp(softplus(dt[t, h] + dt_bias[h]), dt_min, dt_max)
        H_t  = exp(dt_t * A) * H_{t-1} + dt_t * outer(x_t, B_t)
        y_t  = H_t @ C_t + D[h] * x_t

    Parameters
    ----------
    x : float32 [rows, x_heads, head_dim]
        Head h reads head ``h * x_heads // heads``; heads is a multiple of x_heads.
    dt : float32 [rows, heads]
        Before bias and softplus.
    B : float32 [rows, B_groups, state_dim]
        Head h reads group ``h * B_groups // heads``; heads is a multiple of B_groups.
    C : float32 [rows, C_groups, state_dim]
    A_log, D, dt_bias : float32 [heads]
    states : list of dict, one a sequence, optional
        As `ssd_state` makes them; changed in place.

    Returns
    -------
    float32 [rows, heads, head_dim]

    References
    ----------
    Dao & Gu 2024, "Transformers are SSMs", section 6.
    """
    return _core.ssd_forward(
        x=x,
        dt=dt,
        B=B,
        C=C,
        A_log=A_log,
        D=D,
        dt_bias=dt_bias,
        dt_min=dt_min,
        dt_max=dt_max,
        states=states,
        out=out,
        stream=stream,
        **_rows(offsets, past, boundary),
    )


def ssd_backward(
    x: Array,
    dt: Array,
    B: Array,
    C: Array,
    grad_y: Array,
    *,
    A_log: Array,
    D: Array,
    dt_bias: Array,
    dt_min: float = 0.0,
    dt_max: float = float("inf"),
    offsets: Integers | None = None,
    out: dict[str, Array] | None = None,
) -> dict[str, Array]:
    """Gradients of `ssd_forward` without states, besides its parameters grad_y [rows, heads,
    head_dim].

    Returns
    -------
    dict
        grad_x, grad_dt, grad_B, grad_C, shaped as the inputs; grad_dt_bias, grad_A_log, grad_D
        [heads] (optional).
    """
    return _core.ssd_backward(
        x=x,
        dt=dt,
        B=B,
        C=C,
        grad_y=grad_y,
        A_log=A_log,
        D=D,
        dt_bias=dt_bias,
        dt_min=dt_min,
        dt_max=dt_max,
        out=out,
        offsets=_integers("offsets", offsets, np.int64),
    )


# ---- MLP, embedding, elementwise ----------------------------------------------------------------


def glu_forward(
    gate: Array,
    up: Array | None = None,
    *,
    activation: str = "silu",
    out: Array | None = None,
    stream: int | None = None,
) -> Array:
    """Compute ``y = act(gate) * up``, or ``act(gate)`` without up.

    Parameters
    ----------
    gate, up : float32 [rows, width]
    activation : {"silu", "gelu", "gelu_tanh", "relu", "relu2"}

    Returns
    -------
    float32 [rows, width]
        ``out`` may be gate.

    References
    ----------
    Shazeer 2020, "GLU variants improve Transformer".
    """
    return _core.glu_forward(gate=gate, up=up, activation=activation, out=out, stream=stream)


def glu_backward(
    gate: Array,
    up: Array,
    grad_y: Array,
    *,
    activation: str = "silu",
    out: dict[str, Array] | None = None,
) -> dict[str, Array]:
    """Gradients of `glu_forward`: a dict of grad_gate and, with up, grad_up, all [rows, width]."""
    return _core.glu_backward(gate=gate, up=up, grad_y=grad_y, activation=activation, out=out)


def embedding_forward(
    tokens: Integers,
    table: Array,
    *,
    scale: float = 1.0,
    dtype: str | None = None,
    out: Array | None = None,
    stream: int | None = None,
) -> Array:
    """Look up ``table[tokens] * scale``.

    Parameters
    ----------
    tokens : integers [rows], each in ``0 .. vocab - 1``
    table : float32, bfloat16 or float16 [vocab, hidden]

    Returns
    -------
    float32 [rows, hidden]
    """
    tokens = _integers("embedding_forward: tokens", tokens, np.int32)
    return _core.embedding_forward(
        tokens=tokens, table=table, scale=scale, dtype=dtype, out=out, stream=stream
    )


def embedding_backward(
    tokens: Integers,
    grad_y: Array,
    vocab: int,
    *,
    scale: float = 1.0,
    out: dict[str, Array] | None = None,
) -> dict[str, Array]:
    """Gradient of `embedding_forward`: a dict of grad_table [vocab, hidden], summed in row order.

    Parameters
    ----------
    tokens : integers [rows]
    grad_y : float32 [rows, hidden]
    vocab : int
    """
    tokens = _integers("embedding_backward: tokens", tokens, np.int32)
    return _core.embedding_backward(tokens=tokens, grad_y=grad_y, vocab=vocab, scale=scale, out=out)


def add(x: Array, y: Array, *, out: Array | None = None, stream: int | None = None) -> Array:
    """Compute ``x + y`` of float32 [rows, width]; ``out`` may be y."""
    return _core.add(x=x, y=y, out=out, stream=stream)


def gather_rows(
    x: Array, index: Integers, *, out: Array | None = None, stream: int | None = None
) -> Array:
    """Compute ``x[index]``: rows of float32 [rows, width] by integers [count] below rows."""
    index = _integers("gather_rows: index", index, np.int64)
    return _core.gather_rows(x=x, index=index, out=out, stream=stream)


# ---- losses and optimizer -----------------------------------------------------------------------


def linear_loss(
    x: Array,
    weight: Array,
    *,
    teacher_x: Array | None = None,
    teacher_weight: Array | None = None,
    labels: Integers | None = None,
    row_weight: Array | None = None,
    kl_weight: float | None = None,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    scale: float = 1.0,
    direction: str = "forward",
    mix: float = 0.5,
    top_tokens: Integers | None = None,
    top_logprobs: Array | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab: int | None = None,
    dtype: str | None = None,
    teacher_dtype: str | None = None,
    gradients: bool = True,
    out: dict[str, Array] | None = None,
) -> dict[str, Any]:
    """Output product and distillation loss in one, without an array of all logits.

    With s and t the softmax of student's and teacher's logits over temperature, for each row r::

        kl_r = sum t (log t - log s)   ("forward")   or   sum s (log s - log t)   ("reverse")
               or   mix KL(t || m) + (1 - mix) KL(s || m),  m = mix t + (1 - mix) s   ("jsd")
        ce_r = -log softmax(student logits)[labels[r]]   where labels[r] >= 0, at temperature 1
        loss = scale * sum_r row_weight[r] * (kl_weight * temperature**2 * kl_r + ce_weight * ce_r)

    Parameters
    ----------
    x : float32 [rows, hidden]
        After the final norm; ``logits = logit_scale * x @ weight.T``.
    weight : float32, bfloat16 or float16 [vocab or more, hidden]
    teacher_x : float32 [rows, teacher_hidden], optional
    teacher_weight : float32, bfloat16 or float16 [vocab or more, teacher_hidden]
    labels : integers [rows], negative = none; optional
    row_weight : float32 [rows], optional
        A row of weight 0 is left out; weights may be negative.
    top_tokens, top_logprobs : int32 [rows, k] and float32 [rows, k + 1], optional
        In a teacher's place: its likeliest tokens and their log-probabilities, the last column of
        all other tokens together. s and t are then distributions over k + 1 buckets.
    kl_weight : float
        Default 1 with a teacher, else 0.
    vocab : int
        Rows of the weights beyond it are padding and are left out. Default: all rows of weight.
    gradients : bool
        False: evaluate only.

    Returns
    -------
    dict
        kl, ce, teacher_ce (sums of ``row_weight * value``, unscaled), kl_rows, ce_rows (sums of
        row_weight over the rows that counted), agree, correct (the same over rows whose argmax is
        the teacher's, the label); and the gradients of ``loss``: grad_x [rows, hidden], grad_weight
        as weight (both optional).

    References
    ----------
    Hinton et al. 2015, "Distilling the knowledge in a neural network" (temperature).
    Agarwal et al. 2024, "On-policy distillation of language models", equation 1 (jsd).
    """
    return _core.linear_loss(
        x=x,
        weight=weight,
        teacher_x=teacher_x,
        teacher_weight=teacher_weight,
        labels=_integers("linear_loss: labels", labels, np.int32),
        row_weight=row_weight,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        scale=scale,
        direction=direction,
        mix=mix,
        top_tokens=_integers("linear_loss: top_tokens", top_tokens, np.int32, axes=2),
        top_logprobs=top_logprobs,
        logit_scale=logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        vocab=vocab,
        dtype=dtype,
        teacher_dtype=teacher_dtype,
        gradients=gradients,
        out=out,
    )


def relative_mse(
    x: Array, target: Array, *, weight: float = 1.0, out: dict[str, Array] | None = None
) -> dict[str, Any]:
    """Mean squared error relative to the target's mean square, with its gradient.

    Returns a dict: value = ``sum |x - target|^2 / sum |target|^2``, and grad_x [rows, width], to
    which ``weight * d value / d x`` is ADDED (optional).
    """
    return _core.relative_mse(x=x, target=target, weight=weight, out=out)


def adamw(
    master: Array,
    grad: Array,
    m: Array,
    v: Array,
    *,
    step: int,
    learning_rate: float,
    weight: Array | None = None,
    dtype: str | None = None,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-08,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
) -> None:
    """One step of AdamW, in place.

    With ``g = grad * grad_scale`` and t = step::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        master -= learning_rate * (m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps) +
        weight_decay * master) weight = round(master)

    Parameters
    ----------
    master, m, v : float32, any one shape, C-contiguous
        Changed in place.
    grad : float32
    weight : bfloat16 or float16, optional
        The rounded copy that the model computes with.
    step : int
        Counts from 1.

    References
    ----------
    Loshchilov & Hutter 2019, "Decoupled weight decay regularization".
    """
    _core.adamw(
        master=master,
        grad=grad,
        m=m,
        v=v,
        weight=weight,
        dtype=dtype,
        step=step,
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
    )


def muon(
    master: Array,
    grad: Array,
    m: Array,
    *,
    learning_rate: float,
    momentum: float = 0.95,
    parts: Array | None = None,
    weight: Array | None = None,
    dtype: str | None = None,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
) -> None:
    """One step of Muon on a matrix, in place: its Nesterov momentum made orthogonal.

    With five Newton-Schulz steps for ``orthogonal`` and ``g = grad * grad_scale``::

        m = momentum * m + g
        X = orthogonal(g + momentum * m)
        master -= learning_rate * (0.2 * sqrt(max(rows, columns)) * X + weight_decay * master)

    Parameters
    ----------
    master, m : float32 [rows, columns], C-contiguous
        Changed in place.
    grad : float32 [rows, columns]
    parts : int64 [parts], optional
        Rows of unlike projections that the matrix stacks; each is made orthogonal on its own.
    weight : bfloat16 or float16 [rows, columns], optional
        The rounded copy that the model computes with.

    References
    ----------
    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the update's
    scale is from Liu et al. 2025, "Muon is scalable for LLM training" (arXiv 2502.16982),
    section 2.2.
    """
    _core.muon(
        master=master,
        grad=grad,
        m=m,
        learning_rate=learning_rate,
        momentum=momentum,
        parts=parts,
        weight=weight,
        dtype=dtype,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
    )


def sum_squares(x: Array) -> float:
    """Sum of the squares of float32 x (any shape, C-contiguous), in float64."""
    return _core.sum_squares(x=x)
