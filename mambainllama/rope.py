"""Rotary position embeddings: from a configuration's words to frequencies.

A head's entries i and i + rotary/2 are turned by the angle position * inv_freq[i], with

    inv_freq[i] = theta^(-2 i / rotary)

in the plain case; the rope types below stretch these frequencies so that a model reads longer texts
than it was trained on.  They are computed here, once, in float32 (powers are rounded to it) and in
the order of operations that transformers uses: at position 100,000 a last bit of a frequency is
0.006 rad, so the same bits matter.  What depends on the length of a sequence (dynamic, longrope) is
chosen in C for each call.

    default   as above
    linear    all frequencies / factor (position interpolation)
    llama3    low frequencies / factor, high ones kept, a smooth ramp between (Llama 3.1)
    yarn      the same idea with a linear ramp over i; cos and sin are scaled (arXiv 2309.00071)
    longrope  a divisor for each frequency, two sets chosen by length (arXiv 2402.13753)
    dynamic   theta grows with the length of the sequence (dynamic NTK)

Settings are read from `rope_parameters` (transformers 5) or from `rope_theta` + `rope_scaling`
(before).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import Error, FormatError, UnsupportedError, shorten

__all__ = ["ROPE_TYPES", "canonical_rope", "rope_settings"]

_F32 = np.float32
_LONGEST = 1 << 40  # tokens: the core's limit of a state


def rope_settings(config: dict, where: str, default_theta: float = 10000.0) -> dict:
    """One flat dict of the RoPE settings in config.json, from its new or its old form.

    It always has `rope_type`, `rope_theta` and `partial_rotary_factor`; the rest is as in the file.
    """
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise FormatError(f"{where}: {key}: expected an object or null, got {shorten(value)}")
    # transformers lets rope_scaling win where a file has both.
    settings = dict(old or new or {})
    if any(isinstance(value, dict) for value in settings.values()):
        raise UnsupportedError(
            f"{where}: rope_parameters differ between layer types; this is not supported"
        )
    settings["rope_type"] = settings.get("rope_type") or settings.get("type") or "default"
    for key, fallback in (("rope_theta", default_theta), ("partial_rotary_factor", 1.0)):
        if settings.get(key) is None:
            value = config.get(key)
            settings[key] = fallback if value is None else value
    # Phi-3 and others keep it outside, and then that one counts.
    if config.get("original_max_position_embeddings") is not None:
        settings["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    if settings.get("original_max_position_embeddings") is None:
        settings["original_max_position_embeddings"] = config.get("max_position_embeddings")
    settings["max_position_embeddings"] = config.get("max_position_embeddings")
    return settings


class _Settings:
    """Typed access to the settings; a missing or wrong one is an error that names it."""

    def __init__(self, settings: dict, where: str):
        self.settings, self.where = settings, where

    def number(self, key: str, default: float | None = None, above: float = 0.0) -> float:
        value = self.settings.get(key)
        if value is None:
            value = default
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or value <= above
        ):
            rope_type = self.settings["rope_type"]
            if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
                rope_type = shorten(rope_type)
            raise FormatError(
                f"{self.where}: rope type {rope_type}: expected {key} > {above:g}, got "
                f"{shorten(value)}"
            )
        return value

    def optional(self, key: str) -> float | None:
        return None if self.settings.get(key) is None else self.number(key)

    def factors(self, key: str, count: int) -> np.ndarray:
        value = self.settings.get(key)
        good = isinstance(value, list) and len(value) == count
        if not good or not all(
            isinstance(f, (int, float)) and math.isfinite(f) and f > 0 for f in value
        ):
            raise FormatError(
                f"{self.where}: rope: expected {key} with {count} numbers > 0, got {shorten(value)}"
            )
        return np.array(value, _F32)


def _exponents(rotary: int) -> np.ndarray:
    """2 i / rotary."""
    return np.arange(0, rotary, 2, dtype=_F32) / _F32(rotary)


def _powers(theta: float, rotary: int) -> np.ndarray:
    """theta ** (2 i / rotary), rounded once: NumPy's own float32 powers are off by up to two last
    bits, by other ones on other processors."""
    return (np.float64(_F32(theta)) ** np.float64(_exponents(rotary))).astype(_F32)


def _plain(theta: float, rotary: int) -> np.ndarray:
    return _F32(1) / _powers(theta, rotary)


def _default(get: _Settings, rotary: int) -> dict:
    return {"inv_freq": _plain(get.number("rope_theta"), rotary)}


def _linear(get: _Settings, rotary: int) -> dict:
    return {"inv_freq": _plain(get.number("rope_theta"), rotary) / _F32(get.number("factor"))}


def _dynamic(get: _Settings, rotary: int) -> dict:
    """Nothing changes up to max_position_embeddings; beyond, C computes theta from the length."""
    if rotary <= 2:
        raise FormatError(
            f"{get.where}: rope type dynamic needs a rotary size above 2, got {rotary}"
        )
    return {
        "inv_freq": _plain(get.number("rope_theta"), rotary),
        "dynamic_factor": float(get.number("factor")),
        "long_after": int(get.number("max_position_embeddings")),
    }


def _llama3(get: _Settings, rotary: int) -> dict:
    factor, low, high = (
        get.number("factor"),
        get.number("low_freq_factor"),
        get.number("high_freq_factor"),
    )
    context = get.number("original_max_position_embeddings")
    if high == low:
        raise FormatError(
            f"{get.where}: rope type llama3: high_freq_factor and low_freq_factor are both "
            f"{low:g}; they must differ"
        )
    inv_freq = _plain(get.number("rope_theta"), rotary)
    # torch divides a number by a tensor as number * (1 / tensor), which rounds twice.
    wavelength = _F32(1) / inv_freq * _F32(2 * math.pi)
    scaled = np.where(wavelength > _F32(context / low), inv_freq / _F32(factor), inv_freq)
    smooth = (_F32(1) / wavelength * _F32(context) - _F32(low)) / _F32(high - low)
    ramp = (_F32(1) - smooth) * scaled / _F32(factor) + smooth * scaled
    medium = ~(wavelength < _F32(context / high)) & ~(wavelength > _F32(context / low))
    return {"inv_freq": np.where(medium, ramp, scaled)}


def _yarn(get: _Settings, rotary: int) -> dict:
    theta, context = get.number("rope_theta"), get.number("original_max_position_embeddings")
    factor = get.optional("factor") or get.number("max_position_embeddings") / context
    scale = get.optional("attention_factor")
    if scale is None:
        numerator, denominator = get.optional("mscale"), get.optional("mscale_all_dim")
        if numerator and denominator:
            scale = _yarn_scale(factor, numerator) / _yarn_scale(factor, denominator)
        else:
            scale = _yarn_scale(factor, 1)
    # The ramp runs over the frequencies that make between beta_fast and beta_slow turns in the old
    # context.
    fast, slow = get.number("beta_fast", 32), get.number("beta_slow", 1)
    if theta == 1:
        raise FormatError(f"{get.where}: rope type yarn: rope_theta must not be 1")

    def index_of(turns: float) -> float:
        return rotary * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index_of(fast), index_of(slow)
    if get.settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary - 1)
    if first == last:
        last += 0.001
    ramp = (np.arange(rotary // 2, dtype=_F32) - _F32(first)) / _F32(last - first)
    keep = _F32(1) - np.clip(ramp, 0, 1)
    powers = _powers(theta, rotary)
    inv_freq = _F32(1) / (_F32(factor) * powers) * (_F32(1) - keep) + _F32(1) / powers * keep
    return {"inv_freq": inv_freq, "scale": float(scale)}


def _yarn_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(get: _Settings, rotary: int) -> dict:
    context = get.number("original_max_position_embeddings")
    factor = get.optional("factor") or get.number("max_position_embeddings") / context
    scale = get.optional("attention_factor")
    if scale is None:
        scale = (
            1.0
            if factor <= 1 or context <= 1
            else math.sqrt(1 + math.log(factor) / math.log(context))
        )
    powers = _powers(get.number("rope_theta"), rotary)
    return {
        "inv_freq": _F32(1) / (get.factors("short_factor", rotary // 2) * powers),
        "long_inv_freq": _F32(1) / (get.factors("long_factor", rotary // 2) * powers),
        "scale": float(scale),
        "long_after": int(context),
    }


ROPE_TYPES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # the first name of longrope, in early Phi-3 files
}


def fixed_until(rope: Mapping[str, Any] | None) -> float:
    """Up to how many tokens of a text its positions do not depend on its length: without end, but
    for LongRoPE and dynamic NTK, whose frequencies are others beyond the trained length. What was
    read before is no beginning of such a longer text.

    Parameters
    ----------
    rope
        The "rope" entry of a canonical configuration, if there is one.
    """
    if rope is None or (rope.get("long_inv_freq") is None and not rope.get("dynamic_factor")):
        return math.inf
    return int(rope["long_after"])


def canonical_rope(
    config: dict, head_dim: int, where: str, default_theta: float = 10000.0, partial: bool = False
) -> dict:
    """The "rope" entry of a canonical configuration (see families.py), from config.json.

    Parameters
    ----------
    config
        config.json as read.
    head_dim
        Size of an attention head.
    where
        The file's name, for messages.
    default_theta
        The family's, where the file gives none.
    partial
        Whether only head_dim * partial_rotary_factor of a head is rotated, as the file says.
    """
    settings = rope_settings(config, where, default_theta)
    get = _Settings(settings, where)
    share = get.number("partial_rotary_factor") if partial else 1
    rotary = min(head_dim * share, 2 * head_dim + 1)
    rotary = int(rotary)  # what is too large stays too large, but has an end
    if rotary % 2 or not 0 < rotary <= head_dim:
        raise FormatError(
            f"{where}: RoPE needs an even rotary size up to head_dim = {head_dim}, got {rotary}"
        )
    kind = settings["rope_type"]
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise UnsupportedError(
            f"{where}: rope type {shorten(kind)} is not supported; these are: "
            f"{', '.join(ROPE_TYPES)}"
        )
    try:
        with np.errstate(all="ignore"):  # a result that is not finite is reported below
            result = ROPE_TYPES[kind](get, rotary)
    except Error:
        raise
    except (ArithmeticError, ValueError) as error:  # logarithms and quotients of extreme numbers
        raise FormatError(
            f"{where}: rope type {kind}: the settings give no frequencies ({error})"
        ) from None
    if result.get("long_after", 0) > _LONGEST:
        raise FormatError(
            f"{where}: rope type {kind}: the trained length, {result['long_after']:g} tokens, is "
            f"above {_LONGEST}"
        )
    rope = {
        "inv_freq": None,
        "long_inv_freq": None,
        "rotary": rotary,
        "scale": 1.0,
        "long_after": 0,
        "theta": float(settings["rope_theta"]),
        "dynamic_factor": 0.0,
        **result,
    }
    for key in ("inv_freq", "long_inv_freq"):
        if rope[key] is not None:
            if not np.isfinite(rope[key]).all():
                raise FormatError(
                    f"{where}: rope type {kind}: the settings give frequencies that are not finite"
                )
            rope[key] = [float(value) for value in rope[key].astype(_F32)]
    return rope
