"""Tests of what measures and draws: that it measures what it says, and still runs."""

import json
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import captured
import effect
import figures
import naive
import pytest
import tables
import torch
import transformers
from effect import ROOT

import bench
import roe
from cache import SharedCache
from fast.cpu import FastAttention
from fast.gpu import StackedExperts
from load import load

torch.set_num_threads(1)


def test_changes():
    """Against the formulas, on two pieces of text on which the second roster gains 0.1 and 0.3 nats per token."""
    clean = torch.full((2 * effect.BLOCK,), -2.0)
    gains = torch.tensor([0.1, 0.3]).repeat_interleave(effect.BLOCK)
    one, two = effect.changes(torch.stack((clean, clean + gains)))
    assert one == {"rosters": 1, "perplexity": pytest.approx(torch.tensor(2.0).exp().item()), "change": 0, "error": 0}
    assert two["rosters"] == 2 and two["perplexity"] == pytest.approx(torch.tensor(1.8).exp().item())
    assert two["change"] == pytest.approx(torch.tensor(-0.2).exp().item() - 1)
    # The deviation of 0.1 and 0.3 is 0.2 / sqrt(2), that of their mean 0.1; d exp(-x) = exp(-x) dx.
    assert two["error"] == pytest.approx(0.1 * torch.tensor(-0.2).exp().item())


def test_softened():
    """Against the distribution that the targets are drawn from; what is measured is 1.5 times too confident."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 30, generator=generator)
    targets = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    softened = effect.Softened()
    for part, some in zip(logits.split(512), targets.split(512), strict=True):
        softened((1.5 * part).log_softmax(-1)[None], some)
    perplexity, temperature = softened.best()
    assert temperature == 1.5
    true = logits.log_softmax(-1).gather(-1, targets[:, None]).mean().neg().exp().item()
    assert perplexity == pytest.approx(true, rel=1e-5)


def test_benchmark_of_the_embedded_model(tmp_path):
    options = "--layers 0 --repeats 1 --rosters 1 4 --history 32 --prompts 32".split()
    command = [sys.executable, ROOT / "bench" / "bench.py", *options, "--output", tmp_path / "bench.jsonl"]
    assert subprocess.run(command).returncode == 0
    results = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    found = {(r["system"], r["method"], r["n"]): r for r in results}
    assert found.keys() == {
        *((system, method, n) for system in ("roe", "transformers") for method in ("decode", "peak") for n in (1, 4)),
        *((system, "prompt", 1) for system in ("roe", "transformers")),
    }
    one, four = (found["roe", "decode", n] for n in (1, 4))
    assert one["cache_bytes"] == four["cache_bytes"] == 2 * 6 * 32 * 128 * 2
    assert found["transformers", "decode", 4]["cache_bytes"] == 4 * one["cache_bytes"]
    assert 0 < one["floor_ms"] < one["ms"] and one["floor_ms"] < four["floor_ms"] < four["ms"]


def test_loading(tmp_path):
    options = ["--model", ROOT / "tiny", "--repeats", "1", "--output", tmp_path / "loading.jsonl"]
    assert subprocess.run([sys.executable, ROOT / "bench" / "loading.py", *options]).returncode == 0
    result = json.loads((tmp_path / "loading.jsonl").read_text())
    assert result["bytes"] == (ROOT / "tiny" / "model.safetensors").stat().st_size
    assert min(result["read_seconds"], result["load_seconds"]) > 0
    for what in ("read", "load"):
        assert result[f"{what}_peak"] >= result[f"{what}_held"] > result["bytes"]


def test_loading_where_there_is_no_room(tmp_path):
    """Nothing is written but one line that says what is lacking: 10,000 layers are 8.6 TB."""
    output = tmp_path / "loading.jsonl"
    command = [sys.executable, ROOT / "bench" / "loading.py", "--layers", "10000", "--output", output]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.count("\n") == 1
    assert result.stdout.startswith("not measured: 10000 layers need 8") and not output.exists()


def test_a_written_checkpoint_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "OLMOE", bench.OLMOE | {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8})
    bench.write(tmp_path, 2)
    model, _ = load(tmp_path, "cpu", "float32")
    hf = transformers.OlmoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.tensor([bench.random_tokens(4096, 20)])
    torch.testing.assert_close(model(tokens), hf(tokens).logits, rtol=0, atol=1e-4)  # as in test_roe.py


def test_naive_roe():
    """With the same noise for the last token, the rows of `roe.predict`."""
    hf = transformers.OlmoeForCausalLM.from_pretrained(ROOT / "tiny", dtype=torch.float32)
    model, _ = load(device="cpu", dtype="float32")
    tokens, G = bench.random_tokens(4096, 20), roe.gumbel(3, 19, 5, 6, 16)
    naive.add_roe(hf, 5, 0.7, lambda layer: G[1:, layer])
    with torch.inference_mode():
        logits = hf(torch.tensor([tokens]).expand(5, -1)).logits[:, -1]
    expected = roe.predict(model, tokens, SharedCache(model.config, 20), 5, 0.7, seed=3)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(naive.average(logits), roe.aggregate(logits))


@torch.inference_mode()
def test_static_cache():
    """A step's logits are those of the shared cache; on a device without data it works, too: it reads nothing back."""
    model, _ = load(device="cpu", dtype="float32", fast=False)
    tau, n, (*prompt, last) = roe.temperatures(model.config, 0.5), 5, bench.random_tokens(4096, 10)
    reference, cache = SharedCache(model.config, 20), SharedCache(model.config, 20)
    for c in (reference, cache):
        roe.predict(model, prompt, c, n, tau, seed=3)
    cache.v[:, :, :, len(prompt) :] = torch.nan
    expected = roe.predict(model, [last], reference, n, tau, seed=3)
    for layer in model.model.layers:
        layer.self_attn = FastAttention(layer.self_attn)
    static, noise = captured.StaticCache(cache), captured.draw(model.config, n, tau, 3, [9])
    captured.use_static(model)
    logits = captured.decode(model, torch.tensor([[last]]), static, tau, noise)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert static.length.item() == reference.length == 10

    static.k, static.v = (t.to("meta", torch.bfloat16) for t in (static.k, static.v))
    static.length = static.length.to("meta")
    for layer in model.model.layers:
        layer.mlp.experts = StackedExperts(layer.mlp.experts)
    model = model.to("meta", torch.bfloat16)
    token = torch.zeros(1, 1, dtype=torch.long, device="meta")
    assert captured.decode(model, token, static, tau, noise.to("meta")).shape == (n, 4096)


def test_llama_cpp_gets_the_same_model():
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    system = bench.LlamaCpp(SimpleNamespace(layers=0, model=None, device="cpu", dtype="bfloat16"))
    model, tokenizer = load(device="cpu", dtype="bfloat16")
    tokens = tokenizer.encode("class Stack:").ids
    request = {"prompt": tokens, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    text = system.server.handle_completions(request)["choices"][0]["text"]
    assert text == "".join(f"t{token}" for token in roe.generate(model, tokens, 1, max_new_tokens=16))


@pytest.mark.parametrize("file", ["README.md", "bench/README.md"])
def test_tables_are_those_of_the_results(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text == tables.filled(text) and text.count("<!-- table ") == text.count("<!-- end -->") > 0


def test_the_token_that_is_drawn():
    """Its probabilities are those of `roe.predict` after its text, and the average overrules row 0."""
    text, layers, tau, candidates = figures.overruled("def test_parse(self):")
    model, tokenizer = load(device="cpu", dtype="float32")
    tokens = tokenizer.encode(text).ids
    logits = roe.predict(model, tokens, SharedCache(model.config, len(tokens)), 4, None, seed=0)
    probs = torch.cat((logits.softmax(-1), logits.softmax(-1).mean(0, keepdim=True)))
    assert probs[0].argmax() != probs[4].argmax() and tokenizer.decode([probs[4].argmax()]) == candidates[0][0]
    for token, values in candidates:
        torch.testing.assert_close(torch.tensor(values), probs[:, tokenizer.encode(token).ids].squeeze(1))
    first = next(i for i, value in enumerate(tau) if value)  # all rows are one before the first noise
    assert [len(chosen) for chosen in layers] == [1] * first + [4] * (6 - first)
    assert {len(set(row)) for chosen in layers for row in chosen} == {2}


def test_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    figures.main()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "bench" / "figures").iterdir()}  # those that README shows
    for path in tmp_path.iterdir():
        ElementTree.parse(path)
