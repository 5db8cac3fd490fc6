"""The OLMoE transformer (arXiv 2409.02060) in plain PyTorch.

Every tensor that flows through the model is [n, T, ...]: n rows, T positions. A row is a sequence of its own or, with a
cache, one of several versions (rosters) of one sequence. Nothing here knows of noise: a function `route` decides which
experts run. If it returns more rows than it was given, the path branches there.

Attribute names equal the tensor names in OLMoE's checkpoints.
Shapes: d hidden_size, I intermediate_size, E experts, k experts per token, H query heads, Hk key-value heads of size D.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKS = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # see `pack`


@dataclass
class Config:
    """The fields of OLMoE's config.json that shape the computation, under their own names."""

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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def top_k(config: Config, logits: Tensor, selection: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain OLMoE routing: the k experts with the largest logits, mixed by their softmax probabilities.

    Args:
        logits: router logits R [..., E].
        selection: [..., E], ranks the experts in place of the logits. The weights are those of the logits all the same.

    Returns:
        weights [..., k] in float32 and indices [..., k].
    """
    probs = logits.softmax(-1, dtype=torch.float32)
    indices = (logits if selection is None else selection).topk(config.num_experts_per_tok).indices
    weights = probs.gather(-1, indices)
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, indices


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [..., T, D], by angles with cos and sin [T, D/2]: turns each pair (i, i + D/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend(
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    own_k: Tensor | None = None,
    own_v: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Causal attention to positions shared by all rows and to positions of the row's own, under one softmax.

    Args:
        q: queries [n, H, T, D].
        shared_k, shared_v: [1 or n, Hk, S, D]. The last query sees all S positions, each earlier one sees one fewer.
        own_k, own_v: [n, Hk, T, C, D], C positions for each query; None: all that a row may see is in the shared part.
        visible: [S], for T = 1, which of the shared positions the query sees instead.

    Returns:
        [n, H, T, D]
    """
    (n, H, T, D), (_, Hk, S, _), cpu = q.shape, shared_k.shape, q.device.type == "cpu"
    causal = own_k is None and 1 < T == S  # spelled out, since kernels then skip what is not visible
    if T > 1 and not causal:
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if own_k is None:
        if cpu and T == 1:
            q = q.expand(-1, -1, 2, -1)  # PyTorch's CPU kernel takes twice as long for one query as for two
        out = F.scaled_dot_product_attention(q, shared_k, shared_v, visible, is_causal=causal, enable_gqa=H > Hk)
        return out[:, :, :T]
    q = q.view(n, Hk, H // Hk, T, D)
    own = torch.einsum("nhgtd,nhtcd->nhgtc", q, own_k) * D**-0.5
    if fused := cpu and visible is None and S > 0:
        # The rows become queries of one sequence. The kernel also returns the logarithms of its softmaxes' sums, with
        # which the whole history counts as one position, of the value `mean`.
        rows = q.transpose(0, 1).reshape(1, Hk, -1, D)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, shared_k, shared_v)
        mean, shared = (part.reshape(Hk, n, H // Hk, 1, -1).transpose(0, 1) for part in parts)
    else:
        # The sum over h folds the rows into the query axis: the shared history is read once, and never copied n times.
        shared = torch.einsum("nhgtd,hsd->nhgts", q, shared_k[0]) * D**-0.5
        shared = shared if visible is None else shared.masked_fill(~visible, -torch.inf)
    probs = torch.cat((shared, own), -1).softmax(-1, dtype=torch.float32).to(q.dtype)
    of_shared, of_own = probs.split((shared.shape[-1], own.shape[-1]), -1)
    out = of_shared * mean if fused else torch.einsum("nhgts,hsd->nhgtd", of_shared, shared_v[0])
    out += torch.einsum("nhgtc,nhtcd->nhgtd", of_own, own_v)
    return out.reshape(n, H, T, D)


class Linear(nn.Linear):
    """x [..., d_in] times the transpose of a weight [d_out, d_in], which may be packed."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
        if x.dtype != torch.bfloat16 or x.numel() * len(weight) > 2**18 or x.device.type != "cpu":
            return F.linear(x, weight)
        # Small products take oneDNN longer to start than PyTorch's own kernel takes in all.
        enabled, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
        try:
            return F.linear(x, weight)
        finally:
            torch.backends.mkldnn.enabled = enabled


def pack(weight: Tensor) -> Tensor:
    """Arranges a weight of `Linear` as CPUs multiply it in bfloat16; others, and small ones, stay as they are.

    Otherwise oneDNN does so again for every product, which takes longer than the product itself if that has few rows.
    `to_dense` undoes it.
    """
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or weight.numel() < 2**20 or not PACKS:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        d, D, Hk = config.hidden_size, config.head_dim, config.num_key_value_heads
        self.layer, self.head_dim, self.clip = layer, D, config.clip_qkv
        self.q_proj = Linear(d, d)
        self.k_proj = Linear(d, Hk * D)
        self.v_proj = Linear(d, Hk * D)
        self.o_proj = Linear(d, d)
        # OLMoE normalises the whole projection, before the heads are split.
        self.q_norm = nn.RMSNorm(d, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(Hk * D, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache) -> Tensor:
        n, T, d = x.shape
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q, k, v = (t.view(n, T, -1, self.head_dim).transpose(1, 2) for t in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attend(q, *cache.update(self.layer, k, v)) if cache else attend(q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(n, T, d))


class Expert(nn.Module):
    """A SwiGLU network."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """E networks; x [M, d] are rows sorted by expert, and expert [M] says whose they are."""

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        counts = expert.bincount(minlength=len(self)).tolist()
        return torch.cat([self[e](rows) for e, rows in enumerate(x.split(counts)) if len(rows)])


class StackedExperts(nn.Module):
    """`Experts` in two tensors, for GPUs: two products for all of them, and no value is read back from the device."""

    def __init__(self, experts: Experts):
        super().__init__()
        gate_up = torch.stack([torch.cat((e.gate_proj.weight, e.up_proj.weight)) for e in experts])
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(torch.stack([e.down_proj.weight for e in experts]), requires_grad=False)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        # ends[e]: where the rows of expert e end
        ends = torch.arange(len(self.down_proj), device=x.device)
        ends = torch.searchsorted(expert, ends, right=True, out_int32=True)
        gate, up = F.grouped_mm(x, self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, -1)
        return F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends)


class MoE(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.gate = Linear(config.hidden_size, config.num_experts)  # the router
        self.experts = Experts(Expert(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor, route: Callable) -> Tensor:
        weights, indices = route(self.layer, self.gate(x))
        rows, T, k = indices.shape  # as many rows as x has, or more: the path branches here
        x = x.expand(rows, -1, -1).flatten(0, 1)
        # Sorted by expert, all that goes to one expert is together: its weights are read once, however much it is.
        expert, order = indices.flatten().sort(stable=True)
        y = self.experts(x.index_select(0, order // k), expert).index_select(0, order.argsort())
        return (weights.to(x.dtype).unsqueeze(2) @ y.view(rows, T, k, -1)).squeeze(2)


class Layer(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, layer)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache, route: Callable) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x), route)


class OLMoE(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # From an empty tensor: drawing numbers, on the meta device as in `load`, imports torch's compiler for 1.4 s.
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def stack_experts(self) -> None:
        """For GPUs, see `StackedExperts`."""
        for layer in self.layers:
            layer.mlp.experts = StackedExperts(layer.mlp.experts)

    def hidden(self, tokens: Tensor, cache=None, route: Callable | None = None) -> Tensor:
        """As `forward`, but returns the hidden states [rows, T, d] before the final norm and makes no prediction."""
        config, D, T = self.config, self.config.head_dim, tokens.shape[1]
        frequencies = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, device=self.device) / D)
        positions = torch.arange(T, device=self.device) + (cache.length if cache else 0)
        angles = positions[:, None] * frequencies
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, cache, route or (lambda layer, logits: top_k(config, logits)))
        if cache:
            cache.length += T
        return x

    def forward(self, tokens: Tensor, cache=None, route: Callable | None = None) -> Tensor:
        """Predicts the next token at every position.

        Args:
            tokens: ids [n, T]. With a cache n is 1, and the T tokens follow those that the cache holds.
            cache: one of `cache.py`'s, extended by the T positions; None: every row is a whole sequence.
            route: route(layer, router logits [n, T, E]) -> weights, indices [n or more, T, k]; None: plain `top_k`.

        Returns:
            logits [rows, T, vocab_size], as many rows as the last route returned.
        """
        x = self.norm(self.hidden(tokens, cache, route))
        return self.lm_head(x) if self.lm_head else F.linear(x, self.embed_tokens.weight)
