"""Tiny random checkpoints of every family, as files that others wrote them would be.

Nothing of the package is used: names and shapes are spelled out here a second time, so that a
mistake in families.py cannot hide. Weights are drawn so that every part matters: norms away from 1,
biases away from 0, decays and steps over their whole range.
"""

import json
import math
import struct
from pathlib import Path

import numpy as np

VOCAB, HIDDEN, LAYERS = 97, 48, 3

_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DENSE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    **_SPECIAL,
}
_PURE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "expand": 2,
    "conv_kernel": 4,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    **_SPECIAL,
}
_FACTORS = [1.0, 1.3, 1.6, 1.9]  # one for each of the four rotated pairs
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": _FACTORS,
    "long_factor": [4 * factor for factor in _FACTORS],
}
_YARN_OPTIONS = {
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "mscale": 0.7,
    "mscale_all_dim": 0.4,
    "truncate": False,
}


def _dense(model_type, **keys):
    return {"model_type": model_type, **_DENSE, **keys}


def _pure(model_type, **keys):
    return {"model_type": model_type, **_PURE, **keys}


def _old_rope(theta=10000.0, **scaling):
    return _dense("llama", rope_theta=theta, rope_scaling=scaling or None)


def _new_rope(theta=10000.0, **parameters):
    return _dense(
        "llama", rope_parameters={"rope_type": "default", "rope_theta": theta, **parameters}
    )


#: Name of a case -> config.json.
CONFIGS = {
    "llama": _dense("llama"),
    "llama-mha": _dense("llama", num_key_value_heads=6),
    "llama-tied": _dense("llama", tie_word_embeddings=True),
    "llama-head-dim": _dense("llama", head_dim=16),
    "llama-bias": _dense("llama", attention_bias=True, mlp_bias=True),
    "llama-gelu": _dense("llama", hidden_act="gelu"),
    "llama-gelu-tanh": _dense("llama", hidden_act="gelu_pytorch_tanh"),
    "llama-relu2": _dense("llama", hidden_act="relu2"),
    "llama-partial": _dense(
        "llama", partial_rotary_factor=0.5
    ),  # which transformers does not look at
    "rope-default-old": _old_rope(500000.0),
    "rope-default-new": _new_rope(500000.0),
    "rope-linear-old": _old_rope(20000.0, type="linear", factor=3.0),
    "rope-linear-new": _new_rope(20000.0, rope_type="linear", factor=3.0),
    "rope-dynamic-old": _old_rope(type="dynamic", factor=2.0),
    "rope-dynamic-new": _new_rope(rope_type="dynamic", factor=4.0),
    "rope-yarn-old": _old_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    "rope-yarn-new": _new_rope(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=16, **_YARN_OPTIONS
    ),
    "rope-longrope-old": _old_rope(**_LONGROPE, original_max_position_embeddings=32),
    "rope-longrope-new": _new_rope(**_LONGROPE, original_max_position_embeddings=24, factor=8.0),
    "rope-llama3-old": _old_rope(500000.0, **_LLAMA3, original_max_position_embeddings=16),
    "rope-llama3-new": _new_rope(1000.0, **_LLAMA3, original_max_position_embeddings=64),
    "mistral": _dense("mistral", sliding_window=None),
    "mistral-window": _dense("mistral", sliding_window=7),
    "ministral": _dense(
        "ministral",
        head_dim=8,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen2": _dense("qwen2", tie_word_embeddings=True),
    "qwen2-window": _dense("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": _dense("qwen3", head_dim=12),
    "qwen3-bias": _dense("qwen3", head_dim=8, attention_bias=True),
    "smollm3": _dense("smollm3", no_rope_layer_interval=2),
    "smollm3-list": _dense("smollm3", no_rope_layers=[0, 1, 1]),
    "mamba": _pure("mamba", state_size=8),
    "mamba-tied": _pure(
        "mamba", state_size=5, tie_word_embeddings=True, time_step_rank=7, use_bias=True
    ),
    "mamba-no-conv-bias": _pure("mamba", state_size=16, use_conv_bias=False, conv_kernel=3),
    "falcon_mamba": _pure("falcon_mamba", state_size=8, mixer_rms_eps=1e-3),
    "mamba2": _pure("mamba2", state_size=16, num_heads=6, head_dim=16, n_groups=1, chunk_size=8),
    "mamba2-groups": _pure(
        "mamba2", state_size=12, num_heads=12, head_dim=8, n_groups=3, chunk_size=16, use_bias=True
    ),
    "mamba2-limit": _pure(
        "mamba2",
        state_size=8,
        num_heads=8,
        head_dim=12,
        n_groups=2,
        time_step_limit=[0.02, 0.4],
        tie_word_embeddings=True,
    ),
    "bamba": _dense(
        "bamba",
        attn_layer_indices=[1],
        mamba_n_heads=12,
        mamba_d_head="auto",
        mamba_n_groups=2,
        mamba_d_state=16,
        mamba_chunk_size=16,
        mamba_expand=2,
    ),
    "jamba": _dense(
        "jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        mamba_d_state=8,
        mamba_expand=2,
        mamba_dt_rank=5,
        use_mamba_kernels=False,
    ),
}


# ---- names and shapes ----------------------------------------------------------------------------


def shapes_of(config, mixers=None):
    """Names and shapes of the tensors that a checkpoint of this config.json holds.

    `mixers` maps the layers that are mixers to their tensors' names and shapes.
    """
    family = config["model_type"]
    if family in ("mamba", "falcon_mamba", "mamba2"):
        shapes = _pure_shapes(config)
    elif family in ("bamba", "jamba"):
        shapes = _mixed_shapes(config)
    else:
        shapes = _dense_shapes(config, mixers or {})
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    return shapes


def _head_dim(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _dense_shapes(config, mixers):
    hidden, width, p = config["hidden_size"], config["intermediate_size"], _head_dim(config)
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        if i in mixers:
            layer.update({f"mamba.{name}": shape for name, shape in mixers[i].items()})
        else:
            layer.update(_attention_shapes(config, p))
        mlp = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        for name, shape in mlp.items():
            layer[f"mlp.{name}_proj.weight"] = shape
            if config.get("mlp_bias"):
                layer[f"mlp.{name}_proj.bias"] = shape[:1]
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def _attention_shapes(config, p):
    hidden, family = config["hidden_size"], config["model_type"]
    wide, narrow = config["num_attention_heads"] * p, config["num_key_value_heads"] * p
    bias = config.get("attention_bias", False)
    layer = {}
    for name, rows in {"q": wide, "k": narrow, "v": narrow}.items():
        layer[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        if bias or family == "qwen2":
            layer[f"self_attn.{name}_proj.bias"] = (rows,)
    layer["self_attn.o_proj.weight"] = (hidden, wide)
    if bias:
        layer["self_attn.o_proj.bias"] = (hidden,)
    if family == "qwen3":
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (p,)
    return layer


def _pure_shapes(config):
    hidden, width = config["hidden_size"], config["conv_kernel"]
    inner, n = config["expand"] * hidden, config["state_size"]
    if config["model_type"] == "mamba2":
        heads, channels = config["num_heads"], inner + 2 * config["n_groups"] * n
        mixer = {
            "in_proj.weight": (inner + channels + heads, hidden),
            "dt_bias": (heads,),
            "A_log": (heads,),
            "D": (heads,),
            "norm.weight": (inner,),
        }
    else:
        rank, channels = config.get("time_step_rank", math.ceil(hidden / 16)), inner
        mixer = {
            "in_proj.weight": (2 * inner, hidden),
            "x_proj.weight": (rank + 2 * n, inner),
            "dt_proj.weight": (inner, rank),
            "dt_proj.bias": (inner,),
            "A_log": (inner, n),
            "D": (inner,),
        }
    mixer["conv1d.weight"] = (channels, 1, width)
    if config.get("use_conv_bias", True):
        mixer["conv1d.bias"] = (channels,)
    mixer["out_proj.weight"] = (hidden, inner)
    if config.get("use_bias"):
        mixer["in_proj.bias"], mixer["out_proj.bias"] = mixer["in_proj.weight"][:1], (hidden,)
    shapes = {"backbone.embeddings.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        shapes[f"backbone.layers.{i}.norm.weight"] = (hidden,)
        for name, shape in mixer.items():
            shapes[f"backbone.layers.{i}.mixer.{name}"] = shape
    shapes["backbone.norm_f.weight"] = (hidden,)
    return shapes


def _mixed_shapes(config):
    """Llama's blocks with other words for the second half, and original mixers but in layer 1."""
    pure = {
        "model_type": "mamba2" if config["model_type"] == "bamba" else "mamba",
        "vocab_size": 1,
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": 1,
        "conv_kernel": 4,
        "expand": config["mamba_expand"],
        "state_size": config["mamba_d_state"],
        "num_heads": config.get("mamba_n_heads"),
        "n_groups": config.get("mamba_n_groups"),
        "time_step_rank": config.get("mamba_dt_rank"),
    }
    prefix = "backbone.layers.0.mixer."
    mixer = {
        name.removeprefix(prefix): shape
        for name, shape in _pure_shapes(pure).items()
        if name.startswith(prefix)
    }
    if config["model_type"] == "jamba":
        mixer["dt_layernorm.weight"] = (config["mamba_dt_rank"],)
        mixer["b_layernorm.weight"] = mixer["c_layernorm.weight"] = (config["mamba_d_state"],)
    words = {
        "mlp.": "feed_forward.",
        "post_attention_layernorm.": "pre_ff_layernorm.",
        "model.norm.": "model.final_layernorm.",
    }
    shapes = {}
    for name, shape in _dense_shapes(config, {0: mixer, 2: mixer}).items():
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        shapes[name] = shape
    return shapes


def mixer_shapes(config, mixer, ssm_cfg=None):
    """Tensors of one mixer in the published hybrid layout (Wang et al. 2024)."""
    ssm, hidden, p = ssm_cfg or {}, config["hidden_size"], _head_dim(config)
    heads = config["num_attention_heads"]
    inner, narrow = heads * p, config["num_key_value_heads"] * p
    if mixer == "mamba2":
        return {
            "in_proj.weight": (2 * inner + 2 * narrow + heads, hidden),
            "conv1d.weight": (inner + 2 * narrow, 1, 4),
            "conv1d.bias": (inner + 2 * narrow,),
            "dt_bias": (heads,),
            "A_log": (heads,),
            "D": (heads,),
            "norm.weight": (inner,),
            "out_proj.weight": (hidden, inner),
        }
    rank = math.ceil(hidden / 16)
    channels = inner if ssm.get("repeat_kv_before_conv", True) else narrow
    return {
        "in_proj_x.weight": (narrow, hidden),
        "B_proj.weight": (narrow, hidden),
        "C_proj.weight": (inner, hidden),
        "in_proj_z.weight": (inner, hidden),
        "dt_proj_down.weight": (rank, hidden),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "conv1d.weight": (channels, 1, 4),
        "conv1d.bias": (channels,),
        "A_log": (inner, ssm.get("d_state", 16)),
        "D": (inner,),
        "out_proj.weight": (hidden, inner),
    }


def mamba_config(config, mixer, attention_layers, ssm_cfg=None):
    """mamba_config.json of such a hybrid, as the published code writes it."""
    heads, p = config["num_attention_heads"], _head_dim(config)
    ssm = {"expand": 1, **({"ngroups": heads, "d_state": p} if mixer == "mamba2" else {})}
    return {
        "d_model": config["hidden_size"],
        "ssm_cfg": {**ssm, **(ssm_cfg or {})},
        "rms_norm_eps": config["rms_norm_eps"],
        "vocab_size": None,
        "d_inner": heads * p,
        "d_xb": config["num_key_value_heads"] * p,
        "intermediate_size": config["intermediate_size"],
        "hidden_act": config["hidden_act"],
        "n_layer": config["num_hidden_layers"],
        "attn_layers": list(attention_layers),
    }


# ---- values and files ----------------------------------------------------------------------------


def random_tensor(rng, name, shape):
    """float32 values of the size that this part of a model has."""
    if name.endswith("A_log"):
        values = rng.uniform(-2, 2, shape)
    elif name.endswith(("dt_bias", "dt_proj.bias")):
        values = rng.uniform(-4, 1, shape)
    elif name.endswith(("norm.weight", "norm_f.weight", "layernorm.weight")):
        values = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("bias"):
        values = rng.normal(0, 0.3, shape)
    elif "embed" in name or name.endswith(".D"):
        values = rng.normal(0, 1, shape)
    else:
        values = rng.normal(0, 1.2 / math.sqrt(np.prod(shape[1:])), shape)
    return values.astype(np.float32)


def bfloat16_bits(values):
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)


def write_file(path, tensors, dtype="float32"):
    """A safetensors file of float32 arrays, stored in `dtype`."""
    word, cast = {
        "float32": ("F32", lambda value: value.astype(np.float32)),
        "float16": ("F16", lambda value: value.astype(np.float16)),
        "bfloat16": ("BF16", bfloat16_bits),
    }[dtype]
    data = {name: cast(value).tobytes() for name, value in tensors.items()}
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, value in tensors.items():
        end = position + len(data[name])
        shape = list(value.shape)
        header[name] = {"dtype": word, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as writers of such files do: data can be used in place
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data.values()))


def write_checkpoint(folder, config, shapes=None, mamba=None, seed=0, dtype="float32", shards=1):
    """Writes a folder with random weights and returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    if mamba is not None:
        (folder / "mamba_config.json").write_text(json.dumps(mamba))
    rng = np.random.default_rng(seed)
    shapes = shapes or shapes_of(config)
    tensors = {name: random_tensor(rng, name, shape) for name, shape in shapes.items()}
    if shards == 1:
        write_file(folder / "model.safetensors", tensors, dtype)
        return folder
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        write_file(folder / file, {name: tensors[name] for name in part}, dtype)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tiny(folder, case, **options):
    """A checkpoint of one of CONFIGS; options as of `write_checkpoint`."""
    return write_checkpoint(folder, CONFIGS[case], **options)


def tiny_hybrid(
    folder, mixer, attention_layers=(1,), ssm_cfg=None, case="llama-head-dim", **options
):
    """A hybrid of a case whose widths both mixers divide."""
    config = CONFIGS[case]
    replaced = [i for i in range(config["num_hidden_layers"]) if i not in attention_layers]
    shapes = shapes_of(config, dict.fromkeys(replaced, mixer_shapes(config, mixer, ssm_cfg)))
    mamba = mamba_config(config, mixer, attention_layers, ssm_cfg)
    return write_checkpoint(folder, config, shapes, mamba, **options)
