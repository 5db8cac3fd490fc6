"""The transformers port against independent runs of the plain models, family by family, with small random weights.

Tolerance: float32 sums in another order differ by about 1e-6 of the largest term, which a few layers amplify; logits
here are of order 1 to 10, so that 1e-4 is far above the rounding and far below the effect of noise (above 1e-2).
"""

import contextlib
import contextvars
import copy
import inspect
import io
import itertools
import json
import os
import runpy
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")
from transformers import AutoConfig, DynamicCache

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "ports")]
import roe_transformers as port
from settings import SETTINGS, options

torch.set_num_threads(1)  # models this small do not gain from more, and lose where the processor is shared

TOLERANCE = 1e-4
PROMPT, NEW, WINDOW = 20, 8, 6  # tokens; the sliding windows are shorter than the text
BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HEADS = {"num_key_value_heads": 4, "head_dim": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8}
LATENT = HEADS | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8}  # DeepSeek's attention, whose heads come in no groups
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "norm_topk_prob": True}
ONE_GROUP = GROUPS | {"n_group": 1, "topk_group": 1}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]}
GEMMA = {"enable_moe_block": True, "top_k_experts": 2, "vocab_size_per_layer_input": 64, "global_head_dim": 8}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MISTRAL = {"rope_parameters": ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}}
LONGCAT = {"num_hidden_layers": 8, "moe_topk": 2, "zero_expert_num": 2, "routed_scaling_factor": 1.5}
SPARSE = {"mlp_layer_types": ["dense"] + ["sparse"] * 4}


# model_type: how the weights follow from the logits at the chosen experts (see `weigh`), and the settings
FAMILIES = {
    "olmoe": ("softmax", {}),
    "flex_olmo": ("softmax", {}),
    "mixtral": ("softmax normed", {"sliding_window": WINDOW}),
    "gpt_oss": ("softmax after", SLIDING | {"rope_parameters": ROPE}),
    "qwen2_moe": ("softmax", SLIDING | {"use_sliding_window": True}),
    "qwen3_moe": ("softmax normed", {"norm_topk_prob": True}),
    "deepseek_v2": ("softmax scaled", LATENT | GROUPS | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("sigmoid normed scaled", LATENT | GROUPS),
    "granitemoe": ("softmax after", {}),
    "granitemoeshared": ("softmax after", {"shared_intermediate_size": 16}),
    "granitemoe_swa": ("softmax after", SLIDING),
    "glm4_moe": ("sigmoid normed scaled", GROUPS),
    "glm4_moe_lite": ("sigmoid normed scaled", LATENT | GROUPS | SPARSE),
    "phimoe": ("sparsemixer", {"sliding_window": WINDOW}),
    "ernie4_5_moe": ("softmax normed", {"moe_k": 2, "moe_num_experts": 8, "moe_num_shared_experts": 1}),
    "minimax_m2": ("sigmoid normed", {}),
    "afmoe": ("sigmoid normed scaled", SLIDING | {"num_dense_layers": 1, "route_scale": 1.5}),
    "mimo_v2_flash": ("sigmoid normed scaled", SLIDING | SPARSE | GROUPS),
    "laguna": ("sigmoid normed", SLIDING | SPARSE | {"num_attention_heads_per_layer": [4] * 5}),
    "solar_open": ("sigmoid normed scaled", GROUPS),
    "cohere2_moe": ("softmax after", SLIDING | SPARSE),
    "exaone_moe": ("sigmoid normed scaled", SLIDING | SPARSE | GROUPS),
    "axk1": ("sigmoid normed scaled", LATENT | SPARSE | GROUPS),
    "beam": ("sigmoid normed", SLIDING | SPARSE | GROUPS),
    "dots1": ("sigmoid normed scaled", SLIDING | GROUPS),
    "flint": ("sigmoid normed", SLIDING | {"norm_topk_prob": True}),
    "gemma4_text": ("softmax normed scaled", SLIDING | GEMMA),
    "hunyuan_v1_moe": ("softmax normed", {"moe_topk": 2}),
    "hy_v3": ("sigmoid normed scaled", SPARSE | {"router_scaling_factor": 1.5}),
    "kolibri1": ("sigmoid", SLIDING),
    "llama4_text": ("sigmoid", {"attention_chunk_size": WINDOW}),
    "longcat_flash": ("softmax scaled", LATENT | LONGCAT),
    "mellum": ("softmax normed", SLIDING | {"norm_topk_prob": True}),
    "mistral4": ("softmax normed scaled", LATENT | GROUPS | MISTRAL),
    "aria_text": ("softmax after", {"moe_topk": 2, "moe_num_experts": 8}),
}
REFUSED = {
    "bailing_hybrid": "linear attention",
    "deepseek_v32": "an index beside keys and values",
    "deepseek_v4": "a cache of its own",
    "doge": "its experts have no router of their own",
    "glm_moe_dsa": "an index beside keys and values",
    "granitemoehybrid": "state space",
    "jamba": "state space",
    "jetmoe": "its attention is a mixture too",
    "kimi_linear": "linear attention",
    "lfm2_moe": "convolution",
    "llama": "no experts",
    "minimax": "linear attention",
    "nemotron_h": "state space",
    "qwen3_next": "linear attention",
    "switch_transformers": "an encoder-decoder",
}
LAYERS = {  # of those refused
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"] * 2 + ["attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2 + ["full_attention"]},
}


def build(family, settings):
    """A model with random weights, large enough that attention, routing and experts all matter."""
    config = AutoConfig.for_model(family, **BASE | settings)
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) or transformers.Mistral4ForCausalLM
    torch.manual_seed(0)
    model = kind(config).eval()
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1:
            tensor.normal_(0, 0.3)
        elif "bias" in name:
            tensor.uniform_(-0.1, 0.1)
        elif "scale" in name:
            tensor.uniform_(0.5, 1.5)
    return model


# What transformers 5.0, the oldest version that the port is for, has otherwise than the newest
OLDEST = transformers.__version__.startswith("5.0.")
UNTESTED_IN_5_0 = {
    "deepseek_v2": "the model itself fails",
    "granitemoe": "no router stands beside `experts`",
    "granitemoeshared": "no router stands beside `experts`",
}
REFUSE_CLEAN_IN_5_0 = (  # their routers return logits; the block chooses
    "deepseek_v3",
    "glm4_moe",
    "glm4_moe_lite",
    "solar_open",
    "dots1",
    "hunyuan_v1_moe",
    "aria_text",
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    rule, settings = FAMILIES[request.param]
    if OLDEST and request.param in UNTESTED_IN_5_0:
        pytest.skip(f"in transformers 5.0 {UNTESTED_IN_5_0[request.param]}")
    if request.param not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {request.param}")
    return rule, build(request.param, settings)


IDS = torch.randint(2, 64, (1, PROMPT), generator=torch.Generator().manual_seed(1))


def cache_name(model):
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def forward(model, ids, cache):
    with torch.inference_mode():
        return model(input_ids=ids, **{cache_name(model): cache}).logits[:, -1]


def own_text(model):
    return model.generate(IDS, max_new_tokens=NEW, do_sample=False)


# ---- Every family ----------------------------------------------------------------------------------------------------


def test_one_roster_and_no_noise_write_the_models_own_text(family):
    _, model = family
    expected = own_text(model)
    assert len(expected[0].unique()) > 5
    for rosters, tau in ((1, 1.0), (3, 0.0)):
        port.add_roe(model, rosters, tau)
        assert port.generate(model, IDS, max_new_tokens=NEW, do_sample=False).equal(expected)
    port.remove_roe(model)


def noisy_routers(model):
    """The routers with a hook of RoE, in the order of the layers."""
    of_roe = lambda hook: isinstance(hook, partial) and hook.func.__name__ == "route"
    return [module for module in model.modules() if any(map(of_roe, module._forward_hooks.values()))]


def weigh(rule, R, chosen, router):
    """The weights of chosen experts [k] from the logits R [E] without noise, by a family's rule as papers write it."""
    if rule == "sparsemixer":  # each of the two: softmax over the experts not far below it, those taken before left out
        weights, left = [], R.clone()
        for i in chosen:
            far = (left[i] - left) / left.abs().clamp(min=left[i]) > 2 * router.router_jitter_noise
            weights.append(left.masked_fill(far, -torch.inf).softmax(-1)[i])
            left[i] = -torch.inf
        return torch.stack(weights)
    weights = R.sigmoid()[chosen] if "sigmoid" in rule else R.softmax(-1)[chosen]
    weights = R[chosen].softmax(-1) if "after" in rule else weights
    weights = weights / weights.sum() if "normed" in rule else weights
    if "scaled" in rule:
        names = "routed_scaling_factor", "router_scaling_factor", "route_scale", "per_expert_scale"
        (scale,) = [getattr(router, name) for name in names if hasattr(router, name)]
        weights = weights * (scale[chosen] if isinstance(scale, torch.Tensor) else scale)
    return weights


def shift(stack, router, noise, rule, weights):
    """Adds noise [E] to a router, for one token x, by its weight: (W + noise x^T / |x|^2) x = W x + noise.

    With "clean" weights only its choice is the router's own then; what the chosen get is replaced by `weigh`.
    """
    linear = next(m for m in router.modules() if any(p.dim() == 2 for p in m.parameters(recurse=False)))
    bias, plain, logits = getattr(linear, "bias", None), linear.weight.data, []

    def before(_, args):
        x = args[0].reshape(-1)
        logits.append(plain @ x + (0 if bias is None else bias))
        linear.weight.data = plain + noise[:, None] * x / (x @ x)

    def after(_, args, out):
        linear.weight.data, (R,) = plain, logits
        if weights == "perturbed":
            return None
        if all(
            part.is_floating_point() for part in out
        ):  # Llama 4: weights of all experts, 0 where they are not chosen
            chosen = out[0][0].nonzero()[:, 0]
            return torch.zeros_like(out[0]).scatter(1, chosen[None], weigh(rule, R, chosen, router)[None]), out[1]
        ((chosen,),) = [part for part in out if not part.is_floating_point()]
        own = weigh(rule, R, chosen, router)[None]
        if places := [i for i, part in enumerate(out) if part.is_floating_point() and part.shape == own.shape]:
            return *out[: places[0]], own, *out[places[0] + 1 :]
        return torch.zeros_like(out[0]).scatter(1, chosen[None], own), *out[1:]

    inputs = linear if hasattr(router, "proj") else router  # Gemma 4 normalises x first
    stack.callback(inputs.register_forward_pre_hook(before).remove)
    stack.callback(router.register_forward_hook(after).remove)


@pytest.mark.parametrize("weights", ["perturbed", "clean"])
def test_every_row_equals_a_run_of_its_own(family, weights):
    rule, model = family
    n, tau = 4, 1.0
    port.add_roe(model, n, tau, seed=2, weights=weights)
    if OLDEST and weights == "clean" and model.config.model_type in REFUSE_CLEAN_IN_5_0:
        with pytest.raises(ValueError, match="no top-k, as clean weights need it"):
            forward(model, IDS.repeat(n, 1), None)
        return
    routers = noisy_routers(model)
    cache = port.CleanCache(config=model.config)
    forward(model, IDS[:, :-2], cache)
    rows = [forward(model, ids.repeat(n, 1), cache) for ids in (IDS[:, -2:-1], IDS[:, -1:])]
    port.remove_roe(model)
    (experts,) = {next(p for p in router.parameters() if p.dim() == 2).shape[0] for router in routers}
    layers = len(routers) + 2  # the first and the last one have no noise
    noise = [port.gumbel(2, position, n, layers, experts)[1:, 1:-1] for position in (PROMPT - 2, PROMPT - 1)]

    history = DynamicCache(config=model.config)
    forward(model, IDS[:, :-2], history)
    scale = max(1.0, rows[0].abs().max().item())  # Granite multiplies, and with its logits their rounding
    close, moved = partial(torch.testing.assert_close, atol=TOLERANCE * scale, rtol=0), []
    for ids, got, drawn in zip((IDS[:, -2:-1], IDS[:, -1:]), rows, noise):
        for row in range(1, n):
            with contextlib.ExitStack() as stack:
                for router, g in zip(routers, drawn[row - 1]):
                    shift(stack, router, tau * g, rule, weights)
                close(forward(model, ids, copy.deepcopy(history))[0], got[row])
            moved.append((got[row] - got[0]).abs().max() > 100 * TOLERANCE)
        close(forward(model, ids, history)[0], got[0])
    assert sum(moved) > 1  # where noise chose the same experts, "clean" rows equal row 0
    nbytes = lambda cache: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert nbytes(cache) == nbytes(history)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_history_is_there_once(family, attention, monkeypatch):
    """While a token is decoded every layer attends to one history and n own positions, as if each row had its own."""
    _, model = family
    if attention == "sdpa" and not type(model)._supports_sdpa:
        pytest.skip("the model has no sdpa")
    n, own_name = 3, model.config._attn_implementation
    model.set_attn_implementation(attention)
    port.add_roe(model, n, 1.0)
    copying, folding = (port.CleanCache(config=model.config) for _ in range(2))
    forward(model, IDS[:, :-1], folding)
    forward(model, IDS[:, :-1], copying)
    ours = f"roe_{attention}"
    seen, attend = [], transformers.AttentionInterface._global_mapping[ours]

    def note(module, query, key, *args, **kwargs):
        out, weights = attend(module, query, key, *args, **kwargs)
        seen.append((len(query), len(key), *out.shape[:2]))
        return out, weights

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, ours, note)
    folded = forward(model, IDS[:, -1:].repeat(n, 1), folding)
    assert set(seen) == {(n, 1, n, 1)}  # rows of queries, of keys; and the outputs are n rows of one position
    model.set_attn_implementation(attention)  # by its own name the model's function gets a copy for every row
    scale = max(1.0, folded.abs().max().item())
    copied = forward(model, IDS[:, -1:].repeat(n, 1), copying)
    torch.testing.assert_close(folded, copied, atol=TOLERANCE * scale, rtol=0)
    for layer, other in zip(folding.layers, copying.layers):
        if layer.is_initialized:
            torch.testing.assert_close(layer.keys, other.keys, atol=TOLERANCE, rtol=0)
            assert layer.get_seq_length() == other.get_seq_length() == PROMPT
    port.remove_roe(model)
    assert model.config._attn_implementation == attention
    model.set_attn_implementation(own_name)


def test_removal_leaves_no_trace(family):
    _, model = family
    traces = lambda: [(len(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    before, logits = traces(), forward(model, IDS, None)
    port.add_roe(model, 3, 1.0)
    port.add_roe(model, 2, 1.0)
    assert traces() != before
    port.remove_roe(model)
    port.remove_roe(model)
    assert traces() == before and forward(model, IDS, None).equal(logits)


def test_half_precision(family):
    """Noise changes no types: bfloat16 models, some of whose routers compute in float32, go on as without it."""
    _, model = family
    if OLDEST and model.config.model_type == "aria_text":
        pytest.skip("in transformers 5.0 its experts take no weights in float32, and say so")
    model = copy.deepcopy(model).bfloat16()
    expected, dtype = own_text(model), forward(model, IDS, None).dtype
    port.add_roe(model, 1)
    assert port.generate(model, IDS, max_new_tokens=NEW, do_sample=False).equal(expected)
    refuses = OLDEST and model.config.model_type in REFUSE_CLEAN_IN_5_0
    for weights in ("perturbed",) if refuses else ("clean", "perturbed"):
        port.add_roe(model, 3, 1.0, weights=weights)
        logits = forward(model, IDS.repeat(3, 1), port.CleanCache(config=model.config))
        assert logits.dtype == dtype and logits.isfinite().all()


# ---- Models that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = AutoConfig.for_model(name, **BASE | LAYERS.get(name, {}))
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    model = (kind or transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)])(config)
    with pytest.raises(ValueError, match=rf"^{name} has (another memory|no router)"):
        port.add_roe(model, 2)
    assert not hasattr(model, "roe")


# ---- One model in detail ---------------------------------------------------------------------------------------------


@pytest.fixture
def mixtral():
    return build("mixtral", FAMILIES["mixtral"][1])


def test_arguments_out_of_range(mixtral):
    for wrong in (
        {"rosters": 0},
        {"rosters": 4.0},
        {"rosters": True},
        {"skip": 1.0},
        {"seed": 0.5},
        {"seed": None},
        {"skip": -1},
        {"tau": -0.1},
        {"tau": [0.1] * 4},
        {"tau": float("nan")},
        {"weights": "softmax"},
    ):
        with pytest.raises(ValueError, match=f"{[*wrong][0]}="):
            port.add_roe(mixtral, **{"rosters": 2} | wrong)
    with pytest.raises(ValueError, match="after add_roe"):
        port.generate(mixtral, IDS)
    port.add_roe(mixtral, torch.tensor(3), seed=torch.tensor(4))  # whole numbers, as Python takes them
    assert (mixtral.roe.rosters, mixtral.roe.seed) == (3, 4)
    for ids in (IDS.repeat(3, 1), IDS[:, :0]):
        with pytest.raises(ValueError, match="one text"):
            port.generate(mixtral, ids)
    with pytest.raises(ValueError, match="without padding"):
        port.generate(mixtral, IDS, (IDS > 30).long())


def test_several_texts_are_not_taken_for_rosters(mixtral):
    port.add_roe(mixtral, 3)
    several, embed = IDS.view(-1)[: 3 * 5].view(3, 5), mixtral.get_input_embeddings()
    cache = port.CleanCache(config=mixtral.config)
    forward(mixtral, IDS, cache)
    for call in (
        lambda: forward(mixtral, IDS.repeat(2, 1), None),  # another number
        lambda: forward(mixtral, several, None),
        lambda: forward(mixtral, several, cache),
        lambda: mixtral(inputs_embeds=embed(several)),
        lambda: mixtral.model(several),
        lambda: mixtral.generate(several, max_new_tokens=2),
        lambda: mixtral.generate(IDS, do_sample=True, num_return_sequences=3, max_new_tokens=2),
        lambda: forward(mixtral, IDS.repeat(3, 1), DynamicCache(config=mixtral.config)),  # of which rows go their ways
    ):
        with pytest.raises(ValueError, match="one row, or 3 equal ones"):
            call()


def test_a_pipeline_of_several_texts():
    pipe = transformers.pipeline("text-generation", str(ROOT / "tiny"), dtype=torch.float32, device="cpu")
    pipe.tokenizer.pad_token = pipe.tokenizer.eos_token = "<|endoftext|>"
    port.add_roe(pipe.model, 4)
    with pytest.raises(ValueError, match="one row, or 4 equal ones"):
        pipe(["import os", "class A:", "x = 1", "def f():"], batch_size=4, max_new_tokens=2)


def test_what_noise_cannot_reach_is_an_error_not_a_result(mixtral):
    port.add_roe(mixtral, 2, 1.0)
    block = mixtral.model.layers[2].mlp
    forward_of_block, block.forward = block.forward, lambda x: x  # as a kernel for the whole block does
    with pytest.raises(ValueError, match="mixtral used 2 of 3 noisy routers"):
        forward(mixtral, IDS.repeat(2, 1), None)
    block.forward = forward_of_block
    port.remove_roe(mixtral)

    router = block.gate
    router.forward = lambda x: (
        None,
        torch.ones(len(x), 2) / 2,
        torch.zeros(len(x), 2).long(),
    )  # asks torch for no logits
    port.add_roe(mixtral, 2, 1.0)
    with pytest.raises(ValueError, match="MixtralTopKRouter shows RoE no logits"):
        forward(mixtral, IDS.repeat(2, 1), None)


def test_a_router_that_chooses_without_top_k(mixtral):
    """Perturbed weights need to see its logits alone; clean ones its choice, too."""
    rows = IDS.repeat(3, 1)
    port.add_roe(mixtral, 3, 1.0)
    expected = forward(mixtral, rows, None)
    for router in [layer.mlp.gate for layer in mixtral.model.layers]:

        def by_sorting(x, weight=router.weight):
            logits = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), weight)
            probs, indices = logits.softmax(-1).sort(-1, descending=True)
            return logits, probs[:, :2] / probs[:, :2].sum(-1, keepdim=True), indices[:, :2]

        router.forward = by_sorting
    torch.testing.assert_close(forward(mixtral, rows, None), expected, atol=TOLERANCE, rtol=0)
    port.add_roe(mixtral, 3, 1.0, weights="clean")
    with pytest.raises(ValueError, match="no top-k, as clean weights need it"):
        forward(mixtral, rows, None)


def test_noise_is_added_in_float32(mixtral):
    """Also in bfloat16, where its sum with the logits would be rounded."""
    model, seen = mixtral.bfloat16(), []
    port.add_roe(model, 3, 1.0, seed=2)
    router = model.model.layers[2].mlp.gate
    router.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0])))
    with torch.no_grad():
        model(IDS[:, :1].repeat(3, 1))
    ((x, logits),) = seen
    noise = port.gumbel(2, 0, 3, 5, 8)[:, 2]
    noise[0] = 0
    expected = torch.nn.functional.linear(x.view(3, -1), router.weight).float() + noise
    if transformers.__version__.startswith("5.0."):  # whose routers return the softmax
        expected = expected.softmax(-1)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)  # rounded to bfloat16 it were 4e-3 off


def test_temperatures(mixtral):
    gates = [layer.mlp.gate for layer in mixtral.model.layers]
    noisy = lambda: [gates.index(router) for router in noisy_routers(mixtral)]
    for tau, skip, expected in (
        (0.5, 1, [1, 2, 3]),
        (0.5, 0, [0, 1, 2, 3, 4]),
        (0.5, 2, [2]),
        ([0, 0, 0.1, 0, 1], 1, [2, 4]),
    ):
        port.add_roe(mixtral, 2, tau, skip)
        assert noisy() == expected
    assert mixtral.roe.tau == [0, 0, 0.1, 0, 1]


def test_temperatures_beside_a_model(tmp_path):
    """A model's own are what roe.py takes; those of a file count as numbers do."""
    from load import load

    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(ROOT / "tiny" / name)

    def found(**options):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        port.add_roe(model, 2, **options)
        return model.roe.tau

    assert found() == [0, 0.2, 0.2, 0.2, 0.2, 0]
    (tmp_path / "tau.json").write_text((ROOT / "tiny" / "tau.json").read_text())
    assert found() == load(None, "cpu")[0].config.tau != found(tau=0.5) == [0, 0.5, 0.5, 0.5, 0.5, 0]
    for wrong in ('{"tau": 0.1}', '[0, "0.1"]', "[0", "0.5"):
        (tmp_path / "tau.json").write_text(wrong)
        with pytest.raises(ValueError):
            found()


def test_temperatures_of_a_model_of_the_hub(tmp_path):
    """Without a network, from the cache: those of its newest commit, and 0.2 where that has none."""
    hub, commit = tmp_path / "hub" / "models--test--model", "a" * 40
    (hub / "refs").mkdir(parents=True)
    (hub / "snapshots" / commit).mkdir(parents=True)
    (hub / "refs" / "main").write_text(commit)
    for name in ("config.json", "model.safetensors"):
        (hub / "snapshots" / commit / name).symlink_to(ROOT / "tiny" / name)
    tau = hub / "snapshots" / commit / "tau.json"
    tau.write_text("[0, 0.7, 0.1, 0.1, 0.1, 0]")
    script = f"""
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM
sys.path.append({str(ROOT / "ports")!r})
import roe_transformers
model = AutoModelForCausalLM.from_pretrained("test/model")
roe_transformers.add_roe(model, 2)
print(model.roe.tau)
Path({str(tau)!r}).unlink()
roe_transformers.add_roe(model, 2)
print(model.roe.tau)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "[0.0, 0.7, 0.1, 0.1, 0.1, 0.0]\n[0.0, 0.2, 0.2, 0.2, 0.2, 0.0]\n", done.stderr


def test_one_seed_is_one_text(mixtral):
    def text(**options):
        port.add_roe(mixtral, 4, 1.0, **options)
        return port.generate(mixtral, IDS, max_new_tokens=30, do_sample=False)

    assert text(seed=1).equal(text(seed=1)) and not text(seed=1).equal(text(seed=2))
    port.generate(mixtral, IDS, max_new_tokens=3, do_sample=False)  # what was written before does not matter
    assert port.generate(mixtral, IDS, max_new_tokens=30, do_sample=False).equal(text(seed=2))


def test_model_generate_with_equal_rows_cache_and_average(mixtral):
    """As `generate`, but the prompt is read with n rows."""
    port.add_roe(mixtral, 4, 1.0, seed=3)
    expected = port.generate(mixtral, IDS, max_new_tokens=20, do_sample=False)
    port.add_roe(mixtral, 4, 1.0, seed=3)
    cache = {cache_name(mixtral): port.CleanCache(config=mixtral.config)}
    options = {"max_new_tokens": 20, "do_sample": False, "logits_processor": [port.Average()]}
    assert mixtral.generate(IDS.repeat(4, 1), **cache, **options).equal(expected.repeat(4, 1))


def test_average():
    scores = torch.randn(5, 64) * 3
    average = port.Average()
    expected = scores.softmax(-1).mean(0)
    got = average(IDS, scores)
    torch.testing.assert_close(got.as_subclass(torch.Tensor).softmax(-1), expected.repeat(5, 1))
    assert torch.isclose(got[0].logsumexp(0), scores[0].logsumexp(0))
    assert port.Average()(IDS, scores[:1]).equal(scores[:1])  # of one roster, the logits themselves
    assert average.overruled == (expected.argmax() != scores[0].argmax())
    half = scores.bfloat16()  # in float32, whatever the scores are
    assert port.Average()(IDS, half).equal(port.Average()(IDS, half.float()))


def test_sampling_draws_one_token_for_all_rows(mixtral):
    raw, draws = torch.randn(3, 5), []
    for position in range(4000):
        scores = port.Average()(torch.zeros(3, position + 1), raw)
        probs = torch.nn.functional.softmax(scores, -1)  # as `generate` does
        draws.append(torch.multinomial(probs, num_samples=1))
    draws = torch.stack(draws)
    assert type(draws) is torch.Tensor and draws.equal(draws[:, :1].expand(-1, 3, -1))
    frequencies = draws[:, 0, 0].bincount(minlength=5) / 4000
    assert (frequencies - probs[0]).abs().max() < 0.04  # five times sqrt(1 / 4 / 4000)

    options = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "max_new_tokens": 20}
    several = []
    for seed in (0, 0, 1):
        port.add_roe(mixtral, 4, 1.0, seed=seed)
        several.append(port.generate(mixtral, IDS, **options, return_dict_in_generate=True).sequences)
    assert all(rows.equal(rows[:1].expand(4, -1)) for rows in several)
    assert several[0].equal(several[1]) and not several[0].equal(several[2])


def test_what_is_handed_on(mixtral):
    """Streamers see one row, logits processors the average, stopping criteria stop."""
    put, seen = [], []
    streamer = SimpleNamespace(put=put.append, end=lambda: put.append(None))
    port.add_roe(mixtral, 3, 1.0)
    stop = lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= PROMPT + 4)
    options = {"streamer": streamer, "stopping_criteria": [stop], "max_new_tokens": 9, "do_sample": False}
    out = port.generate(mixtral, IDS, logits_processor=[lambda ids, scores: seen.append(scores) or scores], **options)
    assert out.shape == (1, PROMPT + 4) and put.pop() is None
    assert torch.cat([ids.view(1, -1) for ids in put], 1).equal(out)
    assert all(scores[0].equal(scores[2]) for scores in seen)


# ---- What else is done to models, and around them --------------------------------------------------------------------

GREEDY = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture
def noisy(mixtral):
    """A model with RoE, and the text that it writes."""
    port.add_roe(mixtral, 3, 1.0)
    return mixtral, port.generate(mixtral, IDS, **GREEDY)


def test_a_cache_that_is_handed_over(noisy):
    """It holds a beginning of the text, of which the rest is read: cut and continued is one text, and a turn of a chat
    costs its own length."""
    model, expected = noisy
    cache, read = port.CleanCache(config=model.config), []
    embed = model.get_input_embeddings()
    hook = embed.register_forward_hook(lambda _, args, out: read.append(args[0].shape[1]))
    ids = port.generate(model, IDS, cache=cache, **GREEDY | {"max_new_tokens": 4})
    assert read == [PROMPT - 1] + [1] * 4 and cache.get_seq_length() == PROMPT + 3
    read.clear()
    assert port.generate(model, ids, cache=cache, **GREEDY | {"max_new_tokens": 6}).equal(expected)
    assert read == [1] * 6
    turn = torch.cat((expected, IDS[:, :5]), 1)
    read.clear()
    answer = port.generate(model, turn, cache=cache, **GREEDY)
    assert read == [5] + [1] * 10  # the token that was written last was not read
    hook.remove()
    assert answer.equal(port.generate(model, turn, **GREEDY))
    for other in (IDS, answer[:, : PROMPT + 8], torch.cat((IDS[:, :1] + 1, answer[:, 1:], IDS), 1)):
        with pytest.raises(ValueError, match="^the cache must be .* it holds 44$"):
            port.generate(model, other, cache=cache, **GREEDY)
    with pytest.raises(ValueError, match="must be a CleanCache"):
        port.generate(model, IDS, cache=DynamicCache(config=model.config), **GREEDY)
    embedded = port.CleanCache(config=model.config)
    with torch.inference_mode():
        model(inputs_embeds=embed(IDS[:, :5]), **{cache_name(model): embedded})
    with pytest.raises(ValueError, match="it holds 5$"):  # whose ids nobody knows
        port.generate(model, IDS, cache=embedded, **GREEDY)


def test_use_cache_false_changes_nothing(noisy):
    model, expected = noisy
    assert port.generate(model, IDS, use_cache=False, **GREEDY).equal(expected)
    model.generation_config.use_cache = False
    assert port.generate(model, IDS, logits_processor=None, **GREEDY).equal(expected)


@pytest.mark.parametrize("first", ["add_roe", "get_peft_model"])
@pytest.mark.parametrize("adapted", [{}, {"target_parameters": ["gate.weight"]}], ids=["attention", "routers"])
def test_adapters_of_peft(noisy, adapted, first):
    """As with the weights that result when the adapter is merged, whether RoE came before or after it."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"], **adapted)
    model, without = noisy
    port.remove_roe(model)
    merged = copy.deepcopy(model)
    torch.manual_seed(1)
    merged = peft.get_peft_model(merged, config).merge_and_unload()
    port.add_roe(merged, 3, 1.0)
    if first == "add_roe":
        port.add_roe(model, 3, 1.0)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, config)
    if first != "add_roe":
        port.add_roe(wrapped, 3, 1.0)
    expected = port.generate(merged, IDS, **GREEDY)
    assert port.generate(wrapped, IDS, **GREEDY).equal(expected) and not expected.equal(without)
    options = GREEDY | {"logits_processor": [port.Average()], cache_name(model): port.CleanCache(config=model.config)}
    assert wrapped.generate(input_ids=IDS.repeat(3, 1), **options).equal(expected.repeat(3, 1))
    port.remove_roe(wrapped)
    assert not hasattr(model, "roe") and noisy_routers(model) == []


def test_learned_prompts_of_peft_are_refused(mixtral):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = peft.get_peft_model(mixtral, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="prompts that PEFT has learned"):
        port.add_roe(model, 3)


@pytest.mark.parametrize("weights", ["perturbed", "clean"])
def test_offloading_before_and_after(mixtral, weights):
    """accelerate's hooks, which bring a module's weights when it runs, stay where they are."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    own = mixtral.generate(IDS, **GREEDY)
    port.add_roe(mixtral, 3, 1.0, weights=weights)
    expected = port.generate(mixtral, IDS, **GREEDY)
    accelerate.cpu_offload(mixtral, execution_device="cpu")
    assert next(mixtral.model.layers[2].mlp.gate.parameters()).is_meta
    assert port.generate(mixtral, IDS, **GREEDY).equal(expected)
    port.remove_roe(mixtral)
    assert mixtral.generate(IDS, **GREEDY).equal(own)
    port.add_roe(mixtral, 3, 1.0, weights=weights)
    assert port.generate(mixtral, IDS, **GREEDY).equal(expected)


def test_copies_and_files_have_a_roe_of_their_own(noisy, tmp_path):
    model, expected = noisy
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    port.remove_roe(plain)
    assert noisy_routers(plain) == [] and len(noisy_routers(model)) == 3
    assert port.generate(model, IDS, **GREEDY).equal(expected)
    other.roe.seed = 1
    assert not port.generate(other, IDS, **GREEDY).equal(expected)
    port.remove_roe(model)
    assert len(noisy_routers(other)) == 3 and port.generate(other, IDS, **GREEDY).shape == expected.shape
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    assert port.generate(read, IDS, **GREEDY).equal(expected)
    read.save_pretrained(tmp_path)
    assert "roe" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("weights", ["perturbed", "clean"])
@pytest.mark.skipif(OLDEST, reason="transformers 5.0 cannot compile its mixtures in float32, with RoE or without")
def test_torch_compile_changes_nothing(mixtral, weights):
    port.add_roe(mixtral, 3, 1.0, weights=weights)
    expected = port.generate(mixtral, IDS, **GREEDY)
    mixtral.compile(backend="eager")
    for _ in range(2):
        assert port.generate(mixtral, IDS, **GREEDY).equal(expected)
    torch.compiler.reset()


def test_the_inner_model(noisy):
    """Its cache counts however it is handed over, and others are refused as everywhere."""
    model, _ = noisy
    name, one = cache_name(model), lambda: port.CleanCache(config=model.config)
    place = [*inspect.signature(model.model.forward).parameters].index(name)
    by_name, by_position = one(), one()
    with torch.inference_mode():
        for ids in (IDS[:, :-1], IDS[:, -1:].repeat(3, 1)):
            expected = model.model(input_ids=ids, **{name: by_name})[0]
            got = model.model(ids, *[None] * (place - 1), by_position)[0]
            assert got.equal(expected)
    assert not got[1].equal(got[0])
    rows, own = IDS.repeat(3, 1), DynamicCache(config=model.config)
    for args, kwargs in (((*[None] * (place - 1), own), {}), ((), {name: own}), ((), {"history": one()})):
        with pytest.raises(ValueError, match="one row, or 3 equal ones"):
            model.model(rows, *args, **kwargs)


def test_what_goes_past_the_hooks_is_noticed(noisy):
    model, _ = noisy

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner.forward(*args, **kwargs)  # not by a call, with which hooks run

    model.model = Wrapped(model.model)
    with pytest.raises(ValueError, match="not every token had rosters"):
        port.generate(model, IDS, **GREEDY)


def test_threads_share_a_model(noisy):
    model, expected = noisy
    texts = []
    write = lambda: texts.extend(port.generate(model, IDS, **GREEDY) for _ in range(4))
    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 12 and all(text.equal(expected) for text in texts)


def test_an_error_leaves_no_noise_behind(noisy):
    model, expected = noisy
    router = model.model.layers[2].mlp.gate

    def fail(_, args):
        if len(args[0]) == 3:  # not while one row reads the prompt
            raise ZeroDivisionError

    hook = router.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        port.generate(model, IDS, **GREEDY)
    hook.remove()
    x = torch.randn(3, 32)
    assert router(x)[0].equal(copy.deepcopy(router)(x)[0]) and port.RUN.get() is None
    assert contextvars.Context().run(router, x)[0].equal(router(x)[0])  # nor where no model has run
    assert torch._C._len_torch_function_stack() == 0
    assert port.generate(model, IDS, **GREEDY).equal(expected)


# ---- The embedded model, against roe.py ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both():
    """The embedded model in float32: here, and in roe.py; and the ids of a prompt."""
    from load import load

    ours, tokenizer = load(None, "cpu", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "tiny", dtype=torch.float32)
    return model, ours, tokenizer.encode("class Stack:\n    def push(self, item):\n").ids


def test_noise_is_that_of_roe_py():
    import roe

    assert inspect.getsource(port.gumbel) == inspect.getsource(roe.gumbel)


@pytest.mark.parametrize("weights", ["perturbed", "clean"])
def test_rows_equal_those_of_roe_py(both, weights):
    import roe
    from cache import SharedCache

    model, ours, tokens = both
    n, tau, seed = 6, 0.6, 2**40 + 1
    port.add_roe(model, n, tau, seed=seed, weights=weights)
    cache, history = port.CleanCache(config=model.config), SharedCache(ours.config, len(tokens))
    forward(model, torch.tensor([tokens[:-3]]), cache)
    for start in range(len(tokens) - 3, len(tokens)):
        read = tokens[history.length : start + 1]
        expected = roe.predict(ours, read, history, n, tau, seed, weights)
        got = forward(model, torch.tensor([tokens[start : start + 1]] * n), cache)
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
        assert (expected[1:] - expected[0]).abs().amax(-1).min() > 100 * TOLERANCE


@pytest.mark.parametrize("weights", ["perturbed", "clean"])
@pytest.mark.parametrize("seed", [1, 3])  # with which rosters overrule
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_one_seed_is_one_text_here_and_in_roe_py(both, temperature, seed, weights):
    """Greedy and sampled, in one go, and cut and continued."""
    import roe

    model, ours, tokens = both
    n, tau, new = 8, 0.6, 60
    written = {"max_new_tokens": new, "temperature": temperature, "top_p": 0.9, "seed": seed, "weights": weights}
    expected = list(roe.generate(ours, tokens, n, tau, **written))
    options = {"do_sample": True, "temperature": temperature, "top_p": 0.9, "top_k": 0} if temperature else {}
    port.add_roe(model, n, tau, seed=seed, weights=weights)
    for pieces in ([new], [17, 1, new - 18]):
        ids = torch.tensor([tokens])
        for more in pieces:
            ids = port.generate(model, ids, max_new_tokens=more, **options)
        assert len(expected) == new and ids[0].tolist() == tokens + expected
    assert expected != list(roe.generate(ours, tokens, 1, tau, **written))


SETTINGS |= {"tau and weights": {"tau": 2.0, "weights": "clean"}, "tau and seed": {"tau": 2.0, "seed": -(2**40)}}


@pytest.fixture
def program(monkeypatch, capsys, tmp_path):
    """The program in this process, in a folder of its own: returns what it prints, and its line of statistics."""
    monkeypatch.chdir(tmp_path)

    def write(*arguments, stdin="", model=ROOT / "tiny"):
        monkeypatch.setattr(sys, "argv", ["roe_transformers.py", "--model", str(model), *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        runpy.run_path(str(ROOT / "ports" / "roe_transformers.py"), run_name="__main__")
        out, err = capsys.readouterr()
        return out, next(line for line in err.splitlines() if "tokens/s" in line)

    return write


def by_roe(ours, tokens, tau=None, skip=1, rosters=4, **arguments):
    """What roe.py writes, the bytes of its cache, and on how many tokens its average chose another than row 0."""
    import load
    import roe

    overruled, nbytes = [], []

    def watch(logits, log_probs, tokens, cache):
        overruled.append(log_probs.argmax() != logits[0].argmax())
        nbytes.append(cache.nbytes)

    tau = roe.temperatures(ours.config, load.read_tau(tau) if isinstance(tau, str) else tau, skip)
    written = list(roe.generate(ours, tokens, rosters, tau, watch=watch, **arguments))
    return written, nbytes[0], sum(overruled)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_from_their_doors_to_their_places(both, program, tmp_path, name):
    """Arguments of `add_roe` and `generate`, and the program's options, against roe.py with the same."""
    from load import read_tokenizer

    model, ours, _ = both
    (tmp_path / "other.json").write_text("[1.5, 0, 0.5, 3, 0, 1]")
    tokenizer, settings = read_tokenizer(ROOT / "tiny"), SETTINGS[name]
    tokens, many = tokenizer.encode("class Stack:").ids, {"max_new_tokens": 30}
    expected, nbytes, overruled = by_roe(ours, tokens, **many | settings)
    before = dict([*settings.items()][:-1])
    assert not settings or by_roe(ours, tokens, **many | before)[0] != expected

    port.add_roe(model, **{"rosters": 4} | {key: settings[key] for key in settings.keys() & port_arguments()})
    others = {key: value for key, value in (many | settings).items() if key not in port_arguments()}
    others |= {"do_sample": True, "top_k": 0} if "temperature" in others else {"do_sample": False}
    average = port.Average(settings.get("seed", 0))
    ids = port.generate(model, torch.tensor([tokens]), average=average, **others)
    assert ids[0].tolist() == tokens + expected and average.overruled == overruled

    out, line = program("--prompt", "class Stack:", "--dtype", "float32", *options(many | settings))
    assert out == tokenizer.decode(expected) + "\n"
    assert line.startswith(f"{len(expected)} tokens, ")
    assert f"rosters: {settings.get('rosters', 4)}, cache: {nbytes:,} bytes; the average overruled" in line
    assert line.endswith(f" the clean roster on {overruled} of the tokens")


def port_arguments():
    return inspect.signature(port.add_roe).parameters.keys()


def test_the_programs_other_options(program, tmp_path, monkeypatch):
    """Standard input, the chat template, types, and how many tokens, for a tokenizer that begins texts with one."""
    from load import load

    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(ROOT / "tiny" / name)
    tokenizer = json.loads((ROOT / "tiny" / "tokenizer.json").read_text())
    begin = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    single = [{"SpecialToken": {"id": begin["id"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {begin["id"]: begin}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": template}))
    turn = "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(turn + "{% if add_generation_prompt %}def {% endif %}")
    ours, tokenizer = load(tmp_path, "cpu", "float32")
    options = ["--dtype", "float32", "--max-new-tokens"]
    plain = tokenizer.encode("class Stack:").ids
    chat = tokenizer.encode("# user\nclass Stack:\ndef ", add_special_tokens=False).ids
    assert plain[0] == 0 != chat[0]
    for tokens, arguments, stdin in (
        (plain, ["--prompt", "class Stack:"], ""),
        (plain, ["--prompt", "-"], "class Stack:"),
        (chat, ["--prompt", "class Stack:", "--chat"], ""),
    ):
        expected, nbytes, _ = by_roe(ours, tokens, max_new_tokens=20)
        out, line = program(*arguments, *options, "20", model=tmp_path, stdin=stdin)
        assert out == tokenizer.decode(expected) + "\n" and f"cache: {nbytes:,} bytes" in line
    expected, nbytes, _ = by_roe(ours, plain, max_new_tokens=128)  # as many as by default
    assert f"cache: {nbytes:,} bytes" in program("--prompt", "class Stack:", *options[:2], model=tmp_path)[1]
    _, nbytes, _ = by_roe(ours, plain, max_new_tokens=3)
    for dtype in (["--dtype", "bfloat16"], []):  # as the weights are stored
        line = program("--prompt", "class Stack:", "--max-new-tokens", "3", *dtype, model=tmp_path)[1]
        assert f"cache: {nbytes // 2:,} bytes" in line
    assert "1 tokens, " in program("--prompt", "x", "--max-new-tokens", "1")[1]
    ticks = itertools.count()  # read when the prompt and when each token is put, at 0, 1, 4, 9, ... milliseconds
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) ** 2 / 1000)
    line = program("--prompt", "x", "--max-new-tokens", "5")[1]
    assert line.startswith("5 tokens, 166.7 tokens/s, ")  # four in 25 - 1 milliseconds, after the first


def test_the_token_that_ends_a_text_is_not_printed(both, program, tmp_path):
    """A special one, as such tokens are; roe.py stops before it."""
    from load import load

    _, ours, _ = both
    for name in ("model.safetensors", "tokenizer_config.json", "tau.json"):
        (tmp_path / name).symlink_to(ROOT / "tiny" / name)
    tokenizer = json.loads((ROOT / "tiny" / "tokenizer.json").read_text())
    end = by_roe(ours, load(None, "cpu")[1].encode("class Stack:").ids, max_new_tokens=12)[0][-1]
    (content,) = [token for token, index in tokenizer["model"]["vocab"].items() if index == end]
    added = tokenizer["added_tokens"][0] | {"id": end, "content": content, "special": True}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(tokenizer | {"added_tokens": [*tokenizer["added_tokens"], added]})
    )
    config = json.loads((ROOT / "tiny" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))
    model, tokenizer = load(tmp_path, "cpu", "float32")
    expected = by_roe(model, tokenizer.encode("class Stack:").ids)[0]
    assert 0 < len(expected) < 12
    out, _ = program("--prompt", "class Stack:", "--dtype", "float32", model=tmp_path)
    assert out == tokenizer.decode(expected) + "\n"


def run(*arguments, processes=0):
    program = [str(ROOT / "ports" / "roe_transformers.py"), "--model", str(ROOT / "tiny"), "--dtype", "float32"]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *start, *program, *arguments], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("processes", [0, 2])
def test_the_program(processes):
    """It writes what roe.py writes, by default with the temperatures beside the model; in one process and in two."""
    import roe
    from load import load

    if processes:
        if OLDEST:
            pytest.skip("transformers 5.0 asks for tensor parallelism otherwise")
        pytest.importorskip("accelerate", reason="transformers needs it for more than one process")
    model, tokenizer = load(None, "cpu", "float32")
    options = {"seed": 5, "max_new_tokens": 24, "temperature": 0.9, "top_p": 0.8}
    tokens = list(roe.generate(model, tokenizer.encode("class Stack:").ids, 3, **options))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    done = run("--prompt", "class Stack:", "--rosters", "3", *flags, processes=processes)
    assert done.returncode == 0 and done.stdout == tokenizer.decode(tokens) + "\n", done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "tokens/s" in line]
    assert line.startswith("24 tokens, ") and "rosters: 3, cache: " in line and "the average overruled" in line


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "tau.json").write_text("{}")
    for arguments, message in (
        (("--rosters", "0"), "rosters=0"),
        (("--prompt", ""), "one text"),
        (("--temperature", "-1"), "--temperature must be 0 (greedy) or more, not -1.0"),
        (("--temperature", "nan"), "--temperature must be"),
        (("--tau", str(tmp_path / "tau.json")), "is not a JSON list of numbers"),
        (("--tau", "high"), "'high'"),
    ):
        done = run("--prompt", "x", *arguments)
        assert done.returncode == 2 and done.stdout == ""
        (line,) = [line for line in done.stderr.splitlines() if line and "Loading weights" not in line]
        assert line.startswith("roe_transformers.py: error: ") and message in line
