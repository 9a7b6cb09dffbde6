"""mambainllama as a peer: decoding, rows and training through its public calls."""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2]))  # built in place, if not installed
import training_load
from memory_use import peak_bytes, reset_peak, resident_bytes
from peers import serve

model = state = trainer = None


def start(threads):
    global mil, generate
    import mambainllama as mil
    from mambainllama.generate import generate

    mil._core.set_threads(threads)
    level = mil._core.cpu_info().get("level", "")
    return {"mambainllama": f"{mil.__version__} ({level})", "numpy": np.__version__}


# ---- making checkpoints --------------------------------------------------------------------------


def convert(source, target, mixer, attention_layers):
    """Saves the hybrid of `source`, with the published start: no figure here depends on quality."""
    student = mil.convert(
        mil.load(source), mixer=mixer, attention_layers=attention_layers, init="paper"
    )
    student.save(target)


# ---- decoding ------------------------------------------------------------------------------------


def load(folder, mmap=True):
    global model
    model = mil.load(folder, mmap=mmap)


def weight_bytes():
    """Bytes of weights that one token's step reads: all of them once; of an embedding that is not
    also the output product one row, which is left out."""
    arrays = model.parameters()
    total = sum(array.nbytes for array in arrays.values())
    if "lm_head.weight" in arrays:
        total -= arrays["model.embed_tokens.weight"].nbytes
    return total


def logits(tokens, path):
    """Logits [tokens, vocab] as a NumPy file."""
    np.save(path, model(np.asarray([tokens]))[0])


def decode(tokens, count):
    """Seconds a token of greedy generation after `tokens`, as mil.generate itself counts them."""
    [answer] = generate(model, list(tokens), max_new_tokens=count + 1, stop=[])
    assert len(answer.token_ids) == count + 1
    return answer.stats.decode_seconds / count


def prefill(tokens):
    """Seconds to read a prompt and give its last row of logits."""
    begin = time.perf_counter()
    fresh = model.state(len(tokens))
    model.core.forward(np.asarray(tokens, np.int32), states=[fresh], rows="last")
    return time.perf_counter() - begin


def context(tokens):
    """Keeps a state that has read these tokens, for `rows`."""
    global state
    state = model.state(len(tokens) + 64)
    model.core.forward(np.asarray(tokens, np.int32), states=[state], rows="none")


def rows(tokens, repeats):
    """Seconds of one forward pass over these rows with all their logits, which is taken back."""
    ids = np.asarray(tokens, np.int32)
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        model.core.forward(ids, states=[state], rows="all")
        seconds.append(time.perf_counter() - begin)
        state.rollback(len(ids))
    return sorted(seconds[1:])[repeats // 2]


# ---- training ------------------------------------------------------------------------------------


def training(student, teacher, learning_rate, checkpointing=False):
    """Prepares distillation of `student` towards `teacher`, or plain training without one."""
    global trainer
    pupil = mil.load(student)
    trainer = (
        mil._core.Trainer(
            pupil.core, mil.load(teacher).core if teacher else None, checkpointing=checkpointing
        ),
        pupil.config.vocab_size,
        bool(teacher),
        learning_rate,
    )
    reset_peak()
    return resident_bytes()


def train(batch, length, index):
    """One optimizer step: seconds, loss, and peak bytes of the process so far."""
    core, vocab, distil, learning_rate = trainer
    tokens, labels = training_load.batch(vocab, batch, length, index)
    begin = time.perf_counter()
    counted = int((labels >= 0).sum()) if not distil else labels.size
    sums = core.backward(
        tokens.reshape(-1),
        np.arange(batch + 1, dtype=np.int64) * length,
        labels=None if distil else labels.reshape(-1),
        kl_weight=float(distil),
        ce_weight=float(not distil),
        scale=1.0 / counted,
    )
    core.apply(learning_rate, max_grad_norm=1.0)
    seconds = time.perf_counter() - begin
    loss = sums["kl" if distil else "ce"] / counted
    return {"seconds": seconds, "loss": float(loss), "peak": peak_bytes()}


serve(
    {
        "start": start,
        "convert": convert,
        "load": load,
        "weight_bytes": weight_bytes,
        "logits": logits,
        "decode": decode,
        "prefill": prefill,
        "context": context,
        "rows": rows,
        "training": training,
        "train": train,
    }
)
