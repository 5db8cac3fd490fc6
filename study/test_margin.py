"""Tests of margins: the example against the rule, on transformers' probabilities; what is measured against the example.

Tolerances are those of test_roe.py.
"""

import itertools
import math

import margin
import margin_study as study
import pytest
import torch
from effect import VALIDATION

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
    gains, unsure = dict.fromkeys(study.COUNTS, 0.0), dict.fromkeys(study.COUNTS, 0)
    for half, watch in zip(halves, watched):
        roe.score(model, half, study.ROSTERS, watch=watch)
        for n in study.COUNTS:
            cache = SharedCache(model.config, 40)
            for token, target in zip(half, half[1:]):
                logits = margin.predict(model, [token], cache, n, M, None, 0)
                gains[n] += (roe.aggregate(logits) - logits[0].log_softmax(-1))[target].item()
                unsure[n] += len(logits) > 1
    found = {(line["rosters"], line["margin"]): line for line in study.kept(watched)}
    for n in study.COUNTS:
        assert found[n, M]["gain"] * 80 == pytest.approx(gains[n], abs=1e-4)  # sums of 80 float32 scores
        assert found[n, M]["share"] * 80 == pytest.approx(unsure[n]) and 0 < unsure[n] < 80
        assert found[n, M]["gain_kept"] == pytest.approx(found[n, M]["gain"] / found[n, 1]["gain"])
        assert found[n, 1]["share"] == found[n, 1]["gain_kept"] == found[n, 1]["overruled_kept"] == 1


def test_overruled():
    """Two tokens of which all but the clean roster want another, at margins of 0.3 and 0.03, and a certain one."""
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.47, 0.03], [1.0, 0.0, 0.0]]).repeat(study.ROSTERS, 1, 1)
    probs[1:, :2] = torch.tensor([0.05, 0.9, 0.05])
    watch = study.Tokens()
    watch(probs.log().clamp(min=-200), None, torch.tensor([1, 0, 0]), None)
    found = {(line["rosters"], line["margin"]): line for line in study.kept([watch, watch])}
    assert [found[8, m]["overruled_kept"] for m in study.MARGINS] == [0, 0.5, 0.5, 0.5, 1, 1]
    assert [3 * found[8, m]["share"] for m in study.MARGINS] == pytest.approx([0, 1, 1, 1, 2, 3])
    assert found[8, M]["overruled"] == 4 and found[8, M]["tokens"] == 6
    assert found[4, M]["gain"] == pytest.approx(math.log((0.5 + 3 * 0.05) / 4 / 0.5) / 3)


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


def test_relative():
    """Times are compared within a repeat, so a slow one does not count."""
    seconds = {"one": [0.001, 0.1, 0.001], "other": [0.003, 0.3, 0.002]}
    found = dict(study.relative(seconds, "one"))
    assert found["other"] == {"ms": pytest.approx(3), "ratio": pytest.approx(3), "ratios": [3, 3, 2]}


@pytest.mark.parametrize("tenths", study.SHARES)
def test_spread(tenths):
    pattern = list(itertools.islice(study.spread(tenths), 40))
    assert all(sum(pattern[start : start + 10]) == tenths for start in range(31))
