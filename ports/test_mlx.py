"""Tests of roe_mlx.py against mlx-lm's own generation, against runs of single rows, and against roe.py.

FAMILIES and REFUSED say what is tested. They are literals, so that a reader of this file needs no mlx.
"""

# Models of mlx-lm, by the names of its files: each row of each is held against a run of its own, quantised ones too.
FAMILIES = [
    "Klear",
    "afmoe",
    "bailing_moe",
    "ernie4_5_moe",
    "gemma4_text",
    "gpt_oss",
    "granitemoe",
    "hunyuan",
    "laguna",
    "mellum",
    "minimax",
    "mistral4",
    "mixtral",
    "olmoe",
    "phimoe",
    "phixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_vl_moe",
    "step3p5",
]
# Models that add_roe refuses, and the reason that it gives.
REFUSED = {
    "dbrx": "no router was found",
    "deepseek": "no router was found",
    "deepseek_v3": "no router was found",
    "dots1": "no router was found",
    "exaone_moe": "no router was found",
    "glm4_moe": "no router was found",
    "glm4_moe_lite": "no router was found",
    "granitemoehybrid": "keeps ArraysCache",
    "jamba": "keeps ArraysCache",
    "kimi_linear": "keeps ArraysCache",
    "lfm2_moe": "keeps ArraysCache",
    "llama": "no router was found",
    "llama4": "keeps ChunkedKVCache",
    "longcat_flash": "keeps CacheList",
    "mimo_v2_flash": "no router was found",
    "minimax_m3_vl": "keeps CacheList",
    "qwen3_next": "keeps ArraysCache",
    "solar_open": "no router was found",
}

import copy
import importlib
import json
import math
import os
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "ports")]

import roe_mlx
from settings import SETTINGS, options

# MLX computes in float32 on CPUs; rows of a batch may be summed in another order than a row alone. Logits are about 3.
TOLERANCE = 2e-5
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]  # longer than the window of 4 tokens

# What a family does not know of these, it ignores. Four layers, eight experts, four heads on two for keys and values.
COMMON = {
    **{"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 100, "intermediate_size": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "use_qk_norm": True},
    **{"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8},
    **{"num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_top_k": 2, "moe_topk": 2},
    **{"moe_intermediate_size": 32, "n_shared_experts": 1, "num_shared_experts": 1},
    **{"shared_expert_intermediate_size": 32, "shared_intermediate_size": 32},
    **{"norm_topk_prob": True, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "routed_scaling_factor": 1.0},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "decoder_sparse_step": 1, "mlp_only_layers": []},
    **{"rms_norm_eps": 1e-5, "max_position_embeddings": 512, "rope_theta": 1e4, "rope_scaling": None},
    **{"tie_word_embeddings": False, "attention_bias": False, "use_bias": False},
    **{"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    **{"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32},
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
LONGROPE |= {"short_mscale": 1.0, "long_mscale": 1.0, "original_max_position_embeddings": 512}
YARN = {"type": "yarn", "rope_type": "yarn", "rope_theta": 1e4, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
YARN |= {"original_max_position_embeddings": 512, "llama_4_scaling_beta": 0.1}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
MULTIPLIERS = {"logits_scaling": 1.0, "attention_multiplier": 0.25}
MULTIPLIERS |= {"embedding_multiplier": 1.0, "residual_multiplier": 1.0}
OWN = {  # what a family needs beside COMMON
    "afmoe": {"num_dense_layers": 0},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2, "num_kv_shared_layers": 0, "global_head_dim": 16}
    | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 100},
    "granitemoe": MULTIPLIERS,
    "hunyuan": {"num_shared_expert": 1, "use_mixed_mlp_moe": True, "use_cla": True, "cla_share_factor": 2}
    | {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}},
    "laguna": {"mlp_layer_types": ["sparse"] * 4},
    "mellum": {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}},
    "minimax": {"rotary_dim": 8},
    "mistral4": {"head_dim": None, "rope_parameters": YARN},
    "phimoe": {"rope_scaling": LONGROPE, "original_max_position_embeddings": 512},
    "phixtral": {"num_vocab": 100, "model_dim": 64, "num_heads": 4, "num_layers": 4, "rotary_dim": 8},
    "qwen3_vl_moe": {"text_config": COMMON | {"model_type": "qwen3_moe"}},
    "step3p5": {"num_attention_groups": 2, "share_expert_dim": 32, "moe_layers_enum": "0,1,2,3"},
    # refused
    "dbrx": {
        "d_model": 64,
        "n_layers": 4,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    }
    | {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2}},
    "dots1": {"scoring_func": "noaux_tc"},
    "exaone_moe": {"is_moe_layer": [True] * 4},
    "glm4_moe": {"partial_rotary_factor": 0.5},
    "granitemoehybrid": MULTIPLIERS
    | {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_proj_bias": False}
    | {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_groups": 1, "mamba_conv_bias": True},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 0, "expert_layer_period": 1}
    | {"mamba_d_conv": 4, "mamba_d_state": 8, "mamba_expand": 2},
    "kimi_linear": {
        "model_max_length": 512,
        "linear_attn_config": {"kda_layers": [1, 3], "full_attn_layers": [2, 4]}
        | {"num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3, "conv_bias": False}
    | {"use_expert_bias": True, "num_dense_layers": 0, "norm_eps": 1e-5},
    "llama4": {
        "text_config": COMMON
        | {"model_type": "llama4_text", "num_experts_per_tok": 1, "attention_chunk_size": 4}
        | {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 64}
    },
    "longcat_flash": {"num_layers": 2, "attention_method": "MLA", "mla_scale_q_lora": True, "mla_scale_kv_lora": True}
    | {"zero_expert_type": "identity", "zero_expert_num": 2, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32},
    "mimo_v2_flash": {"hybrid_layer_pattern": [0, 1] * 2, "moe_layer_freq": [1] * 4, "sliding_window_size": 4}
    | {"add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "layernorm_epsilon": 1e-5}
    | {"swa_rope_theta": 1e4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "partial_rotary_factor": 0.5}
    | {"swa_head_dim": 16, "swa_v_head_dim": 16},
    "minimax_m3_vl": {"text_config": COMMON | {"model_type": "minimax_m3", "moe_layer_freq": [1] * 4}},
    "qwen3_next": {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
    | {"linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5},
    "solar_open": {"partial_rotary_factor": 1.0},
}


def build(family, quantised=False):
    """A small model with random weights, the same for every call; no weight is 0 or 1, as some are initialised."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(COMMON | {"model_type": family} | OWN.get(family, {})))
    model.update(tree_map(lambda weight: weight + 0.1 * mx.random.normal(weight.shape), model.parameters()))
    if quantised:
        nn.quantize(model, group_size=32, bits=8)
    mx.eval(model.eval().parameters())
    return model


def plain_tokens(model, count):
    """What mlx-lm itself writes after PROMPT."""
    return [token for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=count)]


def noisy_routers(model):
    """The names of the routers that have noise, in the order of the layers."""
    names = [name for name, module in model.named_modules() if module is not model and hasattr(module, "roe")]
    return sorted(names, key=lambda name: int(re.search(r"\d+", name).group()))


def run_alone(model, biases, token, cache):
    """Logits [V] of the plain model after one more token, with noise [E] as a bias of each named router."""
    modules = dict(model.named_modules())
    before = {name: modules[name].get("bias") for name in biases}
    for name, bias in biases.items():
        modules[name].bias = bias if before[name] is None else before[name] + bias
    logits = model(mx.array([[token]]), cache=cache)[0, -1]
    mx.eval(logits, [layer.state for layer in cache])
    for name, bias in before.items():
        if bias is None:
            del modules[name].bias
        else:
            modules[name].bias = bias
    return logits


@pytest.fixture
def noise(monkeypatch):
    """A list of all that is drawn from now on: (the arguments of gumbel, its noise)."""
    drawn, gumbel = [], roe_mlx.gumbel
    monkeypatch.setattr(roe_mlx, "gumbel", lambda *args: drawn.append((args, gumbel(*args))) or drawn[-1][1])
    return drawn


@pytest.mark.parametrize("quantised", [False, True], ids=["float32", "8bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_equals_a_run_of_its_own(family, quantised, noise):
    model, alone = build(family, quantised), build(family, quantised)
    tau = [0.0, 0.3, 0.6, 0.0]
    roe_mlx.add_roe(model, 4, tau, seed=7)
    routers = noisy_routers(model)
    assert len(routers) == 2
    clean, history = roe_mlx.clean_cache(model), make_prompt_cache(alone)
    model(mx.array([PROMPT]), cache=clean)
    alone(mx.array([PROMPT]), cache=history)
    assert not noise  # one row is the clean path
    for position, token in enumerate((7, 1, 8, 28, 18), len(PROMPT)):
        rows = model(mx.full((4, 1), token), cache=clean)[:, -1]
        ((arguments, G),) = noise  # drawn once for all layers, of which there are four, each with eight experts
        assert arguments == (7, position, 4, 4, 8) and G.shape == (4, 4, 8)
        expected = []
        for row in range(1, 4):
            biases = {name: tau[layer] * G[row, layer] for layer, name in enumerate(routers, 1)}
            expected.append(run_alone(alone, biases, token, copy.deepcopy(history)))
        expected = mx.stack([run_alone(alone, {}, token, history), *expected])
        assert mx.abs(rows - expected).max().item() < TOLERANCE
        assert mx.abs(rows[1:] - rows[0]).max().item() > 1000 * TOLERANCE  # the noise does something
        noise.clear()
    assert [layer.nbytes for layer in clean] == [layer.nbytes for layer in history]  # those of one sequence


@pytest.mark.parametrize("family", FAMILIES)
def test_without_noise_it_writes_what_mlx_lm_writes(family):
    model = build(family)
    expected = plain_tokens(model, 8)
    weights = [(name, id(weight)) for name, weight in tree_flatten(model.parameters())]
    traces = [(name, id(module), type(module), dict(vars(module))) for name, module in model.named_modules()]
    for rosters, tau in ((1, 0.5), (3, 0.0)):
        roe_mlx.add_roe(model, rosters, tau)
        assert list(roe_mlx.generate(model, PROMPT, 8)) == expected
    roe_mlx.add_roe(model, 3, 0.5)
    assert plain_tokens(model, 8) == expected  # one row is the plain model
    noisy = list(roe_mlx.generate(model, PROMPT, 8))
    assert list(roe_mlx.generate(model, PROMPT, 8)) == noisy  # one seed, one text
    roe_mlx.remove_roe(model)
    assert [(name, id(module), type(module), dict(vars(module))) for name, module in model.named_modules()] == traces
    assert [(name, id(weight)) for name, weight in tree_flatten(model.parameters())] == weights
    assert plain_tokens(model, 8) == expected


@pytest.mark.parametrize("family", REFUSED)
def test_refuses_by_name(family):
    model = build(family)
    with pytest.raises(ValueError, match=REFUSED[family]) as error:
        roe_mlx.add_roe(model, 4)
    assert family in str(error.value) and "\n" not in str(error.value)
    assert not any(hasattr(module, "roe") for module in model.modules())


def test_prompts_longer_than_a_chunk(noise):
    """The prompt is read in pieces of 2,048 tokens, by one row."""
    model = build("gpt_oss")
    random.seed(0)
    prompt = [random.randrange(100) for _ in range(2100)]
    roe_mlx.add_roe(model, 2, 0.0)
    expected = [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=4)]
    assert list(roe_mlx.generate(model, prompt, 4)) == expected


def test_rows_may_read_several_tokens_at_once(noise):
    """Noise is for the last position only: positions before it are as if the clean path had read them."""
    model = build("gpt_oss")
    roe_mlx.add_roe(model, 3, 0.5)
    at_once, in_turn = roe_mlx.clean_cache(model), roe_mlx.clean_cache(model)
    rows = model(mx.array([PROMPT] * 3), cache=at_once)[:, -1]
    model(mx.array([PROMPT[:-1]]), cache=in_turn)
    expected = model(mx.full((3, 1), PROMPT[-1]), cache=in_turn)[:, -1]
    without_cache = model(mx.array([PROMPT] * 3))[:, -1]
    assert [arguments for arguments, _ in noise] == [(0, len(PROMPT) - 1, 3, 4, 8)] * 3
    assert mx.abs(rows - expected).max().item() < TOLERANCE
    assert mx.abs(without_cache - expected).max().item() < TOLERANCE
    assert mx.abs(expected[1:] - expected[0]).max().item() > 1000 * TOLERANCE


def test_other_batches_are_refused():
    """As many rows as there are rosters may be so many texts, which must not get noise in silence."""
    model = build("olmoe")
    roe_mlx.add_roe(model, 4)
    for batch in ([[1, 2], [1, 2], [1, 3], [1, 2]], [[1, 2]] * 3, [[1, 2]] * 5):
        with pytest.raises(ValueError, match="one row, or 4 equal ones"):
            model(mx.array(batch), cache=roe_mlx.clean_cache(model))
    assert model(mx.array([[1, 2]] * 4)).shape == (4, 2, 100)


def test_noise_is_a_function_of_seed_and_position():
    """Equal arguments give equal noise, the first rosters of many are those of few, and nothing else has the same."""
    seeds, positions = (0, 1, 2, 2**32, 2**32 + 1, 2**63 - 1, 2**64 - 1), (0, 1, 2, 3, 4095, 100_000)
    seen = []
    for seed in seeds:
        for position in positions:
            G = roe_mlx.gumbel(seed, position, 9, 3, 8)
            assert G.shape == (9, 3, 8) and G.dtype == mx.float32
            assert mx.array_equal(roe_mlx.gumbel(seed, position, 9, 3, 8), G)
            assert all(mx.array_equal(roe_mlx.gumbel(seed, position, m, 3, 8), G[:m]) for m in (1, 2, 3, 8))
            seen += [tuple(row) for row in G.reshape(-1, 8).tolist()]  # of one roster in one layer
    assert len(set(seen)) == len(seen)


def test_gumbel_noise():
    """Mean and variance of Gumbel(0, 1) are Euler's constant and pi^2 / 6, and what differs in one thing is unrelated.

    5 standard errors at 100,000 draws: of the mean, of the variance (excess kurtosis 2.4), of a correlation of 0.
    """
    wide = roe_mlx.gumbel(0, 0, 1000, 1, 100)[:, 0]  # many rosters
    long = mx.concatenate([roe_mlx.gumbel(seed, p, 1, 100) for seed in range(10) for p in range(100)])
    for draws in (wide, long):
        assert abs(draws.mean().item() - 0.5772157) < 5 * math.sqrt(math.pi**2 / 6 / 1e5)
        assert abs(draws.var().item() - math.pi**2 / 6) < 5 * math.sqrt(4.4 / 1e5) * math.pi**2 / 6
        draws = ((draws - draws.mean()) / draws.std()).reshape(-1, 100)  # neighbours are rosters, or positions
        assert abs((draws[1:] * draws[:-1]).mean().item()) < 5 / math.sqrt(1e5)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])  # gpt_oss has a window of 4 tokens
def test_a_text_that_is_cut_goes_on(family, sampled):
    model = build(family)
    sampler = make_sampler(temp=1.0, top_p=0.95) if sampled else None
    write = lambda tokens, count: list(roe_mlx.generate(model, tokens, count, sampler))
    texts = {}
    for seed in (0, 1, 2**32):
        roe_mlx.add_roe(model, 4, 0.6, seed=seed)
        texts[seed] = write(PROMPT, 12)
        for cut in (1, 5, 11):
            mx.random.seed(cut)  # the sampler must not read what was left behind
            assert write(PROMPT + texts[seed][:cut], 12 - cut) == texts[seed][cut:]
    assert len({tuple(text) for text in texts.values()}) > 1
    if sampled:  # by the seed, those above 32 bits included, with one roster too
        one_roster = set()
        for seed in (0, 1, 2**32):
            roe_mlx.add_roe(model, 1, seed=seed)
            one_roster.add(tuple(write(PROMPT, 12)))
        assert len(one_roster) == 3


def test_samples_follow_the_average():
    """With one roster 500 seeds draw each token as often as its probability says: 5 standard errors."""
    model, sampler, count = build("olmoe"), make_sampler(temp=1.0), 500
    (probs,) = mx.softmax(model(mx.array([PROMPT]))[:, -1], axis=-1).tolist()
    drawn = []
    for seed in range(count):
        roe_mlx.add_roe(model, 1, seed=seed)
        drawn += roe_mlx.generate(model, PROMPT, 1, sampler)
    for token in sorted(range(100), key=probs.__getitem__)[-5:]:
        error = math.sqrt(probs[token] * (1 - probs[token]) / count)
        assert abs(drawn.count(token) / count - probs[token]) < 5 * error


def test_average_is_the_log_of_the_mean_probability():
    mx.random.seed(0)
    logits = 5 * mx.random.normal((3, 7))
    total = [0.0] * 7
    for row in logits.tolist():
        weights = [math.exp(value) for value in row]
        total = [mean + weight / sum(weights) / 3 for mean, weight in zip(total, weights)]
    assert roe_mlx.average(logits).tolist() == pytest.approx([math.log(mean) for mean in total], abs=1e-5)


def test_generation_stops_and_samples():
    model = build("olmoe")
    roe_mlx.add_roe(model, 3, 0.3)
    tokens = list(roe_mlx.generate(model, PROMPT, 8))
    stop = tokens[5]
    assert list(roe_mlx.generate(model, PROMPT, 8, stop={stop})) == tokens[: tokens.index(stop)]
    least = lambda log_probs: log_probs.argmin(-1)
    worst = next(roe_mlx.generate(model, PROMPT, 1, sampler=least))
    assert worst not in (tokens[0], stop)
    with pytest.raises(ValueError, match="at least one token"):
        next(roe_mlx.generate(model, [], 8))
    roe_mlx.remove_roe(model)
    with pytest.raises(ValueError, match="add_roe"):
        next(roe_mlx.generate(model, PROMPT, 8))


@pytest.mark.parametrize(
    "arguments",
    [{"rosters": 0}, {"skip": -1}, {"tau": -0.1}, {"tau": math.nan}, {"tau": math.inf}, {"tau": [0.1] * 3}]
    + [{"seed": -1}, {"seed": 2**64}],
    ids=str,
)
def test_refuses_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        roe_mlx.add_roe(build("olmoe"), **{"rosters": 4, **arguments})


# ---- The embedded model ---------------------------------------------------------------------------------------------


def test_equals_roe_on_the_embedded_model(monkeypatch):
    """With MLX's noise roe.py gives the same rows, step by step; float32 over 6 layers allows 1e-3."""
    torch = pytest.importorskip("torch", reason="torch, which roe.py needs, is not installed")
    import cache as roe_cache
    import load
    import roe

    torch.set_num_threads(1)
    theirs, tokenizer = load.load(None, "cpu", "float32")
    ours, _ = load_model(ROOT / "tiny")
    ours.set_dtype(mx.float32)
    rosters, tau, seed, prompt = 5, [0.0, 0.6, 0.3, 0.6, 0.3, 0.0], 3, tokenizer.encode("def main(arguments):\n").ids
    monkeypatch.setattr(roe, "gumbel", lambda *args: torch.tensor(roe_mlx.gumbel(*args).tolist()))
    seen = []
    average = roe_mlx.average
    monkeypatch.setattr(roe_mlx, "average", lambda logits: seen.append(logits.tolist()) or average(logits))
    roe_mlx.add_roe(ours, rosters, tau, seed=seed)
    written = list(roe_mlx.generate(ours, prompt, 48))
    assert list(roe.generate(theirs, prompt, rosters, tau, max_new_tokens=48, seed=seed)) == written
    assert len(written) == 48

    cache, tokens = roe_cache.SharedCache(theirs.config, 512), prompt
    for step, token in enumerate(written):
        logits = roe.predict(theirs, tokens, cache, rosters, tau, seed)
        assert (logits - torch.tensor(seen[step])).abs().max() < 1e-3
        assert (logits[1:] - logits[0]).abs().max() > 0.01  # the noise does something
        tokens = [token]


def run(*arguments, model=ROOT / "tiny", **options):
    """The program as a user runs it."""
    command = [sys.executable, ROOT / "ports/roe_mlx.py", "--model", model, *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_program():
    """Its temperatures are those of tau.json beside the model, as roe.py's are; the newline that `echo` adds is cut."""
    result = run("--prompt", "-", "--rosters", "3", "--max-new-tokens", "10", input="def main(\n")
    assert result.returncode == 0, result.stderr
    pattern = r"10 tokens, [\d.]+ tokens/s, rosters: 3, cache: [\d,]+ bytes; "
    pattern += r"the average overruled the clean roster on \d+ of the tokens\n"
    assert re.fullmatch(pattern, result.stderr)
    model, _ = load_model(ROOT / "tiny")
    model.set_dtype(mx.float32)
    roe_mlx.add_roe(model, 3, json.loads((ROOT / "tiny/tau.json").read_text()))
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(ROOT / "tiny/tokenizer.json"))
    expected = list(roe_mlx.generate(model, tokenizer.encode("def main(").ids, 10))
    assert result.stdout == tokenizer.decode(expected) + "\n"


@pytest.fixture
def program(monkeypatch, capsys, tmp_path):
    """The program in this process, in a folder of its own: returns what it prints, and its line of statistics."""
    monkeypatch.chdir(tmp_path)

    def write(*arguments, model=ROOT / "tiny"):
        monkeypatch.setattr(sys, "argv", ["roe_mlx.py", "--model", str(model), *arguments])
        runpy.run_path(str(ROOT / "ports/roe_mlx.py"), run_name="__main__")
        out, err = capsys.readouterr()
        return out, err.splitlines()[-1]

    return write


@pytest.fixture(scope="module")
def both():
    """The embedded model in float32 here and in roe.py, and its tokenizer."""
    pytest.importorskip("torch", reason="torch, which roe.py needs, is not installed")
    import load

    ours, _ = load_model(ROOT / "tiny")
    ours.set_dtype(mx.float32)
    return ours, *load.load(None, "cpu", "float32")


def by_roe(theirs, tokens, tau=None, skip=1, rosters=4, temperature=0.0, top_p=1.0, seed=0, max_new_tokens=30):
    """What roe.py predicts with MLX's noise, and mlx-lm's sampler takes; and on how many tokens row 0 had another."""
    import torch

    import load
    import roe
    from cache import SharedCache

    tau = roe.temperatures(theirs.config, load.read_tau(tau) if isinstance(tau, str) else tau, skip)
    cache, new, written, overruled = SharedCache(theirs.config, 512), tokens, [], 0
    sampler = make_sampler(temperature, top_p)
    for position in range(len(tokens) - 1, len(tokens) - 1 + max_new_tokens):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(roe, "gumbel", lambda *args: torch.tensor(roe_mlx.gumbel(*args).tolist()))
            logits = roe.predict(theirs, new, cache, rosters, tau, seed)
        average = logits.softmax(-1).mean(0).log()
        high, low = roe_mlx.roster_keys(seed, position, 1)[0].tolist()
        mx.random.seed(high * 2**32 + low)
        new = [sampler(mx.array(average.tolist())[None]).item()]
        written += new
        overruled += bool(average.argmax() != logits[0].argmax())
    return written, overruled


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_from_their_doors_to_their_places(both, program, tmp_path, name):
    """Arguments of `add_roe` and `generate`, and the program's options, against roe.py with MLX's noise."""
    (tmp_path / "other.json").write_text("[1.5, 0, 0.5, 3, 0, 1]")
    (ours, theirs, tokenizer), settings = both, SETTINGS[name]
    tokens = tokenizer.encode("class Stack:").ids
    expected, overruled = by_roe(theirs, tokens, **settings)
    before = dict([*settings.items()][:-1])
    assert not settings or by_roe(theirs, tokens, **before)[0] != expected

    tau = settings.get("tau", str(ROOT / "tiny/tau.json"))
    tau = roe_mlx.read_tau(tau) if isinstance(tau, str) else tau
    roe_mlx.add_roe(ours, settings.get("rosters", 4), tau, settings.get("skip", 1), settings.get("seed", 0))
    sampler = make_sampler(settings.get("temperature", 0.0), settings.get("top_p", 1.0))
    count = settings.get("max_new_tokens", 30)
    assert list(roe_mlx.generate(ours, tokens, count, sampler)) == expected and ours.roe.overruled == overruled

    out, line = program("--prompt", "class Stack:", *options({"max_new_tokens": 30} | settings))
    assert out == tokenizer.decode(expected) + "\n"
    assert line.startswith(f"{len(expected)} tokens, ") and f"rosters: {settings.get('rosters', 4)}, cache" in line
    assert line.endswith(f" the clean roster on {overruled} of the tokens")


def test_defaults_of_add_roe_and_of_the_program_without_temperatures(both, program, tmp_path):
    """0.2 between the ends, seed 0, and for the program 4 rosters and 128 tokens; and what --skip does to 0.2."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(ROOT / "tiny" / name)
    ours, theirs, tokenizer = both
    tokens = tokenizer.encode("class Stack:").ids
    expected, overruled = by_roe(theirs, tokens, [0, 0.2, 0.2, 0.2, 0.2, 0], max_new_tokens=128)
    roe_mlx.add_roe(ours, 4)
    assert list(roe_mlx.generate(ours, tokens)) == expected and ours.roe.overruled == overruled
    assert program("--prompt", "class Stack:", model=tmp_path)[0] == tokenizer.decode(expected) + "\n"
    expected, _ = by_roe(theirs, tokens, [0, 0, 0.2, 0.2, 0, 0])
    flags = ["--prompt", "class Stack:", "--skip", "2", "--max-new-tokens", "30"]
    assert program(*flags, model=tmp_path)[0] == tokenizer.decode(expected) + "\n"


def test_the_programs_chat(program, tmp_path):
    """--chat wraps the prompt as the tokenizer's own template says."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "tau.json"):
        (tmp_path / name).symlink_to(ROOT / "tiny" / name)
    turn = "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(turn + "{% if add_generation_prompt %}def {% endif %}")
    flags = ["--max-new-tokens", "20", "--prompt"]
    text = program(*flags, "class Stack:", "--chat", model=tmp_path)[0]
    assert text == program(*flags, "# user\nclass Stack:\ndef ")[0] != program(*flags, "class Stack:")[0]


@pytest.mark.parametrize(
    "arguments, word",
    [(["--prompt", "x", "--rosters", "0"], "rosters"), (["--prompt", "x", "--top-p", "0"], "--top-p")]
    + [(["--prompt", "x", "--model", "no directory"], "no directory"), (["--prompt", ""], "at least one token")]
    + [([], "--prompt"), (["--prompt", "x", "--chat"], "chat"), (["--prompt", "x", "--seed", "-1"], "seed")]
    + [(["--prompt", "x", "--temperature", "-1"], "--temperature"), (["--prompt", "x", "--tau", "-1"], "tau")]
    + [(["--prompt", "x", "--tau", "much"], "'much'"), (["--prompt", "x", "--tau", ""], "a number")]
    + [
        (["--prompt", "x", "--tau", str(ROOT / "tiny/config.json")], "config.json"),
        (["--prompt", "x", "--skip", "2"], "--skip"),
    ],
    ids=str,
)
def test_program_refuses_in_one_line(arguments, word, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["roe_mlx.py", "--model", str(ROOT / "tiny"), *arguments])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "ports/roe_mlx.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert error.value.code == 2 and out == ""
    assert re.fullmatch(r"roe_mlx.py: error: [^\n]+\n", err) and word in err


@pytest.mark.parametrize("broken", ["config.json lacks hidden_size", "weights are cut short"])
def test_program_refuses_broken_models_in_one_line(broken, tmp_path, monkeypatch, capsys):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((ROOT / "tiny" / name).read_bytes())
    if broken == "weights are cut short":
        os.truncate(tmp_path / "model.safetensors", 100_000)
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        del config["hidden_size"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    test_program_refuses_in_one_line(["--prompt", "x", "--model", str(tmp_path)], str(tmp_path), monkeypatch, capsys)
