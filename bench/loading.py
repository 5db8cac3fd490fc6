"""Measures loading: `load.load` against reading the same files once into fresh memory.

    python bench/loading.py                4 layers of OLMoE-1B-7B's shapes (3.8 GB), random, in a temporary directory
    python bench/loading.py --layers 16    all of them (13.8 GB)
    python bench/loading.py --model DIR    a model that is there

Every measurement is a process of its own, and they take turns. The files are read once before, so that they are in the
page cache if there is memory for them beside the weights. Prints medians, and peak memory relative to the files;
appends them to bench/results/loading.jsonl.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from effect import ROOT, where

from bench import write
from load import load


def serve(what: str, folder: Path) -> None:
    """Does one thing, and prints its seconds and the process's peak memory in bytes."""
    import resource  # here, because Windows has none

    start = time.perf_counter()
    result = load(folder, "cpu") if what == "load" else [path.read_bytes() for path in folder.glob("*.safetensors")]
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
    del result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="[4]")
    parser.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--repeats", type=int, default=5, help="[5]")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "loading.jsonl", help="appended to")
    parser.add_argument("--serve", choices=["write", "read", "load"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve == "write":
        return write(args.model, args.layers)
    if args.serve:
        return serve(args.serve, args.model)

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model or Path(temporary)

        def child(what):
            command = [sys.executable, __file__, "--serve", what, "--model", str(folder), "--layers", str(args.layers)]
            return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout

        if not args.model:
            child("write")
        nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        found = {"read": [], "load": []}
        for _ in range(args.repeats + 1):
            for what, values in found.items():
                values.append(json.loads(child(what)))
    result = {"bytes": nbytes}
    for what, values in found.items():
        seconds, peaks = zip(*values[1:])  # the first ones filled the page cache
        result |= {f"{what}_seconds": statistics.median(seconds), f"{what}_peak": max(peaks)}
        print(f"{what}: {result[what + '_seconds']:.2f} s, peak memory {max(peaks) / nbytes:.3f} times the files")
    print(f"ratio: {result['load_seconds'] / result['read_seconds']:.2f}, files: {nbytes / 1e9:.2f} GB")
    with open(args.output, "a") as file:
        file.write(json.dumps(result | where()) + "\n")


if __name__ == "__main__":
    main()
