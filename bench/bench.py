"""Measures speed and memory: of this project, of Hugging Face transformers, of llama.cpp, of naive RoE.

    python bench/bench.py                              4 layers of OLMoE-1B-7B's shapes and its head, random weights
    python bench/bench.py --layers 16 --systems roe    all 16 of them (13.8 GB)
    python bench/bench.py --layers 0                   the embedded model, as it is
    python bench/bench.py --check                      every part of fast/cpu.py against what it replaces, in a minute

Decoding: milliseconds per token for every number of rosters, after a short and a long history. Prompts: milliseconds to
the first token. Memory: the peak of a process of its own for every number of rosters. The floor is the time in which a
plain sum reads the bytes that a token needs: the experts that were really chosen, the other weights and the history.

All systems read one checkpoint, written once, and the same prompts. Each runs in a process of its own; they take turns,
one repeat each, and medians over the repeats are reported, so that a machine that slows down slows down all.
transformers runs each of its experts implementations, and the faster one counts. Above one roster it runs
bench/naive.py on a batch of n, with a history for each.

Prints the tables of bench/README.md, which bench/remake.py keeps.
"""

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from captured import capture
from naive import add_roe, average
from report import EMBEDDED, markdown, where
from safetensors.torch import save_file
from torch import nn

import roe
from cache import SharedCache
from fast.cpu import FastLinear, SortedExperts, quick_attend
from load import load
from model import Config, Expert, Experts, OLMoE, attend

OLMOE = {  # allenai/OLMoE-1B-7B
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
}
TAU = 0.3


def write(folder: Path, layers: int, shapes: dict = OLMOE) -> None:
    """A checkpoint in three files, as OLMoE-1B-7B has them; random weights of deviation 0.02, norms of 1."""
    with torch.device("meta"):
        model = OLMoE(Config(num_hidden_layers=layers, **shapes))
    block = torch.randn(2**22 + 1).mul_(0.02).bfloat16()  # over and over, which is quick
    files = defaultdict(dict)  # {file: {name: shape}}
    for name, p in model.named_parameters():
        part = 3 * int(name.split(".")[2]) // layers if name.startswith("model.layers.") else 0
        files[f"model-{part}.safetensors"][name] = p.shape
    index = {"metadata": {}, "weight_map": {name: file for file, shapes in files.items() for name in shapes}}
    for file, shapes in files.items():  # one by one, so that there is memory for all layers of the real model
        tensors = {}
        for name, shape in shapes.items():
            count = shape.numel()
            random = block.repeat(count // len(block) + 1)[:count].view(shape)
            tensors[name] = random if len(shape) > 1 else torch.ones_like(random)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = asdict(model.config) | {"model_type": "olmoe", "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((EMBEDDED / "tokenizer.json").read_bytes())


def filled_cache(model: OLMoE, history: int, room: int) -> SharedCache:
    """With a history of so many tokens, all keys and values alike, and room for more."""
    cache = SharedCache(model.config, history + room)
    cache.k, cache.v = torch.full((2, *cache.shape), 0.01, dtype=model.dtype, device=model.device)
    cache.nbytes = cache.k.nbytes + cache.v.nbytes  # so that it does not allocate its own
    cache.length = history
    return cache


def random_tokens(vocab_size: int, length: int) -> list[int]:
    """The same for every system."""
    return torch.randint(1, vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def steps(args: argparse.Namespace) -> int:
    """Decoding steps in a repeat."""
    return 8 if args.layers else 64


def timed(step: Callable, steps: int) -> list[float]:
    """Seconds of each decoding step, token -> next token, after as many that are not counted: a pause slows some."""
    token, times = 1, []
    for _ in range(2 * steps):
        start = time.perf_counter()
        token = step(token)
        times.append(time.perf_counter() - start)
    return times[steps:]


class RoE:
    """This project."""

    def __init__(self, args: argparse.Namespace):
        self.model, _ = load(args.model, args.device, args.dtype)
        self.tau, self.steps = roe.temperatures(self.model.config, TAU), steps(args)

    def step(self, tokens: list[int], cache: SharedCache, n: int) -> int:
        logits = roe.predict(self.model, tokens, cache, n, self.tau, seed=0)
        return roe.aggregate(logits).argmax().item()

    def cache(self, history: int, room: int) -> SharedCache:
        return filled_cache(self.model, history, room)

    def decode(self, n: int, length: int, captured: bool = False) -> list[float]:
        cache = self.cache(length, 2 * self.steps + 3)  # 3 more to warm up a capture
        step = capture(self.model, cache, n, self.tau) if captured else lambda token: self.step([token], cache, n)
        return timed(step, self.steps)

    def prompt(self, n: int, length: int, captured: bool = False) -> list[float]:  # a prompt never is
        tokens = random_tokens(self.model.config.vocab_size, length)
        self.step(tokens[:32], self.cache(0, 32), n)
        cache = self.cache(0, length)  # filled, which is not part of reading a prompt
        start = time.perf_counter()
        self.step(tokens, cache, n)
        return [time.perf_counter() - start]

    def cache_bytes(self, n: int, length: int) -> int:
        return self.cache(length, 0).nbytes

    def floor_bytes(self, n: int, length: int) -> float:
        """Bytes that a decoding step reads, on average."""
        touched = []  # experts
        experts = [layer.mlp.experts for layer in self.model.model.layers]
        hooks = [e.register_forward_pre_hook(lambda _, args: touched.append(args[2].unique().numel())) for e in experts]
        self.decode(n, length)
        for hook in hooks:
            hook.remove()
        config = self.model.config
        count = 3 * config.hidden_size * config.intermediate_size * sum(touched) / (2 * self.steps)
        with torch.device("meta"):
            plain = OLMoE(config)
        others = [p for name, p in plain.named_parameters() if ".experts." not in name and "embed" not in name]
        count += sum(p.numel() for p in others)
        return count * self.model.dtype.itemsize + self.cache_bytes(n, length)

    @functools.cached_property
    def numbers(self) -> torch.Tensor:
        return torch.randn(2**28, device=self.model.device)

    def bandwidth(self) -> float:
        """Bytes per second of a plain sum over a gibibyte."""
        numbers = self.numbers
        start = time.perf_counter()
        numbers.sum().item()
        return numbers.nbytes / (time.perf_counter() - start)


class Transformers:
    """Hugging Face transformers; above one roster with bench/naive.py."""

    def __init__(self, args: argparse.Namespace):
        from transformers import OlmoeForCausalLM

        folder = args.model or EMBEDDED
        self.model = OlmoeForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(args.device).eval()
        self.steps, self.generator = steps(args), torch.Generator(args.device)

    def use(self, n: int, implementation: str) -> None:
        self.model.set_experts_implementation(implementation)
        for layer in self.model.model.layers:
            layer.mlp.gate.__dict__.pop("forward", None)
        if n > 1:
            empty = torch.empty(n - 1, self.model.config.num_experts, device=self.model.device)
            add_roe(self.model, n, TAU, lambda _: -empty.exponential_(generator=self.generator).log())

    @torch.inference_mode()
    def step(self, tokens: list[int], cache, n: int) -> int:
        inputs = torch.tensor(tokens, device=self.model.device).expand(n, -1)
        logits = self.model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        return average(logits).argmax().item()

    def cache(self, n: int, history: int):
        from transformers import DynamicCache

        config, cache = self.model.config, DynamicCache()
        shape = n, config.num_key_value_heads, history, config.hidden_size // config.num_attention_heads
        for layer in range(config.num_hidden_layers if history else 0):
            cache.update(*torch.full((2, *shape), 0.01, dtype=self.model.dtype, device=self.model.device), layer)
        return cache

    def decode(self, n: int, length: int, implementation: str) -> list[float]:
        self.use(n, implementation)
        cache = self.cache(n, length)
        self.generator.manual_seed(0)
        return timed(lambda token: self.step([token], cache, n), self.steps)

    def prompt(self, n: int, length: int, implementation: str) -> list[float]:
        self.use(n, implementation)
        tokens = random_tokens(self.model.config.vocab_size, length)
        self.step(tokens[:32], self.cache(n, 0), n)
        start = time.perf_counter()
        self.step(tokens, self.cache(n, 0), n)
        return [time.perf_counter() - start]

    def cache_bytes(self, n: int, length: int) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache(n, length).layers)


class LlamaCpp:
    """llama.cpp, from the packages xllamacpp and gguf, with as many threads as torch; one roster only."""

    def __init__(self, args: argparse.Namespace):
        import xllamacpp

        model, _ = load(args.model, "cpu", args.dtype, fast=False)
        self.file = tempfile.NamedTemporaryFile(suffix=".gguf")
        write_gguf(model, self.file.name)
        params = xllamacpp.CommonParams()
        params.model.path, params.n_parallel, params.n_ctx = self.file.name, 1, model.config.max_position_embeddings
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.verbosity = -1
        self.vocab_size, self.steps = model.config.vocab_size, steps(args)
        del model
        self.server = xllamacpp.Server(params)

    def complete(self, length: int, new: int) -> dict:
        tokens = random_tokens(self.vocab_size, length)
        request = {"prompt": tokens, "max_tokens": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return self.server.handle_completions(request)["timings"]

    def decode(self, n: int, length: int) -> list[float]:
        return [self.complete(length, self.steps)["predicted_per_token_ms"] / 1000]

    def prompt(self, n: int, length: int) -> list[float]:
        return [self.complete(length, 1)["prompt_ms"] / 1000]


def write_gguf(model: OLMoE, path: str) -> None:
    """The model as llama.cpp reads it, with tokens that have no meaning."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("olmo")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 1"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.OLMOE, config.num_hidden_layers)
    weights = {name: weight for name, weight in model.named_parameters() if ".experts." not in name}
    for i, layer in enumerate(model.model.layers):
        for part in ("gate_proj", "up_proj", "down_proj"):
            stacked = torch.stack([expert.get_submodule(part).weight for expert in layer.mlp.experts])
            weights[f"model.layers.{i}.mlp.experts.{part}.weight"] = stacked
    for place, weight in weights.items():
        name = names.get_name(place, (".weight",))
        if weight.dim() == 1 or place.endswith(".gate.weight"):  # norms and routers must be float32
            writer.add_tensor(name, weight.float().numpy())
        else:
            data = weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SYSTEMS = {"roe": RoE, "transformers": Transformers, "llama.cpp": LlamaCpp}
VARIANTS = {
    "llama.cpp": [{}],
    "roe": [{"captured": False}] + [{"captured": True}] * torch.cuda.is_available(),
    "transformers": [{"implementation": "grouped_mm"}, {"implementation": "eager"}],
}
LABELS = {"roe": "this project", "transformers": "transformers; naive RoE from 2 on", "llama.cpp": "llama.cpp"}


class Child:
    """A system in a process of its own; `ask` calls one of its methods."""

    def __init__(self, command: list[str], **options):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
        self.ready = self.process.stdout.readline().strip()
        if not self.ready:
            sys.exit(f"{' '.join(command)} ended; above it says why")

    def ask(self, method: str, **arguments):
        print(json.dumps([method, arguments]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def turns(steps: dict[Hashable, Callable[[], list[float]]], repeats: int) -> dict[Hashable, float]:
    """Medians of the seconds that each returns; all take turns, so that a machine that slows down slows down all."""
    seconds = defaultdict(list)
    for _ in range(repeats):
        for key, step in steps.items():
            seconds[key] += step()
    return {key: statistics.median(values) for key, values in seconds.items()}


def serve(args: argparse.Namespace) -> None:
    """The child's side."""
    system = SYSTEMS[args.serve](args)
    print("ready", flush=True)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        if method == "peak":
            import resource  # here, because Windows has none

            peak = torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else None
            answer = peak or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        else:
            answer = getattr(system, method)(**arguments)
        print(json.dumps(answer), flush=True)


@torch.inference_mode()
def check_parts() -> None:
    """Prints how many times as fast each part of fast/cpu.py is as what it replaces, and names what does not pay."""
    config = Config(num_hidden_layers=1, **OLMOE)
    random = lambda *shape: torch.randn(shape).bfloat16()
    rows = lambda n: random(n, config.hidden_size)
    each = lambda modules, x: [module(x) for module in modules]  # of more memory than caches hold
    parts = []  # name, what it replaces, the part
    for dtype in (torch.bfloat16, torch.float32):
        shape = config.hidden_size, config.intermediate_size
        plain = [nn.Linear(*shape, bias=False, dtype=dtype) for _ in range(64)]
        fast = [FastLinear(linear.weight.clone()) for linear in plain]
        how = "packed" if fast[0].weight.is_mkldnn else "wide" if fast[0].wide else None
        for n in (1, 8, 32) if how else ():
            x, name = rows(n).to(dtype), f"FastLinear, {how}, {n} rows, {dtype}"
            parts.append((name, lambda x=x, l=plain: each(l, x), lambda x=x, l=fast: each(l, x)))
    with torch.device("meta"):
        experts = Experts(Expert(config) for _ in range(config.num_experts))
    experts = experts.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    for p in experts.parameters():
        p.normal_(std=0.02)
    ordered = SortedExperts(Experts(experts))  # which empties the list that it is given
    for expert in experts:  # else it would be seen what packing brings
        for name, linear in list(expert.named_children()):
            setattr(expert, name, FastLinear(linear.weight))
    for n in (1, 8, 256, 512):
        weights, indices = torch.rand(n, 1, config.num_experts).topk(config.num_experts_per_tok)
        args = rows(n)[:, None], weights.bfloat16(), indices
        parts.append((f"SortedExperts, {n} rows", lambda args=args: experts(*args), lambda args=args: ordered(*args)))
    H, D = config.num_attention_heads, config.head_dim
    cases = [(n, 1, S) for S in (32, 2048) for n in (1, 8, 32)] + [(1, 128, 2048), (1, 2048, 2048)]
    for n, T, S in cases:
        # Of more memory than caches hold; and with room for more, since keys that fill it are read faster.
        shared = [random(1, H, S + 100, D)[:, :, :S] for _ in range(16 if T == 1 else 2)]
        own, pairs = random(n, H, T, int(n > 1), D), list(zip(shared[::2], shared[1::2]))
        q = random(n, H, T, D)
        step = lambda attend, q=q, own=own, pairs=pairs: [attend(q, k, v, own, own) for k, v in pairs]
        what = f"{n} rows after {S} tokens" if T == 1 else f"a prompt of {T}" if T == S else f"the last {T} of {S}"
        parts.append((f"quick_attend, {what}", lambda s=step: s(attend), lambda s=step: s(quick_attend)))
    print(f"torch {torch.__version__}: times as fast as what it replaces")
    for name, *forms in parts:
        times, begin = {form: [] for form in forms}, time.perf_counter()
        for repeat in range(16):
            if repeat > 2 and time.perf_counter() - begin > 4:  # seconds
                break
            for form in forms:
                start = time.perf_counter()
                form()
                times[form].append(time.perf_counter() - start)
        slow, fast = (statistics.median(values[2:]) for values in times.values())
        print(f"{slow / fast:5.2f}  {name}{'' if slow / fast >= 1.05 else '  <- does not pay here'}", flush=True)


def measure(args: argparse.Namespace) -> dict:
    """Lines for every system, method, number of rosters and number of tokens, and the versions of what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--device", args.device, "--dtype", args.dtype]
        command += ["--layers", str(args.layers)]
        if args.layers:
            command += ["--model", folder]
            subprocess.run([*command, "--serve", "write"], check=True)
        children = {system: Child([*command, "--serve", system]) for system in args.systems}
        tasks = [{"method": "decode", "n": n, "length": length} for length in args.history for n in args.rosters]
        tasks += [{"method": "prompt", "n": 1, "length": length} for length in args.prompts]
        steps = {}
        for number, task in enumerate(tasks):
            steps["bandwidth", number, 0] = lambda: [children["roe"].ask("bandwidth")]
            for system, child in children.items():
                if task["n"] == 1 or system != "llama.cpp":
                    for i, keywords in enumerate(VARIANTS[system]):
                        ask = functools.partial(child.ask, **task, **keywords)
                        steps[system, number, i] = ask
        medians = turns(steps, args.repeats)
        bandwidth = statistics.median(medians["bandwidth", number, 0] for number in range(len(tasks)))

        found = []
        for system, number in dict.fromkeys((system, number) for system, number, _ in medians if system in children):
            task = tasks[number]
            which = {"n": task["n"], "length": task["length"]}
            fastest = min(range(len(VARIANTS[system])), key=lambda i: medians[system, number, i])
            line = {"system": system} | task | VARIANTS[system][fastest]
            line["ms"] = 1000 * medians[system, number, fastest]
            if task["method"] == "decode" and system != "llama.cpp":
                line["cache_bytes"] = children[system].ask("cache_bytes", **which)
            if task["method"] == "decode" and system == "roe":
                line["floor_ms"] = 1000 * children[system].ask("floor_bytes", **which) / bandwidth
            found.append(line)
        for child in children.values():
            child.close()

        for system, n in itertools.product(args.systems, args.rosters):
            if system != "llama.cpp":
                child = Child([*command, "--serve", system])
                task = {"n": n, "length": args.history[-1]}
                child.ask("decode", **task, **VARIANTS[system][0])
                found.append({"system": system, "method": "peak"} | task | {"bytes": child.ask("peak")})
                child.close()
    packages = {"transformers": "transformers", "llama.cpp": "xllamacpp"}
    versions = {system: f"{x} {metadata.version(x)}" for system, x in packages.items() if system in args.systems}
    return {"found": found, "versions": versions}


def number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def decode_table(found: list[dict]) -> str:
    """Milliseconds per token; bytes of the cache and peak memory of the process after the longer history."""
    found = {(x["method"], x["length"], x["system"], x["n"]): x for x in found}
    counts = sorted({n for method, _, _, n in found if method == "decode"})
    lengths = sorted({length for method, length, _, _ in found if method == "decode"})
    rows = []

    def add(label, method, length, system, value):
        lines = [found.get((method, length, system, n)) for n in counts]
        if any(lines):
            rows.append([label, *("" if line is None else number(value(line)) for line in lines)])

    for length in lengths:
        after = f"after {length:,} tokens"
        for system, label in LABELS.items():
            add(f"{label}, {after}", "decode", length, system, lambda line: line["ms"])
        add(f"floor, {after}", "decode", length, "roe", lambda line: line["floor_ms"])
    for system in ("roe", "transformers"):
        add(f"cache, MB: {LABELS[system]}", "decode", lengths[-1], system, lambda line: line["cache_bytes"] / 1e6)
        add(f"peak memory, GB: {LABELS[system]}", "peak", lengths[-1], system, lambda line: line["bytes"] / 1e9)
    return markdown(["rosters", *counts], rows)


def prompts_table(found: list[dict]) -> str:
    """Milliseconds from a prompt to the first token, one roster."""
    found = {(x["system"], x["length"]): x["ms"] for x in found if x["method"] == "prompt"}
    systems, lengths = (list(dict.fromkeys(values)) for values in zip(*found))
    label = lambda system: LABELS[system].split(";")[0]
    rows = [[label(system), *(number(found[system, length]) for length in lengths)] for system in systems]
    return markdown(["prompt of", *(f"{length:,} tokens" for length in lengths)], rows)


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    """Of a command line, by default this program's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=4, help="of OLMoE-1B-7B's shapes; 0: the embedded model [4]")
    add("--systems", nargs="+", choices=SYSTEMS, default=["roe", "transformers"], help="roe among them [%(default)s]")
    add("--rosters", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    add("--history", type=int, nargs="+", help="[32 2048; embedded model: 32 256]")
    add("--prompts", type=int, nargs="+", help="lengths [32 512 2048; embedded model: 32 256 480]")
    add("--repeats", type=int, default=5, help="[5]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="bfloat16", help="[bfloat16]")
    add("--check", action="store_true", help="only compare every part of fast/cpu.py with what it replaces")
    add("--serve", choices=[*SYSTEMS, "write"], help=argparse.SUPPRESS)
    add("--model", help=argparse.SUPPRESS)
    args = parser.parse_args(line)
    args.history = args.history or ([32, 2048] if args.layers else [32, 256])
    args.prompts = args.prompts or ([32, 512, 2048] if args.layers else [32, 256, 480])
    return args


def main() -> None:
    args = arguments()
    if args.check:
        return check_parts()
    if args.serve == "write":
        return write(Path(args.model), args.layers)
    if args.serve:
        return serve(args)
    found = measure(args)["found"]
    print(decode_table(found), prompts_table(found), where(torch.device(args.device)), sep="\n\n")


if __name__ == "__main__":
    main()
