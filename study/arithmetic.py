"""Do rosters help to reason? The paper's claim, accuracy under greedy decoding, on arithmetic written in steps.

Trains a model like the embedded one on problems such as 12-45*3+70= with what follows, 12-135+70=-123+70=-53. Then it
counts new problems whose whole chain is written without a fault by 1 to 32 rosters and, beside them, by one more expert
for each token; and how often a vote of sampled chains finds the answer (self-consistency).
"""

import itertools
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from effect import COUNTS, READINGS, ROOT, ROSTERS
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import roe
from cache import SharedCache
from load import load
from model import OLMoE

sys.path.append(str(ROOT / "tiny"))
import train as recipe

SYMBOLS = "\n0123456789+-*="  # a token each; the first ends a chain
# Half the width of the embedded model, so that it learns in half an hour.
SIZE = {"hidden_size": 64, "intermediate_size": 80, "vocab_size": len(SYMBOLS), "max_position_embeddings": 64}
TRAINING, VALIDATION, TEST = 15_000, 500, 2_000  # problems, no two of them alike
EPOCHS, BATCH = 12, 64
TAUS, SKIPS, SEEDS = (0.05, 0.1, 0.2, 0.3, 0.5), (0, 1), 5
SOFTMAX_TEMPERATURES = 0.5, 0.7, 1.0  # of sampled chains


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
    recipe.config = replace(recipe.config, **SIZE)
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
    log = {"seed": recipe.seed, "minutes": (time.time() - start) / 60}
    (folder / "log.json").write_text(json.dumps(log) + "\n")
    recipe.save(model, folder / "model.safetensors")


@torch.inference_mode()
def judge(model: OLMoE, pairs: list, rosters: int = 1, tau=0.0, seed=0, weights="perturbed") -> tuple[Tensor, Tensor]:
    """Whether greedy decoding writes exactly the right chain of each (problem, chain), which are lists of ids.

    It does if the likeliest token is the right one everywhere, given the right ones before it: one pass says it.

    Returns, for all of COUNTS up to `rosters`: 1 or 0 for each problem [counts, problems]; the chains' perplexity.
    """
    rows, rights, scores = [n - 1 for n in COUNTS if n <= rosters], [], []
    for i, (problem, chain) in enumerate(pairs):
        cache, right = SharedCache(model.config, len(problem + chain)), []
        model.hidden(torch.tensor([problem[:-1]]), cache)

        def watch(logits, _, targets, __):
            sums = logits.float().softmax(-1).cumsum(0)  # n times the mean of the first n rows
            right.append(sums[rows].argmax(-1) == targets)

        noise = seed * len(pairs) + i  # of its own for each problem
        scores.append(roe.score(model, problem[-1:] + chain, rosters, tau, noise, weights, cache, watch)[rows])
        rights.append(torch.cat(right, 1).all(1))
    return torch.stack(rights, 1).double(), torch.cat(scores, 1).double().mean(1).neg().exp()


def gains(hits: Tensor, clean: Tensor) -> list[dict]:
    """Accuracy for each n, its change from the clean path's, and the error of that: [counts, problems], [problems]."""
    changes = hits - clean
    columns = hits.mean(1), changes.mean(1), changes.std(1) / len(clean) ** 0.5
    keys = "rosters", "accuracy", "gained", "gained_error"
    return [dict(zip(keys, line)) for line in zip(COUNTS, *(column.tolist() for column in columns))]


def rosters(model: OLMoE, trained: list, validation: list, test: list) -> dict:
    """With the reading, and the temperature of all layers or all but the ends, that are best in validation."""
    clean, grid = judge(model, validation)[0].mean().item(), []
    for weights, skip, tau in itertools.product(READINGS, SKIPS, TAUS):
        right, perplexities = judge(model, validation, ROSTERS, roe.temperatures(model.config, tau, skip), 0, weights)
        grid.append((right[-1].mean().item(), -perplexities[-1].item(), weights, skip, tau))
    *_, weights, skip, tau = max(grid)
    tau = roe.temperatures(model.config, tau, skip)
    rights, perplexities = zip(*(judge(model, test, ROSTERS, tau, seed, weights) for seed in range(1, SEEDS + 1)))
    rights = torch.stack(rights)  # [seeds, counts, problems]
    found = {"trained": judge(model, trained)[0].mean().item(), "validation": clean, "grid": grid, "best": max(grid)}
    found |= {"seeds": (rights[:, -1] - rights[:, 0]).mean(1).tolist(), "counts": gains(rights.mean(0), rights[0, 0])}
    return found | {"perplexities": torch.stack(perplexities).mean(0).tolist()}


def one_more_expert(model: OLMoE, trained: list, validation: list, test: list) -> dict:
    clean, _ = judge(model, test)
    model.config.num_experts_per_tok += 1
    right, perplexities = judge(model, test)
    return {"counts": gains(right, clean[0]), "perplexities": perplexities.tolist()}


@torch.inference_mode()
def answers(model: OLMoE, problem: list[int], temperature: float, seed: int) -> list[str]:
    """Of as many chains as rosters, drawn token by token; those that are the same so far are read once."""
    generator, rows = torch.Generator().manual_seed(seed), torch.tensor([problem] * ROSTERS)
    while rows.all(1).any() and rows.shape[1] < model.config.max_position_embeddings:  # some have no end yet
        different, which = rows.unique(dim=0, return_inverse=True)
        probs = (model(different)[:, -1] / temperature).softmax(-1)
        rows = torch.cat((rows, probs[which].multinomial(1, generator=generator)), 1)
    return [answer(row) for row in rows.tolist()]


def answer(ids: list[int]) -> str:
    """What follows the last "=" before the end."""
    return "".join(SYMBOLS[i] for i in ids).partition("\n")[0].rpartition("=")[2]


def votes(model: OLMoE, trained: list, validation: list, test: list) -> dict:
    """The answer that most of n sampled chains give; of several such, the one that came first."""

    def hits(pairs: list, temperature: float, seed: int) -> Tensor:  # [counts, problems]
        found = []
        for i, (problem, chain) in enumerate(pairs):
            drawn = answers(model, problem, temperature, seed * len(pairs) + i)
            found.append([Counter(drawn[:n]).most_common(1)[0][0] == answer(chain) for n in COUNTS])
        return torch.tensor(found).double().T

    grid = [(hits(validation, temperature, 0)[-1].mean().item(), temperature) for temperature in SOFTMAX_TEMPERATURES]
    greedy = [answer([*roe.generate(model, problem, 1)]) == answer(chain) for problem, chain in test]
    found = {"grid": grid, "best": max(grid), "greedy": sum(greedy) / len(greedy)}
    return found | {"counts": gains(hits(test, max(grid)[1], 1), torch.tensor(greedy).double())}


def arithmetic(directory: Path) -> list[tuple[dict, Callable]]:
    """Cells for `report.measure`; a model that is missing in the directory is trained first."""
    folder, texts = directory / "arithmetic", problems(TRAINING + VALIDATION + TEST)

    def run(way: Callable) -> dict:
        if not folder.exists():
            unfinished = folder.with_name("arithmetic.unfinished")
            train(unfinished, texts[:TRAINING])
            unfinished.rename(folder)
        model, tokenizer = load(folder, device="cpu", dtype="float32")
        ids = [[tokenizer.encode(part).ids for part in text.partition("=")] for text in texts]
        pairs = [(problem + equals, chain) for problem, equals, chain in ids]
        found = way(model, pairs[:VALIDATION], pairs[TRAINING:-TEST], pairs[-TEST:])
        return json.loads((folder / "log.json").read_text()) | found

    ways = rosters, one_more_expert, votes
    return [({"way": way.__name__, "problems": TEST}, lambda way=way: run(way)) for way in ways]
