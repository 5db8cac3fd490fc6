"""What do the ports cost beside roe.py? Milliseconds per token, all in one run.

    python bench/ports.py --mlx PYTHON --vllm PYTHON    interpreters with mlx-lm and torch, and with vLLM and the plugin
    python bench/ports.py                               roe.py and the port to transformers only

One checkpoint of OLMoE-1B-7B's shapes, random, and one prompt, in float32, the one dtype in which MLX runs mixtures on
CPUs. Each system runs in a process of its own and writes greedily with its own `generate`, vLLM by its engine, one
request at a time; they take turns, and the median of the times between two tokens counts. Prints the results, and
appends them to bench/results/ports.jsonl.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from report import ROOT, where

from bench import OLMOE, TAU, Child, random_tokens, write

sys.path.insert(0, str(ROOT / "ports"))
STEPS = 24  # tokens to be written, of which the first third does not count


def write_with_roe(folder: str, dtype: str):
    import roe
    from load import load

    model, _ = load(folder, "cpu", dtype)
    tau = roe.temperatures(model.config, TAU, skip=0)
    return lambda tokens, n, seen: [seen() for _ in roe.generate(model, tokens, n, tau, max_new_tokens=STEPS)]


def write_with_transformers(folder: str, dtype: str):
    import torch
    from roe_transformers import add_roe, generate
    from transformers import OlmoeForCausalLM

    model = OlmoeForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def text(tokens, n, seen):
        add_roe(model, n, TAU, skip=0)
        streamer = SimpleNamespace(put=lambda _: seen(), end=lambda: None)
        generate(
            model, torch.tensor([tokens]), max_new_tokens=STEPS, do_sample=False, pad_token_id=0, streamer=streamer
        )

    return text


def write_with_mlx(folder: str, dtype: str):
    import mlx.core as mx
    from mlx_lm.utils import load_model
    from roe_mlx import add_roe, generate

    model, _ = load_model(Path(folder))
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())

    def text(tokens, n, seen):
        add_roe(model, n, TAU, skip=0)
        return [seen() for _ in generate(model, tokens, STEPS)]

    return text


def write_with_vllm(folder: str, dtype: str):
    os.environ["ROE_SKIP"] = "0"
    from vllm_rosters import engine, vllm  # at τ = 0.3; no messages on standard output, where answers go

    engines = {}  # of one number of rosters, for which it was made

    def text(tokens, n, seen):
        if n not in engines:
            engines.clear()
            engines[n] = engine(
                n,
                model=folder,
                dtype=dtype,
                hf_overrides={"architectures": ["OlmoeForCausalLM"]},
                enforce_eager=True,
                max_num_seqs=1,
                max_model_len=4096,
                kv_cache_memory_bytes=2**30,
            ).llm_engine
        params = vllm.SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
        engines[n].add_request("0", {"prompt_token_ids": tokens}, params)
        while engines[n].has_unfinished_requests():
            engines[n].step()
            seen()

    return text


SYSTEMS = {
    "roe.py": write_with_roe,
    "transformers": write_with_transformers,
    "mlx": write_with_mlx,
    "vllm": write_with_vllm,
}


def serve(system: str, folder: str, dtype: str) -> None:
    """The child's side: for n rosters after so many tokens, the seconds of each token that counts, and `where`."""
    text = SYSTEMS[system](folder, dtype)
    print("ready", flush=True)
    for line in sys.stdin:
        _, task = json.loads(line)
        times, tokens = [], random_tokens(OLMOE["vocab_size"], task["length"])
        text(tokens, task["n"], lambda: times.append(time.perf_counter()))
        times = times[-STEPS:]
        print(json.dumps([[b - a for a, b in zip(times, times[1:])][STEPS // 3 :], where()]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlx", metavar="PYTHON", help="an interpreter with mlx-lm, torch, safetensors and tokenizers")
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter with vLLM and this project")
    parser.add_argument("--layers", type=int, default=1, help="all of them noisy [1]")
    parser.add_argument("--dtype", default="float32", help="[float32]")
    parser.add_argument("--rosters", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="[1 8 32]")
    parser.add_argument("--history", type=int, nargs="+", default=[32, 2048], metavar="T", help="[32 2048]")
    parser.add_argument("--repeats", type=int, default=3, help="[3]")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "ports.jsonl", help="appended to")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.layers)
        children = {}
        for system in SYSTEMS:
            if python := {"mlx": args.mlx, "vllm": args.vllm}.get(system, sys.executable):
                command = [python, __file__, "--dtype", args.dtype, "--serve", system, folder]
                children[system] = Child(command)
        seconds, places = {}, {}
        for _ in range(args.repeats):
            for n in args.rosters:
                for length in args.history:
                    for system, child in children.items():
                        times, places[system] = child.ask("decode", n=n, length=length)
                        seconds.setdefault((system, length, n), []).extend(times)
        for child in children.values():
            child.close()
    for (system, length, n), times in seconds.items():
        result = {"system": system, "layers": args.layers, "dtype": args.dtype, "history": length, "rosters": n}
        result["ms"] = 1000 * statistics.median(times)
        print(f"{system:12}  n = {n:2} after {length:5} tokens  {result['ms']:8.1f} ms", flush=True)
        with open(args.output, "a") as file:
            file.write(json.dumps(result | places[system]) + "\n")


if __name__ == "__main__":
    main()
