"""What do the ports cost? Lists of cells for `report.measure`, which bench/remake.py runs.

Every port beside roe.py: one checkpoint of OLMoE-1B-7B's shapes, random, one layer, which is noisy, and one prompt. And
vLLM with several requests at once. Each system runs in a process of its own and writes greedily with its own
`generate`, vLLM by its engine; they take turns, and the median of the times between two tokens counts.
"""

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from report import EMBEDDED, ROOT

from bench import OLMOE, TAU, Child, random_tokens, turns, write

PORTS = ROOT / "ports"
STEPS = 16  # tokens to be written, of which the first third does not count
SMALL = {  # 86 million parameters with 8 layers, which take longer texts than the embedded model's
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
}

# ---- The child's side: functions that write for prompts with n rosters, and call `seen` at every token ---------------


def write_with_roe(folder: str, dtype: str) -> Callable:
    import roe
    from load import load

    model, _ = load(folder, "cpu", dtype)
    tau = roe.temperatures(model.config, TAU, skip=0)

    def text(prompts, n, seen):
        for _ in roe.generate(model, prompts[0], n, tau, max_new_tokens=STEPS):
            seen()

    return text


def write_with_transformers(folder: str, dtype: str) -> Callable:
    import torch
    from roe_transformers import add_roe, generate
    from transformers import OlmoeForCausalLM

    model = OlmoeForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    streamer = SimpleNamespace(end=lambda: None)

    def text(prompts, n, seen):
        add_roe(model, n, TAU, skip=0)
        streamer.put = lambda _: seen()
        options = {"do_sample": False, "pad_token_id": 0, "streamer": streamer}
        generate(model, torch.tensor(prompts), max_new_tokens=STEPS, **options)

    return text


def write_with_mlx(folder: str, dtype: str) -> Callable:
    import mlx.core as mx
    from mlx_lm.utils import load_model
    from roe_mlx import add_roe, generate

    model, _ = load_model(Path(folder))
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())

    def text(prompts, n, seen):
        add_roe(model, n, TAU, skip=0)
        for _ in generate(model, prompts[0], STEPS):
            seen()

    return text


def write_with_vllm(folder: str, dtype: str) -> Callable:
    """Of several requests only the steps that write a token for each of them are seen."""
    import gc

    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    layers = json.loads(Path(folder, "config.json").read_text())["num_hidden_layers"]
    os.environ["ROE_SKIP"] = str(int(layers > 1))
    params = vllm.SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
    engines = {}  # of one number of rosters, for which it was made

    def start(n: int):
        engines.clear()
        gc.collect()
        cleanup_dist_env_and_memory()
        os.environ["ROE_ROSTERS"] = str(n)
        engines[n] = vllm.LLM(
            folder,
            dtype=dtype,
            hf_overrides={"architectures": ["OlmoeForCausalLM"]},
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            enforce_eager=True,
            max_num_seqs=32,
            kv_cache_memory_bytes=2**30,
        ).llm_engine

    def text(prompts, n, seen):
        if n not in engines:
            start(n)
        for i, tokens in enumerate(prompts):
            engines[n].add_request(str(i), {"prompt_token_ids": tokens}, params)
        while engines[n].has_unfinished_requests():
            if len(engines[n].step()) == len(prompts):
                seen()

    return text


SYSTEMS = {
    "roe.py": (write_with_roe, "torch"),
    "transformers": (write_with_transformers, "transformers", "torch"),
    "mlx": (write_with_mlx, "mlx.core"),
    "vllm": (write_with_vllm, "vllm", "torch"),
}


def serve(system: str, folder: str, dtype: str) -> None:
    """Answers with the seconds of each step that counts."""
    write, *modules = SYSTEMS[system]
    write = write(folder, dtype)
    versions = (f"{name} {importlib.import_module(name).__version__}" for name in modules)
    vocab_size = json.loads(Path(folder, "config.json").read_text())["vocab_size"]
    print(", ".join(versions), flush=True)
    for line in sys.stdin:
        _, task = json.loads(line)
        times, tokens = [], random_tokens(vocab_size, task["requests"] * task["length"])
        prompts = [tokens[i :: task["requests"]] for i in range(task["requests"])]
        write(prompts, task["n"], lambda: times.append(time.perf_counter()))
        seconds = [b - a for a, b in zip(times, times[1:])][-STEPS + 1 :]
        print(json.dumps(seconds[len(seconds) // 3 :]), flush=True)


# ---- What is measured ------------------------------------------------------------------------------------------------


def start(python: str, folder: str, *args: str) -> Child:
    """A process in which vLLM finds this version of the port, and no other, as if it were installed."""
    info = Path(folder, "roe_measured-0.dist-info")
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: roe-measured\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nroe_measured = roe_vllm:register\n")
    more = {
        "PYTHONPATH": os.pathsep.join((folder, str(PORTS))),
        "VLLM_PLUGINS": "roe_measured",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, which starts sooner
        "VLLM_LOGGING_LEVEL": "ERROR",  # nothing on standard output, where answers go
        "ROE_ROSTERS": "1",
        "ROE_TAU": str(TAU),
    }
    return Child([python, __file__, *args], env=os.environ | more)


def compare(pythons: dict[str, str], model: tuple[int, dict] | None, dtype: str, tasks: list[dict], repeats: int):
    """Milliseconds of a step of each system, for every task; a random model, or the embedded one."""
    with tempfile.TemporaryDirectory() as folder:
        if model:
            write(Path(folder), *model)
        path = folder if model else str(EMBEDDED)
        children = {system: start(python, folder, system, path, dtype) for system, python in pythons.items()}
        steps = {}
        for i, task in enumerate(tasks):
            for system, child in children.items():
                steps[i, system] = partial(child.ask, "decode", **task)
        found = []
        for (i, system), seconds in turns(steps, repeats).items():
            found.append({"system": system} | tasks[i] | {"ms": 1000 * seconds})
        for child in children.values():
            child.close()
    return {"found": found, "versions": {system: child.ready for system, child in children.items()}}


def tasks(counts: tuple, lengths: tuple, requests: tuple = (1,)) -> list[dict]:
    """Those with the same n follow each other, because vLLM starts a new engine for each n."""
    return [{"n": n, "length": length, "requests": r} for n in counts for length in lengths for r in requests]


def beside(system: str, python: str, dtypes: tuple[str, ...], repeats: int = 3) -> list[tuple[dict, Callable]]:
    """A port beside roe.py."""
    pythons, each = {"roe.py": sys.executable, system: python}, tasks((1, 8, 32), (32, 2048))
    run = lambda dtype: compare(pythons, (1, OLMOE), dtype, each, repeats)
    return [({"system": system, "dtype": dtype}, partial(run, dtype)) for dtype in dtypes]


def requests(python: str) -> list[tuple[dict, Callable]]:
    """Several requests in vLLM."""
    run = lambda model, *each: compare({"vllm": python}, model, "bfloat16", tasks(*each), 3)
    return [
        ({"model": "embedded"}, lambda: run(None, (1, 4, 8), (32,), (1, 8, 32))),
        ({"model": "small"}, lambda: run((8, SMALL), (1, 8), (32, 1500), (1, 8))),
    ]


if __name__ == "__main__":
    serve(*sys.argv[1:])
