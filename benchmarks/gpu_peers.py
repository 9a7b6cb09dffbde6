"""Peers on a GPU: what PyTorch does in the same work, with the kernels people use beside it.

    python benchmarks/gpu_peers.py decode [--models 8b-mamba2] [--batch 1] [--context 512]
    python benchmarks/gpu_peers.py rates ssd scan transformers

Each command prints one JSON line per figure, and a peer that cannot run says why in one (`absent`).
This file needs torch alone; mamba-ssm (its Triton kernels suffice), fla-core and transformers are
used where they can be imported. mambainllama is never imported, so both can be timed in processes
of their own.

*Decoding* is written as somebody would who wants it fast and does not write kernels: q, k and v in
one product, gate and up in another, static buffers, one CUDA graph of the whole step with the
choice of the next token in it, attention by the fastest of PyTorch's own kernels at this shape
(asked by timing them). It is recorded at one length, which favours it: in use, there would be a
mask over the longest length or a graph for each one. Variants:

    mamba-ssm               norms (with the residual's sum), gates and the state's step by
                            mamba-ssm's Triton kernels; rotation and convolution in PyTorch, as
                            mamba-ssm does itself where causal-conv1d is absent
    mamba-ssm + fla         rotation and convolution by the Triton kernels of fla-core as well
    mamba-ssm as published  how the published hybrids are written: gate and up apart, residuals
                            added apart, keys and values repeated for their queries

States have the weights' dtype by default, as mamba-ssm allocates them; ours are float32.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_shapes import configs

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
VARIANTS = ("mamba-ssm", "mamba-ssm + fla", "mamba-ssm as published")


class Absent(Exception):
    """A peer cannot take part; the message says why, in one line."""


# ---- what to import ------------------------------------------------------------------------------


def mamba_module(name: str):
    """A module of mamba-ssm without the package's own imports, which want its compiled scan."""
    if "mamba_ssm" not in sys.modules:
        found = importlib.util.find_spec("mamba_ssm")
        if found is None:
            raise Absent("mamba-ssm is not installed")
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["mamba_ssm"] = package
    try:
        return importlib.import_module(f"mamba_ssm.ops.triton.{name}")
    except ImportError as error:
        raise Absent(f"mamba-ssm cannot be imported: {error}") from None


def fla_module(name: str):
    try:
        return importlib.import_module(f"fla.{name}")
    except ImportError as error:
        raise Absent(f"fla-core cannot be imported: {error}") from None


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def versions() -> dict[str, str]:
    names = ("torch", "triton", "mamba-ssm", "fla-core", "transformers")
    return {name: version(name) for name in names} | {"cuda": torch.version.cuda or "none"}


# ---- timing --------------------------------------------------------------------------------------


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`call` as a CUDA graph, after it compiled and tuned whatever it wanted to."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def seconds_of(call: Callable[[], object], rounds: int = 20, inner: int = 1) -> float:
    """Median seconds of a call on the device; each timing spans `inner` calls."""
    times = []
    for i in range(rounds + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) * 1e-3 / inner)
    return statistics.median(times)


def steps_in_a_row(call: Callable[[], object], steps: int, rounds: int = 2) -> list[float]:
    """Mean seconds of `steps` calls one after another, once a round: as our own steps are timed.
    A large batch is at the device's limit of power, so its clock, and a step's time, depend on how
    long it has been at work."""
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        begin.record()
        for _ in range(steps):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / steps)
    return times


def recorded_seconds(call: Callable[[], object], rounds: int = 20, inner: int = 1) -> float:
    """The same of a graph of the call, so that launches from Python do not count."""
    with torch.inference_mode():
        graph = graph_of(call)
        return seconds_of(graph.replay, rounds, inner)


# ---- compiling -----------------------------------------------------------------------------------

# Tuned Triton kernels compile dozens of variants one after the other, which takes minutes. So some
# processes compile a part of them each, into Triton's cache on the disk, and the process that times
# finds them there. Which variant is taken is decided by that one process, alone on the GPU.
PART = "MAMBAINLLAMA_BENCH_TUNE_PART"


def compile_first(arguments: list[str], processes: int) -> None:
    """Runs the same commands in `processes` processes, each with its part of the variants."""
    begin = time.perf_counter()
    children = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments, "--compile-first", "0"],
            env={**os.environ, PART: f"{i}/{processes}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for i in range(processes)
    ]
    for child in children:
        child.wait()
    took = round(time.perf_counter() - begin, 1)
    print(json.dumps({"compiled_by": processes, "took": took}), flush=True)


def tune_a_part_only() -> bool:
    """In such a process: every tuned kernel has its part of the variants. Whether this is one."""
    if PART not in os.environ:
        return False
    from triton.runtime.autotuner import Autotuner

    part, parts = map(int, os.environ[PART].split("/"))
    every = Autotuner.prune_configs

    def some(self, kwargs):
        found = list(every(self, kwargs))
        return found[part::parts] or found[:1]

    Autotuner.prune_configs = some
    return True


def tune_a_few(most: int) -> None:
    """Every tuned kernel has at most `most` variants: those with tiles nearest to 128 x 64."""
    from triton.runtime.autotuner import Autotuner

    every = Autotuner.prune_configs

    def distance(config) -> float:
        sizes = [v for k, v in config.kwargs.items() if k[-2:] in ("_M", "_N", "BK", "BV")]
        return abs(math.log2(math.prod(sizes)) - 13) if sizes else 0.0

    def some(self, kwargs):
        found = list(every(self, kwargs))
        return sorted(found, key=distance)[:most]

    Autotuner.prune_configs = some


# ---- decoding: the kernels -----------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """What a step is made of beside products and attention."""

    norm: Callable  # (x, weight, residual, eps, float32 residual) -> (normed, residual + x)
    gated_norm: Callable  # (x, weight, z, eps, group) -> rms(x silu(z)) weight
    glu: Callable  # gate and up side by side -> silu(gate) up
    state_update: Callable  # mamba-ssm's selective_state_update
    rotate: Callable  # (heads of one token, cos, signed sin) -> rotated
    conv_update: Callable  # (x, state [batch, channels, width], weight, bias) -> silu(conv)
    fused: bool = True  # gate and up in one product, queries grouped within attention


def torch_rotate(x, cos, sin):
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def torch_conv_update(x, state, weight, bias):
    """As in mamba-ssm's Mamba2.step without causal-conv1d. state: [batch, channels, width]."""
    state.copy_(torch.roll(state, shifts=-1, dims=-1))
    state[:, :, -1] = x
    return F.silu(torch.sum(state * weight, dim=-1) + bias)


def mamba_kernels() -> Kernels:
    layer_norm, gated = mamba_module("layer_norm"), mamba_module("layernorm_gated")
    activations, update = mamba_module("k_activations"), mamba_module("selective_state_update")

    def norm(x, weight, residual, eps, wide):
        return layer_norm.rms_norm_fn(
            x, weight, None, residual=residual, eps=eps, prenorm=True, residual_in_fp32=wide
        )

    def gated_norm(x, weight, z, eps, group):
        return gated.rmsnorm_fn(
            x, weight, None, z=z, eps=eps, group_size=group, norm_before_gate=False
        )

    return Kernels(
        norm,
        gated_norm,
        activations.SwiGLU.apply,
        update.selective_state_update,
        torch_rotate,
        torch_conv_update,
    )


def published_kernels() -> Kernels:
    plain, layer_norm = mamba_kernels(), mamba_module("layer_norm")

    def norm(x, weight, residual, eps, wide):
        x = x if residual is None else residual + x
        return layer_norm.rms_norm_fn(x, weight, None, eps=eps), x.float() if wide else x

    return dataclasses.replace(plain, norm=norm, fused=False)


def fla_kernels() -> Kernels:
    conv, rotary = fla_module("modules.causal_conv1d.ops"), fla_module("modules.rotary.ops")

    def rotate(x, cos, sin):
        half = x.shape[-1] // 2
        table = cos[None, :half], sin[None, half:]
        return rotary.rotary_embedding_fwdbwd(x[:, None].contiguous(), *table, inplace=True)[:, 0]

    def conv_update(x, state, weight, bias):
        return conv.causal_conv1d_update(x, state, None, weight, bias, "silu")[0]

    plain = mamba_kernels()
    return Kernels(plain.norm, plain.gated_norm, plain.glu, plain.state_update, rotate, conv_update)


def reference_kernels() -> Kernels:
    """The same in plain PyTorch: what the others are checked with, on any device."""

    def rms(x, weight, eps):
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)) * weight

    def norm(x, weight, residual, eps, wide):
        residual = x if residual is None else x + residual
        return rms(residual.float(), weight.float(), eps).to(x.dtype), residual

    def gated_norm(x, weight, z, eps, group):
        value = (x.float() * F.silu(z.float())).unflatten(-1, (-1, group))
        return rms(value, weight.float().unflatten(-1, (-1, group)), eps).flatten(-2).to(x.dtype)

    def glu(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def state_update(state, x, dt, A, B, C, D, z=None, dt_bias=None, dt_softplus=True):
        dt = F.softplus(dt.float() + dt_bias)
        repeat = x.shape[1] // B.shape[1]
        B, C = (t.repeat_interleave(repeat, 1).float() for t in (B, C))
        new = state * torch.exp(dt[..., None] * A) + (dt * x)[..., None] * B[:, :, None]
        state.copy_(new)
        y = (new * C[:, :, None]).sum(-1) + D * x
        return (y if z is None else y * F.silu(z.float())).to(x.dtype)

    return Kernels(norm, gated_norm, glu, state_update, torch_rotate, torch_conv_update)


KERNELS = {
    "mamba-ssm": mamba_kernels,
    "mamba-ssm + fla": fla_kernels,
    "mamba-ssm as published": published_kernels,
    "reference": reference_kernels,
}


# ---- decoding: the model -------------------------------------------------------------------------


class Parameters:
    """Tensors by the names of a checkpoint: random ones, or those of `given`."""

    def __init__(self, dtype, device, given=None):
        self.dtype, self.device, self.given = dtype, device, given

    def matrix(self, name: str, rows: int, columns: int) -> torch.Tensor:
        if self.given is not None:
            return self._given(name, (rows, columns)).to(self.dtype)
        return torch.empty(rows, columns, dtype=self.dtype, device=self.device).normal_(
            0, columns**-0.5
        )

    def stacked(self, columns: int, *named: tuple[str, int]) -> torch.Tensor:
        return torch.cat([self.matrix(name, rows, columns) for name, rows in named])

    def vector(self, name: str, *shape: int, dtype=None, fill: float | None = None):
        if self.given is not None:
            return self._given(name, shape).to(dtype or self.dtype)
        value = torch.rand(shape, device=self.device) - 0.5
        return (value if fill is None else value.fill_(fill)).to(dtype or self.dtype)

    def _given(self, name, shape):
        return torch.as_tensor(self.given[name], device=self.device).reshape(shape)


class Attention:
    """Grouped-query attention of one token a sequence, over a static cache."""

    def __init__(self, model: Decoder, prefix: str, sizes: dict):
        p, width = model.parameters, sizes["hidden_size"]
        self.model, self.prefix = model, prefix
        self.heads, self.kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        self.head_dim = width // self.heads
        kv = self.kv_heads * self.head_dim
        names = [f"{prefix}.self_attn.{name}_proj.weight" for name in "qkvo"]
        self.qkv = p.stacked(width, (names[0], width), (names[1], kv), (names[2], kv))
        self.out = p.matrix(names[3], width, width)
        cache = (model.batch, model.length + 1, self.kv_heads, self.head_dim)
        self.k, self.v = (model.random_state(cache, p.dtype) for _ in range(2))

    def __call__(self, x, position: int):
        model, queries = self.model, self.heads + self.kv_heads
        qkv = F.linear(x, self.qkv).unflatten(-1, (-1, self.head_dim))
        qk = model.kernels.rotate(qkv[:, :queries], model.cos[position], model.sin[position])
        self.k[:, position] = qk[:, self.heads :]
        self.v[:, position] = qkv[:, queries:]
        k, v = (t[:, : position + 1].transpose(1, 2) for t in (self.k, self.v))
        if not model.kernels.fused:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(qk[:, : self.heads, None], k, v, enable_gqa=True)
        return F.linear(y.flatten(1), self.out)


class Mamba2:
    """in_proj gives z, x, B, C, dt; x and B may have fewer heads than C, and are then repeated."""

    def __init__(
        self, model: Decoder, prefix: str, inner, heads, state, x_width, B_groups, C_groups
    ):
        p = model.parameters
        self.model, self.heads, self.head_dim = model, heads, inner // heads
        self.groups, self.state_dim = (B_groups, C_groups), state
        self.split = [inner, x_width + (B_groups + C_groups) * state, heads]
        self.xBC = [x_width, B_groups * state, C_groups * state]
        name, channels = f"{prefix}.mamba", self.split[1]
        self.into = p.matrix(f"{name}.in_proj.weight", sum(self.split), model.width)
        self.conv = p.vector(f"{name}.conv1d.weight", channels, 4)
        self.conv_bias = p.vector(f"{name}.conv1d.bias", channels)
        per_head = heads, self.head_dim
        A = -torch.exp(p.vector(f"{name}.A_log", heads, dtype=FLOAT32))
        self.A = A[:, None, None].expand(*per_head, state)
        D = p.vector(f"{name}.D", heads, dtype=FLOAT32)
        self.D = D[:, None].expand(per_head)
        bias = p.vector(f"{name}.dt_bias", heads, dtype=FLOAT32)
        self.dt_bias = bias[:, None].expand(per_head)
        self.norm = p.vector(f"{name}.norm.weight", inner, fill=1.0)
        self.norm_group = self.head_dim if C_groups > 1 else inner
        self.out = p.matrix(f"{name}.out_proj.weight", model.width, inner)
        self.conv_state = model.random_state((model.batch, channels, 4), p.dtype)
        self.state = model.random_state((model.batch, *per_head, state), model.state_dtype)

    def __call__(self, hidden, position: int):
        kernels = self.model.kernels
        z, xBC, dt = F.linear(hidden, self.into).split(self.split, -1)
        xBC = kernels.conv_update(xBC, self.conv_state, self.conv, self.conv_bias)
        x, B, C = xBC.split(self.xBC, -1)
        x = repeated(x.unflatten(-1, (-1, self.head_dim)), self.heads)
        B = repeated(B.unflatten(-1, (-1, self.state_dim)), self.groups[1])
        C = C.unflatten(-1, (-1, self.state_dim))
        dt = dt[..., None].expand(-1, -1, self.head_dim)
        y = kernels.state_update(
            self.state, x, dt, self.A, B, C, self.D, dt_bias=self.dt_bias, dt_softplus=True
        )
        y = kernels.gated_norm(y.flatten(1), self.norm, z, self.model.eps, self.norm_group)
        return F.linear(y, self.out)


class Mamba1:
    """A hybrid's: x, B, C, z and dt's rank from one product, x and B repeated to the heads of C.

    A Mamba model's: x and z from one product, dt's rank, B and C from the convolved x.
    """

    def __init__(self, model: Decoder, prefix: str, inner, state, rank, x_width=None):
        p, width = model.parameters, model.width
        name = f"{prefix}.mamba"
        self.model, self.inner, self.state_dim, self.rank = model, inner, state, rank
        self.x_width = x_width
        self.heads = inner // state if x_width else 1
        if x_width:
            parts = ("in_proj_x", x_width), ("B_proj", x_width), ("C_proj", inner)
            parts = *parts, ("in_proj_z", inner), ("dt_proj_down", rank)
            self.split = [rows for _, rows in parts]
            self.into = p.stacked(width, *((f"{name}.{n}.weight", rows) for n, rows in parts))
        else:
            self.into = p.matrix(f"{name}.in_proj.weight", 2 * inner, width)
            self.x_proj = p.matrix(f"{name}.x_proj.weight", rank + 2 * state, inner)
        self.conv = p.vector(f"{name}.conv1d.weight", inner, 4)
        self.conv_bias = p.vector(f"{name}.conv1d.bias", inner)
        self.dt = p.matrix(f"{name}.dt_proj.weight", inner, rank)
        per_head = self.heads, inner // self.heads
        # The hybrid adds its bias twice, in the product and in the step.
        bias = p.vector(f"{name}.dt_proj.bias", *per_head, dtype=FLOAT32)
        self.dt_bias = 2 * bias if x_width else bias
        self.A = -torch.exp(p.vector(f"{name}.A_log", *per_head, state, dtype=FLOAT32))
        self.D = p.vector(f"{name}.D", *per_head, dtype=FLOAT32)
        self.out = p.matrix(f"{name}.out_proj.weight", width, inner)
        self.conv_state = model.random_state((model.batch, inner, 4), p.dtype)
        self.state = model.random_state((model.batch, *per_head, state), model.state_dtype)

    def __call__(self, hidden, position: int):
        kernels, by_head = self.model.kernels, (self.heads, -1)
        convolve = kernels.conv_update
        if self.x_width:
            x, B, C, z, dt = F.linear(hidden, self.into).split(self.split, -1)
            x, B = (repeated(t.unflatten(-1, (-1, self.state_dim)), self.heads) for t in (x, B))
            x = convolve(x.flatten(1), self.conv_state, self.conv, self.conv_bias)
            B = B.flatten(1)
        else:
            x, z = F.linear(hidden, self.into).chunk(2, -1)
            x = convolve(x, self.conv_state, self.conv, self.conv_bias)
            dt, B, C = F.linear(x, self.x_proj).split(
                [self.rank, self.state_dim, self.state_dim], -1
            )
        x, z = x.unflatten(-1, by_head), z.unflatten(-1, by_head)
        dt = F.linear(dt, self.dt).unflatten(-1, by_head)
        B, C = B.unflatten(-1, by_head), C.unflatten(-1, by_head)
        y = kernels.state_update(
            self.state, x, dt, self.A, B, C, self.D, z=z, dt_bias=self.dt_bias, dt_softplus=True
        )
        return F.linear(y.flatten(1), self.out)


def repeated(x, heads: int):
    """[batch, few, width] -> [batch, heads, width], each one several times in a row."""
    few = x.shape[1]
    return x if few == heads else x[:, :, None].expand(-1, -1, heads // few, -1).flatten(1, 2)


class Mlp:
    def __init__(self, model: Decoder, prefix: str, intermediate: int):
        p, name = model.parameters, f"{prefix}.mlp"
        self.model = model
        gate, up = ((f"{name}.{n}_proj.weight", intermediate) for n in ("gate", "up"))
        self.gate_up = p.stacked(model.width, gate, up)
        self.down = p.matrix(f"{name}.down_proj.weight", model.width, intermediate)

    def __call__(self, x):
        if self.model.kernels.fused:
            return F.linear(self.model.kernels.glu(F.linear(x, self.gate_up)), self.down)
        gate, up = self.gate_up.chunk(2)
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), self.down)


class Decoder:
    """A model that has read `length` tokens of each of `batch` texts (states are random)."""

    def __init__(self, sizes, mamba, batch, length, kernels, state_dtype=None, device="cuda",
                 dtype=BFLOAT16, given=None):  # fmt: skip
        self.parameters = p = Parameters(dtype, device, given)
        self.kernels, self.batch, self.length = kernels, batch, length
        self.state_dtype = state_dtype or dtype
        self.width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
        self.eps = sizes.get("rms_norm_eps", sizes.get("layer_norm_epsilon"))
        self.wide_residual = "rms_norm_eps" not in sizes  # as the Mamba models have it
        self.embedding = p.matrix("model.embed_tokens.weight", sizes["vocab_size"], self.width)
        self.blocks = []
        if self.wide_residual:
            self.blocks = [self._mamba_block(f"model.layers.{i}", sizes) for i in range(layers)]
        else:
            self.head_dim = self.width // sizes["num_attention_heads"]
            self._rotation_tables(sizes["rope_theta"])
            kept = set(mamba["attn_layers"]) if mamba else set(range(layers))
            for i in range(layers):
                mixer = Attention if i in kept else self._hybrid_mixer
                self.blocks += self._llama_block(f"model.layers.{i}", sizes, mixer, mamba)
        self.norm = p.vector("model.norm.weight", self.width, fill=1.0)
        tied = sizes["tie_word_embeddings"]
        self.head = (
            self.embedding if tied else p.matrix("lm_head.weight", sizes["vocab_size"], self.width)
        )
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)

    def random_state(self, shape, dtype):
        if self.parameters.given is not None:
            return torch.zeros(shape, dtype=dtype, device=self.parameters.device)
        return torch.empty(shape, dtype=dtype, device=self.parameters.device).normal_(0, 0.1)

    def _rotation_tables(self, theta: float):
        half = self.head_dim // 2
        frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(self.length + 1, dtype=torch.float64)[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        place = dict(dtype=self.parameters.dtype, device=self.parameters.device)
        self.cos = torch.cat([cos, cos], -1).to(**place)
        self.sin = torch.cat([-sin, sin], -1).to(**place)

    def _mamba_block(self, prefix, sizes):
        norm = self.parameters.vector(f"{prefix}.input_layernorm.weight", self.width, fill=1.0)
        inner, state = 2 * self.width, sizes["state_size"]
        if sizes["model_type"] == "mamba":
            return norm, Mamba1(self, prefix, inner, state, sizes["time_step_rank"])
        return norm, Mamba2(self, prefix, inner, sizes["num_heads"], state, inner, 1, 1)

    def _llama_block(self, prefix, sizes, mixer, mamba):
        vector = self.parameters.vector
        first = vector(f"{prefix}.input_layernorm.weight", self.width, fill=1.0)
        second = vector(f"{prefix}.post_attention_layernorm.weight", self.width, fill=1.0)
        made = mixer(self, prefix, sizes) if mixer is Attention else mixer(prefix, sizes, mamba)
        mlp = Mlp(self, prefix, sizes["intermediate_size"])
        return [(first, made), (second, lambda x, position: mlp(x))]

    def _hybrid_mixer(self, prefix, sizes, mamba):
        inner, x_width = mamba["d_inner"], mamba["d_xb"]
        if "ngroups" in mamba["ssm_cfg"]:
            heads, state = mamba["ssm_cfg"]["ngroups"], mamba["ssm_cfg"]["d_state"]
            return Mamba2(self, prefix, inner, heads, state, x_width, x_width // state, heads)
        return Mamba1(self, prefix, inner, 16, -(-self.width // 16), x_width)

    def logits(self, position: int) -> torch.Tensor:
        x, residual = F.embedding(self.tokens, self.embedding), None
        for weight, block in self.blocks:
            x, residual = self.kernels.norm(x, weight, residual, self.eps, self.wide_residual)
            x = block(x, position)
        x, _ = self.kernels.norm(x, self.norm, residual, self.eps, self.wide_residual)
        return F.linear(x, self.head)

    def step(self) -> None:
        torch.argmax(self.logits(self.length), -1, out=self.tokens)


# ---- decoding: timing ----------------------------------------------------------------------------


def attention_backends(sizes: dict, batch: int, length: int) -> dict[str, float]:
    """Seconds of PyTorch's attention kernels at the shape of this step, those that run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    head_dim = sizes["hidden_size"] // heads
    place = dict(dtype=BFLOAT16, device="cuda")
    q = torch.randn(batch, heads, 1, head_dim, **place)
    k, v = (torch.randn(batch, length, kv_heads, head_dim, **place) for _ in range(2))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    seconds = {}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):

        def call():
            F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which kernel cannot do it, and why
            with sdpa_kernel(getattr(SDPBackend, name)):
                seconds[name] = recorded_seconds(call, rounds=7, inner=5)
    return seconds


def decode(name, batch, context, tokens, variant, state_dtype=None) -> dict:
    """Seconds of a step of `batch` texts, at the middle of `tokens` tokens after `context`: the
    best of rounds of as many steps as give these tokens."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    sizes, mamba = configs(name)
    if PART in os.environ:  # two layers have all kernels of the model
        sizes = {**sizes, "num_hidden_layers": 2}
        mamba = mamba and {**mamba, "attn_layers": [1]}
    length = context + tokens // 2
    backends = (
        attention_backends(sizes, batch, length + 1) if "num_attention_heads" in sizes else {}
    )
    best = min(backends, key=backends.get) if backends else "FLASH_ATTENTION"
    with torch.inference_mode(), sdpa_kernel(getattr(SDPBackend, best)):
        model = Decoder(sizes, mamba, batch, length, KERNELS[variant](), state_dtype)
        begin = time.perf_counter()
        graph = graph_of(model.step)
        made = time.perf_counter() - begin
        times = steps_in_a_row(graph.replay, tokens - 1)
        healthy = bool(torch.isfinite(model.logits(length)).all())
    return {
        "model": name,
        "batch": batch,
        "context": context,
        "tokens": tokens,
        "peer": f"torch + {variant}",
        "seconds": min(times),
        "all_seconds": times,
        "tokens_per_second": batch / min(times),
        "state_dtype": str(model.state_dtype).removeprefix("torch."),
        "attention": best.lower(),
        "attention_us": {k.lower(): v * 1e6 for k, v in backends.items()},
        "recording_seconds": made,
        "finite": healthy,
    }


def transformers_decode(name: str, context: int, tokens: int) -> dict:
    """transformers' own Llama with a static cache, one token in a CUDA graph."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
    except ImportError as error:
        raise Absent(f"transformers cannot be imported: {error}") from None
    sizes, _ = configs(name)
    config = LlamaConfig(**{k: v for k, v in sizes.items() if k != "model_type"})
    length = context + tokens
    with torch.device("cuda"), torch.inference_mode():
        torch.set_default_dtype(BFLOAT16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(FLOAT32)
        cache = StaticCache(config=config, max_cache_len=length)
        prompt = torch.randint(0, sizes["vocab_size"], (1, context))
        token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
        at = torch.tensor([context])

        def step():
            out = model(
                token, past_key_values=cache, cache_position=at, position_ids=at[None]
            ).logits
            token.copy_(out[:, -1:].argmax(-1))

        graph = graph_of(step)
        seconds = min(steps_in_a_row(graph.replay, tokens - 1))
    return {
        "model": name,
        "batch": 1,
        "context": context,
        "peer": "transformers, static cache, CUDA graph",
        "seconds": seconds,
        "tokens_per_second": 1 / seconds,
    }


# ---- operators -----------------------------------------------------------------------------------


def random_activations(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=BFLOAT16, device="cuda")


def ssd_inputs(batch: int, length: int, groups: int = 1, heads: int = 32, width: int = 128):
    x = random_activations(batch, length, heads, width)
    B, C = (random_activations(batch, length, groups, width) for _ in range(2))
    dt = random_activations(batch, length, heads) - 4
    A = -torch.rand(heads, device="cuda") - 0.5
    D, dt_bias = torch.randn(heads, device="cuda"), torch.randn(heads, device="cuda") * 0.1
    return x, dt, A, B, C, D, dt_bias


def ssd_mamba(batch: int, length: int, groups: int = 1, chunks=(128, 256)) -> dict:
    """mamba_chunk_scan_combined: softplus of dt, the scan, D; the better of two chunk lengths."""
    combined = mamba_module("ssd_combined").mamba_chunk_scan_combined
    x, dt, A, B, C, D, dt_bias = ssd_inputs(batch, length, groups)
    tried = {
        chunk: recorded_seconds(
            lambda chunk=chunk: combined(
                x, dt, A, B, C, chunk, D=D, dt_bias=dt_bias, dt_softplus=True
            )
        )
        for chunk in chunks
    }
    best = min(tried, key=tried.get)
    return {
        "peer": f"mamba-ssm mamba_chunk_scan_combined, chunks of {best}",
        "seconds": tried[best],
        "tried": tried,
    }


def ssd_fla(batch: int, length: int, chunks=(64, 128)) -> dict:
    """chunk_simple_gla with q = C, k = B, v = dt x, g = dt A and scale 1: the same recurrence.

    Softplus, dt x and D are not in it and not counted: in its favour.
    """
    simple_gla = fla_module("ops.simple_gla").chunk_simple_gla
    x, dt, A, B, C, D, dt_bias = ssd_inputs(batch, length)
    dt = F.softplus(dt.float() + dt_bias)
    v, g = (x * dt[..., None]).to(BFLOAT16), dt * A
    k, q = (t.expand(-1, -1, x.shape[2], -1).contiguous() for t in (B, C))
    tried = {
        chunk: recorded_seconds(lambda c=chunk: simple_gla(q, k, v, g, scale=1.0, chunk_size=c))
        for chunk in chunks
    }
    best = min(tried, key=tried.get)
    return {
        "peer": f"fla-core chunk_simple_gla (without softplus, dt x, D), chunks of {best}",
        "seconds": tried[best],
        "tried": tried,
    }


# ---- mamba-ssm's CUDA scan -----------------------------------------------------------------------

SCAN_CODE = Path(__file__).parent / "workers" / "mamba_scan.cu"


def find_scan_source(given: str | None) -> Path:
    """The folder csrc/selective_scan of mamba-ssm: a folder, or its source archive."""
    if given is None:
        raise Absent(
            "give mamba-ssm's source archive by --mamba-source (its wheel has no CUDA code)"
        )
    path = Path(given)
    if path.is_file():
        folder = Path(tempfile.gettempdir()) / "mamba-ssm-source"
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        path = folder
    found = sorted(path.glob("**/selective_scan_fwd_kernel.cuh"))
    if not found:
        raise Absent(f"{given}: there is no selective_scan_fwd_kernel.cuh")
    return found[0].parent


def build_scan(source: str | None, architecture: str | None = None) -> Path:
    """Compiles the kernel with nvcc, once, into a folder of the cache; the library."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "mil-gpu-peers"))
    library = folder / "selective_scan.so"
    if library.exists():
        return library
    headers = find_scan_source(source)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise Absent("nvcc was not found")
    folder.mkdir(parents=True, exist_ok=True)
    if architecture is None:
        architecture = "{}{}".format(*torch.cuda.get_device_capability())
    include = Path(torch.__file__).parent / "include"
    command = [
        nvcc, "-O3", "-std=c++17", "--use_fast_math", "--expt-relaxed-constexpr",
        "--expt-extended-lambda", "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__",
        "-U__CUDA_NO_BFLOAT16_OPERATORS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
        "-U__CUDA_NO_BFLOAT162_OPERATORS__", "-U__CUDA_NO_BFLOAT162_CONVERSIONS__",
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-shared", "-Xcompiler", "-fPIC", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE",
        "-I", str(headers), "-I", str(include),
        "-I", str(include / "torch" / "csrc" / "api" / "include"),
        str(SCAN_CODE), "-o", f"{library}.new",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["nvcc failed"]
        raise Absent(f"mamba-ssm's scan does not compile: {lines[0][:300]}")
    os.replace(f"{library}.new", library)
    return library


def scan_mamba(batch: int, length: int, inner: int, state: int, source: str | None) -> dict:
    """selective_scan's forward: softplus, scan, D, gate; arrays as the package wants them
    ([batch, channels, length])."""
    if length % 2048:
        raise Absent("only lengths of whole chunks of 2048 are compiled")
    # torch has loaded the CUDA runtime and c10; symbols of theirs that the kernel wants are found.
    library = ctypes.CDLL(str(build_scan(source)))
    u, delta, z = (random_activations(batch, inner, length) for _ in range(3))
    B, C = (random_activations(batch, 1, state, length) for _ in range(2))
    A = -torch.rand(inner, state, device="cuda") - 0.5
    D, bias = torch.randn(inner, device="cuda"), torch.randn(inner, device="cuda")
    chunks = torch.empty(batch, inner, -(-length // 2048), 2 * state, device="cuda")
    out, gated = torch.empty_like(u), torch.empty_like(u)

    def call(use_z=True):
        arrays = [u, delta, A, B, C, D, bias, z if use_z else None, chunks, out]
        arrays.append(gated if use_z else None)
        pointers = [ctypes.c_void_p(None if a is None else a.data_ptr()) for a in arrays]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = library.scan_forward(batch, inner, length, state, *pointers, stream)
        if error:
            raise Absent(f"mamba-ssm's scan failed: CUDA error {error}")

    call()
    error = scan_error(u, delta, A, B, C, D, bias, z, gated)
    return {
        "peer": "mamba-ssm selective_scan_fwd (CUDA, bfloat16), gated",
        "seconds": recorded_seconds(call),
        "seconds_without_gate": recorded_seconds(lambda: call(False)),
        "error": error,
    }


def scan_error(u, delta, A, B, C, D, bias, z, got, tokens: int = 64) -> float:
    """The largest difference from the recurrence in float32 over the first tokens and channels,
    relative to the largest value."""
    rows = slice(0, 64)
    state = torch.zeros(u.shape[0], 64, A.shape[1], device=u.device)
    outputs = []
    for t in range(tokens):
        dt = F.softplus(delta[:, rows, t].float() + bias[rows])
        x, gate = u[:, rows, t].float(), z[:, rows, t].float()
        state = state * torch.exp(dt[..., None] * A[rows])
        state = state + (dt * x)[..., None] * B[:, :, :, t].float()
        y = (state * C[:, :, :, t].float()).sum(-1) + D[rows] * x
        outputs.append(y * F.silu(gate))
    wanted = torch.stack(outputs, -1)
    return float((got[:, rows, :tokens].float() - wanted).abs().max() / wanted.abs().max())


# ---- rates ---------------------------------------------------------------------------------------


def copy_rate() -> float:
    """Bytes read and written a second by a copy within the device. (Buffers of a power of two can
    be a fifth slower: they fall on the same channels.)"""
    a = torch.empty(1_500_000 * 1024, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds_of(lambda: b.copy_(a), rounds=12)


def product_rate(rows: int, k: int, n: int) -> float:
    """Flops a second of a bfloat16 product of random numbers, rows x k by n x k transposed."""
    x, weight = random_activations(rows, k), random_activations(n, k)
    out = torch.empty(rows, n, dtype=BFLOAT16, device="cuda")
    seconds = seconds_of(lambda: torch.matmul(x, weight.T, out=out), rounds=10)
    return 2 * rows * k * n / seconds


PRODUCTS_8B = {
    "q, k, v": (4096, 6144),
    "mamba2 in_proj": (4096, 10272),
    "out": (4096, 4096),
    "gate, up": (4096, 28672),
    "down": (14336, 4096),
}


def rates(products: bool = True) -> dict:
    found = {"copy": copy_rate(), "gemm": product_rate(8192, 8192, 8192)}
    if products:
        found["products_16384_rows"] = {
            name: product_rate(16384, *shape) for name, shape in PRODUCTS_8B.items()
        }
    return found


# ---- program -------------------------------------------------------------------------------------


def answer(kind: str, call: Callable[[], dict], **labels) -> None:
    """One JSON line: what was found, or why not."""
    begin = time.perf_counter()
    try:
        found = call()
    except Absent as reason:
        found = {"absent": str(reason)}
    except Exception as error:  # a peer's own trouble must not end the others
        found = {"absent": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    took = time.perf_counter() - begin
    print(json.dumps({"kind": kind, **labels, **found, "took": round(took, 2)}), flush=True)
    gc.collect()  # models and their graphs are in cycles
    torch.cuda.empty_cache()


SSD_SHAPES = {"8 x 2048": (8, 2048), "1 x 16384": (1, 16384)}


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def decode_all(options) -> None:
    dtype = FLOAT32 if options.float32_states else None
    lists = [numbers(text) for text in (options.batch, options.context, options.tokens)]
    count = max(map(len, lists))
    work = zip(*(found * count if len(found) == 1 else found for found in lists), strict=True)
    for name, sizes in itertools.product(options.models.split(","), list(work)):
        batch, context, _ = sizes
        for variant in options.variants.split(","):
            answer(
                "decode",
                lambda n=name, s=sizes, v=variant: decode(n, *s, v, dtype),
                model=name,
                batch=batch,
                context=context,
                peer=f"torch + {variant}",
                state_dtype="float32" if dtype else "bfloat16",
            )


def ssd_all(options) -> None:
    limit = {}
    if options.variants_tried:
        tune_a_few(options.variants_tried)
        limit = {"variants_tried": options.variants_tried}
    # One length is enough to compile for all.
    for label, shape in list(SSD_SHAPES.items())[: 1 if PART in os.environ else None]:
        for peer, call in (("mamba-ssm", ssd_mamba), ("fla-core", ssd_fla)):
            if peer in options.operators.split(","):
                chunks = {"chunks": numbers(options.chunks)} if options.chunks else {}
                answer(
                    "ssd",
                    lambda c=call, s=shape, k=chunks: c(*s, **k),
                    shape=label,
                    peer=peer,
                    **limit,
                )


def scan_all(options) -> None:
    for label, (batch, length) in SSD_SHAPES.items():
        answer(
            "scan",
            lambda b=batch, n=length: scan_mamba(b, n, 4096, 16, options.mamba_source),
            shape=label,
            peer="mamba-ssm",
        )


def transformers_all(options) -> None:
    answer(
        "decode",
        lambda: transformers_decode("8b", 512, 513),
        model="8b",
        peer="transformers",
    )


COMMANDS = {
    "rates": lambda options: answer("rates", rates),
    "decode": decode_all,
    "ssd": ssd_all,
    "scan": scan_all,
    "transformers": transformers_all,
    "build-scan": lambda options: answer(
        "build", lambda: {"library": str(build_scan(options.mamba_source))}
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="+", choices=COMMANDS)
    parser.add_argument("--models", default="8b-mamba2")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--batch", default="1", help="one, or several with as many contexts")
    parser.add_argument("--context", default="512")
    parser.add_argument("--tokens", default="513", help="generated; timed in their middle")
    parser.add_argument("--operators", default="mamba-ssm,fla-core", help="peers of ssd")
    parser.add_argument("--chunks", default="", help="chunk lengths that ssd tries (two each)")
    parser.add_argument("--float32-states", action="store_true", help="states as ours have them")
    parser.add_argument(
        "--mamba-source",
        default=os.environ.get("MAMBAINLLAMA_MAMBA_SOURCE"),
        help="mamba-ssm's source archive or folder, for its CUDA scan",
    )
    parser.add_argument(
        "--compile-first", type=int, default=0, metavar="N",
        help="let N processes compile Triton's kernels before anything is timed",
    )  # fmt: skip
    parser.add_argument(
        "--variants-tried", type=int, metavar="N",
        help="at most N of each Triton kernel's tuned variants in ssd: quick, and less than fair",
    )  # fmt: skip
    options = parser.parse_args()
    if options.compile_first:
        compile_first(sys.argv[1:], options.compile_first)
    if tune_a_part_only():
        options.commands = [c for c in options.commands if c in ("decode", "ssd")]
    if not torch.cuda.is_available():
        raise SystemExit("gpu_peers: no GPU that torch can use")
    print(json.dumps({"kind": "versions", "versions": versions()}), flush=True)
    for command in options.commands:
        COMMANDS[command](options)


if __name__ == "__main__":
    main()
