"""The whole model in PyTorch, slowly: a judge for logits and, through autograd, for gradients.

Driven by the canonical configuration and parameter names (``_core.Model``), in float64, one token
of the recurrences at a time, so that nothing here shares an algorithm with the C code.
"""

import math

import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def rotate(x, inv_freq, rotary):
    """RoPE of x [length, heads, head_dim], pairs (i, i + rotary / 2)."""
    if rotary == 0:
        return x
    angle = torch.arange(x.shape[0], dtype=x.dtype)[:, None] * inv_freq[None, :]
    cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]
    a, b, rest = x[..., : rotary // 2], x[..., rotary // 2 : rotary], x[..., rotary:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def attention(u, p, c, config):
    length, heads, dim = u.shape[0], c["heads"], c["head_dim"]
    kv_heads = c.get("kv_heads", heads)
    q = F.linear(u, p["self_attn.q_proj.weight"], p.get("self_attn.q_proj.bias")).view(
        length, heads, dim
    )
    k = F.linear(u, p["self_attn.k_proj.weight"], p.get("self_attn.k_proj.bias")).view(
        length, kv_heads, dim
    )
    v = F.linear(u, p["self_attn.v_proj.weight"], p.get("self_attn.v_proj.bias")).view(
        length, kv_heads, dim
    )
    if "self_attn.q_norm.weight" in p:
        q = rms_norm(q, p["self_attn.q_norm.weight"], config["norm_eps"])
        k = rms_norm(k, p["self_attn.k_norm.weight"], config["norm_eps"])
    inv_freq = torch.tensor(config["rope"]["inv_freq"], dtype=u.dtype)
    q, k = rotate(q, inv_freq, c.get("rotary", 0)), rotate(k, inv_freq, c.get("rotary", 0))
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * c.get("attention_scale", 1 / math.sqrt(dim))
    position = torch.arange(length)
    visible = position[None, :] <= position[:, None]
    if c.get("window", 0):
        visible &= position[None, :] > position[:, None] - c["window"]
    scores = scores.masked_fill(~visible, -torch.inf)
    y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, heads * dim)
    return F.linear(y, p["self_attn.o_proj.weight"], p.get("self_attn.o_proj.bias"))


def causal_conv(x, weight, bias):
    """silu of the depthwise convolution of x [length, channels]."""
    width = weight.shape[-1]
    padded = torch.cat([x.new_zeros(width - 1, x.shape[1]), x])
    windows = padded.unfold(0, width, 1)  # [length, channels, width]
    y = (windows * weight[:, 0]).sum(-1)
    return F.silu(y if bias is None else y + bias)


def repeat_groups(x, inner, group):
    """Runs of `group` channels, each repeated in a row until there are `inner` channels."""
    length, width = x.shape
    return (
        x.view(length, width // group, group)
        .repeat_interleave(inner // width, dim=1)
        .reshape(length, inner)
    )


def mamba1(u, p, c, config):
    inner, n = c["inner"], c["state_dim"]
    if c.get("x_proj"):
        x, z = F.linear(u, p["mamba.in_proj.weight"], p.get("mamba.in_proj.bias")).chunk(2, dim=-1)
        x = causal_conv(x, p["mamba.conv1d.weight"], p.get("mamba.conv1d.bias"))
        low, B, C = F.linear(x, p["mamba.x_proj.weight"]).split([c["dt_rank"], n, n], dim=-1)
        if c.get("bcdt_norm"):
            names = ("dt_layernorm", "b_layernorm", "c_layernorm")
            low, B, C = (
                rms_norm(t, p.get(f"mamba.{name}.weight"), c["bcdt_eps"])
                for t, name in zip((low, B, C), names, strict=False)
            )
    else:
        x = F.linear(u, p["mamba.in_proj_x.weight"])
        if c.get("repeat_before_conv", True):
            x = repeat_groups(x, inner, n)
        x = causal_conv(x, p["mamba.conv1d.weight"], p.get("mamba.conv1d.bias"))
        x = repeat_groups(x, inner, n) if x.shape[1] < inner else x
        z = F.linear(u, p["mamba.in_proj_z.weight"])
        B, C = F.linear(u, p["mamba.B_proj.weight"]), F.linear(u, p["mamba.C_proj.weight"])
        low = F.linear(u, p["mamba.dt_proj_down.weight"])
    dt = (
        F.linear(low, p["mamba.dt_proj.weight"])
        + c.get("dt_bias_scale", 1) * p["mamba.dt_proj.bias"]
    )
    dt = F.softplus(dt).clamp(c.get("dt_min", 0), c.get("dt_max", math.inf))
    A = -p["mamba.A_log"].exp()
    B = B.view(len(u), -1, n).repeat_interleave(inner // (B.shape[1] // n), dim=1)
    C = C.view(len(u), -1, n).repeat_interleave(inner // (C.shape[1] // n), dim=1)
    state, y = x.new_zeros(inner, n), []
    for t in range(len(u)):
        state = (dt[t][:, None] * A).exp() * state + (dt[t] * x[t])[:, None] * B[t]
        y.append((state * C[t]).sum(-1) + p["mamba.D"] * x[t])
    return F.linear(
        torch.stack(y) * F.silu(z), p["mamba.out_proj.weight"], p.get("mamba.out_proj.bias")
    )


def mamba2(u, p, c, config):
    heads, dim, n = c["heads"], c["head_dim"], c["state_dim"]
    inner, x_width, length = heads * dim, c.get("x_width", heads * dim), len(u)
    b, g = c["B_groups"] * n, c["C_groups"] * n
    projected = F.linear(u, p["mamba.in_proj.weight"], p.get("mamba.in_proj.bias"))
    z, xbc, dt = projected.split([inner, x_width + b + g, heads], dim=-1)
    xbc = causal_conv(xbc, p["mamba.conv1d.weight"], p.get("mamba.conv1d.bias"))
    x, B, C = xbc.split([x_width, b, g], dim=-1)
    x = x.view(length, -1, dim).repeat_interleave(inner // x_width, dim=1)
    B = B.view(length, -1, n).repeat_interleave(heads // c["B_groups"], dim=1)
    C = C.view(length, -1, n).repeat_interleave(heads // c["C_groups"], dim=1)
    dt = F.softplus(dt + p["mamba.dt_bias"]).clamp(c.get("dt_min", 0), c.get("dt_max", math.inf))
    A = -p["mamba.A_log"].exp()
    state, rows = x.new_zeros(heads, dim, n), []
    for t in range(length):
        state = (dt[t] * A).exp()[:, None, None] * state + dt[t][:, None, None] * x[t][
            :, :, None
        ] * B[t][:, None, :]
        rows.append((state * C[t][:, None, :]).sum(-1) + p["mamba.D"][:, None] * x[t])
    y = torch.stack(rows).reshape(length, inner)
    group = c.get("norm_group", 0)
    if group == 0:
        y = y * F.silu(z)
    else:
        y = y if c.get("norm_before_gate") else y * F.silu(z)
        y = rms_norm(y.view(length, -1, group), None, c.get("mixer_norm_eps", 1e-5)).reshape(
            length, inner
        )
        y = y * p["mamba.norm.weight"]
        y = y * F.silu(z) if c.get("norm_before_gate") else y
    return F.linear(y, p["mamba.out_proj.weight"], p.get("mamba.out_proj.bias"))


MIXERS = {"attention": attention, "mamba1": mamba1, "mamba2": mamba2}
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def mlp(u, p, c):
    up = F.linear(u, p["mlp.up_proj.weight"], p.get("mlp.up_proj.bias"))
    activation = ACTIVATIONS[c.get("activation", "silu")]
    if c.get("gated", True):
        product = (
            activation(F.linear(u, p["mlp.gate_proj.weight"], p.get("mlp.gate_proj.bias"))) * up
        )
    else:
        product = activation(up)
    return F.linear(product, p["mlp.down_proj.weight"], p.get("mlp.down_proj.bias"))


def tensors(parameters, requires_grad=False):
    """float64 tensors of a dict of NumPy arrays."""
    return {
        name: torch.tensor(a, dtype=torch.float64, requires_grad=requires_grad)
        for name, a in parameters.items()
    }


def forward(config, parameters, tokens, hidden=None, mixers=None):
    """Logits [length, vocab] of one sequence.

    Appends the residual stream after each layer to `hidden`, the mixers' outputs to `mixers`.
    """
    x = parameters["model.embed_tokens.weight"][torch.as_tensor(tokens, dtype=torch.long)]
    x = x * config.get("embedding_scale", 1.0)
    for i, c in enumerate(config["layers"]):
        prefix = f"model.layers.{i}."
        p = {name[len(prefix) :]: t for name, t in parameters.items() if name.startswith(prefix)}
        y = MIXERS[c["mixer"]](
            rms_norm(x, p["input_layernorm.weight"], config["norm_eps"]), p, c, config
        )
        if mixers is not None:
            mixers.append(y)
        x = x + y
        if c.get("intermediate", 0):
            x = x + mlp(rms_norm(x, p["post_attention_layernorm.weight"], config["norm_eps"]), p, c)
        if hidden is not None:
            hidden.append(x)
    x = rms_norm(x, parameters["model.norm.weight"], config["norm_eps"])
    output = parameters["model.embed_tokens.weight" if config["tied"] else "lm_head.weight"]
    return F.linear(x, output) * config.get("logit_scale", 1.0)
