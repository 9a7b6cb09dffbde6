"""Decoding and reading prompts on a GPU: models in real shapes, against the rates of this device.

The limit of one step is the bytes that it must read once (weights, and states of the whole batch)
over the rate of a copy within the device, measured in the same run with PyTorch, counting bytes
read and written. A prompt is counted in the flops of its products and of attention, against the
rate of one large product. Weights are random; speed does not depend on them.

    python benchmarks/gpu_decode.py [--models 8b-mamba2] [--batch 1,32] [--context 512,4096]
    python benchmarks/gpu_decode.py --prefill [--models 8b-mamba2] [--batch 8] [--context 2048]
    python benchmarks/gpu_decode.py --queue 320 [--models 8b-mamba2] [--batch 64]

A queue is what evaluations and servers have: texts of all lengths that join the batch as others
leave it, prompts included.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from gpu_models import build
from gpu_peers import copy_rate, product_rate

import mambainllama as mil
from mambainllama import _core
from mambainllama.devices import cuda_devices
from mambainllama.model import Model


def weight_bytes(model: Model, weights: str | None = None) -> int:
    """Of one step: all matrices but the embedding table, unless it is the output product, too. In 8
    bits, a matrix has a code a number and a scale of 4 bytes a row."""
    total = 0
    for name, array in model.core.parameters().items():
        if name != "model.embed_tokens.weight" or model.config.tied:
            eight_bits = weights is not None and array.ndim == 2
            total += array.size + 4 * array.shape[0] if eight_bits else array.nbytes
    return total


def prompt_flops(model: Model, batch: int, length: int) -> float:
    """Of reading `batch` prompts: products of all rows, causal attention, logits of the last rows;
    scans, norms and convolutions are left out."""
    config = model.config
    matrices = sum(
        int(np.prod(shape))
        for name, shape, is_matrix, _ in _core.Model.parameter_specs(model._description.canonical)
        if is_matrix and name not in ("model.embed_tokens.weight", "lm_head.weight")
    )
    pairs = length * (length + 1) / 2
    attention = len(config.attention_layers) * 4 * config.heads * config.head_dim * pairs
    logits = 2 * config.vocab_size * config.hidden_size
    return batch * (2.0 * matrices * length + attention + logits)


def prompts_of(model: Model, batch: int, context: int) -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(0, model.config.vocab_size, context).tolist() for _ in range(batch)]


def read_and_decode(model, batch, context, tokens) -> tuple[float, float]:
    """Seconds of reading prompts, and of a step of the whole batch after them.

    The prompts but for a token each are read into states before: in one call, texts whose prompts
    come early would decode while the later prompts are read, and their time would be mostly that.
    """
    prompts = prompts_of(model, batch, context)
    states = [model.state(context + tokens + 16) for _ in prompts]
    beginnings = [prompt[:-1] for prompt in prompts]
    read = mil.generate(model, beginnings, max_new_tokens=0, states=states, max_batch=batch)
    out = mil.generate(
        model, prompts, max_new_tokens=tokens, stop=[], states=states, max_batch=batch
    )
    seconds = max(g.stats.decode_seconds for g in out) / max(tokens - 1, 1)
    return max(g.stats.prefill_seconds for g in read), seconds


def decode(model, name, batch, context, tokens, rounds, rate, eight_bits=None) -> dict:
    """One row of decoding, with its limit at the mean length of the timed tokens."""
    times = [read_and_decode(model, batch, context, tokens) for _ in range(rounds)]
    prefills, steps = (list(column) for column in zip(*times, strict=True))
    seconds = min(steps)
    length = context + tokens // 2
    weights, state = weight_bytes(model, eight_bits), model.core.state_bytes(length)
    limit = (weights + batch * state) / rate
    return {
        "kind": "decode",
        "model": name,
        "batch": batch,
        "context": context,
        "tokens": tokens,
        **({"weights": eight_bits} if eight_bits else {}),
        "seconds": seconds,
        "all_seconds": steps,
        "prefill_seconds": min(prefills),
        "tokens_per_second": batch / seconds,
        "weight_bytes": weights,
        "state_bytes": state,
        "copy_rate": rate,
        "of_limit": limit / seconds,
        "memory": memory_in_use(),
    }


def prefill(model, name, batch, context, rounds, rate) -> dict:
    """One row of reading prompts; the first round, which loads kernels, is left out."""
    prompts, times = prompts_of(model, batch, context), []
    for _ in range(rounds + 1):
        out = mil.generate(model, prompts, max_new_tokens=1, stop=[], max_batch=batch)
        times.append(max(g.stats.prefill_seconds for g in out))
    seconds = float(np.median(times[1:]))
    flops = prompt_flops(model, batch, context)
    return {
        "kind": "prefill",
        "model": name,
        "batch": batch,
        "context": context,
        "seconds": seconds,
        "all_seconds": times,
        "flops": flops,
        "gemm_rate": rate,
        "of_limit": flops / seconds / rate,
        "memory": memory_in_use(),
    }


def queue(model, name, batch, count, rounds) -> dict:
    """One row of `count` texts that go through a batch: prompts of 20 to 400 tokens, answers of 50
    to 500. The first round, which loads kernels, is left out."""
    random = np.random.default_rng(2)
    prompts = [
        random.integers(0, model.config.vocab_size, length).tolist()
        for length in random.integers(20, 401, count)
    ]
    wanted = random.integers(50, 501, count).tolist()
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        out = mil.generate(model, prompts, max_new_tokens=wanted, stop=[], max_batch=batch)
        times.append(time.perf_counter() - begin)
    seconds = min(times[1:])
    return {
        "kind": "queue",
        "model": name,
        "batch": batch,
        "texts": count,
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": sum(wanted),
        "seconds": seconds,
        "all_seconds": times,
        "tokens_per_second": sum(wanted) / seconds,
        "first_token_seconds": float(np.median([g.stats.prefill_seconds for g in out])),
    }


def memory_in_use() -> int:
    """Bytes of the device that are taken, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def numbers(text: str, count: int) -> list[int]:
    """ "1,32" as numbers; one number stands for all."""
    found = [int(word) for word in text.split(",")]
    return found * count if len(found) == 1 else found


def say(row: dict) -> None:
    head = f"{row['model']:12s} batch {row['batch']} context {row.get('context')}: "
    if row["kind"] == "queue":
        print(
            f"{row['model']:12s} {row['texts']} texts through a batch of {row['batch']}: "
            f"{row['seconds']:.2f} s, {row['tokens_per_second']:.0f} tokens/s; from joining to the "
            f"first token {row['first_token_seconds'] * 1e3:.1f} ms (median)",
            flush=True,
        )
    elif row["kind"] == "prefill":
        print(
            head + f"prompts in {row['seconds'] * 1e3:.1f} ms, "
            f"{row['flops'] / row['seconds'] * 1e-12:.0f} Tflop/s, "
            f"{100 * row['of_limit']:.1f} % of one large product",
            flush=True,
        )
    else:
        print(
            head + f"{row['seconds'] * 1e3:.3f} ms a step, "
            f"{row['tokens_per_second']:.1f} tokens/s, "
            f"{100 * row['of_limit']:.1f} % of the copy rate "
            f"(weights {row['weight_bytes'] * 1e-9:.2f} GB, "
            f"state {row['state_bytes'] * 1e-6:.1f} MB); prefill {row['prefill_seconds']:.3f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="8b-mamba2,8b-mamba1,3b-mamba2,1b-mamba2,mamba-2.8b")
    parser.add_argument("--batch", default="1", help="one, or several with as many contexts")
    parser.add_argument("--context", default="512")
    parser.add_argument("--tokens", default="513")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", help="float8 or int8: matrices in 8 bits on the device")
    parser.add_argument("--prefill", action="store_true", help="read prompts, generate nothing")
    parser.add_argument("--queue", type=int, help="so many texts of all lengths through the batch")
    parser.add_argument("--rate", type=float, help="of a copy (--prefill: product), if known")
    parser.add_argument("--json", help="append one line a row to this file; - prints them")
    options = parser.parse_args()
    rate = options.rate
    if rate is None and not options.queue:
        rate = product_rate(8192, 8192, 8192) if options.prefill else copy_rate()
        torch.cuda.empty_cache()
    of_device = (
        f"{'product' if options.prefill else 'copy'} {rate * 1e-12:.2f} T/s; " if rate else ""
    )
    print(f"{cuda_devices()[0]['name']}; {of_device}mambainllama {mil.__version__}")
    count = max(len(text.split(",")) for text in (options.batch, options.context, options.tokens))
    lists = [numbers(text, count) for text in (options.batch, options.context, options.tokens)]
    for name in options.models.split(","):
        model = build(name, dtype=options.dtype, weights=options.weights)
        for batch, context, tokens in zip(*lists, strict=True):
            if options.queue:
                row = queue(model, name, batch, options.queue, options.rounds)
            elif options.prefill:
                row = prefill(model, name, batch, context, options.rounds, rate)
            else:
                work = batch, context, tokens, options.rounds, rate
                row = decode(model, name, *work, options.weights)
            say(row)
            if options.json == "-":
                print(json.dumps(row), flush=True)
            elif options.json:
                with open(options.json, "a") as file:
                    file.write(json.dumps(row) + "\n")
        del model


if __name__ == "__main__":
    main()
