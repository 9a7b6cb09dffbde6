"""Models of this project with random weights, in the shapes of gpu_shapes.py.

All matrices are parts of one pool of random numbers, which repeats itself: speed does not depend on
them, and making 16 GB of them would take longer than most benchmarks.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from gpu_shapes import configs

from mambainllama import _core
from mambainllama.checkpoint import write_safetensors
from mambainllama.families import Description, describe
from mambainllama.model import Model

POOL = 1 << 26


def random_pool(count: int, dtype: str, random: np.random.Generator) -> np.ndarray:
    """bfloat16 or float16 of magnitude 2^-7 .. 2^-6, random signs and mantissas."""
    pool = random.integers(0, 1 << 16, min(count, POOL), np.uint16)
    if dtype == "bfloat16":
        return np.resize((pool & 0x807F) | 0x3C00, count)
    return np.resize((pool & 0x83FF) | 0x2000, count).view("<f2")


def random_vector(name: str, shape, random: np.random.Generator) -> np.ndarray:
    value = random.random(shape, np.float32)
    if name.endswith("A_log"):
        return np.log(1 + 15 * value)
    if name.endswith(("dt_bias", "dt_proj.bias")):
        return -6 + 4 * value
    return value - np.float32(0.5) if "conv" in name else np.ones(shape, np.float32)


def random_parameters(description: Description, dtype: str = "bfloat16") -> tuple[dict, dict]:
    """Parameters and their dtypes, as `Model` takes them."""
    specs = _core.Model.parameter_specs(description.canonical)
    random = np.random.default_rng(0)
    largest = max(int(np.prod(shape)) for _, shape, _, _ in specs)
    pool = random_pool(largest + 4096, dtype, random)
    parameters, dtypes = {}, {}
    for i, (name, shape, is_matrix, required) in enumerate(specs):
        if is_matrix:
            parameters[name] = pool[i % 4096 :][: int(np.prod(shape))].reshape(shape)
            dtypes[name] = dtype
        elif required or "conv" in name:
            parameters[name] = random_vector(name, shape, random)
            dtypes[name] = "float32"
    return parameters, dtypes


def build(
    name: str,
    device: str = "cuda:0",
    dtype: str = "bfloat16",
    vocab: int | None = None,
    weights: str | None = None,
) -> Model:
    """A model of the given shape. A draft takes the vocabulary of the model that it drafts for;
    `weights` is that of `mil.load`."""
    config, mamba = configs(name)
    if vocab is not None:
        config["vocab_size"] = vocab
    description = describe(config, mamba, [], name)
    parameters, dtypes = random_parameters(description, dtype)
    eight_bits = {"weights": weights} if weights else {}
    return Model(
        description, parameters, dtypes, config, mamba, name=name, device=device, **eight_bits
    )


def write(name: str, folder: str, shards: int = 8) -> int:
    """The same model as a checkpoint of several files, written side by side; its bytes."""
    config, mamba = configs(name)
    description = describe(config, mamba, [], name)
    parameters, dtypes = random_parameters(description)
    place = Path(folder)
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    if mamba:
        (place / "mamba_config.json").write_text(json.dumps(mamba))
    parts: list[dict] = [{} for _ in range(shards)]
    sizes = [0] * shards
    for key, array in parameters.items():
        least = sizes.index(min(sizes))
        parts[least][description.file_name(key)] = array, dtypes[key]
        sizes[least] += array.nbytes
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    with ThreadPoolExecutor(shards) as pool:
        list(
            pool.map(
                lambda pair: write_safetensors(place / pair[0], pair[1]),
                zip(files, parts, strict=True),
            )
        )
    index = {key: file for file, part in zip(files, parts, strict=True) for key in part}
    text = json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": index})
    (place / "model.safetensors.index.json").write_text(text)
    return sum(sizes)
