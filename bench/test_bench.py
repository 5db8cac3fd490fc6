"""Tests of what measures and draws: that it measures what it says, and still runs."""

import json
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import captured
import loading
import naive
import pytest
import remake
import report
import torch
import transformers
from report import ROOT, filled, results

import bench
import ports
import roe
from cache import SharedCache
from fast.cpu import quick_attend
from fast.gpu import StackedExperts
from load import load

torch.set_num_threads(1)
README = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
TINY = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 4096}


def test_speed_of_the_embedded_model(capsys, monkeypatch):
    """What is measured is plausible, and both tables have it."""
    options = "--layers 0 --repeats 1 --rosters 1 4 --history 32 --prompts 32 --device cpu".split()
    found = bench.measure(bench.arguments(options))["found"]
    lines = {(x["system"], x["method"], x["n"]): x for x in found}
    assert lines.keys() == {
        *((system, method, n) for system in ("roe", "transformers") for method in ("decode", "peak") for n in (1, 4)),
        *((system, "prompt", 1) for system in ("roe", "transformers")),
    }
    one, four = (lines["roe", "decode", n] for n in (1, 4))
    assert one["cache_bytes"] == four["cache_bytes"] == 2 * 6 * 32 * 128 * 2
    assert lines["transformers", "decode", 4]["cache_bytes"] == 4 * one["cache_bytes"]
    assert 0 < one["floor_ms"] < one["ms"] and one["floor_ms"] < four["floor_ms"]
    monkeypatch.setattr(bench, "measure", lambda args: {"found": found})
    monkeypatch.setattr("sys.argv", ["bench.py", *options])
    bench.main()
    printed = capsys.readouterr().out
    assert f"| this project, after 32 tokens | {bench.number(one['ms'])} | {bench.number(four['ms'])} |" in printed
    assert f"| this project | {bench.number(lines['roe', 'prompt', 1]['ms'])} |" in printed


def test_turns():
    """All take turns; medians are over all repeats."""
    seen, values = [], iter([[3.0, 1.0], [5.0], [2.0, 9.0], [6.0]])
    step = lambda name: lambda: seen.append(name) or next(values)
    assert bench.turns({"a": step("a"), "b": step("b")}, 2) == {"a": 2.5, "b": 5.5} and seen == ["a", "b", "a", "b"]


def test_loading():
    result = loading.measure(0, repeats=1)
    assert result["bytes"] == (ROOT / "tiny" / "model.safetensors").stat().st_size and result["files"] == 1
    assert min(result["read_seconds"], result["load_seconds"]) > 0
    for what in ("read", "load"):
        assert result[f"{what}_peak"] >= result[f"{what}_held"] > result["bytes"]


def test_loading_where_there_is_no_room():
    """Nothing is measured, and one line says what is lacking: 10,000 layers are 8.6 TB."""
    command = [sys.executable, ROOT / "bench" / "loading.py", "--layers", "10000"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.count("\n") == 1
    assert result.stdout.startswith("not measured: 10000 layers need 8")


def test_a_port_beside_roe():
    """Both write for every task, and answer with the steps that count."""
    pythons = {"roe.py": sys.executable, "transformers": sys.executable}
    tasks = ports.tasks((1, 3), (8,))
    result = ports.compare(pythons, (1, bench.OLMOE | TINY), "float32", tasks, repeats=1)
    assert [(x["n"], x["system"]) for x in result["found"]] == [(n, system) for n in (1, 3) for system in pythons]
    assert all(x["ms"] > 0 for x in result["found"])
    assert result["versions"]["transformers"] == f"transformers {transformers.__version__}, torch {torch.__version__}"


def test_the_steps_that_count(monkeypatch, capsys):
    """Of those between the tokens that are written, the first third does not; requests differ from each other."""
    seen = []

    def text(prompts, n, saw):
        seen.append((prompts, n))
        for _ in range(ports.STEPS + 1):  # transformers' streamer is told of the prompt, too
            saw()

    clock = iter(range(1000))
    monkeypatch.setattr(ports, "SYSTEMS", {"roe.py": (lambda folder, dtype: text, "torch")})
    monkeypatch.setattr(ports.time, "perf_counter", lambda: next(clock) ** 2)
    task = json.dumps(["decode", {"n": 4, "length": 5, "requests": 3}])
    monkeypatch.setattr("sys.stdin", [task])
    ports.serve("roe.py", ROOT / "tiny", "float32")
    steps = [(i + 1) ** 2 - i**2 for i in range(ports.STEPS)][1:]
    assert json.loads(capsys.readouterr().out.splitlines()[1]) == steps[len(steps) // 3 :]
    ((prompts, n),) = seen
    assert n == 4 and [len(prompt) for prompt in prompts] == [5, 5, 5] and len({tuple(p) for p in prompts}) == 3


def test_a_written_checkpoint_loads(tmp_path):
    bench.write(tmp_path, 2, bench.OLMOE | TINY)
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
        layer.self_attn.attend = quick_attend
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


def test_results():
    """Of one version of the code and one machine each; tables are those of the results, full and shown."""
    files = {path.stem: results(path) for path in remake.RESULTS.iterdir()}
    assert files.keys() == remake.MEASURED.keys()
    for name, lines in files.items():
        assert len({(line["code"], line["machine"], line["torch"]) for line in lines}) == 1, name
    for name, table in remake.TABLES.items():
        head, rule, *rows = table().splitlines()
        assert rows and {line.count(" | ") for line in rows} == {head.count(" | ")} == {rule.count(" | ")}, name
    texts = [(ROOT / file).read_text(encoding="utf-8") for file in ("README.md", "bench/README.md", "ports/README.md")]
    for text in texts:
        assert filled(text, remake.TABLES) == text, "python bench/remake.py --tables"
    assert all(any(f"<!-- table {name} -->" in text for text in texts) for name in remake.TABLES)


def test_the_figure(tmp_path, monkeypatch):
    """It is that of the results, a label at each line, and the only one."""
    monkeypatch.setattr(remake, "FIGURE", tmp_path / "cost.svg")
    remake.draw_cost()
    drawn = (tmp_path / "cost.svg").read_bytes()
    kept = list((ROOT / "bench" / "figures").iterdir())
    assert [path.name for path in kept] == ["cost.svg"] and kept[0].read_bytes() == drawn
    words = "".join(ElementTree.fromstring(drawn).itertext())
    assert [words.count(label) for label in ("naive RoE", "this project", "floor")] == [3, 2, 1]  # in both halves


def test_the_command(tmp_path, monkeypatch):
    """It measures what was asked for and can be measured, and fills in what it was told to."""
    measured = []
    cells = lambda name: lambda args: [({"name": name}, lambda: measured.append(name) or {"found": []})]
    monkeypatch.setattr(remake, "RESULTS", tmp_path)
    monkeypatch.setattr(remake, "MEASURED", {name: cells(name) for name in remake.MEASURED})
    monkeypatch.setattr(remake, "fill", lambda path, tables: measured.append(path.parent.name))
    monkeypatch.setattr(remake, "draw_cost", lambda: measured.append("cost"))
    made = ["bench", "ports", ROOT.name, "cost"]
    for line, names in (
        ("", ["bench", "loading", "ports"]),
        ("--mlx PYTHON", ["mlx"]),  # the others are there
        ("--only vllm --vllm PYTHON", ["vllm"]),
        ("--tables", []),
    ):
        monkeypatch.setattr("sys.argv", ["remake.py", *line.split()])
        measured.clear()
        remake.main()
        assert measured == names + made
        assert all(results(tmp_path / f"{name}.jsonl")[0]["code"] == report.code() for name in names)
    monkeypatch.setattr("sys.argv", ["remake.py", "--only", "mlx"])
    with pytest.raises(SystemExit):
        remake.main()


def test_what_is_measured(monkeypatch):
    """All cells of all files, with what they measure them with: a line of a file says what it is of."""
    asked = []
    monkeypatch.setattr(bench, "measure", lambda args: asked.append(args) or {})
    monkeypatch.setattr(loading, "measure", lambda *args: asked.append(args) or {})
    monkeypatch.setattr(loading, "lacks_room", lambda layers: "disk" if layers == 16 else None)
    monkeypatch.setattr(ports, "compare", lambda *args: asked.append(args) or {})
    cells = {}
    for name, study in remake.MEASURED.items():
        cells[name] = [what for what, run in study(SimpleNamespace(mlx="m", vllm="v")) if run() == {}]
    assert [what["layers"] for what in cells["bench"]] == [4, 0] and cells["loading"] == [{"layers": 4}]
    assert [(args.layers, args.dtype, args.rosters) for args in asked[:2]] == [
        (4, "bfloat16", [1, 4, 8, 32]),
        (0, "float32", [1, 4, 8, 32]),
    ]
    assert [what["dtype"] for what in cells["ports"]] == ["bfloat16", "float32"] == [args[2] for args in asked[3:5]]
    assert [args[0] for args in asked[5:8]] == [
        {"roe.py": sys.executable, "mlx": "m"},
        *2 * [{"roe.py": sys.executable, "vllm": "v"}],
    ]
    assert cells["vllm"][2:] == [{"model": "embedded"}, {"model": "small"}]
    embedded, small = asked[8:]
    assert embedded[:2] == ({"vllm": "v"}, None) and embedded[3][-1] == {"n": 8, "length": 32, "requests": 32}
    assert {(task["n"], task["length"], task["requests"]) for task in small[3]} == {
        (n, length, requests) for n in (1, 8) for length in (32, 1500) for requests in (1, 8)
    }
