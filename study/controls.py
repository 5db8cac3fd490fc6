"""What a sceptic asks about rosters: would something simpler, or something else, do the same?

    python study/controls.py effect      perplexity of the embedded model with each of the controls below
    python study/controls.py time        milliseconds per token: rosters against the clean path's experts only

A control is a few lines: a function `route` of `model.OLMoE` that chooses experts and their weights in another way.
Appends JSON lines to bench/results/controls.jsonl or controls_time.jsonl; changes and errors as in effect.py.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from captured import draw
from effect import BLOCK, RESULTS, ROSTERS, Softened, changes, softening, texts, where
from torch import Tensor

import bench
import roe
from cache import SharedCache
from load import load
from model import OLMoE, top_k

TEXTS = "held-out modules", "Python, large packages", "C++ headers", "English", "Perl"
TAU = 0.3  # of what is timed, as in bench.py


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
        if len(noise) == 1 or len(logits) == 1 and not g.any():
            return top_k(logits, k)
        return rule(logits.float().expand_as(g), logits.float() + g, k)

    return route


# ---- Measuring -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def run(model: OLMoE, piece: list[int], make: Callable) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities [rows, t, vocab_size] and targets [t], a few tokens at a time, as in `roe.score`.

    make(positions) gives the route for the tokens at these positions.
    """
    tokens = torch.as_tensor(piece)
    cache = SharedCache(model.config, len(tokens) - 1)
    size = BLOCK // ROSTERS
    for part, targets in zip(tokens[:-1].split(size), tokens[1:].split(size)):
        route = make(range(cache.length, cache.length + len(part)))
        yield model(part[None], cache, route).float().log_softmax(-1), targets


def geometric(log_probs: Tensor) -> Tensor:
    """The rosters' mean log-probability, as log-probabilities: [n, ..., V] -> [..., V]."""
    return log_probs.mean(0).log_softmax(-1)


def measure(model: OLMoE, pieces: list[list[int]], make: Callable, averages: dict[str, Callable]) -> Iterator[dict]:
    """For every kind of average: its change from plain routing; make(positions, seed) gives the route."""
    clean, softened = Softened(), {name: Softened() for name in averages}
    scores = {name: [] for name in ("clean", *averages)}

    def add(softened: Softened, name: str, log_probs: Tensor, targets: Tensor):
        softened(log_probs[None], targets)
        scores[name].append(log_probs.gather(-1, targets[:, None])[:, 0])

    for seed, piece in enumerate(pieces):
        for log_probs, targets in run(model, piece, lambda _: None):
            add(clean, "clean", log_probs[0], targets)
        for log_probs, targets in run(model, piece, lambda positions: make(positions, seed)):
            for name, average in averages.items():
                add(softened[name], name, average(log_probs), targets)
    for name in averages:
        *_, change = changes(torch.stack([torch.cat(scores["clean"]), torch.cat(scores[name])]))
        yield {"control": name} | change | {"rosters": ROSTERS} | softening(clean, softened[name])


def measure_effect(args: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load(dtype="float32")
    config, tau = model.config, model.config.tau
    k, E = config.num_experts_per_tok, config.num_experts
    free = {f"{n} experts, no noise": scaled(n) for n in (k + 1, 2 * k, E)}
    free |= {f"clean path, weights times {factor}": scaled(k, factor) for factor in (0.9, 1.1)}
    noisy = {
        "rosters": (perturbed, roe.gumbel),
        "other experts, weights softmax(R)": (experts_only, roe.gumbel),
        "other weights, clean path's experts": (weights_only, roe.gumbel),
        "weights scaled to the clean row's sum": (rescaled, roe.gumbel),
        "best expert kept": (certain_head, roe.gumbel),
        "Gaussian noise": (perturbed, gaussian),
    }
    others = {  # averages of the first pass
        "rosters": roe.aggregate,
        "mean of log-probabilities": geometric,
        "without the clean row": lambda log_probs: roe.aggregate(log_probs[1:]),
    }
    for text, source, pieces in texts(tokenizer, args.pieces, TEXTS):
        found = {"text": text, "source": source, "tokens": len(pieces) * BLOCK, "tau": tau}
        for name, route in free.items():
            for change in measure(model, pieces, lambda *_: route, {name: roe.aggregate}):
                yield found | change | {"rosters": 1, "tau": None}
        for name, (rule, noise) in noisy.items():
            make = lambda positions, seed: noisy_route(k, draw(config, ROSTERS, tau, seed, positions, noise), rule)
            for change in measure(model, pieces, make, others if name == "rosters" else {name: roe.aggregate}):
                yield found | change


def measure_time(args: argparse.Namespace) -> Iterator[dict]:
    """Decoding steps after 32 tokens; the rules and numbers of rosters take turns, and medians are reported."""
    rules = {"rosters": perturbed, "other weights, clean path's experts": weights_only}
    for layers in (0, 4):  # the embedded model, and four layers of OLMoE-1B-7B's shapes
        with tempfile.TemporaryDirectory() as folder:
            if layers:
                bench.write(Path(folder), layers)
            model = folder if layers else None
            system = bench.RoE(SimpleNamespace(model=model, layers=layers, dtype="bfloat16", device="cpu"))
        config, tau, seconds = system.model.config, roe.temperatures(system.model.config, TAU), {}
        for _, n, name in itertools.product(range(args.repeats), (1, 8, 32), rules):
            k, rule = config.num_experts_per_tok, rules[name]
            make = lambda positions: noisy_route(k, draw(config, n, tau, 0, positions), rule)
            seconds.setdefault((n, name), []).extend(decode(system, make, n))
        for (n, name), times in seconds.items():
            ms = 1000 * statistics.median(times)
            yield {"control": name, "layers": layers, "rosters": n, "tau": TAU, "dtype": "bfloat16", "ms": ms}


@torch.inference_mode()
def decode(system: bench.RoE, make: Callable, n: int) -> list[float]:
    """Seconds of decoding steps, as bench.py measures them."""
    cache = system.cache(32, 2 * system.steps)

    def step(token: int) -> int:
        route = make(range(cache.length, cache.length + 1))
        logits = system.model(torch.tensor([[token]]), cache, route)[:, 0].expand(n, -1)
        return roe.aggregate(logits).argmax().item()

    return bench.timed(step, system.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["effect", "time"])
    parser.add_argument("--pieces", type=int, default=12, help="of 512 tokens, evenly spaced over each text [12]")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing [5]")
    args = parser.parse_args()
    path = RESULTS / {"effect": "controls.jsonl", "time": "controls_time.jsonl"}[args.what]
    start = time.time()
    for result in globals()[f"measure_{args.what}"](args):
        line = json.dumps(result | where())
        print(f"{time.time() - start:5.0f} s {line[:300]}", flush=True)
        with open(path, "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
