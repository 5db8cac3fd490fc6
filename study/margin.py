"""An example of building on roe.py: rosters only where the clean path is unsure. This is not the paper's.

The clean path is sure of a token if it gives its first choice at least a margin M more probability than its second. A
sure token costs one row; an unsure one costs that row and then n of them. `margin_study.py`, beside this file, measures
what a margin keeps and costs.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import roe
from cache import SharedCache
from model import OLMoE


def sure(logits: Tensor, margin: float) -> bool:
    """Whether the first of logits [V] is more probable than the second by `margin` or more."""
    first, second = logits.float().softmax(-1).topk(2).values.tolist()
    return first - second >= margin


def predict(model: OLMoE, tokens, cache: SharedCache, rosters: int, margin: float, tau, seed: int) -> Tensor:
    """As `roe.predict`, but one row where the clean path is sure. A margin of 1 asks nothing: always all rosters.

    Raises ValueError: a margin that is not from 0 to 1; what `roe.predict` refuses.
    """
    if not 0 <= margin <= 1:  # written so that NaN is refused, too
        raise ValueError(f"margin must be a number from 0 to 1, not {margin}")
    if margin < 1:
        clean = roe.predict(model, tokens, cache, 1, tau, seed)
        if sure(clean[0], margin):
            return clean
        cache.length -= 1  # a step back: the last token once more, with all rosters
        tokens = tokens[-1:]
    return roe.predict(model, tokens, cache, rosters, tau, seed)


def generate(
    model: OLMoE,
    tokens: Sequence[int],
    rosters: int,
    margin: float,
    tau: float | Sequence[float] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """As `roe.generate` with the Clean Cache, where the arguments are explained; rosters for unsure tokens only."""
    max_len = min(model.config.max_position_embeddings, len(tokens) + max_new_tokens - 1)
    cache = SharedCache(model.config, max_len)
    for position in range(len(tokens) - 1, max_len):
        log_probs = roe.aggregate(predict(model, tokens, cache, rosters, margin, tau, seed))
        token = roe.choose(log_probs, temperature, top_p, seed, position)
        if token in model.config.eos_token_id:
            return
        yield token
        tokens = [token]
