"""Faster on CPUs. Operators that PyTorch does not document live here alone; where they are lost, the model is slower.

How many times as fast a part is stands in its docstring: measured by `python bench/bench.py --check`, torch 2.14.1,
two cores with AVX-512, or held to AVX2 where it says so.
"""

import contextlib
import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Experts

try:
    malloc_trim, mallopt = ctypes.CDLL(None).malloc_trim, ctypes.CDLL(None).mallopt
except (AttributeError, OSError, TypeError):  # another C library than glibc
    malloc_trim = mallopt = lambda *_: None


class FastLinear(nn.Module):
    """`nn.Linear` with a weight that is arranged once as oneDNN multiplies it (packed), and not for every product.

    Packed: 1.1 to 1.4 times as fast in bfloat16; in float32, where PyTorch would call MKL, 0.8 to 2.5 by processor.
    Where PyTorch would convert a weight in half precision anew for every row (wide), it is converted once, 2^20 values
    at a time, which fit into a cache: held to AVX2 1.5 times as fast for 8 rows, 2.7 for 32.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(pack(weight), requires_grad=False)
        self.wide = widens_on(weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_mkldnn:  # packed
            return multiply(x, self.weight)
        if not self.wide or x[..., 0].numel() < 4:  # for fewer rows converting does not pay
            return F.linear(x, self.weight)
        parts = self.weight.split(max(1, 2**20 // x.shape[-1]))
        return torch.cat([multiply(x.float(), part.float()) for part in parts], -1).to(x.dtype)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` by oneDNN: with few rows of float32 faster than MKL, which PyTorch would call."""
    try:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (AttributeError, RuntimeError):  # PyTorch may lose it
        return F.linear(x, weight)


def pack(weight: Tensor) -> Tensor:
    """The same numbers, packed where that pays and works, which `to_dense()` undoes; else as they are."""
    large = weight.dtype == torch.float32 and weight.numel() >= 2**19  # MKL is as fast with small ones
    if weight.is_cpu and (large or weight.dtype == torch.bfloat16):
        with contextlib.suppress(AttributeError, RuntimeError):  # as with bfloat16 without AVX-512
            one = weight.new_ones(1, 1)
            torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "")  # without it no packed one is of use
            return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)  # 16: some rows are expected, not one
    return weight


def widens_on(weight: Tensor) -> bool:
    """Whether converting once pays: for half precision on a CPU where oneDNN has no products in it, as on most."""
    half = "fp16" if weight.dtype == torch.float16 else "bf16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{half}_supported", lambda: False)
    return weight.is_cpu and weight.itemsize == 2 and not supported()


def quick_attend(q: Tensor, shared_k: Tensor, shared_v: Tensor, own_k: Tensor, own_v: Tensor) -> Tensor:
    """`model.attend` by what is quickest for these shapes on this device.

    Without own positions it is ordinary attention, for which PyTorch has a kernel: 5 times as fast for one query after
    2,048 tokens, 3.5 for a prompt of as many. On CPUs float32 is quicker for several queries than half precision.
    With own ones keys are multiplied by queries, which are few: 1.5 times after 2,048 tokens; held to AVX2 4 times.
    """
    (n, H, T, D), (_, Hk, S, _), C = q.shape, shared_k.shape, own_k.shape[3]
    if (C > 0 and widens_on(q)) or (C == 0 and T > 1 and q.is_cpu and q.itemsize == 2):
        return quick_attend(*(part.float() for part in (q, shared_k, shared_v, own_k, own_v))).to(q.dtype)
    if C == 0:
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if 1 < T < S else None
        return F.scaled_dot_product_attention(q, shared_k, shared_v, seen, is_causal=T == S, enable_gqa=True)
    q = (q * D**-0.5).view(n, Hk, -1, T, D).transpose(0, 1)  # [Hk, n, g, T, D]: g query heads share a key-value head
    shared = (shared_k[0] @ q.flatten(1, 3).mT).mT.view(*q.shape[:-1], S)
    if T > 1:
        shared.masked_fill_(torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1), -torch.inf)
    own = torch.einsum("hngtd,nhtcd->hngtc", q, own_k)
    of_shared, of_own = torch.cat((shared, own), -1).softmax(-1).split((S, C), -1)
    out = (of_shared.flatten(1, 3) @ shared_v[0]).view(q.shape) + torch.einsum("hngtc,nhtcd->hngtd", of_own, own_v)
    return out.transpose(0, 1).reshape(n, H, T, D)


class SortedExperts(nn.Module):
    """`Experts`, which it empties: rows sorted by expert once, gate and up one product. 1.1 times as fast on CPUs."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.ModuleList(), nn.ModuleList()
        while len(experts):
            expert = experts.pop(0)  # one by one, so that they are not in memory twice
            self.gate_up_proj.append(FastLinear(torch.cat((expert.gate_proj.weight, expert.up_proj.weight))))
            self.down_proj.append(FastLinear(expert.down_proj.weight))

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


def keep_memory() -> None:
    """What is freed from now on stays with the process, to be used again: a prompt takes a tenth less time."""
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the highest there is
