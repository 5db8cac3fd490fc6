"""Roster of Experts (arXiv 2509.17238) for mlx-lm: n noisy routes for each token, one clean history, one average.

    model, tokenizer = mlx_lm.load("mlx-community/OLMoE-1B-7B-0125-Instruct-4bit")
    add_roe(model, rosters=8)
    for token in generate(model, tokenizer.encode("Once upon a time"), stop=tokenizer.eos_token_ids): ...

The rosters are the rows of a batch; row 0 is the clean path. Noise goes onto the logits R that a router's linear layer
puts out, and the router does with them what it always does: the chosen experts are mixed by R + tau G ("perturbed
weights"). To mix them by R alone, the letter of equation 1, would take rewriting every router. Quantise before add_roe.
"""

import argparse
import json
import math
import sys
import time
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.sample_utils import make_sampler


def gumbel(shape, key):
    """I.i.d. Gumbel(0, 1) noise, float32. All noise comes from here: one call per noisy layer and token, [n - 1, E]."""
    return mx.random.gumbel(shape, key=key)


class Clean:
    """The Clean Cache (section 2.3) of a layer: keeps row 0; every row sees what it keeps and its own current token."""

    def update_and_fetch(self, keys, values):  # [n, Hk, T, D] of T new tokens -> [n, Hk, S, D] of all that is visible
        (n, _, T, _), history = keys.shape, super().update_and_fetch(keys[:1], values[:1])
        if n == 1:
            return history
        end = getattr(self, "_idx", self.offset)  # a sliding window is a ring, written up to _idx
        rows = [mx.repeat(kept, n, axis=0) for kept in history]  # only until this layer's attention is done
        for row, own in zip(rows, (keys, values)):
            row[..., end - T : end, :] = own
        return rows


def clean_cache(model):
    """The model's own caches, one per layer, made clean. Raises ValueError if they keep more than keys and values."""
    caches = make_prompt_cache(model)
    for cache in caches:
        if type(cache) not in (KVCache, RotatingKVCache):
            raise ValueError(f"{model.model_type} keeps {type(cache).__name__}; RoE needs layers with a plain KVCache")
        cache.__class__ = type(f"Clean{type(cache).__name__}", (Clean, type(cache)), {})
    return caches


def add_roe(model, rosters, tau=0.2, skip=1, seed=0):
    """Makes the routers noisy (equation 1) at the last position of rows 1 to n - 1, in a batch of n > 1 equal rows.

    rosters: the n of `generate`. tau: one number for all mixture layers but the first and last `skip`, or a list of one
    per mixture layer. Raises ValueError: a model or an argument with which this cannot be done.
    """
    if hasattr(model, "roe") or rosters < 1 or skip < 0:
        raise ValueError("RoE needs a model without RoE (see remove_roe), at least 1 roster and a skip of at least 0")
    clean_cache(model)
    routers, name = [], model.model_type
    for i, layer in enumerate(model.layers):
        modules = layer.named_modules()
        experts = {len(m.weight) for _, m in modules if isinstance(m, (SwitchLinear, QuantizedSwitchLinear))}
        linear = [(path, m) for path, m in modules if isinstance(m, (nn.Linear, nn.QuantizedLinear))]
        named = [m for path, m in linear if {"gate", "router"} & {*path.split(".")[-2:]} and len(m.weight) in experts]
        if len(named) != len(experts):
            raise ValueError(f"{name}: layer {i} has experts, but no router that is a linear layer `gate` or `router`")
        routers += named
    if isinstance(tau, (int, float)):
        tau = [tau if skip <= i < len(routers) - skip else 0 for i in range(len(routers))]
    if not routers or len(tau) != len(routers) or not all(0 <= t < math.inf for t in tau):
        raise ValueError(f"{name} has {len(routers)} mixture layers; give tau >= 0, one or as many as they are, not {tau}")
    roe = SimpleNamespace(rosters=rosters, rows=1, seed=seed, key=mx.random.key(seed))

    def noisy(plain, tau):
        def call(self, x):
            logits = plain(self, x)
            if roe.rows == 1:
                return logits
            roe.key, key = mx.random.split(roe.key)
            noise = tau * gumbel((roe.rows - 1, logits.shape[-1]), key)
            by_row = logits.reshape(roe.rows, -1, logits.shape[-1])  # some models flatten rows and positions
            return by_row.at[1:, -1].add(noise.astype(logits.dtype)).reshape(logits.shape)

        return call

    def forward(self, inputs, *args, **kwargs):
        roe.rows = len(inputs)
        return type(self).__base__.__call__(self, inputs, *args, **kwargs)

    calls = [(router, noisy(type(router).__call__, t)) for router, t in zip(routers, tau) if t > 0]
    for module, call in [*calls, (model, forward)]:  # each stays in place and gets a class derived from its own
        module.__class__ = type(type(module).__name__, (type(module),), {"__call__": call, "roe": roe})


def remove_roe(model):
    """Undoes `add_roe`."""
    for module in model.modules():
        if hasattr(module, "roe"):
            module.__class__ = type(module).__base__


def average(logits):
    """Log of the rosters' mean probability (section 3.1): logits [n, ..., V] -> log-probabilities [..., V], float32."""
    return mx.logsumexp(nn.log_softmax(logits.astype(mx.float32)), axis=0) - math.log(len(logits))


def generate(model, tokens, max_new_tokens=128, sampler=None, stop=()):
    """Yields new token ids. Reads the prompt, a list of ids, with one row, and goes on from its last token with all.

    sampler: one of mlx_lm's; None: greedy. stop: ids before which the text ends. The noise starts from `add_roe`'s seed.
    `model.roe.cache` and `model.roe.overruled` (of how many tokens the clean row was not the average) are for looking.
    """
    if not hasattr(model, "roe") or len(tokens) == 0:
        raise ValueError("generate needs a model with RoE (see add_roe) and a prompt of at least one token")
    roe, token = model.roe, tokens[-1]
    roe.key, roe.cache, roe.overruled = mx.random.key(roe.seed), clean_cache(model), 0
    for start in range(0, len(tokens) - 1, 2048):
        model(mx.array(tokens[start:-1][:2048])[None], cache=roe.cache)
        mx.eval([cache.state for cache in roe.cache])
    for _ in range(max_new_tokens):
        logits = model(mx.full((roe.rosters, 1), token), cache=roe.cache)[:, -1]
        log_probs = average(logits)
        token = (sampler(log_probs[None]) if sampler else log_probs.argmax()).item()
        if token in stop:
            return
        roe.overruled += (log_probs.argmax() != logits[0].argmax()).item()
        yield token


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"roe_mlx.py: error: {' '.join(str(message).split())}\n")
    parser.add_argument("--model", required=True, help="hub id or directory")
    parser.add_argument("--prompt", required=True, help="- reads it from standard input")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    parser.add_argument("--tau", type=json.loads, default=0.2, help="a number, or a JSON list of one per mixture layer")
    defaults = {"rosters": 4, "skip": 1, "seed": 0, "max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0}
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"[{default}]")
    args, times = parser.parse_args(), []
    try:
        text = sys.stdin.read() if args.prompt == "-" else args.prompt
        model, tokenizer = mlx_lm.load(args.model)
        if mx.default_device() == mx.cpu:
            model.set_dtype(mx.float32)  # on CPUs, MLX multiplies experts in no other
        chat = [{"role": "user", "content": text}]
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True) if args.chat else tokenizer.encode(text)
        add_roe(model, args.rosters, args.tau, args.skip, args.seed)
        mx.random.seed(args.seed)
        sampler, words = make_sampler(args.temperature, args.top_p), tokenizer.detokenizer
        for token in generate(model, tokens, args.max_new_tokens, sampler, tokenizer.eos_token_ids):
            times.append(time.perf_counter())
            words.add_token(token)
            print(words.last_segment, end="", flush=True)
        words.finalize()
        print(words.last_segment, flush=True)
    except (ValueError, OSError) as error:
        parser.error(error)
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else math.nan
    print(
        f"{len(times)} tokens, {speed:.1f} tokens/s, rosters: {args.rosters}, cache: "
        f"{sum(cache.nbytes for cache in model.roe.cache):,} bytes; the average overruled the clean roster on "
        f"{model.roe.overruled} of the tokens",
        file=sys.stderr,
    )
