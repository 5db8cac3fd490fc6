"""Roster of Experts (RoE, arXiv 2509.17238) for the mixture-of-experts models of Hugging Face transformers, in one file.

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", device_map="auto")
    add_roe(model, rosters=8)
    ids = generate(model, tokenizer("Why is the sky blue?", return_tensors="pt").input_ids.to(model.device))

or: python roe_transformers.py --model Qwen/Qwen3-30B-A3B --prompt "Why is the sky blue?" --rosters 8

The n rosters of a token are n equal rows of a batch. Row 0 is the clean path, which never gets noise; in the others the
routers' logits get Gumbel noise, at the last position (equation 1). Only the keys and values of row 0 are kept
(section 2.3), and the predictions of the rows are averaged (section 3.1).

No router is rewritten. Its own forward runs under a `TorchFunctionMode`, which sees all that it asks of torch. Its first
matrix product gives its logits R; the mode hands it R + tau G instead, and what it makes of them are the "perturbed"
weights. For "clean" ones it runs once more, without noise, while the mode makes each of its top-k choose what it chose
with noise: so it gives its own weights, by its own rule, to the experts that noise chose.
"""

import argparse
import inspect
import json
import math
import os
import sys
import time
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessor, TextStreamer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

WEIGHTS = "perturbed"  # the default; "clean" is the letter of equation 1
PRODUCTS = torch.nn.functional.linear, torch.mm, torch.matmul
CHOICES = torch.return_types.topk, torch.return_types.max


def gumbel(shape, generator):
    """I.i.d. Gumbel(0, 1) noise in float32, on the generator's device. All routing noise comes from here."""
    return -torch.empty(shape, device=generator.device).exponential_(generator=generator).log()


class NoisyForward(TorchFunctionMode):
    """Takes the place of a router's `forward`; noise for rows 1 to n - 1 of its logits [n * T, E], at the last position."""

    def __init__(self, roe, name, router, tau):
        super().__init__()
        self.roe, self.name, self.plain, self.tau = roe, name, router.forward, tau

    def __call__(self, *args, **kwargs):
        if self.roe.rows == 1:
            return self.plain(*args, **kwargs)
        self.roe.ran += 1
        self.logits, self.chosen, self.again = None, [], iter(())
        with self:
            out = self.plain(*args, **kwargs)
        if self.logits is None or not self.chosen and self.roe.weights == "clean":
            raise ValueError(f"RoE with {self.roe.weights} weights cannot steer {self.name}: it sees no logits or no top-k")
        if self.roe.weights == "clean":
            self.again = iter(self.chosen)
            with self:
                out = self.plain(*args, **kwargs)
        return out

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS and self.logits is None:
            self.logits = out.view(self.roe.rows, -1, out.shape[-1])[1:, -1]
            self.logits += self.tau * gumbel(self.logits.shape, self.roe.generator).to(out.device)
        elif isinstance(out, CHOICES) and (indices := next(self.again, None)) is not None:
            values = args[0].gather(-1, indices.view(*args[0].shape[:-1], -1)).view(indices.shape)
            return type(out)((values, indices))
        elif isinstance(out, CHOICES):
            self.chosen.append(out.indices)
        return out


def temperatures(layers, tau, skip):
    """One routing temperature per mixture layer (section 2.2); a number leaves the first and last `skip` at 0."""
    if isinstance(tau, (int, float)):
        tau = [tau if skip <= layer < layers - skip else 0.0 for layer in range(layers)]
    if len(tau) != layers:
        raise ValueError(f"tau has {len(tau)} values, but the model {layers} mixture layers; give one value for each")
    if not all(isinstance(value, (int, float)) and 0 <= value < math.inf for value in tau):
        raise ValueError(f"tau must be numbers >= 0, not {tau}")
    return tau


def add_roe(model, rosters, tau=0.2, skip=1, seed=0, weights=WEIGHTS):
    """Makes a model route batches of `rosters` rows with noise (equation 1); one row stays what it is.

    Args:
        tau: a temperature for all mixture layers but the first and last `skip`, or one value per mixture layer.
        seed: of the noise; `generate` starts it anew for every text.
        weights: of the chosen experts: the router's for R + tau G ("perturbed") or its own, for R ("clean").

    Raises:
        ValueError: a model for which this cannot be right, or an argument out of its range.
    """
    kind, module, modules = model.config.model_type, sys.modules[type(model).__module__], dict(model.named_modules())
    if rosters < 1 or skip < 0 or weights not in ("clean", "perturbed"):
        raise ValueError(f"need rosters >= 1, skip >= 0 and clean or perturbed weights, not {rosters}, {skip}, {weights}")
    own = [k for k, v in vars(module).items() if k.endswith("Cache") and v.__module__ == module.__name__]
    if own or model.config.is_encoder_decoder:
        raise ValueError(f"{kind} is an encoder-decoder or brings a cache of its own; RoE has a cache for neither")
    others = {type(layer) for layer in CleanCache(config=model.config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if others or model._is_stateful:
        raise ValueError(f"{kind} remembers more than keys and values; RoE has no cache for that")
    blocks = [name.removesuffix("experts") for name in modules if name.endswith(".experts")]
    routers = [block + router for block in blocks for router in ("gate", "router") if block + router in modules]
    if not routers:
        raise ValueError(f"{kind} has no router that RoE can find: a module `gate` or `router` beside `experts`")
    tau = temperatures(len(routers), tau, skip)
    noisy = {name: value for name, value in zip(routers, tau) if value > 0 and rosters > 1}
    remove_roe(model)
    generator = torch.Generator(model.device).manual_seed(seed)
    roe = SimpleNamespace(rosters=rosters, weights=weights, seed=seed, generator=generator, rows=1, ran=0)

    def before(_, args, kwargs):
        tokens = next(x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
        roe.rows, roe.ran = len(tokens), 0
        if roe.rows not in (1, rosters):
            raise ValueError(f"a batch must have one row, or {rosters} equal ones for the rosters, not {roe.rows}")

    def after(*_):
        if roe.rows > 1 and roe.ran != len(noisy):
            raise ValueError(f"{kind} used {roe.ran} of {len(noisy)} noisy routers; RoE cannot steer the others")

    hooks = [model.base_model.register_forward_pre_hook(before, with_kwargs=True)]
    roe.hooks = [*hooks, model.base_model.register_forward_hook(after)]
    roe.replaced = [(modules[name], vars(modules[name]).get("forward")) for name in noisy]
    for name, value in noisy.items():
        modules[name].forward = NoisyForward(roe, name, modules[name], value)
    model.roe = roe


def remove_roe(model):
    """Undoes `add_roe`; does nothing to a model without it."""
    if hasattr(model, "roe"):
        for hook in model.roe.hooks:
            hook.remove()
        for router, forward in model.roe.replaced:
            del router.forward
            if forward:  # one that was set on the module, as accelerate does
                router.forward = forward
        del model.roe


class CleanCache(DynamicCache):
    """The Clean Cache (section 2.3): keeps row 0, and hands every row the clean history with its own current tokens."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Keys and values of T new positions, [n, heads, T, D] -> those to attend to, [n, heads, history + T, D]."""
        clean, new = super().update(key_states[:1], value_states[:1], *args, **kwargs), (key_states, value_states)
        history = [c[:, :, : c.shape[2] - own.shape[2]].expand(len(own), -1, -1, -1) for c, own in zip(clean, new)]
        return clean if len(key_states) == 1 else tuple(map(lambda *parts: torch.cat(parts, 2), history, new))

    @property
    def nbytes(self):
        """Bytes of all keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)


class EqualRows(torch.Tensor):
    """Scores [n, vocab] with equal rows; what is drawn from them is drawn once, for all rows."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        if func in (torch.multinomial, torch.argmax):
            return out[:1].expand_as(out).as_subclass(torch.Tensor)
        return out


class Average(LogitsProcessor):
    """Log of the rows' mean probability (section 3.1), in every row; `overruled`: where row 0 would choose otherwise."""

    def __init__(self):
        self.overruled = []

    def __call__(self, input_ids, scores):
        mean = scores.float().log_softmax(-1).logsumexp(0) - math.log(len(scores))
        self.overruled.append(mean.argmax() != scores[0].argmax())
        return mean.repeat(len(scores), 1).as_subclass(EqualRows)


@torch.inference_mode()
def generate(model, input_ids, attention_mask=None, cache=None, average=None, streamer=None, **options):
    """Continues one text with the rosters of `add_roe`: reads the prompt with one row, then runs `model.generate` with n.

    Args:
        input_ids, attention_mask: [1, T]
        cache, average: a `CleanCache`, an `Average`, for those who want to look at them afterwards.
        options: any of `model.generate`'s, whose `logits_processor` sees the average. torch's own generator samples.

    Returns:
        ids [1, T + new ones], or with return_dict_in_generate what `model.generate` returns, n rows of it.
    """
    if not hasattr(model, "roe") or len(input_ids) != 1:
        raise ValueError("generate continues one text, ids [1, T], with a model after add_roe")
    roe, cache = model.roe, cache or CleanCache(config=model.config)
    roe.generator.manual_seed(roe.seed)
    cached = {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if input_ids.shape[1] > 1:
        model.base_model(input_ids=input_ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True, **cached)
    options["logits_processor"] = [average or Average(), *options.get("logits_processor", [])]
    if streamer:
        options["streamer"] = SimpleNamespace(put=lambda ids: streamer.put(ids[:1]), end=streamer.end)
    rows = {"input_ids": input_ids.repeat(roe.rosters, 1), "attention_mask": mask.repeat(roe.rosters, 1)}
    out = model.generate(**rows, **cached, **options)
    return out[:1] if isinstance(out, torch.Tensor) else out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, kind, default, text in (
        ("model", str, None, "directory or hub id"),
        ("prompt", str, None, "continue this text; - reads it from standard input"),
        ("rosters", int, 4, "rosters per token"),
        ("tau", str, "0.2", "noise temperature, or a JSON file of one per mixture layer"),
        ("skip", int, 1, "mixture layers without noise at each end"),
        ("weights", str, WEIGHTS, "clean or perturbed"),
        ("seed", int, 0, "of noise and sampling"),
        ("max-new-tokens", int, 128, "stop after this many tokens"),
        ("temperature", float, 0.0, "sample at this temperature; 0 is greedy"),
        ("top-p", float, 1.0, "sample from the likeliest tokens of this total mass"),
        ("dtype", str, "auto", "of the weights"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, required=default is None, help=f"{text} [{default}]")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    args, torchrun, times = parser.parse_args(), "RANK" in os.environ, []
    if int(os.environ.get("RANK", 0)) > 0:  # all processes write the same text
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        where = {"tp_plan": "auto"} if torchrun else {"device_map": "auto"} if torch.accelerator.is_available() else {}
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, **where)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tau = json.loads(open(args.tau).read()) if os.path.isfile(args.tau) else float(args.tau)
        add_roe(model, args.rosters, tau, args.skip, args.seed, args.weights)
        text = sys.stdin.read() if args.prompt == "-" else args.prompt
        if args.chat:
            text = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=not args.chat, return_tensors="pt").input_ids.to(model.device)
        sampling = {"do_sample": False}
        if args.temperature > 0:
            sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.put, put = lambda ids: (times.append(time.perf_counter()), put(ids)), streamer.put
        torch.manual_seed(args.seed)
        cache, average = CleanCache(config=model.config), Average()
        look = {"cache": cache, "average": average, "streamer": streamer}
        tokens = generate(model, ids, max_new_tokens=args.max_new_tokens, **look, **sampling).shape[1] - ids.shape[1]
    except (ValueError, OSError) as error:
        parser.exit(2, f"roe_transformers.py: error: {' '.join(str(error).split())}\n")
    speed = (tokens - 1) / (times[-1] - times[1]) if tokens > 1 else math.nan
    print(
        f"{tokens} tokens, {speed:.1f} tokens/s, rosters: {args.rosters}, cache: {cache.nbytes:,} bytes; "
        f"the average overruled the clean roster on {sum(average.overruled)} of the tokens",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
