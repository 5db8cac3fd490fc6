"""Roster of Experts: hyper-parallel scaling for mixture-of-experts language models (arXiv 2509.17238).

A router sends each token to its top k of E experts and leaves the others idle. RoE adds Gumbel noise to the router's
logits, so that other experts are chosen. A roster is the set of experts that one draw of noise selects in all layers,
for one token. n rosters run for the same token, as the n rows of a batch, and their predictions are averaged. One of
them, row 0, is the clean path: it never gets noise.

Section and equation numbers are the paper's. Shapes: n rosters, T positions, L layers, E experts, k a token, V tokens.
"""

import argparse
import hashlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # which torch does not need here

import torch
from torch import Tensor

from cache import BranchingCache, SharedCache
from load import chat_prompt, describe, load_weights, read_tau, read_text
from model import Config, OLMoE

NOT_FINITE = "the model's predictions are not finite: its weights are broken, or too large for its dtype"
TAU = 0.2  # the default temperature; the paper finds values up to 0.5 useful, and larger ones always harmful


# ---- The method, sections 2.1 to 3.1 --------------------------------------------------------------------------------


def gumbel(seed: int, position: int, *shape: int) -> Tensor:
    """The noise of a token: i.i.d. Gumbel(0, 1) of any shape, [n, L, E] for rosters; float32, on the CPU.

    Every 4 bytes of the endless SHAKE-128 stream of the seed and the token's position in its text make a value. Fewer
    rosters read less of it, so that the noise of m rosters is that of the first m of n. All noise comes from here.
    """
    digest = hashlib.shake_128(f"{seed:d} {position:d}".encode()).digest(4 * math.prod(shape))
    uniform = (torch.frombuffer(bytearray(digest), dtype=torch.int32).double() + 2**31 + 0.5) / 2**32  # never 0 or 1
    return -(-uniform.log()).log().float().view(shape)


def stochastic_route(logits: Tensor, noise: Tensor, k: int, weights: str = "perturbed", normalize: bool = False):
    """Gumbel-top-k routing (equation 1): TopK(R + tau G, k) draws k experts without replacement from softmax(R / tau).

    Args:
        logits: router logits R [n, T, E], or [1, T, E] as long as all rosters are the same.
        noise: tau G [n, T, E], already multiplied, and 0 in row 0; or 0. Without noise it is plain top-k.
        weights: what mixes the chosen experts' outputs. "perturbed": the softmax of R + tau G over all E. "clean": that
            of R. Equation 1 says only which experts run; the paper leaves the mixing open.
        normalize: scale the k weights of a token to sum to 1 (OLMoE's norm_topk_prob).

    Returns: the mixing weights in float32 and the experts' indices, both [n, T, k], or [1, T, k] of one without noise.
    """
    noisy = logits.float() + noise  # [1 or n, T, E] + [n, T, E]: here one row becomes n, the path branches
    indices = noisy.topk(k).indices
    mixing = {"perturbed": noisy, "clean": logits.float().expand_as(noisy)}[weights]
    probs = mixing.softmax(-1).gather(-1, indices)
    if normalize:
        probs = probs / probs.sum(-1, keepdim=True)
    return probs, indices


def temperatures(config: Config, tau: float | Sequence[float] | None = None, skip: int = 1) -> list[float]:
    """One routing temperature per layer (section 2.2), of which 0 is plain top-k routing.

    Args:
        tau: one value per layer, or a number for all but the first and last layers. None: the model's own values
            (`config.tau`), or 0.2 if it has none.
        skip: layers at each end that get 0 where tau is a number; the paper's L, which is not that of the shapes here.

    Raises ValueError: a layer's value that is not from 0 to 100, or not one per layer.
    """
    layers = config.num_hidden_layers
    tau = next(value for value in (tau, config.tau, TAU) if value is not None)
    values = tau.tolist() if hasattr(tau, "tolist") else tau  # numpy's and torch's
    if not isinstance(values, Sequence):
        values = [values if skip <= layer < layers - skip else 0.0 for layer in range(layers)]
    if len(values) != layers:
        raise ValueError(f"tau has {len(values)} values, but the model has {layers} layers; give one value per layer")
    for value in values:
        if not 0 <= value <= 100:
            raise ValueError(f"tau must be a number from 0 to 100, not {value}")
    return [float(value) for value in values]


def run_rosters(model: OLMoE, tokens: Tensor, cache, position: int, rosters: int, tau, seed, weights: str) -> Tensor:
    """Predicts after each of T tokens, all of them stochastic, once per roster: ids [T] -> logits [n, T, V].

    All rosters are the same until the first layer with noise, and one row runs for them; its router returns n rows.
    `position` is that of the first token in its text, for the noise. T is 1 with a `BranchingCache`. See `predict`.
    """
    if rosters < 1 or weights not in ("perturbed", "clean"):
        raise ValueError(f"rosters must be 1 or more, and weights perturbed or clean, not {rosters} and {weights!r}")
    c, tau = model.config, temperatures(model.config, tau)
    route = None  # plain routing
    if rosters > 1 and any(tau):
        drawn = [gumbel(seed, position + t, rosters, c.num_hidden_layers, c.num_experts) for t in range(len(tokens))]
        noise = torch.stack(drawn, 1).to(model.device)  # G [n, T, L, E]
        noise[0] = 0  # row 0 is the clean path

        def route(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
            added = tau[layer] * noise[:, :, layer] if tau[layer] else 0  # 0: the path does not branch here
            return stochastic_route(logits, added, c.num_experts_per_tok, weights, c.norm_topk_prob)

    return model(tokens[None], cache, route).expand(rosters, -1, -1)  # one row came out if no layer had noise


@torch.inference_mode()
def predict(model: OLMoE, tokens, cache, rosters: int, tau, seed: int, weights: str = "perturbed") -> Tensor:
    """Predicts the token that follows, once per roster (section 2.3): logits [n, V], row 0 the clean path's.

    Args:
        tokens: T >= 1 ids that follow those in the cache, and are added to it. Only the last one is stochastic.
        cache: a `SharedCache` (the Clean Cache), or a `BranchingCache`, for which T is first `prompt_len` + 1, then 1.
            Its memory is made in inference mode, and whatever else writes to it must run in that mode, too.
        tau, seed, weights: see `temperatures`, `gumbel` and `stochastic_route`.

    Raises ValueError: rosters below 1, other weights, bad tau, no ids; a full context or cache. T - 1 may be in it.
    """
    tokens = as_ids(tokens, model.device)
    if len(tokens) > 1:
        model.hidden(tokens[None, :-1], cache)  # one clean row, only to fill the cache
    return run_rosters(model, tokens[-1:], cache, cache.length, rosters, tau, seed, weights)[:, 0]


def aggregate(logits: Tensor) -> Tensor:
    """Log of the rosters' mean probability (3.1): logits [n, ..., V] -> log-probabilities [..., V] in float32."""
    return logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))


# ---- Generating and scoring -----------------------------------------------------------------------------------------


def generate(
    model: OLMoE,
    tokens: Sequence[int],  # the prompt
    rosters: int = 4,
    tau: float | Sequence[float] | None = None,  # see `temperatures`
    branching: bool = False,  # a history for each roster, instead of the Clean Cache
    max_new_tokens: int = 128,
    temperature: float = 0.0,  # see `choose`
    top_p: float = 1.0,
    seed: int = 0,  # of the noise and of the sampling
    weights: str = "perturbed",  # see `stochastic_route`
    watch: Callable | None = None,
) -> Iterator[int]:
    """Generates text with n rosters for every token, and yields each token's id as soon as it is known.

    Ends before an end-of-text token, after `max_new_tokens`, or when the model's context is full. With the Clean Cache
    a second call, with the prompt, the text so far and the same seed, goes on as one longer call would, but for
    rounding. `watch` is called before a token is yielded, as watch(logits [n, t, V], log_probs [t, V], tokens [t],
    cache) with t = 1; log_probs is the average that it was chosen from.

    Raises ValueError, with the first token: an empty prompt, one longer than the context, an unknown name, a number out
    of its range; with any token: predictions that are not finite.
    """
    config, tau = model.config, temperatures(model.config, tau)
    tokens = as_ids(tokens, model.device, most=config.max_position_embeddings)
    if not (temperature >= 0 and top_p > 0):  # written so that NaN is refused, too
        raise ValueError(f"temperature must be 0 or more, and top_p above 0, not {temperature} and {top_p}")
    max_len = min(config.max_position_embeddings, len(tokens) + max_new_tokens - 1)  # the last new one is not read
    cache = SharedCache(config, max_len)
    if branching:  # rosters share the prompt but its last token, the first that they predict from
        first_noisy = next((layer for layer, value in enumerate(tau) if value > 0), None)
        cache = BranchingCache(config, max_len, rosters, len(tokens) - 1, first_noisy)
    for position in range(len(tokens) - 1, max_len):  # of the last of `tokens`
        logits = predict(model, tokens, cache, rosters, tau, seed, weights)
        log_probs = aggregate(logits)
        token = choose(log_probs, temperature, top_p, seed, position)
        if log_probs[token].isnan():  # what a softmax makes of infinite logits; -inf is a probability of 0
            raise ValueError(NOT_FINITE)
        if token in config.eos_token_id:
            return
        if watch:
            watch(logits[:, None], log_probs[None], torch.tensor([token], device=model.device), cache)
        yield token
        tokens = [token]


def choose(log_probs: Tensor, temperature: float, top_p: float, seed: int, position: int) -> int:
    """A token id from log-probabilities [V]: the most likely one at temperature 0, else a sample."""
    if temperature > 0:
        log_probs = (log_probs - log_probs.max()) / temperature
        if top_p < 1:  # a sample from the smallest set of most likely tokens that has this probability
            probs, ids = log_probs.softmax(-1).sort(descending=True)
            before = probs.cumsum(-1)[:-1]  # the mass before the second, the third ...; the first always stays
            log_probs[ids[1:][before >= top_p]] = -math.inf
        # It is drawn as experts are, by adding Gumbel noise: that of a position below 0, which no token has.
        log_probs += gumbel(seed, -1 - position, len(log_probs)).to(log_probs.device)
    return log_probs.argmax().item()


@torch.inference_mode()
def score(
    model: OLMoE,
    tokens: Sequence[int],  # T >= 2; a text longer than the context is read in pieces that do not see each other
    rosters: int,
    tau: float | Sequence[float] | None = None,  # this and the next two as in `generate`
    seed: int = 0,
    weights: str = "perturbed",
    cache: SharedCache | None = None,  # holds what comes before tokens[0], and has room for T - 1 more
    watch: Callable | None = None,  # as in `generate`, for t tokens at once
) -> Tensor:
    """Log-probability of every token but the first under 1, 2, ..., n rosters (section 2.2, validation perplexity).

    The Clean Cache keeps row 0 alone, which has no noise. So a token's noise reaches no other token, and one pass over
    T tokens with n rows computes what decoding does: row r at position t sees the clean history, and itself.

    Returns:
        log-probabilities [n, T - 1] of tokens[1:] in float32; row m - 1 is, but for rounding, what `generate` with m
        rosters and the Clean Cache would give each of them (in a long text up to the end of its first piece).

    Raises ValueError: fewer than two tokens; a given cache or the context without room for T - 1; else as `generate`.
    """
    tokens = as_ids(tokens, model.device, least=2)
    most = model.config.max_position_embeddings
    chunk = max(1, 512 // max(1, int(rosters)))  # bounds rows times positions; rosters below 1 are refused later
    position = cache.length if cache else 0  # in the whole text, for the noise; `history` counts within a piece
    scores = []
    for piece, targets in zip(tokens[:-1].split(most), tokens[1:].split(most)):
        history = SharedCache(model.config, len(piece)) if cache is None else cache
        for part, target in zip(piece.split(chunk), targets.split(chunk)):
            logits = run_rosters(model, part, history, position, rosters, tau, seed, weights)
            found = logits.float().log_softmax(-1).gather(-1, target.expand(rosters, -1)[..., None])[..., 0]
            scores.append(found.logcumsumexp(0) - torch.ones_like(found).cumsum(0).log())  # the means of 1, 2, ..., n
            if watch:
                watch(logits, aggregate(logits), target, history)
            position += len(part)
    scores = torch.cat(scores, 1)
    if scores.isnan().any():
        raise ValueError(NOT_FINITE)
    return scores


def as_ids(tokens, device: str | torch.device, least: int = 1, most: int | None = None) -> Tensor:
    """The ids of one text, [T] or [1, T], as a tensor [T]. Raises ValueError: something else, too few, too many."""
    ids = torch.as_tensor(tokens, device=device)
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or len(ids) < least or ids.is_floating_point():
        raise ValueError(f"give one text of at least {least} token ids, not {list(ids.shape)} of {ids.dtype}")
    if most and len(ids) > most:
        raise ValueError(f"there are {len(ids)} tokens, but the model's context has only {most}; give the last of them")
    return ids.long()


# ---- The command line: from here on there is nothing more of the method ---------------------------------------------


def number(kind: type, low: float, high: float = 10**9) -> Callable[[str], float]:
    """An argparse type: a whole number (`int`) or a number (`float`) within bounds."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse says: invalid int value
    return parse


def parse_arguments() -> argparse.Namespace:
    """The command line, checked as far as it can be without a model."""
    parser = argparse.ArgumentParser(description="Roster of Experts (arXiv 2509.17238).", epilog="[ ]: defaults.")
    hint = "; write --prompt=TEXT for a text that begins with -"
    parser.error = lambda message: fail(message + hint * ("--prompt: expected" in message))
    add = parser.add_argument_group("the text").add_argument
    add("--prompt", required=True, metavar="TEXT", help="continue this text; - reads it from standard input")
    add("--max-new-tokens", type=number(int, 1), default=128, help="stop after this many tokens [128]")
    add("--temperature", type=number(float, 0, 1000), default=0.0, help="of samples; 0: greedy [0]")
    add("--top-p", type=number(float, 1e-6, 1), default=1.0, help="sample from the likeliest tokens of this mass [1]")
    add("--cache", choices=["shared", "branching"], default="shared", help="one history, or one per roster [shared]")
    add("--chat", action="store_true", help="wrap the prompt as the OLMoE Instruct models expect it")
    add = parser.add_argument_group("the rosters").add_argument
    add("--rosters", type=number(int, 1, 1024), default=4, help="per token; 1 is plain decoding [4]")
    add("--tau", help=f"noise temperature, or a JSON file of one per layer [tau.json beside the model, else {TAU}]")
    add("--skip", type=number(int, 0), default=1, help="layers without noise at each end; not with a file [1]")
    add("--weights", choices=["perturbed", "clean"], default="perturbed", help="softmax(R + tau G), or softmax(R)")
    add("--seed", type=int, default=0, help="of noise and sampling; any whole number [0]")
    add = parser.add_argument_group("the model").add_argument
    add("--model", help="directory, or hub id such as allenai/OLMoE-1B-7B-0125-Instruct [the one that comes with RoE]")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="[as stored, or float32]")
    return parser.parse_args()


def fail(message: object) -> None:
    """Ends the program with one line on standard error, in which no name can steer a terminal, and exit status 2."""
    line = " ".join(str(message).split())
    line = line if len(line) <= 1000 else f"{line[:500]} ... {line[-500:]}"
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr)
    sys.exit(2)


def print_generation(args: argparse.Namespace, model: OLMoE, tokenizer, tokens: list[int], tau) -> None:
    """Streams the text to standard output, then one line of statistics to standard error."""
    ids = []
    text = ""
    seen = []  # of each token: whether its rosters overruled the clean one, when, the cache's bytes

    def watch(logits, log_probs, _, cache):
        overruled = (log_probs.argmax() != logits[0].argmax()).item()
        seen.append((overruled, time.perf_counter(), cache.nbytes))

    names = ("max_new_tokens", "temperature", "top_p", "seed", "weights")
    options = {name: getattr(args, name) for name in names} | {"branching": args.cache == "branching"}
    try:
        for token in generate(model, tokens, args.rosters, tau, watch=watch, **options):
            ids.append(token)
            piece = tokenizer.decode(ids)[len(text) :]
            if not piece.endswith("\ufffd"):  # as within a character of several tokens
                print(piece, end="", flush=True)
                text += piece
    except KeyboardInterrupt:  # what has been generated stands
        if not seen:
            raise
    print(tokenizer.decode(ids)[len(text) :], flush=True)
    stats = f"{len(ids)} tokens"
    if len(seen) > 1:
        stats += f", {(len(seen) - 1) / (seen[-1][1] - seen[0][1]):.1f} tokens/s"
    if seen:
        stats += f", rosters: {args.rosters}, cache: {seen[-1][2]:,} bytes; the average overruled the clean roster"
        stats += f" on {sum(overruled for overruled, *_ in seen)} of the tokens"
    print(stats, file=sys.stderr)


def main(print_text: Callable = print_generation) -> None:  # study/show.py has another
    sys.stderr = sys.stderr or open(os.devnull, "w")  # None if closed, for which print takes standard output
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's cannot; a terminal may not know all characters
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")
    args = parse_arguments()
    try:  # all that can be refused is refused before weights are fetched or read
        if args.top_p < 1 and args.temperature == 0:
            raise ValueError("--top-p is for sampling; give a --temperature above 0, too")
        text = read_text(args.prompt)
        tau = read_tau(args.tau)
        source, folder, config, tokenizer = describe(args.model)
        tau = config.tau if tau is None else tau  # if that is a list, it says what all layers get
        if args.skip != 1 and (isinstance(tau, list) or 2 * args.skip >= config.num_hidden_layers):
            raise ValueError("--skip must leave layers with noise, and needs a number as --tau, not a tau.json")
        tau = temperatures(config, tau, args.skip)
        text = chat_prompt(folder, text) if args.chat else text
        tokens = tokenizer.encode(text, add_special_tokens=not args.chat).ids
        if max(tokens, default=0) >= config.vocab_size:
            raise ValueError(f"the text has the token id {max(tokens)}, but vocab_size is only {config.vocab_size}")
        as_ids(tokens, "cpu", most=config.max_position_embeddings)
        model = load_weights(source, config, args.device, args.dtype)
        print_text(args, model, tokenizer, tokens, tau)
    except BrokenPipeError:  # the reader has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and ("memory" not in str(error) or "illegal" in str(error)):
            raise
        fail("there is not enough memory; give fewer --rosters, a shorter text, or --dtype bfloat16")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
