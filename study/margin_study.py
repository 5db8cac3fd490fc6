"""Measures what margin.py buys: which tokens get rosters, what of their effect is kept, and what a token costs.

    python study/margin_study.py effect    the embedded model: held-out text, greedy and sampled text of its own
    python study/margin_study.py time      the embedded model: a token of greedy text of its own, or --text held-out
    python study/margin_study.py forced    4 layers of OLMoE-1B-7B's shapes, random weights, bfloat16: time against the
                                           share of tokens on which the clean path is said to be unsure

The embedded model in float32 with default settings. Appends JSON lines to
bench/results/margin.jsonl; bench/figures.py and bench/tables.py show what comes out.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import margin
import torch
from torch import Tensor

import roe  # which margin.py has made known
from cache import SharedCache
from load import load

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
from effect import HELD_OUT, ROSTERS, rows, where
from tables import RESULTS

import bench

MARGINS = 0.02, 0.05, 0.1, 0.2, 0.5, 1.0
COUNTS = 4, 8, 32
SHARES = 0, 1, 2, 3, 5, 10  # unsure tokens out of ten
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


def kept(texts: list[Tokens]) -> Iterator[dict]:
    """For every number of rosters and every margin: what is kept where rosters run only below the margin."""
    columns = [text.columns() for text in texts]
    for i, n in enumerate(COUNTS):
        sums = defaultdict(list)  # a number for every text
        for ahead, overruled, gain in columns:
            sums["tokens"].append(len(ahead))
            sums["overruled"].append(overruled[i].sum().item())
            sums["gain"].append(gain[i].sum().item())
            for m in MARGINS:
                unsure = (ahead < m) | (m == 1)  # with 1 nothing is asked, even where the clean path is certain
                sums["share", m].append(unsure.sum().item())
                sums["overruled", m].append(overruled[i, unsure].sum().item())
                sums["gain", m].append(gain[i, unsure].sum().item())
        for m in MARGINS:
            result = {"tokens": sum(sums["tokens"]), "rosters": n, "margin": m, "overruled": sum(sums["overruled"])}
            for name, pair in {
                "share": (sums["share", m], sums["tokens"]),
                "overruled_kept": (sums["overruled", m], sums["overruled"]),
                "gain": (sums["gain", m], sums["tokens"]),
                "gain_kept": (sums["gain", m], sums["gain"]),
            }.items():
                result[name], result[f"{name}_error"] = ratio(*pair)
            yield result


def measure_effect(args: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load(dtype="float32")
    tokens = tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")).ids
    texts = defaultdict(list)
    for seed, piece in enumerate(rows(tokens, args.pieces)):
        texts["held-out"].append(Tokens())
        roe.score(model, piece, ROSTERS, seed=seed, watch=texts["held-out"][-1])
    for seed, piece in enumerate(rows(tokens, args.prompts)):
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            options = {"max_new_tokens": args.new_tokens, "temperature": temperature, "seed": seed}
            watch = Tokens()
            if list(roe.generate(model, piece[:PROMPT], ROSTERS, watch=watch, **options)):
                texts[name].append(watch)
    for name, watched in texts.items():
        for result in kept(watched):
            yield {"what": "effect", "text": name, "texts": len(watched)} | result


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


def relative(seconds: dict[tuple, list[float]], one: tuple) -> Iterator[tuple[tuple, dict]]:
    """For every setting, of which each repeat took so many seconds per token: what is reported of it.

    The machine slows down and recovers, so times are compared within a repeat, with those of the setting `one`.
    """
    for setting, times in seconds.items():
        ratios = [mine / base for mine, base in zip(times, seconds[one])]
        found = {"ms": 1000 * statistics.median(times), "ratio": statistics.median(ratios)}
        yield setting, found | {"ratios": [round(value, 3) for value in ratios]}


def measure_time(args: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load(dtype="float32")
    tau = roe.temperatures(model.config)
    pieces = rows(tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")).ids, args.timed_texts)
    end = PROMPT + args.timed_tokens
    if args.text == "held-out":
        texts = [piece[:end] for piece in pieces]
    else:
        texts = [
            p[:PROMPT] + list(roe.generate(model, p[:PROMPT], ROSTERS, max_new_tokens=end - PROMPT)) for p in pieces
        ]
    settings = [(1, 1.0), *((n, m) for n in COUNTS for m in MARGINS)]
    seconds, unsure = defaultdict(list), {}
    count = sum(len(text) - PROMPT for text in texts)
    for _ in range(args.repeats):
        spent, unsure = dict.fromkeys(settings, 0.0), dict.fromkeys(settings, 0)
        for text in texts:
            cache = SharedCache(model.config, len(text))
            roe.predict(model, text[: PROMPT - 1], cache, 1, tau, 0)
            for n, m in settings:
                time_taken, with_rosters = decode(model, text[PROMPT - 1 : -1], cache, n, m, tau)
                spent[n, m] += time_taken
                unsure[n, m] += with_rosters
        for setting in settings:
            seconds[setting].append(spent[setting] / count)
    for (n, m), found in relative(seconds, (1, 1.0)):
        result = {"what": "time", "text": args.text, "tokens": count, "rosters": n, "margin": m}
        yield result | {"share": unsure[n, m] / count} | found


def spread(tenths: int) -> Iterator[bool]:
    """Whether a token is unsure, token after token: so many of every ten, evenly spaced."""
    done = 0
    while True:
        yield (done + 1) * tenths // 10 > done * tenths // 10
        done += 1


def measure_forced(args: argparse.Namespace) -> Iterator[dict]:
    layers, steps = 4, 20
    with tempfile.TemporaryDirectory() as folder:
        bench.write(Path(folder), layers)
        model, _ = load(folder, "cpu", "bfloat16")
    tau = roe.temperatures(model.config, bench.TAU)
    tokens = bench.random_tokens(model.config.vocab_size, steps)
    # Rosters for all tokens: by two passes, if so many are unsure, and by one, as the margin 1 has it.
    settings = [
        (1, 1.0, 10),
        *((n, m, share) for n in COUNTS[1:] for m, share in [(1.0, 10)] + [(0.5, s) for s in SHARES]),
    ]
    for history in args.history:
        cache, seconds = bench.filled_cache(model, history, steps), defaultdict(list)
        decode(model, tokens, cache, max(COUNTS), 1.0, tau)  # the first time is slow
        for _ in range(args.repeats):
            for n, m, share in settings:
                pattern = spread(share)
                with patch.object(margin, "sure", lambda *_: not next(pattern)):
                    seconds[n, m, share].append(decode(model, tokens, cache, n, m, tau)[0] / steps)
        for (n, m, share), found in relative(seconds, (1, 1.0, 10)):
            result = {"what": "forced", "layers": layers, "history": history, "rosters": n, "margin": m}
            yield result | {"share": share / 10} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["effect", "time", "forced"])
    add("--pieces", type=int, default=16, help="effect: of 512 held-out tokens [16]")
    add("--prompts", type=int, default=32, help="effect: texts of its own, greedy and sampled [32]")
    add("--new-tokens", type=int, default=128, help="effect: of each [128]")
    add("--text", choices=["greedy", "held-out"], default="greedy", help="time: which text [greedy]")
    add("--timed-texts", type=int, default=6, help="time: pieces of it [6]")
    add("--timed-tokens", type=int, default=64, help="time: tokens of each [64]")
    add("--history", type=int, nargs="+", default=[32, 2048], help="forced: tokens before [32 2048]")
    add("--repeats", type=int, default=3, help="of timings; medians count [3]")
    args = parser.parse_args()
    path = RESULTS / "margin.jsonl"
    for result in globals()[f"measure_{args.what}"](args):
        line = json.dumps(result | where())
        print(line[:300], flush=True)
        with open(path, "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
