"""Measures what rosters cost in vLLM (ports/roe_vllm.py).

    python bench/vllm_rosters.py                  the embedded model
    python bench/vllm_rosters.py --layers 4       random layers of OLMoE-1B-7B's shapes in bfloat16 (3.8 GB for 4)
    python bench/vllm_rosters.py --small          random layers of 86 million parameters, which take longer texts
    python bench/vllm_rosters.py --beside FILE    also with another version of the port, the two taking turns

For each number of rosters an engine in a process of its own, and for each number of concurrent requests the median time
of a decoding step and the time of the first one, which reads all prompts, of --tokens random tokens each. Prints the
results, and appends them to bench/results/vllm.jsonl. To be run where vLLM is, which finds the plugin if installed or
not.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from report import ROOT, where

from bench import write

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, which starts sooner
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ.update({"ROE_ROSTERS": "1", "ROE_TAU": "0.3"})
import vllm
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.plugins import load_general_plugins

STEPS = 16
SMALL = dict(  # of OLMoE's architecture
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=384,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    num_experts=16,
    num_experts_per_tok=4,
    max_position_embeddings=4096,
)


def engine(n: int, **options) -> vllm.LLM:
    """With n rosters and without a prefix cache; an earlier one must be forgotten by then, and its memory is freed."""
    load_general_plugins()
    if "roe" not in vllm.ModelRegistry.models["OlmoeForCausalLM"].module_name:
        sys.exit("vLLM does not find the plugin; install this project beside it (pip install -e .)")
    gc.collect()
    cleanup_dist_env_and_memory()
    os.environ["ROE_ROSTERS"] = str(n)
    return vllm.LLM(**options, skip_tokenizer_init=True, enable_prefix_caching=False)


def write_small(folder: str) -> None:
    """A checkpoint with random weights of the shapes SMALL."""
    from transformers import AutoModelForCausalLM, OlmoeConfig

    AutoModelForCausalLM.from_config(OlmoeConfig(**SMALL)).bfloat16().save_pretrained(folder)


def steps(llm: vllm.LLM, requests: int, tokens: int) -> list[float]:
    """Milliseconds of every step that writes STEPS tokens for each of so many prompts; the first one reads them."""
    engine, times = llm.llm_engine, []
    params = vllm.SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
    for i in range(requests):
        engine.add_request(str(i), {"prompt_token_ids": torch.randint(3, 4000, (tokens,)).tolist()}, params)
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step()
        times.append(1000 * (time.perf_counter() - start))
    assert len(times) == STEPS
    return times


def serve(options: dict, n: int, counts: list[int], tokens: int) -> None:
    """Prints the times of some steps for each of these numbers of requests, in this process."""
    many = dict(max_num_seqs=max(counts), max_num_batched_tokens=max(2048, max(counts) * tokens))
    llm, runs = engine(n, **options, **many, max_model_len=tokens + 224), []
    for requests in counts:
        steps(llm, requests, tokens)
        runs.append([steps(llm, requests, tokens) for _ in range(2)])
    print(json.dumps(runs))


def plugin(folder: Path, port: Path) -> dict:
    """The environment of a process in which vLLM finds this version of the port, and no other."""
    info = folder / "roe_measured-0.dist-info"
    info.mkdir(parents=True)
    (folder / "roe_measured.py").write_text(port.read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: roe-measured\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nroe_measured = roe_measured:register\n")
    return os.environ | {"PYTHONPATH": str(folder), "VLLM_PLUGINS": "roe_measured"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=0, help="random layers; 0: the embedded model [0]")
    parser.add_argument("--small", action="store_true", help="a random model of 86 million parameters")
    parser.add_argument("--tokens", type=int, default=32, help="in a prompt [32]")
    parser.add_argument("--rosters", type=int, nargs="+", default=[1, 4, 8], metavar="N", help="[1 4 8]")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], metavar="R", help="[1 8 32]")
    parser.add_argument("--repeats", type=int, default=2, help="turns [2]")
    parser.add_argument("--compile", action="store_true", help="as vLLM compiles by default, instead of eagerly")
    parser.add_argument("--beside", type=Path, metavar="FILE", help="another version of ports/roe_vllm.py")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "vllm.jsonl", help="appended to")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve)
    with tempfile.TemporaryDirectory() as folder:
        options = dict(model=str(ROOT / "tiny"))
        if args.layers:
            write(Path(folder), args.layers)
            options = dict(model=folder, hf_overrides={"architectures": ["OlmoeForCausalLM"]})
        if args.small:
            write_small(folder)
            options, args.layers = dict(model=folder), SMALL["num_hidden_layers"]
        options |= dict(dtype="bfloat16", enforce_eager=not args.compile, gpu_memory_utilization=0.3)
        ports = {"beside": args.beside} if args.beside else {}
        ports["ours"] = ROOT / "ports" / "roe_vllm.py"
        environments = {name: plugin(Path(folder, name), port) for name, port in ports.items()}
        found = {(name, n, requests): [] for n in args.rosters for requests in args.requests for name in ports}
        for _ in range(args.repeats):
            for n in args.rosters:
                for name, environment in environments.items():
                    run = json.dumps([options, n, args.requests, args.tokens])
                    command = [sys.executable, __file__, "--serve", run]
                    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
                    for requests, runs in zip(args.requests, json.loads(out.splitlines()[-1])):
                        found[name, n, requests] += runs
    for (name, n, requests), times in found.items():
        ms = statistics.median(ms for run in times for ms in run[1:])
        result = dict(layers=args.layers, compiled=args.compile, n=n, requests=requests, tokens=args.tokens)
        result["ms_per_step"] = ms
        result["first_ms"] = statistics.median(run[0] for run in times)
        result["tokens_per_s"] = 1000 * requests / ms
        if name == "beside":  # written before ours, and no line that tables.py would take for it
            result["beside"] = args.beside.name
        text = "{n:2} rosters  {requests:3} requests after {tokens:4} tokens  {ms_per_step:8.1f} ms/step"
        print(f"{name:6}  {text.format(**result)}  {result['tokens_per_s']:8.1f} tokens/s")
        with args.output.open("a") as file:
            file.write(json.dumps(result | where() | {"vllm": vllm.__version__}) + "\n")


if __name__ == "__main__":
    main()
