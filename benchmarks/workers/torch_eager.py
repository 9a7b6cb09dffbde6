"""transformers on eager PyTorch as a peer."""

import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import training_load
from memory_use import peak_bytes, reset_peak, resident_bytes
from peers import serve

model = cache = trainer = None


def start(threads):
    global torch, torch_hybrid, transformers
    import torch
    import torch_hybrid
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def read_model(folder, dtype):
    folder = Path(folder)
    hybrid = folder / "mamba_config.json"
    config = transformers.AutoConfig.from_pretrained(folder)
    if hybrid.exists():
        return torch_hybrid.build(folder, config, json.loads(hybrid.read_text()), dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


# ---- decoding ------------------------------------------------------------------------------------


def load(folder):
    global model
    model = read_model(folder, torch.bfloat16).eval()


def new_cache(tokens):
    """Reads `tokens`; returns the cache and the last row of logits."""
    torch_hybrid.set_decoding(model, True)
    with torch.inference_mode():
        out = model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
    kept = "past_key_values" if "past_key_values" in out else "cache_params"
    return kept, out[kept], out.logits[0, -1]


def logits(tokens, path):
    torch_hybrid.set_decoding(model, False)
    with torch.inference_mode():
        np.save(path, model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy())


def decode(tokens, count):
    """Seconds a token of a plain greedy loop, which does less a token than generate() does."""
    kept, past, last = new_cache(tokens)
    with torch.inference_mode():
        begin = time.perf_counter()
        for _ in range(count):
            token = last.argmax().reshape(1, 1)
            last = model(token, **{kept: past}, use_cache=True).logits[0, -1]
        last.argmax().item()
        return (time.perf_counter() - begin) / count


def prefill(tokens):
    begin = time.perf_counter()
    new_cache(tokens)
    return time.perf_counter() - begin


def context(tokens):
    global cache
    cache = new_cache(tokens)[1]


def rows(tokens, repeats):
    """Seconds of one forward pass over these rows with all their logits, which is taken back.

    Transformers only: the states of torch_hybrid's mixers cannot be taken back.
    """
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            seconds.append(time.perf_counter() - begin)
            cache.crop(-len(tokens))
    return sorted(seconds[1:])[repeats // 2]


# ---- training ------------------------------------------------------------------------------------


def training(student, teacher, learning_rate):
    """The same optimizer and losses as the other peers', in float32."""
    global trainer
    pupil = read_model(student, torch.float32).train()
    optimizer = torch.optim.AdamW(
        pupil.parameters(), lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    trainer = pupil, read_model(teacher, torch.float32).eval() if teacher else None, optimizer
    reset_peak()
    return resident_bytes()


def train(batch, length, index):
    pupil, teacher, optimizer = trainer
    tokens, labels = training_load.batch(pupil.config.vocab_size, batch, length, index)
    begin = time.perf_counter()
    ids = torch.from_numpy(tokens).long()
    scores = pupil(ids, use_cache=False).logits.flatten(0, 1)
    if teacher is not None:
        with torch.no_grad():
            wanted = teacher(ids, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
        loss = torch.nn.functional.kl_div(
            scores.log_softmax(-1), wanted, reduction="batchmean", log_target=True
        )
    else:
        loss = torch.nn.functional.cross_entropy(
            scores, torch.from_numpy(labels).flatten().long(), ignore_index=-1
        )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "loss": loss.item(), "peak": peak_bytes()}


serve(
    {
        "start": start,
        "load": load,
        "logits": logits,
        "decode": decode,
        "prefill": prefill,
        "context": context,
        "rows": rows,
        "training": training,
        "train": train,
    }
)
