"""A decoding step as a CUDA graph: what the benchmark measures on GPUs. It has not been run on one yet."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import roe
from cache import SharedCache
from model import Config, OLMoE


class StaticCache:
    """A `SharedCache` for decoding in steps of fixed shapes that read nothing back, as a CUDA graph must be captured.

    A step attends to all the memory there is, with what is not filled yet masked out, whatever the length. The model
    must be one after `use_static`.

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
        if layer == len(self.k) - 1:
            self.length += 1  # in place, as a graph must
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
    """Of a model that `fast.speed_up` has changed, whose attention takes another `attend`."""
    for layer in model.model.layers:
        layer.self_attn.attend = attend_static


def draw(config: Config, rosters: int, tau: list[float], seed: int, positions: Iterable[int], gumbel=roe.gumbel):
    """tau G of tokens at T positions, [n, T, L, E] on the CPU: what `roe.run_rosters` adds to the routers' logits."""
    G = [gumbel(seed, position, rosters, config.num_hidden_layers, config.num_experts) for position in positions]
    noise = torch.stack(G, 1) * torch.tensor(tau)[:, None]
    noise[0] = 0  # row 0 is the clean path
    return noise


def decode(model: OLMoE, token: Tensor, cache: StaticCache, tau: list[float], noise: Tensor) -> Tensor:
    """Logits [n, V] after a token [1, 1] with noise tau G [n, 1, L, E], as `roe.predict` has them.

    The pass is that of `OLMoE.forward`, but the position is a tensor, from a `StaticCache`, and is not read back.
    """
    config, k, normalize = model.config, model.config.num_experts_per_tok, model.config.norm_topk_prob

    def route(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        added = noise[:, :, layer] if tau[layer] else 0  # of one roster it is 0, too
        return roe.stochastic_route(logits, added, k, normalize=normalize)

    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=model.device)
    angles = cache.length[:, None] / config.rope_theta ** (pairs / config.head_dim)
    angles = torch.cat((-angles, angles), -1)
    cos, sin = angles.cos().to(model.dtype), angles.sin().to(model.dtype)
    x = model.model.embed_tokens(token)
    for i, layer in enumerate(model.model.layers):
        x = layer(x, cos, sin, i, cache, route)
    return model.lm_head(model.model.norm(x))[:, 0]


@torch.inference_mode()
def capture(model: OLMoE, cache: SharedCache, n: int, tau: list[float]) -> Callable:
    """A decoding step, which keeps the token that it chose for the next step."""
    use_static(model)
    position, token = cache.length, torch.ones(1, 1, dtype=torch.long, device=model.device)
    cache, noise = StaticCache(cache), draw(model.config, n, tau, 0, [position]).to(model.device)

    def step():
        token.copy_(roe.aggregate(decode(model, token, cache, tau, noise)).argmax())

    def run(step: Callable) -> None:
        nonlocal position
        noise.copy_(draw(model.config, n, tau, 0, [position]))
        step()
        position += 1

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # kernels are chosen and loaded before the capture
        for _ in range(3):
            run(step)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return lambda _: (run(graph.replay), token.item())[1]
