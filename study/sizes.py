"""What are rosters worth in parameters? The paper's headline (n = 32 makes 7B worth 10.5B) at the scale of tiny models.

    python study/sizes.py DIR            train what is missing, then measure loss and time
    python study/sizes.py DIR --loss     or only the one, or only the other (--time)

Trains three models that differ only in the size of their experts, on the same text in the same order with
tiny/train.py, in DIR/SIZE. Then measures their held-out loss with one roster, and that of the middle one with up to 32:
perturbed weights, and the one temperature for all layers but the ends that is best on the validation text. A line
through the three, loss against the logarithm of the parameters that a token reads, says what size a loss is worth.

Appends JSON lines to bench/results/sizes.jsonl.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from effect import BLOCK, HELD_OUT, RESULTS, ROOT, ROSTERS, VALIDATION, rows, score, where
from torch import Tensor

import bench
from load import load

SIZES = 104, 160, 240  # of an expert: 0.65, 1 and 1.5 times the embedded model's
MIDDLE = 160
RECIPE = "--every", "20", "--epochs", "2.4"  # the epochs of the embedded model, over a twentieth of its files
TAUS = 0.0, 0.1, 0.2, 0.3, 0.4, 0.5
COUNTS = 1, 2, 4, 8, 16, 32


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
    scores = [score(model, piece, rosters, tau, seed, "perturbed") for seed, piece in enumerate(pieces)]
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


def measure_loss(directory: Path, count: int) -> Iterator[dict]:
    models = {size: load(directory / str(size), dtype="float32") for size in SIZES}
    parameters = [active_parameters(model.config) for model, _ in models.values()]
    model, tokenizer = models[MIDDLE]
    validation = tokenizer.encode(VALIDATION.read_text(encoding="utf-8")).ids
    validation = rows(validation, len(validation) // BLOCK)
    perplexity = {tau: losses(model, validation, 16, tau)[-1].mean().exp().item() for tau in TAUS}
    tau = min(perplexity, key=perplexity.get)
    yield {"what": "tau", "tau": tau, "rosters": 16, "perplexity": perplexity}

    pieces = rows(tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")).ids, count)
    alone = torch.cat([losses(model, pieces, 1, 0.0) for model, _ in models.values()])
    for size, active, found in zip(SIZES, parameters, alone):
        error = (found - alone[SIZES.index(MIDDLE)]).std().item() / count**0.5  # of the difference from the middle one
        log = (directory / str(size) / "log.txt").read_text().splitlines()[-1].split()
        trained = {"train_tokens": int(log[1]), "epochs": float(log[2]), "train_loss": float(log[3])}
        shape = {"size": size, "parameters": sum(p.numel() for p in models[size][0].parameters()), "active": active}
        yield {"what": "model", "tokens": count * BLOCK, "loss": found.mean().item(), "error": error} | shape | trained
    a, b = line(parameters, alone.mean(1))
    fitted = [(a + b * math.log(active)).item() for active in parameters]
    yield {"what": "line", "a": a.item(), "b": b.item(), "parameters": parameters, "fitted": fitted}
    for n, found in zip(range(1, ROSTERS + 1), losses(model, pieces, ROSTERS, tau)):
        if n in COUNTS:
            worth, low, high = equivalent(parameters, alone, found)
            gain = found - alone[SIZES.index(MIDDLE)]
            result = {"rosters": n, "tau": tau, "loss": found.mean().item(), "gain": gain.mean().item()}
            errors = {"error": gain.std().item() / count**0.5, "worth": worth, "low": low, "high": high}
            yield {"what": "rosters", "size": MIDDLE, "tokens": count * BLOCK} | result | errors


def measure_time(directory: Path, repeats: int) -> Iterator[dict]:
    """Decoding steps after 32 tokens, as bench.py measures them, in float32; all take turns."""
    load_as = {"layers": 0, "dtype": "float32", "device": "cpu"}
    systems = {size: bench.RoE(SimpleNamespace(model=directory / str(size), **load_as)) for size in SIZES}
    settings, seconds = [(size, 1) for size in SIZES] + [(MIDDLE, n) for n in COUNTS[1:]], {}
    for _, (size, n) in itertools.product(range(repeats), settings):
        seconds.setdefault((size, n), []).extend(systems[size].decode(n, 32))
    for (size, n), times in seconds.items():
        yield {"what": "time", "size": size, "rosters": n, "ms": 1000 * statistics.median(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--pieces", type=int, default=128, help="of 512 tokens of the held-out text [128]")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing [5]")
    parser.add_argument("--loss", action="store_true", help="no timing")
    parser.add_argument("--time", action="store_true", help="timing only")
    args = parser.parse_args()
    for size in SIZES:
        train(args.directory / str(size), size)
    found = [] if args.time else measure_loss(args.directory, args.pieces)
    for result in itertools.chain(found, [] if args.loss else measure_time(args.directory, args.repeats)):
        text = json.dumps(result | where())
        print(time.strftime("%H:%M:%S"), text[:300], flush=True)
        with open(RESULTS / "sizes.jsonl", "a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
