"""Tests of what is measured about margins: against the program itself, and against other ways to compute the same."""

import itertools
import math

import margin
import pytest
import torch
from effect import VALIDATION

import roe
from cache import SharedCache
from load import EMBEDDED, load

torch.set_num_threads(1)
M = 0.1


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load(EMBEDDED, "cpu", "float32")
    return model, tokenizer.encode(VALIDATION.read_text(encoding="utf-8")[:400]).ids[:81]


def test_ratio():
    """Of equal blocks it is a mean with its standard error; else the jackknife over blocks says nearly the same."""
    value, error = margin.ratio([1, 2, 3, 4], [2, 2, 2, 2])
    assert (value, error) == pytest.approx((1.25, torch.tensor([0.5, 1, 1.5, 2]).std().item() / 2))
    generator = torch.Generator().manual_seed(0)
    whole = 1 + torch.rand(200, generator=generator, dtype=torch.float64)
    part = whole * torch.rand(200, generator=generator, dtype=torch.float64)
    value, error = margin.ratio(part.tolist(), whole.tolist())
    left_out = (part.sum() - part) / (whole.sum() - whole)
    assert value == pytest.approx((part.sum() / whole.sum()).item())
    assert error == pytest.approx(math.sqrt(199 * left_out.var(correction=0)), rel=0.02)


def test_kept_is_what_the_program_keeps(loaded):
    """One pass with `watch` equals a run of `roe.score` for the margin, for every number of rosters."""
    model, text = loaded
    halves = text[:41], text[40:]
    watched = [margin.Tokens() for _ in halves]
    found, gains, unsure = {}, 0, 0
    for half, watch in zip(halves, watched):
        clean = roe.score(model, half, margin.ROSTERS, watch=watch)[0]
        scores = roe.score(model, half, margin.ROSTERS, margin=M)
        gains += (scores - clean).double().sum(1)
        unsure += (scores[1] != clean).sum().item()  # rosters change every prediction that they make a little
    found = {(line["rosters"], line["margin"]): line for line in margin.kept(watched)}
    for n in margin.COUNTS:
        assert found[n, M]["gain"] * 80 == pytest.approx(gains[n - 1].item(), abs=1e-4)  # sums of 80 float32 scores
        assert found[n, M]["share"] * 80 == pytest.approx(unsure)
        assert found[n, M]["gain_kept"] == pytest.approx(found[n, M]["gain"] / found[n, 1]["gain"])
        assert found[n, 1]["share"] == found[n, 1]["gain_kept"] == found[n, 1]["overruled_kept"] == 1


def test_overruled():
    """Two tokens of which all but the clean roster want another, at margins of 0.3 and 0.03, and a certain one."""
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.47, 0.03], [1.0, 0.0, 0.0]]).repeat(margin.ROSTERS, 1, 1)
    probs[1:, :2] = torch.tensor([0.05, 0.9, 0.05])
    watch = margin.Tokens()
    watch(probs.log().clamp(min=-200), None, torch.tensor([1, 0, 0]), None)
    found = {(line["rosters"], line["margin"]): line for line in margin.kept([watch, watch])}
    assert [found[8, m]["overruled_kept"] for m in margin.MARGINS] == [0, 0.5, 0.5, 0.5, 1, 1]
    assert [3 * found[8, m]["share"] for m in margin.MARGINS] == pytest.approx([0, 1, 1, 1, 2, 3])
    assert found[8, M]["overruled"] == 4 and found[8, M]["tokens"] == 6
    assert found[4, M]["gain"] == pytest.approx(math.log((0.5 + 3 * 0.05) / 4 / 0.5) / 3)


def test_decode_replays_what_generate_does(loaded):
    """Rosters run on as many tokens, and the cache is left as it was."""
    model, text = loaded
    prompt, rosters = text[:40], []
    watch = lambda logits, *_: rosters.append(len(logits))
    new = list(roe.generate(model, prompt, 4, max_new_tokens=40, margin=M, watch=watch))
    cache, tau = SharedCache(model.config, 80), roe.temperatures(model.config)
    roe.predict(model, prompt[:-1], cache, 1, tau, 0)
    for _ in range(2):
        seconds, unsure = margin.decode(model, [*prompt[-1:], *new[:-1]], cache, 4, M, tau)
        assert unsure == rosters.count(4) and 0 < unsure < 40 and seconds > 0 and cache.length == 39
    assert margin.decode(model, prompt[-1:], cache, 4, 1.0, tau)[1] == 1


def test_relative():
    """Times are compared within a repeat, so a slow one does not count."""
    seconds = {"one": [0.001, 0.1, 0.001], "other": [0.003, 0.3, 0.002]}
    found = dict(margin.relative(seconds, "one"))
    assert found["other"] == {"ms": pytest.approx(3), "ratio": pytest.approx(3), "ratios": [3, 3, 2]}


@pytest.mark.parametrize("tenths", margin.SHARES)
def test_spread(tenths):
    pattern = list(itertools.islice(margin.spread(tenths), 40))
    assert all(sum(pattern[start : start + 10]) == tenths for start in range(31))
