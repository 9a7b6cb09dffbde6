"""Fitting a mixer to the attention that it replaces, in closed form: no gradients, no steps.

A layer is fitted on the teacher's own activations: u, what the layer's norm hands to its mixer, and
Y, what its attention gave.  The teacher's residual stream is carried along layer by layer, so one
pass over the calibration tokens serves all layers.  Four things make a mixer nearer to attention
than the transferred weights alone:

1. Levels.  softmax is positive and sums to one; a mixer's kernel C.B is neither.  The rows of x, B
   and C are brought to a common size, and constants are added (through the convolution's bias, or
   along the direction in which the inputs are near 1): silu is then nearly linear, the kernel
   mostly positive, like 1 + q.k of the exponential, and, for Mamba-2, x carries a constant by which
   the gated norm divides, which is softmax's denominator.
2. Step sizes.  exp(q.k) = exp(mean q.k) exp((q - mean q).k): the first factor depends on the key
   alone, so it is a step size, dt = softplus(mean q.k + bias).
3. The gate.  Much of an attention's output depends on the current token alone, and the least
   squares from the mixer's features F and u together, Y ~ F V + u T, says how much.  The features
   have a level m (their means), so a gate that moves by dz moves a feature by r m dz to first
   order, r = silu'(2) / silu(2): the rows Q of dz = Q u with V' diag(r m) Q = T' put u T into the
   features themselves.  One such step of limited size: more of them, or larger ones, come nearer
   before training (0.6 and 1.2 below), but leave a student that learns less from it.
4. The output product.  Ridge regression from the features to Y, towards the transferred weights:

       W = W0 + (F'F + lambda mean(diag F'F) I)^-1 F'(Y - F W0).

The weaker or stronger form of 2 is chosen by the error that is left.  Products of a batch are
float32, their sums float64: memory does not grow with the number of tokens but for the stream, its
successor and the targets.  The time is a few passes of the mixers, and for wide models the products
F'F, 2 inner^2 multiplications a token.

With 32,768 tokens, KL before training on a small teacher: half attention 3.5 -> 0.7, none 4.5 ->
1.3 (docs/quality.md).

Source for the view of softmax as a normalised kernel: Katharopoulos et al. 2020 (2006.16236).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _core
from .calibrate import batches, check_finite, constant_direction
from .dtypes import to_float32

__all__ = ["Fitter"]

_RIDGE = 0.1  # of the mean eigenvalue: output product and gate
_RIDGE_JOINT = 1e-3  # features and inputs together
_LEVEL = 1.0  # constant of x, where its values have size _SIZE
_SIZE = 0.8
_KERNEL_LEVEL = 0.5  # of B and C, where they have size _KERNEL_SIZE
_KERNEL_SIZE = 0.6
_GATE_STEPS = 1
_GATE_SPREAD = 0.6  # a gate's standard deviation from one such step, at most
_LOGIT_SPREAD = 2.0  # of the step sizes' logits, at most
_IMPORTANCE = (0.0, 0.5, 1.0)  # strengths of step 2 that are tried
_TRIAL_TOKENS = 8_192  # on so many tokens
# silu'(2) / silu(2): the calibrated gate is near 2.
_GATE_SLOPE = 0.6192

_EMBEDDING, _FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"


class Fitter:
    """Carries the teacher's stream from layer to layer, and fits the mixers of those it is told.

    Parameters
    ----------
    core
        The teacher.
    tokens, offsets
        Calibration sequences, packed.
    """

    def __init__(self, core: _core.Model, tokens: np.ndarray, offsets: np.ndarray):
        self.core, self.config, self.offsets = core, core.config, offsets
        table = core.parameters()[_EMBEDDING]
        rows = to_float32(table[tokens], core.dtypes()[_EMBEDDING])
        self.stream = rows * np.float32(self.config.get("embedding_scale", 1.0))
        self.layer = 0

    def enter(self, number: int) -> np.ndarray:
        """Runs the teacher through layer `number`; returns the direction on which u is near 1."""
        while self.layer <= number:
            arrays, dtypes = _layer_arrays(self.core, self.layer)
            layer = self.config["layers"][self.layer]
            self.input, self.stream = self.stream, np.empty_like(self.stream)
            self.target = np.empty_like(self.stream) if self.layer == number else None
            square = np.zeros((self.config["hidden"], self.config["hidden"]))
            total = np.zeros(self.config["hidden"])
            kinds = ("hidden",) if self.target is None else ("hidden", "normed", "mixer")
            for rows, found in run_layer(self.config, layer, arrays, dtypes, self.input,
                                         self.offsets, kinds):  # fmt: skip
                self.stream[rows] = found[0]
                if self.target is not None:
                    square += found[1].T @ found[1]
                    total += found[1].sum(axis=0, dtype=np.float64)
                    self.target[rows] = found[2]
            self.layer += 1
        check_finite(number, total, square, self.target)
        count = len(self.stream)
        self.inputs = Inputs(square / count, total / count)
        return constant_direction(self.inputs.square, self.inputs.mean)

    def fit(
        self, layer: Mapping, start: Mapping[str, np.ndarray], attention: Mapping
    ) -> dict[str, np.ndarray]:
        """The tensors of the mixer that replaces the layer entered last.

        Parameters
        ----------
        layer
            The mixer's canonical configuration.
        start
            Its calibrated start: float32 tensors by suffix, not changed.
        attention
            The float32 arrays of the attention, by suffix.
        """
        old = self.config["layers"][self.layer - 1]
        norm = self.core.parameters()[f"model.layers.{self.layer - 1}.input_layernorm.weight"]
        norm = np.asarray(norm, np.float32)
        few = Problem(self, layer, norm, every=max(1, len(self.stream) // self.trial_tokens))
        prepared = [self.prepare(layer, start, attention, old, s) for s in _IMPORTANCE]
        trials = [few.solve(tensors, gate=True).error for tensors in prepared]
        chosen = prepared[int(np.argmin(trials))]
        whole = Problem(self, layer, norm)
        best = whole.solve(chosen, gate=True)
        plain = whole.solve(_copies(start), gate=False)
        return (plain if plain.error < best.error else best).tensors

    @property
    def trial_tokens(self) -> int:
        """How many tokens tell one strength from another."""
        return max(_TRIAL_TOKENS, 4 * self.config["hidden"])

    def prepare(
        self,
        layer: Mapping,
        start: Mapping[str, np.ndarray],
        attention: Mapping,
        old: Any,
        strength: float,
    ) -> dict[str, np.ndarray]:
        """A copy of the start with levels and step sizes."""
        tensors = _copies(start)
        logits = strength * _key_logits(attention, old, self.inputs)
        prepare = _prepare_mamba1 if layer["mixer"] == "mamba1" else _prepare_mamba2
        prepare(tensors, layer, attention, self.inputs, logits)
        return tensors


def _copies(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Float32 copies, as the core wants them."""
    return {name: np.array(array, np.float32, order="C") for name, array in tensors.items()}


@dataclass(frozen=True)
class Inputs:
    """Moments of a layer's normed inputs u: E[u u^T] [hidden, hidden] and E[u] [hidden]."""

    square: np.ndarray
    mean: np.ndarray

    def size(self, weight: np.ndarray) -> float:
        """Root mean square of weight . u, over rows and tokens."""
        weight = weight.astype(np.float64)
        return float(np.sqrt(max(0.0, np.vdot(weight @ self.square, weight)) / len(weight)))

    def spread(self, weight: np.ndarray) -> np.ndarray:
        """Standard deviation of weight . u for each row."""
        weight = weight.astype(np.float64)
        square = np.einsum("ij,ij->i", weight @ self.square, weight)
        return np.sqrt(np.maximum(0.0, square - (weight @ self.mean) ** 2))


# ---- running one layer ---------------------------------------------------------------------------


def run_layer(
    config: Mapping,
    layer: Mapping,
    arrays: Mapping[str, np.ndarray],
    dtypes: Mapping[str, str],
    stream: np.ndarray,
    offsets: np.ndarray,
    kinds: Sequence[str],
    every: int = 1,
) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """(rows, captured arrays) of one layer that runs alone on a residual stream [tokens, hidden].

    A model of one layer, whose embeddings are the stream's rows. Takes one batch of so many.
    """
    ones = np.ones(config["hidden"], np.float32)
    for begin, end in list(batches(offsets))[::every]:
        rows = slice(int(offsets[begin]), int(offsets[end]))
        x = np.ascontiguousarray(stream[rows])
        alone = {
            **config, "layers": [dict(layer)], "vocab": len(x), "tied": True, "embedding_scale": 1.0
        }  # fmt: skip
        core = _core.Model(
            alone,
            {**arrays, _EMBEDDING: x, _FINAL_NORM: ones},
            {**dtypes, _EMBEDDING: "float32", _FINAL_NORM: "float32"},
        )
        _, found = core.forward(
            np.arange(len(x), dtype=np.int32),
            offsets[begin : end + 1] - offsets[begin],
            rows="none",
            capture=[(kind, 0) for kind in kinds],
            fast=True,
        )
        yield rows, found


def _layer_arrays(core: _core.Model, number: int) -> tuple[dict, dict]:
    """A layer's arrays and dtypes, named as of layer 0."""
    prefix, dtypes = f"model.layers.{number}.", core.dtypes()
    names = [name for name in core.parameters() if name.startswith(prefix)]
    new = [f"model.layers.0.{name.removeprefix(prefix)}" for name in names]
    arrays = core.parameters()
    return (
        {to: arrays[name] for to, name in zip(new, names, strict=True)},
        {to: dtypes[name] for to, name in zip(new, names, strict=True)},
    )


# ---- least squares -------------------------------------------------------------------------------


@dataclass
class Sums:
    """Second moments of features F [tokens, inner], inputs u and targets Y [tokens, hidden]."""

    FF: np.ndarray
    FU: np.ndarray
    FY: np.ndarray
    UU: np.ndarray
    UY: np.ndarray
    YY: float
    mean: np.ndarray  # of the features
    count: int  # tokens

    def error(self, W: np.ndarray) -> float:
        """|F W - Y|^2 / |Y|^2."""
        found = self.YY - 2 * np.vdot(W, self.FY) + np.vdot(W, self.FF @ W)
        return float(found / max(self.YY, np.finfo(float).tiny))


@dataclass(frozen=True)
class Found:
    """A fitted mixer and the share of Y that it misses."""

    error: float
    tensors: dict[str, np.ndarray]


class Problem:
    """The least-squares problem of one layer."""

    def __init__(self, fitter: Fitter, layer: Mapping, norm: np.ndarray, every: int = 1):
        self.fitter, self.norm, self.every = fitter, norm, every
        self.layer = {**layer, "intermediate": 0}
        # UU, UY, YY and the count: no mixer changes them.
        self.fixed: tuple[np.ndarray, np.ndarray, float, int] | None = None

    def sums(self, tensors: Mapping[str, np.ndarray]) -> Sums:
        """Moments of the mixer's features, as it stands."""
        inner, hidden = self.layer["inner"], self.fitter.config["hidden"]
        FF, FU, FY = (np.zeros((inner, n)) for n in (inner, hidden, hidden))
        UU, UY = np.zeros((2, hidden, hidden))
        mean, YY, count = np.zeros(inner), 0.0, 0
        for F, u, Y in self.run(tensors):
            FF += F.T @ F
            FU += F.T @ u
            FY += F.T @ Y
            mean += F.sum(axis=0, dtype=np.float64)
            if self.fixed is None:
                UU += u.T @ u
                UY += u.T @ Y
                YY += float(np.vdot(Y, Y))
                count += len(Y)
        self.fixed = self.fixed or (UU, UY, YY, count)
        UU, UY, YY, count = self.fixed
        return Sums(FF, FU, FY, UU, UY, YY, mean / count, count)

    def run(self, tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[np.ndarray, ...]]:
        """Batches of (features, inputs, targets) of a mixer with these tensors."""
        arrays = {f"model.layers.0.mamba.{name}": array for name, array in tensors.items()}
        arrays["model.layers.0.input_layernorm.weight"] = self.norm
        for rows, (F, u) in run_layer(
            self.fitter.config,
            self.layer,
            arrays,
            dict.fromkeys(arrays, "float32"),
            self.fitter.input,
            self.fitter.offsets,
            ("features", "normed"),
            self.every,
        ):
            yield F, u, self.fitter.target[rows]

    def solve(self, tensors: dict[str, np.ndarray], gate: bool) -> Found:
        """Fits the output product, and the gate before it; the best of the steps on the way."""
        tensors = dict(tensors)
        sums = self.sums(tensors)
        if gate and self.layer["mixer"] == "mamba1":
            _level_mamba1(tensors, sums)
            sums = self.sums(tensors)
        prior = tensors["out_proj.weight"].T.astype(np.float64)
        if gate:
            prior *= _best_scale(sums, prior)
        best = Found(np.inf, tensors)
        for step in range(_GATE_STEPS + 1 if gate else 1):
            if step > 0:
                tensors = dict(tensors)
                self.move_gate(tensors, sums, prior)
                sums = self.sums(tensors)
            W = prior + _ridge(sums.FF, sums.FY - sums.FF @ prior, _RIDGE)
            error = sums.error(W)
            if error < best.error:
                fitted = np.ascontiguousarray(W.T, np.float32)
                best = Found(error, {**tensors, "out_proj.weight": fitted})
        return best

    def move_gate(self, tensors: dict, sums: Sums, prior: np.ndarray) -> None:
        """Adds to the gate's rows what puts the least-squares part of u into the features."""
        inner = len(sums.FF)
        X = np.block([[sums.FF, sums.FU], [sums.FU.T, sums.UU]])
        weak = _RIDGE_JOINT * np.repeat(
            [np.trace(sums.FF) / inner, np.trace(sums.UU) / len(sums.UU)], [inner, len(sums.UU)]
        )
        start = np.concatenate([prior, np.zeros_like(sums.UU)])
        both = np.concatenate([sums.FY, sums.UY])
        found = start + _solve(X + np.diag(weak), both - X @ start)
        slopes = (found[:inner] * (_GATE_SLOPE * sums.mean)[:, None]).T  # [hidden, inner]
        Q = _ridge(slopes.T @ slopes, slopes.T @ found[inner:].T, _RIDGE)
        spread = np.sqrt(np.maximum(0.0, np.einsum("ij,ij->i", Q @ sums.UU, Q)) / sums.count)
        Q *= np.minimum(1, _GATE_SPREAD / np.maximum(spread, 1e-30))[:, None]
        name = "in_proj_z.weight" if self.layer["mixer"] == "mamba1" else "in_proj.weight"
        tensors[name] = tensors[name].copy()
        tensors[name][:inner] += Q.astype(np.float32)


def _ridge(square: np.ndarray, right: np.ndarray, weight: float) -> np.ndarray:
    """(square + weight * mean(diag) I)^-1 right."""
    count = len(square)
    return _solve(square + weight * np.trace(square) / count * np.eye(count), right)


def _solve(square: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A solution of a positive semidefinite system, also where nothing was seen (all zeros)."""
    try:
        return np.linalg.solve(square, right)
    except np.linalg.LinAlgError:
        return np.linalg.lstsq(square, right, rcond=None)[0]


def _best_scale(sums: Sums, W: np.ndarray) -> float:
    """s >= 0 with |s F W - Y| least."""
    square = np.vdot(W, sums.FF @ W)
    return max(0.0, float(np.vdot(W, sums.FY) / square)) if square > 0 else 1.0


# ---- levels and step sizes -----------------------------------------------------------------------


def _key_logits(attention: Mapping, old: Mapping, inputs: Inputs) -> np.ndarray:
    """Rows [heads, hidden] whose product with a key's u is the mean query's logit of that key.

    Without RoPE, as everything that is transferred.
    """
    heads, kv_heads, width = old["heads"], old["kv_heads"], old["head_dim"]
    q = attention["q_proj.weight"].astype(np.float64)
    k = attention["k_proj.weight"].astype(np.float64)
    mean = q @ inputs.mean + attention.get("q_proj.bias", 0.0)
    mean = mean.reshape(heads, width)
    k = k.reshape(kv_heads, width, -1)
    if "q_norm.weight" in attention:
        q_sizes = [inputs.size(part) for part in q.reshape(heads, width, -1)]
        mean *= attention["q_norm.weight"] / np.maximum(q_sizes, 1e-6)[:, None]
    if "k_norm.weight" in attention:
        k_sizes = np.maximum([inputs.size(part) for part in k], 1e-6)[:, None, None]
        k = k * attention["k_norm.weight"][:, None] / k_sizes
    k = k.repeat(heads // kv_heads, axis=0)
    rows = np.einsum("hp,hpd->hd", mean, k) * old.get("attention_scale", width**-0.5)
    return rows * np.minimum(1, _LOGIT_SPREAD / np.maximum(inputs.spread(rows), 1e-30))[:, None]


def _resize(weight: np.ndarray, bias: np.ndarray | None, inputs: Inputs, size: float) -> None:
    """Brings rows, and the convolution's bias behind them, to a root mean square of `size`."""
    now = inputs.size(weight)
    if now > 0 and np.isfinite(now):
        weight *= np.float32(size / now)
        if bias is not None:
            bias *= np.float32(size / now)


def _prepare_mamba2(
    tensors: dict[str, np.ndarray],
    layer: Mapping,
    attention: Mapping,
    inputs: Inputs,
    logits: np.ndarray,
) -> None:
    """Levels and step sizes of a Mamba-2 mixer, in place."""
    inner, narrow = layer["inner"], layer["x_width"]
    rows, bias = tensors["in_proj.weight"], tensors["conv1d.bias"]
    x, B, C, dt = np.split(rows[inner:], np.cumsum([narrow, narrow, inner]))
    parts = np.split(bias, [narrow, 2 * narrow])
    for part, part_bias, size in zip(
        (x, B, C), parts, (_SIZE, _KERNEL_SIZE, _KERNEL_SIZE), strict=True
    ):
        _resize(part, part_bias, inputs, size)
    bias[:narrow] += np.float32(_LEVEL)
    bias[narrow:] += np.float32(_KERNEL_LEVEL)
    dt += logits.astype(np.float32)
    tensors["dt_bias"] -= (logits @ inputs.mean).astype(np.float32)


def _prepare_mamba1(
    tensors: dict[str, np.ndarray],
    layer: Mapping,
    attention: Mapping,
    inputs: Inputs,
    logits: np.ndarray,
) -> None:
    """The same for Mamba-1, whose B and C have no convolution: their levels lie along the constant
    direction."""
    from .convert import _group_order

    inner, narrow, n = layer["inner"], layer["x_width"], layer["state_dim"]
    constant = constant_direction(inputs.square, inputs.mean).astype(np.float32)
    _resize(tensors["in_proj_x.weight"], tensors["conv1d.bias"], inputs, _SIZE)
    tensors["conv1d.bias"] += np.float32(_LEVEL)
    for name in ("B_proj.weight", "C_proj.weight"):
        _resize(tensors[name], None, inputs, 1.0)
        tensors[name] += constant
    if not logits.any():
        return
    width = attention["head_dim"]
    heads = _group_order(inner, narrow, width, n) // width  # of each channel
    left, sizes, right = np.linalg.svd(logits[heads], full_matrices=False)
    rank = min(layer["dt_rank"], len(sizes))
    root = np.sqrt(sizes[:rank])
    weight, down = np.zeros((inner, layer["dt_rank"])), np.zeros((layer["dt_rank"], len(constant)))
    weight[:, :rank], down[:rank] = left[:, :rank] * root, root[:, None] * right[:rank]
    tensors["dt_proj.weight"] = weight.astype(np.float32)
    tensors["dt_proj_down.weight"] = down.astype(np.float32)
    # The layout adds the bias twice.
    tensors["dt_proj.bias"] -= 0.5 * (weight @ (down @ inputs.mean)).astype(np.float32)


def _level_mamba1(tensors: dict[str, np.ndarray], sums: Sums) -> None:
    """Without a norm behind it the scan's output can have any size: B and C are made smaller, or
    larger, until the features' root mean square is 1, as Mamba-2's norm makes it."""
    size = np.sqrt(np.trace(sums.FF) / (len(sums.FF) * sums.count))
    if not (size > 0 and np.isfinite(size)):
        return
    for name in ("B_proj.weight", "C_proj.weight"):
        tensors[name] = tensors[name] / np.float32(np.sqrt(size))
    tensors["D"] = tensors["D"] / np.float32(size)
