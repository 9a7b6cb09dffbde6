"""Speculative decoding on a GPU against our own plain decoding, at a forced acceptance.

Weights are random, so no draft would ever be right. The engine's `_force_acceptance` lets each
draft stand with a given probability whatever the models say, and finds n-grams everywhere;
everything else is as in use: draft steps with draws, verification, verdicts, states going back.
The published figure to compare with is 1.5 x plain decoding (Mamba 2.8B, 130M draft). At 60 % a
token and K = 4 a round brings 1 + 0.6 + .. + 0.6^4 = 2.31 tokens on the average.

    python benchmarks/gpu_speculation.py [--acceptance 0.6] [--draft-tokens 4] [--batch 1]
                                         [--cases mamba-2.8b:mamba-130m,8b-mamba2:ngram]

Each case is timed plain, with a fixed number of drafts, with `adapt_draft` (which may draft more,
fewer or none), and adapting to drafts of which one in a hundred is right: that should cost nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys

import numpy as np
from gpu_decode import build

import mambainllama as mil
from mambainllama import _core
from mambainllama.devices import cuda_devices

USELESS = 0.01
CASES = "mamba-2.8b:mamba-130m,8b-mamba2:mamba2-130m,8b-mamba2:ngram"


def run(model, draft, prompts, tokens, rounds, *, drafts=0, adapt=False, acceptance=0.0) -> dict:
    """The best of some rounds: seconds of decoding, tokens and rounds of all texts."""
    best = None
    for _ in range(rounds):
        requests = [
            {
                "prompt": prompt,
                "max_new_tokens": tokens,
                "stop": [],
                "draft_tokens": drafts,
                "fixed_draft": not adapt,
                "seed": i,
            }
            for i, prompt in enumerate(prompts)
        ]
        found = _core.generate(
            model.core,
            requests,
            draft=draft,
            max_batch=len(prompts),
            _force_acceptance=acceptance,
        )
        stats = [one["stats"] for one in found]
        seconds = max(one["decode_seconds"] for one in stats)
        if best is None or seconds < best["seconds"]:
            best = {
                "seconds": seconds,
                "tokens": sum(one["new_tokens"] - 1 for one in stats),
                "rounds": sum(one["rounds"] for one in stats),
                "drafted": sum(one["drafted"] for one in stats),
                "accepted": sum(one["accepted"] for one in stats),
            }
    best["tokens_per_second"] = best["tokens"] / best["seconds"]
    best["tokens_a_round"] = best["tokens"] / best["rounds"]
    best["ms_a_round"] = 1e3 * best["seconds"] / (best["rounds"] / len(prompts))
    return best


def time_case(model, draft, name, batch, options) -> dict:
    random = np.random.default_rng(1)
    vocab = model.config.vocab_size
    prompts = [random.integers(0, vocab, options.context).astype(np.int32) for _ in range(batch)]
    core = draft if draft == "ngram" else draft.core
    common = (prompts, options.tokens, options.rounds)
    plain = run(model, None, *common)
    fixed, adapted, useless = (
        run(model, core, *common, drafts=drafts, adapt=adapt, acceptance=acceptance)
        for drafts, adapt, acceptance in (
            (options.draft_tokens, False, options.acceptance),
            (options.most, True, options.acceptance),
            (options.most, True, USELESS),
        )
    )
    ratio, free, least = (
        one["tokens_per_second"] / plain["tokens_per_second"] for one in (fixed, adapted, useless)
    )
    print(
        f"{name:26s} batch {batch:2d}: plain {plain['ms_a_round']:.3f} ms a token; "
        f"K = {options.draft_tokens}: {ratio:.2f} x, {fixed['ms_a_round']:.3f} ms a round of "
        f"{fixed['tokens_a_round']:.2f} tokens; adapting: {free:.2f} x, "
        f"{adapted['ms_a_round']:.3f} ms of {adapted['tokens_a_round']:.2f}; "
        f"to drafts of {USELESS:.0%}: {least:.2f} x",
        flush=True,
    )
    return {
        "case": name,
        "batch": batch,
        "ratio": ratio,
        "adapted_ratio": free,
        "useless_ratio": least,
        "plain": plain,
        "fixed": fixed,
        "adapted": adapted,
        "useless": useless,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=CASES, help="model:draft pairs")
    parser.add_argument("--acceptance", type=float, default=0.6)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--most", type=int, default=8, help="draft_tokens where K adapts")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1025)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    device = cuda_devices()[0]["name"]
    print(
        f"{device}; mambainllama {mil.__version__}; forced acceptance "
        f"{options.acceptance:.0%} a token, context {options.context}, {options.tokens} tokens"
    )
    results, models = [], {}
    for case in options.cases.split(","):
        name, _, draft_name = case.partition(":")
        if name not in models:
            models = {name: build(name)}  # one target at a time
        model = models[name]
        vocab = model.config.vocab_size
        draft = "ngram" if draft_name == "ngram" else build(draft_name, vocab=vocab)
        for batch in map(int, options.batch.split(",")):
            results.append(time_case(model, draft, case, batch, options))
    if options.json:
        report = {
            "device": device,
            "mambainllama": mil.__version__,
            "python": sys.version.split()[0],
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "acceptance": options.acceptance,
            "results": results,
        }
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
