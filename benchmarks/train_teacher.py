"""Trains the small teacher that ships with the package, from text that every CPython carries.

    python benchmarks/train_teacher.py --output mambainllama/packaged/teacher

Everything is made here: a byte-level BPE tokenizer and a Llama (4 layers, width 128, 4 heads on 2
key-value heads, 1.05 M parameters) trained by our own trainer on the corpus of
mambainllama/corpus.py, without a teacher of its own. Same Python, same machine and same thread
count: same bits.  Interrupted, it goes on from its last checkpoint when it is started again with
--resume.

The folder records what it was made with (training.json): versions, corpus, steps, held-out
perplexity.
"""

import argparse
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import mambainllama as mil
from mambainllama import corpus
from mambainllama.checkpoint import write_folder

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 2048, 128, 4, 4, 2, 384
BEGIN, END = "<|begin|>", "<|end|>"


def train_tokenizer(texts, folder):
    """A byte-level BPE tokenizer: any text can be written with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": BEGIN,
        "eos_token": END,
        "add_bos_token": False,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_start(folder, seed):
    """Random weights: normal, deviation 1/sqrt(width), smaller where they write to the residual."""
    random = np.random.default_rng(seed)
    narrow = HIDDEN * KV_HEADS // HEADS
    quiet = (2 * LAYERS) ** -0.5

    def matrix(rows, columns, scale=1.0):
        values = random.standard_normal((rows, columns), np.float32) * np.float32(
            scale * columns**-0.5
        )
        return values, "float32"

    ones = (np.ones(HIDDEN, np.float32), "float32")
    tensors = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN, 0.3), "model.norm.weight": ones}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        tensors[at + "input_layernorm.weight"] = ones
        tensors[at + "self_attn.q_proj.weight"] = matrix(HIDDEN, HIDDEN)
        tensors[at + "self_attn.k_proj.weight"] = matrix(narrow, HIDDEN)
        tensors[at + "self_attn.v_proj.weight"] = matrix(narrow, HIDDEN)
        tensors[at + "self_attn.o_proj.weight"] = matrix(HIDDEN, HIDDEN, quiet)
        tensors[at + "post_attention_layernorm.weight"] = ones
        tensors[at + "mlp.gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[at + "mlp.up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[at + "mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE, quiet)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "max_position_embeddings": 256,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    write_folder(folder, tensors, config)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the finished teacher (bfloat16)"
    )
    parser.add_argument(
        "--run", type=Path, default=Path("teacher-run"), help="folder of checkpoints and metrics"
    )
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--muon", type=float, default=0.02, help="rate of Muon; 0: AdamW alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    train, held = corpus.documents()
    characters = sum(map(len, train))
    print(
        f"corpus: {len(train)} documents, {characters:,} characters; held out: {len(held)}",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch) / "start"
        write_start(start, options.seed)
        train_tokenizer(train, start)
        model = mil.load(start)
        settings = mil.SftConfig(
            loss_on="all",
            max_steps=options.steps,
            batch_size=options.batch,
            sequence_length=options.length,
            learning_rate=options.learning_rate,
            muon_learning_rate=options.muon,
            min_learning_rate=0.05,
            warmup_steps=40,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            seed=options.seed,
            eval_every=200,
            save_every=50,
            keep_last=1,
        )
        begin = time.perf_counter()
        history = mil.sft(
            model,
            [{"text": text} for text in train],
            settings,
            options.run,
            resume=options.resume,
            validation=[{"text": text} for text in held],
        )
    final = history.final
    record = {
        "corpus": {"documents": len(train), "held_out": len(held), "characters": characters},
        "tokens": final["tokens"],
        "steps": options.steps,
        "held_out_perplexity": round(final["eval_perplexity"], 3),
        "held_out_nats_per_token": round(math.log(final["eval_perplexity"]), 4),
        "seconds_of_last_start": round(time.perf_counter() - begin, 1),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "tokenizers": __import__("tokenizers").__version__,
        "mambainllama": mil.__version__,
        "settings": {
            k: v for k, v in vars(options).items() if k not in ("output", "run", "resume")
        },
    }
    # Stored in 16 bits: half the size of the package; loading gives the same bits everywhere.
    shutil.rmtree(options.output, ignore_errors=True)
    mil.load(options.run / "model", dtype="bfloat16").save(options.output)
    (options.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
