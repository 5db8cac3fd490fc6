"""What margin.py buys: which tokens get rosters, what of their effect is kept, and what a token costs."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import margin
import torch
from effect import ROSTERS, read
from torch import Tensor

import roe
from cache import SharedCache
from load import load

MARGINS = 0.02, 0.05, 0.1, 0.2, 0.5, 1.0
COUNTS = 4, 8, 32
PROMPT = 32  # tokens


class Tokens:
    """What `score` and `generate` tell their `watch` about every token of one text."""

    def __init__(self):
        self.parts = []

    def __call__(self, logits: Tensor, _, targets: Tensor, __) -> None:
        log_probs = logits.float().log_softmax(-1)  # [rosters, t, V]
        first, second = log_probs[0].topk(2).values.exp().unbind(-1)
        averages = [roe.aggregate(log_probs[:n]) for n in COUNTS]
        overruled = [average.argmax(-1) != log_probs[0].argmax(-1) for average in averages]
        gains = [(average - log_probs[0]).gather(-1, targets[:, None])[:, 0] for average in averages]
        self.parts.append(torch.stack([first - second, *overruled, *gains]).double())

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Margin of the clean path [T]; for every count, whether it was overruled and what the token gained [3, T]."""
        ahead, *others = torch.cat(self.parts, 1)
        return ahead, torch.stack(others[: len(COUNTS)]), torch.stack(others[len(COUNTS) :])


def ratio(part: list[float], whole: list[float]) -> tuple[float, float]:
    """Sum of `part` over sum of `whole`, both by block of text, and the standard error of this ratio."""
    part, whole = torch.tensor(part).double(), torch.tensor(whole).double()
    value, blocks = part.sum() / whole.sum(), len(part)
    error = ((part - value * whole).square().sum() * blocks / (blocks - 1)).sqrt() / whole.sum().abs()
    return value.item(), error.item()


def kept(texts: list[Tokens], i: int, m: float) -> dict:
    """What is kept if COUNTS[i] rosters run only below the margin: of tokens, of overruled ones, of the gain."""
    parts, wholes = defaultdict(list), defaultdict(list)
    for ahead, overruled, gain in (text.columns() for text in texts):
        unsure = (ahead < m) | (m == 1)  # with 1 nothing is asked, even where the clean path is certain
        for name, values in {"share": torch.ones_like(ahead), "kept": overruled[i], "gain": gain[i]}.items():
            parts[name].append(values[unsure].sum().item())
            wholes[name].append(values.sum().item())
    found = {"tokens": int(sum(wholes["share"])), "overruled": int(sum(wholes["kept"]))}
    for name in parts:
        found[name], found[f"{name}_error"] = ratio(parts[name], wholes[name])
    return found


def decode(model, tokens: list[int], cache: SharedCache, n: int, m: float, tau: list[float]) -> tuple[float, int]:
    """Decodes tokens that are known as `margin.generate` would: seconds, and how many ran rosters.

    So every setting decodes the same text. The cache is left as it was.
    """
    before, unsure = cache.length, 0
    start = time.perf_counter()
    for position, token in enumerate(tokens, before):
        logits = margin.predict(model, [token], cache, n, m, tau, 0)
        roe.choose(roe.aggregate(logits), 0.0, 1.0, 0, position)
        unsure += len(logits) == n
    seconds = time.perf_counter() - start
    cache.length = before
    return seconds, unsure


def times(model, texts: list[list[int]], repeats: int) -> dict[tuple[int, float], float]:
    """For every number of rosters and every margin, the time of a token, as times that of one roster.

    The machine slows down and recovers, so all take turns on every text, and ratios are taken within a text.
    """
    tau, settings, ratios = roe.temperatures(model.config), [(n, m) for n in COUNTS for m in MARGINS], defaultdict(list)
    for text in texts * repeats:
        cache = SharedCache(model.config, len(text))
        roe.predict(model, text[: PROMPT - 1], cache, 1, tau, 0)
        seconds = {setting: decode(model, text[PROMPT - 1 : -1], cache, *setting, tau)[0] for setting in settings}
        one, _ = decode(model, text[PROMPT - 1 : -1], cache, 1, 1.0, tau)
        for setting in settings:
            ratios[setting].append(seconds[setting] / one)
    return {setting: statistics.median(values) for setting, values in ratios.items()}


def margins(count: int = 16, prompts: int = 32, new: int = 128) -> list[tuple[dict, Callable]]:
    """Cells for `report.measure`: held-out text, and greedy text of the model's own."""

    def run(name: str) -> dict:
        model, tokenizer = load(dtype="float32")
        watched, texts = [], []
        for seed, piece in enumerate(read("held-out modules", tokenizer, count if name == "held-out" else prompts)[1]):
            watch = Tokens()
            if name == "held-out":
                roe.score(model, piece, ROSTERS, seed=seed, watch=watch)
                text = piece
            else:
                start = piece[:PROMPT]
                text = start + list(roe.generate(model, start, ROSTERS, max_new_tokens=new, seed=seed, watch=watch))
            if len(text) > PROMPT:
                watched.append(watch)
                texts.append(text[: PROMPT + 64])
        ratios = times(model, texts[:6], repeats=3)
        found = []
        for i, n in enumerate(COUNTS):
            for m in MARGINS:
                found.append({"rosters": n, "margin": m, "ratio": ratios[n, m]} | kept(watched, i, m))
        return {"found": found}

    return [({"text": name, "pieces": count}, lambda name=name: run(name)) for name in ("held-out", "greedy")]
