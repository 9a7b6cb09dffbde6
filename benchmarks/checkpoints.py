"""Checkpoints with random weights and real shapes, written once into a shared folder.

Speed does not depend on the values, correctness does a little: matrices have the scale of a fresh
layer and the embedding is small beside what the layers add, so that logits depend on every layer,
and peers that disagree in any of them disagree in the logits.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from peers import Peer

__all__ = ["LLAMA_1B", "LLAMA_SMALL", "Shape", "cache_folder", "hybrid", "llama"]


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; head_dim is hidden / heads."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"{self.hidden}x{self.layers}-{self.vocab}-{self.dtype}"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes in the order of the file; the output product is the embedding."""
        hidden, narrow = self.hidden, self.hidden * self.kv_heads // self.heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, hidden)}
        for i in range(self.layers):
            layer = {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (narrow, hidden),
                "self_attn.v_proj": (narrow, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (self.intermediate, hidden),
                "mlp.up_proj": (self.intermediate, hidden),
                "mlp.down_proj": (hidden, self.intermediate),
            }
            shapes |= {f"model.layers.{i}.{name}.weight": s for name, s in layer.items()}
        return {**shapes, "model.norm.weight": (hidden,)}

    @property
    def weight_bytes(self) -> int:
        """Of all tensors together."""
        count = sum(math.prod(size) for size in self.tensors().values())
        return count * (2 if self.dtype == "bfloat16" else 4)

    def config(self) -> dict:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
            "torch_dtype": self.dtype,
        }


LLAMA_1B = Shape(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocab=128256)
"""Llama-3.2-1B's shape: 1.24 billion parameters, 2.47 GB in bfloat16."""
LLAMA_SMALL = Shape(512, 8, 8, 4, 1536, 16384, dtype="float32")
"""For training: 36 million parameters."""


def cache_folder() -> Path:
    """Where checkpoints are kept unless told otherwise: in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mambainllama" / "benchmarks"


def random_matrix(random: np.random.Generator, shape: tuple[int, ...], name: str, dtype: str):
    """Uniform with the variance of a fresh layer, in `dtype` (bfloat16 as uint16)."""
    bound = np.float32(0.035 if "embed" in name else (3 / shape[1]) ** 0.5)
    values = random.random(shape, np.float32)
    values -= np.float32(0.5)
    values *= 2 * bound
    if dtype == "float32":
        return values
    bits = values.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
    return (bits >> 16).astype(np.uint16)


def llama(cache: Path, shape: Shape, seed: int = 0) -> Path:
    """The folder of a Llama of this shape; written where it is missing, complete or not at all."""
    folder = cache / f"llama-{shape.name}-{seed}"
    if folder.exists():
        return folder
    print(f"writing {folder} (once)", flush=True)
    partial = folder.with_name(folder.name + f".partial-{os.getpid()}")
    partial.mkdir(parents=True)
    random = np.random.default_rng(seed)
    arrays = {}
    for name, size in shape.tensors().items():
        if len(size) == 1:
            one = np.uint16(0x3F80) if shape.dtype == "bfloat16" else np.float32(1)
            arrays[name] = np.full(size, one)
        else:
            arrays[name] = random_matrix(random, size, name, shape.dtype)
    write_safetensors(partial / "model.safetensors", arrays, shape.dtype)
    (partial / "config.json").write_text(json.dumps(shape.config(), indent=2))
    partial.rename(folder)
    return folder


def write_safetensors(path: Path, arrays: dict[str, np.ndarray], dtype: str) -> None:
    """The format by hand (a length, a JSON header, the bytes), since NumPy has no bfloat16."""
    label = {"bfloat16": "BF16", "float32": "F32"}[dtype]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, array in arrays.items():
        end = offset + array.nbytes
        header[name] = {"dtype": label, "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for array in arrays.values():
            array.tofile(file)


def hybrid(cache: Path, shape: Shape, mixer: str, attention_layers: str | float = "half") -> Path:
    """The folder of the hybrid of `llama(cache, shape)`, converted by this project."""
    source = llama(cache, shape)
    folder = cache / f"hybrid-{mixer}-{attention_layers}-{shape.name}"
    if not folder.exists():
        print(f"writing {folder} (once)", flush=True)
        with Peer("ours", os.cpu_count() or 1) as ours:
            arguments = {"mixer": mixer, "attention_layers": attention_layers}
            ours("convert", source=str(source), target=str(folder), **arguments)
    return folder
