"""The perplexity of a text under several counts of rosters (section 2.2), all of them from one pass.

python study/perplexity.py FILE --rosters 1 2 4 8 16 32
"""

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import roe  # before torch, of which it silences a warning
from load import describe, load_weights, read_tau, read_text
from roe import TAU, as_ids, fail, number, temperatures


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("file", metavar="FILE", help="a text in UTF-8, of up to 16 MB")
    add("--rosters", metavar="N", type=number(int, 1, 1024), nargs="+", default=[1, 4], help="per token [1 4]")
    add("--tau", help=f"noise temperature, or a JSON file of one per layer [tau.json beside the model, else {TAU}]")
    add("--skip", metavar="L", type=number(int, 0), default=1, help="layers without noise at each end; no file [1]")
    add("--weights", choices=["perturbed", "clean"], default="perturbed", help="as in roe.py [perturbed]")
    add("--seed", metavar="N", type=int, default=0, help="of the noise [0]")
    add("--model", help="directory, or hub id such as allenai/OLMoE-1B-7B-0125 [the one that comes with RoE]")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="[as stored, or float32]")
    return parser.parse_args()


def print_table(args: argparse.Namespace, model, tokens: list[int], tau: list[float]) -> None:
    """A line for each count of rosters; the change is from one roster."""
    with tqdm(total=len(tokens) - 1, desc="scoring", unit="token", leave=False, delay=1, disable=None) as progress:
        watch = None if progress.disable else lambda logits, log_probs, tokens, cache: progress.update(len(tokens))
        scores = roe.score(model, tokens, max(args.rosters), tau, args.seed, args.weights, watch=watch)
    perplexity = scores.mean(1).neg().exp().tolist()
    print("rosters  perplexity  change", flush=True)
    for n in args.rosters:
        print(f"{n:7}  {perplexity[n - 1]:10.4f}  {perplexity[n - 1] / perplexity[0] - 1:+.2%}", flush=True)


def main() -> None:
    sys.stderr = sys.stderr or open(os.devnull, "w")  # None if closed, for which print takes standard output
    args = parse_arguments()
    try:  # all that can be refused is refused before weights are fetched or read
        text = read_text("-", args.file)
        tau = read_tau(args.tau)
        source, _, config, tokenizer = describe(args.model)
        tau = config.tau if tau is None else tau
        if args.skip != 1 and (isinstance(tau, list) or 2 * args.skip >= config.num_hidden_layers):
            raise ValueError("--skip must leave layers with noise, and needs a number as --tau, not a tau.json")
        tau = temperatures(config, tau, args.skip)
        tokens = tokenizer.encode(text).ids
        as_ids(tokens, "cpu", least=2)
        if max(tokens) >= config.vocab_size:
            raise ValueError(f"the text has the token id {max(tokens)}, but vocab_size is only {config.vocab_size}")
        if "\r" in text:
            print(f"{args.file!r} has carriage returns, as on Windows; they are scored as they are", file=sys.stderr)
        print_table(args, load_weights(source, config, args.device, args.dtype), tokens, tau)
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
