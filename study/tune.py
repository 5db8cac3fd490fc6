"""Searches the routing temperatures, one per layer, that lower a text's perplexity most (section 2.2 of the paper).

    python study/tune.py FILE --rosters 4 8 16 32 --output tau.json     # then: python roe.py --tau tau.json

Of several counts of rosters it minimises the mean of their log-perplexities, all from one pass; what it reports as
perplexity is their geometric mean. OUTPUT always holds the best so far, and OUTPUT.log a line of JSON for every trial:
the same command goes on where an earlier one stopped. Exit status: 0; 2 for bad input; 130 when interrupted, which
loses the trial under way only.
"""

import signal
import sys

if __name__ == "__main__":  # before the imports, which take seconds
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import argparse
import hashlib
import json
import math
import os
import uuid
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout  # comes with torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from load import describe, load_weights, read_text
from model import OLMoE
from roe import TAU, as_ids, fail, number, score, temperatures

SEARCH = "text model dtype device rosters tau_max skip weights seed".split()  # what a trial belongs to
START = b'{"text": "'  # of every line of the log


def open_log(output: Path, lock: FileLock) -> tuple[BinaryIO, list[dict]]:
    """The log of all trials, OUTPUT.log, and what it holds; takes the lock.

    Raises:
        ValueError: `output` or its log is there, and not what a search wrote; or another search is using them.
    """
    log = Path(f"{output}.log")
    for path in (output, log):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(f"{path} is not a regular file; choose another --output")
    foreign = f"{output} holds no temperatures from {log} and is not replaced; choose another --output"
    if output.exists() and not log.exists():
        raise ValueError(foreign)
    file = log.open("a+b")
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(f"{log} is in use by another search; wait for it, or choose another --output") from error
        file.seek(0)
        *lines, rest = file.read().split(b"\n")
        try:
            trials = [json.loads(line) for line in lines]
            ours = all(map(is_trial, trials))
        except (ValueError, TypeError, RecursionError):
            ours = False
        if not ours or not (rest.startswith(START) or START.startswith(rest)):
            raise ValueError(f"{log} is not the log of a search; choose another --output")
        if output.exists() and output.read_bytes() not in [as_json(trial["tau"]) for trial in trials]:
            raise ValueError(foreign)
        if rest:
            print(f"{log}: dropped the last line, which was cut short", file=sys.stderr)
            file.truncate(sum(len(line) + 1 for line in lines))
    except ValueError:
        file.close()
        raise
    return file, trials


def is_trial(line: dict) -> bool:
    """Whether a line of a log is what a search wrote: its keys, temperatures, and a perplexity or null."""
    number = lambda value: type(value) in (int, float) and math.isfinite(value)
    known = list(line) == [*SEARCH, "tau", "perplexity"] and isinstance(line["tau"], list)
    return known and all(map(number, line["tau"])) and (line["perplexity"] is None or number(line["perplexity"]))


def as_json(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def replace(output: Path, tau: list[float]) -> None:
    """Writes temperatures at once: whatever ends the program, the file is the old one or the new one, never a part."""
    temporary = Path(f"{output}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(as_json(tau))
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def checksum(folder: Path) -> str:
    """SHA-256 of all bytes of a model's files."""
    digest = hashlib.sha256()
    for file in (folder / "config.json", folder / "tokenizer.json", *sorted(folder.glob("*.safetensors"))):
        with file.open("rb") as stream:
            while block := stream.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def tune(args: argparse.Namespace, model: OLMoE, tokens: list[int], search: dict, trials: list, log: BinaryIO) -> dict:
    """Adds trials to those of earlier runs until there are args.trials; returns the best. A failed one has no value."""
    import optuna

    highest = temperatures(model.config, args.tau_max, args.skip)
    space = {str(i): optuna.distributions.FloatDistribution(0, tau) for i, tau in enumerate(highest) if tau > 0}
    state = lambda value: optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
    best = lambda: min(trials, key=lambda trial: trial["perplexity"] or math.inf)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # The seed is another one when a search is resumed, which must not repeat its trials.
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=args.seed + len(trials)))
    for trial in trials:
        params, value = {name: trial["tau"][int(name)] for name in space}, trial["perplexity"]
        old = optuna.trial.create_trial(params=params, distributions=space, value=value, state=state(value))
        study.add_trial(old)
    if not trials:
        study.enqueue_trial({name: min(TAU, args.tau_max) for name in space})  # start from the default
    for i in range(len(trials) + 1, args.trials + 1):
        trial = study.ask(space)
        tau = [trial.params.get(str(i), 0.0) for i in range(len(highest))]
        try:
            scores = score(model, tokens, max(args.rosters), tau, args.seed, args.weights)
            perplexity = scores[[n - 1 for n in args.rosters]].mean().neg().exp().item()
        except ValueError:  # predictions that are not finite
            perplexity = math.nan
        value = perplexity if math.isfinite(perplexity) else None
        study.tell(trial, value, state(value))
        trials.append(search | {"tau": tau, "perplexity": value})
        log.write(as_json(trials[-1]))
        log.flush()
        os.fsync(log.fileno())
        note = "which is not finite: a failed trial"
        if value is not None:
            replace(args.output, best()["tau"])
            note = f"best {best()['perplexity']:.4f} (trial {trials.index(best()) + 1})"
        print(f"trial {i} of {args.trials}: perplexity {perplexity:.4f}, {note}", file=sys.stderr)
    if best()["perplexity"] is None:
        raise ValueError("every trial failed; try --dtype float32")
    replace(args.output, best()["tau"])  # if no trial was left to run, it may be missing
    return best()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", metavar="FILE", help="a text, such as a validation set")
    add("--rosters", metavar="N", type=number(int, 2, 1024), nargs="+", default=[4], help="rosters per token [4]")
    add("--trials", metavar="N", type=number(int, 1), default=50, help="stop after these, earlier runs' included [50]")
    add("--output", metavar="FILE", type=Path, default="tau.json", help="the best temperatures [tau.json]")
    add("--tau-max", metavar="TAU", type=number(float, 0.001, 100), default=0.5, help="search from 0 to here [0.5]")
    add("--skip", metavar="L", type=number(int, 0), default=1, help="layers without noise at each end [1]")
    add("--weights", choices=["clean", "perturbed"], default="perturbed", help="as in roe.py [perturbed]")
    add("--seed", metavar="N", type=number(int, 0, 2**31), default=0, help="of the noise and of the search [0]")
    add("--model", help="directory or hub id [the small model that comes with RoE]")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... [a GPU if there is one]")
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="[as weights are stored]")
    parser.error = fail
    for stream in (sys.stdout, sys.stderr):  # a terminal may not know all characters of a name
        stream.reconfigure(errors="backslashreplace")
    args = parser.parse_args()
    args.rosters = sorted(set(args.rosters))
    try:
        import optuna  # noqa: F401
    except ImportError:
        fail('the search needs Optuna; install it with: pip install -e ".[tune]"')
    try:
        text = read_text("-", args.file)
        lock = FileLock(f"{args.output}.log.lock")  # held as long as there is this variable
        log, trials = open_log(args.output, lock)
        with log:
            source, folder, config, tokenizer = describe(args.model)
            if not any(temperatures(config, args.tau_max, args.skip)):
                raise ValueError("no layer is left to tune; lower --skip")
            tokens = tokenizer.encode(text).ids
            as_ids(tokens, "cpu", least=2)
            model = load_weights(source, config, args.device, args.dtype)
            contents = hashlib.sha256(text.encode()).hexdigest(), checksum(folder), str(model.dtype), model.device.type
            options = args.rosters, args.tau_max, args.skip, args.weights, args.seed
            search = dict(zip(SEARCH, contents + options))
            trials = [trial for trial in trials if search.items() <= trial.items()]
            best = tune(args, model, tokens, search, trials, log)
    except (ValueError, OSError) as error:
        fail(error)
    try:
        print(f"{args.output}: perplexity {best['perplexity']:.4f} with", best["tau"], flush=True)
    except OSError as error:  # the search is done all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"the result is in {str(args.output)!r}, but cannot be printed: {error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    main()
