"""Log-probabilities of continuations of a context, such as the choices of a question, under n rosters."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import roe
from cache import SharedCache
from model import OLMoE


def crop(context: Sequence[int], continuation: Sequence[int], limit: int) -> list[int]:
    """A context without the beginning that a model of `limit` tokens has no room for, as lm-evaluation-harness cuts it.

    Raises ValueError: a continuation that is empty or alone longer than the limit.
    """
    if not 0 < len(continuation) <= limit:
        raise ValueError(f"a continuation must have 1 to {limit} tokens, not {len(continuation)}")
    return list(context)[-(limit + 1 - len(continuation)) :]  # one more: the last token is predicted, but not read


@torch.inference_mode()
def score_continuations(
    model: OLMoE,
    pairs: Iterable[tuple[Sequence[int], Sequence[int]]],
    rosters: int,
    tau: float | Sequence[float] | None = None,
    seed: int = 0,
    weights: str = "perturbed",
) -> Iterator[tuple[Tensor, bool]]:
    """Scores continuations one after the other; a context equal to the previous pair's is not read again.

    The score is that which `roe.score` gives to the continuation's tokens in the whole text, with the same seed.

    Args:
        pairs: of token ids, context and continuation, neither of them empty; for long ones see `crop`.
        rosters, tau, seed, weights: see `roe.score`.

    Yields:
        for every pair, log-probabilities [rosters, continuation], as `roe.score` returns them, and whether greedy
        decoding with n rosters would have written the continuation.

    Raises ValueError: see `crop`.
    """
    limit = model.config.max_position_embeddings
    cache, read = SharedCache(model.config, limit), None
    for context, continuation in pairs:
        context = crop(context, continuation, limit)
        if context != read:
            cache.length, read = 0, context
            if len(context) > 1:  # the last token belongs to the continuation's pass: it is the first to be stochastic
                model.hidden(torch.tensor([context[:-1]], device=model.device), cache)
        cache.length = len(context) - 1
        greedy = []

        def watch(logits, log_probs, targets, cache):
            greedy.append((log_probs.argmax(-1) == targets).all())

        tokens = [context[-1], *continuation]
        yield roe.score(model, tokens, rosters, tau, seed, weights, cache, watch), all(greedy)
