"""The hybrids of this project in plain PyTorch, as somebody would write them in an afternoon.

transformers has no MambaInLlama hybrid, and the published code needs CUDA and Triton. So that the
CPU has a peer, attention layers of a transformers Llama are exchanged for the modules below: the
same formulas, whole tensors at a time, autograd for the gradients, no kernels of its own. Mamba-2
runs in chunks of matrix products (the dual form, Dao and Gu 2024, listing 1), a single token by the
recurrence. Mamba-1 has no such form: it serves decoding only.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 64
CONV = 4


class DepthwiseConv(nn.Module):
    """Causal convolution of each channel, then silu; keeps the last inputs while decoding."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, CONV))
        self.bias = nn.Parameter(torch.empty(channels))
        self.window = None  # [batch, channels, CONV - 1]

    def forward(self, x, keep):
        """x [batch, length, channels]; `keep` starts or continues a sequence."""
        x = x.transpose(1, 2)
        past = (
            self.window if keep and self.window is not None else x.new_zeros(*x.shape[:2], CONV - 1)
        )
        joined = torch.cat([past, x], dim=-1)
        if keep:
            self.window = joined[..., 1 - CONV :]
        y = F.conv1d(joined, self.weight.to(x.dtype), self.bias.to(x.dtype), groups=x.shape[1])
        return F.silu(y).transpose(1, 2)


class Mamba2(nn.Module):
    """Projections z, x, B, C, dt; x and B have fewer heads than C, as keys and values in GQA."""

    def __init__(self, hidden, heads, kv_heads, head_dim):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        inner, narrow = heads * head_dim, kv_heads * head_dim
        self.widths = [inner, 2 * narrow + inner, heads]
        self.in_proj = nn.Linear(hidden, sum(self.widths), bias=False)
        self.conv1d = DepthwiseConv(self.widths[1])
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, hidden, bias=False)
        self.state = None  # [batch, heads, head_dim of x, head_dim of B]
        self.decoding = False

    def forward(self, u):
        batch, length, _ = u.shape
        narrow = self.kv_heads * self.head_dim
        z, xBC, dt = self.in_proj(u).split(self.widths, dim=-1)
        xBC = self.conv1d(xBC, self.decoding)
        x, B, C = (
            t.reshape(batch, length, -1, self.head_dim).float()
            for t in xBC.split([narrow, narrow, self.widths[0]], dim=-1)
        )
        x, B = (t.repeat_interleave(self.heads // self.kv_heads, dim=2) for t in (x, B))
        dt = F.softplus(dt.float() + self.dt_bias.float())
        decay = -self.A_log.float().exp() * dt
        if self.decoding and length == 1:
            y = self.step(x[:, 0] * dt[:, 0, :, None], decay[:, 0], B[:, 0], C[:, 0])[:, None]
        else:
            y = self.chunks(x * dt[..., None], decay, B, C)
        y = (y + self.D.float()[:, None] * x) * F.silu(z.reshape(y.shape).float())
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.norm.eps)  # one norm a head
        return self.out_proj((y.reshape(batch, length, -1) * self.norm.weight).to(u.dtype))

    def step(self, x, decay, B, C):
        self.state = decay.exp()[..., None, None] * self.state + x[..., None] * B[..., None, :]
        return (self.state @ C[..., None])[..., 0]

    def chunks(self, x, decay, B, C):
        """y_t = sum over s <= t of exp(decay_{s+1} + ... + decay_t) (C_t . B_s) x_s."""
        length = x.shape[1]
        missing = -length % CHUNK
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, missing)) for t in (x, B, C))
        # [batch, heads, chunks, CHUNK, ...]
        x, B, C = (t.unflatten(1, (-1, CHUNK)).movedim(3, 1) for t in (x, B, C))
        sums = F.pad(decay, (0, 0, 0, missing)).unflatten(1, (-1, CHUNK)).movedim(3, 1).cumsum(-1)
        later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
        between = (sums[..., :, None] - sums[..., None, :]).masked_fill(~later, -torch.inf).exp()
        inside = (C @ B.transpose(-1, -2) * between) @ x
        total = sums[..., -1]
        added = (x * (total[..., None] - sums).exp()[..., None]).transpose(-1, -2) @ B
        state = torch.zeros_like(added[:, :, 0]) if self.state is None else self.state
        before = []
        for i in range(added.shape[2]):
            before.append(state)
            state = total[:, :, i, None, None].exp() * state + added[:, :, i]
        if self.decoding:
            self.state = state
        across = C @ torch.stack(before, dim=2).transpose(-1, -2) * sums.exp()[..., None]
        return (inside + across).movedim(1, 3).flatten(1, 2)[:, :length]


class Mamba1(nn.Module):
    """Selective scan of each channel with groups of 16 sharing B and C; token by token."""

    def __init__(self, hidden, heads, kv_heads, head_dim):
        super().__init__()
        inner, narrow, rank = heads * head_dim, kv_heads * head_dim, -(-hidden // 16)
        self.repeat = heads // kv_heads
        self.in_proj_x = nn.Linear(hidden, narrow, bias=False)
        self.in_proj_z = nn.Linear(hidden, inner, bias=False)
        self.B_proj = nn.Linear(hidden, narrow, bias=False)
        self.C_proj = nn.Linear(hidden, inner, bias=False)
        self.dt_proj_down = nn.Linear(hidden, rank, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.conv1d = DepthwiseConv(inner)
        self.A_log = nn.Parameter(torch.empty(inner, 16))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, hidden, bias=False)
        self.state = None  # [batch, inner, 16]
        self.decoding = False

    def forward(self, u):
        x, B = (
            proj(u).unflatten(-1, (-1, 16)).repeat_interleave(self.repeat, dim=2)
            for proj in (self.in_proj_x, self.B_proj)
        )
        x = self.conv1d(x.flatten(2), self.decoding).float()
        C = self.C_proj(u).unflatten(-1, (-1, 16)).float()
        dt = self.dt_proj(self.dt_proj_down(u)).float() + self.dt_proj.bias.float()  # bias twice
        dt, A = F.softplus(dt), -self.A_log.float().exp()
        state = x.new_zeros(*x.shape[::2], 16) if self.state is None else self.state
        rows = []
        for t in range(u.shape[1]):
            added = (dt[:, t] * x[:, t]).unflatten(-1, (-1, 16))[..., None] * B[
                :, t, :, None
            ].float()
            state = (dt[:, t, :, None] * A).exp() * state + added.flatten(1, 2)
            rows.append((state.unflatten(1, (-1, 16)) @ C[:, t, :, :, None]).flatten(1))
        if self.decoding:
            self.state = state
        y = torch.stack(rows, dim=1) + self.D.float() * x
        return self.out_proj((y * F.silu(self.in_proj_z(u).float())).to(u.dtype))


class InPlaceOfAttention(nn.Module):
    """Answers a transformers layer's call of its attention."""

    def __init__(self, mamba):
        super().__init__()
        self.mamba = mamba

    def forward(self, hidden_states, **_):
        return self.mamba(hidden_states), None


def build(folder, config, mamba_config, dtype):
    """The hybrid of a folder as a transformers Llama with exchanged layers."""
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    kind = Mamba2 if "ngroups" in mamba_config["ssm_cfg"] else Mamba1
    sizes = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        for number, layer in enumerate(model.model.layers):
            if number not in mamba_config["attn_layers"]:
                layer.self_attn = InPlaceOfAttention(kind(*sizes))
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            # The published layout has the mixer beside the layer's norms, under "mamba".
            tensors[name.replace(".mamba.", ".self_attn.mamba.")] = tensor.to(dtype)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer is in no file
    return model


def set_decoding(model, decoding):
    """Forgets the states; then keeps them from call to call, or not."""
    for module in model.modules():
        if isinstance(module, (Mamba1, Mamba2)):
            module.state, module.conv1d.window, module.decoding = None, None, decoding
