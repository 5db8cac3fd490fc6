"""The OLMoE transformer (arXiv 2409.02060) in plain PyTorch.

A row is a sequence of its own or, with a cache, one of n versions (rosters) of the same token. Nothing here knows of
noise: a function `route` decides which experts run, and if it returns more rows than it was given, the path branches
there. Attribute names equal the tensor names in OLMoE's checkpoints, without their prefix "model.".

Shapes: n rows, T positions, d hidden_size, E experts, k experts per token, H query heads, Hk key-value heads of size D,
S positions shared by all rows, C positions of a row's own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Config:
    """The fields of OLMoE's config.json that are used here, under their own names; and `tau`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of one expert
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    norm_topk_prob: bool = False  # True: the weights of the chosen experts are scaled to sum to 1
    clip_qkv: float | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = None
    tau: list[float] | None = None  # routing temperatures, one per layer: what a file tau.json beside the model says

    head_dim = property(lambda self: self.hidden_size // self.num_attention_heads)


class OLMoE(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        weight = torch.empty(config.vocab_size, config.hidden_size).uniform_(-0.03, 0.03)
        # nn.Embedding(V, d) would draw its own, which on "meta" takes a second of imports.
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head = None if config.tie_word_embeddings else head

    device = property(lambda self: self.embed_tokens.weight.device)
    dtype = property(lambda self: self.embed_tokens.weight.dtype)

    def forward(self, tokens: Tensor, cache=None, route: Callable | None = None) -> Tensor:
        """Predicts the next token at every position: ids [n, T] -> logits [rows, T, V], rows as the last route made.

        With a cache of `cache.py` one row comes in, whose tokens follow those that the cache holds. Without one, every
        row is a sequence. route(layer, router logits [n, T, E]) -> weights, indices [n or more, T, k]: `top_k`.
        """
        x = self.norm(self.hidden(tokens, cache, route))
        return self.lm_head(x) if self.lm_head else F.linear(x, self.embed_tokens.weight)

    def hidden(self, tokens: Tensor, cache=None, route: Callable | None = None) -> Tensor:
        """As `forward`, but makes no prediction: returns the hidden states [rows, T, d] before the final norm."""
        config, D, T = self.config, self.config.head_dim, tokens.shape[1]
        route = route or (lambda _, logits: top_k(logits, config.num_experts_per_tok, config.norm_topk_prob))
        frequencies = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, device=self.device) / D)
        positions = torch.arange(T, device=self.device) + (cache.length if cache else 0)
        angles = positions[:, None] * frequencies  # [T, D/2]
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = block(x, cos, sin, cache, route)
        if cache:
            cache.length += T
        return x


class Layer(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, layer)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache, route: Callable) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x), route)  # where the path branches, one row plus n rows


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        d, D, Hk = config.hidden_size, config.head_dim, config.num_key_value_heads
        self.layer, self.head_dim, self.clip, self.attend = layer, D, config.clip_qkv, attend  # speed_up sets another
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, Hk * D, bias=False)
        self.v_proj = nn.Linear(d, Hk * D, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        # OLMoE normalises the whole projection, before the heads are split.
        self.q_norm = nn.RMSNorm(d, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(Hk * D, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache) -> Tensor:
        n, T, d = x.shape
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q, k, v = (t.view(n, T, -1, self.head_dim).transpose(1, 2) for t in (q, k, v))  # [n, H or Hk, T, D]
        q, k = rotate(torch.cat((q, k), 1), cos, sin).split((q.shape[1], k.shape[1]), 1)  # one call takes less time
        if cache:
            out = self.attend(q, *cache.update(self.layer, k, v))
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(n, T, d))


def attend(q: Tensor, shared_k: Tensor, shared_v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
    """Causal attention to positions shared by all rows and to positions of the row's own, under one softmax.

    Args:
        q: queries [n, H, T, D]; the result has their shape.
        shared_k, shared_v: [1, Hk, S, D], read once for all rows and not copied.
        own_k, own_v: [n, Hk, T, C, D], C positions for each query.

    What T = 3 queries see (x) after a history of 4 positions:
        n rows, S = 6, C = 1     shared    own        one row, S = 7, C = 0     shared
        first query            x x x x . .  x         first query            x x x x x . .
        second                 x x x x x .  x         second                 x x x x x x .
        last                   x x x x x x  x         last                   x x x x x x x
    """
    (n, H, T, D), (_, Hk, S, _) = q.shape, shared_k.shape
    q = (q * D**-0.5).view(n, Hk, -1, T, D).transpose(0, 1)  # [Hk, n, g, T, D]: g query heads share a key-value head
    # Keys times queries, which are few, take a quarter of the time that queries times keys would.
    shared = (shared_k[0] @ q.flatten(1, 3).mT).mT.view(*q.shape[:-1], S)
    if T > 1:
        later = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)  # query i sees S - T + 1 + i
        shared.masked_fill_(later, -torch.inf)
    own = torch.einsum("hngtd,nhtcd->hngtc", q, own_k)
    of_shared, of_own = torch.cat((shared, own), -1).softmax(-1).split((S, own.shape[-1]), -1)
    out = (of_shared.flatten(1, 3) @ shared_v[0]).view(q.shape) + torch.einsum("hngtc,nhtcd->hngtd", of_own, own_v)
    return out.transpose(0, 1).reshape(n, H, T, D)


class MoE(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)  # the router
        self.experts = Experts(Expert(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor, route: Callable) -> Tensor:
        weights, indices = route(self.layer, self.gate(x))
        x = x.expand(len(indices), -1, -1)  # the path branches here, if the route made n rows of one
        return self.experts(x, weights.to(x.dtype), indices)


class Experts(nn.ModuleList):
    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs, each read once: x [n, T, d], the others [n, T, k]."""
        out = torch.zeros_like(x)
        for e in indices.unique().tolist():
            n, t, i = (indices == e).nonzero(as_tuple=True)
            out[n, t] += weights[n, t, i, None] * self[e](x[n, t])
        return out


class Expert(nn.Module):  # a SwiGLU network
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def top_k(logits: Tensor, k: int, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """Plain routing: the k experts with the largest logits, mixed by their softmax probabilities.

    Router logits R [..., E] -> weights [..., k] in float32, which `normalize` scales to sum to 1, and indices [..., k].
    """
    indices = logits.topk(k).indices
    weights = logits.softmax(-1, dtype=torch.float32).gather(-1, indices)
    return weights / weights.sum(-1, keepdim=True) if normalize else weights, indices


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [..., T, D], by angles with cos and sin [T, D/2]: turns each pair (i, i + D/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# ======== What follows changes only speed and rounding; skip it on first reading =====================================
# Each trick replaces a part of the model behind the same signature. Its comment says how many times as fast it is:
# measured by `python bench/bench.py --check`, torch 2.15, two cores with AVX-512, or held to AVX2 where it says so.


def speed_up(module: nn.Module) -> nn.Module:
    """Switches on every trick for the device and dtype of a model, or of a part. For inference only.

    On a CPU matrices are packed, all in bfloat16 and large ones in float32: they can no longer be moved, converted or
    copied, and parameters lose the names that they have in checkpoints. Returns what takes the place of `module`.
    """
    weight = next(module.parameters())
    if isinstance(module, nn.Linear) and weight.is_cpu:
        return PackedLinear(weight) if packs_on(weight) else WideLinear(weight)
    if isinstance(module, Experts):
        return SortedExperts(module) if weight.is_cpu else StackedExperts(module)
    for name, child in module.named_children():
        setattr(module, name, speed_up(child))
    if isinstance(module, Attention):
        module.attend = attend_widely if widens_on(weight) else attend_in_blocks
    return module


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` by oneDNN: with few rows of float32 faster than MKL, which PyTorch would call."""
    try:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (AttributeError, RuntimeError):  # PyTorch does not document it, and may lose it
        return F.linear(x, weight)


def packs_on(weight: Tensor) -> bool:
    """Whether `PackedLinear` pays, and works: PyTorch does not document the operators, and may lose them."""
    large = weight.dtype == torch.float32 and weight.numel() >= 2**19  # MKL is as fast with small ones
    try:
        works = PackedLinear(weight.new_ones(8, 8, device="cpu"))(weight.new_ones(1, 8, device="cpu")).sum() == 64
    except (AttributeError, RuntimeError):  # as with bfloat16 without AVX-512
        return False
    return weight.is_cpu and works.item() and (large or weight.dtype == torch.bfloat16)


def widens_on(weight: Tensor) -> bool:
    """Whether converting once pays: half precision on CPUs for which oneDNN has none, as most are."""
    half = "fp16" if weight.dtype == torch.float16 else "bf16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{half}_supported", lambda: False)
    return weight.is_cpu and weight.itemsize == 2 and not supported()


class PackedLinear(nn.Module):
    """`nn.Linear` on CPUs, with a weight that is arranged once as oneDNN multiplies it, and not for every product.

    1.3 to 1.9 times as fast for 8 rows of bfloat16, no faster for one; 1.7 to 3.5 times in float32, where PyTorch would
    call MKL. `weight.to_dense()` gives the matrix back.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)  # 16: some rows are expected, not one
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.weight)


class WideLinear(nn.Module):
    """`nn.Linear`; where PyTorch would convert a weight in half precision anew for every row, this one does so once.

    It converts 2^20 values at a time, which fit into a cache. Held to AVX2 1.3 times as fast for 8 rows, 2.4 for 32.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight, self.widens = nn.Parameter(weight, requires_grad=False), widens_on(weight)

    def forward(self, x: Tensor) -> Tensor:
        if not self.widens or x[..., 0].numel() < 4:
            return F.linear(x, self.weight)
        wide, parts = x.float(), self.weight.split(max(1, 2**20 // x.shape[-1]))
        return torch.cat([multiply(wide, part.float()) for part in parts], -1).to(x.dtype)


class SortedExperts(nn.Module):
    """`Experts`, which it empties, on CPUs: rows sorted by expert once, gate and up one product. 1.1 times as fast."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.ModuleList(), nn.ModuleList()
        while len(experts):
            expert = experts.pop(0)  # one by one, so that they are not in memory twice
            gate_up = torch.cat((expert.gate_proj.weight, expert.up_proj.weight))
            self.gate_up_proj.append(PackedLinear(gate_up) if packs_on(gate_up) else WideLinear(gate_up))
            self.down_proj.append(speed_up(expert.down_proj))

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        x, k = x.flatten(0, 1), indices.shape[-1]
        if indices.numel() == k:  # of one token
            experts, counts, order, rows = indices.flatten().tolist(), [1] * k, slice(None), [x] * k
        else:
            chosen, order = indices.flatten().sort()
            experts, counts = (t.tolist() for t in chosen.unique_consecutive(return_counts=True))
            rows = x.index_select(0, order // k).split(counts)
        gate, up = torch.cat([self.gate_up_proj[e](row) for e, row in zip(experts, rows)]).chunk(2, -1)
        hidden = (F.silu(gate) * up).split(counts)
        y = torch.cat([self.down_proj[e](h) for e, h in zip(experts, hidden)])
        out = torch.empty_like(y)
        out[order] = y  # back in the order in which the tokens chose
        return (weights.unsqueeze(2) @ out.view(*indices.shape, -1)).squeeze(2)


class StackedExperts(nn.Module):
    """`Experts` on GPUs: two grouped products for all of them, and no value is read back from the device."""

    def __init__(self, experts: Experts):
        super().__init__()
        gate_up = torch.stack([torch.cat((e.gate_proj.weight, e.up_proj.weight)) for e in experts])
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(torch.stack([e.down_proj.weight for e in experts]), requires_grad=False)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        expert, order = indices.flatten().sort(stable=True)
        ends = torch.arange(len(self.down_proj), device=x.device)
        ends = torch.searchsorted(expert, ends, right=True, out_int32=True)  # where the rows of each expert end
        rows = x.flatten(0, 1).index_select(0, order // indices.shape[-1])
        gate, up = F.grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends).index_select(0, order.argsort())
        return (weights.unsqueeze(2) @ y.view(*indices.shape, -1)).squeeze(2)


def attend_in_blocks(q: Tensor, shared_k: Tensor, shared_v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
    """`attend`, where one row alone is ordinary attention, for which PyTorch has a kernel: 1.5 times as fast.

    On CPUs the kernel is slow in bfloat16 and for one query after a history; for several after one it needs a mask.
    There, blocks of 128 queries see no more keys than they need: 7 times as fast for a prompt of 2,048 tokens.
    """
    T, S = q.shape[2], shared_k.shape[2]
    if own_k.shape[3]:
        return attend(q, shared_k, shared_v, own_k, own_v)
    slow = q.is_cpu and shared_k.numel() >= 2**18 and (T == 1 or q.dtype == torch.bfloat16)  # 128 tokens of OLMoE-1B-7B
    if T in (1, S) and not slow:
        return F.scaled_dot_product_attention(q, shared_k, shared_v, is_causal=T > 1, enable_gqa=True)
    out, end = [], S - T
    for part, none in zip(q.split(128, 2), own_k.split(128, 2)):
        end += part.shape[2]
        out.append(attend(part, shared_k[:, :, :end], shared_v[:, :, :end], none, none))
    return torch.cat(out, 2)


def attend_widely(q: Tensor, shared_k: Tensor, shared_v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
    """`attend` on CPUs that multiply in float32 only: keys and values are converted once in a call, not for every row.

    Held to AVX2, 60 times as fast for a prompt of 2,048 tokens; after as many, 3 times for one row, 14 times for 32.
    """
    (n, H, T, D), (_, Hk, S, _) = q.shape, shared_k.shape
    if n * T > 1 or own_k.shape[3]:
        return attend_in_blocks(*(part.float() for part in (q, shared_k, shared_v, own_k, own_v))).to(q.dtype)
    if S < 256:
        return F.scaled_dot_product_attention(q, shared_k, shared_v, enable_gqa=True)
    # A single query converts nothing twice. What makes this fast is that all products are of a matrix and a vector.
    keys, values = ([part[0, h * Hk // H] for h in range(H)] for part in (shared_k, shared_v))
    probs = torch.stack([k @ row for k, row in zip(keys, q.view(H, D) * D**-0.5)]).softmax(-1)
    return torch.stack([v.T @ p for v, p in zip(values, probs)]).view(q.shape)
