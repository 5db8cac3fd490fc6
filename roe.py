"""Roster of Experts: hyper-parallel scaling for mixture-of-experts language models (arXiv 2509.17238).

A router sends each token to its top k of E experts and leaves the others idle. RoE adds Gumbel noise to the router's
logits, runs n such rosters of experts for the same token as n rows of one batch, and averages the n predictions.
Row 0 is the clean path: its routing never gets noise.

Section and equation numbers are the paper's. Shapes: n rosters, T positions, E experts, L layers.
"""

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # which torch does not need here

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from cache import BranchingCache, SharedCache
from load import EMBEDDED, load
from model import Config, OLMoE, top_k

TAU = 0.2  # the default temperature; the paper finds values up to 0.5 useful, and larger ones always harmful


# ---- Stochastic routing (section 2.1) -------------------------------------------------------------------------------


def gumbel(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """I.i.d. Gumbel(0, 1) noise in float32, on the generator's device. All routing noise comes from here."""
    # If X is Exponential(1), -log(X) is Gumbel(0, 1); exponential_ never returns 0.
    return -torch.empty(shape, device=generator.device).exponential_(generator=generator).log()


def temperatures(config: Config, tau: float | Sequence[float] = TAU, skip: int = 1) -> list[float]:
    """One routing temperature per layer (section 2.2).

    Args:
        tau: a number for all layers but the first and last `skip`, which get 0; or one value per layer.

    Returns:
        a list of L floats.

    Raises:
        ValueError: a tau that is not a finite number >= 0, or not one per layer; a negative skip.
    """
    layers = config.num_hidden_layers
    if isinstance(tau, (int, float)):
        if skip < 0:
            raise ValueError(f"skip must be at least 0, not {skip}")
        tau = [tau if skip <= layer < layers - skip else 0.0 for layer in range(layers)]
    if len(tau) != layers:
        raise ValueError(f"tau has {len(tau)} values, but the model has {layers} layers; give one value per layer")
    for value in tau:
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"tau must be a number >= 0, not {value}")
    return [float(value) for value in tau]


def stochastic_route(
    config: Config, rosters: int, tau: Sequence[float], generator: torch.Generator, weights: str = "clean"
) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
    """Gumbel-top-k routing (equation 1), as the `route` of `model.OLMoE`.

    A token's experts are TopK(R + tau * G, k), R its router logits and G Gumbel noise: k experts drawn without
    replacement from softmax(R / tau). Row 0 gets no noise.

    Args:
        tau: one temperature per layer; a layer with 0 is plain top-k routing.
        weights: what mixes the chosen experts' outputs. "clean": softmax(R), the letter of equation 1, where noise
            decides only which experts run. "perturbed": softmax(R + tau * G), the other reading.
    """
    if rosters < 1:
        raise ValueError(f"rosters must be at least 1, not {rosters}")
    if weights not in ("clean", "perturbed"):
        raise ValueError(f"weights must be clean or perturbed, not {weights}")

    def route(layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        if rosters == 1 or tau[layer] == 0:
            return top_k(config, logits)
        # Every process draws the noise of all rosters and keeps its share: the result is that of one process.
        rank, world = processes()
        noise = gumbel((rosters - 1, *logits.shape[1:]), generator)[rank::world]
        # Up to the first noisy router all rosters are the same one row.
        logits = logits.float().expand(1 + len(noise), -1, -1)
        noisy = torch.cat((logits[:1], logits[1:] + tau[layer] * noise))
        return top_k(config, noisy) if weights == "perturbed" else top_k(config, logits, selection=noisy)

    return route


def processes() -> tuple[int, int]:
    """Rank of this process and the number of processes that share the rosters: 0 and 1 unless torchrun started them."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


# ---- Predicting a token (sections 2.3 and 3.1) ----------------------------------------------------------------------


@torch.inference_mode()
def predict(
    model: OLMoE,
    tokens: Sequence[int],
    cache: SharedCache | BranchingCache,
    rosters: int,
    tau: float | Sequence[float],
    generator: torch.Generator,
    weights: str = "clean",
) -> Tensor:
    """Predicts the token that follows, once per roster, in one batched forward pass.

    Args:
        tokens: a sequence of T >= 1 token ids that follow those in the cache. Only the last one is stochastic.
        cache: a `SharedCache` or a `BranchingCache`; extended by the T tokens.
        tau, weights: see `temperatures` and `stochastic_route`.
        generator: a torch.Generator on the model's device.

    Returns:
        logits [rosters, vocab_size]; row 0 is the clean path's. If several processes share the rosters: those of the
        clean path and of this process's share.
    """
    route = stochastic_route(model.config, rosters, temperatures(model.config, tau), generator, weights)
    tokens = torch.as_tensor(tokens, device=model.device)[None]
    if tokens.shape[1] > 1:
        model.hidden(tokens[:, :-1], cache)
    rank, world = processes()
    return model(tokens[:, -1:], cache, route)[:, 0].expand(1 + len(range(rosters - 1)[rank::world]), -1)


def aggregate(logits: Tensor) -> Tensor:
    """Log of the rosters' mean probability (section 3.1): logits [n, ..., V] -> log-probabilities [..., V], float32."""
    return logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))


def aggregate_processes(logits: Tensor, rosters: int) -> Tensor:
    """As `aggregate`, over the rosters of all processes: one all-reduce of [V] probabilities."""
    rank, world = processes()
    if world == 1:
        return aggregate(logits)
    total = logits[min(rank, 1) :].float().softmax(-1).sum(0)  # the clean row, which all have, is rank 0's to count
    dist.all_reduce(total)
    return total.log() - math.log(rosters)


def choose(log_probs: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token id from log-probabilities [V]: the most likely one at temperature 0, else a sample.

    With top_p < 1 the sample is from the smallest set of most likely tokens that has this probability.
    """
    if temperature == 0:
        return log_probs.argmax().item()
    probs, ids = (log_probs / temperature).softmax(-1).sort(descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0
    return ids[probs.multinomial(1, generator=generator)].item()


def generate(
    model: OLMoE,
    tokens: Sequence[int],
    rosters: int = 4,
    tau: float | Sequence[float] = TAU,
    cache: str = "shared",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    weights: str = "clean",
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
        watch: called as watch(cache, logits [rosters, vocab_size], log_probs [vocab_size], token) for every token,
            before it is yielded; log_probs is the average.

    Yields:
        token ids, each as soon as it is known.

    Raises:
        ValueError: an empty prompt, one longer than the context, or an argument out of its range.
    """
    config, tau = model.config, temperatures(model.config, tau)
    if len(tokens) == 0:
        raise ValueError("the prompt is empty; give at least one token")
    if len(tokens) > config.max_position_embeddings:
        raise ValueError(f"the prompt has {len(tokens)} tokens, but the context only {config.max_position_embeddings}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number >= 0, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if cache not in ("shared", "branching"):
        raise ValueError(f"cache must be shared or branching, not {cache}")
    if cache == "branching" and processes()[1] > 1:
        raise ValueError("the branching cache works in one process only; use the shared cache")

    max_len = min(config.max_position_embeddings, len(tokens) + max_new_tokens - 1)  # the last token is not read again
    steps = max_len - len(tokens) + 1
    if cache == "shared":
        cache = SharedCache(config, max_len, model.dtype, model.device)
    else:
        first_noisy = next((layer for layer, value in enumerate(tau) if value > 0), None)
        cache = BranchingCache(config, max_len, rosters, len(tokens) - 1, first_noisy, model.dtype, model.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for _ in range(steps):
        logits = predict(model, tokens, cache, rosters, tau, generator, weights)
        log_probs = aggregate_processes(logits, rosters)
        token = choose(log_probs, temperature, top_p, generator)
        if token in eos:
            return
        if watch:
            watch(cache, logits, log_probs, token)
        yield token
        tokens = [token]


@torch.inference_mode()
def score(
    model: OLMoE,
    tokens: Sequence[int],
    rosters: int,
    tau: float | Sequence[float] = TAU,
    seed: int = 0,
    weights: str = "clean",
    cache: SharedCache | None = None,
    watch: Callable | None = None,
) -> Tensor:
    """Log-probability of every token of a text under 1, 2, ..., n rosters, from one pass (section 2.2, validation).

    With the shared cache a token's noise reaches no other token. One forward pass over T tokens with n rows therefore
    equals decoding token by token: row r at position t sees the clean history before t and itself.

    Args:
        tokens: T >= 2 token ids. A text longer than the context is scored in pieces of that length, each without the
            tokens before it.
        tau, weights: see `temperatures` and `stochastic_route`.
        cache: the clean history before tokens[0], with room for T - 1 more positions, by which it is extended. None: no
            history.
        watch: called as watch(log_probs [rosters, t, vocab_size], targets [t]) for every t tokens of the text.

    Returns:
        log-probabilities [rosters, T - 1] in float32; row n - 1 is that of tokens[1:] under n rosters.

    Raises:
        ValueError: fewer than two tokens, or an argument out of its range.
    """
    config = model.config
    if processes()[1] > 1:
        raise ValueError("scoring works in one process only; start it without torchrun")
    if len(tokens) < 2:
        raise ValueError(f"the text is too short to score: it has {len(tokens)} tokens, at least 2 are needed")
    generator = torch.Generator(model.device).manual_seed(seed)
    route = stochastic_route(config, rosters, temperatures(config, tau), generator, weights)
    tokens = torch.as_tensor(tokens, device=model.device)
    inputs, targets = tokens[:-1], tokens[1:]
    chunk = max(1, 512 // rosters)  # bounds the rows times positions, and with them the memory
    context = config.max_position_embeddings
    # Filled in place: small results kept one by one between large temporary tensors would fragment the memory.
    scores, done = torch.empty(rosters, len(targets), device=model.device), 0
    with tqdm(total=len(targets), desc="scoring", unit="token", leave=False, delay=1, disable=None) as progress:
        for piece, wanted in zip(inputs.split(context), targets.split(context)):
            history = cache or SharedCache(config, len(piece), model.dtype, model.device)
            for part, target in zip(piece.split(chunk), wanted.split(chunk)):
                log_probs = model(part[None], history, route).float().log_softmax(-1).expand(rosters, -1, -1)
                index = target.expand(rosters, -1).unsqueeze(-1)
                scores[:, done : done + len(part)] = log_probs.gather(-1, index).squeeze(-1)
                done += len(part)
                if watch:
                    watch(log_probs, target)
                progress.update(len(part))
    counts = torch.arange(1, rosters + 1, device=model.device)
    return scores.logcumsumexp(0) - counts.log()[:, None]


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
    group.add_argument(
        "--tune", metavar="FILE", help="search the temperatures that lower a text file's perplexity most"
    )

    add = parser.add_argument_group("the rosters").add_argument
    add("--rosters", metavar="N", type=int, nargs="+", default=[4], help="rosters per token; 1 is plain decoding [4]")
    tau = f"noise temperature, or a JSON file of one per layer [tau.json in the model's directory; without one, {TAU}]"
    add("--tau", help=tau)
    add("--skip", metavar="L", type=int, help="layers without noise at each end; not with a file of temperatures [1]")
    weights = "what mixes the chosen experts: softmax(R), as in equation 1, or softmax(R + tau G) [clean]"
    add("--weights", choices=["clean", "perturbed"], default="clean", help=weights)
    cache = "one clean history for all rosters, or one history for each [shared]"
    add("--cache", choices=["shared", "branching"], default="shared", help=cache)
    add("--seed", metavar="N", type=int, default=0, help="of noise and sampling; one seed gives one output [0]")

    add = parser.add_argument_group("the text").add_argument
    add("--max-new-tokens", metavar="N", type=int, default=128, help="stop after this many tokens [128]")
    add("--temperature", metavar="T", type=float, default=0.0, help="sample at this temperature; 0 is greedy [0]")
    add("--top-p", metavar="P", type=float, default=1.0, help="sample from the likeliest tokens of this total mass [1]")
    add("--chat", action="store_true", help="wrap the prompt as the OLMoE Instruct models expect it")
    show = "on a terminal, shade a token the more, the fewer rosters chose it; underline where the average overruled"
    add("--show", action="store_true", help=f"{show} the clean roster")

    add = parser.add_argument_group("the search of --tune").add_argument
    add("--trials", metavar="N", type=int, default=50, help="stop after this many, those of earlier runs included [50]")
    add(
        "--output",
        metavar="FILE",
        default="tau.json",
        help="the best temperatures, for --tau; FILE.log resumes [tau.json]",
    )
    add("--tau-max", metavar="TAU", type=float, default=0.5, help="search from 0 to here [0.5]")

    add = parser.add_argument_group("the model").add_argument
    model = "directory, or hub id such as allenai/OLMoE-1B-7B-0125-Instruct [the small model that comes with RoE]"
    add("--model", help=model)
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    dtypes = ["auto", "bfloat16", "float16", "float32"]
    add("--dtype", choices=dtypes, default="auto", help="of the weights [as they are stored]")

    parser.error = fail
    args = parser.parse_args()
    if min(args.rosters) < 1:
        fail(f"--rosters must be at least 1, not {min(args.rosters)}")
    if args.ppl is None and len(args.rosters) > 1:
        fail("--rosters takes one count; several are for --ppl")
    if args.prompt is None and args.cache != "shared":
        fail("texts are scored with the shared cache only; leave out --cache branching")
    if args.tau is None:
        tuned = Path(args.model or EMBEDDED) / "tau.json"
        args.tau = str(tuned if args.skip is None and tuned.is_file() else TAU)
    args.skip = 1 if args.skip is None else args.skip
    return args


def fail(message: object) -> NoReturn:
    """Ends the program with one line on standard error and exit status 2."""
    print("roe.py: error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def read_text(args: argparse.Namespace) -> str:
    """The prompt, or the text to be scored."""
    if args.prompt is None:
        name = args.ppl or args.tune
        data = Path(name).read_bytes()
    elif args.prompt == "-" and processes()[1] > 1:
        raise ValueError("several processes cannot share standard input; give the prompt itself")
    else:
        name, data = "the prompt", sys.stdin.buffer.read() if args.prompt == "-" else os.fsencode(args.prompt)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from error
    if not text:
        raise ValueError(f"{name} is empty; give some text")
    if args.chat and args.prompt is not None:
        return f"<|endoftext|><|user|>\n{text}\n<|assistant|>\n"
    return text


def read_tau(argument: str, config: Config, skip: int) -> list[float]:
    """The temperatures that --tau stands for."""
    path = Path(argument)
    try:
        tau = [float(value) for value in json.loads(path.read_bytes())] if path.is_file() else float(argument)
    except (ValueError, TypeError) as error:
        raise ValueError(f"tau takes a number or a JSON file with a list of them; {argument} is neither") from error
    return temperatures(config, tau, skip)


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
    times, agreement, overruled, shown, nbytes = [], [], [], 0, 0
    colours = args.show and sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def watch(cache, logits, log_probs, token):
        nonlocal nbytes
        times.append(time.perf_counter())
        agreement.append((logits.argmax(-1) == token).float().mean().item())
        overruled.append((log_probs.argmax() != logits[0].argmax()).item())
        nbytes = cache.nbytes

    (rosters,) = args.rosters
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    generated = generate(
        model, tokens, rosters, tau, args.cache, args.max_new_tokens, **sampling, weights=args.weights, watch=watch
    )
    try:
        for text in stream(tokenizer, generated):
            if colours and text:
                text = shade(text, min(agreement[shown:]), any(overruled[shown:]))
                shown = len(agreement)
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        pass  # what has been generated stands
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else math.nan
    print(flush=True)
    print(
        f"{len(times)} tokens, {speed:.1f} tokens/s, rosters: {rosters}, cache: {nbytes:,} bytes; "
        f"the average overruled the clean roster on {sum(overruled)} of the tokens",
        file=sys.stderr,
    )


def print_perplexity(args: argparse.Namespace, model: OLMoE, tokens: list[int], tau: list[float]) -> None:
    """Prints a table of perplexity against the number of rosters."""
    perplexity = score(model, tokens, max(args.rosters), tau, args.seed, args.weights).mean(1).neg().exp().tolist()
    print("rosters  perplexity  change")
    for n in args.rosters:
        print(f"{n:7}  {perplexity[n - 1]:10.4f}  {perplexity[n - 1] / perplexity[0] - 1:+.2%}")


def tune(args: argparse.Namespace, model: OLMoE, tokens: list[int]) -> None:
    """Searches per-layer temperatures by Optuna's TPE on perplexity (section 2.2); keeps the best so far on disk."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ValueError('--tune needs Optuna; install it with: pip install -e ".[tune]"') from error
    (rosters,) = args.rosters
    highest = temperatures(model.config, args.tau_max, args.skip)
    noisy = [layer for layer, value in enumerate(highest) if value > 0]

    def perplexity(trial):
        tau = [trial.suggest_float(f"tau_{i}", 0, value) if value > 0 else 0.0 for i, value in enumerate(highest)]
        trial.set_user_attr("tau", tau)
        return score(model, tokens, rosters, tau, args.seed, args.weights)[-1].mean().neg().exp().item()

    def report(study, trial):
        temporary = Path(f"{args.output}.tmp")
        temporary.write_text(json.dumps(study.best_trial.user_attrs["tau"]) + "\n")
        temporary.replace(args.output)
        best = f"best {study.best_value:.4f} (trial {study.best_trial.number + 1})"
        print(f"trial {trial.number + 1} of {args.trials}: perplexity {trial.value:.4f}, {best}", file=sys.stderr)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    settings = f"{args.tune} {args.model} {rosters} {args.tau_max} {args.skip} {args.weights} {args.seed}"
    storage = optuna.storages.JournalStorage(JournalFileBackend(f"{args.output}.log"))
    study = optuna.create_study(storage=storage, study_name=settings, load_if_exists=True)
    done = sum(trial.state.is_finished() for trial in study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=args.seed + done)  # a resumed search must not repeat its trials
    if done == 0:
        study.enqueue_trial({f"tau_{i}": min(TAU, args.tau_max) for i in noisy})  # start from the default
    study.optimize(perplexity, max(0, args.trials - done), callbacks=[report])
    print(f"{args.output}: perplexity {study.best_value:.4f} with", study.best_trial.user_attrs["tau"])


def main() -> None:
    args = parse_arguments()
    if dist.is_available() and dist.is_torchelastic_launched():  # by torchrun: the processes share the rosters
        dist.init_process_group()  # gloo on CPUs, nccl on GPUs
        if args.device in ("auto", "cuda") and torch.cuda.is_available():
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        if dist.get_rank() > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        text = read_text(args)
        model, tokenizer = load(args.model, args.device, args.dtype)
        tokens = tokenizer.encode(text).ids
        tau = read_tau(args.tau, model.config, args.skip)
        if args.prompt is not None:
            print_generation(args, model, tokenizer, tokens, tau)
        elif args.ppl is not None:
            print_perplexity(args, model, tokens, tau)
        else:
            tune(args, model, tokens)
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
