"""Roster of Experts (arXiv 2509.17238) for mlx-lm: n noisy routes for each token, one clean history, one average.

A roster is a row of the batch, row 0 the clean path. Noise goes onto the logits R of a router's linear layer, and the
router does the rest as ever: R + tau G also mixes the chosen experts ("perturbed weights"), since to have R do so, the
letter of equation 1, would take rewriting every router. Quantise a model before `add_roe`, not after.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear


def roster_keys(seed, position, rosters):
    """MLX's keys, uint32 [rosters, 2], of a token: functions of the seed, its position in its text and the roster."""
    key = mx.random.split(mx.random.key(seed), 1)[0] ^ mx.random.key(position)
    return mx.random.split(key, 1) ^ mx.stack([mx.random.key(roster) for roster in range(rosters)])


def gumbel(seed, position, rosters, *shape):
    """The noise of a token: i.i.d. Gumbel(0, 1) [rosters, *shape], for rosters [n, L, E]; float32.

    Rosters have keys of their own, so that those of m are the first of n. All noise comes from here. The numbers are
    MLX's, not those of roe.py.
    """
    return mx.vmap(lambda key: mx.random.gumbel(shape, key=key))(roster_keys(seed, position, rosters))


class CleanCache:
    def update_and_fetch(self, keys, values):
        """The Clean Cache (section 2.3): keeps row 0 of [n, Hk, T, D]; a row sees what is kept and its own T tokens."""
        (n, _, T, _), kept = keys.shape, super().update_and_fetch(keys[:1], values[:1])
        if n == 1:
            return kept
        start = mx.array([getattr(self, "_idx", self.offset) - T])  # a sliding window is a ring, written up to _idx
        return [mx.slice_update(mx.repeat(x, n, axis=0), own, start, axes=[2]) for x, own in zip(kept, (keys, values))]


def clean_cache(model):
    """The model's own caches, one per layer, made clean. Raises ValueError if they keep more than keys and values."""
    for cache in (caches := make_prompt_cache(model)):
        if type(cache) not in (KVCache, RotatingKVCache):
            raise ValueError(f"{model.model_type} keeps {type(cache).__name__}; RoE needs layers with a plain KVCache")
        cache.__class__ = type(f"Clean{type(cache).__name__}", (CleanCache, type(cache)), {})
    return caches


def add_roe(model, rosters, tau=0.2, skip=1, seed=0):
    """Makes a model route n equal rows with noise (equation 1) at their last position; one row runs the plain model.

    rosters: n. tau: a number for all mixture layers but the first and last `skip`, or one for each of them. seed: of
    the noise, a function of it and of the token's position in its text, which is what the cache holds before it.
    Raises ValueError: a model or an argument with which this cannot be done.
    """
    remove_roe(model)
    clean_cache(model)
    routers = []
    for layer in model.layers:
        experts = {len(m.weight) for m in layer.modules() if isinstance(m, (SwitchLinear, QuantizedSwitchLinear))}
        named = [m for path, m in layer.named_modules() if {"gate", "router"} & {*path.split(".")[-2:]}]
        linear = [m for m in named if isinstance(m, (nn.Linear, nn.QuantizedLinear)) and len(m.weight) in experts]
        routers += linear if len(linear) == len(experts) else [None]
    if not routers or None in routers:
        raise ValueError(f"no router was found in {model.model_type}: RoE needs linear layers named gate or router")
    L = len(routers)
    tau = list(tau) if hasattr(tau, "__len__") else [tau if skip <= i < L - skip else 0 for i in range(L)]
    if not (rosters > 0 <= skip and len(tau) == L and all(0 <= t < math.inf for t in tau) and 0 <= seed < 2**64):
        raise ValueError(f"{rosters=}, {skip=}, {tau=}, {seed=}: need >= 1, >= 0, {L} >= 0, from 0 to 2**64 - 1")
    roe = SimpleNamespace(rosters=rosters, seed=seed, rows=1)

    def noisy(self, x):
        logits = type(self).__base__.__call__(self, x)
        if roe.rows == 1:
            return logits
        by_row = logits.reshape(roe.rows, -1, logits.shape[-1])  # some models flatten rows and positions
        return by_row.at[:, -1].add(roe.noise[:, self.layer].astype(logits.dtype)).reshape(logits.shape)

    def forward(self, inputs, *, cache=None, **kwargs):
        roe.rows = len(inputs)
        if roe.rows > 1:
            if roe.rows != rosters or (inputs != inputs[:1]).any():
                raise ValueError(f"a batch must have one row, or {rosters} equal ones for the rosters")
            position = inputs.shape[1] - 1 + (cache[0].offset if cache else 0)
            noise = gumbel(seed, position, rosters, L, len(routers[0].weight))
            noise[0] = 0  # row 0 is the clean path
            roe.noise = mx.array(tau)[:, None] * noise
        return type(self).__base__.__call__(self, inputs, cache=cache, **kwargs)

    noisy_routers = [(router, noisy, layer) for layer, router in enumerate(routers) if tau[layer] > 0]
    for module, call, layer in [(model, forward, None), *noisy_routers]:
        module.__class__ = type(type(module).__name__, (type(module),), {"__call__": call, "roe": roe, "layer": layer})


def remove_roe(model):
    """Undoes `add_roe`, which moves no module and no weight: it gives modules a class derived from their own."""
    for module in model.modules():
        if hasattr(module, "roe"):
            module.__class__ = type(module).__base__


def average(logits):
    """Log of the rosters' mean probability (section 3.1): logits [n, ..., V] -> log-probabilities [..., V], float32."""
    return mx.logsumexp(nn.log_softmax(logits.astype(mx.float32)), axis=0) - math.log(len(logits))


def generate(model, tokens, max_new_tokens=128, sampler=None, stop=()):
    """Yields new token ids. Reads the prompt, a list of ids, with one row, and goes on from its last token with all.

    sampler: mlx_lm's; None: greedy. It draws from MLX's global generator, which is seeded for each position: a text
    that is cut and continued goes on as if it had not been. stop: ids that end the text. `model.roe` shows the cache
    and counts the overruled.
    """
    if not hasattr(model, "roe") or len(tokens) == 0:
        raise ValueError("generate needs a model with RoE (see add_roe) and a prompt of at least one token")
    roe, token = model.roe, tokens[-1]
    roe.cache, roe.overruled = clean_cache(model), 0
    for start in range(0, len(tokens) - 1, 2048):
        model(mx.array(tokens[start:-1][:2048])[None], cache=roe.cache)
        mx.eval([cache.state for cache in roe.cache])
    for position in range(len(tokens) - 1, len(tokens) - 1 + max_new_tokens):
        logits = model(mx.full((roe.rosters, 1), token), cache=roe.cache)[:, -1]
        log_probs = average(logits)
        if sampler:
            high, low = roster_keys(roe.seed, position, 1)[0].tolist()  # the clean roster's, which has no noise
            mx.random.seed(high * 2**32 + low)
        token = (sampler(log_probs[None]) if sampler else log_probs.argmax()).item()
        if token in stop:
            return
        roe.overruled += (log_probs.argmax() != logits[0].argmax()).item()
        yield token


def read_tau(argument):
    """What --tau stands for: a number, or else a JSON file with a list of one per mixture layer."""
    try:
        return [*map(float, json.loads(Path(argument).read_text()))] if os.path.isfile(argument) else float(argument)
    except (ValueError, TypeError):
        raise ValueError(f"tau takes a number or a JSON file with a list of them, not {argument!r}") from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Roster of Experts for mlx-lm models.")
    parser.error = lambda message: parser.exit(2, f"roe_mlx.py: error: {' '.join(str(message).split())}\n")
    parser.add_argument("--model", required=True, help="hub id or directory")
    parser.add_argument("--prompt", required=True, help="- reads it from standard input")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    files = "or a JSON file of one per mixture layer [tau.json beside the model, else 0.2]"
    parser.add_argument("--tau", help=f"noise temperature, {files}")
    defaults = {"rosters": 4, "skip": 1, "seed": 0, "max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0}
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"[{default}]")
    args, times = parser.parse_args(), []
    if args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        parser.error("--max-new-tokens must be at least 1, --temperature at least 0, --top-p above 0 and at most 1")
    try:
        text = args.prompt
        if text == "-":
            piped = open(0, encoding="utf-8", newline="", closefd=False).read()
            text = piped.removesuffix("\n").removesuffix("\r")  # which `echo` adds
        model, tokenizer = mlx_lm.load(args.model)
        if mx.default_device() == mx.cpu:
            model.set_dtype(mx.float32)  # on CPUs, MLX multiplies experts in no other
        folder = Path(args.model) if os.path.exists(args.model) else mlx_lm.utils.hf_repo_to_path(args.model)
        beside = str(folder / "tau.json") if (folder / "tau.json").is_file() else "0.2"
        tau = read_tau(beside if args.tau is None else args.tau)
        if args.skip != 1 and isinstance(tau, list):
            raise ValueError("--skip is for one --tau; a file of temperatures says what every layer gets")
        add_roe(model, args.rosters, tau, args.skip, args.seed)
        encode, chat = tokenizer.apply_chat_template, [{"role": "user", "content": text}]
        tokens = encode(chat, add_generation_prompt=True) if args.chat else tokenizer.encode(text)
        sampler, words = mlx_lm.sample_utils.make_sampler(args.temperature, args.top_p), tokenizer.detokenizer
        for token in generate(model, tokens, args.max_new_tokens, sampler, tokenizer.eos_token_ids):
            times.append(time.perf_counter())
            words.add_token(token)
            print(words.last_segment, end="", flush=True)
        words.finalize()
        print(words.last_segment, flush=True)
    except (ValueError, OSError, RuntimeError, KeyError, TypeError) as error:  # what mlx_lm.load raises on broken files
        parser.error(f"{args.model}: {error}")
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else math.nan
    nbytes, overruled = sum(cache.nbytes for cache in model.roe.cache), model.roe.overruled
    line = f"{len(times)} tokens, {speed:.1f} tokens/s, rosters: {args.rosters}, cache: {nbytes:,} bytes; "
    print(f"{line}the average overruled the clean roster on {overruled} of the tokens", file=sys.stderr)
