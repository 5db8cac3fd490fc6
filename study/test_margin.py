"""Tests of margins: the example against the rule, on transformers' probabilities; what is measured against the example.

Tolerances are those of test_roe.py.
"""

import math

import margin
import margin_study as study
import pytest
import torch
from effect import ROSTERS, VALIDATION

import roe
from cache import SharedCache
from load import load
from test_roe import CLOSE, TAU, random_tokens, save

torch.set_num_threads(1)
M = 0.1


@pytest.fixture
def predicted(monkeypatch):
    """The logits of every token that `margin.generate` yields."""
    seen, predict = [], margin.predict
    monkeypatch.setattr(margin, "predict", lambda *args: seen.append(predict(*args)) or seen[-1])
    return seen


@pytest.mark.parametrize("temperature", (0.0, 1.3))
@torch.inference_mode()
def test_margin_leaves_rosters_out_and_changes_nothing_else(tmp_path, predicted, temperature):
    """Token by token against the rule; a sure token costs one row, and an unsure one is what n rosters predict."""
    hf, (model, _) = save(tmp_path, changes={"num_key_value_heads": 2}), load(tmp_path, "cpu")
    prompt, options, sizes = random_tokens(10), {"temperature": temperature, "top_p": 0.9, "seed": 3}, []
    run = lambda n, m: list(margin.generate(model, prompt, n, m, TAU, 60, **options))
    new = run(5, 0.06)
    for position, token, logits in zip(range(9, 69), new, predicted, strict=True):
        tokens = (prompt + new)[: position + 1]
        clean = hf(torch.tensor([tokens])).logits[0, -1].softmax(-1)
        first, second = clean.topk(2).values
        assert abs(first - second - 0.06) > 1e-4  # else rounding might decide
        sizes.append(1 if first - second >= 0.06 else 5)
        cache = SharedCache(model.config, len(tokens))
        expected = roe.predict(model, tokens, cache, sizes[-1], TAU, 3)
        torch.testing.assert_close(logits, expected, **CLOSE)
        torch.testing.assert_close(logits[0].softmax(-1), clean, **CLOSE)
        assert token == roe.choose(roe.aggregate(logits), temperature, 0.9, 3, position)
    assert 5 < sizes.count(1) < 55
    for n, m in ((1, 0.0), (5, 1.0)):  # never, and always
        assert run(5, m) == list(roe.generate(model, prompt, n, TAU, max_new_tokens=60, **options))
    assert run(5, 0.0) != run(5, 1.0)


def test_a_margin_of_1_is_rosters_even_where_the_clean_path_is_certain(tmp_path, monkeypatch):
    """Where rounding makes 1 of a probability, too; and text ends where it does in `roe.generate`."""
    save(tmp_path, changes={"eos_token_id": list(range(128))})
    model, _ = load(tmp_path, "cpu")
    monkeypatch.setattr(margin, "sure", lambda *_: pytest.fail("asked"))
    for seed in range(5):
        prompt = random_tokens(10, seed)
        expected = list(roe.generate(model, prompt, 3, TAU, max_new_tokens=200))
        assert list(margin.generate(model, prompt, 3, 1.0, TAU, 200)) == expected and len(expected) < 119


@pytest.mark.parametrize("bad", (-0.1, 1.1, math.nan))
def test_bad_margins(loaded, bad):
    with pytest.raises(ValueError, match="margin must be a number from 0 to 1, not"):
        next(margin.generate(*loaded, 4, bad))


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load(device="cpu", dtype="float32")
    return model, tokenizer.encode(VALIDATION.read_text(encoding="utf-8")[:400]).ids[:81]


def test_ratio():
    """Of equal blocks it is a mean with its standard error; else the jackknife over blocks says nearly the same."""
    value, error = study.ratio([1, 2, 3, 4], [2, 2, 2, 2])
    assert (value, error) == pytest.approx((1.25, torch.tensor([0.5, 1, 1.5, 2]).std().item() / 2))
    generator = torch.Generator().manual_seed(0)
    whole = 1 + torch.rand(200, generator=generator, dtype=torch.float64)
    part = whole * torch.rand(200, generator=generator, dtype=torch.float64)
    value, error = study.ratio(part.tolist(), whole.tolist())
    left_out = (part.sum() - part) / (whole.sum() - whole)
    assert value == pytest.approx((part.sum() / whole.sum()).item())
    assert error == pytest.approx(math.sqrt(199 * left_out.var(correction=0)), rel=0.02)


def test_kept_is_what_the_example_keeps(loaded):
    """One pass with `watch` equals predicting token by token with the margin, for every number of rosters."""
    model, text = loaded
    halves = text[:41], text[40:]
    watched = [study.Tokens() for _ in halves]
    gains, whole, unsure = (dict.fromkeys(study.COUNTS, 0) for _ in range(3))
    for half, watch in zip(halves, watched):
        roe.score(model, half, ROSTERS, watch=watch)
        for n in study.COUNTS:
            cache = SharedCache(model.config, 40)
            scores = roe.score(model, half, n)
            whole[n] += (scores[n - 1] - scores[0]).sum().item()
            for token, target in zip(half, half[1:]):
                logits = margin.predict(model, [token], cache, n, M, None, 0)
                gains[n] += (roe.aggregate(logits) - logits[0].log_softmax(-1))[target].item()
                unsure[n] += len(logits) > 1
    for i, n in enumerate(study.COUNTS):
        found = study.kept(watched, i, M)
        assert found["share"] * 80 == pytest.approx(unsure[n]) and 0 < unsure[n] < 80
        assert found["gain"] * whole[n] == pytest.approx(gains[n], abs=1e-4)  # sums of 80 float32 scores
        everything = study.kept(watched, i, 1)
        assert everything["share"] == everything["gain"] == everything["kept"] == 1


def test_overruled():
    """Two tokens of which all but the clean roster want another, at margins of 0.3 and 0.03, and a certain one."""
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.47, 0.03], [1.0, 0.0, 0.0]]).repeat(ROSTERS, 1, 1)
    probs[1:, :2] = torch.tensor([0.05, 0.9, 0.05])
    watch = study.Tokens()
    watch(probs.log().clamp(min=-200), None, torch.tensor([1, 0, 0]), None)
    found = {m: study.kept([watch, watch], study.COUNTS.index(8), m) for m in study.MARGINS}
    assert [line["kept"] for line in found.values()] == [0, 0.5, 0.5, 0.5, 1, 1]
    assert [3 * line["share"] for line in found.values()] == pytest.approx([0, 1, 1, 1, 2, 3])
    assert {(line["tokens"], line["overruled"]) for line in found.values()} == {(6, 4)}
    gains = [math.log((0.3 + 3 * 0.9) / 4 / 0.3), math.log((0.5 + 3 * 0.05) / 4 / 0.5), 0]
    four = study.kept([watch, watch], study.COUNTS.index(4), M)
    assert four["gain"] == pytest.approx(gains[1] / sum(gains)) and four["gain_error"] < 1e-6  # two equal texts


def test_decode_replays_what_the_example_does(loaded, predicted):
    """Rosters run on as many tokens, and the cache is left as it was."""
    model, text = loaded
    prompt = text[:40]
    new = list(margin.generate(model, prompt, 4, M, max_new_tokens=40))
    rosters = [len(logits) for logits in predicted]
    cache, tau = SharedCache(model.config, 80), roe.temperatures(model.config)
    roe.predict(model, prompt[:-1], cache, 1, tau, 0)
    for _ in range(2):
        seconds, unsure = study.decode(model, [*prompt[-1:], *new[:-1]], cache, 4, M, tau)
        assert unsure == rosters.count(4) and 0 < unsure < 40 and seconds > 0 and cache.length == 39
    assert study.decode(model, prompt[-1:], cache, 4, 1.0, tau)[1] == 1


def test_times_are_compared_within_a_text(loaded, monkeypatch):
    """A slow text does not count: each setting is compared with one roster on the same text."""
    model, text = loaded
    pace = iter([1, 100, 1])
    seconds = lambda n, m: 1 if n == 1 else n * m

    def decode(model, tokens, cache, n, m, tau):
        assert tokens == text[study.PROMPT - 1 : -1] and cache.length == study.PROMPT - 1
        if (n, m) == (study.COUNTS[0], study.MARGINS[0]):
            decode.pace = next(pace)
        return decode.pace * seconds(n, m), 0

    monkeypatch.setattr(study, "decode", decode)
    expected = {(n, m): pytest.approx(n * m) for n in study.COUNTS for m in study.MARGINS}
    assert study.times(model, [text], repeats=3) == expected


def test_cells(loaded, monkeypatch):
    """Held-out text is measured as it is, greedy text as the model writes it with 32 rosters after its beginning."""
    timed = []
    ratios = {(n, m): 1.0 for n in study.COUNTS for m in study.MARGINS}
    monkeypatch.setattr(study, "times", lambda model, texts, repeats: timed.extend(texts) or ratios)
    monkeypatch.setattr(study, "read", lambda name, tokenizer, count: (name, [loaded[1][:45], loaded[1][20:65]]))
    for (what, run), tokens in zip(study.margins(new=6), (2 * 44, 2 * 6)):
        found = run()["found"]
        assert {(line["rosters"], line["margin"]) for line in found} == ratios.keys()
        assert {line["tokens"] for line in found} == {tokens} and what["text"] in ("held-out", "greedy")
    greedy = [
        list(roe.generate(loaded[0], text[:32], ROSTERS, max_new_tokens=6, seed=i)) for i, text in enumerate(timed)
    ]
    assert timed[2:] == [timed[i][:32] + greedy[i] for i in range(2)]
