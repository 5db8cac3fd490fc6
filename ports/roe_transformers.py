"""Roster of Experts (RoE, arXiv 2509.17238) for Hugging Face transformers' mixture-of-experts models, in one file.

    add_roe(model, rosters=8)
    ids = generate(model, tokenizer("Why is the sky blue?", return_tensors="pt").input_ids)

The n rosters of a token are n equal rows, and n queries to one history: that of row 0, the clean path (2.3). The
others get noise in their routers (2.1), at the last position; the predictions of all are averaged (3.1). A router runs
once more in a mode that sees what it asks of torch: its first product, the logits R, becomes R + tau G, and what it
makes of them are "perturbed" weights. For "clean" ones it then runs without noise, but its top-k choose as before."""

import argparse
import hashlib
import inspect
import json
import math
import os
import sys
import time
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

TAU, WEIGHTS = 0.2, "perturbed"  # the defaults; "clean" is the letter of equation 1
CHOICES = torch.return_types.topk, torch.return_types.max
RUN, DRAW = ContextVar("a thread's pass of n rows", default=None), ContextVar("the noise of its next sample")
OURS = {"sdpa": "roe_sdpa", "eager": "roe_eager"}  # names of attention functions that take any mask, and of ours


def gumbel(seed: int, position: int, *shape: int) -> Tensor:
    """The noise of a token: i.i.d. Gumbel(0, 1) of any shape, [n, L, E] for rosters; float32, on the CPU.

    Every 4 bytes of the endless SHAKE-128 stream of the seed and the token's position in its text make a value. Fewer
    rosters read less of it, so that the noise of m rosters is that of the first m of n. All noise comes from here.
    """
    digest = hashlib.shake_128(f"{seed:d} {position:d}".encode()).digest(4 * math.prod(shape))
    uniform = (torch.frombuffer(bytearray(digest), dtype=torch.int32).double() + 2**31 + 0.5) / 2**32  # never 0 or 1
    return -(-uniform.log()).log().float().view(shape)


class Noise(torch.overrides.TorchFunctionMode):
    """A pass of n rows. While it is a router's mode, the router's logits [n * T, E] get noise at the last positions."""

    noise, ran = None, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.logits is None and func in (torch.nn.functional.linear, torch.mm, torch.matmul):
            out = out if self.kind == "Llama4Router" else out.float()  # whose experts multiply by what it makes of them
            if self.noise is None:  # it is drawn once for all routers
                self.noise = self.draw(out.shape[-1]).to(out.device)
                self.noise[0] = 0
            self.logits = out.view(len(self.noise), -1, out.shape[-1])[:, -1]
            self.logits += self.tau * self.noise[:, self.layer].to(out.device)
        elif isinstance(out, CHOICES) and (indices := next(self.again, None)) is not None:
            values = args[0].gather(-1, indices.view(*args[0].shape[:-1], -1)).view(indices.shape)
            return type(out)((values, indices))
        elif isinstance(out, CHOICES):
            self.chosen.append(out.indices)
        return out


class RoE(SimpleNamespace):
    """What `add_roe` puts on a model as `model.roe`: settings, and hooks. A copy of the model has its own."""

    @torch.compiler.disable
    def before(self, base, args, kwargs):
        x = next(x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        named = {name for name in kwargs if isinstance(kwargs[name], Cache)} <= {self.cache_name, "past_key_values"}
        known = named and all(isinstance(cache, CleanCache) for cache in caches)  # others would keep all rows
        if len(x) > 1 and not (len(x) == self.rosters and known and (x == x[:1]).all()):
            raise ValueError(f"a batch must have one row, or {self.rosters} equal ones and a CleanCache for them")
        length = caches[0].get_seq_length() if caches else 0
        for cache in caches if known else ():
            cache.ids = cache.ids[:length] + (x[0].tolist() if x.dim() == 2 else [None] * x.shape[1])
            cache.folds = x.shape[1] == 1 and all(c._attn_implementation in OURS.values() for c in self.configs)
        run = Noise()
        run.draw = partial(gumbel, self.seed, length + x.shape[1] - 1, self.rosters, len(self.tau))
        RUN.set(run if len(x) > 1 else None)

    def after(self, base, args, out):
        run, noisy, _ = RUN.get(), len(self.hooks) - 2, RUN.set(None)
        if run and out is not None and run.ran != noisy:  # without `out` an exception is on its way
            raise ValueError(f"{base.config.model_type} used {run.ran} of {noisy} noisy routers; RoE misses the others")

    @torch.compiler.disable
    def route(self, layer, router, args, kwargs, out):
        if not (run := RUN.get()):
            return out
        run.kind, run.layer, run.tau, run.ran = type(router).__name__, layer, self.tau[layer], run.ran + 1
        run.logits, run.chosen, run.again = None, [], iter(())
        with run:
            out = router.forward(*args, **kwargs)
        if run.logits is None or self.weights == "clean" and not run.chosen:
            raise ValueError(f"{run.kind} shows RoE no logits or no top-k, as {self.weights} weights need it")
        run.again = iter(run.chosen)
        with run:
            return router.forward(*args, **kwargs) if self.weights == "clean" else out


def add_roe(model, rosters, tau=None, skip=1, seed=0, weights=WEIGHTS):
    """Makes a model route batches of `rosters` equal rows with noise (equation 1); one row stays what it is.
    `tau`: of all mixture layers but the first and last `skip`, or one for each (2.2), or a JSON file's name; None: that
    of `tau.json` beside the model, else 0.2. `weights` of what is chosen: for R + tau G ("perturbed") or R ("clean").
    Raises ValueError for arguments out of range, and models that this cannot be right for."""
    model = unwrap(model)
    kind, module, modules = model.config.model_type, sys.modules[type(model).__module__], dict(model.named_modules())
    odd = {type(layer) for layer in CleanCache(config=model.config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    own = [v for k, v in vars(module).items() if k.endswith("Cache") and v.__module__ == module.__name__]
    if odd or own or model._is_stateful or model.config.is_encoder_decoder:
        raise ValueError(f"{kind} has another memory than keys and values in a DynamicCache; RoE knows no other")
    blocks = [name.removesuffix("experts") for name in modules if name.endswith(".experts")]
    routers = [modules[b + name] for b in blocks for name in ("gate", "router") if b + name in modules]
    if not (L := len(routers)):
        raise ValueError(f"{kind} has no router that RoE can find: a module `gate` or `router` beside `experts`")
    if tau is None and model.name_or_path:
        commit = getattr(model.config, "_commit_hash", None)  # of models from the hub
        quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        tau = transformers.utils.cached_file(model.name_or_path, "tau.json", revision=commit, **quiet)
    if isinstance(file := tau, str):
        with open(file, "rb") as opened:
            tau = json.load(opened)
        if type(tau) is not list or not all(type(value) in (int, float) for value in tau):
            raise ValueError(f"{file} is not a JSON list of numbers")
    tau = torch.as_tensor(TAU if tau is None else tau, dtype=torch.float64).tolist()
    tau = [tau if skip <= i < L - skip else 0.0 for i in range(L)] if isinstance(tau, float) else tau
    whole = not any(isinstance(value, bool) or not hasattr(value, "__index__") for value in (rosters, skip, seed))
    tau_in_range = len(tau) == L and all(0 <= value <= 100 for value in tau)
    if not (whole and rosters > 0 <= skip and tau_in_range and weights in ("clean", "perturbed")):
        raise ValueError(f"{rosters=}, {skip=}, {tau=}, {seed=}, {weights=}: need whole >= 1, >= 0, {L} of 0-100")
    remove_roe(model)
    roe = model.roe = RoE(rosters=rosters.__index__(), tau=tau, seed=seed.__index__(), weights=weights)
    base, noisy = model.base_model, [i for i in range(L) if tau[i] > 0 and rosters > 1]
    roe.cache_name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
    roe.configs = [*{id(part.config): part.config for part in modules.values() if hasattr(part, "config")}.values()]
    for config in roe.configs if model._can_set_attn_implementation() else ():
        config._attn_implementation_internal = OURS.get(config._attn_implementation, config._attn_implementation)
    first = {"with_kwargs": True, "prepend": True}  # before hooks that shard what a router returns
    roe.hooks = [routers[i].register_forward_hook(partial(roe.route, i), **first) for i in noisy]
    roe.hooks.append(base.register_forward_pre_hook(roe.before, with_kwargs=True))
    roe.hooks.append(base.register_forward_hook(roe.after, always_call=True))


def remove_roe(model):
    """Undoes `add_roe`; does nothing to a model without it."""
    if roe := vars(unwrap(model)).pop("roe", None):
        for hook in roe.hooks:
            hook.remove()
        for config in roe.configs:
            if config._attn_implementation in OURS.values():
                config._attn_implementation_internal = config._attn_implementation.removeprefix("roe_")


def unwrap(model):
    """The model of transformers in what wraps it, such as PEFT's adapters."""
    if hasattr(model, "prompt_encoder"):
        raise ValueError("prompts that PEFT has learned are no tokens, and RoE needs to know every token's position")
    return next(module for module in model.modules() if isinstance(module, transformers.PreTrainedModel))


class CleanCache(DynamicCache):
    """The Clean Cache (section 2.3): keeps row 0, and hands each row the clean history with its own new tokens. While
    it `folds`, n rows of one token get one row: the history and all n own. `ids`: the tokens that it holds."""

    ids, folds = [], False

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # of T new positions, [n, heads, T, D]
        n, _, T, _ = key_states.shape
        clean = super().update(key_states[:1], value_states[:1], layer_idx, *args, **kwargs)
        if n > 1 and self.folds:
            own = key_states[1:].transpose(0, 2), value_states[1:].transpose(0, 2)
            return torch.cat((clean[0], own[0]), 2), torch.cat((clean[1], own[1]), 2)
        rows = [kept[:, :, : kept.shape[2] - T].expand(n, -1, -1, -1) for kept in clean]
        return clean if n == 1 else (torch.cat((rows[0], key_states), 2), torch.cat((rows[1], value_states), 2))


def attend(name, module, query, key, value, attention_mask, *args, **kwargs):
    """The attention function of a name, to which n rows of one query each are one row of n: query [n, H, 1, D], key and
    value [1, Hk, S + n, D] as `CleanCache` folds them. A row sees what row 0's mask shows of the history, and of the n
    last positions its own. Returns [n, 1, H, D] and weights, [1, H, n, S + n] or None."""
    plain = transformers.AttentionInterface().get(name) or sys.modules[type(module).__module__].eager_attention_forward
    n, S, far = len(query), key.shape[2] - len(query), torch.finfo(query.dtype).min
    if n == len(key):
        return plain(module, query, key, value, attention_mask, *args, **kwargs)
    seen = query.new_zeros(1, 1, 1, S) if attention_mask is None else attention_mask[:1, :, :, :S]
    seen = torch.where(seen, 0.0, far).to(query.dtype) if seen.dtype == torch.bool else seen
    own = query.new_full((n, n), far).fill_diagonal_(0).expand(1, seen.shape[1], n, n)
    mask = torch.cat((seen.expand(-1, -1, n, -1), own), 3)
    out, weights = plain(module, query.transpose(0, 2), key, value, mask, *args, **kwargs)
    return out.transpose(0, 1), weights


for name, ours in OURS.items():
    transformers.AttentionInterface.register(ours, partial(attend, name))
    transformers.AttentionMaskInterface.register(ours, transformers.AttentionMaskInterface()[name])


class EqualRows(Tensor):
    """Scores [n, vocab] with equal rows. What is drawn from them is drawn once, for all, with Gumbel noise [vocab]."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.multinomial:  # args[0]: the probabilities
            noisy = args[0][0].as_subclass(Tensor).log() + DRAW.get()().to(args[0].device)
            return noisy.argmax().repeat(len(args[0]), 1)
        x = super().__torch_function__(func, types, args, kwargs)
        return x.as_subclass(Tensor) if func is torch.argmax else x


class Average(transformers.LogitsProcessor):
    """Log of the rows' mean probability (section 3.1) plus the clean row's normaliser, in every row: of one roster, its
    logits. Samples are drawn from it as in roe.py. `overruled` counts where row 0 chose otherwise."""

    def __init__(self, seed=0):
        self.seed, self.overruled = seed, 0

    def __call__(self, input_ids, scores):
        norms = (scores := scores.float()).logsumexp(-1, keepdim=True)
        mean = (scores - (norms - norms[0])).logsumexp(0) - math.log(len(scores))
        self.overruled = self.overruled + (mean.argmax() != scores[0].argmax())
        DRAW.set(partial(gumbel, self.seed, -input_ids.shape[1], len(mean)))
        return mean.repeat(len(scores), 1).as_subclass(EqualRows)


@torch.inference_mode()
def generate(model, input_ids, attention_mask=None, cache=None, average=None, streamer=None, **options):
    """Continues one text, ids [1, T], with the rosters of `add_roe`: reads with one row what its `CleanCache` does not
    hold yet, writes with n. Takes what `model.generate` takes, and an `Average` to look at; returns ids [1, T + new
    ones], or with return_dict_in_generate n rows of all."""
    model, T = unwrap(model), input_ids.shape[1]
    padded = attention_mask is not None and not attention_mask.all()
    if not hasattr(model, "roe") or len(input_ids) != 1 or T == 0 or padded:
        raise ValueError("generate continues one text, ids [1, T >= 1] without padding, with a model after add_roe")
    roe, cache = model.roe, CleanCache(config=model.config) if cache is None else cache
    start = cache.get_seq_length()
    if not isinstance(cache, CleanCache) or start >= T or cache.ids[:start] != input_ids[0, :start].tolist():
        raise ValueError(f"the cache must be a CleanCache with a beginning of the text, or empty; it holds {start}")
    cached = {roe.cache_name: cache, "use_cache": True}
    if start < T - 1:
        model.base_model(input_ids=input_ids[:, start:-1], **cached)
    options["logits_processor"] = [average or Average(roe.seed), *(options.get("logits_processor") or [])]
    options["streamer"] = streamer and SimpleNamespace(put=lambda ids: streamer.put(ids[:1]), end=streamer.end)
    rows = input_ids.repeat(roe.rosters, 1)
    out = model.generate(rows, attention_mask=torch.ones_like(rows), **options | cached)
    if len(cache.ids) != cache.get_seq_length():
        raise ValueError("not every token had rosters: something goes past the hooks of RoE")
    return out[:1] if isinstance(out, Tensor) else out


if __name__ == "__main__":
    description, epilog = "Roster of Experts for models of transformers.", "The options are those of roe.py."
    parser = argparse.ArgumentParser(description=description, epilog=epilog)
    options = {"model": "", "prompt": "", "rosters": 4, "skip": 1, "weights": WEIGHTS, "seed": 0}
    options |= {"max-new-tokens": 128, "temperature": 0.0, "top-p": 1.0, "dtype": "auto"}
    for name, value in options.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, required=value == "", help=f"[{value}]")
    parser.add_argument("--tau", help=f"one number, or a JSON file [tau.json beside the model, else {TAU}]")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    args, times, where = parser.parse_args(), [], {"device_map": "auto"} if torch.accelerator.is_available() else {}
    if os.environ.get("RANK", "0") != "0":  # all processes write the same text
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        if not args.temperature >= 0:
            raise ValueError(f"--temperature must be 0 (greedy) or more, not {args.temperature}")
        tau = args.tau if args.tau is None or os.path.isfile(args.tau) else float(args.tau)
        if "RANK" in os.environ:  # torchrun
            where = {"distributed_config": transformers.distributed.DistributedConfig(tp_plan="auto")}
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, **where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        add_roe(model, args.rosters, tau, args.skip, args.seed, args.weights)
        text = sys.stdin.read() if args.prompt == "-" else args.prompt
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) if args.chat else text
        ids = tokenizer(text, add_special_tokens=not args.chat, return_tensors="pt").input_ids.to(model.device)
        options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
        options |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0} if args.temperature > 0 else {}
        text = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        cache, average = CleanCache(config=model.config), Average(args.seed)
        timed = SimpleNamespace(put=lambda ids: (times.append(time.perf_counter()), text.put(ids)), end=text.end)
        n = generate(model, ids, cache=cache, average=average, streamer=timed, **options).shape[1] - ids.shape[1]
    except (ValueError, OSError, ImportError) as error:  # the last where accelerate is missing
        parser.exit(2, f"roe_transformers.py: error: {' '.join(str(error).split())}\n")
    speed, nbytes = (n - 1) / (times[-1] - times[1] or 1), sum(kv.keys.nbytes + kv.values.nbytes for kv in cache.layers)
    stats = f"{n} tokens, {speed:.1f} tokens/s, rosters: {args.rosters}, cache: {nbytes:,} bytes; the average overruled"
    print(stats, f"the clean roster on {average.overruled} of the tokens", file=sys.stderr)
