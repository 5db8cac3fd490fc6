"""Roster of Experts: hyper-parallel scaling for mixture-of-experts language models (arXiv 2509.17238).

A router sends each token to its top k of E experts and leaves the others idle. RoE adds Gumbel noise to the router's
logits, runs n such rosters of experts for the same token as n rows of one batch, and averages the n predictions.
Row 0 is the clean path: its routing never gets noise.

Section and equation numbers are the paper's. Shapes: n rosters, T positions, E experts, k experts per token.
"""

import argparse
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # for as long as torch is being imported
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # which torch does not need here

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from cache import BranchingCache, SharedCache
from load import describe, load, printable, read_json
from model import Config, OLMoE, top_k

TAU = 0.2  # the default temperature; the paper finds values up to 0.5 useful, and larger ones always harmful
MOST_BYTES = 2**24  # of a prompt or text that is read from a file


# ---- 2.1 Stochastic routing -----------------------------------------------------------------------------------------


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """I.i.d. Gumbel(0, 1) noise in float32, on the generator's device. All routing noise comes from here."""
    # If X is Exponential(1), -log(X) is Gumbel(0, 1); exponential_ never returns 0.
    return -torch.empty(shape, device=generator.device).exponential_(generator=generator).log()


def stochastic_route(
    logits: Tensor, k: int, tau: float, generator: torch.Generator, weights: str = "perturbed", normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Gumbel-top-k routing (equation 1): every roster but the first draws its own k experts.

    The experts of a token are TopK(R + tau * G, k), R its router logits and G Gumbel noise: k experts drawn without
    replacement from softmax(R / tau). Row 0 gets no noise.

    Args:
        logits: router logits R [n, T, E].
        tau: temperature of the noise.
        weights: what mixes the outputs of the chosen experts, of which the paper says nothing. "clean": softmax(R), so
            that noise decides only which experts run. "perturbed": softmax(R + tau * G).
        normalize: scale the weights of the k to sum to 1 (OLMoE's norm_topk_prob).

    Returns:
        weights [n, T, k] in float32 and indices [n, T, k].
    """
    noisy = logits.float().clone()
    noisy[1:] += tau * gumbel(logits[1:].shape, generator)
    indices = noisy.topk(k).indices
    probs = (noisy if weights == "perturbed" else logits.float()).softmax(-1).gather(-1, indices)
    return probs / probs.sum(-1, keepdim=True) if normalize else probs, indices


# ---- 2.2 Temperatures -----------------------------------------------------------------------------------------------


def temperatures(config: Config, tau: float | Sequence[float] | None = None, skip: int = 1) -> list[float]:
    """One routing temperature per layer.

    Args:
        tau: one value per layer, returned as they are; or a number for all layers but the first and last `skip`, which
            get 0. None: the model's own values (`config.tau`), or 0.2 if it has none.

    Returns:
        a list of floats, as many as the model has layers.

    Raises:
        ValueError: a value out of its range, or not one per layer.
    """
    layers = config.num_hidden_layers
    if tau is None:
        tau = TAU if config.tau is None else config.tau
    ends, values = (skip, [tau] * layers) if isinstance(tau, (int, float)) else (0, tau)
    check(skip=skip)
    for value in values:
        check(tau=value)
    if len(values) != layers:
        raise ValueError(f"tau has {len(values)} values, but the model has {layers} layers; give one value per layer")
    return [float(value) if ends <= layer < layers - ends else 0.0 for layer, value in enumerate(values)]


# ---- 2.3 Efficient inference: n rosters as one batch ----------------------------------------------------------------


def roster_route(
    config: Config, rosters: int, tau: Sequence[float], generator: torch.Generator, weights: str = "perturbed"
) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
    """`stochastic_route` as the `route` of `model.OLMoE`: one row until the first noisy router, n rows from there on.

    Args:
        tau: one temperature per layer; a layer with 0 is plain top-k routing.
    """
    check(rosters=rosters, weights=weights)
    k, normalize, mine = config.num_experts_per_tok, config.norm_topk_prob, my_rows(rosters)

    def route(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        if rosters == 1 or tau[layer] == 0:
            return top_k(logits, k, normalize)
        if len(mine) == rosters:
            return stochastic_route(logits.expand(rosters, -1, -1), k, tau[layer], generator, weights, normalize)
        # Every process draws for all rosters and keeps its own: the result is that of one process.
        everyone = logits.new_zeros(rosters, *logits.shape[1:])
        everyone[mine] = logits
        weights_of, indices = stochastic_route(everyone, k, tau[layer], generator, weights, normalize)
        return weights_of[mine], indices[mine]

    return route


def my_rows(rosters: int) -> list[int]:
    """The rosters that this process runs: all of them; if torchrun started several, the clean one and its share."""
    rank, world = processes()
    return [0, *range(1 + rank, rosters, world)]


def processes() -> tuple[int, int]:
    """Rank of this process and the number of processes that share the rosters: 0 and 1 unless torchrun started them."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@torch.inference_mode()
def predict(
    model: OLMoE,
    tokens: Sequence[int],
    cache: SharedCache | BranchingCache,
    rosters: int,
    tau: float | Sequence[float] | None,
    generator: torch.Generator,
    weights: str = "perturbed",
) -> Tensor:
    """Predicts the token that follows, once per roster, in one batched forward pass.

    Args:
        tokens: a sequence of T >= 1 token ids that follow those in the cache. Only the last one is stochastic.
        cache: a `SharedCache` (the Clean Cache) or a `BranchingCache`; extended by the T tokens.
        tau, weights: see `temperatures` and `stochastic_route`.
        generator: a torch.Generator on the model's device.

    Returns:
        logits [rosters, vocab_size]; row 0 is the clean path's. If several processes share the rosters: `my_rows`.

    Raises:
        ValueError: more tokens than the model's context, or than the cache, has room for.
    """
    route = roster_route(model.config, rosters, temperatures(model.config, tau), generator, weights)
    tokens = torch.as_tensor(tokens, device=model.device)[None]
    check_length(cache.length + tokens.shape[1], 1, model.config)
    if tokens.shape[1] > 1:
        model.hidden(tokens[:, :-1], cache)
    logits = model(tokens[:, -1:], cache, route)[:, 0]
    return logits.expand(len(my_rows(rosters)), -1)  # of one row still, if no layer is noisy


# ---- 3.1 Aggregation ------------------------------------------------------------------------------------------------


def aggregate(logits: Tensor) -> Tensor:
    """Log of the rosters' mean probability: logits [n, ..., V] -> log-probabilities [..., V] in float32."""
    return logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))


def aggregate_processes(logits: Tensor, rosters: int) -> Tensor:
    """`aggregate` over the rosters of all processes, by one all-reduce of [V] probabilities."""
    rank, world = processes()
    if world == 1:
        return check_finite(aggregate(logits))
    total = logits[min(rank, 1) :].float().softmax(-1).sum(0)  # the clean row, which all have, counts for rank 0
    dist.all_reduce(total)
    return check_finite(total.log() - math.log(rosters))


def choose(log_probs: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token id from log-probabilities [V]: the most likely one at temperature 0, else a sample.

    With top_p < 1 the sample is from the smallest set of most likely tokens that has this probability.
    """
    if temperature == 0:
        return log_probs.argmax().item()
    probs, ids = (log_probs / temperature).softmax(-1).sort(descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0
    return ids[probs.multinomial(1, generator=generator)].item()


# ---- Generating and scoring -----------------------------------------------------------------------------------------


def generate(
    model: OLMoE,
    tokens: Sequence[int],
    rosters: int = 4,
    tau: float | Sequence[float] | None = None,
    cache: str = "shared",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    weights: str = "perturbed",
    margin: float = 1.0,
    watch: Callable | None = None,
) -> Iterator[int]:
    """Generates text with n rosters for every token.

    Ends before an end-of-text token, after `max_new_tokens`, or when the model's context is full.

    Args:
        tokens: the prompt, a sequence of token ids.
        tau, weights: see `temperatures` and `stochastic_route`.
        cache: "shared": the Clean Cache, one clean history for all rosters. "branching": a history for each roster.
        temperature, top_p: see `choose`; they apply to the average of the rosters.
        seed: of the noise and of the sampling; one seed gives one output, on one device and dtype.
        margin: see `predict_where_unsure`; below 1 the cache must be the shared one.
        watch: called as watch(logits [rosters, 1, V], log_probs [1, V], tokens [1], cache) for every token, before it
            is yielded; log_probs is the average that it was chosen from. Where the margin was enough, rosters is 1.

    Yields:
        token ids, each as soon as it is known.

    Raises:
        ValueError, with the first token: an empty prompt, one longer than the context, an argument out of its range, or
            predictions that are not finite.
    """
    config, tau = model.config, temperatures(model.config, tau)
    check(rosters=rosters, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    check(cache=cache, margin=margin, weights=weights)
    check_length(len(tokens), 1, config)

    max_len = min(config.max_position_embeddings, len(tokens) + max_new_tokens - 1)  # the last token is not read again
    if cache == "shared":
        history = SharedCache(config, max_len)
    else:
        first_noisy = next((layer for layer, value in enumerate(tau) if value > 0), None)
        history = BranchingCache(config, max_len, rosters, len(tokens) - 1, first_noisy)
    generator = torch.Generator(model.device).manual_seed(seed)
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for _ in range(len(tokens) - 1, max_len):
        logits, log_probs = predict_where_unsure(model, tokens, history, rosters, tau, generator, weights, margin)
        token = choose(log_probs, temperature, top_p, generator)
        if token in eos:
            return
        if watch:
            watch(logits[:, None], log_probs[None], torch.tensor([token], device=model.device), history)
        yield token
        tokens = [token]


def predict_where_unsure(
    model: OLMoE, tokens, cache, rosters: int, tau, generator: torch.Generator, weights: str, margin: float
) -> tuple[Tensor, Tensor]:
    """`predict` and its average, with rosters only where the clean path is unsure. Not in the paper, whose margin is 1.

    The clean path runs alone first, and its keys and values are stored either way. Where its first choice is not more
    probable than its second by at least `margin`, the last token runs once more, with all rosters.

    Returns:
        logits [rosters, V], or [1, V] where the clean path was sure; and log-probabilities [V] of their average.
    """
    if margin < 1:
        clean = predict(model, tokens, cache, 1, tau, generator)
        log_probs = aggregate_processes(clean, 1)  # rank 0's, so that all processes decide alike
        if sure(log_probs, margin):
            return clean, log_probs
        cache.length -= 1
        tokens = tokens[-1:]
    logits = predict(model, tokens, cache, rosters, tau, generator, weights)
    return logits, aggregate_processes(logits, rosters)


def sure(log_probs: Tensor, margin: float) -> Tensor:
    """Whether the first choice is more probable than the second by `margin` or more: log_probs [..., V] -> [...].

    At margin 1 nothing is, not even what rounds to a probability of 1.
    """
    first, second = log_probs.topk(2).values.exp().unbind(-1)
    return (first - second >= margin) & (margin < 1)


@torch.inference_mode()
def score(
    model: OLMoE,
    tokens: Sequence[int],
    rosters: int,
    tau: float | Sequence[float] | None = None,
    seed: int = 0,
    weights: str = "perturbed",
    margin: float = 1.0,
    history: SharedCache | None = None,
    watch: Callable | None = None,
) -> Tensor:
    """Log-probability of every token of a text under 1, 2, ..., n rosters (section 2.2, validation perplexity).

    With the shared cache a token's noise reaches no other token. A forward pass over T tokens with n rows therefore
    equals decoding token by token: row r at position t sees the clean history before t and itself. Long texts take
    several passes, one after the other.

    Args:
        tokens: T >= 2 token ids. A text longer than the context is scored in pieces of that length, each without the
            tokens before it.
        tau, weights, margin: see `temperatures`, `stochastic_route` and `predict_where_unsure`.
        history: a cache that holds the tokens before tokens[0], with room for T - 1 more, by which it is extended.
            None: there are none.
        watch: called as watch(logits [rosters, t, V], log_probs [t, V], tokens [t], cache) for every t tokens of the
            text; log_probs is what all rosters together predict.

    Returns:
        log-probabilities [rosters, T - 1] in float32; row n - 1 is that of tokens[1:] under n rosters.

    Raises:
        ValueError: fewer than two tokens, a history and a text that together are longer than the context, an argument
            out of its range, or predictions that are not finite.
    """
    config = model.config
    check(seed=seed, margin=margin)
    check_length(len(tokens), 2)
    check_single("scoring")
    if history:
        check_length(history.length + len(tokens) - 1, 1, config)
    generator = torch.Generator(model.device).manual_seed(seed)
    route = roster_route(config, rosters, temperatures(config, tau), generator, weights)
    tokens = torch.as_tensor(tokens, device=model.device)
    inputs, targets = tokens[:-1], tokens[1:]
    chunk = max(1, 512 // rosters)  # bounds the rows times positions, and with them the memory
    context, counts = config.max_position_embeddings, torch.arange(1, rosters + 1, device=model.device)
    # Filled in place: small results kept one by one between large temporary tensors would fragment the memory.
    scores, done = torch.empty(rosters, len(targets), device=model.device), 0
    with tqdm(total=len(targets), desc="scoring", unit="token", leave=False, delay=1, disable=None) as progress:
        for piece, wanted in zip(inputs.split(context), targets.split(context)):
            cache = history or SharedCache(config, len(piece))
            for part, target in zip(piece.split(chunk), wanted.split(chunk)):
                logits = model(part[None], cache, route).expand(rosters, -1, -1)
                log_probs = logits.float().log_softmax(-1)
                found = log_probs.gather(-1, target.expand(rosters, -1).unsqueeze(-1)).squeeze(-1)
                averages, clean = found.logcumsumexp(0) - counts.log()[:, None], sure(log_probs[0], margin)
                scores[:, done : done + len(part)] = averages.where(~clean, found[0])
                done += len(part)
                if watch:
                    watch(logits, aggregate(logits).where(~clean[:, None], log_probs[0]), target, cache)
                progress.update(len(part))
    return check_finite(scores)


# ---- What a caller may ask for --------------------------------------------------------------------------------------

is_number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
RANGES = {
    "rosters": (lambda n: type(n) is int and 1 <= n <= 1024, "a whole number from 1 to 1024"),
    "tau": (lambda tau: is_number(tau) and 0 <= tau <= 100, "a number from 0 to 100"),
    "skip": (lambda n: type(n) is int and n >= 0, "a whole number, at least 0"),
    "weights": (lambda name: name in ("clean", "perturbed"), "clean or perturbed"),
    "cache": (lambda name: name in ("shared", "branching"), "shared or branching"),
    "margin": (lambda m: is_number(m) and 0 <= m <= 1, "a number from 0 to 1"),
    "max_new_tokens": (lambda n: type(n) is int and n >= 1, "a whole number, at least 1"),
    "temperature": (lambda t: is_number(t) and (t == 0 or 0.001 <= t <= 1000), "0, or a number from 0.001 to 1000"),
    "top_p": (lambda p: is_number(p) and 1e-6 <= p <= 1, "a number from 1e-6 to 1"),
    "seed": (lambda n: type(n) is int and 0 <= n < 2**63, "a whole number from 0 to 2**63 - 1"),
}


def check(**settings) -> None:
    """Raises ValueError for a setting that is out of its range."""
    for name, value in settings.items():
        fits, allowed = RANGES[name]
        if not fits(value):
            raise ValueError(f"{name} must be {allowed}, not {value!r}")
    if settings.get("cache") == "branching":
        check_single("the branching cache")
        if settings["margin"] < 1:
            raise ValueError("with the branching cache every roster reads every token; leave margin at 1")


def check_single(what: str) -> None:
    """Raises ValueError where several processes share the rosters."""
    if processes()[1] > 1:
        raise ValueError(f"{what} works in one process only; start it without torchrun")


def check_length(length: int, least: int, config: Config | None = None) -> None:
    """Raises ValueError for too few tokens, or for more than the model's context has room for."""
    if length < least:
        raise ValueError(f"the text is too short: there are {length} tokens, give at least {least}")
    if config and length > (most := config.max_position_embeddings):
        raise ValueError(f"there are {length} tokens, but the model's context has only {most}")


def check_finite(log_probs: Tensor) -> Tensor:
    """Raises ValueError where a model's predictions are not numbers."""
    if log_probs.isnan().any():  # what a softmax makes of infinite logits; -inf is a probability of 0
        raise ValueError("the model's predictions are not finite: its weights are broken, or too large for its dtype")
    return log_probs


# ---- The command line -----------------------------------------------------------------------------------------------


def stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Token ids to pieces of text, each as soon as its last character is whole: a character can span several tokens."""
    pending = []
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\ufffd"):  # what an incomplete character decodes to
            yield text
            pending = []
    yield tokenizer.decode(pending)


def parse_arguments() -> argparse.Namespace:
    """The command line, checked as far as it can be without a model."""
    parser = argparse.ArgumentParser(
        description="Generate or score text with Roster of Experts (arXiv 2509.17238): for every token, N stochastic "
        "rosters of a mixture-of-experts model's experts run as one batch, and their predictions are averaged.",
        epilog="Defaults are in brackets. Text goes to standard output, statistics and errors to standard error. "
        "Exit status: 0; 2 for bad input; 130 when interrupted before there is any text.",
    )
    group = parser.add_argument_group("what to do").add_mutually_exclusive_group(required=True)
    group.add_argument("--prompt", metavar="TEXT", help="continue this text; - reads it from standard input")
    group.add_argument("--ppl", metavar="FILE", help="print the perplexity of a text file for every count in --rosters")

    add = parser.add_argument_group("the rosters").add_argument
    add("--rosters", metavar="N", type=int, nargs="+", default=[4], help="rosters per token; 1 is plain decoding [4]")
    add("--tau", help=f"noise temperature, or a JSON file of one per layer [tau.json beside the model; without, {TAU}]")
    add("--skip", metavar="L", type=int, default=1, help="layers without noise at each end; not with a file [1]")
    weights = "what mixes the chosen experts, R being the router's logits: softmax(R + tau G), or softmax(R)"
    add("--weights", choices=["perturbed", "clean"], default="perturbed", help=f"{weights} [perturbed]")
    margin = "rosters only where the clean one gives its first choice less than M more than its second; 1: always [1]"
    add("--margin", metavar="M", type=float, default=1.0, help=margin)
    add("--seed", metavar="N", type=int, default=0, help="of noise and sampling; one seed gives one output [0]")

    add = parser.add_argument_group("the text, with --prompt").add_argument
    add("--max-new-tokens", metavar="N", type=int, default=128, help="stop after this many tokens [128]")
    add("--temperature", metavar="T", type=float, default=0.0, help="sample at this temperature; 0 is greedy [0]")
    add("--top-p", metavar="P", type=float, default=1.0, help="sample from the likeliest tokens of this total mass [1]")
    add("--cache", choices=["shared", "branching"], default="shared", help="one history, or one per roster [shared]")
    add("--chat", action="store_true", help="wrap the prompt as the OLMoE Instruct models expect it")
    show = "on a terminal, shade tokens that few rosters chose, underline those that overruled the clean one"
    add("--show", action="store_true", help=show)

    add = parser.add_argument_group("the model").add_argument
    model = "directory, or hub id such as allenai/OLMoE-1B-7B-0125-Instruct [the small model that comes with RoE]"
    add("--model", help=model)
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    dtypes = ["auto", "bfloat16", "float16", "float32"]
    add("--dtype", choices=dtypes, default="auto", help="of the weights [as stored; small models: float32]")

    parser.error = fail
    args = parser.parse_args()
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    for name in ("max_new_tokens", "temperature", "top_p", "cache", "chat", "show"):
        if args.ppl is not None and name in given:
            fail(f"--ppl does not read --{name.replace('_', '-')}; leave it out")
    if args.ppl is None and len(args.rosters) > 1:
        fail("--rosters takes one count; several are for --ppl")
    if "top_p" in given and "temperature" not in given:
        fail("--top-p is for sampling; give a --temperature above 0, too")
    return args


def fail(message: object) -> NoReturn:
    """Ends the program with one line on standard error and exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error:", printable(" ".join(str(message).split())), file=sys.stderr)
    sys.exit(2)


def read_text(args: argparse.Namespace) -> str:
    """The prompt, or the text to be scored."""
    name, piped = "the prompt" if args.ppl is None else args.ppl or "''", args.prompt == "-"
    if piped or args.prompt is None:
        check_single("standard input" if piped else "scoring")
    if piped and not sys.stdin:
        raise ValueError("standard input is closed; give the prompt itself")
    if piped or args.prompt is None:  # either may be a pipe or a device without end
        try:
            with sys.stdin.buffer if piped else open(args.ppl, "rb") as file:
                data = file.read(MOST_BYTES + 1)
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error.strerror}); give a text file") from error
    else:
        data = os.fsencode(args.prompt)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{name} has more than {MOST_BYTES:,} bytes; give a part of it")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from error
    return f"<|endoftext|><|user|>\n{text}\n<|assistant|>\n" if args.chat and text else text


def read_tau(argument: str | None) -> float | list[float] | None:
    """What --tau stands for: a number, or else a file."""
    try:
        return None if argument is None else float(argument)
    except ValueError:
        if not Path(argument).is_file():
            raise ValueError(f"tau takes a number or a JSON file with a list of them, not {argument!r}") from None
        return read_json(Path(argument), list)


def shade(text: str, agreement: float, overruled: bool) -> str:
    """Text on a background from none, where all rosters agree, over yellow to red; underlined where overruled."""
    if agreement == 1:
        return text
    background = (203, 209, 215, 222, 229)[int(agreement * 5)]  # of the 256 colours that terminals have
    style = f"\033[{'4;' if overruled else ''}38;5;16;48;5;{background}m"
    return style + text.replace("\n", f"\033[0m\n{style}") + "\033[0m"


def print_generation(
    args: argparse.Namespace, model: OLMoE, tokenizer: Tokenizer, tokens: list[int], tau: list[float]
) -> None:
    """Streams the text to standard output, then one line of statistics to standard error."""
    times, agreement, overruled, ran, shown, nbytes = [], [], [], 0, 0, 0
    colours = args.show and sys.stdout and sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def watch(logits, log_probs, tokens, cache):
        nonlocal ran, nbytes
        times.append(time.perf_counter())
        agreement.append((logits.argmax(-1) == tokens).float().mean().item() if len(logits) > 1 else 1.0)
        overruled.append((log_probs.argmax() != logits[0].argmax()).item())
        ran += len(logits) > 1
        nbytes = cache.nbytes

    (rosters,) = args.rosters
    settings = ("cache", "max_new_tokens", "temperature", "top_p", "seed", "weights", "margin")
    generated = generate(model, tokens, rosters, tau, **{name: getattr(args, name) for name in settings}, watch=watch)
    try:
        for text in stream(tokenizer, generated):
            if colours and text:
                text = shade(text, min(agreement[shown:]), any(overruled[shown:]))
                shown = len(agreement)
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        if not times:
            raise
        # what has been generated stands
    print(flush=True)
    speed = f", {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else ""
    where = f" on {ran} of the tokens" if args.margin < 1 else ""
    print(
        f"{len(times)} tokens{speed}, rosters: {rosters}{where}, cache: {nbytes:,} bytes; "
        f"the average overruled the clean roster on {sum(overruled)} of the tokens",
        file=sys.stderr,
    )


def print_perplexity(args: argparse.Namespace, model: OLMoE, tokens: list[int], tau: list[float]) -> None:
    """Prints a table of perplexity against the number of rosters."""
    scores = score(model, tokens, max(args.rosters), tau, args.seed, args.weights, args.margin)
    perplexity = scores.mean(1).neg().exp().tolist()
    print("rosters  perplexity  change", flush=True)
    for n in args.rosters:
        print(f"{n:7}  {perplexity[n - 1]:10.4f}  {perplexity[n - 1] / perplexity[0] - 1:+.2%}", flush=True)


def main() -> None:
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed: print would take standard output instead
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # the terminal may not know all characters
    args = parse_arguments()
    if dist.is_available() and dist.is_torchelastic_launched():  # by torchrun: the processes share the rosters
        dist.init_process_group()  # gloo on CPUs, nccl on GPUs
        if args.device in ("auto", "cuda") and torch.cuda.is_available():
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        if dist.get_rank() > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # All that can be refused is refused before weights are fetched or read.
        check(**{name: value for name, value in vars(args).items() if name in RANGES.keys() - {"rosters", "tau"}})
        check(rosters=min(args.rosters)), check(rosters=max(args.rosters))
        text, tau = read_text(args), read_tau(args.tau)
        _, config, tokenizer = describe(args.model, args.device)
        if args.skip != 1 and (isinstance(tau, list) or tau is None and config.tau):
            raise ValueError("--skip is for one --tau; a file of temperatures says what every layer gets")
        tau, tokens = temperatures(config, tau, args.skip), tokenizer.encode(text).ids
        check_length(len(tokens), *((2,) if args.prompt is None else (1, config)))
        model, _ = load(args.model, args.device, args.dtype)
        if args.prompt is None:
            print_perplexity(args, model, tokens, tau)
        else:
            print_generation(args, model, tokenizer, tokens, tau)
    except BrokenPipeError:  # the reader has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if processes()[1] > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
