"""Decoding on a GPU: tokens a second of models in real shapes, against the rate of a copy.

The limit of one step is the bytes that it must read once (weights, and states of the whole batch)
over the rate of a device-to-device copy measured in the same run with PyTorch, counting bytes read
and written. Weights are random; speed does not depend on them.

    python benchmarks/gpu_decode.py [--models 8b-mamba2,1b-mamba2] [--batch 1] [--context 512]
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from gpu_shapes import configs

import mambainllama as mil
from mambainllama import _core
from mambainllama.devices import cuda_devices
from mambainllama.families import describe
from mambainllama.model import Model


def build(name: str, device: str = "cuda:0", dtype: str = "bfloat16") -> Model:
    """A model of the given shape; its matrices share one pool of random numbers on the host."""
    config, mamba = configs(name)
    description = describe(config, mamba, [], name)
    specs = _core.Model.parameter_specs(description.canonical)
    random = np.random.default_rng(0)
    # bfloat16 (or float16) of magnitude 2^-7 .. 2^-6, random signs and mantissas
    largest = max(int(np.prod(shape)) for _, shape, _, _ in specs)
    pool = random.integers(0, 1 << 16, largest + 4096, np.uint16)
    pool = (pool & 0x807F) | 0x3C00 if dtype == "bfloat16" else (pool & 0x83FF) | 0x2000
    parameters, dtypes = {}, {}
    for i, (key, shape, is_matrix, required) in enumerate(specs):
        count = int(np.prod(shape))
        if is_matrix:
            parameters[key] = pool[i % 4096 :][:count].reshape(shape)
            parameters[key] = (
                parameters[key] if dtype == "bfloat16" else parameters[key].view("<f2")
            )
            dtypes[key] = dtype
        elif required or "conv" in key:
            value = random.random(shape, np.float32)
            if key.endswith("A_log"):
                value = np.log(1 + 15 * value)
            elif key.endswith(("dt_bias", "dt_proj.bias")):
                value = -6 + 4 * value
            elif "conv" in key:
                value = value - 0.5
            else:
                value = np.ones(shape, np.float32)
            parameters[key], dtypes[key] = value.astype(np.float32), "float32"
    return Model(description, parameters, dtypes, config, mamba, name=name, device=device)


def copy_rate() -> float:
    """Bytes read and written a second by a device-to-device copy of 2 GiB."""
    import torch

    a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    del a, b
    torch.cuda.empty_cache()
    return 2 * (1 << 31) / float(np.median(times[2:]))


def weight_bytes(model: Model) -> int:
    """Of one step: all matrices but the embedding table, unless it is the output product, too."""
    total = 0
    for name, array in model.core.parameters().items():
        if name != "model.embed_tokens.weight" or model.config.tied:
            total += array.nbytes
    return total


def time_decoding(model, batch, context, tokens, rounds=3, **options) -> dict:
    """Seconds a token of a batch, the best of some rounds, and the last round's statistics."""
    random = np.random.default_rng(1)
    prompts = [random.integers(0, model.config.vocab_size, context).tolist() for _ in range(batch)]
    best, stats = float("inf"), None
    for _ in range(rounds):
        out = mil.generate(
            model, prompts, max_new_tokens=tokens, stop=[], max_batch=batch, **options
        )
        stats = out[0].stats
        best = min(best, max(g.stats.decode_seconds for g in out) / (tokens - 1))
    return {"seconds": best, "prefill": stats.prefill_seconds, "stats": stats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="8b-mamba2,8b-mamba1,3b-mamba2,1b-mamba2,mamba-2.8b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=513)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json")
    options = parser.parse_args()
    rate = copy_rate()
    print(
        f"{cuda_devices()[0]['name']}; copy {rate * 1e-12:.2f} TB/s; mambainllama {mil.__version__}"
    )
    results = []
    for name in options.models.split(","):
        started = time.perf_counter()
        model = build(name, dtype=options.dtype)
        loaded = time.perf_counter() - started
        result = time_decoding(model, options.batch, options.context, options.tokens)
        length = options.context + options.tokens // 2
        weights, state = weight_bytes(model), model.core.state_bytes(length)
        limit = (weights + options.batch * state) / rate
        print(
            f"{name:12s} batch {options.batch} context {options.context}: "
            f"{result['seconds'] * 1e3:.3f} ms a step, "
            f"{options.batch / result['seconds']:.1f} tokens/s, "
            f"{100 * limit / result['seconds']:.1f} % of the copy rate "
            f"(weights {weights * 1e-9:.2f} GB, state {state * 1e-6:.1f} MB); "
            f"prefill {result['prefill']:.3f} s, made in {loaded:.1f} s",
            flush=True,
        )
        results.append({"model": name, **{k: v for k, v in result.items() if k != "stats"}})
        del model
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"copy_rate": rate, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
