"""The OLMoE transformer (arXiv 2409.02060) in plain PyTorch.

Without a cache rows are independent sequences; with one they are n rosters of the same tokens. Nothing here knows of
noise: a function `route` decides which experts run, and if it returns more rows than it was given, the path branches
there. The names of parameters are those of the tensors in OLMoE's checkpoints.

Shapes: n rows, T positions, d hidden_size, E experts, k experts per token, H query heads, Hk key-value heads of size D,
S positions shared by all rows, C positions of a row's own.
"""

from collections.abc import Callable, Sequence
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
    eos_token_id: Sequence[int] = ()  # any of them ends a text
    tau: list[float] | None = None  # routing temperatures, one per layer: what a file tau.json beside the model says

    head_dim = property(lambda self: self.hidden_size // self.num_attention_heads)


class OLMoE(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        d, V = config.hidden_size, config.vocab_size
        self.lm_head = nn.Linear(d, V, bias=False)
        # With nn.Linear's initial values: nn.Embedding's, N(0, 1), would make the logits of a tied head too large.
        embedding = nn.Embedding.from_pretrained(nn.Linear(d, V, bias=False).weight, freeze=False)
        if config.tie_word_embeddings:
            embedding.weight = self.lm_head.weight
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        norm = nn.RMSNorm(d, config.rms_norm_eps)
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers, "norm": norm})

    device = property(lambda self: self.model.embed_tokens.weight.device)
    dtype = property(lambda self: self.model.embed_tokens.weight.dtype)

    def forward(self, tokens: Tensor, cache=None, route: Callable | None = None) -> Tensor:
        """Predicts the next token at every position: ids [n, T] -> logits [rows, T, V], n or the last route's rows.

        With a cache of `cache.py` n is 1, and the tokens follow those that the cache holds. route(layer, router logits
        [n, T, E]) -> weights, indices [n or more, T, k]; by default it is `top_k`.

        Raises ValueError: more tokens than the model's context or the cache has room for; several texts and a cache.
        """
        return self.lm_head(self.model.norm(self.hidden(tokens, cache, route)))

    def hidden(self, tokens: Tensor, cache=None, route: Callable | None = None) -> Tensor:
        """As `forward`, but makes no prediction: returns the hidden states [rows, T, d] before the final norm."""
        start = cache.length if cache else 0
        end = start + tokens.shape[1]
        if end > self.config.max_position_embeddings:
            raise ValueError(f"{end} tokens are more than the model's context of {self.config.max_position_embeddings}")
        if cache and len(tokens) > 1:
            raise ValueError(f"a cache holds one text, not {len(tokens)}")
        route = route or (lambda _, logits: top_k(logits, self.config.num_experts_per_tok, self.config.norm_topk_prob))
        pairs = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=self.device)
        frequencies = 1.0 / self.config.rope_theta ** (pairs / self.config.head_dim)
        angles = torch.arange(start, end, device=self.device)[:, None] * torch.cat((-frequencies, frequencies))
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)  # [T, D], the first D/2 sines negative
        x = self.model.embed_tokens(tokens)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, i, cache, route)
        return x


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache, route: Callable) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, cache)
        return x + self.mlp(self.post_attention_layernorm(x), layer, route)  # this may be [1, T, d] + [n, T, d]


def attend(q: Tensor, shared_k: Tensor, shared_v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
    """Causal attention to positions shared by all rows and to positions of the row's own, under one softmax.

    Args:
        q: queries [n, H, T, D]; the result has their shape.
        shared_k, shared_v: [1, Hk, S, D], read once for all rows and not copied.
        own_k, own_v: [n, Hk, T, C, D], C positions for each query, all of which it sees. If C is above 1, T is 1.

    With a `SharedCache` and n rows each query has its own position as C = 1. Among the shared, where it is row 0's,
    it is masked, and the last query's left out. With one row C = 0. What T = 3 queries see (x) after a history of 4:
        n rows, S = 6, C = 1     shared    own        one row, S = 7, C = 0     shared
        first query            x x x x . .  x         first query            x x x x x . .
        second                 x x x x x .  x         second                 x x x x x x .
        last                   x x x x x x  x         last                   x x x x x x x
    """
    (_, Hk, S, D), T, C = shared_k.shape, q.shape[2], own_k.shape[3]
    q = q.unflatten(1, (Hk, -1)) * D**-0.5  # [n, Hk, g, T, D]: g query heads share a key-value head
    shared = torch.einsum("nhgtd,hsd->nhgts", q, shared_k[0])
    own = torch.einsum("nhgtd,nhtcd->nhgtc", q, own_k)
    later = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)  # query i sees the first S - T + 1 + i
    scores = torch.cat((shared.masked_fill(later, -torch.inf), own), -1)
    of_shared, of_own = scores.softmax(-1).split((S, C), -1)
    out = torch.einsum("nhgts,hsd->nhgtd", of_shared, shared_v[0])
    out += torch.einsum("nhgtc,nhtcd->nhgtd", of_own, own_v)
    return out.flatten(1, 2)  # [n, H, T, D]


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        d, D, Hk = config.hidden_size, config.head_dim, config.num_key_value_heads
        self.head_dim = D
        self.clip = config.clip_qkv
        self.attend = attend  # or another with the same arguments
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, Hk * D, bias=False)
        self.v_proj = nn.Linear(d, Hk * D, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.q_norm = nn.RMSNorm(d, config.rms_norm_eps)  # OLMoE's: of the whole projection, before heads are split
        self.k_norm = nn.RMSNorm(Hk * D, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache) -> Tensor:
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q, k, v = (t.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))  # [n, H or Hk, T, D]
        q, k = (t * cos + t.roll(self.head_dim // 2, -1) * sin for t in (q, k))  # RoPE turns each pair (i, i + D/2)
        if cache:
            out = self.attend(q, *cache.update(layer, k, v))
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MoE(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)  # the router
        self.experts = Experts(Expert(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor, layer: int, route: Callable) -> Tensor:
        weights, indices = route(layer, self.gate(x))
        x = x.expand(len(indices), -1, -1)  # if the route made n rows of one, experts run for all n
        return self.experts(x, weights.to(x.dtype), indices)


class Experts(nn.ModuleList):
    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs, each read once: x [n, T, d], the others [n, T, k]."""
        out = torch.zeros_like(x)
        for e in indices.unique().tolist():
            row, t, i = (indices == e).nonzero(as_tuple=True)
            out[row, t] += weights[row, t, i, None] * self[e](x[row, t])
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
    """Plain routing: router logits R [..., E] -> the k likeliest experts' weights [..., k], in float32, and indices."""
    indices = logits.topk(k).indices
    weights = logits.float().softmax(-1).gather(-1, indices)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, indices
