"""Measures loading: `load.load` against reading the same files once into fresh memory. On Linux.

    python bench/loading.py                4 layers of OLMoE-1B-7B's shapes (3.8 GB), random, in a temporary directory;
                                           then all 16 of them (13.8 GB), where disk and memory have room
    python bench/loading.py --layers 8     8 layers and no others
    python bench/loading.py --model DIR    a model that is there

Every measurement is a process of its own, and they take turns. The files are read once before, so that they are in the
page cache if there is memory for them beside the weights. Prints medians, and relative to the files the peak of memory
and what is held afterwards; appends them to bench/results/loading.jsonl.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from report import ROOT, where

from bench import OLMOE, write
from load import load
from model import Config, OLMoE


def serve(what: str, folder: Path) -> None:
    """Does one thing, and prints its seconds, and in bytes the process's peak memory and what it holds afterwards."""
    start = time.perf_counter()
    result = load(folder, "cpu") if what == "load" else [path.read_bytes() for path in folder.glob("*.safetensors")]
    seconds = time.perf_counter() - start
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([seconds, max(peak, held), held]))  # the two are not counted at the same moments
    del result


def child(*options) -> str:
    command = [sys.executable, __file__, *map(str, options)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def lacks_room(layers: int, folder: str) -> str | None:
    """What there is too little of for so many layers, and how much: disk for the files, memory for 1.2 times them."""
    with torch.device("meta"):
        model = OLMoE(Config(num_hidden_layers=1, **OLMOE))
    whole, layer = (sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers))
    nbytes = 2 * (whole + (layers - 1) * layer)
    available = next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable"))  # as if no cache were
    free = {"disk": shutil.disk_usage(folder).free, "memory": 1024 * int(available.split()[1])}
    for name, needed in {"disk": nbytes, "memory": 1.2 * nbytes}.items():
        if free[name] < needed:
            return f"{layers} layers need {needed / 1e9:.1f} GB of {name}, of which {free[name] / 1e9:.1f} are free"
    return None


def measure(folder: Path, repeats: int) -> dict:
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    found = {"read": [], "load": []}
    for _ in range(repeats + 1):
        for what, values in found.items():
            values.append(json.loads(child("--serve", what, "--model", folder)))
    result = {"bytes": nbytes, "files": len(list(folder.glob("*.safetensors")))}
    for what, values in found.items():
        seconds, peaks, held = zip(*values[1:])  # the first ones filled the page cache
        numbers = {"seconds": statistics.median(seconds), "peak": max(peaks), "held": max(held)}
        result |= {f"{what}_{name}": number for name, number in numbers.items()}
        memory = f"peak memory {max(peaks) / nbytes:.3f} times the files, {max(held) / nbytes:.3f} afterwards"
        print(f"{what}: {numbers['seconds']:.2f} s, {memory}")
    print(f"ratio: {result['load_seconds'] / result['read_seconds']:.2f}, files: {nbytes / 1e9:.2f} GB", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16], help="[4 16]")
    parser.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--repeats", type=int, default=5, help="[5]")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "loading.jsonl", help="appended to")
    parser.add_argument("--serve", choices=["write", "read", "load"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve == "write":
        return write(args.model, *args.layers)
    if args.serve:
        return serve(args.serve, args.model)
    for layers in [None] if args.model else args.layers:
        with tempfile.TemporaryDirectory() as folder:
            if layers and (lack := lacks_room(layers, folder)):
                print(f"not measured: {lack}")
                continue
            if layers:
                child("--serve", "write", "--model", folder, "--layers", layers)
            result = measure(args.model or Path(folder), args.repeats)
        with open(args.output, "a") as file:
            file.write(json.dumps(result | {"layers": layers} | where()) + "\n")


if __name__ == "__main__":
    main()
