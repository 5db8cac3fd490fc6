"""Measures loading: `load.load` against reading the same files once into fresh memory. On Linux.

    python bench/loading.py                4 layers of OLMoE-1B-7B's shapes (3.8 GB), random, in a temporary directory;
                                           then all 16 of them (13.8 GB), where disk and memory have room
    python bench/loading.py --layers 8     8 layers and no others

Every measurement is a process of its own, and they take turns. The files are read once before, so that they are in the
page cache if there is memory for them beside the weights. Prints medians of seconds, and in bytes the peak of memory
and what is held afterwards.
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
from collections import defaultdict
from pathlib import Path

import report  # which lets the next ones be found
import torch

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


def child(what: str, folder: str, layers: int = 0) -> str:
    command = [sys.executable, __file__, "--serve", what, folder, "--layers", str(layers)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def lacks_room(layers: int) -> str | None:
    """What there is too little of for so many layers, and how much: disk for the files, memory for 1.2 times them."""
    with torch.device("meta"):
        model = OLMoE(Config(num_hidden_layers=1, **OLMOE))
    whole, layer = (sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers))
    nbytes = 2 * (whole + (layers - 1) * layer)
    available = next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable"))  # as if no cache were
    free = {"disk": shutil.disk_usage(tempfile.gettempdir()).free, "memory": 1024 * int(available.split()[1])}
    for name, needed in {"disk": nbytes, "memory": 1.2 * nbytes}.items():
        if free[name] < needed:
            return f"{layers} layers need {needed / 1e9:.1f} GB of {name}, of which {free[name] / 1e9:.1f} are free"
    return None


def measure(layers: int, repeats: int = 2) -> dict:
    """Medians of seconds, and bytes, of so many layers of random weights, or with 0 of the embedded model."""
    with tempfile.TemporaryDirectory() as folder:
        if layers:
            child("write", folder, layers)
        folder = Path(folder) if layers else report.EMBEDDED
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
        found = defaultdict(list)
        for _ in range(repeats + 1):
            for what in ("read", "load"):
                found[what].append(json.loads(child(what, str(folder))))
    result = {"bytes": sum(sizes), "files": len(sizes)}
    for what, values in found.items():
        seconds, peaks, held = zip(*values[1:])  # the first ones filled the page cache
        numbers = {"seconds": statistics.median(seconds), "peak": max(peaks), "held": max(held)}
        result |= {f"{what}_{name}": number for name, number in numbers.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16], help="0: the embedded model [4 16]")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        what, folder = args.serve
        return write(Path(folder), *args.layers) if what == "write" else serve(what, Path(folder))
    for layers in args.layers:
        lack = lacks_room(layers)
        print(f"not measured: {lack}" if lack else f"{layers} layers: {measure(layers)}", flush=True)


if __name__ == "__main__":
    main()
