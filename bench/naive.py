"""RoE as first written on Hugging Face's OLMoE, for the benchmark to compare with; ports/ has a better one."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def add_roe(model, n: int, tau: float, gumbel: Callable, skip: int = 1) -> None:
    """Rows 1 to n - 1 of every batch of n copies choose the experts of their last token with noise (equation 1).

    Every row keeps a history of its own in transformers' cache, and every row reads the prompt. gumbel(layer) draws
    noise [n - 1, E], in every layer and at every token anew.
    """
    for layer in range(skip, len(model.model.layers) - skip):
        gate = model.model.layers[layer].mlp.gate

        def route(x, layer=layer, gate=gate):
            logits = torch.nn.functional.linear(x.reshape(-1, gate.hidden_dim), gate.weight)  # [n * T, E]
            noisy = logits.float().view(n, -1, gate.num_experts).clone()
            noisy[1:, -1] += tau * gumbel(layer)
            noisy = noisy.flatten(0, 1)
            indices = noisy.topk(gate.top_k).indices
            weights = noisy.softmax(-1).gather(-1, indices)
            if gate.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights.to(x.dtype), indices

        gate.forward = route


def average(logits: Tensor) -> Tensor:
    """Log of the mean probability: [n, V] -> [V]."""
    return logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))
