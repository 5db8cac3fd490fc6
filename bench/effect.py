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
from load import load

HELD_OUT = ROOT / "tiny" / "heldout.txt"
EMBEDDED_TAU = ROOT / "tiny" / "tau.json"
ROSTERS = 32
BLOCK = 512  # tokens; the context of the embedded model
PACKAGES = "h11 iniconfig pluggy".split()  # installed with RoE and its tests


def where(device: torch.device | None = None) -> dict:
    """What a figure's caption must say."""
    if device and device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
        machine = f"{torch.get_num_threads()} threads of {cpu}"
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


def score_rows(model, pieces: list[list[int]], rosters: int, tau, weights: str = "clean") -> Tensor:
    """Log-probabilities [rosters, pieces * BLOCK]; every piece has noise of its own."""
    scores = [roe.score(model, piece, rosters, tau, seed, weights) for seed, piece in enumerate(pieces)]
    return torch.cat(scores, 1)


def changes(scores: Tensor) -> Iterator[dict]:
    """For 1, 2, 4, ... rosters: perplexity, its change from one roster and the standard error of that change."""
    scores = scores.double()
    for n in (2**i for i in range(len(scores).bit_length())):
        gain = scores[n - 1] - scores[0]  # nats per token
        blocks = gain[: len(gain) // BLOCK * BLOCK].view(-1, BLOCK).mean(1)
        change = gain.mean().neg().exp().item() - 1
        error = (1 + change) * blocks.std().item() / len(blocks) ** 0.5
        yield {"rosters": n, "perplexity": scores[n - 1].mean().neg().exp().item(), "change": change, "error": error}


def measure_rosters(args: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load(dtype="float32")
    held_out, (packages, versions) = HELD_OUT.read_text(encoding="utf-8"), package_sources()
    for name, text in (("held-out modules", held_out), (versions, packages)):
        tokens = tokenizer.encode(text).ids
        for setting, tau, weights in (
            ("clean", roe.TAU, "clean"),
            ("perturbed", roe.TAU, "perturbed"),
            ("tuned", str(EMBEDDED_TAU), "clean"),
        ):
            tau = roe.read_tau(str(tau), model.config, 1)
            for change in changes(roe.score(model, tokens, ROSTERS, tau, weights=weights)):
                yield {"text": name, "tokens": len(tokens), "setting": setting, "tau": tau} | change


def measure_tau(args: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load(dtype="float32")
    pieces = rows(tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")).ids, args.pieces)
    for weights, tau in itertools.product(args.weights, (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)):
        *_, change = changes(score_rows(model, pieces, ROSTERS, tau, weights))
        yield {"tokens": len(pieces) * BLOCK, "weights": weights, "tau": tau} | change


def measure_disagreement(args: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load(dtype="float32")
    pieces = rows(tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")).ids, args.pieces)
    tau = roe.read_tau(str(EMBEDDED_TAU), model.config, 1)
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
        train_loss, held_out_loss = (-score_rows(model, pieces, 1, 0.0).mean().item() for pieces in (seen, unseen))
        losses = {"step": step, "epochs": epochs[step], "train_loss": train_loss, "held_out_loss": held_out_loss}
        for weights, tau in itertools.product(args.weights, (0.1, 0.2, 0.35, 0.5, 0.7)):
            *_, change = changes(score_rows(model, unseen, ROSTERS, tau, weights))
            yield losses | {"tokens": len(unseen) * BLOCK, "weights": weights, "tau": tau} | change


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
