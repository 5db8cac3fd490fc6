"""Tests of the study of arithmetic: that its problems are right, and that one pass says what decoding writes."""

import arithmetic
import pytest
import torch
from effect import COUNTS, ROSTERS
from report import measure
from test_study import remake

import roe
from load import load
from model import OLMoE

torch.set_num_threads(1)
SIZE = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3, "num_experts": 4}


@pytest.fixture
def model():
    """A miniature that is not trained at all."""
    torch.manual_seed(0)
    fields = dict(num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=64)
    config = roe.Config(vocab_size=len(arithmetic.SYMBOLS), **SIZE, **fields, eos_token_id=[0])
    return OLMoE(config).requires_grad_(False)


def pairs(count: int) -> list[tuple[list[int], list[int]]]:
    """Problems and chains as ids."""
    parts = [text.partition("=") for text in arithmetic.problems(count)]
    ids = lambda text: [*map(arithmetic.SYMBOLS.index, text)]
    return [(ids(problem + equals), ids(chain)) for problem, equals, chain in parts]


def test_problems():
    """Distinct, the same ones each time, and all steps have one value, of which the last is the number itself."""
    texts = arithmetic.problems(500)
    assert len({text.partition("=")[0] for text in texts}) == 500 and texts[:100] == arithmetic.problems(100)
    for text in texts:
        problem, *steps = text.removesuffix("\n").split("=")
        assert [sum(step.count(sign) for sign in "+-*") - step.startswith("-") for step in steps] == [2, 1, 0]
        assert {eval(step) for step in steps} == {eval(problem)} and steps[-1] == str(eval(problem))
        assert set(text) <= set(arithmetic.SYMBOLS)


def test_judge(model):
    """On a hundred problems it says what `roe.generate` writes, with one roster, with two and with all.

    As such a model writes no right chain, the chain is the first three tokens that the clean path writes. Temperatures
    that no one would choose make rosters write something else, now and then.
    """
    setting, seed, tau = ("clean", 0, 3.0), 2, roe.temperatures(model.config, 3.0, 0)

    def written(problem: list[int], rosters: int, noise: int) -> list[int]:
        tokens = list(roe.generate(model, problem, rosters, tau, max_new_tokens=3, seed=noise, weights="clean"))
        return tokens if len(tokens) == 3 else [*tokens, 0]

    problems = [problem for problem, _ in pairs(100)]
    chains = [written(problem, 1, 0) for problem in problems]
    right, _ = arithmetic.judge(model, list(zip(problems, chains)), ROSTERS, setting, seed)
    for i, (problem, chain) in enumerate(zip(problems, chains)):
        for n in (2, ROSTERS):
            assert right[COUNTS.index(n), i] == (written(problem, n, seed * 100 + i) == chain)
    assert right[0].all() and 5 < right[-1].sum() < 95


def test_perplexity(model):
    """Of the chains, as scored after their whole problems."""
    _, found = arithmetic.judge(model, pairs(2), 4, ("perturbed", 1, 0.5))
    scores = []
    for seed, (problem, chain) in enumerate(pairs(2)):
        scores.append(roe.score(model, problem + chain, 4, 0.5, seed)[:, -len(chain) :])
    expected = torch.cat(scores, 1).double().mean(1).neg().exp()
    torch.testing.assert_close(found, expected[[0, 1, 3]], rtol=1e-5, atol=0)


def test_gains():
    """Four problems, of which the second row has two more right and one fewer."""
    clean = torch.tensor([1.0, 0, 0, 1])
    first, second = arithmetic.gains(torch.stack((clean, torch.tensor([0.0, 1, 1, 1]))), clean)
    assert first == {"rosters": 1, "accuracy": 0.5, "gained": 0, "gained_error": 0}
    assert (second["rosters"], second["accuracy"], second["gained"]) == (2, 0.75, 0.25)
    assert second["gained_error"] == pytest.approx((2.75 / 3) ** 0.5 / 2)  # changes -1, 1, 1, 0


def test_elect(monkeypatch):
    """A model that writes the answer 7, 8 or 9 with known probabilities: a vote finds the likeliest of them."""
    V, equals = len(arithmetic.SYMBOLS), arithmetic.SYMBOLS.index("=")

    class Model:
        config = roe.Config(V, 8, 8, 1, 1, 1, 2, 1, max_position_embeddings=16)

        def __call__(self, rows):
            logits = torch.full((*rows.shape, V), -torch.inf)
            answered = rows != equals
            logits[answered, 0] = 0.0
            logits[~answered, 8:11] = torch.tensor([0.2, 0.5, 0.3]).log()  # 7, 8 and 9
            return logits

    assert arithmetic.answer([*map(arithmetic.SYMBOLS.index, "1+2=3+4=56\n7=8")]) == "56"
    problems = 200 * [([2, equals], [arithmetic.SYMBOLS.index("8"), 0])]
    shares = arithmetic.elect(Model(), problems, 1.0, 0).mean(1)
    assert shares[0].item() == pytest.approx(0.5, abs=0.1) and shares[-1].item() > 0.8
    assert arithmetic.elect(Model(), problems[:50], 0.1, 0).mean() > 0.95  # a low temperature makes it certain


def test_study(tmp_path, monkeypatch):
    """From training to the table: what is learnt is put into numbers of the right width."""
    monkeypatch.setattr(arithmetic.recipe, "config", arithmetic.recipe.config)
    small = {"TRAINING": 64, "EPOCHS": 1, "VALIDATION": 2, "TEST": 3, "TAUS": (0.2,), "SKIPS": (1,), "SEEDS": 2}
    for name, value in (small | {"SIZE": SIZE | {"max_position_embeddings": 40}}).items():
        monkeypatch.setattr(arithmetic, name, value)
    monkeypatch.setattr(remake, "RESULTS", tmp_path)
    measure(tmp_path / "arithmetic.jsonl", arithmetic.arithmetic(tmp_path))
    _, tokenizer = load(tmp_path / "arithmetic")
    assert tokenizer.decode(tokenizer.encode("12-3=9\n").ids) == "12-3=9\n"
    ours, votes = remake.lines("arithmetic")
    assert (ours["seed"], len(ours["grid"])) == (arithmetic.recipe.seed, 2) and ours["best"] == max(ours["grid"])
    assert 1 < ours["perplexities"][0] < len(arithmetic.SYMBOLS) + 1
    assert ours["more_perplexity"] != ours["perplexities"][0]
    assert len(ours["counts"]) == len(votes["counts"]) == len(COUNTS)
    head, _, *rows = remake.table_arithmetic().splitlines()
    assert len(rows) == 5 and {row.count("|") for row in rows} == {head.count("|")}
