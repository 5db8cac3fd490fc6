"""What are rosters worth in parameters? The paper's headline (n = 32 makes 7B worth 10.5B) at the scale of tiny models.

Trains three models that differ only in the size of their experts, on the same text in the same order with
tiny/train.py, in DIR/SIZE. Then measures their held-out loss with one roster, and that of the middle one with up to 32:
perturbed weights, and the one temperature for all layers but the ends that is best on the validation text. A line
through the three, loss against the logarithm of the parameters that a token reads, says what size a loss is worth.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from effect import BLOCK, COUNTS, ROOT, ROSTERS, VALIDATION, read, slices
from torch import Tensor

import roe
from load import load

SIZES = 104, 160, 240  # of an expert: 0.65, 1 and 1.5 times the embedded model's
MIDDLE = 160
RECIPE = "--every", "20", "--epochs", "2.4"  # the epochs of the embedded model, over a twentieth of its files
TAUS = 0.0, 0.1, 0.2, 0.3, 0.4, 0.5


def train(folder: Path, size: int) -> None:
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        options = "--expert-size", str(size), *RECIPE, "--output", unfinished
        subprocess.run([sys.executable, ROOT / "tiny" / "train.py", *options], check=True)
        unfinished.rename(folder)


def active_parameters(config) -> int:
    """What a token reads: all but the experts that it is not sent to, and one row of the embedding."""
    d, D = config.hidden_size, config.head_dim
    attention = 2 * d * d + 2 * d * config.num_key_value_heads * D + d + config.num_key_value_heads * D  # and its norms
    experts = config.num_experts_per_tok * 3 * d * config.intermediate_size
    layer = attention + config.num_experts * d + experts + 2 * d
    return config.num_hidden_layers * layer + config.vocab_size * d + 2 * d  # the head, the last norm, the embedding


def losses(model, pieces: list[list[int]], rosters: int, tau: float) -> Tensor:
    """Nats per token for 1 to n rosters, on average over each piece: [n, pieces]."""
    scores = [roe.score(model, piece, rosters, tau, seed) for seed, piece in enumerate(pieces)]
    return -torch.stack([s.double().mean(1) for s in scores], 1)


def line(parameters: list[int], losses: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares line loss = a + b log(parameters) through losses [models, ...]: a and b [...]."""
    x = torch.tensor(parameters, dtype=torch.float64).log()
    x = (x - x.mean()).view(-1, *[1] * (losses.dim() - 1))
    b = (x * losses).sum(0) / x.square().sum()
    return losses.mean(0) - b * torch.tensor(parameters, dtype=torch.float64).log().mean(), b


def equivalent(parameters: list[int], models: Tensor, rosters: Tensor, draws: int = 2000) -> tuple[float, float, float]:
    """Parameters at which the line through the models has the rosters' loss, and the middle 95 % of bootstrap draws.

    Args:
        models [models, pieces] and rosters [pieces]: losses on the same pieces of text. A draw takes as many pieces,
            with replacement, the same ones for all: the interval says what other text would change, not what other
            seeds of the training would.
    """

    def size(models, rosters):
        a, b = line(parameters, models)
        return ((rosters - a) / b).exp()

    count = len(rosters)
    picks = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(0))
    drawn = size(models[:, picks].mean(-1), rosters[picks].mean(-1))
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return size(models.mean(1), rosters.mean()).item(), low, high


def measure(directory: Path, count: int) -> dict:
    """Losses of the three models, the line through them, and what rosters of the middle one are worth on it."""
    for size in SIZES:
        train(directory / str(size), size)
    models = {size: load(directory / str(size), dtype="float32") for size in SIZES}
    parameters = [active_parameters(model.config) for model, _ in models.values()]
    model, tokenizer = models[MIDDLE]
    validation = slices(tokenizer, VALIDATION.read_text(encoding="utf-8"), 16)
    tau = min(TAUS, key=lambda tau: losses(model, validation, 16, tau)[-1].mean().item())

    _, pieces = read("held-out modules", tokenizer, count)
    alone = torch.cat([losses(model, pieces, 1, 0.0) for model, _ in models.values()])
    middle, found = alone[SIZES.index(MIDDLE)], []
    for size, active, each in zip(SIZES, parameters, alone):
        error = (each - middle).std().item() / count**0.5  # of the difference from the middle one
        found.append({"size": size, "active": active, "loss": each.mean().item(), "error": error})
    a, b = line(parameters, alone.mean(1))
    rosters = []
    for n, each in zip(range(1, ROSTERS + 1), losses(model, pieces, ROSTERS, tau)):
        if n in COUNTS:
            worth, low, high = equivalent(parameters, alone, each)
            error = (each - middle).std().item() / count**0.5
            loss = {"rosters": n, "loss": each.mean().item(), "error": error}
            rosters.append(loss | {"worth": worth, "low": low, "high": high})
    tokens = count * BLOCK
    return {"tokens": tokens, "tau": tau, "models": found, "line": {"a": a.item(), "b": b.item()}, "rosters": rosters}


def sizes(directory: Path, count: int = 64) -> list[tuple[dict, Callable]]:
    """One cell for `report.measure`; models that are missing in the directory are trained first."""
    return [({"sizes": SIZES, "pieces": count}, lambda: measure(directory, count))]
