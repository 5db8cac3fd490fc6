"""Do rosters help to reason? The paper's claim, accuracy under greedy decoding, on arithmetic written in steps.

Trains a model like the embedded one on problems such as 12-45*3+70= with what follows, 12-135+70=-123+70=-53. New
problems are right if the whole chain is, with 1 to 32 rosters or one more expert; or by a vote of sampled chains.
"""

import itertools
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from effect import COUNTS, READINGS, ROOT, ROSTERS, accuracy, likeliest
from tokenizers import Tokenizer, decoders, models
from torch.nn.utils.rnn import pad_sequence

import roe
from cache import SharedCache
from load import load
from model import OLMoE

sys.path.append(str(ROOT / "tiny"))
import train as recipe

SYMBOLS = "\n0123456789+-*="  # a token each; the first ends a chain
SIZE = {"hidden_size": 64, "intermediate_size": 80, "max_position_embeddings": 64}  # half the embedded model's width
TRAINING, VALIDATION, TEST = 15_000, 500, 2_000  # problems, no two of them alike
EPOCHS, BATCH, SEEDS = 12, 64, 5
TAUS, SKIPS, SOFTMAX = (0.05, 0.1, 0.2, 0.3, 0.5), (0, 1), (0.5, 0.7, 1.0)  # the last of sampled chains
answer = lambda ids: "".join(SYMBOLS[i] for i in ids).partition("\n")[0].rpartition("=")[2]  # after the last "="


def problems(count: int) -> list[str]:
    """Distinct problems with their chains: the product of two and of one digits first, then sums from left to right."""
    chance, found = random.Random(0), {}
    while len(found) < count:
        signs = [chance.choice("+-") for _ in range(3)]
        signs[chance.randrange(3)] = "*"
        numbers = [chance.randint(10, 99) for _ in range(4)]
        numbers[signs.index("*") + 1] = chance.randint(2, 9)
        steps = ["".join(f"{number}{sign}" for number, sign in zip(numbers, [*signs, ""]))]
        while step := re.search(r"\d+\*\d+", steps[-1]) or re.match(r"-?\d+[+-]\d+", steps[-1]):
            steps.append(steps[-1].replace(step[0], str(eval(step[0])), 1))
        found["=".join(steps) + "\n"] = None
    return list(found)


def train(folder: Path, texts: list[str]) -> None:
    """As tiny/train.py, but a row of a batch is one problem with its chain, filled up with ends."""
    recipe.config = replace(recipe.config, vocab_size=len(SYMBOLS), **SIZE)
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(SYMBOLS)}, []))
    tokenizer.decoder = decoders.Fuse()
    recipe.save_config(folder, tokenizer)
    rows = pad_sequence([torch.tensor(found.ids) for found in tokenizer.encode_batch(texts)], batch_first=True)
    torch.manual_seed(recipe.seed)
    model = OLMoE(recipe.config)
    recipe.initialise(model)
    steppers, start = recipe.optimizers(model), time.time()
    batches = [batch for _ in range(EPOCHS) for batch in rows[torch.randperm(len(rows))].split(BATCH)]
    for step, batch in enumerate(batches):
        recipe.learn(model, batch, steppers, step + 1, step / len(batches))
    (folder / "log.json").write_text(json.dumps({"seed": recipe.seed, "minutes": (time.time() - start) / 60}))
    recipe.save(model, folder / "model.safetensors")


@torch.inference_mode()
def judge(model: OLMoE, pairs: list, rosters: int = 1, setting: tuple = ("perturbed", 1, 0.0), seed: int = 0):
    """Whether greedy decoding writes exactly the right chain of each (problem, chain), which are lists of ids.

    It does if the likeliest token is the right one everywhere, given the right ones before it: one pass says it.
    Returns 1 or 0 [counts, problems], and the chains' perplexity [counts], for all of COUNTS up to `rosters`.
    """
    weights, skip, tau = setting
    tau = roe.temperatures(model.config, tau, skip)
    counts, rights, scores = [n for n in COUNTS if n <= rosters], [], []
    for i, (problem, chain) in enumerate(pairs):
        cache, right = SharedCache(model.config, len(problem + chain)), []
        model.hidden(torch.tensor([problem[:-1]]), cache)
        watch = lambda logits, _, targets, __: right.append(likeliest(logits, counts) == targets)
        noise = seed * len(pairs) + i  # of its own for each problem
        found = roe.score(model, problem[-1:] + chain, rosters, tau, noise, weights, cache, watch)
        scores.append(found[[n - 1 for n in counts]])
        rights.append(torch.cat(right, 1).all(1))
    return torch.stack(rights, 1).double(), torch.cat(scores, 1).double().mean(1).neg().exp()


def gains(hits: torch.Tensor, clean: torch.Tensor) -> list[dict]:
    """Accuracy for each n, its change from the clean path's, and the error of that: [counts, problems], [problems]."""
    return [{"rosters": n} | accuracy(row, clean) for n, row in zip(COUNTS, hits)]


def rosters(model: OLMoE, trained: list, validation: list, test: list) -> dict:
    """With the reading, layers and temperature that are best in validation; and one more expert instead of rosters."""
    clean, grid = judge(model, validation)[0].mean().item(), []
    for setting in itertools.product(READINGS, SKIPS, TAUS):
        right, perplexities = judge(model, validation, ROSTERS, setting)
        grid.append((right[-1].mean().item(), -perplexities[-1].item(), *setting))
    found = [judge(model, test, ROSTERS, max(grid)[2:], seed) for seed in range(1, SEEDS + 1)]
    rights, perplexities = map(torch.stack, zip(*found))  # [seeds, counts, problems], [seeds, counts]
    found = {"trained": judge(model, trained)[0].mean().item(), "validation": clean, "grid": grid, "best": max(grid)}
    found |= {"counts": gains(rights.mean(0), rights[0, 0]), "perplexities": perplexities.mean(0).tolist()}
    model.config.num_experts_per_tok += 1
    more, perplexity = judge(model, test)
    return found | {"more": gains(more, rights[0, 0])[0], "more_perplexity": perplexity.item()}


def elect(model: OLMoE, pairs: list, temperature: float, seed: int) -> torch.Tensor:
    """Whether most of n sampled chains have the right answer, of two with equal votes the first: [counts, problems]."""
    found = []
    for i, (problem, chain) in enumerate(pairs):
        generator, rows = torch.Generator().manual_seed(seed * len(pairs) + i), torch.tensor([problem] * ROSTERS)
        while rows.all(1).any() and rows.shape[1] < model.config.max_position_embeddings:  # some have no end yet
            different, which = rows.unique(dim=0, return_inverse=True)  # the same beginning is read once
            probs = (model(different)[:, -1] / temperature).softmax(-1)
            rows = torch.cat((rows, probs[which].multinomial(1, generator=generator)), 1)
        answers = [answer(row) for row in rows.tolist()]
        found.append([statistics.mode(answers[:n]) == answer(chain) for n in COUNTS])
    return torch.tensor(found).double().T


def votes(model: OLMoE, trained: list, validation: list, test: list) -> dict:
    """Of chains sampled at the temperature that is best in validation, against the answers of greedy decoding."""
    grid = [(elect(model, validation, temperature, 0)[-1].mean().item(), temperature) for temperature in SOFTMAX]
    greedy = [answer([*roe.generate(model, problem, 1)]) == answer(chain) for problem, chain in test]
    counts = gains(elect(model, test, max(grid)[1], 1), torch.tensor(greedy).double())
    return {"grid": grid, "best": max(grid), "greedy": sum(greedy) / len(greedy), "counts": counts}


def arithmetic(directory: Path) -> list[tuple[dict, Callable]]:
    """Cells for `report.measure`; a model that is missing in the directory is trained first."""
    folder, texts = directory / "arithmetic", problems(TRAINING + VALIDATION + TEST)

    def run(way: Callable) -> dict:
        if not (folder / "model.safetensors").exists():
            train(folder, texts[:TRAINING])
        model, tokenizer = load(folder, device="cpu", dtype="float32")
        ids = [[tokenizer.encode(part).ids for part in text.partition("=")] for text in texts]
        pairs = [(problem + equals, chain) for problem, equals, chain in ids]
        log = json.loads((folder / "log.json").read_text())
        return log | way(model, pairs[:VALIDATION], pairs[TRAINING:-TEST], pairs[-TEST:])

    return [({"way": way.__name__, "problems": TEST}, lambda way=way: run(way)) for way in (rosters, votes)]
