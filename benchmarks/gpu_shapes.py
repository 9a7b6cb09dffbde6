"""Shapes of the models that the GPU benchmarks time, ours and the peers' alike.

Llamas are the published Llama 3 sizes, a hybrid is a Llama whose even layers became mixers with the
teacher's projections in them, and the Mamba models are the published ones.
"""

from __future__ import annotations

LLAMAS = {
    "8b": dict(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, vocab=128256),
    "3b": dict(hidden=3072, layers=28, heads=24, kv_heads=8, intermediate=8192, vocab=128256),
    "1b": dict(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocab=128256),
}
MAMBAS = {
    "mamba-2.8b": ("mamba", dict(hidden=2560, layers=64)),
    "mamba-130m": ("mamba", dict(hidden=768, layers=24)),
    "mamba2-2.7b": ("mamba2", dict(hidden=2560, layers=64)),
    "mamba2-130m": ("mamba2", dict(hidden=768, layers=24)),
}
VOCAB = 50280


def llama_config(hidden, layers, heads, kv_heads, intermediate, vocab) -> dict:
    """config.json."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": hidden < 4096,
    }


def hybrid_config(config: dict, mixer: str) -> dict:
    """mamba_config.json of the hybrid with every other layer attention."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["hidden_size"] // heads
    ssm = {"expand": 1}
    if mixer == "mamba2":
        ssm |= {"ngroups": heads, "d_state": head_dim}
    return {
        "d_model": config["hidden_size"],
        "ssm_cfg": ssm,
        "rms_norm_eps": config["rms_norm_eps"],
        "vocab_size": None,
        "d_inner": heads * head_dim,
        "d_xb": kv_heads * head_dim,
        "intermediate_size": config["intermediate_size"],
        "hidden_act": config["hidden_act"],
        "n_layer": config["num_hidden_layers"],
        "attn_layers": list(range(1, config["num_hidden_layers"], 2)),
    }


def mamba_config(kind: str, hidden: int, layers: int, vocab: int = VOCAB) -> dict:
    """config.json of a Mamba model without anything else."""
    config = {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "state_size": 16 if kind == "mamba" else 128,
        "conv_kernel": 4,
        "expand": 2,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
    }
    if kind == "mamba":
        return {**config, "intermediate_size": 2 * hidden, "time_step_rank": -(-hidden // 16)}
    return {**config, "num_heads": 2 * hidden // 64, "head_dim": 64, "n_groups": 1}


def configs(name: str) -> tuple[dict, dict | None]:
    """config.json and mamba_config.json of "8b", "8b-mamba2", "mamba-2.8b" and so on."""
    if name in MAMBAS:
        kind, sizes = MAMBAS[name]
        return mamba_config(kind, **sizes), None
    size, _, mixer = name.partition("-")
    config = llama_config(**LLAMAS[size])
    return config, hybrid_config(config, mixer) if mixer else None
