"""What fast/ replaces computes what the plain model does. Tolerances are those of test_roe.py."""

import copy
import ctypes
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import model as plain_model
import roe
from cache import BranchingCache, SharedCache
from fast import speed_up
from fast.cpu import FastLinear, SortedExperts, keep_memory, pack, quick_attend, widens_on
from fast.gpu import StackedExperts, groups_on
from load import load
from model import Config, Expert, Experts, OLMoE
from test_roe import (
    ATTEND,
    CLOSE,
    EXPERTS,
    SIZES,
    SMALL,
    TAU,
    check_attend,
    check_experts,
    config_of,
    random_tokens,
    save,
)


def wide_attend(*args):
    """`quick_attend` as on a processor that multiplies in float32 only: widened once, if from float32, too."""
    answers = itertools.chain((True,), itertools.repeat(False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fast.cpu.widens_on", lambda _: next(answers))
        return quick_attend(*args)


def widen(monkeypatch):
    """Makes of this processor one that multiplies in float32 only, whatever the dtype of a model is."""
    monkeypatch.setattr("fast.cpu.pack", lambda weight: weight)
    monkeypatch.setattr("fast.cpu.widens_on", lambda _: True)
    monkeypatch.setattr("fast.quick_attend", wide_attend)


def refuse(*_):
    """Raises a RuntimeError, as an operator does."""
    return torch.empty(2, 3) @ torch.empty(2, 3)


# In bfloat16 all are off from float32 by the same roundings in another order; the median skips experts that these flip.
@pytest.mark.parametrize("wide", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@torch.inference_mode()
def test_fast_equals_plain(tmp_path, monkeypatch, dtype, wide):
    """What `speed_up` replaces computes what the plain model does: prompts, long histories, one row and several."""
    if wide:
        widen(monkeypatch)
    hf = save(tmp_path, dtype, {"max_position_embeddings": 1024, "num_key_value_heads": 2})
    fast, plain, exact = (load(tmp_path, "cpu", *how)[0] for how in ((dtype,), (dtype, False), ("float32", False)))
    tokens, results = torch.tensor([random_tokens(620)]), []
    for model in (fast, plain, exact):
        cache = SharedCache(model.config, 620)
        run = lambda i, j: roe.run_rosters(model, tokens[0, i:j], cache, i, 5, TAU, 0, "perturbed").flatten(0, 1)
        parts = [model(tokens[:, :600], cache)[0], model(tokens[:, 600:610], cache)[0], run(610, 611), run(611, 616)]
        cache.length = 0
        results.append(torch.cat([*parts, run(0, 3)]).float())
    if dtype == torch.float32:
        torch.testing.assert_close(results[0], results[1], **CLOSE)
    else:
        results.append(hf(tokens[:, :610]).logits[0])
        fast, plain, _, theirs = ((result - results[2][: len(result)]).abs().median() for result in results)
        assert 0 < fast < 1.25 * min(plain, theirs)


def test_where_tricks_pay(monkeypatch):
    weight = torch.ones(1024, 512)
    assert not any(pack(same).is_mkldnn for same in (weight[1:], weight.half(), weight.to("meta")))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    assert widens_on(weight.bfloat16())
    assert not (widens_on(weight) or widens_on(weight.half()) or widens_on(weight.bfloat16().to("meta")))
    good = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (48, 64), "device": "cuda", "capability": (9, 0)}
    bad = {"is_cuda": (False,), "dtype": (torch.float16, torch.float32), "shape": ((48, 60), (50, 64))}
    bad |= {"capability": ((8, 0), (8, 9), (12, 0))}
    cases = [({}, True), ({"capability": (10, 0)}, True)]
    for change, expected in cases + [({name: value}, False) for name, values in bad.items() for value in values]:
        weight = SimpleNamespace(**good | change)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: weight.capability)
        assert groups_on(weight) == expected, change


@torch.inference_mode()
def test_packed_weights(tmp_path, monkeypatch):
    """The matrices of a bfloat16 model are packed as they are read, the same numbers; or not, without the operators."""
    save(tmp_path, torch.bfloat16)
    fast, plain = load(tmp_path, "cpu", "bfloat16")[0], load(tmp_path, "cpu", "bfloat16", fast=False)[0]
    assert fast.lm_head.weight.is_mkldnn == pack(plain.lm_head.weight).is_mkldnn
    if not fast.lm_head.weight.is_mkldnn:
        pytest.skip("nothing is packed on this processor")
    for layer, other in zip(fast.model.layers, plain.model.layers, strict=True):
        assert torch.equal(layer.self_attn.k_proj.weight.to_dense(), other.self_attn.k_proj.weight)
        experts = layer.mlp.experts
        for gate_up, down, same in zip(experts.gate_up_proj, experts.down_proj, other.mlp.experts, strict=True):
            assert torch.equal(gate_up.weight.to_dense(), torch.cat((same.gate_proj.weight, same.up_proj.weight)))
            assert torch.equal(down.weight.to_dense(), same.down_proj.weight)


@torch.inference_mode()
def test_operators_that_are_lost(tmp_path, monkeypatch):
    save(tmp_path, torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    fast, plain = load(tmp_path, "cpu", "bfloat16")[0], load(tmp_path, "cpu", "bfloat16", fast=False)[0]
    tokens = torch.tensor([random_tokens(40)])
    assert not fast.lm_head.weight.is_mkldnn
    assert (fast(tokens) - plain(tokens)).abs().median() < 0.1  # of logits of order 1 to 10, in bfloat16


@pytest.mark.parametrize("lost", (False, True))
@pytest.mark.parametrize("wide", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@torch.inference_mode()
def test_linear(monkeypatch, dtype, wide, lost):
    """Sums of 600 products of order 1 are made in float32, and then rounded once, in half precision by up to 2^-9."""
    if lost:  # an operator that PyTorch does not document
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", refuse)
    weight = torch.randn(4000, 600).to(dtype)  # three blocks, the last one smaller
    if wide:
        widen(monkeypatch)
    linear = FastLinear(weight)
    assert linear.wide or not wide
    rtol, atol = (0, 4e-4) if dtype == torch.float32 else (2**-8, 1e-3)
    for shape in ((1,), (2, 3), (1, 8), (40,)):
        x = torch.randn(*shape, 600).to(dtype)
        exact = x.double() @ weight.double().T
        torch.testing.assert_close(linear(x).double(), exact, rtol=rtol, atol=atol)


LONG = [(1, T, 600, 0, 256, 4, 2) for T in (1, 130, 600)]  # a query alone, the last of a text, and all of it


@pytest.mark.parametrize("dtype, atol", ATTEND)
@pytest.mark.parametrize("sizes", SIZES + LONG)
@pytest.mark.parametrize("attend", (quick_attend, wide_attend))
def test_attend(attend, sizes, dtype, atol):
    check_attend(attend, sizes, dtype, atol)


@pytest.mark.parametrize("dtype, atol", EXPERTS)
@pytest.mark.parametrize("make", (SortedExperts, StackedExperts))
@torch.inference_mode()
def test_experts(make, dtype, atol):
    check_experts(make, dtype, atol)


@pytest.mark.parametrize("case", range(20))
@torch.inference_mode()
def test_shapes_at_random(case):
    """Attention to shared and own positions in any number, and any experts that rows choose; by all forms of both."""
    r = random.Random(case)
    heads, n, T, own = r.randint(1, 6), r.randint(1, 5), r.randint(1, 40), r.randint(0, 3)
    rows = r.choice(((1, T, T + r.randint(0, 300), 0), (n, T, T - 1 + r.randint(0, 300), 1), (n, 1, T - 1, 1 + own)))
    for form in (plain_model.attend, quick_attend, wide_attend):
        check_attend(form, (*rows, 2 * r.randint(1, 16), heads * r.randint(1, 4), heads), torch.float32, 1e-5)
    count, size = r.randint(1, 9), 8 * r.randint(1, 6)
    torch.manual_seed(case)
    plain = Experts(Expert(Config(0, 16, size, 1, 1, 1, count, 1, 0)) for _ in range(count))
    x = torch.randn(n, T, 16)
    weights, indices = torch.rand(n, T, count).topk(r.randint(1, count))
    expected = plain(x, weights, indices)
    for form in (SortedExperts, StackedExperts):
        result = form(copy.deepcopy(plain))(x, weights, indices)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch was built without CUDA")
@pytest.mark.parametrize("fast", (False, True))
def test_on_a_gpu_without_one(monkeypatch, fast):
    """Tensors without values raise where an operation mixes devices: users' ids and noise come from the CPU."""
    monkeypatch.setattr("fast.groups_on", lambda _: True)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = OLMoE(config_of(SMALL)).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        for layer in [] if fast else model.model.layers:
            layer.mlp.experts = StackedExperts(layer.mlp.experts)  # the plain ones loop over values, which are missing
        if fast:
            model = speed_up(model)
        for cache in (SharedCache(model.config, 40), BranchingCache(model.config, 40, 4, 2, 1)):
            logits = roe.predict(model, [1, 2, 3], cache, 4, TAU, 0)
            assert logits.device.type == roe.aggregate(logits).device.type == "cuda" and logits.shape == (4, 304)
        cache = SharedCache(model.config, 40)
        assert roe.run_rosters(model, roe.as_ids(range(20), model.device), cache, 0, 4, TAU, 0, "clean").is_cuda


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library is not glibc")
def test_memory_that_is_freed_is_used_again():
    """16 MB that are made and freed again and again: not a page of them is asked from the system anew."""
    import resource  # here, because Windows has none

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**22)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_memory()
    assert min(faults() for _ in range(50)) == 0
