"""What a sceptic asks about rosters: would something simpler, or something else, do the same?

A control is a few lines: a function `route` of `model.OLMoE` that chooses experts and their weights in another way.
"""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from effect import BLOCK, ROSTERS, Softened, changes, read, softening
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
from captured import draw

import roe
from cache import SharedCache
from load import load
from model import OLMoE, top_k

TEXTS = "held-out modules", "Python, large packages", "C++ headers", "English", "Perl"


# ---- Without noise ---------------------------------------------------------------------------------------------------


def scaled(k: int, factor: float = 1) -> Callable:
    """Plain routing to k experts, with their weights times a factor."""

    def route(layer, logits):
        weights, indices = top_k(logits, k)
        return factor * weights, indices

    return route


# ---- With noise: rules choose k experts from the logits R [n, T, E] and R + tau G, whose row 0 has no noise ----------


def pick(logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Weights softmax(logits) of the chosen experts, and those experts."""
    return logits.softmax(-1).gather(-1, indices), indices


def perturbed(logits: Tensor, noisy: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """RoE, with the weights that noise changes, too."""
    return pick(noisy, noisy.topk(k).indices)


def experts_only(logits: Tensor, noisy: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """RoE with `weights="clean"`: experts as in `perturbed`, but their weights are softmax(R)."""
    return pick(logits, noisy.topk(k).indices)


def weights_only(logits: Tensor, noisy: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The clean path's experts in every roster, and only their weights are noisy."""
    return pick(noisy, logits[:1].topk(k).indices.expand(len(noisy), -1, -1))


def rescaled(logits: Tensor, noisy: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`perturbed` with the weights scaled to the sum of the clean row's."""
    weights, indices = perturbed(logits, noisy, k)
    sums = weights.sum(-1, keepdim=True)
    return weights * sums[:1] / sums, indices


def certain_head(logits: Tensor, noisy: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best expert of each token stays and only the others are drawn (arXiv 2602.02443)."""
    ranks = noisy.scatter(-1, logits.argmax(-1, keepdim=True), math.inf)
    return pick(noisy, ranks.topk(k).indices)


def gaussian(*place: int) -> Tensor:
    """As `roe.gumbel`, but normal: its numbers, mapped to those that are as likely to be exceeded.

    They have the variance of Gumbel's, pi^2 / 6; the mean does not matter to a softmax or an order.
    """
    probability = roe.gumbel(*place).double().neg().exp().neg().exp()
    return (math.pi / 6**0.5 * torch.special.ndtri(probability)).float()


def noisy_route(k: int, noise: Tensor, rule: Callable) -> Callable:
    """A rule as the `route` of `model.OLMoE`, with noise tau G [n, T, L, E].

    Once there are n rows, the rule also chooses in layers without noise: most rules choose plainly there.
    """

    def route(layer, logits):
        g = noise[:, :, layer]
        if len(logits) == 1 and not g.any():
            return top_k(logits, k)
        return rule(logits.float().expand_as(g), logits.float() + g, k)

    return route


# ---- Averages --------------------------------------------------------------------------------------------------------


def geometric(log_probs: Tensor) -> Tensor:
    """The rosters' mean log-probability, as log-probabilities: [n, ..., V] -> [..., V]."""
    return log_probs.mean(0).log_softmax(-1)


def without_clean(log_probs: Tensor) -> Tensor:
    """The average of all rows but the clean one."""
    return roe.aggregate(log_probs[1:])


NOISY = {  # rule, noise, average
    "rosters": (perturbed, roe.gumbel, roe.aggregate),
    "mean of log-probabilities": (perturbed, roe.gumbel, geometric),
    "without the clean row": (perturbed, roe.gumbel, without_clean),
    "other experts, weights softmax(R)": (experts_only, roe.gumbel, roe.aggregate),
    "other weights, clean path's experts": (weights_only, roe.gumbel, roe.aggregate),
    "weights scaled to the clean row's sum": (rescaled, roe.gumbel, roe.aggregate),
    "best expert kept": (certain_head, roe.gumbel, roe.aggregate),
    "Gaussian noise": (perturbed, gaussian, roe.aggregate),
}


# ---- Measuring -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def run(model: OLMoE, piece: list[int], make: Callable) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities [rows, t, V] and targets [t], a few tokens at a time, as in `roe.score`.

    make(positions) gives the route for the tokens at these positions.
    """
    tokens = torch.as_tensor(piece)
    cache = SharedCache(model.config, len(tokens) - 1)
    size = BLOCK // ROSTERS
    for part, targets in zip(tokens[:-1].split(size), tokens[1:].split(size)):
        route = make(range(cache.length, cache.length + len(part)))
        yield model(part[None], cache, route).float().log_softmax(-1), targets


def measure(model: OLMoE, pieces: list[list[int]], make: Callable, average: Callable) -> dict:
    """The change from plain routing; make(positions, seed) gives the route."""
    softened, scores, right = (Softened(), Softened()), ([], []), ([], [])
    ways = (lambda *_: None, roe.aggregate), (make, average)
    for seed, piece in enumerate(pieces):
        for i, (way, mean) in enumerate(ways):
            for log_probs, targets in run(model, piece, lambda positions: way(positions, seed)):
                prediction = mean(log_probs)
                softened[i](prediction, targets)
                scores[i].append(prediction.gather(-1, targets[:, None])[:, 0])
                right[i].append(prediction.argmax(-1) == targets)
    joined = (torch.stack([torch.cat(parts) for parts in both]) for both in (scores, right))
    _, change = changes(*joined)
    return {"tokens": len(pieces) * BLOCK} | change | softening(*softened)


def controls(count: int = 8) -> list[tuple[dict, Callable]]:
    """Cells for `report.measure`: every text with every control."""

    def run_free(text: str, k: int, factor: float) -> dict:
        model, tokenizer = load(dtype="float32")
        route = scaled(k, factor)
        return measure(model, read(text, tokenizer, count)[1], lambda *_: route, roe.aggregate)

    def run_noisy(text: str, control: str) -> dict:
        model, tokenizer = load(dtype="float32")
        config = model.config
        rule, noise, average = NOISY[control]

        def make(positions: range, seed: int) -> Callable:
            drawn = draw(config, ROSTERS, roe.temperatures(config), seed, positions, noise)
            return noisy_route(config.num_experts_per_tok, drawn, rule)

        return measure(model, read(text, tokenizer, count)[1], make, average)

    free = {f"{k} experts, no noise": (k, 1.0) for k in (3, 4, 16)}
    free |= {f"clean path, weights times {factor}": (2, factor) for factor in (0.9, 1.1)}
    cells = []
    for text in TEXTS:
        for control, (k, factor) in free.items():
            cells.append((control, text, lambda text=text, k=k, factor=factor: run_free(text, k, factor)))
        for control in NOISY:
            cells.append((control, text, lambda text=text, control=control: run_noisy(text, control)))
    return [({"control": control, "text": text, "pieces": count}, measured) for control, text, measured in cells]
