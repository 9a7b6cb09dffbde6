"""Conversion: a Transformer becomes a hybrid, its attention layers replaced by Mamba mixers.

Without its softmax, causal attention is a linear recurrence, S_t = S_{t-1} + K_t V_t^T with output
Q_t^T S_t, and a Mamba mixer generalises it.  So the projections carry over (Wang et al. 2024, arXiv
2408.15237, section 3):

    v_proj -> x     k_proj -> B     q_proj -> C     o_proj -> out_proj

What attention does not have is made here: the gate z, the step sizes dt, the decays A, the skip D
and the short convolution.  The norms, the MLP and the residual stream around the mixer are kept.
RoPE and 1 / sqrt(head_dim) are dropped.

Three starts for the new parameters:

paper       as published: everything random or as in a fresh Mamba layer.  dt is log-uniform in
            [1e-3, 1e-1], A is 1 to 16, the convolution and the gate are random.
calibrated  a start at which the mixer already passes its input on, found by measuring (on a small
            teacher it leaves a KL of 3.5 before any training, the published start 7.7).  The
            convolution is near the identity, the gate near a positive constant on the teacher's
            real inputs (see calibrate.py), and the memory is long.
fitted      from there, each mixer is fitted to its attention's output on the teacher's activations,
            in closed form (see fit.py; 0.7 on the same teacher).

Every new tensor has its own random stream, seeded by (seed, layer, name): a layer's start does not
depend on which other layers are converted.

>>> student = mil.convert(model, mixer="mamba2", attention_layers="half",
...                       calibration=tokens)                         # doctest: +SKIP
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from . import _core
from .calibrate import calibration_rows, constant_directions
from .dtypes import from_float32, to_float32
from .errors import ArgumentError, UnsupportedError, shorten
from .families import FAMILIES, Dense, Description, hybrid_config, mamba_layer
from .fit import Fitter
from .model import Model

__all__ = ["INITS", "MIXERS", "attention_choice", "convert"]

MIXERS = ("mamba1", "mamba2")
INITS = ("auto", "paper", "calibrated", "fitted")

_FIT_TOKENS = 262_144  # read at most for init="fitted"
_SHARES = {"all": 1, "half": 2, "quarter": 4, "eighth": 8}


def convert(
    model: Model,
    mixer: str = "mamba2",
    attention_layers: Sequence[int] | str | float = "half",
    init: str = "auto",
    calibration: Any = None,
    seed: int = 0,
) -> Model:
    """A hybrid made from a Transformer; the original is untouched.

    Parameters
    ----------
    model
        A Transformer, or a hybrid some of whose remaining attention layers are to be replaced too
        (its mixers are kept as they are: stepwise conversion).
    mixer
        "mamba1" or "mamba2".
    attention_layers
        The layers that stay attention: their numbers, or a share, "half", "quarter", "eighth",
        "none" or a fraction such as 0.25, spread evenly (every 2nd, 4th, 8th layer, the last of
        each run). "auto:4", "auto:half": as many, chosen by measurement on `calibration`
        (`mil.choose_layers`, which has more ways).
    init
        "paper", "calibrated", "fitted", or "auto": fitted where `calibration` is given, else as
        published.
    calibration
        What the model is to be run on for the calibrated or fitted start: tokens (n, length), a
        list of token lists, or a list of texts; best of the kind that it will be distilled on. The
        calibrated start uses at most 16,384 tokens (or four times the model's width), the fitted
        one what it is given, up to 262,144; it takes about as long as running the model on them a
        few times.
    seed
        Of the new parameters.

    Returns
    -------
    Model
        With its own arrays, in the dtypes of the original's, float32 vectors.

    Raises
    ------
    ArgumentError
        A mixer, layer or calibration that does not fit; the message says why.

    Notes
    -----
    Biases of q, k and v are folded into the convolution's where it covers them (Mamba-2 all three,
    Mamba-1 v's); the published layout has no place for others, nor for the norms of q and k: they
    are dropped.

    For Mamba-1 the calibrated memory is long in the way that measured best: with attention left,
    dt_proj.bias is halved, so that dt starts in [1e-3, 1e-1] although the layout adds the bias
    twice; without any, A_log runs from -4 to 0 over the channel groups, dt_proj.bias is -0.5 and
    dt_proj.weight small; the fitted start takes the first in either case. For Mamba-2, A_log runs
    from -4 to 0 over the heads and dt_bias is -1.
    """
    _check_arguments(model, mixer, init, calibration, seed)
    old = model.core.config
    if isinstance(attention_layers, str) and attention_layers.startswith("auto:"):
        attention_layers = _measured_choice(model, mixer, attention_layers, init, calibration, seed)
    kept = attention_choice(attention_layers, old["layers"])
    _check_convertible(model, mixer, kept)
    return _convert(model, mixer, kept, init, calibration, int(seed), any_attention=bool(kept))


def _measured_choice(
    model: Model, mixer: str, words: str, init: str, calibration: Any, seed: int
) -> list[int]:
    """The layers that "auto:N" means: N of them, or a share, chosen by mil.choose_layers."""
    from .choose import choose_layers

    if calibration is None:
        raise ArgumentError(
            f'convert: attention_layers="{words}" measures the layers: it needs calibration=tokens '
            "(n, length) or texts"
        )
    keep: str | int | float = words.removeprefix("auto:")
    for kind in (int, float):
        try:
            keep = kind(keep)
            break
        except ValueError:
            continue
    return choose_layers(model, calibration, keep, mixer, init=init, seed=seed).layers


def _convert(
    model: Model, mixer: str, kept: Sequence[int], init: str, calibration: Any, seed: int,
    any_attention: bool,
) -> Model:  # fmt: skip
    """`convert` with checked arguments. `any_attention`: whether the student that is started for
    keeps attention layers."""
    old = model.core.config
    replaced = [
        i
        for i in range(len(old["layers"]))
        if i not in kept and old["layers"][i]["mixer"] == "attention"
    ]
    layers = [
        mamba_layer(mixer, layer, old["hidden"]) if i in replaced else dict(layer)
        for i, layer in enumerate(old["layers"])
    ]
    if init == "auto" and calibration is not None:
        init = "fitted"
    calibrated = init in ("calibrated", "fitted")
    if replaced and init == "auto":
        warnings.warn(
            "convert: without calibration the mixers start as published; calibration=tokens (or "
            'texts) starts far closer to the model (init="paper" silences this)',
            stacklevel=2,
        )
    directions, fitter = {}, None
    if init == "fitted" and replaced:
        fitter = Fitter(model.core, *calibration_rows(model, calibration, _FIT_TOKENS))
    elif calibrated and replaced:
        tokens, offsets = calibration_rows(model, calibration)
        directions = constant_directions(model.core, replaced, tokens, offsets)
    start = Start(mixer, seed, calibrated, any_attention or init == "fitted")
    return _build(model, {**old, "layers": layers}, replaced, mixer, start, directions, fitter)


def _check_arguments(model: Any, mixer: Any, init: Any, calibration: Any, seed: Any) -> None:
    """Everything about the arguments that needs no look into the model."""
    if not isinstance(model, Model):
        raise ArgumentError(f"convert: expected a model from mil.load, got {type(model).__name__}")
    if mixer not in MIXERS:
        raise ArgumentError(
            f'convert: mixer {shorten(mixer)} is not known; use "mamba1" or "mamba2"'
        )
    if init not in INITS:
        raise ArgumentError(
            f'convert: init {shorten(init)} is not known; use "auto", "paper", "calibrated" or '
            '"fitted"'
        )
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ArgumentError(f"convert: seed must be an integer from 0 up, got {shorten(seed)}")
    if init in ("calibrated", "fitted") and calibration is None:
        raise ArgumentError(
            f'convert: init="{init}" needs calibration=tokens (n, length) or a list of texts'
        )


def attention_choice(chosen: Sequence[int] | str | float, layers: Sequence[Mapping]) -> list[int]:
    """The numbers of the layers that stay attention, from numbers, a word or a fraction.

    >>> attention_choice("quarter", [{}] * 8)
    [3, 7]
    >>> attention_choice([5, 1], [{}] * 8)
    [1, 5]
    """
    count = len(layers)
    if isinstance(chosen, str):
        if chosen == "none":
            return []
        if chosen not in _SHARES:
            words = ", ".join(['"none"', *(f'"{word}"' for word in _SHARES)])
            raise ArgumentError(
                f"convert: attention_layers {shorten(chosen)} is not known; use layer numbers or "
                f"{words}"
            )
        return list(range(_SHARES[chosen] - 1, count, _SHARES[chosen]))
    if isinstance(chosen, (float, Fraction)):
        if not 0 <= chosen <= 1:
            raise ArgumentError(
                f"convert: attention_layers as a share must be from 0 to 1, got {chosen}"
            )
        wanted = round(chosen * count)
        # The last layer of each of `wanted` equal runs.
        return [(i + 1) * count // wanted - 1 for i in range(wanted)]
    if isinstance(chosen, (int, Mapping)) or not hasattr(chosen, "__iter__"):
        raise ArgumentError(
            f"convert: attention_layers must be a list of layer numbers, got {shorten(chosen)}"
        )
    numbers = list(chosen)
    for number in numbers:
        if (
            isinstance(number, bool)
            or not isinstance(number, (int, np.integer))
            or not 0 <= number < count
        ):
            raise ArgumentError(
                f"convert: attention_layers: {shorten(number)} is not a layer; this model has 0 to "
                f"{count - 1}"
            )
    if len(set(numbers)) != len(numbers):
        raise ArgumentError(f"convert: attention_layers {shorten(numbers)} names a layer twice")
    return sorted(int(number) for number in numbers)


def _check_convertible(model: Model, mixer: str, kept: Sequence[int]) -> None:
    """Whether this model's layers can be replaced by this mixer."""
    if not isinstance(FAMILIES[model.config.model_type], Dense):
        raise UnsupportedError(
            f"convert: a {model.config.model_type} model has mixers of its own; give a Transformer"
        )
    layers = model.core.config["layers"]
    if model.config.mixer is not None:
        if not model.config.attention_layers:
            raise ArgumentError(f"convert: {model!r} has no attention layers left to replace")
        if model.config.mixer != mixer:
            raise ArgumentError(
                f"convert: the model has {model.config.mixer} mixers; mixer must be the same"
            )
        made = [i for i in kept if layers[i]["mixer"] != "attention"]
        if made:
            raise ArgumentError(
                f"convert: layer {made[0]} is a mixer already and cannot stay attention; attention "
                f"layers are {list(model.config.attention_layers)}"
            )
    attention = layers[model.config.attention_layers[0]]
    narrow = attention["kv_heads"] * attention["head_dim"]
    if mixer == "mamba1" and narrow % 16:
        raise UnsupportedError(
            "convert: mamba1 needs kv_heads * head_dim to be a multiple of 16, got "
            f'{attention["kv_heads"]} * {attention["head_dim"]}; use mixer="mamba2"'
        )
    # One mamba_config.json tells the sizes of all mixers, so new ones and old ones must be alike.
    mixers = [layer for layer in layers if layer["mixer"] == mixer]
    published = mamba_layer(mixer, attention, model.config.hidden_size)
    optional = {name for name in model._description.biases if name.startswith("mamba.")}
    if mixers and (optional != {"mamba.conv1d.bias"} or any(old != published for old in mixers)):
        raise UnsupportedError(
            "convert: this hybrid's mixers differ from the published ones (ssm_cfg in "
            "mamba_config.json), and new ones would not; convert the Transformer that it came from"
        )


# ---- the new parameters --------------------------------------------------------------------------


class Start:
    """Makes the parameters of one mixer after another.

    Parameters
    ----------
    mixer
        "mamba1" or "mamba2".
    seed
        Of all streams.
    calibrated
        Whether the start is calibrated, else as published.
    any_attention
        Whether the student keeps attention layers.
    """

    def __init__(self, mixer: str, seed: int, calibrated: bool, any_attention: bool):
        self.mixer, self.seed = mixer, seed
        self.calibrated, self.any_attention = calibrated, any_attention

    def tensors(
        self, number: int, layer: Mapping, hidden: int, attention: Mapping, gate: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """A mixer's parameters (float32) by suffix.

        Parameters
        ----------
        number, layer
            Which layer, and its canonical configuration.
        hidden
            The model's width.
        attention
            The float32 arrays of the attention that it replaces, by suffix ("q_proj.weight", ...).
        gate
            [hidden] direction on which the layer's real inputs are near 1; None without
            calibration.
        """
        make = self._mamba1 if self.mixer == "mamba1" else self._mamba2
        return make(_Streams(self.seed, number), layer, hidden, attention, gate)

    def _mamba1(
        self,
        new: _Streams,
        layer: Mapping,
        hidden: int,
        attention: Mapping,
        gate: np.ndarray | None,
    ) -> dict[str, np.ndarray]:
        inner, narrow, rank, n = (
            layer["inner"],
            layer["x_width"],
            layer["dt_rank"],
            layer["state_dim"],
        )
        q, out = attention["q_proj.weight"], attention["o_proj.weight"]
        if self.calibrated:
            order = _group_order(layer["inner"], narrow, attention["head_dim"], n)
            q, out = q[order], out[:, order]
        conv, conv_bias = self._convolution(new, inner, layer["conv_width"])
        if (
            "v_proj.bias" in attention
        ):  # constant inputs of the convolution: (sum of its taps) * bias
            x_bias = (
                attention["v_proj.bias"].reshape(-1, n).repeat(inner // narrow, axis=0).reshape(-1)
            )
            conv_bias += x_bias * conv.sum(axis=(1, 2))
        dt_weight = new.uniform("dt_proj.weight", (inner, rank), rank**-0.5)
        dt_bias = _inverse_softplus(new.steps("dt_proj.bias", inner))
        A_log = np.tile(np.log(np.arange(1, n + 1, dtype=np.float32)), (inner, 1))
        if self.calibrated and self.any_attention:
            dt_bias *= 0.5  # the layout adds it twice
        elif self.calibrated:
            dt_weight *= 0.1
            dt_bias[:] = -0.5
            A_log[:] = np.linspace(-4, 0, inner // n, dtype=np.float32).repeat(n)[:, None]
        return {
            "in_proj_x.weight": attention["v_proj.weight"],
            "B_proj.weight": attention["k_proj.weight"],
            "C_proj.weight": q,
            "in_proj_z.weight": self._gate(new, inner, hidden, gate),
            "dt_proj_down.weight": new.linear("dt_proj_down.weight", rank, hidden),
            "dt_proj.weight": dt_weight,
            "dt_proj.bias": dt_bias,
            "conv1d.weight": conv,
            "conv1d.bias": conv_bias,
            "A_log": A_log,
            "D": np.ones(inner, np.float32),
            "out_proj.weight": out,
        }

    def _mamba2(
        self,
        new: _Streams,
        layer: Mapping,
        hidden: int,
        attention: Mapping,
        gate: np.ndarray | None,
    ) -> dict[str, np.ndarray]:
        inner, narrow, heads = layer["inner"], layer["x_width"], layer["heads"]
        channels = inner + 2 * narrow
        conv, conv_bias = self._convolution(new, channels, layer["conv_width"])
        if "q_proj.bias" in attention:
            biases = [attention[f"{name}_proj.bias"] for name in "vkq"]  # x, B, C
            conv_bias += np.concatenate(biases) * conv.sum(axis=(1, 2))
        if self.calibrated:
            dt_bias = np.full(heads, -1, np.float32)
            A_log = np.linspace(-4, 0, heads, dtype=np.float32)
        else:
            dt_bias = _inverse_softplus(new.steps("dt_bias", heads))
            A_log = np.log(new.stream("A_log").uniform(1, 16, heads)).astype(np.float32)
        rows = [
            self._gate(new, inner, hidden, gate),
            attention["v_proj.weight"],
            attention["k_proj.weight"],
            attention["q_proj.weight"],
            new.linear("in_proj.dt", heads, hidden),
        ]
        return {
            "in_proj.weight": np.concatenate(rows),
            "conv1d.weight": conv,
            "conv1d.bias": conv_bias,
            "dt_bias": dt_bias,
            "A_log": A_log,
            "D": np.ones(heads, np.float32),
            "norm.weight": np.ones(inner, np.float32),
            "out_proj.weight": attention["o_proj.weight"],
        }

    def _convolution(
        self, new: _Streams, channels: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Taps [channels, 1, width] and bias; the last tap is the current token's."""
        weight = new.uniform("conv1d.weight", (channels, 1, width), width**-0.5)
        bias = new.uniform("conv1d.bias", (channels,), width**-0.5)
        if self.calibrated:
            weight *= 0.1
            weight[:, 0, -1] += 1
            bias[:] = 0
        return weight, bias

    def _gate(
        self, new: _Streams, inner: int, hidden: int, direction: np.ndarray | None
    ) -> np.ndarray:
        """Rows of z. Calibrated: near 2 on real inputs, where silu is 1.76 and sure of its sign."""
        weight = new.linear("z", inner, hidden)
        return weight if direction is None else 0.1 * weight + 2 * direction.astype(np.float32)


def _group_order(inner: int, narrow: int, head_dim: int, state_dim: int) -> np.ndarray:
    """An order of the query channels in which each group of 16 meets the keys that it met in
    attention.

    The Mamba-1 layout repeats each 16 channels of x and B for h/k groups in a row, while a query
    head has head_dim / 16 groups in a row. Where head_dim is larger than 16, plain copying would
    pair query groups with other parts of the keys. The outputs' columns follow in the same order,
    so the layer stays the same function.
    """
    repeat, parts = inner // narrow, head_dim // state_dim
    if head_dim % state_dim or parts == 0:
        return np.arange(inner)
    # [kv head, query head of it, part, channel] -> [kv head, part, query head of it, channel]
    order = np.arange(inner).reshape(-1, repeat, parts, state_dim)
    return order.transpose(0, 2, 1, 3).reshape(-1)


class _Streams:
    """Random numbers for one layer, a stream for each tensor."""

    def __init__(self, seed: int, layer: int):
        self.seed, self.layer = seed, layer

    def stream(self, name: str) -> np.random.Generator:
        return np.random.Generator(
            np.random.Philox(
                np.random.SeedSequence([self.seed, self.layer, zlib.crc32(name.encode())])
            )
        )

    def uniform(self, name: str, shape: tuple[int, ...], bound: float) -> np.ndarray:
        """Uniform in [-bound, bound)."""
        return (self.stream(name).random(shape, np.float32) * 2 - 1) * np.float32(bound)

    def linear(self, name: str, rows: int, columns: int) -> np.ndarray:
        """A fresh linear layer: Kaiming-uniform with a = sqrt(5), so bound 1 / sqrt(columns)."""
        return self.uniform(name, (rows, columns), columns**-0.5)

    def steps(self, name: str, count: int) -> np.ndarray:
        """dt, log-uniform in [1e-3, 1e-1]."""
        dt = np.exp(self.stream(name).uniform(math.log(1e-3), math.log(1e-1), count))
        return np.maximum(dt, 1e-4)


def _inverse_softplus(dt: np.ndarray) -> np.ndarray:
    """What softplus turns into dt, without the cancellation of log(exp(dt) - 1)."""
    return (dt + np.log(-np.expm1(-dt))).astype(np.float32)


# ---- putting the student together ----------------------------------------------------------------


def _build(
    model: Model,
    canonical: dict,
    replaced: Sequence[int],
    mixer: str,
    start: Start,
    directions: Mapping,
    fitter: Fitter | None,
) -> Model:
    """The student: copies of what is kept, new mixers for the rest, made one layer at a time."""
    old, old_dtypes = model.core.parameters(), model.core.dtypes()
    parameters, dtypes = {}, {}
    made: dict[int, dict[str, np.ndarray]] = {}
    for name, shape, is_matrix, _ in _core.Model.parameter_specs(canonical):
        number, suffix = _mixer_part(name)
        if number not in replaced:
            if name in old:
                parameters[name], dtypes[name] = old[name].copy(), old_dtypes[name]
            continue
        if number not in made:
            layer = canonical["layers"][number]
            attention = _attention_arrays(
                old, old_dtypes, number, model.core.config["layers"][number]
            )
            gate = directions.get(number) if fitter is None else fitter.enter(number)
            tensors = start.tensors(number, layer, canonical["hidden"], attention, gate)
            if fitter is not None:
                tensors = fitter.fit(layer, tensors, attention)
            made = {number: tensors}
        if suffix in made[number]:
            value = made[number].pop(suffix)
            assert value.shape == tuple(shape), (name, value.shape, shape)
            dtype = (
                old_dtypes[f"model.layers.{number}.self_attn.q_proj.weight"]
                if is_matrix
                else "float32"
            )
            dtypes[name] = dtype
            # A float32 attention matrix is the model's own array here: the student needs its own.
            parameters[name] = from_float32(np.array(value, np.float32, order="C"), dtype)
    old_description = model._description
    biases = old_description.biases | {"mamba.conv1d.bias"}
    description = Description(
        old_description.model_type, canonical, biases, old_description.file_name
    )
    raw = model.config.raw
    return Model(
        description,
        parameters,
        dtypes,
        raw,
        hybrid_config(canonical, raw, mixer),
        model.companions(),
        name=f"{model.name}-{mixer}" if model.name else "",
        tokenizer=model.tokenizer,
    )


def _mixer_part(name: str) -> tuple[int | None, str]:
    """(layer, suffix) of a name such as model.layers.3.mamba.A_log; (None, "") of all others."""
    parts = name.split(".", 4)
    if len(parts) == 5 and parts[:2] == ["model", "layers"] and parts[3] == "mamba":
        return int(parts[2]), parts[4]
    return None, ""


def _attention_arrays(parameters: Mapping, dtypes: Mapping, number: int, layer: Mapping) -> dict:
    """One layer's attention in float32, by suffix, and its head_dim."""
    prefix = f"model.layers.{number}.self_attn."
    arrays = {
        name.removeprefix(prefix): to_float32(array, dtypes[name])
        for name, array in parameters.items()
        if name.startswith(prefix)
    }
    return {**arrays, "head_dim": layer["head_dim"]}
