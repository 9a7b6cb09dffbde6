"""Small models straight from the canonical configuration, with random parameters."""

import numpy as np

from mambainllama import _core
from mambainllama.devices import operator_table
from mambainllama.quantize import coded

ATTENTION = {
    "mixer": "attention",
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "rotary": 8,
    "intermediate": 24,
}
MAMBA1 = {  # as in a Mamba-1 hybrid of the same teacher
    "mixer": "mamba1",
    "inner": 32,
    "state_dim": 4,
    "x_width": 16,
    "B_groups": 4,
    "C_groups": 8,
    "dt_rank": 3,
    "conv_width": 4,
    "dt_bias_scale": 2.0,
    "intermediate": 24,
}
MAMBA2 = {
    "mixer": "mamba2",
    "heads": 4,
    "head_dim": 8,
    "inner": 32,
    "state_dim": 8,
    "x_width": 16,
    "B_groups": 2,
    "C_groups": 4,
    "conv_width": 4,
    "norm_group": 8,
    "intermediate": 24,
}
ORIGINAL_MAMBA1 = {
    "mixer": "mamba1",
    "inner": 48,
    "state_dim": 5,
    "B_groups": 1,
    "C_groups": 1,
    "dt_rank": 3,
    "conv_width": 4,
    "x_proj": True,
}
ORIGINAL_MAMBA2 = {
    "mixer": "mamba2",
    "heads": 6,
    "head_dim": 8,
    "inner": 48,
    "state_dim": 10,
    "B_groups": 2,
    "C_groups": 2,
    "conv_width": 3,
    "norm_group": 48,
}

KINDS = {
    "transformer": [ATTENTION, ATTENTION],
    "window": [{**ATTENTION, "window": 7}, {**ATTENTION, "rotary": 0}],
    "mamba1 hybrid": [MAMBA1, ATTENTION],
    "mamba1 late repeat": [{**MAMBA1, "repeat_before_conv": False}, ATTENTION],
    "mamba2 hybrid": [MAMBA2, ATTENTION],
    "both mixers": [MAMBA2, MAMBA1],
    "mamba1": [ORIGINAL_MAMBA1, ORIGINAL_MAMBA1],
    "falcon mamba": [{**ORIGINAL_MAMBA1, "bcdt_norm": True, "bcdt_eps": 1e-6}],
    "mamba2": [ORIGINAL_MAMBA2, ORIGINAL_MAMBA2],
    "gate first": [
        {**ORIGINAL_MAMBA2, "norm_before_gate": True},
        {**ORIGINAL_MAMBA2, "norm_group": 0},
    ],
    "plain mlp": [
        {**ATTENTION, "gated": False, "activation": "relu2"},
        {**MAMBA2, "activation": "gelu_tanh"},
    ],
}


def configuration(layers, *, vocab=61, hidden=32, tied=True, **changes):
    """The canonical configuration of these layers."""
    rope = {"rotary": 8, "inv_freq": [1.0, 0.3, 0.1, 0.02]}
    config = {"vocab": vocab, "hidden": hidden, "tied": tied, "norm_eps": 1e-5, "rope": rope}
    return {**config, "layers": [dict(layer) for layer in layers], **changes}


def random_parameters(config, seed=0, *, biases=True):
    """name -> float32 array: values large enough that every parameter matters."""
    rng = np.random.default_rng(seed)
    parameters = {}
    for name, shape, is_matrix, required in _core.Model.parameter_specs(config):
        if not required and not biases:
            continue
        value = rng.standard_normal(shape)
        if name.endswith("A_log"):
            value = 0.5 * value
        elif name.endswith("norm.weight"):
            value = 1 + 0.2 * value
        elif name.endswith("mamba.D"):
            value = 1 + 0.3 * value
        elif "dt" in name.rsplit(".", 2)[-2] + name.rsplit(".", 1)[-1] and not is_matrix:
            value = -1 + 0.5 * value
        elif is_matrix:
            value = value / np.sqrt(shape[-1]) if "embed" not in name else 0.5 * value
        else:
            value = 0.4 * value
        parameters[name] = value.astype(np.float32)
    return parameters


def to_bfloat16(array):
    """The bit patterns (uint16) of float32 values rounded to nearest even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def build(layers, *, seed=0, dtype="float32", biases=True, device="cpu", weights=None, **changes):
    """A _core.Model of these layers with random parameters; matrices in `dtype`, or of them in the
    8 bits of `weights`."""
    config = configuration(layers, **changes)
    specs = _core.Model.parameter_specs(config)
    matrices = {name for name, _, is_matrix, _ in specs if is_matrix}
    parameters = random_parameters(config, seed, biases=biases)
    dtypes = {}
    for name in matrices & parameters.keys():
        if dtype == "bfloat16":
            parameters[name], dtypes[name] = to_bfloat16(parameters[name]), "bfloat16"
        else:
            parameters[name] = parameters[name].astype(dtype)
    table, codes = operator_table(device, dtype), coded(specs, parameters, weights)
    return _core.Model(config, parameters, dtypes, table, codes)


def some_tokens(model, count, seed=0):
    return np.random.default_rng(seed).integers(0, model.config["vocab"], count).astype(np.int32)


def relative(a, b):
    """The largest difference, relative to the largest entry of `b`."""
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() / np.abs(b).max()


def rows_alone_and_in_windows(model, state, tokens):
    """Logits of `tokens` after `state`, one by one; windows of them must give the same bits."""
    single = state.copy()
    alone = np.concatenate([model.forward([t], states=[single]) for t in tokens])
    for size in (2, 5, 16):
        window, parts = state.copy(), []
        for at in range(0, len(tokens), size):
            parts.append(model.forward(tokens[at : at + size], states=[window]))
        np.testing.assert_array_equal(np.concatenate(parts), alone)
    return alone
