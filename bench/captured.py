"""A decoding step as a CUDA graph: what the benchmark measures on GPUs. It has not been run on one yet."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import roe
from cache import SharedCache
from model import OLMoE


class StaticCache:
    """A `SharedCache` for decoding in steps of fixed shapes that read nothing back, as a CUDA graph must be captured.

    A step attends to all the memory there is, with what is not filled yet masked out, whatever the length. The model's
    `attend` must be `attend_static`.

    Args:
        cache: the `SharedCache` that holds the prompt; its memory is used from now on.
    """

    def __init__(self, cache: SharedCache):
        self.k, self.v, self.nbytes = cache.k, cache.v, cache.nbytes
        self.v[:, :, :, cache.length :] = 0  # masked out, but 0 times what memory happens to hold could be NaN
        self.length = torch.tensor([cache.length], device=cache.k.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `SharedCache.update`, for T = 1; also returns which shared positions are visible, [max_len]."""
        self.k[layer].index_copy_(2, self.length, k[:1])
        self.v[layer].index_copy_(2, self.length, v[:1])
        visible = torch.arange(self.k.shape[3], device=self.k.device) < self.length
        return self.k[layer], self.v[layer], k.unsqueeze(3), v.unsqueeze(3), visible


def attend_static(q: Tensor, shared_k: Tensor, shared_v: Tensor, own_k: Tensor, own_v: Tensor, visible: Tensor):
    """`model.attend` for T = 1, where of the shared positions only those `visible` [S] are seen."""
    (n, H, _, D), Hk = q.shape, shared_k.shape[1]
    q = q.view(n, Hk, H // Hk, D)
    shared = torch.einsum("nhgd,hsd->nhgs", q, shared_k[0]).masked_fill(~visible, -torch.inf)
    own = torch.einsum("nhgd,nhtcd->nhgc", q, own_k)
    probs = (torch.cat((shared, own), -1) * D**-0.5).softmax(-1, dtype=torch.float32).to(q.dtype)
    of_shared, of_own = probs.split((shared.shape[-1], 1), -1)
    out = torch.einsum("nhgs,hsd->nhgd", of_shared, shared_v[0]) + torch.einsum("nhgc,nhtcd->nhgd", of_own, own_v)
    return out.reshape(n, H, 1, D)


def use_static(model: OLMoE) -> None:
    for layer in model.layers:
        layer.self_attn.attend = attend_static


@torch.inference_mode()
def capture(model: OLMoE, cache: SharedCache, n: int, tau: list[float], generator: torch.Generator) -> Callable:
    """A decoding step, which keeps the token that it chose for the next step."""
    use_static(model)
    cache, token = StaticCache(cache), torch.ones(1, 1, dtype=torch.long, device=model.device)
    route = roe.roster_route(model.config, n, tau, generator)

    def step():
        logits = model(token, cache, route)[:, 0].expand(n, -1)
        token.copy_(roe.aggregate(logits).argmax())

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # kernels are chosen and loaded before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    return lambda _: (graph.replay(), token.item())[1]
