"""llama.cpp, through llama-cpp-python's C interface, as a peer.

Weights come as GGUF in bfloat16, written here from the same safetensors.  llama.cpp's functions are
called directly: the package's Python loop around them would cost it a copy of the logits a token.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

# This file has the package's name, and its folder comes first in the path of a script.
sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers import serve  # noqa: E402 (after the path is right)

model = context_pointer = memory = batch = None
team, vocab, kept = 1, 0, 0


def start(threads):
    global team, llama
    import llama_cpp as llama

    team = threads
    llama.llama_backend_init()
    system = llama.llama_print_system_info().decode().partition(":")[2]
    used = [part.strip() for part in system.split("|") if part.strip().endswith("= 1")]
    return {
        "llama-cpp-python": llama.__version__,
        "llama.cpp": ", ".join(part.removesuffix(" = 1") for part in used),
    }


# ---- GGUF ----------------------------------------------------------------------------------------


def read_safetensors(folder):
    """(name, dtype, array) of every tensor, mapped; bfloat16 as uint16."""
    types = {"BF16": np.uint16, "F32": np.float32}
    for path in sorted(Path(folder).glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        size = int(data[:8].view(np.uint64)[0])
        for name, entry in json.loads(bytes(data[8 : 8 + size])).items():
            if name != "__metadata__":
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                array = data[begin:end].view(types[entry["dtype"]]).reshape(entry["shape"])
                yield name, entry["dtype"], array


def interleave_heads(weight, heads):
    """llama.cpp rotates channels (2i, 2i + 1) where Hugging Face rotates (i, i + head_dim / 2)."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weight.shape)


TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def gguf_name(name):
    if name.startswith("model.layers."):
        _, _, number, rest = name.split(".", 3)
        return f"blk.{number}.{TENSORS[rest]}"
    return TENSORS[name]


def write_gguf(folder, path):
    """Writes `path`, unless it is there; complete or not at all."""
    import gguf

    path = Path(path)
    if path.exists():
        return
    config = json.loads((Path(folder) / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["hidden_size"] // heads
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, dtype, array in read_safetensors(folder):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = interleave_heads(array, heads if "q_proj" in name else kv_heads)
        if array.ndim == 1 and dtype == "BF16":  # llama.cpp wants norms in float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        raw = gguf.GGMLQuantizationType.BF16 if array.dtype == np.uint16 else None
        if raw is not None:
            array = array.view(np.uint8)  # its shape counts bytes for types that NumPy lacks
        writer.add_tensor(gguf_name(name), array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


# ---- decoding ------------------------------------------------------------------------------------


def load(folder, gguf):
    global model, context_pointer, memory, vocab
    write_gguf(folder, gguf)
    model = llama.llama_model_load_from_file(str(gguf).encode(), llama.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {gguf}")
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 1024, 512, 512
    settings.n_threads = settings.n_threads_batch = team
    context_pointer = llama.llama_init_from_model(model, settings)
    memory = llama.llama_get_memory(context_pointer)
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))


def run(tokens, first, all_logits=False):
    """One forward pass over tokens at positions from `first` on; the last row's logits."""
    global batch
    if batch is None:
        batch = llama.llama_batch_init(512, 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, first + i
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.logits[i] = all_logits or i == len(tokens) - 1
    if llama.llama_decode(context_pointer, batch) != 0:
        raise RuntimeError("llama_decode failed")
    return row(len(tokens) - 1)


def row(index):
    pointer = llama.llama_get_logits_ith(context_pointer, index)
    return np.ctypeslib.as_array(pointer, (vocab,))


def forget(first):
    llama.llama_memory_seq_rm(memory, 0, first, -1)


def logits(tokens, path):
    forget(0)
    run(tokens, 0, all_logits=True)
    np.save(path, np.stack([row(i) for i in range(len(tokens))]))


def decode(tokens, count):
    """Seconds a token of a plain greedy loop."""
    forget(0)
    last, position = run(tokens, 0), len(tokens)
    begin = time.perf_counter()
    for _ in range(count):
        last = run([int(last.argmax())], position)
        position += 1
    last.argmax()
    return (time.perf_counter() - begin) / count


def prefill(tokens):
    forget(0)
    begin = time.perf_counter()
    run(tokens, 0)
    return time.perf_counter() - begin


def context(tokens):
    global kept
    forget(0)
    run(tokens, 0)
    kept = len(tokens)


def rows(tokens, repeats):
    """Seconds of one forward pass over these rows with all their logits, which is taken back."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run(tokens, kept, all_logits=True)
        seconds.append(time.perf_counter() - begin)
        forget(kept)
    return sorted(seconds[1:])[repeats // 2]


serve(
    {
        "start": start,
        "load": load,
        "logits": logits,
        "decode": decode,
        "prefill": prefill,
        "context": context,
        "rows": rows,
    }
)
