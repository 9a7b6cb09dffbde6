"""Small random Llama checkpoints that tests make themselves, with a tokenizer of bytes."""

import json

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mambainllama.checkpoint import write_folder

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def byte_tokenizer():
    """Ids 0 to 255 are bytes in the byte-level alphabet's order, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_llama(
    folder,
    *,
    layers=2,
    hidden=32,
    heads=4,
    kv_heads=2,
    vocab=264,
    seed=0,
    scale=1.0,
    text=True,
    dtype="float32",
):
    """Writes a checkpoint and returns its folder. `scale` makes its distributions sharper."""
    random = np.random.default_rng(seed)
    wide, narrow, inner = hidden, hidden * kv_heads // heads, 2 * hidden
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
            at + "self_attn.q_proj.weight": (wide, hidden),
            at + "self_attn.k_proj.weight": (narrow, hidden),
            at + "self_attn.v_proj.weight": (narrow, hidden),
            at + "self_attn.o_proj.weight": (hidden, wide),
            at + "mlp.gate_proj.weight": (inner, hidden),
            at + "mlp.up_proj.weight": (inner, hidden),
            at + "mlp.down_proj.weight": (hidden, inner),
        }
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            tensors[name] = (np.ones(shape, np.float32), "float32")
        else:
            values = random.standard_normal(shape, np.float32)
            values *= np.float32(scale * shape[1] ** -0.5)
            if dtype == "bfloat16":
                tensors[name] = ((values.view(np.uint32) >> 16).astype(np.uint16), dtype)
            else:
                tensors[name] = (values, dtype)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "torch_dtype": dtype,
        "eos_token_id": 256,
    }
    write_folder(folder, tensors, config)
    if text:
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        settings = {"eos_token": SPECIAL[0], "chat_template": TEMPLATE}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
