"""Tests of the studies: that texts, controls and fits are what they say."""

import importlib.util
import json
import math

import controls
import effect
import margin_study
import pytest
import sizes
import torch
from report import filled, results, what_runs

import roe
from load import load
from model import OLMoE, top_k

torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location(
    "study_remake", effect.ROOT / "study" / "remake.py"
)  # bench/ has one, too
remake = importlib.util.module_from_spec(spec)
spec.loader.exec_module(remake)


@pytest.fixture(scope="module")
def loaded():
    return load(device="cpu", dtype="float32")


def test_slices(loaded):
    """Every piece is what the text says at evenly spaced places, of which a short text has fewer."""
    _, tokenizer = loaded
    text = "\n".join(f"line {i} of a text" for i in range(10_000))
    pieces = effect.slices(tokenizer, text, 5)
    assert [len(piece) for piece in pieces] == 5 * [effect.BLOCK + 1]
    starts = [text.index(tokenizer.decode(piece)) for piece in pieces]
    assert starts[0] == 0 and len({b - a for a, b in zip(starts, starts[1:])}) <= 2  # but for rounding
    assert 2 < len(effect.slices(tokenizer, text[:20_000], 100)) < 20_000 / effect.BLOCK


def test_package_text():
    text, versions = effect.package_text({"iniconfig": "iniconfig/__init__.py"})
    import iniconfig

    with open(iniconfig.__file__, encoding="utf-8", newline="") as file:
        assert text == file.read()
    assert versions.startswith("iniconfig ") and versions.split()[1][0].isdigit()


def test_changes():
    """Two pieces of text, of which the second row gains 0.1 and 0.3 nats per token, and every fourth token."""
    first = torch.full((2 * effect.BLOCK,), -2.0)
    gain = torch.cat((torch.full((effect.BLOCK,), 0.1), torch.full((effect.BLOCK,), 0.3)))
    right = torch.arange(2 * effect.BLOCK) % 4 < 2
    more = torch.arange(2 * effect.BLOCK) % 4 < 3
    clean, found = effect.changes(torch.stack((first, first + gain)), torch.stack((right, more)))
    assert clean == {"perplexity": pytest.approx(math.exp(2)), "change": 0, "error": 0} | {
        "accuracy": 0.5,
        "gained": 0,
        "gained_error": 0,
    }
    assert found["perplexity"] == pytest.approx(math.exp(1.8)) and found["change"] == pytest.approx(math.exp(-0.2) - 1)
    assert found["error"] == pytest.approx(math.exp(-0.2) * 0.1, rel=1e-5)  # 0.2 / sqrt(2) is the pieces' deviation
    assert found["accuracy"] == 0.75 and found["gained"] == 0.25
    assert found["gained_error"] == pytest.approx((0.25 * 0.75 / (2 * effect.BLOCK)) ** 0.5, rel=1e-3)


def test_softening():
    """What is 1.5 times too confident, and its cure: the rosters gain nothing beyond it."""
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(40 * effect.BLOCK, 30, generator=generator).log_softmax(-1)
    targets = log_probs.exp().multinomial(1, generator=generator)[:, 0]
    clean, average = effect.Softened(), effect.Softened()
    clean((1.5 * log_probs).log_softmax(-1), targets)
    average(log_probs, targets)
    found = effect.softening(clean, average)
    assert (found["clean_temperature"], found["temperature"]) == (1.5, 1)
    assert found["softened"] == pytest.approx(0, abs=1e-6) and found["softened_error"] == pytest.approx(0, abs=1e-6)
    assert found["alone"] < -0.01


def test_measure(loaded):
    """Perplexity and accuracy of two pieces against `roe.score` and `roe.predict`, token by token."""
    model, tokenizer = loaded
    pieces = effect.slices(tokenizer, effect.HELD_OUT.read_text(encoding="utf-8"), 2)
    found = effect.measure(model, pieces, 0.4, "clean")
    assert [line["rosters"] for line in found["counts"]] == [1, 2, 4, 8, 16, 32] and found["tokens"] == 1024
    scores = torch.cat([roe.score(model, piece, 4, 0.4, seed, "clean") for seed, piece in enumerate(pieces)], 1)
    for n in (1, 2, 4):
        line = next(line for line in found["counts"] if line["rosters"] == n)
        assert line["perplexity"] == pytest.approx(scores[n - 1].mean().neg().exp().item(), rel=1e-5)
    right = 0
    for piece in pieces:
        logits = model(torch.tensor([piece[:-1]]))[0]
        right += (logits.argmax(-1) == torch.tensor(piece[1:])).sum().item()
    assert found["counts"][0]["accuracy"] == right / 1024
    right = []
    for seed, piece in enumerate(pieces):
        watch = lambda logits, log_probs, targets, _: right.append(log_probs.argmax(-1) == targets)
        roe.score(model, piece, 32, 0.4, seed, "clean", watch=watch)
    assert found["counts"][-1]["accuracy"] == pytest.approx(torch.cat(right).double().mean().item(), abs=1e-9)


@pytest.mark.parametrize("rule, weights", [("perturbed", "perturbed"), ("experts_only", "clean")])
def test_controls_measure_what_rosters_are_measured_with(loaded, rule, weights):
    """`run` with a rule equals `roe.score` with its reading and the same noise."""
    model, tokenizer = loaded
    tokens, tau, n = tokenizer.encode("def push(self, item):\n").ids, roe.temperatures(model.config, 0.5), 4
    noise = lambda positions: controls.draw(model.config, n, tau, 7, positions, roe.gumbel)
    make = lambda positions: controls.noisy_route(2, noise(positions), getattr(controls, rule))
    parts = [roe.aggregate(p).gather(-1, t[:, None])[:, 0] for p, t in controls.run(model, tokens, make)]
    torch.testing.assert_close(torch.cat(parts), roe.score(model, tokens, n, tau, 7, weights)[-1])


def test_rules():
    """Against their descriptions, row by row and token by token."""
    k = 2
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, 8, generator=generator)
    noise = roe.gumbel(0, 0, 3, 50, 8)
    noise[0] = 0
    noisy = logits + noise
    clean_weights, clean_indices = top_k(logits, k)
    rules = controls.weights_only, controls.rescaled, controls.certain_head
    found = {rule.__name__: rule(logits, noisy, k) for rule in rules}
    for weights, indices in found.values():  # the clean row is as ever
        torch.testing.assert_close(weights[0], clean_weights[0])
        assert (indices[0] == clean_indices[0]).all()
    for row in range(3):
        for t in range(50):
            probs, (first, second) = noisy[row, t].softmax(-1), clean_indices[0, t]
            weights, indices = (part[row, t] for part in found["weights_only"])
            assert indices.tolist() == [first, second]
            torch.testing.assert_close(weights, torch.stack((probs[first], probs[second])))

            weights, indices = (part[row, t] for part in found["rescaled"])
            assert sorted(indices.tolist()) == sorted(probs.topk(2).indices.tolist())
            assert weights.sum().item() == pytest.approx(clean_weights[0, t].sum().item())
            assert (weights[0] / weights[1]).item() == pytest.approx((probs[indices[0]] / probs[indices[1]]).item())

            weights, indices = (part[row, t] for part in found["certain_head"])
            best = logits[row, t].argmax().item()
            others = [e for e in noisy[row, t].argsort(descending=True).tolist() if e != best]
            assert indices.tolist() == [best, others[0]]
            torch.testing.assert_close(weights, probs[indices])


def test_gaussian_noise_has_the_variance_of_gumbel():
    """A million draws: the deviation of a sample variance is below 0.3 % for either (kurtosis 3 and 5.4)."""
    gaussian, gumbel = (draw(0, 0, 100, 100, 100).flatten() for draw in (controls.gaussian, roe.gumbel))
    assert [gaussian.var().item(), gumbel.var().item()] == pytest.approx(2 * [math.pi**2 / 6], rel=0.01)
    assert gaussian.mean().item() == pytest.approx(0, abs=0.01)
    assert (gaussian[gumbel.argsort()].diff() >= 0).all()
    beyond = [(gaussian > math.pi / 6**0.5 * d).float().mean().item() for d in (1, 2, 3)]
    assert beyond == pytest.approx([0.15866, 0.02275, 0.00135], abs=0.0015)


def test_geometric():
    probs = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    product = probs.prod(0).sqrt()
    torch.testing.assert_close(controls.geometric(probs.log()).exp(), product / product.sum())


def test_active_parameters(loaded):
    """Against a count of the model without the experts and rows of the embedding that a token does not use."""
    config = loaded[0].config
    with torch.device("meta"):
        model = OLMoE(config)
    idle = config.num_experts - config.num_experts_per_tok
    expert = sum(p.numel() for p in model.model.layers[0].mlp.experts[0].parameters())
    whole = sum(p.numel() for p in model.parameters())
    unused = config.num_hidden_layers * idle * expert + (config.vocab_size - 1) * config.hidden_size
    assert sizes.active_parameters(config) == whole - unused


def test_equivalent():
    """Models exactly on a line, and rosters whose loss is that of twice the parameters: for every text alike."""
    parameters, a, b = [1_000_000, 2_000_000, 5_000_000], 20.0, -1.2
    text = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # some pieces are harder
    on_line = lambda p: a + b * math.log(p) + text
    models = torch.stack([on_line(p) for p in parameters])
    assert [value.item() for value in sizes.line(parameters, (models - text).mean(1))] == pytest.approx([a, b])
    worth = sizes.equivalent(parameters, models, on_line(4_000_000))
    assert worth == pytest.approx(3 * (4_000_000,))
    noisy = on_line(4_000_000) + 0.1 * torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    worth, low, high = sizes.equivalent(parameters, models, noisy)
    error = 0.1 / 40**0.5 / -b  # of log(worth)
    assert low < worth < high and math.log(high / low) == pytest.approx(2 * 1.96 * error, rel=0.25)


def test_controls(loaded, monkeypatch):
    """The control "rosters" is what `effect.measure` measures; the clean row left out, the average is of the others."""
    model, tokenizer = loaded
    pieces = effect.slices(tokenizer, effect.HELD_OUT.read_text(encoding="utf-8"), 2)
    monkeypatch.setattr(controls, "read", lambda name, tokenizer, count: (name, pieces))
    cells = {(what["control"], what["text"]): run for what, run in controls.controls()}
    assert len(cells) == len(controls.TEXTS) * (5 + len(controls.NOISY))
    found, expected = cells["rosters", "English"](), effect.measure(model, pieces, None, "perturbed")
    for key in ("perplexity", "change", "accuracy", "gained"):
        assert found[key] == pytest.approx(expected["counts"][-1][key], rel=1e-4, abs=1e-9)
    assert found["softened"] == pytest.approx(expected["softened"], rel=1e-3)
    probs = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(controls.without_clean(probs.log()).exp(), probs[1:].log().softmax(-1).mean(0))
    assert abs(cells["3 experts, no noise", "Perl"]()["change"]) > 1e-5


def test_results():
    """Whole, and of one version of the code and one machine each; tables are those of the results, of full width."""
    for name, study in remake.STUDIES.items():
        found = results(effect.RESULTS / f"{name}.jsonl")
        for what in json.loads(json.dumps([what for what, _ in study()])):
            assert any(what.items() <= line.items() for line in found), f"{name}: {what}"
    for path in effect.RESULTS.glob("*.jsonl"):
        assert len({(line["code"], line["machine"], line["torch"]) for line in results(path)}) == 1, path
    for name, table in remake.TABLES.items():
        head, rule, *rows = table().splitlines()
        assert rows and {line.count(" | ") for line in rows} == {head.count(" | ")} == {rule.count(" | ")}, name
    for file in ("README.md", "study/README.md"):
        text = (effect.ROOT / file).read_text(encoding="utf-8")
        assert filled(text, remake.TABLES) == text, f"{file}: python study/remake.py --tables"


def test_figures(tmp_path, monkeypatch):
    """All are drawn from the results, the same file each time; those that texts show are there."""
    monkeypatch.setattr(remake, "FIGURES", tmp_path)
    for name, draw in remake.named("draw_").items():
        if name != "show":
            draw()
            assert (tmp_path / f"{name}.svg").read_bytes() == (effect.ROOT / f"study/figures/{name}.svg").read_bytes()
    assert {path.stem for path in (effect.ROOT / "study" / "figures").iterdir()} == set(remake.named("draw_"))


def test_one_study(tmp_path, monkeypatch, capsys):
    """The command measures what is missing, and only that; all of it for a new version of the code, or a machine."""
    measured = []

    def study():
        cell = lambda i: ({"number": i}, lambda: measured.append(i) or {"square": i * i})
        return [cell(i) for i in range(3)]

    for name in ("fill", "named"):
        monkeypatch.setattr(remake, name, lambda *_: {})
    monkeypatch.setattr(remake, "STUDIES", {"squares": study})
    monkeypatch.setattr(remake, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["remake.py", "--only", "squares"])
    remake.main()
    assert measured == [0, 1, 2]
    file = tmp_path / "squares.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:2]) + "\n")
    remake.main()
    assert measured == [0, 1, 2, 2] and [line["square"] for line in results(file)] == [0, 1, 4]
    found = results(file)
    for other in ({"code": "another"}, {"machine": "another"}):
        measured.clear()
        old = [line | other | {"seconds": 120 + 60 * i} for i, line in enumerate(found)]
        file.write_text("".join(json.dumps(line) + "\n" for line in old))
        remake.main()
        assert measured == [0, 1, 2] and len(results(file)) == 3
        assert "squares, 1 of 3, about 9 minutes left" in capsys.readouterr().out


def test_what_runs():
    """The version of the code changes with what it does, and with nothing else."""
    source = '''"""A file."""

class Name:
    """A class."""

    def function(x):
        """Adds."""
        # a comment
        return x + 1  # another

def only():
    """Nothing else."""
'''
    plain = 'class Name:\n    def function(x): return (x+1)\ndef only(): "Other words."'
    assert what_runs(source) == what_runs(plain) and "A" not in what_runs(source)
    assert what_runs(source) != what_runs(source.replace("+ 1", "+ 2"))
    assert what_runs("x = 'text'") == "x = 'text'"


def test_margin_study(monkeypatch):
    """Three rosters' worth of arithmetic by hand: two texts of two tokens each."""
    texts = [margin_study.Tokens(), margin_study.Tokens()]
    count = len(margin_study.COUNTS)
    for text, ahead, overruled, gain in (
        (texts[0], (0.1, 0.9), (1, 0), (2.0, 1.0)),
        (texts[1], (0.3, 1.0), (1, 0), (4.0, 1.0)),
    ):
        rows = [ahead, *count * [overruled], *count * [gain]]
        text.parts.append(torch.tensor(rows).double())
    found = margin_study.kept(texts, 0, 0.2)
    assert (found["tokens"], found["overruled"]) == (4, 2)
    assert (found["share"], found["kept"], found["gain"]) == (1 / 4, 1 / 2, 2 / 8)
    assert margin_study.kept(texts, 0, 1.0)["share"] == 1  # even where the clean path is certain
