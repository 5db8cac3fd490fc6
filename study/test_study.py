"""Tests of the studies: that texts, controls and fits are what they say."""

import math

import captured
import controls
import effect
import pytest
import sizes
import tables
import torch

import roe
from load import load
from model import OLMoE, top_k

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def loaded():
    return load(device="cpu", dtype="float32")


def test_slices(loaded):
    """Every piece is what the text says at evenly spaced places."""
    _, tokenizer = loaded
    text = "\n".join(f"line {i} of a text" for i in range(10_000))
    pieces = effect.slices(tokenizer, text, 5)
    assert [len(piece) for piece in pieces] == 5 * [effect.BLOCK + 1]
    starts = [text.index(tokenizer.decode(piece)) for piece in pieces]
    assert starts[0] == 0 and len({b - a for a, b in zip(starts, starts[1:])}) <= 2  # but for rounding


def test_package_text():
    text, versions = effect.package_text({"iniconfig": "iniconfig/__init__.py"})
    import iniconfig

    with open(iniconfig.__file__, encoding="utf-8", newline="") as file:
        assert text == file.read()
    assert versions.startswith("iniconfig ") and versions.split()[1][0].isdigit()


def test_softening():
    """What is 1.5 times too confident, and its cure: the rosters gain nothing beyond it."""
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(40 * effect.BLOCK, 30, generator=generator).log_softmax(-1)
    targets = log_probs.exp().multinomial(1, generator=generator)[:, 0]
    clean, average = effect.Softened(), effect.Softened()
    clean((1.5 * log_probs).log_softmax(-1)[None], targets)
    average(log_probs[None], targets)
    found = effect.softening(clean, average)
    assert (found["clean_temperature"], found["temperature"]) == (1.5, 1)
    assert found["softened"] == pytest.approx(0, abs=1e-6) and found["softened_error"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rule, weights", [("perturbed", "perturbed"), ("experts_only", "clean")])
def test_controls_measure_what_rosters_are_measured_with(loaded, rule, weights):
    """`run` with a rule equals `roe.score` with its reading and the same noise."""
    model, tokenizer = loaded
    tokens, tau, n = tokenizer.encode("def push(self, item):\n").ids, roe.temperatures(model.config, 0.5), 4
    noise = lambda positions: captured.draw(model.config, n, tau, 7, positions)
    make = lambda positions: controls.noisy_route(2, noise(positions), getattr(controls, rule))
    parts = [roe.aggregate(p).gather(-1, t[:, None])[:, 0] for p, t in controls.run(model, tokens, make)]
    torch.testing.assert_close(torch.cat(parts), effect.score(model, tokens, n, tau, 7, weights)[-1])


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


@pytest.mark.parametrize("name", "tune tuned rosters texts counts tau controls controls_time".split())
def test_tables(name):
    """Every table of the studies has lines, each with as many cells as its head."""
    head, rule, *rows = getattr(tables, f"table_{name}")().splitlines()
    assert rows and {line.count(" | ") for line in rows} == {head.count(" | ")} == {rule.count(" | ")}
