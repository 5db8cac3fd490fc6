"""Does a small model with many rosters equal a larger one without? The paper's headline, redone with tiny models.

    python bench/sizes.py DIR --epochs 12

Trains models of one shape and three sizes (1, 1.5 and 2.1 times the parameters) on the same data with tiny/train.py,
each to its best checkpoint, in DIR/WIDTH; one that is there already is not trained again. Meant for a GPU. Then prints,
and appends to bench/results/sizes.jsonl, held-out perplexity, time per token and bytes of weights and cache: of the
smallest with 1 to 32 rosters and the temperatures that bench/tune.py finds for it, of the others with one roster.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from effect import HELD_OUT, ROOT, changes, where

import roe
from load import load

WIDTHS = 128, 160, 192
ROSTERS = 32


def train(folder: Path, width: int, epochs: float) -> None:
    if not (folder / "model.safetensors").exists():
        options = ["--width", str(width), "--epochs", str(epochs), "--output", str(folder)]
        subprocess.run([sys.executable, str(ROOT / "tiny" / "train.py"), *options], check=True)


def tune(folder: Path, trials: int) -> None:
    options = [str(folder / "validation.txt"), "--rosters", str(ROSTERS), "--trials", str(trials)]
    options += ["--model", str(folder), "--output", str(folder / "tau.json")]
    subprocess.run([sys.executable, str(ROOT / "bench" / "tune.py"), *options], check=True)


def milliseconds(model, tokens: list[int], rosters: int, tau: list[float]) -> float:
    """Median time of a decoding step."""
    times = []
    watch = lambda *_: times.append(time.perf_counter())
    list(roe.generate(model, tokens[:32], rosters, tau, max_new_tokens=200, temperature=1.0, watch=watch))
    return 1000 * torch.tensor(times, dtype=torch.float64).diff().median().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--epochs", type=float, default=12, help="of every model; the best checkpoint counts [12]")
    parser.add_argument("--trials", type=int, default=50, help="of the search for temperatures [50]")
    args = parser.parse_args()
    print("width  parameters  rosters  perplexity  ms/token       bytes  (of weights and cache)")
    for width in WIDTHS:
        folder = args.directory / str(width)
        train(folder, width, args.epochs)
        if width == WIDTHS[0]:
            tune(folder, args.trials)
        model, tokenizer = load(folder)
        tokens = tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")).ids
        rosters = ROSTERS if width == WIDTHS[0] else 1
        tau = roe.read_tau(str(args.directory / str(WIDTHS[0]) / "tau.json"), model.config, 1)
        parameters = sum(p.numel() for p in model.parameters())
        nbytes = sum(p.nbytes for p in model.parameters())
        nbytes += roe.SharedCache(model.config, model.config.max_position_embeddings, model.dtype, "meta").nbytes
        for change in changes(roe.score(model, tokens, rosters, tau)):
            ms = milliseconds(model, tokens, change["rosters"], tau)
            result = {"width": width, "parameters": parameters, "ms_per_token": ms, "bytes": nbytes} | change
            line = "{width:5}  {parameters:10,}  {rosters:7}  {perplexity:10.3f}  {ms_per_token:8.2f}  {bytes:10,}"
            print(line.format(**result), flush=True)
            with open(ROOT / "bench" / "results" / "sizes.jsonl", "a") as file:
                file.write(json.dumps(result | where(model.device)) + "\n")


if __name__ == "__main__":
    main()
