"""The transformers port against independent runs of the plain models, family by family, with small random weights.

Tolerance: float32 sums in another order differ by about 1e-6 of the largest term, which a few layers amplify; logits
here are of order 1 to 10, so that 1e-4 is far above the rounding and far below the effect of noise (above 1e-2).
"""

import contextlib
import copy
import inspect
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24", reason="the port was written against 5.24")
from transformers import AutoConfig, DynamicCache

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "ports")]
import roe_transformers as port

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
SETTINGS = {  # of those refused
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


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    rule, settings = FAMILIES[request.param]
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
        if weights == "clean" and len(out) == 3:
            return out[0], weigh(rule, R, out[2][0], router)[None], out[2]
        if weights == "clean":  # Llama 4: the weights of all experts, 0 where they are not chosen
            chosen = out[0][0].nonzero()[:, 0]
            return torch.zeros_like(out[0]).scatter(1, chosen[None], weigh(rule, R, chosen, router)[None]), out[1]

    inputs = linear if hasattr(router, "proj") else router  # Gemma 4 normalises x first
    stack.callback(inputs.register_forward_pre_hook(before).remove)
    stack.callback(router.register_forward_hook(after).remove)


@pytest.mark.parametrize("weights", ["perturbed", "clean"])
def test_every_row_equals_a_run_of_its_own(family, weights, monkeypatch):
    rule, model = family
    n, tau, noise, gumbel = 4, 1.0, [], port.gumbel
    monkeypatch.setattr(port, "gumbel", lambda *args: noise.append(gumbel(*args)) or noise[-1])
    port.add_roe(model, n, tau, seed=2, weights=weights)
    routers = [m for m in model.modules() if isinstance(vars(m).get("forward"), port.NoisyForward)]
    cache = port.CleanCache(config=model.config)
    forward(model, IDS[:, :-2], cache)
    assert not noise
    rows = [forward(model, ids.repeat(n, 1), cache) for ids in (IDS[:, -2:-1], IDS[:, -1:])]
    port.remove_roe(model)
    widths = [next(p for p in router.parameters() if p.dim() == 2).shape[0] for router in routers]
    assert [g.shape for g in noise] == [(n - 1, width) for width in widths] * 2 and routers

    history = DynamicCache(config=model.config)
    forward(model, IDS[:, :-2], history)
    scale = max(1.0, rows[0].abs().max().item())  # Granite multiplies, and with its logits their rounding
    close, moved = partial(torch.testing.assert_close, atol=TOLERANCE * scale, rtol=0), []
    for ids, got, drawn in zip((IDS[:, -2:-1], IDS[:, -1:]), rows, (noise[: len(routers)], noise[len(routers) :])):
        for row in range(1, n):
            with contextlib.ExitStack() as stack:
                for router, g in zip(routers, drawn):
                    shift(stack, router, tau * g[row - 1], rule, weights)
                close(forward(model, ids, copy.deepcopy(history))[0], got[row])
            moved.append((got[row] - got[0]).abs().max() > 100 * TOLERANCE)
        close(forward(model, ids, history)[0], got[0])
    assert sum(moved) > 1  # where noise chose the same experts, "clean" rows equal row 0
    nbytes = lambda cache: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert nbytes(cache) == nbytes(history)


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
    model = copy.deepcopy(model).bfloat16()
    expected, dtype = own_text(model), forward(model, IDS, None).dtype
    port.add_roe(model, 1)
    assert port.generate(model, IDS, max_new_tokens=NEW, do_sample=False).equal(expected)
    for weights in ("clean", "perturbed"):
        port.add_roe(model, 3, 1.0, weights=weights)
        logits = forward(model, IDS.repeat(3, 1), port.CleanCache(config=model.config))
        assert logits.dtype == dtype and logits.isfinite().all()


# ---- Models that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = AutoConfig.for_model(name, **BASE | SETTINGS.get(name, {}))
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
    for wrong in ({"rosters": 0}, {"skip": -1}, {"tau": -0.1}, {"tau": [0.1] * 4}, {"weights": "softmax"}):
        with pytest.raises(ValueError, match=f"{[*wrong][0]}="):
            port.add_roe(mixtral, **{"rosters": 2} | wrong)
    with pytest.raises(ValueError, match="after add_roe"):
        port.generate(mixtral, IDS)
    port.add_roe(mixtral, 3)
    with pytest.raises(ValueError, match="one row, or 3 equal ones"):
        forward(mixtral, IDS.repeat(2, 1), None)
    with pytest.raises(ValueError, match="one text"):
        port.generate(mixtral, IDS.repeat(3, 1))
    with pytest.raises(ValueError, match="without padding"):
        port.generate(mixtral, IDS, (IDS > 30).long())


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


def test_temperatures(mixtral):
    noisy = lambda: [i for i, layer in enumerate(mixtral.model.layers) if "forward" in vars(layer.mlp.gate)]
    for tau, skip, expected in (
        (0.5, 1, [1, 2, 3]),
        (0.5, 0, [0, 1, 2, 3, 4]),
        (0.5, 2, [2]),
        ([0, 0, 0.1, 0, 1], 1, [2, 4]),
    ):
        port.add_roe(mixtral, 2, tau, skip)
        assert noisy() == expected
    assert [mixtral.model.layers[i].mlp.gate.forward.tau for i in (2, 4)] == [0.1, 1]


def test_one_seed_is_one_text(mixtral):
    def text(**options):
        port.add_roe(mixtral, 4, 1.0, **options)
        return port.generate(mixtral, IDS, max_new_tokens=30, do_sample=False)

    assert text(seed=1).equal(text(seed=1)) and not text(seed=1).equal(text(seed=2))
    port.generate(mixtral, IDS, max_new_tokens=3, do_sample=False)  # noise starts anew for every text
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
    got = average(None, scores)
    torch.testing.assert_close(got.as_subclass(torch.Tensor).exp(), expected.repeat(5, 1))
    assert average.overruled == (expected.argmax() != scores[0].argmax())


def test_sampling_draws_one_token_for_all_rows(mixtral):
    scores = port.Average()(None, torch.randn(3, 5))
    probs = torch.nn.functional.softmax(scores, -1)  # as `generate` does
    draws = torch.stack([torch.multinomial(probs, num_samples=1) for _ in range(4000)])
    assert type(draws) is torch.Tensor and draws.equal(draws[:, :1].expand(-1, 3, -1))
    frequencies = draws[:, 0, 0].bincount(minlength=5) / 4000
    assert (frequencies - probs[0]).abs().max() < 0.04  # five times sqrt(1 / 4 / 4000)

    port.add_roe(mixtral, 4, 1.0)
    options = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "max_new_tokens": 20}
    several = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
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
    assert all(scores[0].logsumexp(0).abs() < 1e-5 and scores[0].equal(scores[2]) for scores in seen)


# ---- The embedded model, against roe.py ------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["perturbed", "clean"])
def test_rows_equal_those_of_roe_py(weights, monkeypatch):
    import roe
    from cache import SharedCache
    from load import load

    ours, tokenizer = load(None, "cpu", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "tiny", dtype=torch.float32)
    tokens = tokenizer.encode("class Stack:\n    def push(self, item):\n").ids
    n, tau = 6, 0.6
    noise = [roe.gumbel((n - 1, 16), torch.Generator().manual_seed(i)) for i in range(64)]
    for module, shape in ((roe, (n - 1, 1, 16)), (port, (n - 1, 16))):
        draws = iter(noise)
        monkeypatch.setattr(module, "gumbel", lambda _, generator, draws=draws, shape=shape: next(draws).view(shape))
    port.add_roe(model, n, tau, weights=weights)
    cache, history = port.CleanCache(config=model.config), SharedCache(ours.config, len(tokens))
    forward(model, torch.tensor([tokens[:-3]]), cache)
    expected = []
    for step in range(3):
        read = tokens[: len(tokens) - 2] if step == 0 else tokens[len(tokens) - 3 + step : len(tokens) - 2 + step]
        expected.append(roe.predict(ours, read, history, n, tau, torch.Generator(), weights))
        got = forward(model, torch.tensor([tokens[len(tokens) - 3 + step : len(tokens) - 2 + step]] * n), cache)
        torch.testing.assert_close(got, expected[-1], atol=TOLERANCE, rtol=0)
    assert (expected[0][1:] - expected[0][0]).abs().amax(-1).min() > 100 * TOLERANCE


def run(*arguments, processes=0):
    program = [str(ROOT / "ports" / "roe_transformers.py"), "--model", str(ROOT / "tiny"), "--dtype", "float32"]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *start, *program, *arguments], env=environment, capture_output=True, text=True
    )


def test_the_program():
    """It writes what roe.py writes, in one process and in two."""
    import roe
    from load import load

    model, tokenizer = load(None, "cpu", "float32")
    prompt, options = "class Stack:", ("--rosters", "3", "--tau", "0.4", "--seed", "5", "--max-new-tokens", "24")
    tokens = list(
        roe.generate(model, tokenizer.encode(prompt).ids, 3, 0.4, seed=5, max_new_tokens=24, weights=port.WEIGHTS)
    )
    for processes in (0, 2):
        done = run("--prompt", prompt, *options, processes=processes)
        assert done.returncode == 0 and done.stdout == tokenizer.decode(tokens) + "\n", done.stderr
        (line,) = [line for line in done.stderr.splitlines() if "tokens/s" in line]
        assert line.startswith("24 tokens, ") and "rosters: 3, cache: " in line and "the average overruled" in line


def test_bad_input_is_one_line():
    done = run("--prompt", "x", "--rosters", "0")
    assert done.returncode == 2 and done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "roe_transformers.py: error: rosters=0" in line]
