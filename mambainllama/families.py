"""Model families: one row each, from a file's words to the canonical configuration and names.

`FAMILIES` is the only place that knows what a `model_type` calls things.  A row says how
config.json is read (`Dense` for Transformers and the hybrids made from them, `Pure` for Mamba
models, `Mixed` for hybrids by design) and how tensors are named in files of this family.
Everything behind it - C core, conversion, training - sees one canonical configuration (a flat dict
whose layers carry the fields of mil_layer_config in csrc/model/model.h) and one set of names, those
of the published hybrid layout:

    model.embed_tokens.weight
    model.layers.N.input_layernorm.weight
    model.layers.N.self_attn.{q,k,v,o}_proj.weight     or   model.layers.N.mamba.*
    model.layers.N.post_attention_layernorm.weight, model.layers.N.mlp.{gate,up,down}_proj.weight
    model.norm.weight, lm_head.weight (absent where tied)

A hybrid is a Transformer's config.json plus mamba_config.json, which says which layers stay
attention and how large the mixers are; whether they are Mamba-1 or Mamba-2 is read from the
tensors.

To add a family: a row here, and a row in tests/tiny_checkpoints.py that makes a tiny random
checkpoint of it, which test_parity.py then holds against transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import FormatError, UnsupportedError, listing, shorten
from .rope import canonical_rope

__all__ = [
    "FAMILIES",
    "Description",
    "Dense",
    "Mixed",
    "Pure",
    "describe",
    "hybrid_config",
    "mamba_layer",
    "match_tensors",
]

# The core's limits (csrc/model/config.c), checked here too before anything is made of that size.
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 4096

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


# ---- reading config.json -------------------------------------------------------------------------


class Keys:
    """Typed access to a JSON object; what is wrong becomes an error naming file, key and value.

    `names` lets one family's keys be asked for by another's words.
    """

    def __init__(self, values: dict, where: str, names: Mapping[str, str] | None = None):
        self.values, self.where, self.names = values, where, names or {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands in the file; null counts as absent."""
        value = self.values.get(self.names.get(key, key))
        return default if value is None else value

    def _fail(self, key: str, expected: str, got: object) -> FormatError:
        key = self.names.get(key, key)
        return FormatError(f"{self.where}: {key}: expected {expected}, got {shorten(got)}")

    def size(
        self, key: str, default: int | None = None, minimum: int = 1, maximum: int = _MAX_SIZE
    ) -> int:
        """An integer from `minimum` to `maximum`; null counts as absent."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise self._fail(key, "an integer", "nothing")
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self._fail(key, f"an integer from {minimum} to {maximum}", value)
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number of at least 0 (an epsilon, a factor); null counts as absent."""
        value = self.get(key)
        if value is None:
            return float(default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or value < 0
        ):
            raise self._fail(key, "a finite number of at least 0", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._fail(key, "true or false", value)
        return value

    def activation(self, key: str = "hidden_act") -> str:
        value = self.get(key, "silu")
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            supported = ", ".join(_ACTIVATIONS)
            raise UnsupportedError(
                f"{self.where}: {key} {shorten(value)} is not supported; these are: {supported}"
            )
        return _ACTIVATIONS[value]

    def list_of(self, key: str, count: int, kind: type, what: str) -> list | None:
        """A list of at least `count` values of a type, cut to `count`; None where absent."""
        value = self.get(key)
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or len(value) < count
            or not all(isinstance(item, kind) for item in value)
        ):
            raise self._fail(key, f"a list of {count} {what}", value)
        return value[:count]


# ---- families ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """What a checkpoint is: canonical configuration, and the tensors that its files should hold."""

    model_type: str
    canonical: dict
    biases: frozenset[str]
    """Suffixes of the optional parameters that the configuration says are there."""
    file_name: Callable[[str], str]
    """From a canonical name to the name in this family's files."""


@dataclass(frozen=True)
class Dense:
    """A Transformer of Llama's shape; the fields are what tells families apart."""

    head_dim: int | None = None
    """Where config.json gives none; None is hidden_size / heads."""
    kv_heads: int | None = None
    """Where config.json gives none; None is one for each head."""
    theta: float = 10000.0
    tied: bool = False
    norm_eps: float = 1e-6
    qkv_bias: bool | None = None
    """None: as `attention_bias` says."""
    o_bias: bool | None = None
    mlp_bias: bool | None = None
    """None: as `mlp_bias` says."""
    qk_norm: bool = False
    window: str = "none"
    """Which layers slide: "none", "all", "typed" (as layer_types says), "switched" (as typed, where
    use_sliding_window is true)."""
    default_window: int | None = None
    no_rope: bool = False
    """no_rope_layers, no_rope_layer_interval."""
    partial_rope: bool = False
    """Whether partial_rotary_factor counts; transformers does not look at it in the others."""

    def describe(self, config: Keys, model_type: str) -> Description:
        hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
        head_dim = config.size("head_dim", self.head_dim or max(1, hidden // heads))
        absent = "num_key_value_heads" not in config.values  # null means one for each head
        kv_heads = config.size("num_key_value_heads", (absent and self.kv_heads) or heads)
        if heads % kv_heads:
            raise FormatError(
                f"{config.where}: num_attention_heads = {heads} is not a multiple of "
                f"num_key_value_heads = {kv_heads}"
            )
        count = config.size("num_hidden_layers", maximum=_MAX_LAYERS)
        rope = canonical_rope(config.values, head_dim, config.where, self.theta, self.partial_rope)
        layer = {
            "mixer": "attention",
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "rotary": rope["rotary"],
            "attention_scale": head_dim**-0.5,
            "intermediate": config.size("intermediate_size"),
            "activation": config.activation(),
            "gated": True,
        }
        windows, rotaries = (
            self._windows(config, count),
            self._rotaries(config, count, rope["rotary"]),
        )
        canonical = {
            "vocab": config.size("vocab_size"),
            "hidden": hidden,
            "tied": config.flag("tie_word_embeddings", self.tied),
            "norm_eps": config.number("rms_norm_eps", self.norm_eps),
            "rope": rope,
            "layers": [
                {**layer, "window": windows[i], "rotary": rotaries[i]} for i in range(count)
            ],
        }
        return Description(model_type, canonical, self._biases(config), lambda name: name)

    def _windows(self, config: Keys, count: int) -> list[int]:
        """Each layer's sliding window, 0 where it sees everything."""
        if self.window == "none" or (
            self.window == "switched" and not config.flag("use_sliding_window", False)
        ):
            return [0] * count
        given = (
            "sliding_window" in config.values
        )  # null means none, absent means the family's default
        window = config.size("sliding_window", 0) if given else self.default_window or 0
        if window == 0 or self.window == "all":
            return [window] * count
        types = config.list_of("layer_types", count, str, "layer types")
        if types is None and self.window == "typed":
            return [window] * count
        if types is None and self.no_rope:
            return [0 if rotary else window for rotary in self._rotaries(config, count, 1)]
        if types is None:
            first = config.size("max_window_layers", 28, minimum=0)
            return [window if i >= first else 0 for i in range(count)]
        unknown = set(types) - {"sliding_attention", "full_attention"}
        if unknown:
            raise UnsupportedError(
                f"{config.where}: layer type {shorten(min(unknown))} is not supported here"
            )
        return [window if kind == "sliding_attention" else 0 for kind in types]

    def _rotaries(self, config: Keys, count: int, rotary: int) -> list[int]:
        """Each layer's rotated size, 0 where it has no RoPE."""
        if not self.no_rope:
            return [rotary] * count
        flags = config.list_of("no_rope_layers", count, int, "numbers 0 or 1")
        if flags is None:
            interval = config.size("no_rope_layer_interval", 4)
            flags = [(i + 1) % interval != 0 for i in range(count)]
        return [rotary if flag else 0 for flag in flags]

    def _biases(self, config: Keys) -> frozenset[str]:
        attention = config.flag("attention_bias", False)
        names = []
        if attention if self.qkv_bias is None else self.qkv_bias:
            names += ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"]
        if attention if self.o_bias is None else self.o_bias:
            names += ["self_attn.o_proj.bias"]
        if config.flag("mlp_bias", False) if self.mlp_bias is None else self.mlp_bias:
            names += ["mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"]
        if self.qk_norm:
            names += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
        return frozenset(names)


@dataclass(frozen=True)
class Pure:
    """A Mamba model in the layout of transformers: mixers only, no MLP, the prefix `backbone.`."""

    mixer: str
    tied: bool
    norms: bool = False
    """Falcon-Mamba: RMS norms without weights on dt, B and C."""

    def describe(self, config: Keys, model_type: str) -> Description:
        layer = _original_mixer(self.mixer, config, self.norms)
        canonical = {
            "vocab": config.size("vocab_size"),
            "hidden": config.size("hidden_size"),
            "tied": config.flag("tie_word_embeddings", self.tied),
            "norm_eps": config.number("layer_norm_epsilon", 1e-5),
            "rope": None,
            "layers": [
                dict(layer) for _ in range(config.size("num_hidden_layers", maximum=_MAX_LAYERS))
            ],
        }
        return Description(model_type, canonical, _mixer_biases(config), _backbone_name)


@dataclass(frozen=True)
class Mixed:
    """A hybrid by design: Llama's blocks, some of whose mixers are original Mamba ones."""

    mixer: str
    attention: Dense
    names: Mapping[str, str]
    """What its config.json calls the keys of `Pure`."""
    layers: Callable[[Keys, int], list[int]]
    """Which layers are attention."""
    rotary: float
    """The part of a head that is rotated; 0: no RoPE."""
    norms: bool = False
    """RMS norms with weights on dt, B and C."""

    def describe(self, config: Keys, model_type: str) -> Description:
        if config.size("num_experts", 1) != 1:
            raise UnsupportedError(
                f"{config.where}: mixtures of experts are not supported (num_experts must be 1)"
            )
        values = {**config.values, "partial_rotary_factor": self.rotary or 1.0}
        base = self.attention.describe(Keys(values, config.where), model_type)
        kept = set(self.layers(config, len(base.canonical["layers"])))
        renamed = Keys(config.values, config.where, self.names)
        mixer = _original_mixer(self.mixer, renamed, self.norms)
        layers = []
        for i, layer in enumerate(base.canonical["layers"]):
            mlp = {key: layer[key] for key in ("intermediate", "activation", "gated")}
            rotary = layer["rotary"] if self.rotary else 0
            layers.append({**layer, "rotary": rotary} if i in kept else {**mixer, **mlp})
        canonical = {**base.canonical, "layers": layers}
        if not self.rotary:
            canonical["rope"] = None
        optional = base.biases | _mixer_biases(renamed)
        if self.norms:
            optional |= {f"mamba.{name}_layernorm.weight" for name in ("dt", "b", "c")}
        return Description(model_type, canonical, optional, _feed_forward_name)


def _original_mixer(kind: str, config: Keys, norms: bool) -> dict:
    """The canonical layer of an original Mamba or Mamba-2 mixer (no MLP)."""
    if config.activation() != "silu":
        raise UnsupportedError(f"{config.where}: hidden_act of a Mamba mixer must be silu")
    hidden = config.size("hidden_size")
    wide = config.number("expand", 2) * hidden
    if not 1 <= wide <= _MAX_SIZE:
        raise FormatError(
            f"{config.where}: expand * hidden_size: expected 1 to {_MAX_SIZE}, got {wide:g}"
        )
    inner = int(wide)
    common = {
        "mixer": kind,
        "inner": inner,
        "x_width": inner,
        "conv_width": config.size("conv_kernel", 4),
    }
    if kind == "mamba1":
        rank = config.get("time_step_rank", "auto")
        return {
            **common,
            "state_dim": config.size("state_size", 16),
            "dt_rank": math.ceil(hidden / 16) if rank == "auto" else config.size("time_step_rank"),
            "B_groups": 1,
            "C_groups": 1,
            "x_proj": True,
            "bcdt_norm": norms,
            "bcdt_eps": config.number("mixer_rms_eps", 1e-6),
            "dt_bias_scale": 1.0,
        }
    heads, groups = config.size("num_heads", 128), config.size("n_groups", 8)
    own = config.get("head_dim", 64)
    head_dim = inner // heads if own == "auto" else config.size("head_dim", 64)
    if heads * head_dim != inner or inner % groups:
        raise FormatError(
            f"{config.where}: Mamba-2 heads: {heads} * {head_dim} must be expand * hidden_size = "
            f"{inner}, a multiple of the {groups} groups"
        )
    dt_min, dt_max = _dt_limits(config, "time_step_limit")
    return {
        **common,
        "heads": heads,
        "head_dim": head_dim,
        "state_dim": config.size("state_size", 128),
        "B_groups": groups,
        "C_groups": groups,
        "norm_group": inner // groups,
        "mixer_norm_eps": config.number("layer_norm_epsilon", 1e-5),
        "dt_min": dt_min,
        "dt_max": dt_max,
    }


def _mixer_biases(config: Keys) -> frozenset[str]:
    names = ["mamba.conv1d.bias"] if config.flag("use_conv_bias", True) else []
    if config.flag("use_bias", False):
        names += ["mamba.in_proj.bias", "mamba.out_proj.bias"]
    return frozenset(names)


def _dt_limits(config: Keys, key: str) -> tuple[float, float]:
    """Limits of dt, (0, inf) where absent."""
    value = config.get(key)
    if value is None:
        return 0.0, math.inf
    if isinstance(value, list):  # JSON has no infinity: newer files wrap it
        value = [math.inf if v == {"__float__": "Infinity"} else v for v in value]
    good = (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, (int, float)) for v in value)
    )
    if not good or not 0 <= value[0] < value[1]:
        raise FormatError(
            f"{config.where}: {key}: expected [minimum, maximum], got {shorten(value)}"
        )
    return float(value[0]), float(value[1])


def _backbone_name(name: str) -> str:
    """Canonical name to that of transformers' Mamba files."""
    if name == "lm_head.weight":
        return name
    name = name.removeprefix("model.")
    name = (
        name.replace("embed_tokens.", "embeddings.")
        .replace("input_layernorm.", "norm.")
        .replace(".mamba.", ".mixer.")
    )
    return "backbone." + ("norm_f.weight" if name == "norm.weight" else name)


def _feed_forward_name(name: str) -> str:
    """Canonical name to that of Bamba and Jamba."""
    if name == "model.norm.weight":
        return "model.final_layernorm.weight"
    name = name.replace(".mlp.", ".feed_forward.")
    return name.replace(".post_attention_layernorm.", ".pre_ff_layernorm.")


def _listed_layers(config: Keys, count: int) -> list[int]:
    """Bamba's attention layers."""
    layers = config.get("attn_layer_indices", [])
    if not isinstance(layers, list) or not all(isinstance(i, int) for i in layers):
        raise FormatError(
            f"{config.where}: attn_layer_indices: expected a list of layers, got {shorten(layers)}"
        )
    return layers


def _periodic_layers(config: Keys, count: int) -> list[int]:
    """Jamba's attention layers."""
    period = config.size("attn_layer_period", 8)
    return list(range(config.size("attn_layer_offset", 4, minimum=0), count, period))


# What Bamba and Jamba call the keys of transformers' mamba and mamba2.
_MIXED_NAMES = {
    "state_size": "mamba_d_state",
    "conv_kernel": "mamba_d_conv",
    "expand": "mamba_expand",
    "time_step_rank": "mamba_dt_rank",
    "num_heads": "mamba_n_heads",
    "head_dim": "mamba_d_head",
    "n_groups": "mamba_n_groups",
    "use_conv_bias": "mamba_conv_bias",
    "use_bias": "mamba_proj_bias",
    "layer_norm_epsilon": "rms_norm_eps",
    "mixer_rms_eps": "rms_norm_eps",
}

FAMILIES: dict[str, Dense | Pure | Mixed] = {
    "llama": Dense(),
    "mistral": Dense(
        kv_heads=8, window="all", default_window=4096, qkv_bias=False, o_bias=False, mlp_bias=False
    ),
    "ministral": Dense(
        kv_heads=8,
        window="typed",
        default_window=4096,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
    ),
    "qwen2": Dense(
        window="switched", default_window=4096, qkv_bias=True, o_bias=False, mlp_bias=False
    ),
    "qwen3": Dense(
        head_dim=128, window="switched", default_window=4096, qk_norm=True, mlp_bias=False
    ),
    "smollm3": Dense(kv_heads=4, theta=2e6, tied=True, window="switched", no_rope=True),
    "mamba": Pure("mamba1", tied=True),
    "falcon_mamba": Pure("mamba1", tied=True, norms=True),
    "mamba2": Pure("mamba2", tied=False),
    "bamba": Mixed(
        "mamba2",
        Dense(kv_heads=8, norm_eps=1e-5, partial_rope=True),
        _MIXED_NAMES,
        _listed_layers,
        rotary=0.5,
    ),
    "jamba": Mixed(
        "mamba1",
        Dense(kv_heads=8, qkv_bias=False, o_bias=False, mlp_bias=False),
        _MIXED_NAMES,
        _periodic_layers,
        rotary=0.0,
        norms=True,
    ),
}

# Other spellings of names that are met in files, as (pattern, replacement).
_ALIASES = [(re.compile(r"^backbone\.embedding\."), "backbone.embeddings.")]

# Buffers that old files store and nobody reads: they are computed.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.attention\.(bias|masked_bias)$")


# ---- hybrids -------------------------------------------------------------------------------------


def mamba_layer(mixer: str, attention: dict, hidden: int, ssm: Keys | None = None) -> dict:
    """The canonical layer in which `attention` is replaced by a mixer of the published hybrid
    layout.

    Parameters
    ----------
    mixer
        "mamba1" or "mamba2".
    attention
        The canonical layer that it replaces: heads, kv_heads, head_dim, and the MLP, which is kept.
    hidden
        The model's width.
    ssm
        `ssm_cfg` of mamba_config.json, whose keys override the defaults.
    """
    ssm = ssm or Keys({}, "ssm_cfg")
    heads, head_dim = attention["heads"], attention["head_dim"]
    inner, narrow = heads * head_dim, attention["kv_heads"] * head_dim
    kept = {key: attention[key] for key in ("intermediate", "activation", "gated")}
    dt_min, dt_max = _dt_limits(ssm, "dt_limit")
    common = {
        **kept,
        "mixer": mixer,
        "inner": inner,
        "x_width": narrow,
        "conv_width": ssm.size("d_conv", 4),
        "dt_min": dt_min,
        "dt_max": dt_max,
    }
    if mixer == "mamba2":
        groups = ssm.size("ngroups", heads)
        if inner % groups:
            raise FormatError(f"{ssm.where}: ngroups = {groups} does not divide d_inner = {inner}")
        state_dim = ssm.size("d_state", inner // groups)
        _check_divides(ssm.where, mixer, narrow, state_dim)
        return {
            **common,
            "heads": groups,
            "head_dim": inner // groups,
            "state_dim": state_dim,
            "B_groups": narrow // state_dim,
            "C_groups": groups,
            "norm_group": inner // groups,
            "mixer_norm_eps": 1e-5,
        }
    state_dim, rank = ssm.size("d_state", 16), ssm.values.get("dt_rank", "auto")
    _check_divides(ssm.where, mixer, narrow, state_dim)
    return {
        **common,
        "state_dim": state_dim,
        "dt_rank": math.ceil(hidden / 16) if rank == "auto" else ssm.size("dt_rank"),
        "B_groups": narrow // state_dim,
        "C_groups": inner // state_dim,
        "repeat_before_conv": ssm.flag("repeat_kv_before_conv", True),
        "dt_bias_scale": 2.0,
    }


def _check_divides(where: str, mixer: str, narrow: int, state_dim: int) -> None:
    if narrow % state_dim:
        raise FormatError(
            f"{where}: {mixer} needs the width of keys and values ({narrow}) to be a multiple of "
            f"its state size ({state_dim})"
        )


def hybrid_config(canonical: dict, config: Mapping, mixer: str) -> dict:
    """mamba_config.json of a hybrid with this canonical configuration, in the published layout."""
    layers = canonical["layers"]
    ssm_cfg: dict[str, object] = {"expand": 1}
    mixers = [layer for layer in layers if layer["mixer"] != "attention"]
    if mixers:
        first = mixers[0]
        inner, narrow = first["inner"], first["x_width"]
        if mixer == "mamba2":
            ssm_cfg.update(ngroups=first["heads"], d_state=first["state_dim"])
    else:
        inner, narrow = (layers[0][key] * layers[0]["head_dim"] for key in ("heads", "kv_heads"))
    return {
        "d_model": canonical["hidden"],
        "ssm_cfg": ssm_cfg,
        "rms_norm_eps": canonical["norm_eps"],
        "vocab_size": None,
        "d_inner": inner,
        "d_xb": narrow,
        "intermediate_size": config.get("intermediate_size", layers[0]["intermediate"]),
        "hidden_act": config.get("hidden_act", "silu"),
        "n_layer": len(layers),
        "attn_layers": [i for i, layer in enumerate(layers) if layer["mixer"] == "attention"],
    }


def _attention_layers(mamba: Keys, count: int) -> list[int]:
    kept = mamba.values.get("attn_layers")
    if not isinstance(kept, list) or not all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < count for i in kept
    ):
        raise FormatError(
            f"{mamba.where}: attn_layers: expected layers from 0 to {count - 1}, got "
            f"{shorten(kept)}"
        )
    return kept


def _make_hybrid(base: Description, mamba: Keys, tensors: Iterable[str]) -> Description:
    """The Transformer's description with its mixers put in, as mamba_config.json says."""
    canonical, layers = base.canonical, base.canonical["layers"]
    expected = {
        "d_model": canonical["hidden"],
        "n_layer": len(layers),
        "vocab_size": canonical["vocab"],
        "intermediate_size": layers[0]["intermediate"],
        "d_inner": layers[0]["heads"] * layers[0]["head_dim"],
        "d_xb": layers[0]["kv_heads"] * layers[0]["head_dim"],
        "rms_norm_eps": canonical["norm_eps"],
    }
    for key, value in expected.items():
        got = mamba.values.get(key)
        if got is not None and got != value:
            raise FormatError(
                f"{mamba.where}: {key}: expected {value} as in config.json, got {shorten(got)}"
            )
    ssm_cfg = mamba.values.get("ssm_cfg") or {}
    if not isinstance(ssm_cfg, dict):
        raise FormatError(f"{mamba.where}: ssm_cfg: expected an object, got {shorten(ssm_cfg)}")
    ssm = Keys(ssm_cfg, f"{mamba.where}: ssm_cfg")
    kept = set(_attention_layers(mamba, len(layers)))
    replaced = [i for i in range(len(layers)) if i not in kept]
    names, biases = set(tensors), set(base.biases)
    if replaced:
        # The two mixers share a configuration file; only their tensors tell them apart for certain.
        prefix = f"model.layers.{replaced[0]}.mamba."
        if f"{prefix}in_proj.weight" in names:
            mixer = "mamba2"
        elif f"{prefix}in_proj_x.weight" in names:
            mixer = "mamba1"
        else:
            mixer = "mamba2" if "ngroups" in ssm_cfg else "mamba1"
        if ssm.flag("conv_bias", True):
            biases.add("mamba.conv1d.bias")
        if mixer == "mamba2" and ssm.flag("bias", False):
            biases |= {"mamba.in_proj.bias", "mamba.out_proj.bias"}
        layers = [
            mamba_layer(mixer, layer, canonical["hidden"], ssm) if i not in kept else layer
            for i, layer in enumerate(layers)
        ]
    return Description(
        base.model_type, {**canonical, "layers": layers}, frozenset(biases), base.file_name
    )


# ---- from a checkpoint to a description ----------------------------------------------------------


def describe(
    config: dict, mamba_config: dict | None, tensors: Iterable[str], where: str
) -> Description:
    """What a checkpoint is, from its configuration files and the names of its tensors.

    Parameters
    ----------
    config, mamba_config
        config.json and mamba_config.json (None where there is none).
    tensors
        The names in its files.
    where
        The folder's name, for messages.

    Raises
    ------
    UnsupportedError
        A model_type, activation or rope type that is not supported; the message lists those that
        are.
    FormatError
        A key that is missing, wrong, or contradicts another.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(
            f"{where}/config.json: model_type {shorten(model_type)} is not supported; these are: "
            f"{', '.join(FAMILIES)}"
        )
    if config.get("quantization_config"):
        raise UnsupportedError(
            f"{where}/config.json: the weights are quantised; use the unquantised checkpoint"
        )
    family = FAMILIES[model_type]
    description = family.describe(Keys(config, f"{where}/config.json"), model_type)
    if mamba_config is None:
        return description
    if not isinstance(family, Dense):
        raise FormatError(
            f"{where}/mamba_config.json: a {model_type} model has no attention layers that it "
            "could replace"
        )
    return _make_hybrid(description, Keys(mamba_config, f"{where}/mamba_config.json"), tensors)


def _family_names(names: Iterable[str], embedding: str) -> dict[str, str]:
    """Name as the family's files have it -> name in these files.

    What transformers saves of a model without its output matrix (LlamaModel, MambaModel) lacks the
    first part of the names.
    """
    files = {}
    for name in names:
        plain = name
        for pattern, replacement in _ALIASES:
            plain = pattern.sub(replacement, plain)
        files[plain] = name
    first, _, rest = embedding.partition(".")
    if embedding in files or rest not in files:
        return files
    return {
        plain if plain == "lm_head.weight" else f"{first}.{plain}": name
        for plain, name in files.items()
    }


def match_tensors(
    description: Description,
    specs: list[tuple[str, tuple[int, ...], bool, bool]],
    shapes: dict[str, tuple[int, ...]],
    where: str,
) -> dict[str, str]:
    """Canonical name -> name in the files, after checking that the files hold exactly what the
    configuration says.

    Parameters
    ----------
    specs
        `_core.Model.parameter_specs` of the canonical configuration.
    shapes
        Of the tensors in the files.
    """
    tied = description.canonical["tied"]
    embedding = description.file_name("model.embed_tokens.weight")
    files = _family_names(shapes, embedding)
    if tied and embedding not in files and "lm_head.weight" in files:
        files[embedding] = files.pop("lm_head.weight")  # one tensor, stored under its other name
    sources, missing, wrong = {}, [], []
    for name, shape, _, required in specs:
        wanted = required or any(name.endswith(suffix) for suffix in description.biases)
        file_name = description.file_name(name)
        if file_name not in files:
            if wanted:
                missing.append(file_name)
            continue
        if wanted:
            source = files.pop(file_name)
            sources[name] = source
            if shapes[source] != tuple(shape):
                wrong.append(f"{source} has shape {list(shapes[source])}, expected {list(shape)}")
    extra = [
        name
        for plain, name in files.items()
        if not _IGNORED.search(plain) and not (tied and plain == "lm_head.weight")
    ]
    if wrong:
        raise FormatError(
            f"{where}: config.json and tensors contradict each other: {listing(wrong, 2)}"
        )
    if missing == ["lm_head.weight"]:
        raise FormatError(
            f"{where}: lm_head.weight is missing, and config.json does not tie it to the "
            "embedding: a model that is stored without its output matrix cannot predict tokens"
        )
    if missing:
        raise FormatError(
            f"{where}: tensors are missing: {listing(missing)}; the download is incomplete or "
            "config.json is another model's"
        )
    if extra:
        raise FormatError(
            f"{where}: tensors that config.json does not account for: {listing(extra)}"
        )
    return sources
