"""Tests of ports/roe_vllm.py against plain vLLM, roe.py and transformers.

An engine starts slowly, so that a few processes run all that the tests look at: this file as a program, which makes one
engine after the other (`run_engines`), and one server.
"""

import gc
import importlib.util
import inspect
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vllm is not installed")

# Architectures that the tests run, as small random models of transformers, and those of which they see the refusal.
FAMILIES = ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "glm4_moe", "ernie4_5_moe", "gpt_oss"]
REFUSED = {
    "llama": "has no router that RoE in vLLM knows",
    "jamba": "a recurrent state",
    "deepseek_v3": "the cache of MLAAttention layers",
}

E = 10  # experts of the random models; no other dimension of theirs has this size
SIZES = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=256,
    num_experts_per_tok=3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MORE = {  # what a family's configuration needs beside SIZES
    "mixtral": dict(num_local_experts=E),
    "qwen2_moe": dict(num_experts=E, shared_expert_intermediate_size=96),
    "qwen3_moe": dict(num_experts=E, norm_topk_prob=True),
    "granitemoe": dict(num_local_experts=E),
    "glm4_moe": dict(n_routed_experts=E, first_k_dense_replace=1, n_group=1, topk_group=1),
    "ernie4_5_moe": dict(moe_num_experts=E, moe_k=3, moe_num_shared_experts=1, moe_layer_start_index=1),
    "gpt_oss": dict(num_local_experts=E, sliding_window=16),
    "deepseek_v3": dict(n_routed_experts=E, first_k_dense_replace=1, n_group=1, topk_group=1),
}
RANGES = "ROE_TAU a number from 0 to 100 or a list of 6"
WRONG = {  # settings, and what is said of them
    "two temperatures": ({"ROE_TAU": "[0.1, 0.2]"}, RANGES),
    "a negative temperature": ({"ROE_TAU": "-1"}, RANGES),
    "no number": ({"ROE_TAU": "warm"}, RANGES),
    "no rosters": ({"ROE_ROSTERS": "0"}, RANGES),
    "half a layer": ({"ROE_SKIP": "0.5"}, RANGES),
    "no layer with noise": ({"ROE_SKIP": "3"}, "ROE_SKIP=3 leaves none of 6 mixture layers with noise"),
    "an unknown name": ({"ROE_TEMPERATURE": "0.3"}, "not ROE_TEMPERATURE"),
    "other weights": ({"ROE_WEIGHTS": "clean"}, "unset ROE_WEIGHTS"),
}
TINY = str(HERE.parent / "tiny")
STEPS, N, TAU, SEED = 48, 8, 0.6, 2**40 + 1
OTHER = [0.9, 0, 0.3, 1, 0, 0.6]
SETTINGS = {  # variables, and what they mean to roe.py; a tau.json lies beside the model if the name says so
    "rosters": ({"ROE_ROSTERS": "3"}, {"n": 3, "tau": [0, 0.2, 0.2, 0.2, 0.2, 0], "seed": 0}),
    "tau.json and seed": ({"ROE_ROSTERS": "8", "ROE_SEED": "3"}, {"tau": None, "seed": 3}),
    "tau": ({"ROE_ROSTERS": "8", "ROE_TAU": "0.9"}, {"tau": [0, 0.9, 0.9, 0.9, 0.9, 0], "seed": 0}),
    "tau of a list": ({"ROE_ROSTERS": "8", "ROE_TAU": json.dumps(OTHER)}, {"tau": OTHER, "seed": 0}),
    "skip": ({"ROE_ROSTERS": "8", "ROE_TAU": "0.9", "ROE_SKIP": "2"}, {"tau": [0, 0, 0.9, 0.9, 0, 0], "seed": 0}),
    "no skip": ({"ROE_ROSTERS": "8", "ROE_TAU": "0.9", "ROE_SKIP": "0"}, {"tau": [0.9] * 6, "seed": 0}),
}
NOISY = {"ROE_ROSTERS": str(N), "ROE_TAU": str(TAU), "ROE_SEED": str(SEED)}
PENALTY = 1.5
PENALISED = dict(engine=dict(enforce_eager=True, logprobs_mode="raw_logits"), params=dict(repetition_penalty=PENALTY))


# ---- What runs in processes of its own ------------------------------------------------------------------------------


def run_engines(jobs: list[dict]) -> list[dict]:
    """Runs every job in an engine of its own; returns its texts, their log-probabilities, and the rosters' logits."""
    import roe_vllm
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    average, results = roe_vllm.average, []
    given = {name: value for name, value in os.environ.items() if name.startswith("ROE_")}
    for job in jobs:
        for name in [name for name in os.environ if name.startswith("ROE_")]:
            del os.environ[name]
        os.environ.update(given | job.get("env", {}))
        rows, texts, error, seconds = [], [], "", time.time()
        roe_vllm.average = lambda logits: rows.append(logits.clone()) or average(logits)
        try:
            # Little memory is asked for: in this process vLLM takes what it can get on CPUs for its own.
            small = dict(dtype="float32", max_num_seqs=8, gpu_memory_utilization=0.1, skip_tokenizer_init=True)
            llm = LLM(job["model"], **small, **job.get("engine", {"enforce_eager": True}))
            options = dict(temperature=0, max_tokens=STEPS, ignore_eos=True, detokenize=False, logprobs=5)
            params = SamplingParams(**options, **job.get("params", {}))
            for prompts in job["calls"]:
                outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
                for output in outputs:
                    top = [
                        {token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs
                    ]
                    texts.append(
                        dict(tokens=list(output.outputs[0].token_ids), cached=output.num_cached_tokens, top=top)
                    )
        except Exception as exception:
            error = f"{type(exception).__name__}: {exception}"
        llm = outputs = None
        gc.collect()
        cleanup_dist_env_and_memory()
        print(job["model"], time.time() - seconds, error, flush=True)
        results.append(dict(texts=texts, error=error, rows=rows))
    return results


if __name__ == "__main__":
    torch.save(run_engines(json.loads(Path(sys.argv[1]).read_text())), sys.argv[2])


def environment(folder: Path, **more: str) -> dict:
    """The environment of a process in which vLLM finds the plugin, as if it were installed."""
    info = folder / "plugin" / "roe_under_test-0.dist-info"
    if not info.exists():
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: roe-under-test\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[vllm.general_plugins]\nroe_under_test = roe_vllm:register\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ROE_")}
    path = f"{folder / 'plugin'}{os.pathsep}{HERE}"
    home = dict(
        VLLM_CACHE_ROOT=str(folder / "cache"),
        VLLM_PLUGINS="roe_under_test",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    return clean | home | dict(PYTHONPATH=path, VLLM_CPU_KVCACHE_SPACE="1") | more


def start(folder: Path, jobs: list[dict], **env: str) -> list[dict]:
    """`run_engines` in a new process."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, __file__, str(folder / "jobs.json"), str(folder / "results.pt")]
    with open(folder / "log.txt", "a") as log:
        env = environment(folder, VLLM_ENABLE_V1_MULTIPROCESSING="0", **env)
        code = subprocess.call(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    assert code == 0, (folder / "log.txt").read_text()[-3000:]
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def prompts():
    """Token ids of six prompts of different lengths."""
    from tokenizers import Tokenizer

    text = Path(TINY, "heldout.txt").read_text()
    tokens = Tokenizer.from_file(f"{TINY}/tokenizer.json").encode(text).ids
    return [tokens[i * 500 : i * 500 + length] for i, length in enumerate([7, 150, 1, 33, 64, 20])]


@pytest.fixture(scope="session")
def random_models(folder):
    """Saves the random models; returns those of transformers by name."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    models = {}
    for name in [*FAMILIES[1:], *REFUSED]:
        torch.manual_seed(0)
        config = CONFIG_MAPPING[name](**SIZES | MORE.get(name, {}))
        model = AutoModelForCausalLM.from_config(config).float().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data *= 3  # from near-uniform predictions to some that rosters change
        model.save_pretrained(folder / name)
        models[name] = model
    return models


@pytest.fixture(scope="session")
def plain(folder, prompts):
    """Without ROE_ROSTERS: eager, compiled, and with a penalty."""
    compiled = {"enforce_eager": False}
    tiny = dict(model=TINY, calls=[prompts])
    return start(folder, [tiny, tiny | dict(engine=compiled), tiny | PENALISED], ROE_TAU=str(TAU))


@pytest.fixture(scope="session")
def engines(folder, prompts, random_models, plain, expected):
    """What the engines with rosters say, by name. Those that are to be plain vLLM are compared under a penalty."""
    tiny = dict(model=TINY, calls=[prompts], env=NOISY)
    long = dict(model=TINY, calls=[[prompts[1]]], env=NOISY)
    chunks = dict(enforce_eager=True, max_num_batched_tokens=32, block_size=32)
    jobs = {
        "one": tiny | PENALISED | dict(env={"ROE_ROSTERS": "1"}),
        "cold": tiny | PENALISED | dict(env={"ROE_ROSTERS": "4", "ROE_TAU": "0"}),
        "penalised": long | PENALISED,
        "alone": long,
        "batch": tiny,
        "chunks": tiny | dict(engine=chunks, calls=[[prompts[1]], prompts]),
        "cut": dict(model=TINY, env=NOISY, calls=[[prompts[1] + expected[1][0][:k] for k in (1, 20)]]),
    }
    for name in FAMILIES[1:]:
        jobs[name] = dict(model=str(folder / name), calls=[[list(range(3, 27))]], env=NOISY)
    bare = folder / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(Path(TINY, name))
    for name, (env, _) in SETTINGS.items():
        model = TINY if "tau.json" in name else str(bare)
        jobs[name] = dict(model=model, calls=[[prompts[3]]], env=env)
    jobs["scoring"] = tiny | dict(params={"prompt_logprobs": 1})
    for name, (wrong, _) in WRONG.items():
        jobs[name] = tiny | dict(env={**NOISY, **wrong}, calls=[])
    for name in REFUSED:
        jobs[name] = dict(model=str(folder / name), calls=[], env=NOISY)
    return dict(zip(jobs, start(folder, list(jobs.values()), ROE_ROSTERS="1")))


# ---- Independent runs -----------------------------------------------------------------------------------------------


def by_roe(prompt: list[int], tau=TAU, seed: int = SEED, n: int = N) -> tuple[list[int], torch.Tensor]:
    """What roe.py writes after this prompt alone, and every roster's logits [steps, n, V]."""
    import roe
    from load import load

    rows, (model, _) = [], load(None, device="cpu", dtype="float32")
    model.config.eos_token_id = ()
    watch = lambda logits, *_: rows.append(logits[:, 0])
    tokens = list(roe.generate(model, prompt, n, tau, max_new_tokens=STEPS, seed=seed, watch=watch))
    return tokens, torch.stack(rows)


class Noise(TorchFunctionMode):
    """Adds noise [layers, n, E] to what the routers' weights give for the last position of the rows."""

    def __init__(self, weights: list[torch.Tensor], noise: torch.Tensor):
        super().__init__()
        self.noise = {weight.data_ptr(): values for weight, values in zip(weights, noise)}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is F.linear and args[1].data_ptr() in self.noise:
            out.view(N, -1, E)[:, -1] += self.noise[args[1].data_ptr()]
        return out


@torch.inference_mode()
def by_transformers(model, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """As `by_roe`, from a model of transformers that reads the whole sequence anew for every token."""
    from roe import gumbel

    named = model.named_parameters()
    weights = [p for name, p in named if name.endswith(".weight") and p.shape == (E, model.config.hidden_size)]
    tokens, rows = list(prompt), []
    for _ in range(STEPS):
        noise = TAU * gumbel(SEED, len(tokens) - 1, N, len(weights), E)
        noise[0] = 0  # the clean row
        noise[:, [0, -1]] = 0  # ROE_SKIP
        with Noise(weights, noise.transpose(0, 1)):
            rows.append(model(torch.tensor([tokens] * N), use_cache=False).logits[:, -1])
        tokens.append(rows[-1].softmax(-1).mean(0).argmax().item())
    return tokens[len(prompt) :], torch.stack(rows)


def assert_equal_rows(result: dict, tokens: list[int], rows: torch.Tensor):
    """One request's tokens, and each roster's log-probabilities at every step, up to float32's rounding."""
    assert result["texts"][0]["tokens"] == tokens
    recorded = torch.stack(result["rows"][-STEPS:])[:, :, 0]
    torch.testing.assert_close(recorded.log_softmax(-1), rows.log_softmax(-1), rtol=0, atol=2e-4)
    assert (rows[:, 1:] - rows[:, :1]).abs().amax((1, 2)).min() > 1e-2  # there was something to be compared


def assert_equal_texts(texts: list[dict], expected: list[tuple]):
    """Tokens of several requests, and their average's five best log-probabilities."""
    for text, (tokens, rows) in zip(texts, expected, strict=True):
        assert text["tokens"] == tokens
        for step, row in zip(text["top"], rows):
            best = row.softmax(-1).mean(0).log()
            assert all(abs(value - best[token]) < 2e-4 for token, value in step.items())


@pytest.fixture(scope="session")
def expected(prompts):
    return [by_roe(prompt) for prompt in prompts]


# ---- Tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one", "cold"])
def test_without_noise_it_is_plain_vllm(name, plain, engines):
    """Its logits, too: exactly for one roster, and up to float32's rounding where four equal rows are averaged."""
    assert plain[2]["rows"] == [] and not engines[name]["error"]
    assert [text["tokens"] for text in engines[name]["texts"]] == [text["tokens"] for text in plain[2]["texts"]]
    for ours, theirs in zip(engines[name]["texts"], plain[2]["texts"]):
        for step, reference in zip(ours["top"], theirs["top"], strict=True):
            assert step == (reference if name == "one" else pytest.approx(reference, abs=1e-4))


def test_penalties_act_on_logits_of_the_clean_rows_scale(engines, prompts, expected):
    """By hand, from the rosters' logits: log of the mean probability, plus the clean row's log-normaliser."""
    [text], seen = engines["penalised"]["texts"], list(prompts[1])
    for row, top, token in zip(engines["penalised"]["rows"][-STEPS:], text["top"], text["tokens"], strict=True):
        logits = row[:, 0].double().softmax(-1).mean(0).log() + row[0, 0].double().exp().sum().log()
        assert all(abs(value - logits[token]) < 2e-4 for token, value in top.items())
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / PENALTY, logits[seen] * PENALTY)
        assert token == logits.argmax()
        seen.append(token)
    assert text["tokens"] != expected[1][0]  # the penalty did something


def test_the_log_says_that_rosters_run(folder, plain, engines):
    log = (folder / "log.txt").read_text()
    assert "ROE_ROSTERS is not set" in log
    assert f"RoE: 8 rosters, seed {SEED}, noise at 6 routers: [0, 0.6, 0.6, 0.6, 0.6, 0]" in log


def test_noise_is_that_of_roe():
    import roe

    assert inspect.getsource(roe.gumbel) in (HERE / "roe_vllm.py").read_text()


def test_rows_are_those_of_roe(engines, expected):
    assert_equal_rows(engines["alone"], *expected[1])


def test_settings_from_their_doors_to_their_places(engines, prompts):
    """Each variable where it matters, and what it is when left out, against roe.py: every roster's rows."""
    seen = []
    for name, (_, arguments) in SETTINGS.items():
        assert engines[name]["error"] == "", name
        tokens, rows = by_roe(prompts[3], **arguments)
        assert_equal_rows(engines[name], tokens, rows)
        assert all((rows[0, 1] - other).abs().max() > 1e-2 for other in seen)  # no two settings are the same
        seen.append(rows[0, 1])


def test_text_that_is_cut_goes_on_as_if_it_had_not_been(engines, expected):
    for text, k in zip(engines["cut"]["texts"], (1, 20), strict=True):
        assert text["tokens"][: STEPS - k] == expected[1][0][k:]


def test_requests_of_different_lengths_in_one_batch(engines, expected):
    assert max(rows.shape[1] for rows in engines["batch"]["rows"]) == len(expected)  # they were one batch
    assert_equal_texts(engines["batch"]["texts"], expected)


def test_prompts_in_chunks_and_cached_prefixes(engines, expected):
    texts = engines["chunks"]["texts"]
    assert texts[2]["cached"] >= 128  # the second call finds the first one's prompt in the cache
    assert_equal_texts(texts, [expected[1], *expected])


@pytest.mark.parametrize("name", FAMILIES[1:])
def test_rows_of_other_architectures(name, engines, random_models):
    assert engines[name]["error"] == ""
    assert_equal_rows(engines[name], *by_transformers(random_models[name], list(range(3, 27))))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, engines):
    assert REFUSED[name] in engines[name]["error"] and engines[name]["texts"] == []


def test_wrong_settings_and_scoring_are_refused(engines):
    for name, (_, said) in WRONG.items():
        assert said in engines[name]["error"]
    assert "scores no prompts" in engines["scoring"]["error"]


def test_compiled_as_by_default(folder, prompts, plain, expected):
    """After plain vLLM has left its compiled model in the same folder, which is not to be taken for this one."""
    assert [text["tokens"] for text in plain[1]["texts"]] == [text["tokens"] for text in plain[0]["texts"]]
    job = dict(model=TINY, calls=[[prompts[1]], prompts], engine={"enforce_eager": False})
    [result] = start(folder, [job], **NOISY)
    assert result["error"] == ""
    assert_equal_texts(result["texts"], [expected[1], *expected])


def test_server_with_two_tensor_parallel_processes(folder, prompts, expected):
    """The server that `vllm serve` starts, by its OpenAI interface. (That command itself fails in vllm-cpu 0.32.)"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = "--tensor-parallel-size 2 --dtype float32 --max-num-seqs 8 --gpu-memory-utilization 0.1 --enforce-eager"
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        TINY,
        "--port",
        port,
        *options.split(),
    ]
    url = f"http://127.0.0.1:{port}"

    def ask(**body):
        request = urllib.request.Request(f"{url}/v1/completions", headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, json.dumps(body).encode()) as response:
            return json.load(response)["choices"]

    # Left alone, vLLM wants a NUMA node for each process.
    bind = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0))[:2])}
    with open(folder / "server.txt", "w") as log:
        variables = environment(folder, **NOISY) | bind
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        while True:
            assert server.poll() is None, (folder / "server.txt").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        options = dict(model=TINY, temperature=0, max_tokens=STEPS, ignore_eos=True, return_token_ids=True)
        choices = ask(prompt=prompts, **options)
        assert [choice["token_ids"] for choice in choices] == [tokens for tokens, _ in expected]
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(prompt=prompts[0], prompt_logprobs=1, **options)
        assert error.value.code == 400 and b"scores no prompts" in error.value.read()
    finally:
        server.terminate()
        server.wait()
