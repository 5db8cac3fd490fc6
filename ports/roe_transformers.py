"""Roster of Experts (RoE, arXiv 2509.17238) for Hugging Face transformers' mixture-of-experts models, in one file.

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", dtype="auto")
    add_roe(model, rosters=8)
    ids = generate(model, tokenizer("Why is the sky blue?", return_tensors="pt").input_ids)

The n rosters of a token are n equal rows of a batch; row 0 is the clean path. Only its keys and values are kept (2.3).
The others get noise in their routers (2.1), at the last position; the predictions of all rows are averaged (3.1). The
noise is a function of seed and position, the one of roe.py: in float32 one seed is one text there and here.
No router is rewritten. Its own forward runs under a `TorchFunctionMode`, which sees all that it asks of torch: for its
first matrix product, the logits R, it is handed R + tau G, and what it makes of them are the "perturbed" weights. For
"clean" ones it runs again, without noise, but each of its top-k is made to choose what it chose with noise: so it gives
its own weights, by its own rule, to the experts that noise chose."""

import argparse
import hashlib
import inspect
import json
import math
import os
import sys
import time
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessor, TextStreamer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.distributed import DistributedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.utils import cached_file

TAU, WEIGHTS = 0.2, "perturbed"  # the defaults; "clean" is the letter of equation 1
CHOICES = torch.return_types.topk, torch.return_types.max
ATTENTION = {"sdpa": "roe_sdpa", "eager": "roe_eager"}  # the names of functions that take a mask, and of ours


def gumbel(seed: int, position: int, *shape: int) -> Tensor:
    """The noise of a token: i.i.d. Gumbel(0, 1) of any shape, for rosters [n, L, E]; float32, on the CPU.

    It is a hash of the seed and of the token's position in its text, and depends on nothing else. A shorter hash begins
    a longer one, so that the noise of m rosters is that of the first m of n. All noise comes from here.
    """
    digest = hashlib.shake_128(f"{seed:d} {position:d}".encode()).digest(4 * math.prod(shape))
    uniform = (torch.frombuffer(bytearray(digest), dtype=torch.int32).double() + 2**31 + 0.5) / 2**32  # never 0 or 1
    return -(-uniform.log()).log().float().view(shape)


def roster_noise(*args):
    """`gumbel` for rosters [n, L, E], of which row 0, the clean path, has none."""
    noise = gumbel(*args)
    noise[0] = 0
    return noise


class NoisyForward(TorchFunctionMode):
    """A router's forward, with noise in rows 1 to n - 1 of its logits [n * T, E], at the last position."""

    def __init__(self, roe, router, layer, tau):
        super().__init__()
        self.roe, self.plain, self.kind, self.layer, self.tau = roe, router.forward, type(router).__name__, layer, tau

    def __call__(self, *args, **kwargs):
        if self.roe.rows == 1:
            return self.plain(*args, **kwargs)
        self.roe.ran += 1
        self.logits, self.chosen, self.again, clean = None, [], iter(()), self.roe.weights == "clean"
        with self:
            out = self.plain(*args, **kwargs)
        if self.logits is None or (clean and not self.chosen):
            raise ValueError(f"{self.kind} shows RoE no logits or no top-k, as {self.roe.weights} weights need it")
        self.again = iter(self.chosen)
        with self:
            return self.plain(*args, **kwargs) if clean else out

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.logits is None and func in (torch.nn.functional.linear, torch.mm, torch.matmul):
            out = out if self.kind == "Llama4Router" else out.float()  # whose experts multiply by what it makes of them
            self.logits = out.view(self.roe.rows, -1, out.shape[-1])[:, -1]
            if self.roe.noise is None:  # it is drawn once for all routers
                self.roe.noise = self.roe.draw(out.shape[-1]).to(out.device)
            self.logits += self.tau * self.roe.noise[:, self.layer].to(out.device)
        elif isinstance(out, CHOICES) and (indices := next(self.again, None)) is not None:
            values = args[0].gather(-1, indices.view(*args[0].shape[:-1], -1)).view(indices.shape)
            return type(out)((values, indices))
        elif isinstance(out, CHOICES):
            self.chosen.append(out.indices)
        return out


def read_tau(file):
    """The temperatures in a JSON file: a list of numbers, one for each mixture layer."""
    with open(file, "rb") as opened:
        values = json.load(opened)
    if type(values) is not list or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{file} is not a JSON list of numbers")
    return values


def add_roe(model, rosters, tau=None, skip=1, seed=0, weights=WEIGHTS):
    """Makes a model route batches of `rosters` equal rows with noise (equation 1); one row stays what it is.

    `tau`: of all mixture layers but the first and last `skip`, or one for each (2.2); None: as in a `tau.json` beside
    the model, else 0.2. `weights` of the chosen experts: the router's for R + tau G ("perturbed") or its own,
    for R ("clean"). `seed`: of the noise. Raises ValueError for a model that this cannot be right for, or arguments out
    of range."""
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
        file = cached_file(model.name_or_path, "tau.json", revision=commit, **quiet)
        tau = read_tau(file) if file else None
    tau = torch.as_tensor(TAU if tau is None else tau, dtype=torch.float64).tolist()
    tau = [tau if skip <= i < L - skip else 0.0 for i in range(L)] if isinstance(tau, float) else tau
    in_range = rosters > 0 <= skip and len(tau) == L and all(0 <= value <= 100 for value in tau)
    if not in_range or weights not in ("clean", "perturbed"):
        raise ValueError(f"{rosters=}, {skip=}, {tau=}, {weights=}: need >= 1, >= 0, {L} of 0-100, clean or perturbed")
    remove_roe(model)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    noisy = [i for i in range(L) if tau[i] > 0 and rosters > 1]
    roe = model.roe = SimpleNamespace(rosters=rosters, weights=weights, seed=seed, cache_name=name, rows=1, ran=0)

    def before(_, args, kwargs):
        x = next(x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
        roe.rows, roe.ran, roe.noise, history = len(x), 0, None, kwargs.get(name)
        known = history is None or isinstance(history, CleanCache)  # another one would keep the rosters' history
        if roe.rows > 1 and not (roe.rows == rosters and known and (x == x[:1]).all()):
            raise ValueError(f"a batch must have one row, or {rosters} equal ones and a CleanCache for the rosters")
        if history is not None:
            history.folds = x.shape[1] == 1 and all(c._attn_implementation in ATTENTION.values() for c in configs)
        position = (history.get_seq_length() if history else 0) + x.shape[1] - 1  # of the last token, in its text
        roe.draw = lambda experts: roster_noise(roe.seed, position, rosters, L, experts)

    def after(*_):
        if roe.rows > 1 and roe.ran != len(noisy):
            raise ValueError(f"{kind} used {roe.ran} of {len(noisy)} noisy routers; RoE cannot steer the others")

    configs = [m.config for m in {id(m.config): m for m in modules.values() if hasattr(m, "config")}.values()]
    for config in configs:
        if model._can_set_attn_implementation() and config._attn_implementation in ATTENTION:
            config._attn_implementation_internal = ATTENTION[config._attn_implementation]
    hooks = [model.base_model.register_forward_pre_hook(before, with_kwargs=True)]
    roe.undo = [hook.remove for hook in (*hooks, model.base_model.register_forward_hook(after))]
    for i in noisy:
        old = vars(routers[i]).get("forward")  # one that was set on the module, as accelerate does
        roe.undo.append(lambda r=routers[i], old=old: setattr(r, "forward", old) if old else delattr(r, "forward"))
        routers[i].forward = NoisyForward(roe, routers[i], i, tau[i])


def remove_roe(model):
    """Undoes `add_roe`; does nothing to a model without it."""
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._attn_implementation_internal = str(config._attn_implementation).removeprefix("roe_")
    for undo in vars(model).pop("roe", SimpleNamespace(undo=())).undo:
        undo()


class CleanCache(DynamicCache):
    """The Clean Cache (section 2.3): keeps row 0, and hands every row the clean history with its own current tokens.

    While it `folds`, n rows of one token each get one row: the history, followed by the n own positions."""

    folds = False

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # of T new positions, [n, heads, T, D]
        n, _, T, _ = key_states.shape
        if n > 1 and self.folds:
            own = key_states.transpose(0, 2), value_states.transpose(0, 2)
            layer, full = self.layers[layer_idx], super().update(*own, layer_idx, *args, **kwargs)
            layer.keys, layer.values = (kept[:, :, : 1 - n] for kept in full)  # up to row 0's own
            if layer.is_sliding:
                layer.cumulative_length -= n - 1
                window = slice(max(0, layer.keys.shape[2] + 1 - layer.sliding_window), None)
                layer.keys, layer.values = layer.keys[:, :, window], layer.values[:, :, window]
            return full
        clean = super().update(key_states[:1], value_states[:1], layer_idx, *args, **kwargs)
        rows = [kept[:, :, : kept.shape[2] - T].expand(n, -1, -1, -1) for kept in clean]
        return clean if n == 1 else (torch.cat((rows[0], key_states), 2), torch.cat((rows[1], value_states), 2))


def attend(name, module, query, key, value, attention_mask, *args, **kwargs):
    """A model's own attention function, by its name; n rows of one query each are one row of n queries to it.

    query [n, H, 1, D]; key, value [1, Hk, S + n, D], as `CleanCache` folds them: each row sees the history, as far as
    the mask of row 0 lets it, and of the n positions its own. Returns [n, 1, H, D], and eager the weights as ever."""
    own = next(m for c in type(module).__mro__ if hasattr(m := sys.modules[c.__module__], "ALL_ATTENTION_FUNCTIONS"))
    plain = own.ALL_ATTENTION_FUNCTIONS.get(name, vars(own).get("eager_attention_forward"))
    n = len(query)
    if n == len(key):
        return plain(module, query, key, value, attention_mask, *args, **kwargs)
    S, far = key.shape[2] - n, torch.finfo(query.dtype).min
    history = query.new_zeros(1, 1, 1, S) if attention_mask is None else attention_mask[:1, :, :, :S]
    if history.dtype == torch.bool:
        history = query.new_zeros(history.shape).masked_fill(~history, far)
    own = query.new_full((n, n), far).fill_diagonal_(0).expand(1, history.shape[1], n, n)
    mask = torch.cat((history.expand(-1, -1, n, -1), own), 3)
    out, weights = plain(module, query.transpose(0, 2), key, value, mask, *args, **kwargs)
    if weights is not None:
        history, own = weights.transpose(0, 2).split((S, n), 3)
        weights = torch.cat((history, own.diagonal(0, 0, 3).permute(2, 0, 1)[..., None]), 3)
    return out.transpose(0, 1), weights


for name, ours in ATTENTION.items():
    AttentionInterface.register(ours, partial(attend, name))
    AttentionMaskInterface.register(ours, AttentionMaskInterface()[name])


class EqualRows(Tensor):
    """Scores [n, vocab] with equal rows. What is drawn from them is drawn once, for all, with Gumbel noise [vocab]."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        x, noise = super().__torch_function__(func, types, args, kwargs), getattr(args[0], "noise", None)
        if isinstance(x, cls):
            x.noise = noise
        if func is torch.multinomial and noise:  # args[0]: the probabilities
            x[:] = (args[0][0].as_subclass(Tensor).log() + noise().to(x.device)).argmax()
        return x[:1].expand_as(x).as_subclass(Tensor) if func in (torch.multinomial, torch.argmax) else x


class Average(LogitsProcessor):
    """Log of the rows' mean probability (section 3.1), in every row. `overruled` counts where row 0 chose otherwise.

    Samples are drawn from it by seed and position, as roe.py draws them."""

    def __init__(self, seed=0):
        self.seed, self.overruled = seed, 0

    def __call__(self, input_ids, scores):
        mean = scores.float().log_softmax(-1).logsumexp(0) - math.log(len(scores))
        self.overruled = self.overruled + (mean.argmax() != scores[0].argmax())
        rows = mean.repeat(len(scores), 1).as_subclass(EqualRows)
        rows.noise = lambda: gumbel(self.seed, -input_ids.shape[1], len(mean))
        return rows


@torch.inference_mode()
def generate(model, input_ids, attention_mask=None, cache=None, average=None, streamer=None, **options):
    """Continues one text, ids [1, T], with the rosters of `add_roe`: reads it with one row, writes with n.

    Takes what `model.generate` takes, and a `CleanCache` or an `Average` to look at afterwards; returns ids [1, T + new
    ones], or with return_dict_in_generate n rows of all."""
    one_text = len(input_ids) == 1 and input_ids.numel() and (attention_mask is None or attention_mask.all())
    if not hasattr(model, "roe") or not one_text:
        raise ValueError("generate continues one text, ids [1, T >= 1] without padding, with a model after add_roe")
    roe, cached = model.roe, {model.roe.cache_name: CleanCache(config=model.config) if cache is None else cache}
    if input_ids.shape[1] > 1:
        model.base_model(input_ids=input_ids[:, :-1], use_cache=True, **cached)
    options["logits_processor"] = [average or Average(roe.seed), *options.get("logits_processor", [])]
    options["streamer"] = streamer and SimpleNamespace(put=lambda ids: streamer.put(ids[:1]), end=streamer.end)
    input_ids = input_ids.repeat(roe.rosters, 1)
    out = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **cached, **options)
    return out[:1] if isinstance(out, torch.Tensor) else out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="The options are those of roe.py.")
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
        tau = read_tau(args.tau) if args.tau and os.path.isfile(args.tau) else args.tau and float(args.tau)
        if "RANK" in os.environ:  # torchrun
            where = {"distributed_config": DistributedConfig(tp_plan="auto")}
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, **where)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        add_roe(model, args.rosters, tau, args.skip, args.seed, args.weights)
        text = sys.stdin.read() if args.prompt == "-" else args.prompt
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) if args.chat else text
        ids = tokenizer(text, add_special_tokens=not args.chat, return_tensors="pt").input_ids.to(model.device)
        options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
        options |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0} if args.temperature > 0 else {}
        text = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        cache, average = CleanCache(config=model.config), Average(args.seed)
        timed = SimpleNamespace(put=lambda ids: (times.append(time.perf_counter()), text.put(ids)), end=text.end)
        n = generate(model, ids, cache=cache, average=average, streamer=timed, **options).shape[1] - ids.shape[1]
    except (ValueError, OSError, ImportError) as error:  # the last where accelerate is missing
        parser.exit(2, f"roe_transformers.py: error: {' '.join(str(error).split())}\n")
    speed, nbytes = (n - 1) / (times[-1] - times[1] or 1), sum(kv.keys.nbytes + kv.values.nbytes for kv in cache.layers)
    stats = f"{n} tokens, {speed:.1f} tokens/s, rosters: {args.rosters}, cache: {nbytes:,} bytes; the average overruled"
    print(stats, f"the clean roster on {average.overruled} of the tokens", file=sys.stderr)
