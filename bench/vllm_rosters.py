"""Measures what rosters cost in vLLM (ports/roe_vllm.py), where every roster is a pass of the whole batch.

    python bench/vllm_rosters.py               the embedded model
    python bench/vllm_rosters.py --layers 4    random layers of OLMoE-1B-7B's shapes in bfloat16 (3.8 GB for 4)

For each number of rosters one engine, and for each number of concurrent requests the time of a decoding step: that of
1 + STEPS tokens for all of them less that of one token, over STEPS. Prompts have 32 random tokens. Prints the results,
and appends them to bench/results/vllm.jsonl. To be run where vLLM is and finds the plugin
(`pip install -e .`).
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from effect import ROOT, where
from loading import write

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, which starts sooner
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ.update({"ROE_ROSTERS": "1", "ROE_TAU": "0.3"})
import vllm
from vllm.distributed import cleanup_dist_env_and_memory

STEPS = 16


def seconds(llm: vllm.LLM, requests: int, tokens: int) -> float:
    """Time to write so many tokens for each of so many prompts, in one batch."""
    prompts = [{"prompt_token_ids": torch.randint(3, 4000, (32,)).tolist()} for _ in range(requests)]
    params = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=0, help="random layers; 0: the embedded model [0]")
    parser.add_argument("--rosters", type=int, nargs="+", default=[1, 4, 8], metavar="N", help="[1 4 8]")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], metavar="R", help="[1 8 32]")
    parser.add_argument("--repeats", type=int, default=3, help="[3]")
    parser.add_argument("--compile", action="store_true", help="as vLLM compiles by default, instead of eagerly")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "vllm.jsonl", help="appended to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = dict(model=str(ROOT / "tiny"))
        if args.layers:
            write(Path(folder), args.layers)
            options = dict(model=folder, hf_overrides={"architectures": ["OlmoeForCausalLM"]})
        for n in args.rosters:
            os.environ["ROE_ROSTERS"] = str(n)
            llm = vllm.LLM(
                **options,
                dtype="bfloat16",
                skip_tokenizer_init=True,
                enforce_eager=not args.compile,
                enable_prefix_caching=False,
                max_num_seqs=max(args.requests),
                max_model_len=256,
                gpu_memory_utilization=0.3,
            )
            for requests in args.requests:
                seconds(llm, requests, 2)
                pairs = [(seconds(llm, requests, 1 + STEPS), seconds(llm, requests, 1)) for _ in range(args.repeats)]
                ms = statistics.median(1000 * (more - one) / STEPS for more, one in pairs)
                result = dict(layers=args.layers, compiled=args.compile, n=n, requests=requests, ms_per_step=ms)
                result |= dict(
                    first_ms=1000 * statistics.median(one for _, one in pairs), tokens_per_s=1000 * requests / ms
                )
                print(
                    "n = {n:2}  requests {requests:3}  {ms_per_step:8.1f} ms/step  {tokens_per_s:8.1f} tokens/s".format(
                        **result
                    )
                )
                with args.output.open("a") as file:
                    file.write(json.dumps(result | where() | {"vllm": vllm.__version__}) + "\n")
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
