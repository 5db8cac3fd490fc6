"""Roster of Experts: hyper-parallel scaling for mixture-of-experts language models (arXiv 2509.17238).

A router sends each token to its top k of E experts and leaves the others idle. RoE adds Gumbel noise to the router's
logits, runs n such rosters of experts for the same token as n rows of one batch, and averages the n predictions.
Row 0 is the clean path: its routing never gets noise.

Section and equation numbers are the paper's. Shapes: n rosters, T positions, L layers, E experts, k experts per token.
"""

import argparse
import hashlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # which torch does not need here

import torch
from tokenizers import Tokenizer, decoders
from torch import Tensor
from tqdm import tqdm

from cache import BranchingCache, SharedCache
from load import chat_prompt, load, printable, read_description, read_tau, read_text
from model import Config, OLMoE, top_k

TAU = 0.2  # the default temperature; the paper finds values up to 0.5 useful, and larger ones always harmful
NOT_FINITE = "the model's predictions are not finite: its weights are broken, or too large for its dtype"


# ---- 2.1 Stochastic routing -----------------------------------------------------------------------------------------


def gumbel(seed: int, position: int, rosters: int, layers: int, experts: int) -> Tensor:
    """The noise of a token: i.i.d. Gumbel(0, 1), G [rosters - 1, layers, experts], float32, on the CPU.

    It is a hash of the seed and of the token's position in its text, and depends on nothing else. Rosters come first,
    and a shorter hash begins a longer one, so that those of m rosters are the first of n. All noise comes from here.
    """
    digest = hashlib.shake_128(f"{seed:d} {position:d}".encode()).digest(4 * rosters * layers * experts)
    uniform = (torch.frombuffer(bytearray(digest), dtype=torch.int32).double() + 2**31 + 0.5) / 2**32  # never 0 or 1
    return -(-uniform.log()).log().float().view(rosters, layers, experts)[1:]  # the clean one has none


def stochastic_route(logits: Tensor, noise: Tensor, k: int, weights: str = "perturbed", normalize: bool = False):
    """Gumbel-top-k routing (equation 1): the experts of a token are TopK(R + tau G, k).

    They are k experts drawn without replacement from softmax(R / tau). Where noise is 0, as in row 0, plain top-k.

    Args:
        logits: router logits R [n, T, E], or [1, T, E] as long as all rosters are the same: the path branches here.
        noise: tau G [n, T, E].
        weights: what mixes the outputs of the chosen experts, of which the paper says nothing. "clean": softmax(R), so
            that noise decides only which experts run. "perturbed": softmax(R + tau G). Others raise ValueError.
        normalize: scale the weights of the k to sum to 1 (OLMoE's norm_topk_prob).

    Returns:
        weights [n, T, k] in float32 and indices [n, T, k].
    """
    if weights not in ("perturbed", "clean"):
        raise ValueError(f"weights must be perturbed or clean, not {weights!r}")
    clean = logits.float().expand_as(noise)  # the branch: one row becomes n, and MoE.forward expands x to match
    noisy = clean + noise
    indices = noisy.topk(k).indices
    probs = (noisy if weights == "perturbed" else clean).softmax(-1).gather(-1, indices)
    return probs / probs.sum(-1, keepdim=True) if normalize else probs, indices


# ---- 2.2 Temperatures -----------------------------------------------------------------------------------------------


def temperatures(config: Config, tau: float | Sequence[float] | None = None, skip: int = 1) -> list[float]:
    """One routing temperature per layer, of which 0 is plain top-k routing.

    Args:
        tau: one value per layer, or a number for all layers but the first and last `skip`, which get 0. None: the
            model's own values (`config.tau`), or 0.2 if it has none.

    Raises ValueError: a value that is not from 0 to 100, or not one per layer.
    """
    layers, default = config.num_hidden_layers, TAU if config.tau is None else config.tau
    values = torch.as_tensor(default if tau is None else tau, dtype=torch.float64).tolist()
    if isinstance(values, float):
        values = [values if skip <= layer < layers - skip else 0.0 for layer in range(layers)]
    if len(values) != layers:
        raise ValueError(f"tau has {len(values)} values, but the model has {layers} layers; give one value per layer")
    for value in values:
        if not 0 <= value <= 100:
            raise ValueError(f"tau must be a number from 0 to 100, not {value}")
    return values


# ---- 2.3 Efficient inference: n rosters as one batch ----------------------------------------------------------------


def run_rosters(model: OLMoE, tokens: Tensor, cache, rosters: int, tau: list[float], seed: int, position: int, weights):
    """n predictions at each of T tokens in one forward pass: ids [1, T] -> logits [n, T, V].

    All rosters are the same until the first layer with noise, and one row runs for them; its route turns it into n.
    `position` is that of the first of the tokens in its text. For the other arguments see `predict`.
    """
    c, route = model.config, None
    if rosters > 1 and any(tau):
        positions = range(position, position + tokens.shape[1])
        G = torch.stack([gumbel(seed, p, rosters, c.num_hidden_layers, c.num_experts) for p in positions], 1)
        noise = torch.cat((torch.zeros_like(G[:1]), G)) * torch.tensor(tau)[:, None]  # [n, T, L, E]; row 0 is clean
        noise = noise.to(model.device)

        def route(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
            if tau[layer] == 0:
                return top_k(logits, c.num_experts_per_tok, c.norm_topk_prob)
            return stochastic_route(logits, noise[:, :, layer], c.num_experts_per_tok, weights, c.norm_topk_prob)

    return model(tokens, cache, route).expand(rosters, -1, -1)  # n equal rows if no layer has noise; else there are n


@torch.inference_mode()
def predict(model: OLMoE, tokens, cache, rosters: int, tau, seed: int, weights: str = "perturbed") -> Tensor:
    """Predicts the token that follows, once per roster: logits [n, V], row 0 the clean path's.

    Args:
        tokens: T >= 1 ids that follow those in the cache. Only the last one is stochastic.
        cache: a `SharedCache` (the Clean Cache) or a `BranchingCache`; extended by the T tokens.
        tau, weights: see `temperatures` and `stochastic_route`.
        seed: of the noise, see `gumbel`.

    Raises ValueError: more tokens than the model's context, or than the cache, has room for.
    """
    tau, last = temperatures(model.config, tau), cache.length + len(tokens) - 1
    check_length(last + 1, 1, model.config)
    tokens = torch.as_tensor(tokens, dtype=torch.long, device=model.device)[None]
    if tokens.shape[1] > 1:
        model.hidden(tokens[:, :-1], cache)
    return run_rosters(model, tokens[:, -1:], cache, rosters, tau, seed, last, weights)[:, 0]


# ---- 3.1 Aggregation ------------------------------------------------------------------------------------------------


def aggregate(logits: Tensor) -> Tensor:
    """Log of the rosters' mean probability: logits [n, ..., V] -> log-probabilities [..., V] in float32."""
    return logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))


# ---- Generating and scoring -----------------------------------------------------------------------------------------


def generate(
    model: OLMoE,
    tokens: Sequence[int],  # the prompt
    rosters: int = 4,
    tau: float | Sequence[float] | None = None,  # see `temperatures`
    cache: str = "shared",  # the Clean Cache, one history for all rosters; or "branching", one for each
    max_new_tokens: int = 128,
    temperature: float = 0.0,  # see `choose`
    top_p: float = 1.0,
    seed: int = 0,  # of the noise and of the sampling
    weights: str = "perturbed",  # see `stochastic_route`
    margin: float = 1.0,  # rosters only where the clean path is not `sure`; 1: everywhere. Not in the paper
    watch: Callable | None = None,
) -> Iterator[int]:
    """Generates text with n rosters for every token, and yields each token's id as soon as it is known.

    Ends before an end-of-text token, after `max_new_tokens`, or when the model's context is full. With the shared cache
    a text that is cut anywhere and continued with the same seed goes on as if it had not been.

    `watch` is called as watch(logits [n, 1, V], log_probs [1, V], tokens [1], cache) for every token, before it is
    yielded; log_probs is the average that it was chosen from. Where the clean path was sure, n is 1.

    Raises ValueError, with the first token: an empty prompt, one longer than the context, an unknown name, a number out
    of its range, predictions that are not finite.
    """
    config, tau = model.config, temperatures(model.config, tau)
    check_length(len(tokens), 1, config)
    max_len = min(config.max_position_embeddings, len(tokens) + max_new_tokens - 1)  # the last token is not read again
    if rosters < 1 or margin < 0 or temperature < 0 or top_p <= 0:
        raise ValueError("rosters must be at least 1, margin and temperature at least 0, and top_p above 0")
    if cache == "shared":
        history = SharedCache(config, max_len)
    elif cache == "branching" and margin >= 1:  # else rosters would lack tokens that they did not read
        first_noisy = next((layer for layer, value in enumerate(tau) if value > 0), None)
        history = BranchingCache(config, max_len, rosters, len(tokens) - 1, first_noisy)
    else:
        raise ValueError(f"cache must be shared, or branching with margin 1, not {cache} with {margin}")
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for position in range(len(tokens) - 1, max_len):  # of the token that is read last and predicted from
        logits = predict(model, tokens, history, rosters if margin >= 1 else 1, tau, seed, weights)
        log_probs = aggregate(logits)
        if margin < 1 and not sure(log_probs, margin):
            history.length = position  # one step back: the same token once more, with all rosters
            logits = predict(model, tokens[-1:], history, rosters, tau, seed, weights)
            log_probs = aggregate(logits)
        token = choose(log_probs, temperature, top_p, seed, position)
        if log_probs[token].isnan():  # what a softmax makes of infinite logits; -inf is a probability of 0
            raise ValueError(NOT_FINITE)
        if token in eos:
            return
        if watch:
            watch(logits[:, None], log_probs[None], torch.tensor([token], device=model.device), history)
        yield token
        tokens = [token]


def sure(log_probs: Tensor, margin: float) -> Tensor:
    """Whether the first choice is more probable than the second by `margin` or more: log_probs [..., V] -> [...]."""
    first, second = log_probs.topk(2).values.exp().unbind(-1)
    return (first - second >= margin) & (margin < 1)  # at 1 nothing is, not even what rounds to a probability of 1


def choose(log_probs: Tensor, temperature: float, top_p: float, seed: int, position: int) -> int:
    """A token id from log-probabilities [V]: the most likely one at temperature 0, else a sample."""
    if temperature > 0:
        log_probs = (log_probs - log_probs.max()) / temperature
        if top_p < 1:  # a sample from the smallest set of most likely tokens that has this probability
            probs, ids = log_probs.softmax(-1).sort(descending=True)
            log_probs[ids[probs.cumsum(-1) - probs >= top_p]] = -math.inf
        # It is drawn as experts are, by adding Gumbel noise: that of one noisy roster, at positions that no token has.
        log_probs += gumbel(seed, -1 - position, 2, 1, len(log_probs))[0, 0].to(log_probs.device)
    return log_probs.argmax().item()


@torch.inference_mode()
def score(model, tokens, rosters, tau=None, seed=0, weights="perturbed", margin=1.0, history=None, watch=None):
    """Log-probability of every token of a text under 1, 2, ..., n rosters (section 2.2, validation perplexity).

    With the shared cache a token's noise reaches no other token, and is that of its position. A forward pass over T
    tokens with n rows is therefore decoding token by token: row r at position t sees the clean history and itself.

    Args:
        tokens: T >= 2 ids. One longer than the context is scored in pieces of that length, each without those before.
        tau, seed, weights, margin: as in `generate`.
        history: a `SharedCache` that holds the tokens before tokens[0], with room for T - 1 more, which are added.
        watch: called as watch(logits [n, t, V], log_probs [t, V], tokens [t], cache) for every t tokens of the text;
            log_probs is the average, or where the clean path was sure its own prediction.

    Returns:
        log-probabilities [n, T - 1] in float32; row m - 1 is what `generate` with m rosters gives to tokens[1:].

    Raises ValueError: fewer than two tokens, history and text longer than the context, predictions that are not finite.
    """
    config, tau, position = model.config, temperatures(model.config, tau), history.length if history else 0
    check_length(len(tokens), 2)
    check_length(position + len(tokens) - 1, 1, config if history else None)
    tokens = torch.as_tensor(tokens, dtype=torch.long, device=model.device)
    chunk = max(1, 512 // int(rosters))  # bounds the rows times positions, and with them the memory
    context, counts = config.max_position_embeddings, torch.arange(1, rosters + 1, device=model.device)
    scores = []
    for piece, targets in zip(tokens[:-1].split(context), tokens[1:].split(context)):
        cache = history or SharedCache(config, len(piece))  # whose positions begin anew; those of noise go on
        for part, target in zip(piece.split(chunk), targets.split(chunk)):
            logits = run_rosters(model, part[None], cache, rosters, tau, seed, position, weights)
            log_probs = logits.float().log_softmax(-1)
            found = log_probs.gather(-1, target.expand(rosters, -1)[..., None])[..., 0]
            averages, clean = found.logcumsumexp(0) - counts.log()[:, None], sure(log_probs[0], margin)
            scores.append(averages.where(~clean, found[0]))
            if watch:
                watch(logits, aggregate(logits).where(~clean[:, None], log_probs[0]), target, cache)
            position += len(part)
    scores = torch.cat(scores, 1)
    if scores.isnan().any():
        raise ValueError(NOT_FINITE)
    return scores


def check_length(length: int, least: int, config: Config | None = None) -> None:
    """Raises ValueError for too few tokens, or for more than the model's context has room for."""
    if length < least:
        raise ValueError(f"the text is too short: there are {length} tokens, give at least {least}")
    if config and length > (most := config.max_position_embeddings):
        raise ValueError(f"there are {length} tokens, but the model's context has only {most}; give the last of them")


# ---- The command line -----------------------------------------------------------------------------------------------


def number(kind: type, low: float, high: float = 10**9, or_zero: bool = False) -> Callable[[str], float]:
    """An argparse type: a whole number (`int`) or a number (`float`) within bounds."""

    def parse(text):
        if low <= kind(text) <= high or or_zero and kind(text) == 0:
            return kind(text)
        what = f"{'0, or ' if or_zero else ''}a {'whole ' if kind is int else ''}number from {low} to {high}"
        raise argparse.ArgumentTypeError(f"must be {what}, not {text}")

    parse.__name__ = kind.__name__  # argparse says: invalid int value
    return parse


def parse_arguments() -> argparse.Namespace:
    """The command line, checked as far as it can be without a model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Defaults are in brackets.")
    parser.error = fail
    add = parser.add_argument_group("what to do").add_mutually_exclusive_group(required=True).add_argument
    add("--prompt", metavar="TEXT", help="continue this text; - reads it from standard input")
    add("--ppl", metavar="FILE", help="print the perplexity of a text file for every count in --rosters")
    add = parser.add_argument_group("the rosters").add_argument
    add("--rosters", type=number(int, 1, 1024), nargs="+", default=[4], help="per token; 1 is plain decoding [4]")
    add("--tau", help=f"noise temperature, or a JSON file of one per layer [tau.json beside the model, else {TAU}]")
    add("--skip", type=number(int, 0), default=1, help="layers without noise at each end; not with a file [1]")
    add("--weights", choices=["perturbed", "clean"], default="perturbed", help="softmax(R + tau G), or softmax(R)")
    add("--margin", type=number(float, 0, 1), default=1.0, help="rosters only where p1 - p2 is below it; 1: always [1]")
    add("--seed", type=int, default=0, help="of noise and sampling; any whole number [0]")
    add = parser.add_argument_group("the text, with --prompt").add_argument
    add("--max-new-tokens", type=number(int, 1), default=128, help="stop after this many tokens [128]")
    add("--temperature", type=number(float, 0.001, 1000, or_zero=True), default=0.0, help="of samples; 0: greedy [0]")
    add("--top-p", type=number(float, 1e-6, 1), default=1.0, help="sample from the likeliest tokens of this mass [1]")
    add("--cache", choices=["shared", "branching"], default="shared", help="one history, or one per roster [shared]")
    add("--chat", action="store_true", help="wrap the prompt as the OLMoE Instruct models expect it")
    add("--show", action="store_true", help="shade tokens that few rosters chose, underline those that overruled")
    add = parser.add_argument_group("the model").add_argument
    add("--model", help="directory, or hub id such as allenai/OLMoE-1B-7B-0125-Instruct [the one that comes with RoE]")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="[as stored, or float32]")
    args = parser.parse_args()
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    unread = given & {"max_new_tokens", "temperature", "top_p", "cache", "chat", "show"}
    if args.ppl is not None and unread:
        fail(f"--ppl does not read --{min(unread).replace('_', '-')}; leave it out")
    if args.ppl is None and len(args.rosters) > 1:
        fail("--rosters takes one count; several are for --ppl")
    if "top_p" in given and "temperature" not in given:
        fail("--top-p is for sampling; give a --temperature above 0, too")
    if args.cache == "branching" and args.margin < 1:
        fail("with the branching cache every roster reads every token; leave margin at 1")
    return args


def fail(message: object) -> None:
    """Ends the program with one line on standard error and exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error:", printable(" ".join(str(message).split())), file=sys.stderr)
    sys.exit(2)


def shade(text: str, agreement: float, overruled: bool) -> str:
    """Text on a background from none, where all rosters agree, over yellow to red; underlined where overruled."""
    background = (203, 209, 215, 222, 229)[min(4, int(agreement * 5))]  # of the 256 colours that terminals have
    style = f"\033[{'4;' if overruled else ''}38;5;16;48;5;{background}m"
    return text if agreement == 1 else style + text.replace("\n", f"\033[0m\n{style}") + "\033[0m"


def print_generation(args: argparse.Namespace, model: OLMoE, tokenizer: Tokenizer, tokens: list[int], tau) -> None:
    """Streams the text to standard output, then one line of statistics to standard error."""
    ids, text, decoder, seen, shown = [], "", decoders.DecodeStream(skip_special_tokens=True), [], 0
    colours = args.show and sys.stdout and sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def watch(logits, log_probs, tokens, cache):
        agreement = (logits.argmax(-1) == tokens).float().mean().item() if len(logits) > 1 else 1.0
        overruled = (log_probs.argmax() != logits[0].argmax()).item()
        seen.append((time.perf_counter(), agreement, overruled, len(logits) > 1, cache.nbytes))

    def write(piece):
        nonlocal text, shown
        text += piece
        if colours and piece:
            _, agreement, overruled, *_ = zip(*seen[shown:])
            piece, shown = shade(piece, min(agreement), any(overruled)), len(seen)
        print(piece, end="", flush=True)

    names = ("cache", "max_new_tokens", "temperature", "top_p", "seed", "weights", "margin")
    try:
        for token in generate(model, tokens, *args.rosters, tau, watch=watch, **{n: getattr(args, n) for n in names}):
            ids.append(token)
            write(decoder.step(tokenizer, token) or "")  # None within a character of several tokens
    except KeyboardInterrupt:  # what has been generated stands
        if not seen:
            raise
    write(tokenizer.decode(ids)[len(text) :])
    print(flush=True)
    times, _, overruled, noisy, nbytes = zip(*seen) if seen else [[0]] * 5
    speed = f", {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else ""
    where = f" on {sum(noisy)} of the tokens" if args.margin < 1 else ""
    stats = f"{len(ids)} tokens{speed}, rosters: {args.rosters[0]}{where}, cache: {nbytes[-1]:,} bytes; the average "
    print(f"{stats}overruled the clean roster on {sum(overruled)} of the tokens", file=sys.stderr)


def print_perplexity(args: argparse.Namespace, model: OLMoE, tokenizer: Tokenizer, tokens: list[int], tau) -> None:
    """Prints a table of perplexity against the number of rosters."""
    with tqdm(total=len(tokens) - 1, desc="scoring", unit="token", leave=False, delay=1, disable=None) as progress:
        watch = None if progress.disable else lambda logits, log_probs, tokens, cache: progress.update(len(tokens))
        scores = score(model, tokens, max(args.rosters), tau, args.seed, args.weights, args.margin, watch=watch)
    perplexity = scores.mean(1).neg().exp().tolist()
    print("rosters  perplexity  change", flush=True)
    for n in args.rosters:
        print(f"{n:7}  {perplexity[n - 1]:10.4f}  {perplexity[n - 1] / perplexity[0] - 1:+.2%}", flush=True)


def main() -> None:
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed: print would take standard output instead
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's cannot; a terminal may not know all characters
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")
    args = parse_arguments()
    try:  # all that can be refused is refused before weights are fetched or read
        text, tau = read_text(args.prompt, args.ppl), read_tau(args.tau)
        folder, config, tokenizer = read_description(args.model, args.device)
        if args.skip != 1 and (isinstance(tau, list) or tau is None and config.tau):
            raise ValueError("--skip is for one --tau; a file of temperatures says what every layer gets")
        tau, text = temperatures(config, tau, args.skip), chat_prompt(folder, text) if args.chat else text
        tokens = tokenizer.encode(text, add_special_tokens=not args.chat).ids
        if max(tokens, default=0) >= config.vocab_size:
            raise ValueError(f"the text has the token id {max(tokens)}, but vocab_size is only {config.vocab_size}")
        check_length(len(tokens), 1 if args.ppl is None else 2, config if args.ppl is None else None)
        if args.prompt is None and "\r" in text:
            print(f"{args.ppl} has carriage returns, as on Windows; they are scored as they are", file=sys.stderr)
        model, _ = load(args.model, args.device, args.dtype)
        (print_generation if args.ppl is None else print_perplexity)(args, model, tokenizer, tokens, tau)
    except BrokenPipeError:  # the reader has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
