"""Measures what averaging rosters does to a model's predictions; `figures.py` draws what comes out.

    python bench/effect.py rosters           perplexity for 1 to 32 rosters, on held-out text and on installed packages
    python bench/effect.py tau               perplexity at n = 32 against one temperature for all noisy layers
    python bench/effect.py disagreement      token by token: how sure the clean path is, how many rosters agree
    python bench/effect.py checkpoints DIR   when rosters help: all models that tiny/train.py --keep has left in DIR

Appends JSON lines to bench/results/NAME.jsonl. Changes are relative to one roster on the same tokens, and errors are
standard errors over pieces of 512 tokens. All in float32, and with the embedded model unless a DIR is given.
"""

import argparse
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
import train

import roe
from load import EMBEDDED, load

HELD_OUT, TUNED = EMBEDDED / "heldout.txt", EMBEDDED / "tau.json"
ROSTERS = 32
BLOCK = 512  # tokens; the context of the embedded model
PACKAGES = "h11 iniconfig".split()  # installed with RoE and its tests


def where(device: torch.device | None = None) -> dict:
    """What a figure's caption must say."""
    if device and device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
        machine = f"{torch.get_num_threads()} threads of {(names or [platform.processor()])[0]}"
    return {"machine": machine, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def package_sources() -> tuple[str, str]:
    """Python code from outside the standard library, and the names and versions of the packages it is from."""
    texts, versions = {}, []
    for name in PACKAGES:
        package = metadata.distribution(name)
        versions.append(f"{name} {package.version}")
        for file in sorted(map(str, package.files)):
            if file.endswith(".py"):
                texts[Path(package.locate_file(file)).read_text(encoding="utf-8")] = file
    return "\n".join(texts), ", ".join(versions)


def rows(tokens: list[int], count: int) -> list[list[int]]:
    """`count` pieces of BLOCK tokens and the one that follows, evenly spaced over the text."""
    last = len(tokens) - BLOCK - 1
    return [tokens[start : start + BLOCK + 1] for start in (last * i // (count - 1) for i in range(count))]


def changes(scores: Tensor) -> Iterator[dict]:
    """For 1, 2, 4, ... rosters: perplexity, its change from one roster and the standard error of that change."""
    scores = scores.double()
    for n in (2**i for i in range(len(scores).bit_length())):
        gain = scores[n - 1] - scores[0]  # nats per token
        blocks = gain[: len(gain) // BLOCK * BLOCK].view(-1, BLOCK).mean(1)
        change = gain.mean().neg().exp().item() - 1
        error = (1 + change) * blocks.std().item() / len(blocks) ** 0.5
        yield {"rosters": n, "perplexity": scores[n - 1].mean().neg().exp().item(), "change": change, "error": error}


class Softened:
    """Perplexity of the rosters' average at the softmax temperature that suits it best, which mends overconfidence."""

    def __init__(self):
        self.scores = {i / 10: [] for i in range(8, 21)}  # by temperature

    def __call__(self, log_probs: Tensor, targets: Tensor) -> None:
        average = roe.aggregate(log_probs)
        for temperature, scores in self.scores.items():
            scores.append((average / temperature).log_softmax(-1).gather(-1, targets[:, None]))

    def best(self) -> tuple[float, float]:
        """Perplexity and temperature."""
        return min((torch.cat(scores).mean().neg().exp().item(), t) for t, scores in self.scores.items())


def measure(model, pieces: list[list[int]], tau, weights: str = "clean") -> list[dict]:
    """`changes` over pieces of text, every piece with noise of its own.

    The last one also tells what is more than a cure for overconfidence: `softened` is the change from the clean path to
    the average of all rosters, each at the softmax temperature that suits it best.
    """
    clean, average = Softened(), Softened()

    def watch(log_probs, targets):
        clean(log_probs[:1], targets)
        average(log_probs, targets)

    scores = [roe.score(model, piece, ROSTERS, tau, seed, weights, watch=watch) for seed, piece in enumerate(pieces)]
    found = list(changes(torch.cat(scores, 1)))
    (clean, clean_temperature), (average, average_temperature) = clean.best(), average.best()
    found[0] |= {"temperature": clean_temperature, "perplexity_softened": clean}
    found[-1] |= {"temperature": average_temperature, "perplexity_softened": average, "softened": average / clean - 1}
    return found


def loss(model, pieces: list[list[int]]) -> float:
    """Of the model without rosters, in nats per token."""
    return -torch.cat([roe.score(model, piece, 1) for piece in pieces], 1).mean().item()


def measure_rosters(args: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load(dtype="float32")
    held_out, (packages, versions) = HELD_OUT.read_text(encoding="utf-8"), package_sources()
    for name, text in (("held-out modules", held_out), (versions, packages)):
        tokens = tokenizer.encode(text).ids
        for setting, tau, weights in (
            ("clean", roe.TAU, "clean"),
            ("perturbed", roe.TAU, "perturbed"),
            ("tuned", TUNED, "clean"),
        ):
            tau = roe.read_tau(str(tau), model.config, 1)
            for change in measure(model, [tokens], tau, weights):
                yield {"text": name, "tokens": len(tokens), "setting": setting, "tau": tau} | change


def measure_tau(args: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load(dtype="float32")
    pieces = rows(tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")).ids, args.pieces)
    for weights, tau in itertools.product(args.weights, (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)):
        yield {"tokens": len(pieces) * BLOCK, "weights": weights, "tau": tau} | measure(model, pieces, tau, weights)[-1]


def measure_disagreement(args: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load(dtype="float32")
    pieces = rows(tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")).ids, args.pieces)
    tau = roe.read_tau(str(TUNED), model.config, 1)
    columns = {"confidence": [], "agreement": [], "gain": []}

    def watch(log_probs, targets):
        average = roe.aggregate(log_probs)
        gain = (average - log_probs[0]).gather(-1, targets[:, None])[:, 0]
        columns["confidence"] += log_probs[0].amax(-1).exp().tolist()
        columns["agreement"] += (log_probs.argmax(-1) == average.argmax(-1)).float().mean(0).tolist()
        columns["gain"] += gain.tolist()

    for seed, piece in enumerate(pieces):
        roe.score(model, piece, ROSTERS, tau, seed, watch=watch)
    rounded = {name: [round(value, 4) for value in column] for name, column in columns.items()}
    yield {"rosters": ROSTERS, "tau": tau} | rounded


def measure_checkpoints(args: argparse.Namespace) -> Iterator[dict]:
    log = [line.split() for line in (args.checkpoints / "log.txt").read_text().splitlines()]
    epochs = {int(words[0]): float(words[2]) for words in log if words[0].isdigit()}
    texts, held_out, _ = train.read_sources()
    for step in args.steps or epochs:
        model, tokenizer = load(args.checkpoints / str(step), dtype="float32")
        seen, unseen = (
            rows(tokenizer.encode(text).ids, args.pieces) for text in ("\n".join(texts[:: args.every]), held_out)
        )
        found = {"step": step, "epochs": epochs[step], "train_loss": loss(model, seen), "tokens": len(unseen) * BLOCK}
        for weights, tau in itertools.product(args.weights, (0.1, 0.2, 0.35, 0.5, 0.7)):
            clean, *_, change = measure(model, unseen, tau, weights)
            alone = {"held_out_loss": math.log(clean["perplexity"]), "clean_softened": clean["perplexity_softened"]}
            yield found | alone | {"weights": weights, "tau": tau} | change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["rosters", "tau", "disagreement", "checkpoints"])
    add("checkpoints", nargs="?", type=Path, metavar="DIR")
    add("--steps", type=int, nargs="+", help="these checkpoints only [all]")
    add("--every", type=int, default=1, help="the checkpoints' own setting of tiny/train.py --every [1]")
    add("--pieces", type=int, default=12, help="of 512 tokens, evenly spaced over the text [12]")
    add("--weights", nargs="+", default=["clean", "perturbed"], help="readings of equation 1 [clean perturbed]")
    args = parser.parse_args()
    if (args.what == "checkpoints") != (args.checkpoints is not None):
        parser.error("checkpoints needs a directory, and nothing else takes one")
    path = ROOT / "bench" / "results" / f"{args.what}.jsonl"
    path.parent.mkdir(exist_ok=True)
    for result in globals()[f"measure_{args.what}"](args):
        line = json.dumps(result | where())
        print(line[:300], flush=True)
        with open(path, "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
