"""Speculative decoding on a GPU against our own plain decoding, at a forced acceptance.

Weights are random, so no draft would ever be right. The engine's `_force_acceptance` lets each
draft stand with a given probability whatever the models say, and finds n-grams everywhere;
everything else is as in use: draft steps with draws, verification, verdicts, states going back.
The published figure to compare with is 1.5 x plain decoding (Mamba 2.8B, 130M draft). At 60 % a
token and K = 4 a round brings 1 + 0.6 + .. + 0.6^4 = 2.31 tokens on the average.

    python benchmarks/gpu_speculation.py [--acceptance 0.6] [--draft-tokens 4] [--batch 1]
                                         [--cases mamba-2.8b:mamba-130m,8b-mamba2:ngram]
                                         [--adapting]

Each case is timed plain and with a fixed number of drafts; `--adapting` also times `adapt_draft`
(which may draft more, fewer or none), and adapting to drafts of which one in a hundred is right:
that should cost nothing. Recording and the first short bursts are part of the times.
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
WARM_UP = 20  # tokens
CASES = "mamba-2.8b:mamba-130m,8b-mamba2:mamba-130m,8b-mamba2:ngram"


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


def time_case(model, draft, name, prompts, plain, options) -> dict:
    """One case beside the plain decoding of the same prompts."""
    core = draft if draft == "ngram" else draft.core
    wanted = {"fixed": (options.draft_tokens, False, options.acceptance)}
    if options.adapting:
        wanted["adapted"] = (options.most, True, options.acceptance)
        wanted["useless"] = (options.most, True, USELESS)
    result = {"case": name, "batch": len(prompts), "plain": plain}
    run(model, core, prompts, WARM_UP, 1, drafts=options.draft_tokens, acceptance=0.5)
    for key, (drafts, adapt, acceptance) in wanted.items():
        result[key] = found = run(
            model,
            core,
            prompts,
            options.tokens,
            options.rounds,
            drafts=drafts,
            adapt=adapt,
            acceptance=acceptance,
        )
        found["ratio"] = found["tokens_per_second"] / plain["tokens_per_second"]
    result["ratio"] = result["fixed"]["ratio"]
    words = {
        "fixed": f"K = {options.draft_tokens}",
        "adapted": "adapting",
        "useless": f"adapting to drafts of {USELESS:.0%}",
    }
    print(
        f"{name:26s} batch {len(prompts):2d}: plain {plain['ms_a_round']:.3f} ms a token",
        *(
            f"{words[key]}: {result[key]['ratio']:.2f} x, {result[key]['ms_a_round']:.3f} ms a "
            f"round of {result[key]['tokens_a_round']:.2f} tokens"
            for key in wanted
        ),
        sep="; ",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=CASES, help="model:draft pairs")
    parser.add_argument("--acceptance", type=float, default=0.6)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--most", type=int, default=8, help="draft_tokens where K adapts")
    parser.add_argument("--draft-weights", help="float8 or int8; else as the model's")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1025)
    parser.add_argument("--rounds", type=int, default=1, help="the best of so many")
    parser.add_argument("--adapting", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    device = cuda_devices()[0]["name"]
    print(
        f"{device}; mambainllama {mil.__version__}; forced acceptance "
        f"{options.acceptance:.0%} a token, context {options.context}, {options.tokens} tokens"
    )
    results, model, model_name, plain = [], None, "", {}
    for case in options.cases.split(","):
        name, _, draft_name = case.partition(":")
        if name != model_name:
            model = None  # one target at a time
            model, model_name, plain = build(name), name, {}
        vocab = model.config.vocab_size
        draft = (
            "ngram"
            if draft_name == "ngram"
            else build(draft_name, vocab=vocab, weights=options.draft_weights)
        )
        for batch in map(int, options.batch.split(",")):
            random = np.random.default_rng(1)
            prompts = [random.integers(0, vocab, options.context) for _ in range(batch)]
            if batch not in plain:
                run(model, None, prompts, WARM_UP, 1)
                plain[batch] = run(model, None, prompts, options.tokens, options.rounds)
            results.append(time_case(model, draft, case, prompts, plain[batch], options))
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
